"""Flow-DPO against a plain implementation in float64: values, gradients, and what a pair must and must not do."""

import math
from dataclasses import replace

import pytest
import torch
from toy_velocity import KNOWN, SIZE, Toy, pairs

from wantrain.batch import joined
from wantrain.losses import Preference
from wantrain.util.seeds import generator_at


def lost(model, batch, **settings):
    loss = Preference(**settings)
    loss.attach({"base": model.base})
    draws = loss.prepare(batch, [generator_at(0, "noise", position) for position in batch.positions])
    return loss(model, batch, draws), draws


def plainly(model, batch, draws, beta, cap=None, anchor=0.0):
    """The same loss by its formula, one pair after another, in the dtype of the model."""
    dtype, total = model.weight.dtype, 0.0
    for i in range(len(batch)):
        errors = {}
        for name, own in {"winner": batch, "loser": batch.losers}.items():
            x0, noise = own.latents_BCTHW[i : i + 1].to(dtype), draws.noise_BCTHW[i : i + 1].to(dtype)
            learned = torch.ones(SIZE[1]) if own.noised_BT is None else own.noised_BT[i]
            level = (draws.sigma[i].to(dtype) * learned.to(dtype))[None, None, :, None, None]
            inputs = (1 - level) * x0 + level * noise, 1000 * level[:, 0, :, 0, 0], batch.text_BLD[i : i + 1].to(dtype)
            extra = {key: value[i : i + 1].to(dtype) for key, value in own.conditioning.items()}
            for whose, velocity in {"own": model(*inputs, **extra), "base": model.base(*inputs, **extra)}.items():
                square = (velocity - (noise - x0)).square().mean(dim=(0, 1, 3, 4))
                errors[name, whose] = (square * learned).sum() / learned.sum()
        margin = errors["winner", "base"] - errors["winner", "own"] + errors["loser", "own"] - errors["loser", "base"]
        logit = beta / 2 * margin
        if cap is not None and logit > cap:
            logit = torch.tensor(cap, dtype=dtype)
        total = total - torch.log(1 / (1 + torch.exp(-logit))) + anchor * errors["winner", "own"]
    return total / len(batch)


CASES = {
    "plain": ({}, {}),
    "anchor": ({"anchor": 0.7}, {}),
    "cap": ({"cap": 0.05}, {}),
    "no cap": ({"cap": None}, {}),
    "conditioning": ({}, {"conditioning": {"extra": torch.full((4, *SIZE), 0.2)}}),
    "clean frames": ({"anchor": 0.1}, {"noised_BT": KNOWN}),
}


@pytest.mark.parametrize("case", CASES)
def test_matches_plain_loss(case):
    """Value and gradient are those of the formula in float64, for every setting and every kind of batch."""
    settings, more = CASES[case]
    model, exact, batch = Toy(), Toy(dtype=torch.float64), pairs(**more)
    found, draws = lost(model, batch, beta=2.0, **settings)
    found.value.backward()
    wanted = plainly(exact, batch, draws, 2.0, **{"cap": 3.0, **settings})
    wanted.backward()
    assert found.value.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert torch.allclose(model.adapter.grad.double(), exact.adapter.grad, rtol=1e-4, atol=1e-6)
    assert found.per_sample.shape == (4,) and not found.per_sample.requires_grad
    if case == "cap":
        assert found.parts["pull"] < lost(model, batch, beta=2.0)[0].parts["pull"], "some pairs are beyond the cap"


