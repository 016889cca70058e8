"""The velocity loss: what a perfect and a naive model score, where the noise levels fall, what the mask leaves out."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from wantrain import flow
from wantrain.batch import Batch
from wantrain.losses import FlowMatching, FluxShift, RootShift
from wantrain.losses.flow_matching import distance, draw_noise, velocity_error
from wantrain.util.seeds import generator_at

HIGH = {"shift": 3.0, "low": 0.875, "high": 1.0}
LOW = {"shift": 3.0, "low": 0.0, "high": 0.875}


def batch(size=4, frames=3, **more):
    latents = torch.randn(size, 2, frames, 4, 6, generator=torch.Generator().manual_seed(1))
    names = tuple(f"clip {i}" for i in range(size))
    return Batch(latents, torch.ones(size, 5, 3), names, tuple(range(size)), **more)


def generators(positions):
    return [generator_at(0, "noise", position) for position in positions]


def lost(loss, model, data, streams):
    """The loss of a batch with what these generators draw."""
    return loss(model, data, loss.prepare(data, streams))


def perfect(of):
    """The model that knows the clean latents: (x_sigma - x0) / sigma is the velocity."""

    def model(noisy, timestep, text):
        assert timestep.dtype == torch.float32
        return (noisy - of.latents_BCTHW) / (timestep / 1000)[:, None, None, None, None]

    return model


def nothing(noisy, timestep, text):
    return torch.zeros_like(noisy)


@pytest.mark.parametrize("window", [HIGH, LOW])
@pytest.mark.parametrize("density", ["uniform", "logit_normal"])
def test_loss_bounds(window, density):
    """A perfect model has loss 0; a model that answers 0 has the mean square of the velocity."""
    data, loss = batch(), FlowMatching(density=density, **window)
    assert lost(loss, perfect(data), data, generators(range(4))).value < 1e-6  # dividing by a small sigma rounds
    record = lost(loss, nothing, data, generators(range(4)))
    streams = generators(range(4))
    loss.draw(data, streams)  # the sigma is drawn first, then the noise
    target = flow.velocity(data.latents_BCTHW, draw_noise(data.latents_BCTHW, streams))
    assert torch.allclose(record.per_sample, target.square().mean(dim=(1, 2, 3, 4)))
    assert torch.allclose(record.value, record.per_sample.mean())


@pytest.mark.parametrize("window", [HIGH, LOW])
def test_noise_levels_in_window(window):
    """Noise levels stay in the expert's noise window and follow its distribution up to both edges."""
    data, loss = batch(), FlowMatching(**window)
    sigmas = torch.cat([lost(loss, nothing, data, generators(range(4 * i, 4 * i + 4))).sigma for i in range(250)])
    assert flow.NoiseWindow(window["low"], window["high"]).contains(sigmas).all()
    assert len(sigmas.unique()) > 990, "no atom at an edge"
    p = (torch.arange(1000) + 0.5) / 1000
    distribution = flow.sigma_quantiles(
        p, density="uniform", shift=3.0, window=flow.NoiseWindow(window["low"], window["high"])
    )
    assert (sigmas.sort().values - distribution).abs().max() < 0.06 * (window["high"] - window["low"]) + 1e-3


def test_draws_independent_of_batch():
    """The noise and the noise level of a sample do not depend on the other samples of its batch."""
    data, loss, seen = batch(), FlowMatching(**LOW), []

    def spy(noisy, timestep, text):
        seen.append((noisy, timestep))
        return torch.zeros_like(noisy)

    lost(loss, spy, data, generators([7, 8, 9, 10]))
    for i, position in enumerate((7, 8, 9, 10)):
        alone = replace(data, latents_BCTHW=data.latents_BCTHW[i : i + 1], text_BLD=data.text_BLD[:1], ids=("x",))
        lost(loss, spy, alone, generators([position]))
        noisy, timestep = seen[-1]
        assert torch.equal(noisy, seen[0][0][i : i + 1]) and torch.equal(timestep, seen[0][1][i : i + 1])
    assert len({sigma for _, timestep in seen[1:] for sigma in timestep.tolist()}) == 4


def test_masked_frames():
    """Masked frames are left out of the error, which is the mean over the other frames."""
    plain = batch()
    mask = torch.ones(4, 3)
    mask[:, 0] = 0
    masked, sigma = replace(plain, noised_BT=mask), torch.full((4,), 0.5)
    noise = draw_noise(plain.latents_BCTHW, generators(range(4)))

    def wrong_in_frame_0(noisy, timestep, text):
        answer = flow.velocity(plain.latents_BCTHW, noise).clone()
        answer[:, :, 0] += 100
        return answer

    assert velocity_error(wrong_in_frame_0, masked, sigma, noise).max() == 0
    assert velocity_error(wrong_in_frame_0, plain, sigma, noise).min() > 3000
    counted = velocity_error(nothing, masked, sigma, noise)
    target = flow.velocity(plain.latents_BCTHW, noise)[:, :, 1:]
    assert torch.allclose(counted, target.square().mean(dim=(1, 2, 3, 4)))


