"""Solvers against diffusers on the same sigmas and against an exact solution; the expert switch; guidance."""

import itertools
import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from wantrain import flow
from wantrain.models.formats.pipeline import _scheduler
from wantrain.sampling.generate import Experts, Settings, Texts, generate
from wantrain.sampling.solvers import UniPC, schedule, solver_named

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


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "final_sigmas_type": "zero"}
PEERS = {
    "unipc": lambda: UniPCMultistepScheduler.from_config(_scheduler(1.0)),
    "dpm++": lambda: DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_type="midpoint", **FLOW),
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=1.0),
}
TOLERANCE = 1e-5  # of the largest latent; two float32 trajectories of up to 50 steps


def peer_over(name, sigmas):
    """diffusers' scheduler, made to walk exactly these sigmas and to show the model exactly our timesteps."""
    peer = PEERS[name]()
    if name == "euler":
        peer.set_timesteps(sigmas=sigmas[:-1].tolist())
    else:
        peer.set_timesteps(len(sigmas) - 1)
    assert len(peer.sigmas) == len(sigmas) and peer.sigmas[-1] == 0
    peer.sigmas, peer.timesteps = sigmas.float(), flow.sampling_timesteps(sigmas).float()
    peer.set_begin_index(0)  # timesteps may repeat near 1,000, where looking one up would find another's step
    return peer


def far(ours, theirs):
    assert theirs.std() > 0.1
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 20, 30, 40, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0, 12.0])
def test_solvers_match_diffusers(name, steps, shift):
    sigmas = schedule(name, steps, shift)
    peer, theirs = peer_over(name, sigmas), noise()
    for timestep, sigma in zip(peer.timesteps, sigmas.tolist(), strict=False):
        theirs = peer.step(bent(theirs, sigma), timestep, theirs).prev_sample
    assert far(walk(solver_named(name, sigmas), noise(), sigmas), theirs) < TOLERANCE


@pytest.mark.parametrize("steps", [20, 40])
def test_unipc_over_diffusers_sigmas(steps):
    """UniPC agrees with diffusers over the sigmas of diffusers' own schedule."""
    peer = UniPCMultistepScheduler.from_config(_scheduler(3.0))
    peer.set_timesteps(steps)
    theirs = noise()
    for timestep, sigma in zip(peer.timesteps, peer.sigmas.tolist(), strict=False):
        theirs = peer.step(bent(theirs, sigma), timestep, theirs).prev_sample
    assert far(walk(UniPC(peer.sigmas), noise(), peer.sigmas), theirs) < TOLERANCE


def two_experts():
    """A pair that answer quite differently, and lean on the text."""
    return {
        "high_noise": lambda x, timestep, text: bent(x, timestep[0].item() / 1000) + 0.3 * text.mean(),
        "low_noise": lambda x, timestep, text: 0.5 * torch.cos(2 * x) - 0.2 * x.flip(2) - 0.4 * text.mean() * x,
    }


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize(("shift", "boundary", "scales"), [(12.0, 0.875, (4.0, 3.0)), (5.0, 0.9, (3.5, 3.5)),
                                                           (3.0, 0.875, (1.0, 4.0)), (8.0, 0.9, (4.0, 1.0))])  # fmt: skip
@pytest.mark.parametrize("steps", [20, 30, 40, 50])
def test_trajectory_matches_diffusers(name, shift, boundary, scales, steps):
    """A whole trajectory with both experts and guidance agrees with diffusers' schedulers.

    Switch, guidance and the solver's history across the switch are written out here as a pipeline does it.
    """
    models, sigmas = two_experts(), schedule(name, steps, shift)
    guidance = dict(zip(models, scales, strict=True))
    prompt, negative = torch.ones(2, 3, 4), torch.full((2, 3, 4), -0.5)
    peer, theirs, their_switch = peer_over(name, sigmas), noise(), 0
    for timestep in peer.timesteps:
        expert = "high_noise" if timestep >= 1000 * boundary else "low_noise"
        their_switch += expert == "high_noise"
        level = timestep.float().expand(2)
        away, towards = (models[expert](theirs, level, text) for text in (negative, prompt))
        guided = away + guidance[expert] * (towards - away) if guidance[expert] != 1 else towards
        theirs = peer.step(guided, timestep, theirs).prev_sample
    asked = []
    ours = generate(
        Experts(models, boundary),
        latents=noise(),
        texts=Texts(prompt, negative),
        sigmas=sigmas,
        guidance=guidance,
        solver=name,
        on_step=lambda i, expert: asked.append(expert),
    )
    assert far(ours, theirs) < TOLERANCE
    assert 0 < their_switch < steps
    assert asked == ["high_noise"] * their_switch + ["low_noise"] * (steps - their_switch)


def test_steps_per_expert():
    """The experts share 40 steps as published: 26 and 14 for Wan2.2's text-to-video, 15 and 25 for image-to-video."""
    for name in ("unipc", "euler"):
        for shift, boundary, high in ((12.0, 0.875, 26), (5.0, 0.9, 15)):
            assert (flow.sampling_timesteps(schedule(name, 40, shift)) >= 1000 * boundary).sum() == high


