"""Norms, gates and rotary embedding of a block as functions with backwards of their own.

Autograd keeps the operands of every operation, mostly in float32. These keep, in the dtype of the computation, only
what cannot be had again cheaply, and work piece by piece, so that float32 copies never have a whole clip's size.
Products that are only summed are rounded to that dtype, and summed in float32. Each is a pair: the function, and the
same in plain operations (`plain_*`), which is what a compiler is given and what tests compare with.

In a sequence of clips of different sizes (packing.py) the tokens of a row of modulation are not equally many: there x
is (1, 1, L, D), modulation (1, R, D), and `lengths` are the tokens of each row.

Tensor suffixes: R rows of modulation, P tokens that share one, D width; B batch, T latent frames, L = T*P tokens, N
heads, K head width (rotary tables: K/2).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from wantrain.util.parts import Place, parts, parts_of

#: Elements of a piece: 128 MiB in float32, enough for a GPU to be busy with.
PIECE = 1 << 25
#: The least size of a norm's weight where its result is kept in place of its input, which is had again by a division.
LEAST = 2.0**-60
#: Tokens of each row of modulation, where they are not equally many.
Lengths = tuple[int, ...]


class Affine(NamedTuple):
    """A normalised tensor in the parts it is made of: hat * gain + shift, with `hat` in the dtype of the result.

    Linear layers beside which an adapter trains keep these parts instead of the tensor (linear.py): `hat` is kept for
    the norm's backward anyway. With `lengths`, hat is (1, L, D).
    """

    hat_RPD: Tensor
    gain_RD: Tensor
    shift_RD: Tensor
    lengths: Lengths | None


def affine_of(x: Tensor) -> Affine | None:
    """The parts of what `modulated_norm` returned; None for another tensor."""
    return getattr(x, "affine", None)


def modulated_norm(
    x_BTPD: Tensor,
    gain_BTD: Tensor,
    shift_BTD: Tensor,
    eps: float,
    dtype: torch.dtype,
    lengths: Lengths | None = None,
) -> tuple[Tensor, Tensor]:
    """`x` as it is, and its layer norm times gain plus shift, computed in x's dtype and rounded to `dtype`.

    gain, shift  (B or 1, T or 1, D): one row for all tokens of a frame, or of a clip
    returns      x, and y (B, T*P, D). Go on with this x: so the norm adds to its gradient in place of autograd
    """
    if torch.compiler.is_compiling():
        return x_BTPD, plain_modulated_norm(x_BTPD, gain_BTD, shift_BTD, eps, dtype, lengths).flatten(1, 2)
    rows = (gain_BTD, shift_BTD)
    keep = torch.is_grad_enabled() and any(each.requires_grad for each in (x_BTPD, *rows))
    gain_RD, shift_RD = (by_rows(x_BTPD, each) for each in rows)
    x, y, hat = _ModulatedNorm.apply(split(x_BTPD, gain_RD, lengths), gain_RD, shift_RD, eps, dtype, lengths, keep)
    x, y = x.view_as(x_BTPD), y.view_as(x_BTPD).flatten(1, 2)
    if hat is not None:
        y.affine = Affine(hat, gain_RD.detach(), shift_RD.detach(), lengths)
    return x, y


def plain_modulated_norm(
    x_BTPD: Tensor,
    gain_BTD: Tensor,
    shift_BTD: Tensor,
    eps: float,
    dtype: torch.dtype,
    lengths: Lengths | None = None,
) -> Tensor:
    """The second result of `modulated_norm`, in plain operations."""
    normed = F.layer_norm(x_BTPD, x_BTPD.shape[-1:], eps=eps)
    gain, shift = (_per_token(row, lengths) for row in (gain_BTD, shift_BTD))
    return (normed * gain + shift).to(dtype)


def gated_residual(x_BTPD: Tensor, y_BLD: Tensor, gate_BTD: Tensor, lengths: Lengths | None = None) -> Tensor:
    """x + y * gate in x's dtype; `gate` as in `modulated_norm`. Keeps `y` only where the gate has a gradient."""
    if torch.compiler.is_compiling():
        return plain_gated_residual(x_BTPD, y_BLD, gate_BTD, lengths)
    result: Tensor = _GatedResidual.apply(x_BTPD, y_BLD, by_rows(x_BTPD, gate_BTD), lengths)
    return result


