"""Solvers against diffusers on the same sigmas and against an exact solution; the expert switch; guidance."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from wantrain import flow
from wantrain.models.pipeline import _scheduler
from wantrain.sampling.generate import Experts, Settings, generate
from wantrain.sampling.solvers import Euler, UniPC, solver_named

SHAPE = (2, 4, 3, 4, 6)


def noise(seed=0):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def bent(x, sigma):
    """A velocity that is linear in nothing."""
    return torch.tanh(x * (1 + sigma)) + math.sin(5 * sigma) * x.flip(1)


def walk(solver, x, sigmas, velocity=bent):
    for i, sigma in enumerate(sigmas[:-1].tolist()):
        x = solver.step(i, x, velocity(x, sigma))
    return x


@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 20, 40])
def test_unipc_agrees_with_diffusers(steps, shift):
    peer = UniPCMultistepScheduler.from_config(_scheduler(shift))
    peer.set_timesteps(steps)
    theirs = noise()
    for timestep, sigma in zip(peer.timesteps, peer.sigmas.tolist(), strict=False):
        theirs = peer.step(bent(theirs, sigma), timestep, theirs).prev_sample
    ours = walk(UniPC(peer.sigmas), noise(), peer.sigmas)
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() < 2e-5 * theirs.abs().max()


@pytest.mark.parametrize("steps", [1, 2, 3, 20, 40])
def test_euler_agrees_with_diffusers(steps):
    sigmas = flow.sampling_sigmas(steps, 3.0)
    peer = FlowMatchEulerDiscreteScheduler(shift=1.0)
    peer.set_timesteps(sigmas=sigmas[:-1].tolist())
    theirs = noise()
    for timestep, sigma in zip(peer.timesteps, sigmas.tolist(), strict=False):
        theirs = peer.step(bent(theirs, sigma), timestep, theirs).prev_sample
    assert (walk(Euler(sigmas), noise(), sigmas) - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("unipc", 2)])
def test_the_error_falls_with_the_solvers_order(name, order):
    """Normal data of mean m and spread s: the velocity and the path it follows are known exactly."""
    mean, spread, start = 0.7, 0.4, 0.99

    def scale(sigma):
        return math.sqrt((1 - sigma) ** 2 * spread**2 + sigma**2)

    def velocity(x, sigma):
        pull = ((1 - sigma) * spread**2) / scale(sigma) ** 2
        data = mean + pull * (x - (1 - sigma) * mean)
        return (x - data) / sigma

    z = noise().double()
    exact, errors = mean + spread * z, []
    for steps in (20, 40, 80):
        sigmas = torch.linspace(start, 0, steps + 1, dtype=torch.float64)
        begin = (1 - start) * mean + scale(start) * z
        solver = solver_named(name, sigmas)
        errors.append((walk(solver, begin, sigmas, velocity) - exact).abs().max().item())
    assert errors[2] < errors[1] < errors[0] < 0.3
    assert errors[1] / errors[2] > 1.8**order


def test_an_unknown_solver_is_refused():
    with pytest.raises(ValueError, match="solver='heun' is unknown; choose one of euler, unipc"):
        solver_named("heun", torch.tensor([1.0, 0.0]))


class Counted:
    """A model that remembers what it was asked."""

    def __init__(self, value=0.0):
        self.value, self.asked = value, []

    def __call__(self, x, timestep, text, condition):
        self.asked.append((timestep.tolist(), text.mean().item()))
        return torch.full_like(x, self.value + text.mean().item())


def sample(models, *, steps=20, shift=12.0, guidance=3.0, boundary=0.875, **more):
    trace = []
    settings = {
        "text_BLD": torch.ones(2, 3, 4),
        "negative_BLD": torch.zeros(2, 3, 4),
        "sigmas": flow.sampling_sigmas(steps, shift),
        "guidance": dict.fromkeys(models, guidance) if isinstance(guidance, float) else guidance,
        **more,
    }
    latents = generate(
        Experts(models, boundary), latents=noise(), on_step=lambda i, name: trace.append((i, name)), **settings
    )
    return latents, trace


def test_the_switch_of_wans_own_schedule_comes_after_thirteen_steps():
    models = {"high_noise": Counted(), "low_noise": Counted()}
    _, trace = sample(models)
    assert trace == [(i, "high_noise" if i < 13 else "low_noise") for i in range(20)]
    timesteps = flow.sampling_timesteps(flow.sampling_sigmas(20, 12.0)).tolist()
    for name, part in (("high_noise", timesteps[:13]), ("low_noise", timesteps[13:])):
        # Twice per step: with the prompt, and with the negative prompt, at the same integer timestep.
        assert models[name].asked == [(2 * [float(t)], text) for t in part for text in (1.0, 0.0)]


def test_a_tie_at_the_boundary_belongs_to_high_noise():
    experts = Experts({"high_noise": Counted(), "low_noise": Counted()}, 0.875)
    assert [experts.name_at(timestep) for timestep in (999, 876, 875, 874, 0)] == 3 * ["high_noise"] + 2 * ["low_noise"]
    assert Experts({"low_noise": Counted()}, 0.875).name_at(999) == "low_noise", "alone, it answers for everything"


def test_guidance_pushes_away_from_the_negative_prompt_and_scale_one_asks_once():
    guided, plain = Counted(), Counted()
    latents, _ = sample({"dense": guided}, steps=1, shift=1.0, guidance=3.0, boundary=None, solver="euler")
    # The answers are 1 with the prompt and 0 with the negative one: 0 + 3 * (1 - 0) = 3.
    sigma = flow.sampling_sigmas(1, 1.0)[0].item()
    assert torch.allclose(latents, noise() - sigma * 3.0, atol=1e-6)
    assert len(guided.asked) == 2
    sample({"dense": plain}, steps=4, guidance=1.0, boundary=None)
    assert [text for _, text in plain.asked] == [1.0] * 4


def test_each_expert_has_its_own_scale_and_none_is_guessed():
    models = {"high_noise": Counted(), "low_noise": Counted()}
    sample(models, guidance={"high_noise": 1.0, "low_noise": 4.0, "dense": None})
    assert (len(models["high_noise"].asked), len(models["low_noise"].asked)) == (13, 14)
    for lacking in ({"high_noise": 3.0}, {"high_noise": 3.0, "low_noise": None}):
        with pytest.raises(ValueError, match="guidance lacks a scale for low_noise"):
            sample(models, guidance=lacking)


def test_sampling_keeps_no_gradients_and_starts_from_float32():
    weight = torch.ones((), requires_grad=True)
    latents, _ = sample({"dense": lambda x, timestep, text, condition: x * weight}, steps=2, boundary=None)
    assert latents.dtype == torch.float32 and not latents.requires_grad
    assert Settings(guidance={}, shift=3.0).solver == "unipc"
