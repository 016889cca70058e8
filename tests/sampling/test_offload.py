"""Offload policies: outputs are the same under all of them, and only what the policy allows is on the device."""

import gc
import itertools
import weakref

import pytest
import torch

from wantrain.models import WanTransformer
from wantrain.models.facts import outside_blocks
from wantrain.models.offload import EXPERTS, OffloadPolicy
from wantrain.sampling.offload import ExpertOffloader

SIZE = {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 8, "ffn_dim": 32, "num_layers": 3}
POLICIES = [OffloadPolicy(experts, blocks) for experts, blocks in itertools.product(EXPERTS, (False, True))]
DEVICE = torch.device("cpu")  # copies are made to it as to any other: what is a copy is "on the device"


@pytest.fixture
def shelf(scrambled_experts):
    """Loads as from disk, and remembers every load."""
    loads = []

    def load(name, device):
        loads.append(name)
        model = WanTransformer(**SIZE).eval()
        model.load_state_dict(scrambled_experts[name].state_dict())
        return model.requires_grad_(False)

    return load, loads


@pytest.fixture(scope="module")
def scrambled_experts():
    """Two experts that answer something: a new model's head is zero."""
    experts = {}
    for seed, name in enumerate(("high_noise", "low_noise")):
        experts[name] = WanTransformer(**SIZE).eval()
        generator = torch.Generator().manual_seed(seed)
        for parameter in experts[name].parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return experts


def question(seed):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, 16, 2, 4, 4, generator=generator)
    return latents, torch.tensor([500.0]), torch.randn(1, 5, 8, generator=generator)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_policies_same_output(policy, shelf, scrambled_experts):
    load, loads = shelf
    experts = ExpertOffloader(scrambled_experts, load, DEVICE, policy)
    for turn, name in enumerate(["high_noise", "high_noise", "low_noise", "high_noise"]):
        with torch.no_grad():
            assert torch.equal(experts[name](*question(turn)), scrambled_experts[name](*question(turn)))
    wanted = ["high_noise", "low_noise"] + (["high_noise"] if policy.experts == "disk" else [])
    assert loads == wanted and list(experts) == ["high_noise", "low_noise"] and len(experts) == 2


def copies(module, hosts):
    """Names of parameters that are not where the host's copy lies."""
    return {name for name, p in module.named_parameters() if p.data_ptr() != hosts[name]}


def test_one_expert_on_the_device(shelf, scrambled_experts):
    load, _ = shelf
    experts = ExpertOffloader(scrambled_experts, load, DEVICE, OffloadPolicy("cpu"))
    modules = {name: experts._loaded[name] for name in experts}
    hosts = {name: {key: p.data_ptr() for key, p in module.named_parameters()} for name, module in modules.items()}
    everything = set(hosts["low_noise"])
    for name, other in (("high_noise", "low_noise"), ("low_noise", "high_noise")):
        with torch.no_grad():
            experts[name](*question(0))
        assert copies(modules[name], hosts[name]) == everything and copies(modules[other], hosts[other]) == set()
    experts.offload()
    assert copies(modules["low_noise"], hosts["low_noise"]) == set()


def test_one_block_on_the_device(shelf, scrambled_experts):
    load, _ = shelf
    experts = ExpertOffloader(scrambled_experts, load, DEVICE, OffloadPolicy("cpu", blocks=True))
    module = experts._loaded["low_noise"]
    hosts = {key: p.data_ptr() for key, p in module.named_parameters()}
    outside = {key for key in hosts if not key.startswith("blocks.")}
    assert len(outside) == len(outside_blocks(module)) > 5
    seen = []
    for number, block in enumerate(module.blocks):
        block.ffn.register_forward_hook(lambda *_, number=number: seen.append((number, copies(module, hosts))))
    with torch.no_grad():
        experts["low_noise"](*question(0))
    for number, there in seen:
        own = {key for key in hosts if key.startswith(f"blocks.{number}.")}
        assert there == outside | own
    last = {key for key in hosts if key.startswith("blocks.2.")}
    assert len(seen) == 3 and copies(module, hosts) == outside | last
    experts["high_noise"]
    assert copies(module, hosts) == set()


def test_disk_frees_before_it_loads(scrambled_experts):
    alive = []

    def load(name, device):
        gc.collect()
        assert not any(reference() for reference in alive), "the one before is still in memory"
        model = WanTransformer(**SIZE)
        alive.append(weakref.ref(model))
        return model

    experts = ExpertOffloader(scrambled_experts, load, DEVICE, OffloadPolicy("disk"))
    for name in ("high_noise", "low_noise", "high_noise"):
        experts[name]
    assert len(alive) == 3


def storages(module):
    return {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_arena(policy, shelf, scrambled_experts):
    load, _ = shelf
    module = ExpertOffloader(scrambled_experts, load, DEVICE, policy)["low_noise"]
    waits = {"cpu": module, "none": module.blocks if policy.blocks else None}.get(policy.experts)
    if waits is not None:
        assert len(storages(waits)) == 1 and storages(waits).isdisjoint(
            parameter.data_ptr() for parameter in outside_blocks(module) if policy.experts == "none"
        )
    else:
        assert len(storages(module)) == len(list(module.parameters())), "left as it was loaded"


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_offloaded_experts_are_freed_at_once(policy, shelf, scrambled_experts):
    """No cycle of references holds an expert until the collector comes by: 29 GB beside those of the next one."""
    load, _ = shelf
    experts = ExpertOffloader(scrambled_experts, load, DEVICE, policy)
    gc.disable()
    try:
        with torch.no_grad():
            experts["low_noise"](*question(0))
        module = weakref.ref(experts["low_noise"])
        weight = weakref.ref(experts["low_noise"].head.head.weight)
        experts.offload()
        del experts
        assert module() is None and weight() is None
    finally:
        gc.enable()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a GPU's memory; there is none")
def test_gpu_memory_as_planned(scrambled_experts, shelf):
    load, _ = shelf
    for blocks in (False, True):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        experts = ExpertOffloader(scrambled_experts, load, torch.device("cuda"), OffloadPolicy("disk", blocks))
        module = experts["low_noise"]
        held = torch.cuda.memory_allocated() - before
        kept = module.parameters() if not blocks else outside_blocks(module)
        wanted = sum(p.nbytes for p in kept)
        assert wanted <= held <= wanted + 512 * len(list(module.parameters()))
