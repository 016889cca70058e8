"""Frozen linear layers whose weight is stored in 8 or 4 bits: the base of a LoRA or DoRA in less memory.

Formats, with bytes per element of the weight:

fp8   1      float8, one scale per row (of a published fp8 file: its own bytes and scale)
int8  1      -127 to 127, one scale per row
nf4   0.5625 sixteen values placed by the normal distribution, one scale per 64 elements (arXiv 2305.14314)

Beside each there may be a frozen product of low rank r in full (SVDQuant's branch), which is added: r * (out + in)
elements.

Only the weights of linear layers inside the repeated blocks are stored so; all else is as in an unquantised model. A
layer computes with its weight in the dtype of the computation, made for the call and made again in the backward pass:
outputs and gradients are those of a linear layer that holds these values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
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
class Format:
    """How weights are stored in few bytes.

    name      one of FORMATS
    low_rank  rank of the product beside each weight; None: there is none
    """

    name: str
    low_rank: int | None = None

    def __str__(self) -> str:
        return self.name if self.low_rank is None else f"{self.name}, each beside a product of rank {self.low_rank}"

    def rank_beside(self, weight: Tensor) -> int | None:
        """The rank of the product beside a weight (out, in). ValueError if it has no such rank."""
        if self.low_rank is not None and self.low_rank > min(weight.shape):
            raise ValueError(
                f"base.low_rank={self.low_rank}: the model has a weight of {' x '.join(map(str, weight.shape))}, whose "
                f"rank is at most {min(weight.shape)}; 16 to 64 are usual"
            )
        return self.low_rank


@dataclass(frozen=True)
class Stored:
    """A weight in few bytes.

    data    uint8, (out, in); in nf4 two elements a byte, (out * in / 2, 1)
    scale   float32: (out, 1), or (1, 1) for the whole weight; in nf4 (out * in / 64,)
    coding  the dtype that the bytes of `data` are read as; None: nf4
    shape   (out, in) of the weight
    up, down  (out, r) and (r, in): their product is added; None: there is none
    """

    data: Tensor
    scale: Tensor
    coding: torch.dtype | None
    shape: torch.Size
    up: Tensor | None = None
    down: Tensor | None = None

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in): each element is computed in float32 and rounded once, to `dtype`; and once more where
        a product is added.
        """
        weight = self._few_bytes(dtype)
        if self.up is not None and self.down is not None:
            weight.addmm_(self.up.to(dtype), self.down.to(dtype))
        return weight

    def left_of(self, weight: Tensor) -> Tensor:
        """What is missing to a weight (out, in), float32."""
        return self.dequantized(torch.float32).neg_().add_(weight.detach())

    def _few_bytes(self, dtype: torch.dtype) -> Tensor:
        """The weight without the product."""
        if self.coding is not None:
            return self.data.view(self.coding).to(dtype).mul_(self.scale)
        kernels, flat = _bitsandbytes(), torch.Size((self.shape.numel(),))
        # As one row: in bitsandbytes 0.50 the CPU's kernel takes a wrong scale where rows are no multiple of a block.
        state = kernels.QuantState(self.scale, flat, None, BLOCK, "nf4", dtype)
        weight: Tensor = kernels.dequantize_4bit(self.data, state)
        return weight.view(self.shape)


def quantize(weight: Tensor, form: Format) -> Stored:
    """A weight (out, in) in a format, on its device. NaN, infinity and rows of zeros show in the scale.

    The product, float32, begins as the weight's largest singular values, and few bytes take the rest (as in SVDQuant,
    arXiv 2411.05007); or as nothing, where that leaves less. Then it is fitted to what few bytes leave of the weight.
    docs/numerics.md has the errors.
    """
    rank = form.rank_beside(weight)
    alone = _in_few_bytes(_own_copy(weight), form.name)
    if rank is None:
        return alone
    values = _own_copy(weight)
    up, down = nearest_product(values, rank)
    rest = _in_few_bytes(values.addmm_(up, down, alpha=-1), form.name)
    del values
    if replace(rest, up=up, down=down).left_of(weight).norm() > alone.left_of(weight).norm():
        rest = alone
    up, down = nearest_product(rest.left_of(weight), rank)
    return replace(rest, up=up, down=down)


def _own_copy(weight: Tensor) -> Tensor:
    """A float32 copy to be overwritten: each step of quantisation holds one, all else is in place."""
    return weight.detach().to(torch.float32, copy=True)


def _in_few_bytes(values: Tensor, name: str) -> Stored:
    """A float32 weight (out, in), which is overwritten, in one of FORMATS."""
    if name == "nf4":
        data, state = _bitsandbytes().quantize_4bit(values, blocksize=BLOCK, quant_type="nf4")
        return Stored(data, state.absmax, None, values.shape)
    coding, largest = _ROWS[name]
    scale = torch.linalg.vector_norm(values, ord=torch.inf, dim=1, keepdim=True) / largest
    values.div_(scale.clamp(min=torch.finfo(torch.float32).tiny)).clamp_(-largest, largest)
    if coding == torch.int8:
        values.round_()
    return Stored(values.to(coding).view(torch.uint8), scale, coding, values.shape)