def test_clean_frames():
    """Given frames enter the model clean, at timestep 0; all other frames are noised as without them."""
    plain, seen = batch(), []
    mask = torch.ones(4, 3)
    mask[1:, 0] = 0

    def spy(noisy, timestep, text):
        seen.append((noisy, timestep))
        return torch.zeros_like(noisy)

    loss = FlowMatching(**LOW)
    losses = [lost(loss, spy, replace(plain, noised_BT=each), generators(range(4))) for each in (None, mask)]
    (free, levels), (noisy, given) = seen
    assert torch.equal(noisy[1:, :, 0], plain.latents_BCTHW[1:, :, 0]) and not given[1:, 0].any()
    assert torch.equal(noisy[:, :, 1:], free[:, :, 1:]) and torch.equal(noisy[:1], free[:1])
    assert torch.equal(given[:, 1:], levels[:, None].expand(4, 2)) and torch.equal(losses[0].sigma, losses[1].sigma)
    ones = replace(plain, noised_BT=torch.ones(4, 3))
    assert torch.allclose(lost(FlowMatching(**LOW), spy, ones, generators(range(4))).value, losses[0].value)


def test_conditioning_passed_to_model():
    """The loss passes the text and every conditioning tensor to the model."""
    given = {}

    def spy(noisy, timestep, text, **conditioning):
        given.update(text=text, **conditioning)
        return noisy

    data = batch(conditioning={"pose_BTD": torch.full((4, 3, 2), 3.0), "camera_BD": torch.zeros(4, 1)})
    lost(FlowMatching(), spy, data, generators(range(4)))
    assert given == {"text": data.text_BLD, **data.conditioning}


def test_weighting():
    """A weighting multiplies the error of each sample, but not the errors that are logged."""
    data = batch()
    plain = lost(FlowMatching(**LOW), nothing, data, generators(range(4)))
    weighted = lost(FlowMatching(weighting="sigma_sqrt", **LOW), nothing, data, generators(range(4)))
    assert torch.equal(plain.per_sample, weighted.per_sample)
    assert torch.allclose(weighted.value, (plain.per_sample / plain.sigma.clamp(min=1e-3) ** 2).mean())


@pytest.mark.parametrize(
    "bad",
    [
        {"density": "normal"},
        {"shift": 0.0},
        {"low": 0.9, "high": 0.5},
        {"weighting": "snr"},
        {"huber": 0.0},
        {"density": flow.Table(points=[[0.0, 1.0], [0.2, 1.0]]), "low": 0.5},
    ],
)
def test_bad_settings(bad):
    """The constructor refuses wrong settings."""
    with pytest.raises(ValueError, match=r"unknown|must|no mass"):
        FlowMatching(**bad)


@pytest.mark.parametrize(
    "density",
    ["uniform", "logit_normal", flow.Mode(1.29), flow.Beta(2.0, 5.0), flow.Table(points=[[0, 1], [0.5, 0], [1, 3]])],
    ids=lambda density: type(density).__name__ if not isinstance(density, str) else density,
)
@pytest.mark.parametrize("window", [HIGH, LOW])
def test_quadrature(density, window):
    """The fixed noise levels of validation are midpoints of equal shares of the noise distribution."""
    loss = FlowMatching(density=density, **window)
    draws = flow.draw_sigma(
        200_000, density=density, shift=3.0, window=loss.window, generator=torch.Generator().manual_seed(0)
    )
    shares = torch.stack([(draws < level).double().mean() for level in loss.quadrature(8)])
    assert torch.allclose(shares, (torch.arange(8).double() + 0.5) / 8, atol=0.005)
    # What it is for: the mean of a function of sigma over the distribution.
    exact, fixed = (torch.sin(7 * sigma.double()).mean().item() for sigma in (draws, loss.quadrature(64)))
    assert fixed == pytest.approx(exact, abs=0.006)


def positioned(positions):
    """Samples with nothing in them but their places in the run."""
    count = len(positions)
    return Batch(torch.zeros(count, 1, 1, 2, 2), torch.zeros(count, 1, 1), ("",) * count, tuple(positions))


def draws(loss, positions):
    return loss.draw(positioned(positions), generators(positions))


def ranks(loss, sigma):
    """Where draws lie in their distribution, in [0, 1]."""
    return flow.sigma_cdf(sigma, density=loss.noise.density, shift=loss.noise.shift_for(), window=loss.window)


