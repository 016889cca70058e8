"""Members of shards are read where they lie: the library's own tensors, without a copy; damage is an error."""

import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from wantrain.data.mmap import tensors_in
from wantrain.util.tensor_dtypes import SAFETENSORS_DTYPES

#: The dtypes that torch converts to; the library's writer lacks some others.
SUPPORTED = {name: SAFETENSORS_DTYPES[name] for name in ("BF16", "F16", "F32", "BOOL", "U8", "I32", "I64", "U64")}


def some():
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (7,), (), (2, 0, 4), (1, 1, 3, 2)]
    return {
        f"{name}-{number}": (torch.rand(shape, generator=generator) * 200).to(dtype)
        for name, dtype in SUPPORTED.items()
        for number, shape in enumerate(shapes)
    }


def test_zero_copy_tensors():
    """Tensors equal those of the safetensors library and lie in the given bytes."""
    content = bytearray(save(some(), metadata={"expert": "none"}))
    mine, theirs = tensors_in(memoryview(content)), load(bytes(content))
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype and torch.equal(mine[name], tensor)
    start = np.frombuffer(content, np.uint8).ctypes.data
    assert all(0 <= each.data_ptr() - start < len(content) for each in mine.values() if each.numel())


def changed(**changes):
    """One tensor of 4 float32, whose header says something else."""
    header = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}
    encoded = json.dumps({"latents": header}).encode()
    return struct.pack("<Q", len(encoded)) + encoded + bytes(16)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        b"\0" * 64,
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 3) + b"{1}",
        struct.pack("<Q", 2) + b"\xff\xfe",
        changed(dtype="F8"),
        changed(shape=[5]),
        changed(shape=[-4]),
        changed(shape="four"),
        changed(data_offsets=[0, 20], shape=[5]),
        changed(data_offsets=[-16, 0]),
        changed(data_offsets=[0]),
        changed(more=1),
    ],
)
def test_damage_is_an_error(content):
    with pytest.raises((ValueError, KeyError, TypeError, struct.error)):
        tensors_in(memoryview(content))