def plain_gated_residual(x_BTPD: Tensor, y_BLD: Tensor, gate_BTD: Tensor, lengths: Lengths | None = None) -> Tensor:
    """The same in plain operations."""
    return x_BTPD + y_BLD.view_as(x_BTPD) * _per_token(gate_BTD, lengths)


def norm_rotate(x_BLD: Tensor, weight_D: Tensor, eps: float, heads: int, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    """RMS norm of x times weight, split into heads and rotated: (B, L, N, K) in x's dtype, computed in the weight's.

    Neighbouring pairs (2j, 2j+1) of each head turn by their token's angles; `rope` are cosines and sines (L, K/2).
    Keeps one number per token, and `x`; without `rope` the result in place of x, as attention keeps that too (weights
    closer to 0 than LEAST count as LEAST then).
    """
    if torch.compiler.is_compiling():
        return plain_norm_rotate(x_BLD, weight_D, eps, heads, rope)
    result: Tensor = _NormRotate.apply(x_BLD, weight_D, eps, heads, *(rope or (None, None)))
    return result


def plain_norm_rotate(
    x_BLD: Tensor, weight_D: Tensor, eps: float, heads: int, rope: tuple[Tensor, Tensor] | None
) -> Tensor:
    """The same in plain operations."""
    normed = F.rms_norm(x_BLD.to(weight_D.dtype), weight_D.shape, weight_D, eps).unflatten(-1, (heads, -1))
    if rope is not None:
        even, odd = normed.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = (table_LK[:, None, :] for table_LK in rope)
        normed = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
    return normed.to(x_BLD.dtype)


# ------------------------------------------------------------------------------------------- what autograd calls


class Exact(torch.autograd.Function):
    """A function that autocast does not reach, forward or backward: its casts are its own. `_forward` and `_backward`
    are what Function calls forward and backward.
    """

    _forward: ClassVar[Any]
    _backward: ClassVar[Any]

    @classmethod
    def forward(cls, ctx: Any, *args: Any) -> Any:
        ctx.device_type = args[0].device.type
        with torch.autocast(ctx.device_type, enabled=False):
            return cls._forward(ctx, *args)

    @classmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(cls, ctx: Any, *grads: Any) -> Any:
        with torch.autocast(ctx.device_type, enabled=False):
            return cls._backward(ctx, *grads)


class _ModulatedNorm(Exact):
    @staticmethod
    def _forward(
        ctx: Any, x: Tensor, gain: Tensor, shift: Tensor, eps: float, dtype: torch.dtype, lengths: Any, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.lengths = lengths
        width, whole = x.shape[-1:], len(gain) == 1 and x.numel() <= PIECE
        y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
        hat, rstd = torch.empty_like(y) if keep and not whole else None, x.new_empty(*x.shape[:-1], 1)
        for place, row in pieces(x, lengths):
            normed, _, rstd[place] = torch.native_layer_norm(x[place], width, None, None, eps)
            torch.addcmul(shift[row], normed, gain[row], out=y[place])
            if hat is not None:
                hat[place] = normed
            elif keep:
                hat = normed.to(dtype)[None]
        ctx.save_for_backward(hat, rstd, gain)
        if hat is not None:
            ctx.mark_non_differentiable(hat)
        return x, y, hat

    @staticmethod
    def _backward(ctx: Any, grad_x: Tensor | None, grad_y: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return grad_x, None, None, None, None, None, None
        hat, rstd, gain = ctx.saved_tensors
        of_x, of_gain, of_shift = ctx.needs_input_grad[:3]
        result = torch.empty_like(hat, dtype=gain.dtype) if of_x else None
        sums = [torch.zeros_like(gain) if wanted else None for wanted in (of_gain, of_shift)]
        for place, row in pieces(hat, ctx.lengths):
            ones = torch.ones_like(rstd[place])
            normed, *rows = torch.ops.aten.native_layer_norm_backward(
                grad_y[place].to(gain.dtype),
                hat[place].to(gain.dtype),
                hat.shape[-1:],
                torch.zeros_like(ones),
                ones,
                gain[row],
                gain[row],
                [of_x, of_gain, of_shift],
            )
            if result is not None and grad_x is not None:
                torch.addcmul(grad_x[place], normed, rstd[place], out=result[place])
            elif result is not None:
                torch.mul(normed, rstd[place], out=result[place])
            for total, own in zip(sums, rows, strict=True):
                if total is not None:
                    total[row] += own
        return result, *sums, None, None, None, None


class _GatedResidual(Exact):
    @staticmethod
    def _forward(ctx: Any, x: Tensor, y: Tensor, gate: Tensor, lengths: Any) -> Tensor:
        ctx.shape, ctx.dtype, ctx.lengths = y.shape, y.dtype, lengths
        ctx.save_for_backward(y if gate.requires_grad else None, gate)
        result = torch.empty_like(x, memory_format=torch.contiguous_format)  # no view: FSDP2 warns of blocks' views
        rows, tokens, into = (split(each, gate, lengths) for each in (x, y, result))
        if lengths is None:
            torch.addcmul(rows, tokens, gate.unsqueeze(1), out=into)
            return result
        for place, row in pieces(rows, lengths):
            torch.addcmul(rows[place], tokens[place], gate[row], out=into[place])
        return result

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, gate = ctx.saved_tensors
        of_x, of_y, of_gate, _ = ctx.needs_input_grad
        rows, y = split(grad, gate, ctx.lengths), None if y is None else split(y, gate, ctx.lengths)
        grad_y = torch.empty(rows.shape, dtype=ctx.dtype, device=rows.device) if of_y else None
        grad_gate = torch.zeros_like(gate) if of_gate else None
        for place, row in pieces(rows, ctx.lengths):
            if grad_y is not None:
                torch.mul(rows[place], gate[row], out=grad_y[place])
            if grad_gate is not None and y is not None:
                product = torch.mul(rows[place], y[place], out=torch.empty_like(y[place]))
                grad_gate[row] += product.sum(0, dtype=gate.dtype)
        return grad if of_x else None, None if grad_y is None else grad_y.view(ctx.shape), grad_gate, None


class _NormRotate(Exact):
    @staticmethod
    def _forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, heads: int, cos: Any, sin: Any) -> Tensor:
        result = torch.empty_like(x, memory_format=torch.contiguous_format)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=weight.dtype)
        rstd = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.by_result = cos is None and torch.finfo(x.dtype).tiny < LEAST
        if ctx.by_result:
            weight = torch.where(weight.abs() < LEAST, LEAST, weight)
        alike = x.dtype == weight.dtype
        for place, _ in pieces(x):
            scaled = torch.mul(x[place], weight, out=result[place] if alike else None)
            if cos is None:
                torch.mul(scaled, rstd[place], out=result[place])
                continue
            turns = torch.complex(cos[place[1]], sin[place[1]]).mul_(rstd[place])
            _pairs(scaled, heads).mul_(turns.unsqueeze(1))
            if not alike:
                result[place] = scaled
        ctx.heads = heads
        ctx.save_for_backward(result if ctx.by_result else x, weight, rstd, cos, sin)
        return result.unflatten(-1, (heads, -1))

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd, cos, sin = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if of_x else None
        grad_weight = torch.zeros_like(weight) if of_weight else None
        grad = grad.flatten(-2).contiguous()
        if ctx.by_result:
            _NormRotate._by_result(grad, x, weight, rstd, grad_x, grad_weight)
            return grad_x, grad_weight, None, None, None, None
        for place, _ in pieces(x):
            # With u = rstd * (grad turned back), dx = u * w - x * rstd^2 * mean(u * w * x) and dw = sum of u * x.
            if cos is None:
                u = grad[place] * rstd[place]
            else:
                own = grad[place].to(weight.dtype)
                u = torch.empty_like(own) if own.dtype == grad.dtype else own
                turns = torch.complex(cos[place[1]], -sin[place[1]]).mul_(rstd[place])
                torch.mul(_pairs(own, ctx.heads), turns.unsqueeze(1), out=_pairs(u, ctx.heads))
            product = torch.mul(u, x[place], out=torch.empty_like(x[place]))
            if grad_weight is not None:
                grad_weight += product.sum(0, dtype=weight.dtype)
            if grad_x is not None:
                mean = (product @ weight.to(x.dtype)).unsqueeze(-1).to(weight.dtype).div_(-x.shape[-1])
                torch.addcmul(u.mul_(weight), x[place], mean * rstd[place].square(), out=grad_x[place])
        return grad_x, grad_weight, None, None, None, None

    @staticmethod
    def _by_result(grad: Tensor, y: Tensor, weight: Tensor, rstd: Tensor, into: Any, grad_weight: Any) -> None:
        """From y = hat * w: dx = rstd * (grad * w - y / w * mean(grad * y)) and dw = sum of grad * y / w."""
        inverse = weight.reciprocal()
        for place, _ in pieces(y):
            product = torch.mul(grad[place], y[place], out=torch.empty_like(y[place]))
            if grad_weight is not None:
                grad_weight += product.sum(0, dtype=weight.dtype).mul_(inverse)
            if into is not None:
                mean = product.sum(-1, keepdim=True, dtype=weight.dtype).div_(-weight.numel())
                scaled = (grad[place] * weight).mul_(rstd[place])
                torch.addcmul(scaled, y[place] * inverse, mean.mul_(rstd[place]), out=into[place])


def by_rows(x_BTPD: Tensor, given_BTD: Tensor) -> Tensor:
    """Modulation (R, D) in x's dtype: a row for each clip, or where clips' frames differ, for each frame."""
    return given_BTD.expand(len(x_BTPD), -1, -1).flatten(0, 1).to(x_BTPD.dtype)


def split(x_BTPD: Tensor, rows_RD: Tensor, lengths: Lengths | None = None) -> Tensor:
    """The tokens of each row of modulation, (R, P, D); with `lengths` all in one, (1, L, D)."""
    return x_BTPD.reshape(len(rows_RD) if lengths is None else 1, -1, x_BTPD.shape[-1])


def pieces(x_RPD: Tensor, lengths: Lengths | None = None, most: int | None = None) -> Iterator[tuple[Place, int]]:
    """Of what `split` returned, the places of pieces of at most `most` tokens (None: PIECE elements), each with its row
    of modulation.
    """
    most = most or max(1, PIECE // x_RPD.shape[-1])
    if lengths is None:
        return ((place, place[0]) for place in parts(len(x_RPD), x_RPD.shape[1], most))
    return (((0, part), row) for row, part in parts_of(lengths, most))


def _per_token(given_BTD: Tensor, lengths: Lengths | None) -> Tensor:
    """Modulation as it is broadcast to x (B, T, P, D)."""
    if lengths is None:
        return given_BTD.unsqueeze(2)
    return given_BTD.repeat_interleave(torch.tensor(lengths, device=given_BTD.device), dim=1).unsqueeze(1)


def _pairs(x: Tensor, heads: int) -> Tensor:
    """x (L, D) as complex numbers (L, N, K/2)."""
    return torch.view_as_complex(x.unflatten(-1, (heads, -1, 2)))
