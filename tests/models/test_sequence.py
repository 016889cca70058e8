"""Tokens shared out over processes: values and gradients are those of one, with threads in the place of processes."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peer_threads import Threads
from safetensors.torch import load_file
from torch import nn

from wantrain import checks
from wantrain.config import compose
from wantrain.models import WanTransformer, adapters
from wantrain.models.activation_policy import ActivationPolicy
from wantrain.models.offload import ModuleOffloader, blocks_to_swap
from wantrain.models.sequence import Group, SequenceParallel

SIZE = {"num_attention_heads": 12, "attention_head_dim": 8, "text_dim": 8, "text_length": 6, "ffn_dim": 32}


def network(**more):
    """A small transformer with no zeros to hide behind."""
    torch.manual_seed(0)
    model = WanTransformer(**SIZE, num_layers=2, **more)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def inputs(batch, frames, height, width, *, per_frame=False, concat=0, rows=4):
    """Latents, timestep, text and further channels."""
    random = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 16, frames, height, width, generator=random)
    timestep = 1000 * torch.rand((batch, frames) if per_frame else (batch,), generator=random)
    text = torch.randn(batch, rows, 8, generator=random)
    more = torch.randn(batch, concat, frames, height, width, generator=random) if concat else None
    return (latents, timestep, text), ({} if more is None else {"concat_BCTHW": more})


def step(model, given):
    """The velocity, and the gradient of a loss of it."""
    args, keywords = given
    velocity = model(*args, **keywords)
    (velocity - args[0]).square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return velocity.detach(), grads


def compare(model, given, size, *, bound=1e-5):
    """Every process returns what one process does, and the mean of their gradients is its gradient."""
    whole, wanted = step(copy.deepcopy(model), given)
    found = Threads(size).run(model, lambda own, rank: step(own, given))
    for velocity, _ in found:
        assert (velocity - whole).norm() <= bound * whole.norm()
    for name, grad in wanted.items():
        mean = torch.stack([grads[name] for _, grads in found]).mean(dim=0)
        assert (mean - grad).norm() <= bound * grad.norm() + 1e-9, name


#: Inputs and what the network has of its own, by name.
CASES = {
    "even": ({"batch": 1, "frames": 3, "height": 8, "width": 6}, {}),
    "odd": ({"batch": 2, "frames": 3, "height": 6, "width": 10, "rows": 6}, {}),  # 15 tokens a frame, texts not padded
    "concat": (
        {"batch": 2, "frames": 2, "height": 2, "width": 6, "concat": 4},
        {"in_channels": 20},
    ),  # 3: one of 4 has none
    "frames": ({"batch": 2, "frames": 5, "height": 2, "width": 2, "per_frame": True}, {}),  # 1 token a frame
}


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])  # 12 heads: of 5 none are exchanged, of 8 among fours
@pytest.mark.parametrize(("given", "more"), CASES.values(), ids=CASES)
def test_matches_one_process(size, given, more):
    """Odd numbers of tokens, two clips, further channels and a timestep for each frame."""
    compare(network(**more), inputs(**given), size)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_processes(size, environment, tmp_path):
    """The same in processes, over gloo: velocities and gradients of every case are those of one process."""
    script, file = Path(__file__).parents[1] / "support" / "token_processes.py", tmp_path / "found.safetensors"
    words = [[sys.executable, script, file, str(rank), str(size)] for rank in range(size)]
    started = [subprocess.Popen(own, env=environment) for own in words]
    assert [process.wait(timeout=200) for process in started] == [0] * size
    found = load_file(file)
    for name, (given, more) in CASES.items():
        velocity, grads = step(network(**more), inputs(**given))
        for key, wanted in {"velocity": velocity, **grads}.items():
            assert (found.pop(f"{name}/{key}") - wanted).norm() <= 1e-5 * wanted.norm() + 1e-9, (name, key)
    assert not found


@pytest.mark.parametrize("recompute", ["block", "attention", 1])
def test_recomputed(recompute):
    """A recomputed block exchanges again, and keeps no more than its part of the tokens."""
    model = network()
    model.run_block = ActivationPolicy(recompute, blocks=2)
    compare(model, inputs(2, 3, 6, 10), 2)


def test_lora():
    """The gradients of an adapter beside frozen weights, with bf16 inside the blocks and two batches of other sizes
    before their backward.
    """
    model = network()
    adapters.inject(model, adapters.AdapterSettings(rank=2, alpha=2, targets="attention+ffn"), seed=0)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            parameter.data.normal_(std=0.1)
    model.run_block = ActivationPolicy("block", blocks=2)
    small, large = inputs(1, 2, 2, 6), inputs(1, 3, 6, 10)

    def both(own, rank=0):
        with torch.autocast("cpu", torch.bfloat16):
            losses = [(own(*args) - args[0]).square().mean() for args, _ in (small, large)]
        sum(losses).backward()
        return {name: p.grad for name, p in own.named_parameters() if p.requires_grad}

    wanted = both(copy.deepcopy(model))
    found = Threads(2).run(model, both)
    for name, grad in wanted.items():
        mean = torch.stack([grads[name] for grads in found]).mean(dim=0)
        assert grad.any() and (mean - grad).norm() <= 2e-2 * grad.norm(), name  # a rounding of bf16 is 4e-3


def test_bad_settings():
    """Numbers of processes and networks that cannot share tokens are refused before a start."""
    for words, processes, message in (
        ([], 3, "sequence_parallel=2 processes share a clip, and 3 were started; start 2 or 4"),
        ([], 1, "and 1 were started; start 2, or give sequence_parallel=1"),
        (
            ["batch_size=3"],
            4,
            r"batch_size=3 must divide by processes / sequence_parallel = 4 / 2; the nearest are 2 and 4",
        ),
    ):
        cfg = compose("train", ["sequence_parallel=2", *words])
        with pytest.raises(ValueError, match=message):
            checks.check(cfg, processes=processes)
    checks.check(compose("train", ["sequence_parallel=2"]), processes=4)
    checks.check(compose("train", ["sequence_parallel=3", "batch_size=3"]), processes=9)  # of 4 heads
    checks.check(compose("train", ["sequence_parallel=2", "dry_run=true"]), processes=1)
    with pytest.raises(ValueError, match="Linear does not say where its tokens may be split"):
        SequenceParallel(0, Group(2, lambda x: x)).split(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="sequence_parallel has no effect: expert=vae trains no transformer"):
        checks.check(
            compose("train", ["recipe=wan_tiny_vae", "sequence_parallel=2"]), given=["sequence_parallel"], processes=2
        )


def test_inputs_and_weights_on_host():
    """The inputs of recomputed blocks on the host, and frozen weights that come block by block."""
    torch.manual_seed(0)
    model = WanTransformer(**SIZE, num_layers=4)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    adapters.inject(model, adapters.AdapterSettings(rank=2, alpha=2, targets="attention+ffn"), seed=0)
    given = inputs(2, 3, 6, 10)
    _, wanted = step(copy.deepcopy(model), given)
    model.run_block = ActivationPolicy("block", blocks=4, activations="cpu")

    def on_host(own, rank):
        ModuleOffloader(torch.device("cpu")).add(own, whole=False, blocks=blocks_to_swap(own, 3))
        return step(own, given)[1]

    found = Threads(2).run(model, on_host)
    for name, grad in wanted.items():
        mean = torch.stack([grads[name] for grads in found]).mean(dim=0)
        assert (mean - grad).norm() <= 1e-5 * grad.norm() + 1e-9, name


def kept(model, given):
    """Bytes that a forward keeps for its backward, parameters and the network's inputs apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    own |= {tensor.untyped_storage().data_ptr() for tensor in (*given[0], *given[1].values())}
    found = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(*given[0], **given[1])
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_kept_activations(recompute):
    """A block of one of four processes keeps a quarter of what it keeps alone, a recomputed one too."""
    given, each = inputs(1, 3, 16, 16), {}
    for blocks in (1, 3):
        torch.manual_seed(0)
        model = WanTransformer(**SIZE, num_layers=blocks)
        model.run_block = ActivationPolicy(recompute, blocks=blocks)
        each[blocks] = kept(model, given), max(Threads(4).run(model, lambda own, rank: kept(own, given)))
    alone, shared = (large - small for small, large in zip(each[1], each[3], strict=True))
    assert 0.24 * alone <= shared <= 0.30 * alone  # the text's keys and values are whole in each
