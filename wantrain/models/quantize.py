"""Frozen linear layers whose weight is stored in 8 or 4 bits: the base of a LoRA or DoRA in less memory.

Formats, with bytes per element of the weight:

fp8   1      float8, one scale per row (of a published fp8 file: its own bytes and scale)
int8  1      -127 to 127, one scale per row
nf4   0.5625 sixteen values placed by the normal distribution, one scale per 64 elements (arXiv 2305.14314)

Only the weights of linear layers inside the repeated blocks are stored so; all else is as in an unquantised model. A
layer computes with its weight in the dtype of the computation, made for the call and made again in the backward pass:
outputs and gradients are those of a linear layer that holds these values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from wantrain.models.facts import place_in_blocks
from wantrain.util import libraries

FORMATS = ("fp8", "int8", "nf4")
#: Elements that share a scale in nf4.
BLOCK = 64
#: Dtype of the stored bytes and the largest number that a scale maps a row's largest to.
_ROWS = {"fp8": (torch.float8_e4m3fn, 448.0), "int8": (torch.int8, 127.0)}


@dataclass(frozen=True)
class Stored:
    """A weight in few bytes.

    data    uint8, (out, in); in nf4 two elements a byte, (out * in / 2, 1)
    scale   float32: (out, 1), or (1, 1) for the whole weight; in nf4 (out * in / 64,)
    coding  the dtype that the bytes of `data` are read as; None: nf4
    shape   (out, in) of the weight
    """

    data: Tensor
    scale: Tensor
    coding: torch.dtype | None
    shape: torch.Size

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in): each element is computed in float32 and rounded once, to `dtype`."""
        if self.coding is not None:
            return self.data.view(self.coding).to(dtype).mul_(self.scale)
        kernels, flat = _bitsandbytes(), torch.Size((self.shape.numel(),))
        # As one row: in bitsandbytes 0.50 the CPU's kernel takes a wrong scale where rows are no multiple of a block.
        state = kernels.QuantState(self.scale, flat, None, BLOCK, "nf4", dtype)
        weight: Tensor = kernels.dequantize_4bit(self.data, state)
        return weight.view(self.shape)


def quantize(weight: Tensor, kind: str) -> Stored:
    """A weight (out, in) in one of FORMATS, on its device. NaN, infinity and rows of zeros show in the scale."""
    if kind == "nf4":
        data, state = _bitsandbytes().quantize_4bit(weight.detach().float(), blocksize=BLOCK, quant_type="nf4")
        return Stored(data, state.absmax, None, weight.shape)
    coding, largest = _ROWS[kind]
    units = weight.detach().to(torch.float32, copy=True)  # the only float32 copy: all that follows is in place
    scale = torch.linalg.vector_norm(units, ord=torch.inf, dim=1, keepdim=True) / largest
    units.div_(scale.clamp(min=torch.finfo(torch.float32).tiny)).clamp_(-largest, largest)
    if coding == torch.int8:
        units.round_()
    return Stored(units.to(coding).view(torch.uint8), scale, coding, weight.shape)


def shapes_only(weight: Tensor, kind: str) -> Stored:
    """What `quantize` gives for a weight on the meta device: no values, and no library asked."""
    rows, columns = weight.shape
    if kind == "nf4":
        data = weight.new_empty(-(-rows * columns // 2), 1, dtype=torch.uint8)
        return Stored(data, weight.new_empty(-(-rows * columns // BLOCK), dtype=torch.float32), None, weight.shape)
    scale = weight.new_empty(rows, 1, dtype=torch.float32)
    return Stored(weight.new_empty(weight.shape, dtype=torch.uint8), scale, _ROWS[kind][0], weight.shape)


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight is stored in few bytes; its parameters are never trained.

    weight_stored, weight_scale  the weight's bytes and scales (Stored.data, Stored.scale)
    bias                         as in nn.Linear
    dtype                        what `weight` is dequantised to
    """

    def __init__(self, stored: Stored, bias: Tensor | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = stored.shape
        self.dtype, self.coding = dtype, stored.coding
        self.weight_stored = nn.Parameter(stored.data, requires_grad=False)
        self.weight_scale = nn.Parameter(stored.scale, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @property
    def stored(self) -> Stored:
        """The weight as it is stored."""
        shape = torch.Size((self.out_features, self.in_features))
        return Stored(self.weight_stored.data, self.weight_scale.data, self.coding, shape)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight (out, in), dequantised by each access."""
        return self.dequantized(self.dtype)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) in a dtype."""
        return self.stored.dequantized(dtype)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        shape = torch.Size((self.out_features, self.in_features))
        result: Tensor = _Frozen.apply(x.to(dtype), self.weight_stored, self.weight_scale, bias, (self.coding, shape))
        return result


class _Frozen(torch.autograd.Function):
    """x W^T + b for a stored W. Kept for the backward pass: the stored bytes, neither x nor the dequantised weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, how: Any) -> Tensor:
        ctx.save_for_backward(data, scale)
        ctx.how = how
        return F.linear(x, Stored(data, scale, *how).dequantized(x.dtype), bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        data, scale = ctx.saved_tensors
        return grad @ Stored(data, scale, *ctx.how).dequantized(grad.dtype), None, None, None, None


def quantizable(module: nn.Module) -> list[str]:
    """Names of the linear layers inside the repeated blocks."""
    return [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and place_in_blocks(module, name) is not None
    ]


def replace_layer(module: nn.Module, name: str, stored: Stored, dtype: torch.dtype) -> None:
    """Put a stored weight in the place of the linear layer `name`, which keeps its bias."""
    layer = module.get_submodule(name)
    assert isinstance(layer, nn.Linear), name
    module.set_submodule(name, QuantizedLinear(stored, layer.bias, dtype))


def as_if_loaded(module: nn.Module, kind: str, dtype: torch.dtype) -> None:
    """Give a module without values (on the meta device) the layers that loading it as `kind` gives."""
    for name in quantizable(module):
        replace_layer(module, name, shapes_only(module.get_submodule(name).weight, kind), dtype)  # type: ignore[arg-type]


def quantized_layers(module: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """The quantised layers of a module, by name."""
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, QuantizedLinear))


def count(module: nn.Module) -> int:
    """Parameters of the model that a module holds: a stored weight counts its elements, and its scales not."""
    total = sum(parameter.numel() for parameter in module.parameters())
    for _, layer in quantized_layers(module):
        total += layer.stored.shape.numel() - layer.weight_stored.numel() - layer.weight_scale.numel()
    return total


def check_library(kind: str) -> None:
    """ValueError if a format needs a library that is not installed."""
    if kind == "nf4":
        _bitsandbytes()


#: bitsandbytes' functions, once they are imported: compiled code cannot import.
_functional: Any = None


def _bitsandbytes() -> Any:
    """bitsandbytes' functions; imported where nf4 is used, as it takes two seconds."""
    global _functional
    if _functional is None:
        try:
            with libraries.importing():
                from bitsandbytes import functional
        except ImportError as error:
            raise ValueError(
                "base.dtype=nf4 needs bitsandbytes: pip install 'wantrain[quant]'; fp8 and int8 need no further library"
            ) from error
        _functional = functional
    return _functional
