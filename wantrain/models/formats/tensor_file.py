"""Writing a safetensors file as a stream, with its sha256 computed meanwhile.

The format: eight bytes with the length of the header (little-endian), the header (JSON, padded with spaces to a
multiple of eight), then the bytes of all tensors without gaps. The bytes equal those of the safetensors library, except
that metadata is sorted: the same weights give the same file and hash.
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from wantrain.util.progress import report_progress
from wantrain.util.tensor_dtypes import SAFETENSORS_DTYPES

#: torch aligns its tensors to so many bytes; computing with one aligned otherwise changes the last digits.
ALIGNMENT = 64
#: Key of a file's metadata whose value is spaces, to align the tensors.
PADDING = "padding"
#: Bytes written and hashed at once. A GiB took 0.3 s in pieces of 1 MiB and 1.2 to 3.4 s in pieces of 8 MiB (Linux,
#: ext4), for which the kernel searches long runs of free memory.
PIECE = 1 << 20
#: Pieces that the hash may be behind the writing.
BEHIND = 16
#: The format's name of each dtype, in the order of tensors in a file.
DTYPES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_PLACES = {dtype: place for place, dtype in enumerate(DTYPES)}


class Described(Protocol):
    """What a header says of a tensor: a tensor itself, or what stands for one."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def nbytes(self) -> int: ...


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str], *, aligned: bool) -> str:
    """Write a file and return its sha256, in hex. Tensors are copied to the CPU one at a time.

    about    the file's metadata
    aligned  pad the header so that tensors begin at a multiple of ALIGNMENT and can be used as they are mapped

    ValueError for a dtype that the format does not have.
    """
    names = in_order(tensors, path)
    with path.open("wb") as file, Hasher() as hasher:
        for piece in pieces(header(tensors, names, about, aligned=aligned), (tensors[name] for name in names)):
            report_progress(f"writing {path}")
            hasher.add(piece)
            file.write(piece)
    return hasher.digest.hexdigest()


def in_order(tensors: Mapping[str, Described], path: Path) -> list[str]:
    """Names in the order of the tensors in a file: by dtype, those of many bytes first, then by name."""
    unknown = sorted({str(tensor.dtype) for tensor in tensors.values() if tensor.dtype not in DTYPES})
    if unknown:
        raise ValueError(f"{path} cannot hold {', '.join(unknown)}: safetensors has no such dtype; convert it first")
    return sorted(tensors, key=lambda name: (_PLACES[tensors[name].dtype], name))


def header(tensors: Mapping[str, Described], names: Sequence[str], about: Mapping[str, str], *, aligned: bool) -> bytes:
    """The bytes before the first tensor."""
    entries, end = dict[str, Any](), 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        entries[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": shape, "data_offsets": [begin, end]}
    text = _json(about, entries)
    if aligned:
        unpadded = len(_json({**about, PADDING: ""}, entries))
        text = _json({**about, PADDING: " " * (-(8 + unpadded) % ALIGNMENT)}, entries)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _json(about: Mapping[str, str], entries: Mapping[str, Any]) -> bytes:
    contents = {"__metadata__": dict(sorted(about.items())), **entries}
    return json.dumps(contents, separators=(",", ":"), ensure_ascii=False).encode()


def pieces(head: bytes, tensors: Iterator[Tensor]) -> Iterator[memoryview]:
    """The bytes of a file, at most PIECE at once; a contiguous tensor on the CPU is not copied."""
    yield memoryview(head)
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        yield from (memoryview(part.numpy()) for part in flat.split(PIECE))


class Hasher:
    """Computes the sha256 of pieces in a thread, so that hashing and writing run at the same time.

    At most BEHIND pieces wait for it, so that a copy of a tensor is freed soon.
    """

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.waiting: queue.Queue[memoryview | None] = queue.Queue(BEHIND)
        # Not an executor's thread: none can be started while the interpreter exits, when a checkpoint may be written.
        self.thread = threading.Thread(target=self._hash, name="sha256", daemon=True)

    def add(self, piece: memoryview) -> None:
        """Add a piece, which must not change until the hash is complete."""
        self.waiting.put(piece)

    def __enter__(self) -> Hasher:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.waiting.put(None)
        self.thread.join()

    def _hash(self) -> None:
        while (piece := self.waiting.get()) is not None:
            self.digest.update(piece)