def test_dpm_solver_starts_at_pure_noise():
    """The DPM

    schedule starts at pure noise, as the authors' does; UniPC's does not.
    """
    sigmas = schedule("dpm++", 40, 12.0)
    even = 1 - torch.arange(40, dtype=torch.float64) / 40
    assert torch.allclose(sigmas[:-1], 12 * even / (1 + 11 * even), atol=1e-12) and sigmas[-1] == 0
    assert flow.sampling_timesteps(sigmas)[:3].tolist() == [1000, 997, 995]
    assert flow.sampling_timesteps(schedule("unipc", 40, 12.0))[:3].tolist() == [999, 997, 995]


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("dpm++", 2), ("unipc", 2)])
def test_convergence_order(name, order):
    """The error falls with the order of the solver.

    For normal data of mean m and spread s the velocity and its path are exact.
    """
    mean, spread, start, end = 0.7, 0.1, 0.95, 0.1

    def scale(sigma):
        return math.sqrt((1 - sigma) ** 2 * spread**2 + sigma**2)

    def velocity(x, sigma):
        pull = ((1 - sigma) * spread**2) / scale(sigma) ** 2
        data = mean + pull * (x - (1 - sigma) * mean)
        return (x - data) / sigma

    z, errors = noise().double(), []
    exact = (1 - end) * mean + scale(end) * z
    logits = torch.logit(torch.tensor([start, end], dtype=torch.float64)).tolist()
    for steps in (20, 40, 80, 160):
        sigmas = torch.sigmoid(torch.linspace(*logits, steps + 1, dtype=torch.float64))  # even in the solvers' own time
        begin = (1 - start) * mean + scale(start) * z
        solver = solver_named(name, sigmas)
        errors.append((walk(solver, begin, sigmas, velocity) - exact).abs().max().item())
    measured = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert all(abs(found - order) < 0.1 for found in measured), measured


def test_unknown_solver():
    with pytest.raises(ValueError, match="solver='heun' is unknown; choose one of unipc, dpm\\+\\+, euler"):
        solver_named("heun", torch.tensor([1.0, 0.0]))


class Counted:
    """A model that remembers what it was asked."""

    def __init__(self, value=0.0):
        self.value, self.asked = value, []

    def __call__(self, x, timestep, text):
        self.asked.append((timestep.tolist(), text.mean().item()))
        return torch.full_like(x, self.value + text.mean().item())


def sample(models, *, steps=20, shift=12.0, guidance=3.0, boundary=0.875, **more):
    trace = []
    settings = {
        "texts": Texts(torch.ones(2, 3, 4), torch.zeros(2, 3, 4)),
        "sigmas": flow.sampling_sigmas(steps, shift),
        "guidance": dict.fromkeys(models, guidance) if isinstance(guidance, float) else guidance,
        **more,
    }
    latents = generate(
        Experts(models, boundary), latents=noise(), on_step=lambda i, name: trace.append((i, name)), **settings
    )
    return latents, trace


def test_expert_switch_step():
    """In Wan's own schedule of 20 steps the expert switch comes after 13 steps."""
    models = {"high_noise": Counted(), "low_noise": Counted()}
    _, trace = sample(models)
    assert trace == [(i, "high_noise" if i < 13 else "low_noise") for i in range(20)]
    timesteps = flow.sampling_timesteps(flow.sampling_sigmas(20, 12.0)).tolist()
    for name, part in (("high_noise", timesteps[:13]), ("low_noise", timesteps[13:])):
        # Twice per step: with the prompt, and with the negative prompt, at the same integer timestep.
        assert models[name].asked == [(2 * [float(t)], text) for t in part for text in (1.0, 0.0)]


def test_boundary_tie():
    """A timestep at the boundary belongs to the high-noise expert; an expert alone answers all timesteps."""
    experts = Experts({"high_noise": Counted(), "low_noise": Counted()}, 0.875)
    assert [experts.name_at(timestep) for timestep in (999, 876, 875, 874, 0)] == 3 * ["high_noise"] + 2 * ["low_noise"]
    assert Experts({"low_noise": Counted()}, 0.875).name_at(999) == "low_noise", "alone, it answers for everything"


def test_guidance_formula():
    """Guidance moves away from the negative prompt; scale 1 calls the model once per step."""
    guided, plain = Counted(), Counted()
    latents, _ = sample({"dense": guided}, steps=1, shift=1.0, guidance=3.0, boundary=None, solver="euler")
    # The answers are 1 with the prompt and 0 with the negative one: 0 + 3 * (1 - 0) = 3.
    sigma = flow.sampling_sigmas(1, 1.0)[0].item()
    assert torch.allclose(latents, noise() - sigma * 3.0, atol=1e-6)
    assert len(guided.asked) == 2
    sample({"dense": plain}, steps=4, guidance=1.0, boundary=None)
    assert [text for _, text in plain.asked] == [1.0] * 4


def test_guidance_scale_per_expert():
    """Each expert has its own guidance scale, and a missing scale is an error."""
    models = {"high_noise": Counted(), "low_noise": Counted()}
    sample(models, guidance={"high_noise": 1.0, "low_noise": 4.0, "dense": None})
    assert (len(models["high_noise"].asked), len(models["low_noise"].asked)) == (13, 14)
    for lacking in ({"high_noise": 3.0}, {"high_noise": 3.0, "low_noise": None}):
        with pytest.raises(ValueError, match="guidance lacks a scale for low_noise"):
            sample(models, guidance=lacking)


def test_sampling_without_gradients():
    """Sampling keeps no gradients, and its latents are float32."""
    weight = torch.ones((), requires_grad=True)
    latents, _ = sample({"dense": lambda x, timestep, text: x * weight}, steps=2, boundary=None)
    assert latents.dtype == torch.float32 and not latents.requires_grad
    assert Settings(guidance={}, shift=3.0).solver == "unipc"
