"""The noise distributions as distributions, and the flow's algebra."""

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from wantrain import flow
from wantrain.flow import Beta, LogitNormal, Mode, NoiseWindow, Table

DRAWS = 100_000
MODELS = {"t2v": (12.0, 0.875), "i2v": (5.0, 0.9)}


class Triangle:
    """A density the module has never heard of: p(u) = 2u."""

    def cdf(self, u):
        return u**2

    def quantile(self, p):
        return p.sqrt()


POINTS = [[0.0, 1.0], [0.3, 0.0], [0.5, 3.0], [0.9, 2.0], [1.0, 0.0]]
DENSITIES = {
    "uniform": "uniform",
    "logit_normal": "logit_normal",
    "wide": LogitNormal(0.5, 1.5),
    "own": Triangle(),
    "mode": Mode(1.29),
    "ends": Mode(-0.8),
    "beta": Beta(2.0, 5.0),
    "poles": Beta(0.5, 0.5),
    "table": Table(points=POINTS),
}


def cdf_of_u(u, density):
    """The distribution before the shift, derived here on its own."""
    u = u.numpy()
    fine = np.linspace(0, 1, 200_001)
    if density == "uniform":
        return u
    if density == "own":
        return u**2
    if density in {"mode", "ends"}:  # SD3's formula as printed: t = 1 - u - s*(cos(pi*u/2)^2 - 1 + u), falling in u
        scale = 1.29 if density == "mode" else -0.8
        printed = 1 - fine - scale * (np.cos(np.pi * fine / 2) ** 2 - 1 + fine)
        return np.interp(u, printed[::-1], 1 - fine[::-1])
    if density in {"beta", "poles"}:
        return stats.beta(*((2, 5) if density == "beta" else (0.5, 0.5))).cdf(u)
    if density == "table":
        height = np.interp(fine, *np.array(POINTS).T)
        below = integrate.cumulative_trapezoid(height, fine, initial=0)
        return np.interp(u, fine, below / below[-1])
    mean, std = (0.0, 1.0) if density == "logit_normal" else (0.5, 1.5)
    return stats.norm.cdf((np.log(u / (1 - u)) - mean) / std)


def cdf_of_sigma(sigma, density, shift):
    """The unrestricted distribution of sigma: P(shift(U) <= sigma)."""
    return cdf_of_u(sigma / (shift - (shift - 1) * sigma), density)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("expert", ["high_noise", "low_noise"])
@pytest.mark.parametrize("density", DENSITIES)
def test_draws_in_window(model, expert, density):
    """Draws follow the truncated noise distribution, without an atom at an edge."""
    shift, boundary = MODELS[model]
    window = NoiseWindow(boundary, 1.0) if expert == "high_noise" else NoiseWindow(0.0, boundary)
    generator = torch.Generator().manual_seed(7)
    sigma = flow.draw_sigma(DRAWS, density=DENSITIES[density], shift=shift, window=window, generator=generator)
    assert sigma.dtype == torch.float32 and sigma.shape == (DRAWS,)
    assert window.contains(sigma).all()

    def truncated(x):
        x = torch.as_tensor(x, dtype=torch.float64).clamp(1e-15, 1 - 1e-15)
        ends = torch.tensor([max(window.low, 1e-15), min(window.high, 1 - 1e-15)], dtype=torch.float64)
        low, high = (float(v) for v in cdf_of_sigma(ends, density, shift))
        return (cdf_of_sigma(x, density, shift) - low) / (high - low)

    assert stats.kstest(sigma.double().numpy(), truncated).pvalue > 1e-3
    levels = torch.linspace(window.low, window.high, 201, dtype=torch.float64)
    ours = flow.sigma_cdf(levels, density=DENSITIES[density], shift=shift, window=window)
    assert np.abs(ours.numpy() - truncated(levels)).max() < 1e-6
    # A clamped distribution piles thousands on one value; a continuous one repeats a float32 a few times at most, more beside a
    # pole of its density.
    assert torch.unique(sigma, return_counts=True)[1].max() < (100 if density == "poles" else 20)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("density", DENSITIES)
