"""The feed-forward network of a block: two linear layers, with or without adapters, and the GELU between them.

Kept for the backward is what the GELU is given; its result is computed again. Where the network's own weights are
frozen its inside exists for some tokens at a time. Layers that linear.py cannot look into are called as they are.

Tensor suffixes: L tokens of all samples, D width in, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from wantrain.models.fused import Exact, by_rows, gated_residual, pieces, split
from wantrain.models.gelu import Gelu, gelu, gelu_backward, gelu_slope
from wantrain.models.linear import FIXED, Layer, arguments, as_trained, down_gradient, hooked, source_of
from wantrain.util.parts import parts

#: Tokens for which the inside of a feed-forward network exists at a time: enough for a GPU to be busy with.
PART = 2048

_AGAIN: ContextVar[bool] = ContextVar("computed again", default=False)


class FeedForward(nn.Sequential):
    """Linear, GELU (tanh), linear. The GELU's output is not kept, and exists for some tokens at a time where both
    weights are frozen.
    """

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__(nn.Linear(dim, inner), Gelu(), nn.Linear(inner, dim))

    def forward(self, x: Tensor) -> Tensor:
        first, second = (None, None) if torch.compiler.is_compiling() else (Layer.of(self[0]), Layer.of(self[2]))
        if first is None or second is None or hooked(self[1]):
            plain: Tensor = super().forward(x)
            return plain
        result: Tensor = _FeedForward.apply(*arguments(x, [first, second]))
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
    y, hat, gain, shift, _, _, dtype, _, *trained = arguments(y_BLD, layers)
    gate_RD, kept = by_rows(x_BTPD, gate_BTD), list[Any]()
    y = _Keep.apply(kept, y, y.to(dtype), hat, gain, shift, gate_RD)
    result: Tensor = _Tail.apply(x_BTPD, y, gate_RD, kept, layers, dtype, lengths, *trained)
    return result


def frozen_layers(ffn: FeedForward) -> list[Layer]:
    """The layers of a network whose own weights are frozen; none where they train, or cannot be looked into."""
    layers = [] if hooked(ffn) else [Layer.of(ffn[0]), Layer.of(ffn[2])]
    found = [each for each in layers if each is not None and all(own is None for own in each.trained[:2])]
    return found if len(found) == 2 else []


class _FeedForward(Exact):
    @staticmethod
    def _forward(ctx: Any, x: Tensor, hat: Any, gain: Any, shift: Any, lengths: Any, *rest: Any) -> Tensor:
        (first, second), dtype, keep, *trained = rest
        flat = x.to(dtype).reshape(-1, x.shape[-1])
        weights = first.weight(dtype), second.weight(dtype)
        result = flat.new_empty(len(flat), len(weights[1]))
        inner, narrow = first.product(flat, weights[0]) if keep else (None, None)
        later = second.empty_narrow(flat) if keep else None
        for _, part in parts(1, len(flat), PART):
            of_part = first.product(flat[part], weights[0])[0] if inner is None else inner[part]
            _, own = second.product(gelu(of_part), weights[1], out=result[part])
            if later is not None:
                later[part] = own
        ctx.layers, ctx.shape, ctx.dtype, ctx.lengths = rest[0], x.shape, x.dtype, lengths
        if keep:
            ctx.save_for_backward(*source_of(flat, hat, gain, shift, trained[:4]), inner, narrow, later)
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        flat, hat, gain, shift, inner, *narrows = ctx.saved_tensors
        of_x, wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[FIXED:]
        grad = grad.reshape(-1, grad.shape[-1])
        sums = _Gradients(ctx.layers, grad.dtype, wanted, len(grad))
        grad_x = grad.new_empty(len(grad), sums.weights[0].shape[1]) if of_x else None
        # The products of a trained weight's gradient are not split: their parts would have to be summed in float32.
        whole = wanted[0] or wanted[4]
        for _, part in parts(1, len(grad), len(grad) if whole else PART):
            into = None if grad_x is None else grad_x[part]
            own = [None if narrow is None else narrow[part] for narrow in narrows]
            sums.add(part, grad[part], inner[part], own, flat, into)
        grad_x = None if grad_x is None else grad_x.view(ctx.shape).to(ctx.dtype)
        return grad_x, *(None,) * (FIXED - 1), *sums.all(flat, hat, gain, shift, ctx.lengths)


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
            inner = gelu(first.product(tokens[place], weights[0])[0])
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
            sums.add(slice(first + part.start, first + part.stop), own, inner, (narrow, None), None, into)
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

    def add(self, place: slice, grad: Tensor, inner: Tensor, narrows: Any, x: Any, into: Tensor | None) -> None:
        """The part at `place` among the tokens: the gradient of the second layer's output, what the first one gave,
        `narrow` of both (of the second None: not kept), and the first one's input where its weight is trained. The
        gradient of that input is written `into` its place.
        """
        (first, second), wanted = self.layers, self.wanted
        up, slope, activated = second.narrow_gradient(grad), None, None
        if any(wanted[4:]):
            activated, slope = gelu_slope(inner)
            self._sum(4, grad.t(), activated)
            self._sum(6, None if up is None else up.t(), activated)
            narrow = second.narrow(activated) if narrows[1] is None and wanted[7] else narrows[1]
            self._sum(7, None if narrow is None else narrow.t(), grad)
        self._sum(5, grad)
        if into is None and not any(wanted[:4]):
            return
        middle = second.input_gradient(grad, up, self.weights[1], out=activated)  # in the memory of what is done with
        gelu_backward(middle, inner, slope)
        down = first.narrow_gradient(middle)
        self._sum(0, middle.t(), x)
        self._sum(1, middle)
        self._sum(3, None if narrows[0] is None else narrows[0].t(), middle)
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
            self._sums[2] = down_gradient(self._narrow, *source)
        found = [self._sums.get(number) for number in range(8)]
        found[3::4] = [None if up is None else up.t() for up in found[3::4]]  # summed as (r, E), as in linear.py
        return as_trained(found, self.layers)
