"""In which precision a network computes at inference: float32 that is float32, or bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def computing_in(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """While active, networks with float32 weights compute in `dtype`, float32 or bfloat16.

    float32   with TF32 off: convolutions and products on CUDA keep the 23 bits of a float32's mantissa. By itself
              torch lets cuDNN's convolutions round their operands to the 10 of TF32
    bfloat16  by autocast: convolutions and attention round their operands to 7 bits and add up in float32; what a
              network computes in float32 by its own cast, such as the VAE's norms, stays so
    """
    if dtype == torch.bfloat16:
        with torch.autocast(device.type, torch.bfloat16):
            yield
        return
    assert dtype == torch.float32, dtype
    kinds = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "ieee"
        yield
    finally:
        for kind, was in zip(kinds, before, strict=True):
            kind.fp32_precision = was
