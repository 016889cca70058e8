"""The GELU and its gradient against torch's own in float64, and against the formula."""

import math

import pytest
import torch
import torch.nn.functional as F

from wantrain.models import gelu
from wantrain.models.gelu import gelu_backward, gelu_slope

#: Largest difference, as a share of the largest value. In float32 a sigmoid near 1 differs from it by few digits, as a
#: tanh does.
CLOSE = {torch.float64: 1e-14, torch.float32: 3e-6, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("shape", [(1, 3), (7, 18), (35, 18)])
@pytest.mark.parametrize("strided", [False, True])
def test_against_float64(shape, dtype, strided, monkeypatch):
    """Values and gradients, in pieces of 16 rows; strided: neither tensor is contiguous."""
    monkeypatch.setattr(gelu, "PIECE", 16 * 18)
    torch.manual_seed(0)
    x, grad = (2 * torch.randn(2, shape[0], 2 * shape[1], dtype=torch.float64)).to(dtype)
    x, grad = (each[:, ::2] if strided else each[:, : shape[1]].contiguous() for each in (x, grad))
    exact = x.double().clone().requires_grad_()
    expected = F.gelu(exact, approximate="tanh")
    expected.backward(grad.double())
    near(gelu.gelu(x), expected.detach())
    value, slope = gelu_slope(x)
    assert (slope is None) == (dtype != torch.float32)
    near(value, expected.detach())
    result = gelu_backward(grad, x, slope)
    assert result.data_ptr() == grad.data_ptr()
    near(result, exact.grad)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_module(dtype):
    """The module gives what the function gives, bit for bit, and the exact gradient."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 18, dtype=torch.float64).to(dtype).transpose(0, 1).requires_grad_()
    exact = x.detach().double().requires_grad_()
    expected = F.gelu(exact, approximate="tanh")
    grad = torch.randn_like(expected)
    expected.backward(grad)
    value = gelu.Gelu()(x)
    value.backward(grad.to(dtype))
    assert torch.equal(value.reshape(-1, 18), gelu.gelu(x.detach().reshape(-1, 18)))
    near(x.grad, exact.grad)


def near(ours, exact):
    assert (ours.double() - exact).abs().max() <= CLOSE[ours.dtype] * exact.abs().max()


def test_far_values():
    """Where sigmoid is 0 or 1 in float32; the smallest values keep their relative precision."""
    x = torch.tensor([[-1e4, -30.0, -5.0, -1e-6, -0.0, 0.0, 1e-6, 5.0, 30.0, 1e4]])
    _, slope = gelu_slope(x)
    assert torch.isfinite(slope).all() and slope[0, :2].tolist() == [0, 0] and slope[0, -2:].tolist() == [1, 1]
    values = gelu.gelu(x)[0].tolist()
    assert values[:2] == [0, 0] and values[-2:] == [30, 1e4]
    for given, value in zip(x[0, 2:8].double().tolist(), values[2:8], strict=True):
        expected = given / (1 + math.exp(-2 * math.sqrt(2 / math.pi) * (given + 0.044715 * given**3)))
        assert math.isclose(value, expected, rel_tol=2e-6)