def test_expert_mixture(model, density):
    """The distributions of both experts, mixed by their masses, are the whole distribution."""
    shift, boundary = MODELS[model]
    low, high = NoiseWindow(0.0, boundary), NoiseWindow(boundary, 1.0)
    distribution = {"density": DENSITIES[density], "shift": shift}
    masses = [flow.window_mass(window, **distribution) for window in (low, high)]
    assert sum(masses) == pytest.approx(1.0, abs=1e-12)
    generator = torch.Generator().manual_seed(3)
    parts = [
        flow.draw_sigma(round(DRAWS * mass), window=window, generator=generator, **distribution)
        for window, mass in zip((low, high), masses, strict=True)
    ]
    whole = flow.draw_sigma(DRAWS, generator=generator, **distribution)
    assert stats.ks_2samp(torch.cat(parts).numpy(), whole.numpy()).pvalue > 1e-3


@pytest.mark.parametrize(
    ("shift", "boundary", "density", "mass"),
    [
        (3, 0.875, "uniform", 0.300),
        (5, 0.875, "uniform", 0.417),
        (12, 0.875, "uniform", 0.632),
        (12, 0.875, "logit_normal", 0.705),
        (5, 0.9, "uniform", 0.357),
        (5, 0.9, "logit_normal", 0.278),
    ],
)
def test_high_noise_window_mass(shift, boundary, density, mass):
    """The mass of the high-noise window equals its published values."""
    got = flow.window_mass(NoiseWindow(boundary, 1.0), density=density, shift=shift)
    assert got == pytest.approx(mass, abs=6e-4)


def test_window_bounds():
    """The noise windows share no sigma, and a tie belongs to high noise."""
    low, high = NoiseWindow(0.0, 0.875), NoiseWindow(0.875, 1.0)
    sigma = torch.tensor([0.0, 0.5, 0.875, 0.9, 1.0])
    assert low.contains(sigma).tolist() == [True, True, False, False, False]
    assert high.contains(sigma).tolist() == [False, False, True, True, True]
    # 0.9 is no float32: the edges of the distributions must still fall on their own sides.
    quantiles = torch.tensor([0.0, 1.0])
    distribution = {"density": "uniform", "shift": 5.0}
    assert (
        NoiseWindow(0.0, 0.9)
        .contains(flow.sigma_quantiles(quantiles, window=NoiseWindow(0.0, 0.9), **distribution))
        .all()
    )
    assert (
        NoiseWindow(0.9, 1.0)
        .contains(flow.sigma_quantiles(quantiles, window=NoiseWindow(0.9, 1.0), **distribution))
        .all()
    )


def test_shift_inverse_and_composition():
    """unshift inverts the shift, and two shifts compose by multiplication."""
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(flow.unshift_sigma(flow.shift_sigma(u, 12.0), 12.0), u, atol=1e-12, rtol=0)
    twice = flow.shift_sigma(flow.shift_sigma(u, 3.0), 4.0)
    torch.testing.assert_close(twice, flow.shift_sigma(u, 12.0), atol=1e-12, rtol=0)


def test_path_and_velocity():
    """One step along the velocity, x - sigma * v, leads from any point of the path to the data."""
    x0, noise = torch.randn(2, 2, 4, 3, 5, 5, dtype=torch.float64).unbind()
    for sigma in (torch.tensor([0.0, 1.0]), torch.tensor([0.3, 0.9]), torch.rand(2, 3)):
        point = flow.path(x0, noise, sigma)
        torch.testing.assert_close(point - flow.over_frames(sigma, x0) * flow.velocity(x0, noise), x0)
    assert torch.equal(flow.path(x0, noise, torch.tensor([0.0, 1.0]))[0], x0[0])
    assert torch.equal(flow.path(x0, noise, torch.tensor([0.0, 1.0]))[1], noise[1])


GOLDEN = {
    (
        40,
        12.0,
    ): "999 997 995 993 990 988 985 982 979 976 972 969 965 961 956 952 947 941 936 929 922 915 907 898 888 877 "
    "865 852 837 819 799 776 749 717 678 631 571 492 386 235",
    (
        40,
        5.0,
    ): "999 994 989 983 978 972 965 959 952 944 937 929 920 911 902 892 882 870 859 846 833 818 803 786 768 749 728 "
    "706 681 654 624 591 555 514 468 416 356 288 208 113",
    (
        50,
        5.0,
    ): "999 995 991 987 982 978 973 968 963 957 952 946 940 934 927 920 913 906 898 890 882 873 863 854 843 833 821 "
    "809 796 783 768 753 737 720 701 681 660 636 611 584 555 522 487 448 405 356 302 241 172 92",
}


