"""A safetensors file that several processes write together, each its own part of every tensor.

One process creates the file, with its header and its full size; then each writes its parts where the header says they
belong. The file is the one that a single process would have written, so every reader takes it. It needs a file system
that takes writes anywhere in a file from several processes, such as a local disk; not a bucket mounted as a folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wantrain.models.formats.tensor_file import DTYPES, PIECE, header, in_order
from wantrain.util.files import naming
from wantrain.util.progress import report_progress


@dataclass(frozen=True)
class Slice:
    """What one process holds of a tensor: consecutive elements of it, in the order of a contiguous one.

    shape, dtype  of the whole tensor
    start, count  the elements that this process writes; those of all processes make up the tensor
    values        gives them, in any shape and on any device
    """

    shape: torch.Size
    dtype: torch.dtype
    start: int
    count: int
    values: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.shape.numel() * self.dtype.itemsize


def create_file(path: Path, slices: Mapping[str, Slice], about: Mapping[str, object] | None = None) -> str:
    """Write the header of a file for these tensors and give it its full size. Returns no hash ("") as yet, in the place
    of a `WriteFile`. ValueError for a dtype that the format does not have.
    """
    names = in_order(slices, path)
    head = header(slices, names, {"format": "pt", **_words(about)}, aligned=True)
    with naming(path), path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(each.nbytes for each in slices.values()))
    return ""


def fill_file(path: Path, slices: Mapping[str, Slice]) -> None:
    """Write this process's parts of the tensors that a created file has, and flush them to the disk."""
    with naming(path):
        handle = os.open(path, os.O_RDWR)
        try:
            size = int.from_bytes(os.pread(handle, 8, 0), "little")
            entries: dict[str, Any] = json.loads(os.pread(handle, size, 8))
            entries.pop("__metadata__", None)
            for name, entry in entries.items():
                mine = slices[name]
                assert (entry["dtype"], entry["shape"]) == (DTYPES[mine.dtype], list(mine.shape)), name
                if mine.count:
                    report_progress(f"writing {path}: {name}")
                    begin = 8 + size + entry["data_offsets"][0] + mine.start * mine.dtype.itemsize
                    _write_at(handle, begin, mine)
            os.fsync(handle)
        finally:
            os.close(handle)


def _write_at(handle: int, begin: int, mine: Slice) -> None:
    values = mine.values().detach().cpu().contiguous().reshape(-1)
    assert (values.numel(), values.dtype) == (mine.count, mine.dtype)
    for part in values.view(torch.uint8).split(PIECE):
        left = memoryview(part.numpy())
        while left:
            written = os.pwrite(handle, left, begin)
            left, begin = left[written:], begin + written


def _words(about: Mapping[str, object] | None) -> dict[str, str]:
    return {key: str(value) for key, value in (about or {}).items() if value is not None}
