"""Masks in the loss: against a plain float64 implementation, values and gradients; what they leave out and log."""

from dataclasses import replace

import pytest
import torch

from wantrain import flow
from wantrain.batch import Batch, PackedBatch
from wantrain.losses import FlowMatching
from wantrain.util.seeds import generator_at

SIZE, SHAPE = 4, (2, 3, 4, 6)


def batch(**more):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(SIZE, *SHAPE, generator=generator)
    names = tuple(f"clip {i}" for i in range(SIZE))
    return Batch(latents, torch.ones(SIZE, 5, 3), names, tuple(range(SIZE)), **more)


def soft(seed=2):
    """Masks with black, white and grey cells."""
    drawn = torch.rand(SIZE, *SHAPE[1:], generator=torch.Generator().manual_seed(seed))
    return torch.where(drawn < 0.3, 0.0, torch.where(drawn > 0.7, 1.0, drawn))


def masked(some=True, **more):
    """A batch with masks; with `some` the second sample has none."""
    who = torch.ones(SIZE)
    mask = soft()
    if some:
        who[1], mask[1] = 0, 0
    return batch(mask_BTHW=mask, masked_B=who, **more)


class Linear(torch.nn.Module):
    """velocity = a * noisy + b * position: two weights whose gradients are known in closed form."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(torch.tensor(value, dtype=dtype)) for value in (0.3, -0.2))

    def forward(self, noisy, timestep, text):
        row = torch.linspace(-1, 1, noisy.shape[-1], dtype=noisy.dtype)
        return self.a * noisy + self.b * row


def lost(loss, model, data):
    draws = loss.prepare(data, [generator_at(0, "noise", position) for position in data.positions])
    return loss(model, data, draws), draws


def plainly(data, draws, *, mode, rest, normalize):
    """The same loss in float64, sample by sample and cell by cell, with autograd's gradients."""
    model, values = Linear(torch.float64), []
    for i in range(SIZE):
        x0, noise = data.latents_BCTHW[i].double(), draws.noise_BCTHW[i].double()
        sigma = draws.sigma[i].double()
        noised = torch.ones(SHAPE[1]) if data.noised_BT is None else data.noised_BT[i]
        level = (sigma * noised.double())[None, :, None, None]
        answer = model((1 - level) * x0 + level * noise, None, None)
        error = (answer - (noise - x0)).square()
        total = weights = cells = 0.0
        for t in range(SHAPE[1]):
            for h in range(SHAPE[2]):
                for w in range(SHAPE[3]):
                    weight = 1.0
                    if data.masked_B is not None and data.masked_B[i]:
                        white = data.mask_BTHW[i, t, h, w].double()
                        counted = white if mode == "focus" else 1 - white
                        weight = counted + rest * (1 - counted)
                    weight, one = weight * noised[t].double(), noised[t].double()
                    total = total + weight * error[:, t, h, w].mean()
                    weights, cells = weights + weight, cells + one
        value = total / (weights if normalize else cells)
        values.append(value * (1.0 if data.weight_B is None else data.weight_B[i].double()))
    mean = torch.stack(values).mean()
    mean.backward()
    return mean.detach(), model


@pytest.mark.parametrize("mode", ["focus", "ignore"])
@pytest.mark.parametrize(("rest", "normalize"), [(0.0, True), (0.25, True), (0.0, False), (0.25, False)])
@pytest.mark.parametrize("more", ["", "clean frames", "weights"])
def test_plain_implementation(mode, rest, normalize, more):
    """Value and gradients are those of the sum over cells, in float64."""
    given = {
        "clean frames": {"noised_BT": torch.tensor([[0.0, 1, 1]] * SIZE)},
        "weights": {"weight_B": torch.rand(SIZE)},
    }
    data, model = masked(**given.get(more, {})), Linear()
    record, draws = lost(FlowMatching(shift=3.0, mask=mode, mask_rest=rest, mask_normalize=normalize), model, data)
    record.value.backward()
    value, other = plainly(data, draws, mode=mode, rest=rest, normalize=normalize)
    assert record.value.item() == pytest.approx(value.item(), rel=2e-6)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert ours.grad.item() == pytest.approx(theirs.grad.item(), rel=2e-5, abs=1e-6)


def test_whole_masks_change_nothing():
    """All white, all alike, or none at all: the loss is that of a run without masks."""
    plain, _ = lost(FlowMatching(shift=3.0), Linear(), batch())
    white = batch(mask_BTHW=torch.ones(SIZE, *SHAPE[1:]), masked_B=torch.ones(SIZE))
    for data, mode in ((white, "focus"), (replace(white, mask_BTHW=white.mask_BTHW * 0), "ignore"), (batch(), "focus")):
        record, _ = lost(FlowMatching(shift=3.0, mask=mode), Linear(), data)
        assert record.value.item() == pytest.approx(plain.value.item(), rel=1e-6)
        assert torch.allclose(record.per_sample, plain.per_sample, rtol=1e-6)
    alike = replace(white, mask_BTHW=white.mask_BTHW * 0.5)
    record, _ = lost(FlowMatching(shift=3.0, mask="focus"), Linear(), alike)
    assert record.value.item() == pytest.approx(plain.value.item(), rel=1e-6)


def test_nothing_outside_is_learned():
    """With mask_rest=0 the gradient outside the region is exactly 0, and inside it is not."""
    data = masked(some=False)
    answer = torch.zeros(SIZE, *SHAPE, requires_grad=True)
    record, _ = lost(FlowMatching(shift=3.0, mask="focus"), lambda noisy, timestep, text: answer, data)
    record.value.backward()
    touched = (answer.grad != 0).any(dim=1)
    assert torch.equal(touched, data.mask_BTHW > 0)