@pytest.mark.parametrize("window", [HIGH, LOW])
def test_stratified_draws(window):
    """Stratified draws put one sample in each equal share of the distribution; each one alone still follows it."""
    loss = FlowMatching(density="logit_normal", stratified=True, batch_size=16, seed=5, **window)
    steps = [ranks(loss, draws(loss, range(16 * step, 16 * step + 16))) for step in range(600)]
    for step in steps[:50]:
        assert sorted((step * 16).floor().int().tolist()) == list(range(16)), "one sample in each part"
    assert len({tuple((step * 16).floor().int().tolist()) for step in steps}) == 600, "another order each step"
    for place in (0, 7, 15):  # the marginal of one place in the batch is the distribution itself
        assert stats.kstest([step[place].item() for step in steps], "uniform").pvalue > 1e-3
    assert stats.kstest(torch.cat(steps).numpy(), "uniform").pvalue > 1e-3
    plain = FlowMatching(density="logit_normal", **window)
    loose = [ranks(plain, draws(plain, range(16 * step, 16 * step + 16))) for step in range(600)]
    means = [torch.stack(each).mean(1).var().item() for each in (steps, loose)]
    assert means[0] < means[1] / 100, "of 16 independent draws the mean varies 16^2 times as much"


def test_stratified_draws_split():
    """Stratified draws do not depend on how a step is split over ranks and micro steps."""
    loss = FlowMatching(stratified=True, batch_size=16, seed=5, **LOW)
    whole = draws(loss, range(32, 48))
    for parts in (2, 4, 8):
        size = 16 // parts
        split = [draws(loss, range(32 + size * part, 32 + size * part + size)) for part in range(parts)]
        assert torch.equal(torch.cat(split), whole)
    crossing = draws(loss, range(40, 56))  # a batch may reach over two steps, as the expert check's does
    assert torch.equal(crossing[:8], whole[8:])
    assert not torch.equal(draws(FlowMatching(stratified=True, batch_size=16, seed=6, **LOW), range(32, 48)), whole)


def test_shift_by_tokens():
    """A shift by tokens follows the size of each batch."""
    shift = RootShift(base=3.0, num_frames=17, area=4096, multiple=16)
    assert shift.reference_tokens == 5 * 16 and shift(80) == 3.0 and shift(320) == 6.0
    loss = FlowMatching(shift=shift, low=0.0, high=0.875)
    for size, expected in (((5, 8, 8), 3.0), ((5, 16, 16), 6.0), ((1, 8, 8), 3 / math.sqrt(5))):
        count = 4000
        data = Batch(torch.zeros(count, 1, *size), torch.zeros(count, 1, 1), ("",) * count, tuple(range(count)))
        sigma = loss.draw(data, [torch.Generator().manual_seed(1)] * count)

        def distribution(x, k=expected):
            return (x / (k - (k - 1) * x)) / (0.875 / (k - (k - 1) * 0.875))

        assert stats.kstest(sigma.numpy(), distribution).pvalue > 1e-3
    assert torch.equal(loss.quadrature(8), FlowMatching(shift=3.0, low=0.0, high=0.875).quadrature(8))
    flux = FluxShift()
    assert flux(256) == pytest.approx(math.exp(0.5)) and flux(4096) == pytest.approx(math.exp(1.15)) == flux(flux.reference_tokens)  # fmt: skip


def test_huber():
    """The Huber distance is quadratic up to its delta and linear beyond."""
    difference = torch.linspace(-4, 4, 401, dtype=torch.float64, requires_grad=True)
    ours = distance(difference, 0.7)
    assert torch.allclose(ours, 2 * F.huber_loss(difference, torch.zeros_like(difference), reduction="none", delta=0.7))
    inside = difference.abs() <= 0.7
    assert torch.equal(ours[inside], difference[inside] ** 2)
    (slope,) = torch.autograd.grad(ours.sum(), difference)
    assert slope.abs().max().item() == pytest.approx(2 * 0.7)
    data = batch()
    plain, robust, loose = (
        lost(FlowMatching(huber=huber, **LOW), nothing, data, generators(range(4))).value.item()
        for huber in (None, 0.5, 1e3)
    )
    assert robust < 0.6 * plain and loose == plain


def test_share_below():
    """The share of draws below a sigma is that of draws; shift 1, 3, 5 and 12 give 34, 18, 13 and 9 % below 0.3 for low
    noise, as calculated by hand.
    """
    shares = [FlowMatching(shift=shift, high=0.875).noise.share_below(0.3) for shift in (1.0, 3.0, 5.0, 12.0)]
    assert shares == pytest.approx([0.343, 0.179, 0.135, 0.094], abs=1e-3)
    loss = FlowMatching(shift=3.0, high=0.875)
    drawn = loss.quadrature(10_000)
    assert (drawn <= 0.3).double().mean().item() == pytest.approx(loss.noise.share_below(0.3), abs=1e-4)
