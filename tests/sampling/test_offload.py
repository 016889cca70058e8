"""Where experts live: whatever is chosen, the answers are the same, and only what may be on the device is there."""

import gc
import itertools
import weakref

import pytest
import torch

from wantrain.models import WanTransformer
from wantrain.models.offload import outside_blocks
from wantrain.sampling.offload import IDLE, OFFLOAD, ExpertOffloader

SIZE = {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 8, "ffn_dim": 32, "num_layers": 3}
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


@pytest.mark.parametrize(("idle", "offload"), itertools.product(IDLE, OFFLOAD))
def test_every_way_of_living_answers_alike(idle, offload, shelf, scrambled_experts):
    load, loads = shelf
    experts = ExpertOffloader(scrambled_experts, load, DEVICE, idle=idle, offload=offload)
    for turn, name in enumerate(["high_noise", "high_noise", "low_noise", "high_noise"]):
        with torch.no_grad():
            assert torch.equal(experts[name](*question(turn)), scrambled_experts[name](*question(turn)))
    wanted = ["high_noise", "low_noise"] + (["high_noise"] if idle == "disk" else [])
    assert loads == wanted and list(experts) == ["high_noise", "low_noise"] and len(experts) == 2


def copies(module, hosts):
    """Names of parameters that are not where the host's copy lies."""
    return {name for name, p in module.named_parameters() if p.data_ptr() != hosts[name]}


def test_only_the_expert_that_answers_is_on_the_device(shelf, scrambled_experts):
    load, _ = shelf
    experts = ExpertOffloader(scrambled_experts, load, DEVICE, idle="cpu")
    modules = {name: experts._loaded[name] for name in experts}
    hosts = {name: {key: p.data_ptr() for key, p in module.named_parameters()} for name, module in modules.items()}
    everything = set(hosts["low_noise"])
    for name, other in (("high_noise", "low_noise"), ("low_noise", "high_noise")):
        with torch.no_grad():
            experts[name](*question(0))
        assert copies(modules[name], hosts[name]) == everything and copies(modules[other], hosts[other]) == set()
    experts.leave()
    assert copies(modules["low_noise"], hosts["low_noise"]) == set()


def test_one_block_at_a_time_is_on_the_device(shelf, scrambled_experts):
    load, _ = shelf
    experts = ExpertOffloader(scrambled_experts, load, DEVICE, idle="cpu", offload="blocks")
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
    assert len(seen) == 3 and copies(module, hosts) == outside
    experts["high_noise"]
    assert copies(module, hosts) == set()


def test_an_expert_on_disk_is_let_go_before_the_next_is_loaded(scrambled_experts):
    alive = []

    def load(name, device):
        gc.collect()
        assert not any(reference() for reference in alive), "the one before is still in memory"
        model = WanTransformer(**SIZE)
        alive.append(weakref.ref(model))
        return model

    experts = ExpertOffloader(scrambled_experts, load, DEVICE, idle="disk")
    for name in ("high_noise", "low_noise", "high_noise"):
        experts[name]
    assert len(alive) == 3


def storages(module):
    return {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}


@pytest.mark.parametrize(("idle", "offload"), itertools.product(IDLE, OFFLOAD))
def test_what_waits_on_the_host_for_good_lies_in_an_arena(idle, offload, shelf, scrambled_experts):
    load, _ = shelf
    module = ExpertOffloader(scrambled_experts, load, DEVICE, idle=idle, offload=offload)["low_noise"]
    waits = {"cpu": module, "gpu": module.blocks if offload == "blocks" else None}.get(idle)
    if waits is not None:
        assert len(storages(waits)) == 1 and storages(waits).isdisjoint(
            parameter.data_ptr() for parameter in outside_blocks(module) if idle == "gpu"
        )
    else:
        assert len(storages(module)) == len(list(module.parameters())), "left as it was loaded"


@pytest.mark.parametrize(("idle", "offload"), itertools.product(IDLE, OFFLOAD))
def test_a_house_that_is_left_is_let_go_at_once(idle, offload, shelf, scrambled_experts):
    """No cycle of references holds an expert until the collector comes by: 29 GB beside those of the next one."""
    load, _ = shelf
    experts = ExpertOffloader(scrambled_experts, load, DEVICE, idle=idle, offload=offload)
    gc.disable()
    try:
        with torch.no_grad():
            experts["low_noise"](*question(0))
        module = weakref.ref(experts["low_noise"])
        weight = weakref.ref(experts["low_noise"].head.head.weight)
        experts.leave()
        del experts
        assert module() is None and weight() is None
    finally:
        gc.enable()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a GPU's memory; there is none")
def test_on_a_gpu_memory_is_what_the_plan_says(scrambled_experts, shelf):
    load, _ = shelf
    for offload in OFFLOAD:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        experts = ExpertOffloader(scrambled_experts, load, torch.device("cuda"), idle="disk", offload=offload)
        module = experts["low_noise"]
        held = torch.cuda.memory_allocated() - before
        kept = module.parameters() if offload == "none" else outside_blocks(module)
        wanted = sum(p.nbytes for p in kept)
        assert wanted <= held <= wanted + 512 * len(list(module.parameters()))
