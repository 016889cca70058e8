"""Precision of inference: true float32 (no TF32), or bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def computing_in(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """While active, networks with float32 weights compute in `dtype`, float32 or bfloat16.

    float32   with TF32 off: convolutions and matrix products on CUDA keep all 23 bits of the mantissa. By default
              torch lets cuDNN's convolutions round their operands to TF32's 10 bits
    bfloat16  by autocast: convolutions and attention round their operands to 7 bits and accumulate in float32; what a
              network casts to float32 itself, such as the VAE's norms, stays float32
    """
    if dtype == torch.bfloat16:
        with torch.autocast(device.type, torch.bfloat16):
            yield
        return
    assert dtype == torch.float32, dtype
    backends = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, was in zip(backends, before, strict=True):
            backend.fp32_precision = was