def test_at_the_start():
    """An adapter that adds nothing: the loss is ln 2, its gradient beta / 4 times that of the errors' difference."""
    model, batch = Toy(), pairs()
    torch.nn.init.zeros_(model.adapter)
    found, draws = lost(model, batch, beta=8.0)
    found.value.backward()
    assert found.value.item() == pytest.approx(math.log(2), abs=1e-7)
    assert {name: found.parts[name].item() for name in ("margin", "preferred", "winner_change")} == {
        "margin": 0.0,
        "preferred": 0.0,
        "winner_change": 0.0,
    }
    assert found.parts["pull"] == 0.5 and (found.over_base == 1).all()
    other = Toy(dtype=torch.float64)
    torch.nn.init.zeros_(other.adapter)
    total = 0.0
    for own, sign in ((batch, 1), (batch.losers, -1)):
        x0, noise, level = own.latents_BCTHW.double(), draws.noise_BCTHW.double(), draws.sigma.double()
        s = level[:, None, None, None, None]
        velocity = other((1 - s) * x0 + s * noise, 1000 * level, batch.text_BLD.double())
        total = total + sign * (velocity - noise + x0).square().mean()
    (8.0 / 4 * total).backward()
    assert torch.allclose(model.adapter.grad.double(), other.adapter.grad, rtol=1e-4, atol=1e-6)


def test_symmetry():
    """Exchanged pairs have the opposite margin; two equal samples have no gradient."""
    model, batch = Toy(), pairs()
    exchanged = replace(batch.losers, losers=replace(batch, losers=None))
    margins = [lost(model, each)[0].parts["margin"].item() for each in (batch, exchanged)]
    assert margins[0] == pytest.approx(-margins[1], rel=1e-5) and margins[0] != 0
    same = replace(batch, losers=replace(batch, losers=None))
    found, _ = lost(model, same, beta=100.0)
    found.value.backward()
    assert found.parts["margin"] == 0 and model.adapter.grad.abs().max() < 1e-5


def test_shared_draws():
    """Winner and loser are given the same prompt, noise level and noise, in one forward with the adapter."""
    model, batch, seen = Toy(), pairs(), []

    def noted(noisy, timestep, text, **more):
        seen.append((noisy, timestep, text))
        return model(noisy, timestep, text, **more)

    loss = Preference()
    loss.attach({"base": model.base})
    draws = loss.prepare(batch, [generator_at(0, "noise", position) for position in batch.positions])
    loss(noted, batch, draws)
    ((noisy, timestep, text),) = seen
    assert torch.equal(timestep[:4], timestep[4:]) and torch.equal(text[:4], text[4:])
    s = (timestep / 1000)[:, None, None, None, None]
    clean = batch.latents_BCTHW - batch.losers.latents_BCTHW
    assert torch.allclose(noisy[:4] - noisy[4:], (1 - s[:4]) * clean, atol=1e-6), "the noise cancels out"


def test_weights_and_limits():
    """A winner's loss_weight weighs its pair, and noise levels stay within the limits."""
    whole = lost(Toy(), pairs(), beta=2.0)[0].value
    one = lost(Toy(), pairs(weight_B=torch.tensor([4.0, 0, 0, 0])), beta=2.0)[0].value
    rest = lost(Toy(), pairs(weight_B=torch.tensor([0.0, 4, 4, 4])), beta=2.0)[0].value
    assert (one + rest).item() == pytest.approx(4 * whole.item(), rel=1e-5)
    sigma = lost(Toy(), pairs(), beta=2.0, min_sigma=0.4, max_sigma=0.6)[1].sigma
    assert ((sigma >= 0.4) & (sigma <= 0.6)).all()


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"cap": -1.0}, {"anchor": -0.1}])
def test_refused_settings(settings):
    """Settings that make no loss name themselves."""
    (name,) = settings
    with pytest.raises(ValueError, match=rf"loss\.{name}="):
        Preference(**settings)


def test_joined_batches():
    """Batches become one, texts padded, and `take` and `to` reach the losers."""
    one, other = pairs(), replace(pairs(), text_BLD=torch.ones(4, 7, 3))
    both = joined([one, other])
    assert both.ids == one.ids * 2 and both.text_BLD.shape == (8, 7, 3) and (both.text_BLD[:4, 5:] == 0).all()
    assert torch.equal(both.losers.latents_BCTHW[4:], other.losers.latents_BCTHW)
    few = both.take([5, 0])
    assert few.ids == ("1 1", "1 0") and few.losers.ids == ("2 1", "2 0")
    assert torch.equal(few.losers.latents_BCTHW[1], one.losers.latents_BCTHW[0])
    assert both.to("meta").losers.latents_BCTHW.device.type == "meta"