def test_area_counts_only_without_normalize():
    """A mask of half the area: the mean stays, the sum halves."""
    half = torch.zeros(SIZE, *SHAPE[1:])
    half[..., :3] = 1
    data = batch(mask_BTHW=half, masked_B=torch.ones(SIZE))
    values = [
        lost(FlowMatching(shift=3.0, mask="focus", mask_normalize=normalize), Linear(), data)[0].value.item()
        for normalize in (True, False)
    ]
    assert values[1] == pytest.approx(values[0] / 2, rel=1e-6)


def test_regions_are_logged():
    """The error in the region and outside it, of the samples that have a mask; NaN where there is none."""
    data = masked()
    record, draws = lost(FlowMatching(shift=3.0, mask="ignore", mask_rest=0.5), Linear(), data)
    noisy = flow.path(data.latents_BCTHW, draws.noise_BCTHW, draws.sigma)
    with torch.no_grad():
        answer = Linear()(noisy, None, None)
    error = (answer - flow.velocity(data.latents_BCTHW, draws.noise_BCTHW)).square().mean(dim=1)
    has = data.masked_B[:, None, None, None]
    counted, rest = (1 - data.mask_BTHW) * has, data.mask_BTHW * has
    assert record.parts["loss_counted"].item() == pytest.approx(
        ((error * counted).sum() / counted.sum()).item(), rel=1e-5
    )
    assert record.parts["loss_rest"].item() == pytest.approx(((error * rest).sum() / rest.sum()).item(), rel=1e-5)
    record, _ = lost(FlowMatching(mask="focus"), Linear(), batch())
    assert record.parts["loss_counted"].isnan() and record.parts["loss_rest"].isnan()
    assert lost(FlowMatching(), Linear(), masked())[0].parts == {}


def test_packed_parts():
    """Parts of different shapes in one pack: the loss and the regions of the samples, as if each part stood alone."""
    first = masked()
    small = torch.randn(2, 2, 1, 4, 4, generator=torch.Generator().manual_seed(5))
    half = torch.zeros(2, 1, 4, 4)
    half[..., :2] = 1
    second = Batch(small, torch.ones(2, 5, 3), ("e", "f"), (4, 5), mask_BTHW=half, masked_B=torch.ones(2))
    loss, model = FlowMatching(shift=3.0, mask="focus", mask_rest=0.25, mask_normalize=False), Linear()

    def packed(noisy, timesteps, texts):
        return tuple(map(model, noisy, timesteps, texts))

    pack = PackedBatch((first, second), weight=1.0, most=6)
    record, _ = lost(loss, packed, pack)
    alone = [lost(loss, model, part)[0] for part in (first, second)]
    wanted = (SIZE * alone[0].value + 2 * alone[1].value) / (SIZE + 2)
    assert record.value.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert torch.equal(record.per_sample, torch.cat([each.per_sample for each in alone]))
    for name, value in record.parts.items():
        low, high = sorted(each.parts[name].item() for each in alone)
        assert low < value.item() < high


def test_no_pixel_left():
    """A clip of which nothing is left is refused on the host, by its name; a rest above 0 leaves something. Where only
    the frames that were drawn as given are white, the sample has no part in the loss.
    """
    data = masked(some=False)
    black = data.mask_BTHW.clone()
    black[2] = 0
    data = replace(data, mask_BTHW=black)
    with pytest.raises(ValueError, match=r"^loss\.mask=focus leaves no pixel of clip 2: .* nothing white; .*mask_rest"):
        lost(FlowMatching(mask="focus"), Linear(), data)
    assert lost(FlowMatching(mask="focus", mask_rest=0.1), Linear(), data)[0].value.isfinite()
    assert lost(FlowMatching(mask="ignore"), Linear(), data)[0].value.isfinite()
    first = replace(data, mask_BTHW=torch.zeros_like(black), noised_BT=torch.tensor([[0.0, 1, 1]] * SIZE))
    first.mask_BTHW[:, 0] = 1  # white where the frame is given clean
    first.mask_BTHW[0, 1:] = 1  # of the first sample, what is learned too
    found = lost(FlowMatching(mask="focus"), Linear(), first)[0]
    assert found.value.isfinite() and found.per_sample[0] > 0 and not found.per_sample[1:].any()


def test_validation_goes_by_the_mask():
    """Validation measures what the mask counts, and says so."""
    data = masked()
    validation = FlowMatching(shift=3.0, mask="focus", mask_rest=0.25).validation
    assert validation.about == "loss.mask=focus, the rest at 0.25"
    sigma, noise = torch.full((SIZE,), 0.5), torch.randn(SIZE, *SHAPE, generator=torch.Generator().manual_seed(3))
    found = validation.error(Linear(), data, sigma, noise)
    error = (Linear()(flow.path(data.latents_BCTHW, noise, sigma), None, None) - (noise - data.latents_BCTHW)).square()
    weight = validation.weight(data)
    wanted = (error.mean(1) * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3))
    assert torch.allclose(found, wanted) and torch.equal(weight[1], torch.ones(SHAPE[1:]))
    assert FlowMatching().validation.about == "" and FlowMatching().validation.weight(data) is None


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"mask": "inside"}, r"^loss\.mask=inside is unknown"),
        ({"mask": "focus", "mask_rest": 1}, r"^loss\.mask_rest=1 "),
    ],
)
def test_wrong_settings(settings, problem):
    """A mode that there is not, and a rest that weighs as much as the region, are refused."""
    with pytest.raises(ValueError, match=problem):
        FlowMatching(**settings)
