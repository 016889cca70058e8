"""The GELU in its tanh approximation, and its gradient.

torch's kernels for a CPU spend their time in tanh. With z = A * x + B * x^3 the same function is x * sigmoid(z), and
sigmoid takes a fifth of tanh's time there. So in float32 on a CPU both are computed from it, piece by piece: a piece
stays in the processor's cache from one pass over it to the next. Elsewhere both are torch's, in one pass.
Source: Hendrycks and Gimpel, arXiv 1606.08415, with (1 + tanh(z / 2)) / 2 = sigmoid(z).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from wantrain.util.parts import parts

A = 2 * math.sqrt(2 / math.pi)
B = 0.044715 * A
#: Elements of a piece: 1 MiB.
PIECE = 1 << 18


class Gelu(nn.GELU):
    """The module, for layers that are called one by one: it gives the same as `gelu`, bit for bit."""

    def __init__(self) -> None:
        super().__init__(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not _by_sigmoid(x):
            return super().forward(x)
        result: Tensor = _Gelu.apply(x)
        return result


def gelu(x_LD: Tensor) -> Tensor:
    """gelu(x), a new tensor."""
    if not _by_sigmoid(x_LD):
        return F.gelu(x_LD, approximate="tanh")
    result = torch.empty_like(x_LD)
    for place in _pieces(x_LD):
        _sigmoid(x_LD[place], result[place]).mul_(x_LD[place])
    return result


def gelu_slope(x_LD: Tensor) -> tuple[Tensor, Tensor | None]:
    """gelu(x), and its derivative at x where both come from one sigmoid."""
    if not _by_sigmoid(x_LD):
        return F.gelu(x_LD, approximate="tanh"), None
    result, slopes, a = torch.empty_like(x_LD), torch.empty_like(x_LD), x_LD.new_full((), A)
    for place in _pieces(x_LD):
        x, slope = x_LD[place], slopes[place]
        sigmoid = _sigmoid(x, torch.empty_like(x))
        torch.mul(x, sigmoid, out=result[place])
        # sigmoid(z) + x * sigmoid'(z) * dz/dx
        torch.addcmul(a, x, x, value=3 * B, out=slope)
        slope.mul_(torch.ops.aten.sigmoid_backward(x, sigmoid)).add_(sigmoid)
    return result, slopes


def gelu_backward(grad_LD: Tensor, x_LD: Tensor, slope_LD: Tensor | None) -> Tensor:
    """The gradient of x, from that of gelu(x), in its place; `slope` as `gelu_slope` gave it."""
    if slope_LD is not None:
        return grad_LD.mul_(slope_LD)
    return torch.ops.aten.gelu_backward.grad_input(grad_LD, x_LD, approximate="tanh", grad_input=grad_LD)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return gelu(x.reshape(-1, x.shape[-1])).view(x.shape)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        _, slope = gelu_slope(x.reshape(-1, x.shape[-1]))
        assert slope is not None
        return grad * slope.view(x.shape)


def _by_sigmoid(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32


def _pieces(x_LD: Tensor) -> Iterator[slice]:
    return (place for _, place in parts(1, len(x_LD), max(1, PIECE // x_LD.shape[1])))


def _sigmoid(x: Tensor, out: Tensor) -> Tensor:
    """sigmoid(z) of x, in `out`."""
    return torch.addcmul(x.new_full((), A), x, x, value=B, out=out).mul_(x).sigmoid_()
