"""Tensors of a safetensors file or tar member as views of its mapped bytes, without a copy.

The library's own `load` takes only bytes and copies them twice, which is most of the cost of a batch.
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

from wantrain.util.tensor_dtypes import SAFETENSORS_DTYPES


def map_file(path: Path) -> memoryview:
    """The bytes of a file, mapped into memory."""
    with path.open("rb") as file:
        # A private mapping, not a read-only one: torch warns about tensors that are not writable.
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def tensors_in(content: memoryview) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name, as views of `content`.

    ValueError, KeyError or TypeError if it is damaged. Source: the format's description in the safetensors README.
    """
    (length,) = struct.unpack("<Q", content[:8])
    if 8 + length > len(content):
        raise ValueError(f"its header has {length} bytes, more than the {len(content)} of the file")
    header: dict[str, Any] = json.loads(bytes(content[8 : 8 + length]))
    header.pop("__metadata__", None)
    return {name: _tensor(content[8 + length :], **entry) for name, entry in header.items()}


def _tensor(values: memoryview, *, dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
    (begin, end), torch_dtype, count = data_offsets, SAFETENSORS_DTYPES[dtype], math.prod(shape)
    if not 0 <= begin <= end <= len(values) or end - begin != count * torch_dtype.itemsize:
        raise ValueError(f"bytes {begin} to {end} of {len(values)} do not hold a tensor {shape} of {dtype}")
    if count == 0:  # frombuffer does not accept an empty buffer
        return torch.empty(shape, dtype=torch_dtype)
    return torch.frombuffer(values, dtype=torch_dtype, count=count, offset=begin).reshape(shape)
