"""Tensors of a safetensors file or member where its bytes lie: nothing is copied, so that what is mapped is read once.

The library's own `load` takes bytes alone and copies them twice, which is most of what a batch costs.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: What a header calls each dtype.
DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "BOOL": torch.bool,
    "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64, "U64": torch.uint64,
}  # fmt: skip


def map_file(path: Path) -> memoryview:
    """A file's bytes, mapped."""
    with path.open("rb") as file:
        # Private, not read-only: torch warns of tensors that may not be written to.
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def tensors_in(content: memoryview) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name; they are views of `content`.

    ValueError, KeyError or TypeError if it is damaged. Source of the layout: the safetensors format, its README.
    """
    (length,) = struct.unpack("<Q", content[:8])
    if 8 + length > len(content):
        raise ValueError(f"a header of {length} bytes in {len(content)}")
    header: dict[str, Any] = json.loads(bytes(content[8 : 8 + length]))
    header.pop("__metadata__", None)
    return {name: _tensor(content[8 + length :], **told) for name, told in header.items()}


def _tensor(values: memoryview, *, dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
    (begin, end), kind, count = data_offsets, DTYPES[dtype], math.prod(shape)
    if not 0 <= begin <= end <= len(values) or end - begin != count * kind.itemsize:
        raise ValueError(f"values at {begin} to {end} of {len(values)} for {shape} of {dtype}")
    if count == 0:  # frombuffer takes no empty buffer
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(values, dtype=kind, count=count, offset=begin).reshape(shape)
