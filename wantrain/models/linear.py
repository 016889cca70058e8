"""Linear layers of a block, with or without an adapter, computed together and differentiated by hand.

Layers that share an input are one function, and so is a feed-forward network: gradients of the input are summed inside
matrix products, and a LoRA adds to the frozen layer's output in place. Kept for the backward are the input, or where it
comes from a norm and its weights are frozen, the norm's parts; of a frozen layer without an adapter, nothing. Weights
are read again in the backward: autocast's copies of them are not kept.

A layer that this module cannot look into (DoRA, LoKr, or one with hooks, as ZeRO-3 puts them on every layer) is called
as it is, and so are all inside a compiled block.

Tensor suffixes: L tokens of all samples, D width in, E width out, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wantrain.models.fused import Exact, affine_of, by_rows, gated_residual, pieces, split
from wantrain.util.parts import parts

#: Tokens for which the inside of a feed-forward network exists at a time: enough for a GPU to be busy with.
PART = 2048


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
        if not isinstance(base, nn.Linear) or _hooked(module):
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

    def product(self, x_LD: Tensor, weight: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The layer's output (L, E), and `narrow`. `weight` is the base's."""
        bias = self.base.bias
        if bias is None:
            out = torch.mm(x_LD, weight.t(), out=out)
        else:
            out = torch.addmm(bias.to(x_LD.dtype), x_LD, weight.t(), out=out)
        narrow = self.narrow(x_LD)
        if narrow is not None:
            assert self.low_rank is not None
            torch.addmm(out, narrow, self.low_rank.up_Er.t().to(x_LD.dtype), out=out)
        return out, narrow

    def narrow_gradient(self, grad_LE: Tensor) -> Tensor | None:
        """The gradient of what `down` returns, (L, r)."""
        if self.low_rank is None:
            return None
        narrow = grad_LE @ self.low_rank.up_Er.to(grad_LE.dtype)
        return narrow if self.low_rank.scale == 1 else narrow.mul_(self.low_rank.scale)

    def input_gradient(
        self, grad_LE: Tensor, narrow_Lr: Tensor | None, weight: Tensor, out: Tensor | None = None, *, add: bool = False
    ) -> Tensor:
        """The gradient of the input (L, D); `narrow` is narrow_gradient's. With `add` it is added to `out`."""
        if add:
            assert out is not None
            torch.addmm(out, grad_LE, weight, out=out)
        else:
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
    results: tuple[Tensor, ...] = _Linears.apply(*_arguments(x, [each for each in layers if each is not None]))
    return list(results)


class FeedForward(nn.Sequential):
    """Linear, GELU (tanh), linear. The GELU's output is not kept, and exists for some tokens at a time where both
    weights are frozen.
    """

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__(nn.Linear(dim, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, dim))

    def forward(self, x: Tensor) -> Tensor:
        first, second = (None, None) if torch.compiler.is_compiling() else (Layer.of(self[0]), Layer.of(self[2]))
        if first is None or second is None or _hooked(self[1]):
            plain: Tensor = super().forward(x)
            return plain
        result: Tensor = _FeedForward.apply(*_arguments(x, [first, second]))
        return result


@contextmanager
def computed_again() -> Iterator[None]:
    """While active, a block is one that the backward computes again (activation checkpointing)."""
    token = _AGAIN.set(True)
    try:
        yield
    finally:
        _AGAIN.reset(token)


def gated_feed_forward(
    ffn: FeedForward, x_BTPD: Tensor, y_BLD: Tensor, gate_BTD: Tensor, lengths: Any = None
) -> Tensor:
    """x + ffn(y) * gate: the end of a block with `lengths` as in fused.py.

    Where a block is computed again, and gate and the network's own weights are frozen, the computation stops before
    this: its backward needs y alone, and computes the first layer again, for some tokens at a time.
    """
    layers = [] if torch.compiler.is_compiling() or gate_BTD.requires_grad else frozen_layers(ffn)
    if not (layers and _AGAIN.get() and torch.is_grad_enabled() and y_BLD.requires_grad):
        return gated_residual(x_BTPD, ffn(y_BLD), gate_BTD, lengths)
    y, hat, gain, shift, _, _, dtype, _, *trained = _arguments(y_BLD, layers)
    gate_RD, kept = by_rows(x_BTPD, gate_BTD), list[Any]()
    y = _Keep.apply(kept, y, y.to(dtype), hat, gain, shift, gate_RD)
    result: Tensor = _Tail.apply(x_BTPD, y, gate_RD, kept, layers, dtype, lengths, *trained)
    return result


