"""One safetensors file, written as a stream whose sha256 is made beside the writing.

The format: eight bytes with the length of the header (little-endian), the header (JSON, filled up with spaces to a
multiple of eight), then the bytes of all tensors without a gap. The bytes are those of the safetensors library, but for
the metadata, which stand in order here: the same weights are the same file, and so the same hash.
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from wantrain.util.progress import report_progress
from wantrain.util.tensor_dtypes import SAFETENSORS_DTYPES

#: Bytes at whose multiples torch begins its own tensors: one that begins elsewhere gives other last digits.
ALIGNMENT = 64
#: Key of a file's metadata that holds nothing but spaces.
PADDING = "padding"
#: Bytes that are written and hashed at once. Not more: a GiB took 0.3 s by pieces of 1 MiB and 1.2 to 3.4 s by those of
#: 8 MiB (Linux, ext4), where the kernel looks for long runs of free memory.
PIECE = 1 << 20
#: Pieces that the hash may be behind the writing.
BEHIND = 16
#: What the format calls each dtype, in the order in which tensors follow each other in a file.
DTYPES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_PLACES = {dtype: place for place, dtype in enumerate(DTYPES)}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str], *, aligned: bool) -> str:
    """Write a file and give its sha256, in hex. One tensor at a time is brought to the CPU, if it is not there.

    about    what the file says about itself
    aligned  pad the header so that tensors begin at a multiple of ALIGNMENT and can be used as they are mapped

    ValueError for a dtype that the format does not know.
    """
    names = in_order(tensors, path)
    with path.open("wb") as file, Hasher() as hasher:
        for piece in pieces(header(tensors, names, about, aligned=aligned), (tensors[name] for name in names)):
            report_progress(f"writing {path}")
            hasher.add(piece)
            file.write(piece)
    return hasher.digest.hexdigest()


def in_order(tensors: Mapping[str, Tensor], path: Path) -> list[str]:
    """Names in the order of the tensors in a file: by dtype, those of many bytes first, then by name."""
    unknown = sorted({str(tensor.dtype) for tensor in tensors.values() if tensor.dtype not in DTYPES})
    if unknown:
        raise ValueError(f"{path} cannot hold {', '.join(unknown)}: safetensors knows no such dtype; convert it first")
    return sorted(tensors, key=lambda name: (_PLACES[tensors[name].dtype], name))


def header(tensors: Mapping[str, Tensor], names: Sequence[str], about: Mapping[str, str], *, aligned: bool) -> bytes:
    """All that stands before the first tensor."""
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
    said = {"__metadata__": dict(sorted(about.items())), **entries}
    return json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode()


def pieces(head: bytes, tensors: Iterator[Tensor]) -> Iterator[memoryview]:
    """The bytes of a file, at most PIECE at once; a contiguous tensor on the CPU is not copied."""
    yield memoryview(head)
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        yield from (memoryview(part.numpy()) for part in flat.split(PIECE))


class Hasher:
    """The sha256 of pieces, made by a thread of its own: hashing leaves Python's lock to whoever writes meanwhile.

    At most BEHIND pieces wait for it, so that a copy of a tensor is not kept for long.
    """

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.waiting: queue.Queue[memoryview | None] = queue.Queue(BEHIND)
        # Not an executor's thread: none can be had when the interpreter ends, and a checkpoint is still written then.
        self.thread = threading.Thread(target=self._hash, name="sha256", daemon=True)

    def add(self, piece: memoryview) -> None:
        """The next piece; it must stay as it is until the hash is made."""
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
