"""Linear layers of a block, with or without an adapter, computed together and differentiated by hand.

Layers that share an input are one function, and so is a feed-forward network (feed_forward.py): gradients of the input
are summed inside matrix products, and a LoRA adds to the frozen layer's output in place. Kept for the backward are the
input, or where it comes from a norm and its weights are frozen, the norm's parts; of a frozen layer without an adapter,
nothing. Weights are read again in the backward: autocast's copies of them are not kept.

A layer that this module cannot look into (DoRA, LoKr, or one with hooks, as ZeRO-3 puts them on every layer) is called
as it is, and so are all inside a compiled block.

Tensor suffixes: L tokens of all samples, D width in, E width out, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wantrain.models.fused import Exact, affine_of

#: How many of `arguments` come before those that may have a gradient.
FIXED = 8


class LowRank(NamedTuple):
    """What a LoRA adds to a layer: scale * up @ down."""

    down_rD: Tensor
    up_Er: Tensor
    scale: float


@dataclass(frozen=True)
class Layer:
    """A linear layer and what a LoRA adds to it."""

    base: nn.Linear
    low_rank: LowRank | None = None

    @classmethod
    def of(cls, module: nn.Module) -> Layer | None:
        """The layer that a module is; None where that is not all that calling it does."""
        base = getattr(module, "base_layer", module)
        if not isinstance(base, nn.Linear) or hooked(module):
            return None
        if base is module:
            return cls(base)
        if getattr(module, "disable_adapters", False):
            return cls(base)
        variants: Any = getattr(module, "lora_variant", {})  # a LoKr has none
        read = getattr(variants.get("default"), "low_rank", None)
        return None if read is None or module.merged else cls(base, read(module))

    @property
    def trained(self) -> list[Tensor | None]:
        """Weight, bias, down, up: None for those that there are not, or that are frozen."""
        parameters = [*_own(self.base), *(self.low_rank[:2] if self.low_rank is not None else (None, None))]
        return [each if each is not None and each.requires_grad else None for each in parameters]

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The base's (E, D)."""
        dequantized = getattr(self.base, "dequantized", None)
        return self.base.weight.to(dtype) if dequantized is None else dequantized(dtype)

    def narrow(self, x_LD: Tensor) -> Tensor | None:
        """The LoRA's activations between down and up (L, r), scaled."""
        if self.low_rank is None:
            return None
        narrow = F.linear(x_LD, self.low_rank.down_rD.to(x_LD.dtype))
        return narrow if self.low_rank.scale == 1 else narrow.mul_(self.low_rank.scale)

    def empty_narrow(self, x_LD: Tensor) -> Tensor | None:
        """Memory for the `narrow` of as many tokens."""
        return None if self.low_rank is None else x_LD.new_empty(len(x_LD), len(self.low_rank.down_rD))

    def product(
        self, x_LD: Tensor, weight: Tensor, out: Tensor | None = None, narrow_Lr: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's output (L, E), and `narrow`, computed unless it is given. `weight` is the base's."""
        bias = self.base.bias
        if bias is None:
            out = torch.mm(x_LD, weight.t(), out=out)
        else:
            out = torch.addmm(bias.to(x_LD.dtype), x_LD, weight.t(), out=out)
        narrow = self.narrow(x_LD) if narrow_Lr is None else narrow_Lr
        if narrow is not None:
            assert self.low_rank is not None
            torch.addmm(out, narrow, self.low_rank.up_Er.t().to(x_LD.dtype), out=out)
        return out, narrow

    def narrow_gradient(self, grad_LE: Tensor, out: Tensor | None = None) -> Tensor | None:
        """The gradient of what `down` returns, (L, r)."""
        if self.low_rank is None:
            return None
        narrow = torch.mm(grad_LE, self.low_rank.up_Er.to(grad_LE.dtype), out=out)
        return narrow if self.low_rank.scale == 1 else narrow.mul_(self.low_rank.scale)

    def input_gradient(
        self, grad_LE: Tensor, narrow_Lr: Tensor | None, weight: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """The gradient of the input (L, D); `narrow` is narrow_gradient's."""
        out = torch.mm(grad_LE, weight, out=out)
        if narrow_Lr is not None:
            assert self.low_rank is not None
            torch.addmm(out, narrow_Lr, self.low_rank.down_rD.to(grad_LE.dtype), out=out)
        return out


def linears(modules: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """What linear layers, with or without adapters, return for x (..., D)."""
    layers = [] if torch.compiler.is_compiling() else [Layer.of(module) for module in modules]
    if not layers or None in layers:
        return [module(x) for module in modules]
    results: tuple[Tensor, ...] = _Linears.apply(*arguments(x, [each for each in layers if each is not None]))
    return list(results)


def arguments(x: Tensor, layers: list[Layer]) -> tuple[Any, ...]:
    """What the functions take: the input, its parts if these are what is kept, layers, dtype, whether anything is
    kept, and all that may have a gradient.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    trained = [each for layer in layers for each in layer.trained]
    keep = torch.is_grad_enabled() and (x.requires_grad or any(each is not None for each in trained))
    affine = affine_of(x) if layers[0].trained[0] is None else None
    return x, *(affine or (None, None, None, None)), layers, dtype, keep, *trained


class _Linears(Exact):
    @staticmethod
    def _forward(ctx: Any, x: Tensor, hat: Any, gain: Any, shift: Any, lengths: Any, *rest: Any) -> Any:
        layers, dtype, keep, *trained = rest
        flat = x.to(dtype).reshape(-1, x.shape[-1])
        narrows = _narrows(layers, flat)
        both = zip(layers, narrows, strict=True)
        outs = [layer.product(flat, layer.weight(dtype), narrow_Lr=narrow)[0] for layer, narrow in both]
        ctx.layers, ctx.shape, ctx.dtype, ctx.lengths = layers, x.shape, x.dtype, lengths
        if keep:
            ctx.save_for_backward(*source_of(flat, hat, gain, shift, trained), *narrows)
        return tuple(out.view(*x.shape[:-1], -1) for out in outs)

    @staticmethod
    def _backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        flat, hat, gain, shift, *narrows = ctx.saved_tensors
        of_x, wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[FIXED:]
        grads = tuple(grad.reshape(-1, grad.shape[-1]) for grad in grads)
        downs, total, found = _downs(ctx.layers, grads[0].dtype), None, list[Any]()
        inner = None if downs is None else grads[0].new_empty(len(grads[0]), len(downs))
        for number, (layer, grad, own) in enumerate(zip(ctx.layers, grads, _by_layer(ctx.layers, inner), strict=True)):
            of_weight, of_bias, _, of_up = wanted[4 * number : 4 * number + 4]
            layer.narrow_gradient(grad, out=own)
            found += [
                grad.t() @ flat if of_weight else None,
                grad.sum(0, dtype=layer.base.bias.dtype) if of_bias else None,
                None,
                (narrows[number].t() @ grad).t() if of_up else None,  # few rows: faster on a CPU than few columns
            ]
            if of_x:
                weight = layer.weight(grad.dtype)
                total = grad @ weight if total is None else torch.addmm(total, grad, weight, out=total)
        if inner is not None and any(wanted[2::4]):
            found[2::4] = _by_layer(ctx.layers, down_gradient(inner, flat, hat, gain, shift, ctx.lengths), dim=0)
        if downs is not None and inner is not None and total is not None:
            torch.addmm(total, inner, downs, out=total)
        grad_x = None if total is None else total.view(ctx.shape).to(ctx.dtype)
        return grad_x, *(None,) * (FIXED - 1), *as_trained(found, ctx.layers)


def _downs(layers: Sequence[Layer], dtype: torch.dtype) -> Tensor | None:
    """What the LoRAs of layers that share an input multiply it by, one below the other: (R, D), R the sum of ranks."""
    found = [layer.low_rank.down_rD.to(dtype) for layer in layers if layer.low_rank is not None]
    return (torch.cat(found) if len(found) > 1 else found[0]) if found else None


def _by_layer(layers: Sequence[Layer], joint: Tensor | None, dim: int = 1) -> list[Tensor | None]:
    """Each layer's part of what belongs to the LoRAs of all, which are R along `dim`."""
    if joint is None:
        return [None] * len(layers)
    own = iter(joint.split([len(layer.low_rank.down_rD) for layer in layers if layer.low_rank is not None], dim))
    return [None if layer.low_rank is None else next(own) for layer in layers]


def _narrows(layers: Sequence[Layer], x_LD: Tensor) -> list[Tensor | None]:
    """`narrow` of layers that share an input, which is read once."""
    downs = _downs(layers, x_LD.dtype)
    narrows = _by_layer(layers, None if downs is None else F.linear(x_LD, downs))
    for layer, narrow in zip(layers, narrows, strict=True):
        if narrow is not None and layer.low_rank is not None and layer.low_rank.scale != 1:
            narrow.mul_(layer.low_rank.scale)
    return narrows


def source_of(flat: Tensor, hat: Any, gain: Any, shift: Any, trained: list[Any]) -> list[Tensor | None]:
    """What weights' gradients need of the input: itself, or its parts, or nothing."""
    if not any(each is not None for place, each in enumerate(trained) if place % 4 in {0, 2}):
        return [None] * 4
    return [flat, None, None, None] if hat is None else [None, hat, gain, shift]


def down_gradient(narrow_Lr: Tensor, flat: Any, hat: Any, gain: Any, shift: Any, lengths: Any) -> Tensor:
    """The gradient of `down` (r, D), from that of its result; by rows of modulation where the input is in parts."""
    if flat is not None:
        whole: Tensor = narrow_Lr.t() @ flat
        return whole
    if lengths is None:
        rows = narrow_Lr.view(*hat.shape[:2], -1)
        products, sums = rows.transpose(1, 2) @ hat, rows.sum(1, dtype=gain.dtype)  # (R, r, D), (R, r)
    else:
        both = zip(narrow_Lr.split(lengths), hat[0].split(lengths), strict=True)
        each = [(narrow.t() @ own, narrow.sum(0, dtype=gain.dtype)) for narrow, own in both]
        products, sums = (torch.stack(rows) for rows in zip(*each, strict=True))
    return (products * gain.unsqueeze(1)).sum(0) + sums.t() @ shift


def as_trained(found: Sequence[Tensor | None], layers: Sequence[Layer]) -> list[Tensor | None]:
    """Gradients in the dtypes of what they belong to."""
    both = zip(found, (each for layer in layers for each in layer.trained), strict=True)
    return [None if grad is None or own is None else grad.to(own.dtype) for grad, own in both]


def _own(base: nn.Linear) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of a layer; without its weight where that is stored in few bytes and never trained."""
    return (None if hasattr(base, "dequantized") else base.weight), base.bias


def hooked(module: nn.Module) -> bool:
    """True if calling a module, or one inside it, does more than its forward."""
    return any(
        each._forward_hooks or each._forward_pre_hooks or each._backward_hooks or each._backward_pre_hooks
        for each in module.modules()
    )