def frozen_layers(ffn: FeedForward) -> list[Layer]:
    """The layers of a network whose own weights are frozen; none where they train, or cannot be looked into."""
    layers = [] if _hooked(ffn) else [Layer.of(ffn[0]), Layer.of(ffn[2])]
    found = [each for each in layers if each is not None and all(own is None for own in each.trained[:2])]
    return found if len(found) == 2 else []


def _arguments(x: Tensor, layers: list[Layer]) -> tuple[Any, ...]:
    """What both functions take: the input, its parts if these are what is kept, layers, dtype, whether anything is
    kept, and all that may have a gradient.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    trained = [each for layer in layers for each in layer.trained]
    keep = torch.is_grad_enabled() and (x.requires_grad or any(each is not None for each in trained))
    affine = affine_of(x) if layers[0].trained[0] is None else None
    return x, *(affine or (None, None, None, None)), layers, dtype, keep, *trained


_AGAIN: ContextVar[bool] = ContextVar("computed again", default=False)
#: How many of `_arguments` come before those that may have a gradient.
_FIXED = 8


class _Linears(Exact):
    @staticmethod
    def _forward(ctx: Any, x: Tensor, hat: Any, gain: Any, shift: Any, lengths: Any, *rest: Any) -> Any:
        layers, dtype, keep, *trained = rest
        flat = x.to(dtype).reshape(-1, x.shape[-1])
        outs, narrows = zip(*(layer.product(flat, layer.weight(dtype)) for layer in layers), strict=True)
        ctx.layers, ctx.shape, ctx.dtype, ctx.lengths = layers, x.shape, x.dtype, lengths
        if keep:
            ctx.save_for_backward(*_source(flat, hat, gain, shift, trained), *narrows)
        return tuple(out.view(*x.shape[:-1], -1) for out in outs)

    @staticmethod
    def _backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        flat, hat, gain, shift, *narrows = ctx.saved_tensors
        of_x, wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[_FIXED:]
        total, found = None, []
        for number, (layer, grad, narrow) in enumerate(zip(ctx.layers, grads, narrows, strict=True)):
            grad = grad.reshape(-1, grad.shape[-1])
            of_weight, of_bias, of_down, of_up = wanted[4 * number : 4 * number + 4]
            inner = layer.narrow_gradient(grad)
            found += [
                grad.t() @ flat if of_weight else None,
                grad.sum(0, dtype=layer.base.bias.dtype) if of_bias else None,
                _down_gradient(inner, flat, hat, gain, shift, ctx.lengths) if of_down else None,
                grad.t() @ narrow if of_up else None,
            ]
            if of_x:
                total = layer.input_gradient(grad, inner, layer.weight(grad.dtype), total, add=total is not None)
        grad_x = None if total is None else total.view(ctx.shape).to(ctx.dtype)
        return grad_x, *(None,) * (_FIXED - 1), *_as_trained(found, ctx.layers)


class _FeedForward(Exact):
    @staticmethod
    def _forward(ctx: Any, x: Tensor, hat: Any, gain: Any, shift: Any, lengths: Any, *rest: Any) -> Tensor:
        (first, second), dtype, keep, *trained = rest
        flat = x.to(dtype).reshape(-1, x.shape[-1])
        weights = first.weight(dtype), second.weight(dtype)
        result = flat.new_empty(len(flat), len(weights[1]))
        inner, narrow = first.product(flat, weights[0]) if keep else (None, None)
        for _, part in parts(1, len(flat), PART):
            of_part = first.product(flat[part], weights[0])[0] if inner is None else inner[part]
            second.product(F.gelu(of_part, approximate="tanh"), weights[1], out=result[part])
        ctx.layers, ctx.shape, ctx.dtype, ctx.lengths = rest[0], x.shape, x.dtype, lengths
        if keep:
            ctx.save_for_backward(*_source(flat, hat, gain, shift, trained[:4]), inner, narrow)
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        flat, hat, gain, shift, inner, narrow = ctx.saved_tensors
        of_x, wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[_FIXED:]
        grad = grad.reshape(-1, grad.shape[-1])
        sums = _Gradients(ctx.layers, grad.dtype, wanted, len(grad))
        grad_x = grad.new_empty(len(grad), sums.weights[0].shape[1]) if of_x else None
        # The products of a trained weight's gradient are not split: their parts would have to be summed in float32.
        whole = wanted[0] or wanted[4]
        for _, part in parts(1, len(grad), len(grad) if whole else PART):
            into = None if grad_x is None else grad_x[part]
            sums.add(part, grad[part], inner[part], None if narrow is None else narrow[part], flat, into)
        grad_x = None if grad_x is None else grad_x.view(ctx.shape).to(ctx.dtype)
        return grad_x, *(None,) * (_FIXED - 1), *sums.all(flat, hat, gain, shift, ctx.lengths)


class _Keep(torch.autograd.Function):
    """Keeps tensors for the backward of a function that comes after it. What is computed again ends with the last
    tensor that is kept: here, before that function.
    """

    @staticmethod
    def forward(ctx: Any, kept: list[Any], y: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.count = len(tensors)
        kept.append(ctx)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return None, grad, *(None,) * ctx.count


class _Tail(Exact):
    @staticmethod
    def _forward(ctx: Any, x: Tensor, y: Tensor, gate: Tensor, kept: Any, layers: Any, *rest: Any) -> Tensor:
        (first, second), (dtype, lengths, *_) = layers, rest
        weights = first.weight(dtype), second.weight(dtype)
        whole = torch.empty_like(x, memory_format=torch.contiguous_format)
        rows, tokens, result = (split(each, gate, lengths) for each in (x, y.to(dtype), whole))
        for place, row in pieces(rows, lengths, PART):
            inner = F.gelu(first.product(tokens[place], weights[0])[0], approximate="tanh")
            torch.addcmul(rows[place], second.product(inner, weights[1])[0], gate[row], out=result[place])
        ctx.layers, ctx.kept, ctx.lengths = layers, kept, lengths
        ctx.shape, ctx.dtype, ctx.wide = y.shape, dtype, y.dtype
        return whole

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        y, hat, gain, shift, gate = ctx.kept[0].saved_tensors
        of_x, of_y, _, _, _, _, _, *wanted = ctx.needs_input_grad
        rows, tokens = split(grad, gate, ctx.lengths), split(y, gate, ctx.lengths)
        sums = _Gradients(ctx.layers, ctx.dtype, wanted, rows.shape[:2].numel())
        grad_y = rows.new_empty(rows.shape, dtype=ctx.dtype) if of_y else None
        for place, row in pieces(rows, ctx.lengths, PART):
            own = torch.mul(rows[place], gate[row], out=torch.empty_like(tokens[place]))
            inner, narrow = ctx.layers[0].product(tokens[place], sums.weights[0])
            first, part = place[0] * rows.shape[1], place[1]
            into = None if grad_y is None else grad_y[place]
            sums.add(slice(first + part.start, first + part.stop), own, inner, narrow, None, into)
        grad_y = None if grad_y is None else grad_y.view(ctx.shape).to(ctx.wide)
        source = y.flatten(0, 1) if hat is None else None, hat, gain, shift, ctx.lengths
        return grad if of_x else None, grad_y, *(None,) * 5, *sums.all(*source)


class _Gradients:
    """The gradients of a feed-forward network's layers, part by part of the tokens."""

    def __init__(self, layers: Sequence[Layer], dtype: torch.dtype, wanted: Sequence[bool], tokens: int) -> None:
        self.layers, self.wanted, self.tokens = layers, wanted, tokens
        self.weights = layers[0].weight(dtype), layers[1].weight(dtype)
        self._sums: dict[int, Tensor] = {}
        self._narrow: Tensor | None = None

    def add(self, place: slice, grad: Tensor, inner: Tensor, narrow: Any, x: Any, into: Tensor | None) -> None:
        """The part at `place` among the tokens: the gradient of the second layer's output, what the first one gave, and
        its input where its weight is trained. The gradient of that input is written `into` its place.
        """
        (first, second), wanted = self.layers, self.wanted
        up = second.narrow_gradient(grad)
        if any(wanted[4:]):
            activated = F.gelu(inner, approximate="tanh")
            self._sum(4, grad.t(), activated)
            self._sum(6, None if up is None else up.t(), activated)
            self._sum(7, grad.t(), second.narrow(activated) if wanted[7] else None)
            del activated
        self._sum(5, grad)
        if into is None and not any(wanted[:4]):
            return
        middle = second.input_gradient(grad, up, self.weights[1])
        torch.ops.aten.gelu_backward.grad_input(middle, inner, approximate="tanh", grad_input=middle)
        down = first.narrow_gradient(middle)
        self._sum(0, middle.t(), x)
        self._sum(1, middle)
        self._sum(3, middle.t(), narrow)
        if down is not None and self.wanted[2]:
            if self._narrow is None:
                self._narrow = down.new_empty(self.tokens, down.shape[1])
            self._narrow[place] = down
        if into is not None:
            first.input_gradient(middle, down, self.weights[0], out=into)

    def _sum(self, number: int, left: Tensor | None, right: Tensor | None = None) -> None:
        """Add a product, or for a bias a sum over tokens, to a gradient; parts are summed in float32."""
        if not self.wanted[number] or left is None:
            return
        part = left.sum(0, dtype=torch.promote_types(left.dtype, torch.float32)) if right is None else left @ right
        if number not in self._sums:
            self._sums[number] = part
            return
        before = self._sums[number]
        self._sums[number] = before.to(torch.promote_types(before.dtype, torch.float32)).add_(part)

    def all(self, *source: Any) -> list[Tensor | None]:
        """All of them, in the dtypes of what they belong to; from the network's input, or its parts."""
        if self._narrow is not None:
            self._sums[2] = _down_gradient(self._narrow, *source)
        return _as_trained([self._sums.get(number) for number in range(8)], self.layers)


