"""What a run learns from, as it is written into its folder."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import integrate

from wantrain import flow
from wantrain.losses import FlowMatching, Gaussian, Reconstruction, RootShift
from wantrain.training.monitoring import noise_report

SETTINGS = {"model": {"multiple": 16}, "data": {"caption_dropout": 0.1}}
BELL = Gaussian(center=0.5, width=0.5, peak=2.0764, to_zero=True)


def law_of(report, name="low_noise", number=0):
    distribution = report[name]["distributions"][number]
    return distribution, *(np.array(distribution[key]) for key in ("sigma", "density", "weight", "effective_density"))


def test_effective_density(tmp_path):
    """The effective density is the density of the draws times the loss weight.

    Compared with 400,000 draws and with DiffSynth's figures: mean weights 0.34 and 1.47 in the two windows.
    """
    losses = {
        "high_noise": FlowMatching(shift=5.0, low=0.875, weighting=BELL),
        "low_noise": FlowMatching(shift=5.0, high=0.875, weighting=BELL),
    }
    noise_report.write(tmp_path, losses, ["17x64x64"], SETTINGS)
    report = json.loads((tmp_path / "noise.json").read_text())
    for name, mean in (("high_noise", 0.34), ("low_noise", 1.47)):
        loss, (distribution, edges, density, _, effective) = losses[name], law_of(report, name)
        assert distribution["mean_weight"] == pytest.approx(mean, abs=0.01)
        assert distribution["share_of_all_noise"] == pytest.approx(loss.mass)
        assert edges[0] == loss.window.low and edges[-1] == loss.window.high
        for curve in (density, effective):
            assert (curve * np.diff(edges)).sum() == pytest.approx(1)
        sigma = flow.draw_sigma(400_000, density="uniform", shift=5.0, window=loss.window,
                                generator=torch.Generator().manual_seed(0))  # fmt: skip
        for curve, weights in ((density, None), (effective, loss.noise.weight(sigma).numpy())):
            drawn, _ = np.histogram(sigma.numpy(), edges, weights=weights, density=True)
            assert np.abs(drawn - curve).max() < 0.05 * curve.max()
    sizes = Image.open(tmp_path / "noise.png")
    assert sizes.size == (600, 300) and len(set(sizes.convert("RGB").getdata())) > 50, "something is drawn"


def test_mean_weight(tmp_path):
    """The mean weight is the integral of the weight over the noise distribution."""
    loss = FlowMatching(density="logit_normal", shift=3.0, low=0.0, high=0.875, weighting="cosmap")
    noise_report.write(tmp_path, {"low_noise": loss}, ["17x64x64"], SETTINGS)
    distribution, *_ = law_of(json.loads((tmp_path / "noise.json").read_text()))

    def height(sigma):  # of the distribution of sigma, by the change of variables
        u = sigma / (3 - 2 * sigma)
        z = np.log(u / (1 - u))
        return np.exp(-(z**2) / 2) / (u * (1 - u)) * 3 / (3 - 2 * sigma) ** 2

    whole, _ = integrate.quad(height, 0, 0.875)
    weighed, _ = integrate.quad(lambda s: height(s) * loss.noise.weight(torch.tensor(s)).item(), 0, 0.875)
    assert distribution["mean_weight"] == pytest.approx(weighed / whole, rel=1e-4)


def test_shift_by_tokens(tmp_path):
    """A shift by tokens gives one noise distribution for each clip size."""
    loss = FlowMatching(shift=RootShift(base=3.0, num_frames=17, area=4096, multiple=16), high=0.875)
    noise_report.write(tmp_path, {"low_noise": loss}, ["17x64x64", "17x32x128", "17x128x128"], SETTINGS)
    report = json.loads((tmp_path / "noise.json").read_text())
    assert [
        (distribution["tokens"], distribution["shift"]) for distribution in report["low_noise"]["distributions"]
    ] == [(80, 3.0), (320, 6.0)]


def test_changed_noise_refused(tmp_path):
    """Resuming with another noise distribution is refused, and a loss without noise writes no report."""

    def write(height):
        loss = FlowMatching(density=flow.Table(points=[[0, 1], [1, height]]), high=0.875)
        noise_report.write(tmp_path, {"low_noise": loss}, ["17x64x64"], SETTINGS)

    write(2)
    write(2)
    with pytest.raises(
        ValueError, match=r"noise\.json: low_noise was trained on another distribution of noise.*run=NAME"
    ):
        write(3)
    noise_report.write(tmp_path / "vae", {"vae": Reconstruction()}, [], SETTINGS)
    assert not (tmp_path / "vae").exists()