@pytest.mark.parametrize("setting", GOLDEN)
def test_published_timesteps(setting):
    """The sampling timesteps equal the published ones exactly."""
    sigmas = flow.sampling_sigmas(*setting)
    assert sigmas[-1] == 0
    assert flow.sampling_timesteps(sigmas).tolist() == [int(t) for t in GOLDEN[setting].split()]


@pytest.mark.parametrize("density", DENSITIES)
def test_quantile_inverts_cdf(density):
    """The quantile inverts the cumulative distribution and reaches both ends."""
    distribution = flow.density_named(DENSITIES[density])
    p = torch.linspace(0, 1, 1001, dtype=torch.float64)
    u = distribution.quantile(p)
    assert (u.diff() >= 0).all() and 0 <= u[0] < 1e-6 and 1 - 1e-6 < u[-1] <= 1
    assert (distribution.cdf(u) - p).abs().max() < 1e-9
    assert distribution.cdf(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist() == pytest.approx([0, 1], abs=1e-12)


@pytest.mark.parametrize("parameters", [(2, 2), (0.5, 0.5), (1, 1), (5, 2), (0.3, 0.7), (1000, 500), (30, 1.2)])
def test_beta_cdf_matches_scipy(parameters):
    u = torch.linspace(0, 1, 2001, dtype=torch.float64)
    assert np.abs(Beta(*parameters).cdf(u).numpy() - stats.beta(*parameters).cdf(u.numpy())).max() < 1e-6


def test_table_density(tmp_path):
    """A table draws nothing where it is zero, and it is read from a file."""
    distribution = Table(points=[[0.1, 1.0], [0.3, 1.0], [0.3001, 0.0], [0.6, 0.0], [0.6001, 2.0], [0.8, 2.0]])
    sigma = flow.draw_sigma(20_000, density=distribution, generator=torch.Generator().manual_seed(0))
    assert sigma.min() >= 0.1 and sigma.max() <= 0.8 and not ((sigma > 0.3001) & (sigma < 0.6)).any()
    assert (sigma > 0.5).double().mean().item() == pytest.approx(2 / 3, abs=0.01)
    (tmp_path / "distribution.txt").write_text("# u height\n0 1\n\n0.3, 0\n.5 3\n0.9\t2\n1 0  # the end\n")
    p = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert torch.equal(Table(file=str(tmp_path / "distribution.txt")).quantile(p), Table(points=POINTS).quantile(p))
    (tmp_path / "bad.txt").write_text("0 1\none 2\n")
    with pytest.raises(ValueError, match=r"bad\.txt: line 2 is not two numbers: 'one 2'"):
        Table(file=str(tmp_path / "bad.txt"))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: NoiseWindow(0.9, 0.9), "0 <= low < high <= 1"),
        (lambda: flow.draw_sigma(1, density="beta"), "density='beta' is unknown; choose one of uniform"),
        (lambda: flow.draw_sigma(1, density="uniform", shift=0), "shift=0 must be positive"),
        (lambda: LogitNormal(0.0, 0.0), r"density\.std=0\.0 must be above 0"),
        (lambda: Beta(2.0, 0.0), r"alpha=2\.0 and beta=0\.0 must be above 0"),
        (lambda: Mode(2.0), r"scale=2\.0 must lie between -1 and 1\.75"),
        (lambda: Table(), r"give points=\[\[u, height\], \.\.\.\] or file=FILE, one of the two"),
        (lambda: Table(file="nowhere.txt"), r"density\.file=nowhere\.txt: there is no such file"),
        (lambda: Table(points=[[0.5, 1.0]]), "at least two points"),
        (lambda: Table(points=[[0.0, 1.0, 2.0], [1.0, 1.0, 2.0]]), "of two numbers each"),
        (lambda: Table(points=[[0.5, 1.0], [0.2, 1.0]]), "u must rise"),
        (lambda: Table(points=[[0.0, 1.0], [2.0, 1.0]]), r"stay in \[0, 1\]"),
        (lambda: Table(points=[[0.0, 1.0], [1.0, -1.0]]), "must not be negative"),
        (
            lambda: flow.draw_sigma(1, density=Table(points=[[0, 1], [0.2, 1]]), window=NoiseWindow(0.5, 1.0)),
            r"no mass in \[0\.5, 1\.0\)",
        ),
        (lambda: flow.sampling_sigmas(0, 3.0), "at least 1"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