def _source(flat: Tensor, hat: Any, gain: Any, shift: Any, trained: list[Any]) -> list[Tensor | None]:
    """What weights' gradients need of the input: itself, or its parts, or nothing."""
    if not any(each is not None for place, each in enumerate(trained) if place % 4 in {0, 2}):
        return [None] * 4
    return [flat, None, None, None] if hat is None else [None, hat, gain, shift]


def _down_gradient(narrow_Lr: Tensor, flat: Any, hat: Any, gain: Any, shift: Any, lengths: Any) -> Tensor:
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


def _as_trained(found: Sequence[Tensor | None], layers: Sequence[Layer]) -> list[Tensor | None]:
    """Gradients in the dtypes of what they belong to."""
    both = zip(found, (each for layer in layers for each in layer.trained), strict=True)
    return [None if grad is None or own is None else grad.to(own.dtype) for grad, own in both]


def _own(base: nn.Linear) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of a layer; without its weight where that is stored in few bytes and never trained."""
    return (None if hasattr(base, "dequantized") else base.weight), base.bias


def _hooked(module: nn.Module) -> bool:
    """True if calling a module, or one inside it, does more than its forward."""
    return any(
        each._forward_hooks or each._forward_pre_hooks or each._backward_hooks or each._backward_pre_hooks
        for each in module.modules()
    )
