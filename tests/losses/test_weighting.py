"""Weights by noise level: each against its formula, and min-SNR against what it means for the data."""

import math

import pytest
import torch

from wantrain import flow
from wantrain.losses import Gaussian, MinSNR
from wantrain.losses.weighting import NAMED, weighting_named

SIGMA = torch.linspace(0, 1, 1001, dtype=torch.float64)


def test_sd3_weightings():
    """The weightings of the SD3 scripts equal their formulas."""
    sigma = torch.tensor([0.25, 0.5])
    assert weighting_named("none")(sigma).tolist() == [1, 1]
    assert weighting_named("sigma_sqrt")(sigma).tolist() == [16, 4]
    assert weighting_named("cosmap")(sigma)[1].item() == pytest.approx(4 / math.pi)
    # cosmap is a density: that of 1 - 1 / (tan(pi*p/2) + 1), SD3's way to draw it.
    p = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    drawn = 1 - 1 / (torch.tan(math.pi / 2 * p) + 1)
    share = torch.histc(drawn, 20, 0, 1) / len(p) * 20
    middles = (torch.arange(20, dtype=torch.float64) + 0.5) / 20
    assert torch.allclose(share, weighting_named("cosmap")(middles), atol=0.002)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr(gamma):
    """min-SNR weights the error of the predicted data by the clipped signal-to-noise ratio."""
    sigma = SIGMA[1:]
    x0, noise, wrong = torch.randn(3, len(sigma), 1, 1, 1, 1, dtype=torch.float64)
    point, right = flow.path(x0, noise, sigma), flow.velocity(x0, noise)
    data_error = (point - flow.over_frames(sigma, point) * (right + wrong) - x0).square().flatten()
    ratio = ((1 - sigma) / sigma) ** 2
    expected = ratio.clamp(max=gamma) * data_error
    assert torch.allclose(MinSNR(gamma)(sigma) * wrong.square().flatten(), expected)
    assert SIGMA[MinSNR(gamma)(SIGMA).argmax()].item() == pytest.approx(1 / (1 + math.sqrt(gamma)), abs=1e-3)


def test_gaussian():
    """The Gaussian weighting has its peak at its center and can be lowered to reach zero."""
    bell = Gaussian(center=0.4, width=0.2, peak=3.0)
    assert bell(torch.tensor(0.4)).item() == pytest.approx(3.0)
    assert bell(torch.tensor(0.6)).item() == pytest.approx(3 * math.exp(-0.5))
    let_down = Gaussian(center=0.4, width=0.2, peak=3.0, to_zero=True)(SIGMA)
    assert let_down.max().item() == pytest.approx(3.0) and let_down[-1].item() == 0 and (let_down >= 0).all()


@pytest.mark.parametrize("name", NAMED)
def test_weights_finite_and_nonnegative(name):
    """Every weighting is finite and not negative at every noise level."""
    weight = weighting_named(name)(SIGMA.float())
    assert weight.shape == SIGMA.shape and weight.dtype == torch.float32
    assert torch.isfinite(weight).all() and (weight >= 0).all()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda: weighting_named("snr"), "'snr' is unknown; choose one of none, sigma_sqrt, cosmap, min_snr, gaussian"),
        (lambda: MinSNR(0.0), r"gamma=0\.0 must be above 0"),
        (lambda: Gaussian(width=0.0), r"width=0\.0"),
        (lambda: Gaussian(center=1.5), r"center=1\.5"),
    ],
)
def test_bad_settings(bad, words):
    """The error for a wrong weighting names the setting."""
    with pytest.raises(ValueError, match=words):
        bad()
