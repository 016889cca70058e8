"""The memory plan: what is traced without values is what real tensors take, and the sums add up."""

import itertools
import re
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from wantrain.geometry import Bucket
from wantrain.models import WanTransformer, WanVAE, feed_forward, fused
from wantrain.models.offload import EXPERTS, OffloadPolicy
from wantrain.sampling import ExpertOffloader, memory
from wantrain.sampling.memory import cast_as_loaded
from wantrain.util import parts as loops

SIZE = {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 8, "ffn_dim": 64, "num_layers": 3}


def test_peak_bytes():
    """peak_bytes counts each storage once while it is alive."""

    def work():
        a = torch.ones(1000)  # 4000
        b = a.view(10, 100) + 1  # 8000
        del a
        c = b.double()  # 4000 + 8000
        c += 1
        return (c[0], c.T)

    assert memory.peak_bytes(work) == 12000


def test_trace_equals_real_tensors():
    """A trace on fake tensors gives the memory peak of real ones."""

    def peaks():
        torch.manual_seed(0)
        model, vae = WanTransformer(**SIZE).eval(), WanVAE(base_dim=4).eval()
        latents = torch.zeros(1, 16, 3, 8, 10)
        return memory.trace_step(model, latents), memory.trace_decoding(vae, latents, None)

    with FakeTensorMode():
        traced = peaks()
    for without, real in zip(traced, peaks(), strict=True):
        assert abs(without - real) <= 256 and real > 10_000  # a constant or two


def test_parts_left_out(monkeypatch):
    """A trace that leaves out parts of loops finds the peak of the whole loops."""
    monkeypatch.setattr(feed_forward, "PART", 50)  # of 60 tokens: one part, and one of 10
    monkeypatch.setattr(fused, "PIECE", 7 * 32)
    traced = []
    for shorten in (loops.shortened, lambda counts: nullcontext()):
        monkeypatch.setattr(memory, "shortened", shorten)
        with FakeTensorMode():
            traced.append(memory.trace_step(WanTransformer(**SIZE).eval(), torch.zeros(2, 16, 3, 8, 10)))
    assert traced[0] == traced[1] > 10_000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a GPU's memory; there is none")
def test_trace_matches_gpu():
    """On a GPU a step and a decoding take the traced memory within 25 %."""
    model, vae = WanTransformer(num_layers=2).cuda().bfloat16().eval(), WanVAE().cuda().eval()
    latents = torch.zeros(1, 16, 5, 30, 52, device="cuda")
    text = torch.zeros(1, 512, 4096, device="cuda")
    work = {
        memory.trace_step(model, latents): lambda: model(latents, torch.zeros(1, device="cuda"), text),
        memory.trace_decoding(vae, latents, None): lambda: vae.decode(latents),
    }
    for traced, run in work.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            run()
        taken = torch.cuda.max_memory_allocated() - before
        assert 0.8 < taken / traced < 1.25, (taken, traced)


def plan(expert=WanTransformer, vae=WanVAE, **more):
    call = {key: more.pop(key) for key in ("bucket", "tile", "processes") if key in more}
    how = {"names": ["high_noise", "low_noise"], "dtype": torch.bfloat16, "policy": OffloadPolicy()} | more
    return memory.describe(expert, vae, memory.Call(**{"bucket": Bucket(81, 480, 832)} | call), **how)


def gib(line):
    return [float(number) for number in re.findall(r"([\d.]+) GiB", line)]


def test_plan_14b_pair_on_24_gb():
    """At 81x480x832 the plan fits the published 14B pair on one 24 GB card; the printed parts add up."""
    text = plan(policy=OffloadPolicy("disk", blocks=True))
    lines = {line[:20].strip(): line[20:] for line in text.splitlines() if line[:20].strip()}
    assert "21 x 30 x 52 = 32760" in lines["tokens per video"]
    block, outside, whole = gib(lines["an expert"])
    # 14.29 billion parameters in bf16, the float32 parts with twice that
    assert 40 * block + outside == pytest.approx(whole, abs=0.25) and 26.6 < whole < 27.3
    vae, _, step, decoding, beside = [*gib(lines["beside them"])[:1], 0, *gib(lines["beside them"])[1:]]
    latents = 5 * float(re.search(r"5 x ([\d.]+) MiB", lines["beside them"])[1]) / 1024
    assert vae + latents + max(step, decoding) == pytest.approx(beside, abs=0.02)
    experts, _, cuda, device = gib(lines["device"])
    assert (experts + beside) * 1.1 + cuda == pytest.approx(device, abs=0.02)
    assert device < 24 and experts == pytest.approx(2 * block + outside, abs=0.02)
    choices = {tuple(line.split()[:2]): line for line in text.splitlines()[-6:]}
    assert gib(choices["disk", "true"])[0] == device and "80 GB card" in choices["none", "false"]
    assert gib(choices["cpu", "false"])[1] == pytest.approx(2 * whole, abs=0.02)


@pytest.mark.parametrize(("experts", "blocks"), itertools.product(EXPERTS, (False, True)))
def test_host_bytes(experts, blocks):
    """Arenas are as large as planned; there are none where weights are on the device or on disk."""
    policy = OffloadPolicy(experts, blocks)

    def load(name, device):
        return cast_as_loaded(WanTransformer(**SIZE), torch.bfloat16)

    offloaded = ExpertOffloader(("high_noise", "low_noise"), load, torch.device("cpu"), policy)
    modules = {name: offloaded[name] for name in offloaded}
    storages = [parameter.untyped_storage() for module in modules.values() for parameter in module.parameters()]
    counts = Counter(storage.data_ptr() for storage in storages)
    arenas = {storage.data_ptr(): storage.nbytes() for storage in storages if counts[storage.data_ptr()] > 1}
    assert len(arenas) == (2 if experts == "cpu" or (experts, blocks) == ("none", True) else 0)
    assert memory.needs(modules, 0, policy).host == sum(arenas.values())


def test_memory_by_tile_and_size():
    """Decoding memory falls with the tile size, and a step's memory grows with the pixels."""
    small = {"expert": lambda: WanTransformer(**SIZE), "vae": lambda: WanVAE(base_dim=4), "bucket": Bucket(9, 480, 832)}

    def parts(**more):
        line = plan(**(small | more)).splitlines()[3]
        return [float(re.search(rf"{what} ([\d.]+) [MG]iB", line)[1]) for what in ("step", "decoding")], line

    (step, decoding), line = parts()
    (_, tiled), said = parts(tile=256)
    assert "in tiles of 256 pixels" in said and "tiles" not in line
    assert tiled / decoding == pytest.approx(256 * 256 / (480 * 832), rel=0.05)
    (larger, _), _ = parts(bucket=Bucket(9, 720, 1280))
    assert larger / step == pytest.approx(720 * 1280 / (480 * 832), rel=0.02), "a step's memory grows with its tokens"
