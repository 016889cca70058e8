"""The functions of a block against their plain operations in float64: results, and the gradient of every input."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from wantrain.models import fused
from wantrain.models.fused import (
    gated_residual,
    modulated_norm,
    norm_rotate,
    plain_gated_residual,
    plain_modulated_norm,
    plain_norm_rotate,
)

#: (batch, frames, tokens of a frame, rows of modulation over batch, over frames); odd sizes, and several pieces.
SHAPES = [(1, 3, 5, 1, 1), (2, 3, 5, 2, 3), (2, 1, 7, 1, 1), (2, 3, 35, 2, 1), (1, 2, 1, 1, 2)]
WIDTH, HEADS = 18, 3
DTYPES = [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.float32, torch.bfloat16)]
#: Of the size of the result: rounding of the dtype, kept values included.
CLOSE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """A piece is 16 tokens."""
    monkeypatch.setattr(fused, "PIECE", 16 * WIDTH)


def drawn(*shape, dtype=torch.float32, strided=False):
    """Random values; `strided`: not contiguous."""
    x = torch.randn(*shape[:-1], shape[-1] * 2, dtype=torch.float64).to(dtype)
    return (x[..., ::2] if strided else x[..., : shape[-1]].contiguous()).detach().requires_grad_()


def compared(function, plain, inputs, dtype):
    """Results and gradients of both sides, the plain one in float64 on the same values."""
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    ours, theirs = function(*inputs), plain(*exact)
    slope = torch.randn(theirs.shape, dtype=torch.float64)
    ours.backward(slope.to(ours.dtype))
    theirs.backward(slope.to(ours.dtype).double())
    near(ours, theirs, dtype)
    for own, other in zip(inputs, exact, strict=True):
        if own.requires_grad:
            assert own.grad.dtype == own.dtype and own.grad.shape == own.shape
            near(own.grad, other.grad, dtype)


def near(ours, theirs, dtype):
    assert (ours.double() - theirs).norm() <= CLOSE[dtype] * theirs.norm(), (
        ours.double() - theirs
    ).norm() / theirs.norm()


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("wide", "dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_modulated_norm(shape, wide, dtype, strided):
    """The norm, and the residual that passes through it."""
    batch, frames, tokens, *rows = shape
    x = drawn(batch, frames, tokens, WIDTH, dtype=wide, strided=strided)
    gain, shift = (drawn(*rows, WIDTH, dtype=wide, strided=strided) for _ in range(2))

    def ours(x, gain, shift):
        through, y = modulated_norm(x, gain, shift, 1e-6, dtype)
        assert y.dtype == dtype and torch.equal(through, x)
        return through + 2 * y.view_as(x)

    def plain(x, gain, shift):
        return x + 2 * plain_modulated_norm(x, gain, shift, 1e-6, torch.float64)

    compared(ours, plain, [x, gain, shift], dtype)


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 1, 2)])
def test_modulated_norm_frozen(trained):
    """With some inputs frozen the others have the same gradients, and only these are computed."""
    torch.manual_seed(0)
    inputs = [drawn(2, 3, 5, WIDTH), drawn(2, 3, WIDTH), drawn(2, 3, WIDTH)]
    for number, each in enumerate(inputs):
        each.requires_grad_(number in trained)
    compared(
        lambda *given: modulated_norm(*given, 1e-6, torch.float32)[1].view_as(given[0]),
        lambda *given: plain_modulated_norm(*given, 1e-6, torch.float64),
        inputs,
        torch.float32,
    )
    assert [each.grad is not None for each in inputs] == [number in trained for number in range(3)]


def test_affine():
    """What the norm returns is its affine parts' value, to the rounding of what is kept."""
    _, y = modulated_norm(drawn(2, 3, 5, WIDTH), drawn(2, 3, WIDTH), drawn(2, 3, WIDTH), 1e-6, torch.float32)
    hat, gain, shift, _ = fused.affine_of(y)
    torch.testing.assert_close((hat * gain[:, None] + shift[:, None]).view_as(y), y)
    assert not hat.requires_grad and fused.affine_of(y + 1) is None
    with torch.no_grad():
        assert (
            fused.affine_of(
                modulated_norm(y.view(2, 3, 5, -1), gain.view(2, 3, -1), shift.view(2, 3, -1), 1e-6, torch.float32)[1]
            )
            is None
        )


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("wide", "dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_residual(shape, wide, dtype, strided):
    batch, frames, tokens, *rows = shape
    x = drawn(batch, frames, tokens, WIDTH, dtype=wide, strided=strided)
    y = drawn(batch, frames * tokens, WIDTH, dtype=dtype, strided=strided)
    gate = drawn(*rows, WIDTH, dtype=wide, strided=strided)
    compared(gated_residual, plain_gated_residual, [x, y, gate], dtype)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("wide", "dtype"), DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 5), (2, 35)])
def test_norm_rotate(batch, tokens, wide, dtype, strided, rotated):
    x, weight = drawn(batch, tokens, WIDTH, dtype=dtype, strided=strided), drawn(WIDTH, dtype=wide, strided=strided)
    angles = 7 * torch.randn(tokens, WIDTH // HEADS // 2, dtype=torch.float64)
    rope = (angles.cos().to(wide), angles.sin().to(wide)) if rotated else None
    exact = None if rope is None else tuple(table.double() for table in rope)
    compared(
        lambda x, weight: norm_rotate(x, weight, 1e-6, HEADS, rope),
        lambda x, weight: plain_norm_rotate(x, weight, 1e-6, HEADS, exact),
        [x, weight],
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_weights_of_a_norm(dtype):
    """Without rotation the input is had again from the result, also where a weight is 0 or nearly so."""
    x, weight = drawn(2, 35, WIDTH, dtype=dtype), drawn(WIDTH, dtype=torch.float32)
    with torch.no_grad():
        weight[:5] = torch.tensor([0.0, -0.0, 1e-30, -1e-3, 1e-12])
    compared(
        lambda x, weight: norm_rotate(x, weight, 1e-6, HEADS, None),
        lambda x, weight: plain_norm_rotate(x, weight, 1e-6, HEADS, None),
        [x, weight],
        dtype,
    )


@pytest.mark.parametrize("rotated", [False, True])
def test_what_a_norm_keeps(rotated):
    """Its result in place of its input, where it does not rotate: the kernel of attention keeps that too."""
    x, weight, kept = drawn(1, 4, WIDTH), drawn(WIDTH), []
    tables = (torch.ones(4, WIDTH // HEADS // 2),) * 2
    with saved_tensors_hooks(lambda each: kept.append(each.data_ptr()) or each, lambda each: each):
        y = norm_rotate(x, weight, 1e-6, HEADS, tables if rotated else None)
    assert (x.data_ptr() in kept, y.data_ptr() in kept) == (rotated, not rotated)


def test_gradcheck():
    """torch's own check, by differences."""
    x, gain, shift = drawn(2, 2, 3, 4, dtype=torch.float64), *(drawn(2, 2, 4, dtype=torch.float64) for _ in range(2))
    angles = torch.randn(6, 1, dtype=torch.float64)
    rope = (angles.cos(), angles.sin())
    check = torch.autograd.gradcheck
    assert check(lambda *given: modulated_norm(*given, 1e-6, torch.float64), (x, gain, shift))
    assert check(gated_residual, (x, drawn(2, 6, 4, dtype=torch.float64), gain))
    assert check(lambda x, w: norm_rotate(x.flatten(1, 2), w, 1e-6, 2, rope), (x, drawn(4, dtype=torch.float64)))