def nearest_product(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(out, rank) and (rank, in) whose product is nearly as close to `matrix` as any of that rank.

    By a random sketch of twice the rank (arXiv 0909.4061), the same in every call.
    """
    if not matrix.sum().isfinite():  # there are no singular values, and loading names the damaged weight
        return matrix.new_full((len(matrix), rank), torch.nan), matrix.new_full((rank, matrix.shape[1]), torch.nan)
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(matrix, q=min(2 * rank, *matrix.shape), niter=1)
    roots = values[:rank].sqrt()
    return left[:, :rank] * roots, (right[:, :rank] * roots).t().contiguous()


def shapes_only(weight: Tensor, form: Format) -> Stored:
    """What `quantize` gives for a weight on the meta device: no values, and no library asked."""
    (rows, columns), rank = weight.shape, form.rank_beside(weight)
    coding = None if form.name == "nf4" else _ROWS[form.name][0]
    sizes = (rows, columns) if coding is not None else (-(-rows * columns // 2), 1)
    scales = (rows, 1) if coding is not None else (-(-rows * columns // BLOCK),)
    data, scale = weight.new_empty(sizes, dtype=torch.uint8), weight.new_empty(scales, dtype=torch.float32)
    up, down = (None, None) if rank is None else (weight.new_empty(rows, rank), weight.new_empty(rank, columns))
    return Stored(data, scale, coding, weight.shape, up, down)


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight is stored in few bytes; its parameters are never trained.

    weight_stored, weight_scale  the weight's bytes and scales (Stored.data, Stored.scale)
    weight_up, weight_down       the product beside them (Stored.up, Stored.down) in `dtype`, or None
    bias                         as in nn.Linear
    dtype                        what `weight` is dequantised to
    """

    weight_up: nn.Parameter | None
    weight_down: nn.Parameter | None

    def __init__(self, stored: Stored, bias: Tensor | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = stored.shape
        self.dtype, self.coding = dtype, stored.coding
        self.weight_stored = nn.Parameter(stored.data, requires_grad=False)
        self.weight_scale = nn.Parameter(stored.scale, requires_grad=False)
        up, down = (None if part is None else part.to(dtype) for part in (stored.up, stored.down))
        for name, tensor in {"weight_up": up, "weight_down": down, "bias": bias}.items():
            own = None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
            self.register_parameter(name, own)

    @property
    def stored(self) -> Stored:
        """The weight as it is stored."""
        up, down = (None if part is None else part.data for part in (self.weight_up, self.weight_down))
        return Stored(self.weight_stored.data, self.weight_scale.data, *self._how, up, down)

    @property
    def _how(self) -> tuple[torch.dtype | None, torch.Size]:
        """What the bytes are read as, and the weight's shape."""
        return self.coding, torch.Size((self.out_features, self.in_features))

    @property
    def parts(self) -> dict[str, Tensor]:
        """The parameters that hold the weight, by name."""
        parts: dict[str, Tensor] = {"weight_stored": self.weight_stored, "weight_scale": self.weight_scale}
        if self.weight_up is not None and self.weight_down is not None:
            parts |= {"weight_up": self.weight_up, "weight_down": self.weight_down}
        return parts

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
        parts = (self.weight_stored, self.weight_scale, self._how, self.weight_up, self.weight_down)
        result: Tensor = _Frozen.apply(x.to(dtype), bias, *parts)
        return result


class _Frozen(torch.autograd.Function):
    """x W^T + b for a stored W. Kept for the backward pass: W as it is stored, neither x nor the dequantised weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Any, data: Tensor, scale: Tensor, how: Any, up: Tensor | None, down: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(data, scale, up, down)
        ctx.how = coding, shape = how
        return F.linear(x, Stored(data, scale, coding, shape, up, down).dequantized(x.dtype), bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (data, scale, up, down), (coding, shape) = ctx.saved_tensors, ctx.how
        return grad @ Stored(data, scale, coding, shape, up, down).dequantized(grad.dtype), *[None] * 6


def quantizable(module: nn.Module) -> list[str]:
    """Names of the linear layers inside the repeated blocks."""
    return [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and place_in_blocks(module, name) is not None
    ]


def replace_layer(module: nn.Module, name: str, stored: Stored, dtype: torch.dtype) -> QuantizedLinear:
    """Put a stored weight in the place of the linear layer `name`, which keeps its bias; returns the layer."""
    layer = module.get_submodule(name)
    assert isinstance(layer, nn.Linear), name
    module.set_submodule(name, quantized := QuantizedLinear(stored, layer.bias, dtype))
    return quantized


def as_if_loaded(module: nn.Module, form: Format, dtype: torch.dtype) -> None:
    """Give a module without values (on the meta device) the layers that loading it in a format gives."""
    for name in quantizable(module):
        replace_layer(module, name, shapes_only(module.get_submodule(name).weight, form), dtype)  # type: ignore[arg-type]


def quantized_layers(module: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """The quantised layers of a module, by name."""
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, QuantizedLinear))


def count(module: nn.Module) -> int:
    """Parameters of the model that a module holds: a stored weight counts its elements, and not what stores them."""
    total = sum(parameter.numel() for parameter in module.parameters())
    for _, layer in quantized_layers(module):
        total += layer.stored.shape.numel() - sum(part.numel() for part in layer.parts.values())
    return total


def check_library(name: str) -> None:
    """ValueError if a format, one of FORMATS, needs a library that is not installed."""
    if name == "nf4":
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
