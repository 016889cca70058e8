"""The presets of conf/noise as distributions: what noise=NAME draws is what its name promises, window by window."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from wantrain import checks, config
from wantrain.batch import Batch
from wantrain.config import CONF, compose
from wantrain.losses import FlowMatching

DRAWS = 10_000
#: Kolmogorov-Smirnov statistic that 1 in 1,000 fair samples of DRAWS exceeds.
PASS = 1.95 / math.sqrt(DRAWS)


def normal_in_logit(u):
    return stats.norm.cdf(np.log(u / (1 - u)))


def mode(u):
    p = np.linspace(0, 1, 100_001)
    return np.interp(u, p - 1.29 * (np.sin(np.pi * p / 2) ** 2 - p), p)


def tent(u):
    """Heights 1, 2, 1 at 0, 0.5, 1, whose area is 1.5."""
    return np.where(u < 0.5, u + u**2, 1.5 - (1 - u) - (1 - u) ** 2) / 1.5


def even(u):
    return u


#: Of each preset: the distribution of u, and the shift (None: the model's own), written down from what it is named for.
LAWS = {
    "wan": (even, None),
    "uniform": (even, 1.0),
    "logit_normal": (normal_in_logit, None),
    "sd3": (normal_in_logit, 3.0),
    "mode": (mode, None),
    "beta": (stats.beta(2, 2).cdf, None),
    "table": (tent, None),
    "by_resolution": (even, None),
    "flux": (normal_in_logit, math.exp(0.5 + (80 - 256) / (4096 - 256) * (1.15 - 0.5))),
    "diffsynth": (even, 5.0),
}
OWN_SIZE = {"tiny": (5, 8, 8), "t2v_a14b": (21, 60, 104)}  # latents of the model's own clips: 80 and 32,760 tokens


def test_every_preset_tested():
    """Every preset of conf/noise has its reference distribution in this file."""
    assert LAWS.keys() == {path.stem for path in (CONF / "noise").glob("*.yaml")}


def built(preset, model="tiny", expert="low_noise", *more):
    cfg = compose("train", [f"noise={preset}", f"model={model}", f"expert={expert}", *more])
    checks.check(cfg)
    loss = config.build(cfg.loss)
    assert isinstance(loss, FlowMatching)
    return loss, cfg


@pytest.mark.parametrize("expert", ["high_noise", "low_noise"])
@pytest.mark.parametrize(
    ("preset", "model"),
    [(preset, model) for preset in LAWS for model in OWN_SIZE if (preset, model) != ("flux", "t2v_a14b")],
)
def test_preset_distributions(preset, model, expert):
    """Every preset draws from the noise distribution that its name promises."""
    loss, cfg = built(preset, model, expert)
    distribution, shift = LAWS[preset]
    shift = cfg.model.shift if shift is None else shift
    names = ("",) * DRAWS
    data = Batch(torch.zeros(1, 1, *OWN_SIZE[model]).expand(DRAWS, -1, -1, -1, -1), torch.zeros(1), names, (0,) * DRAWS)
    sigma = loss.draw(data, [torch.Generator().manual_seed(11)] * DRAWS)
    assert loss.window.contains(sigma).all()

    def whole(x):
        x = np.clip(x, 1e-15, 1 - 1e-15)
        return distribution(x / (shift - (shift - 1) * x))

    low, high = whole(loss.window.low), whole(loss.window.high)
    found = stats.kstest(sigma.double().numpy(), lambda x: (whole(x) - low) / (high - low))
    assert found.statistic < PASS
    assert torch.unique(sigma, return_counts=True)[1].max() < 5, "no mass at an edge"
    assert loss.mass == pytest.approx(high - low, abs=1e-6) or preset == "flux"


@pytest.mark.parametrize("preset", LAWS)
def test_preset_weights(preset):
    """Only the preset diffsynth weights the loss, and its weight equals DiffSynth's own table."""
    loss, _ = built(preset)
    sigma = torch.tensor([0.5, 0.875, 1.0])
    if preset == "diffsynth":  # peak, at Wan's boundary, and at pure noise, as read off its own table of 1,000
        assert loss.noise.weight(sigma).tolist() == pytest.approx([2.08, 0.78, 0.0], abs=5e-3)
    else:
        assert loss.noise.weight(sigma).tolist() == [1, 1, 1]


def test_noise_overrides(tmp_path):
    """Density, shift, weighting and loss settings can be overridden on the command line."""
    (tmp_path / "own, distribution.txt").write_text("0 1\n1 3\n")
    loss, _ = built("table", "tiny", "low_noise", "noise.density.points=null",
                    f"noise.density.file={tmp_path}/own, distribution.txt", "noise.shift=1")  # fmt: skip
    assert loss.noise.density.cdf(torch.tensor([0.5], dtype=torch.float64)).item() == pytest.approx(0.25 + 0.125)
    loss, _ = built("beta", "tiny", "low_noise", "noise.density.alpha=5", "noise.weighting=min_snr", "loss.huber=0.5",
                    "loss.stratified=true", "batch_size=4", "seed=3")  # fmt: skip
    assert (loss.noise.density.alpha, loss.huber, loss.stratified, loss.batch_size, loss.seed) == (5, 0.5, True, 4, 3)
    assert loss.noise.weight(torch.tensor([0.5])).item() == 0.25
    loss, _ = built("wan", "tiny", "low_noise", "noise.weighting={_target_: wantrain.losses.MinSNR, gamma: 0.5}")
    assert loss.noise.weight(torch.tensor([0.5])).item() == 0.125
    with pytest.raises(ValueError, match=r"^noise\.density: alpha=0 and beta=2\.0 must be above 0$"):
        built("beta", "tiny", "low_noise", "noise.density.alpha=0")
