"""Processes that make each video together, played by threads: their latents and frames are those of one process."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from peer_threads import Threads

from wantrain import checks
from wantrain.config import compose
from wantrain.geometry import Bucket
from wantrain.models import WanTransformer, WanVAE
from wantrain.models.offload import EXPERTS, OffloadPolicy
from wantrain.sampling import ExpertOffloader, Experts, Peers, Tiled, generate, memory
from wantrain.sampling.generate import Texts
from wantrain.sampling.solvers import schedule
from wantrain.video import read_mp4

ROOT = Path(__file__).resolve().parents[2]
#: A small video of the micro model.
SMALL = (
    *("height=32", "width=32", "num_frames=5", "steps=2"),
    *("model.transformer.num_layers=2", "model.transformer.ffn_dim=64", "model.transformer.attention_head_dim=32"),
)
SIZE = {"num_attention_heads": 4, "attention_head_dim": 8, "text_dim": 8, "text_length": 6, "ffn_dim": 32}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_machine(monkeypatch):
    """The threads count as processes of one machine, which share what waits on the host."""
    monkeypatch.setattr("wantrain.util.distributed.local_world_size", lambda: 12)


@pytest.fixture(scope="module")
def shelf():
    """The experts' weights. Threads share torch's random numbers, so they are drawn here."""
    found = {}
    for seed, name in enumerate(("high_noise", "low_noise")):
        torch.manual_seed(seed)
        model = WanTransformer(**SIZE, num_layers=3)
        found[name] = {key: value + 0.1 * torch.randn_like(value) for key, value in model.state_dict().items()}
    return found


def sampled(shelf, policy, peers):
    """Clean latents of two videos, both experts and both branches of the guidance."""

    def load(name, where):
        model = WanTransformer(**SIZE, num_layers=3)
        model.load_state_dict(shelf[name])
        return peers.split(model)

    experts = ExpertOffloader(shelf, load, CPU, policy, peers.node())
    random = torch.Generator().manual_seed(5)
    latents, *texts = (torch.randn(shape, generator=random) for shape in ((2, 16, 3, 6, 10), (2, 6, 8), (2, 6, 8)))
    return generate(
        Experts(experts, 0.875),
        latents=latents,
        texts=Texts(*texts),
        sigmas=schedule("unipc", 4, 3.0),
        guidance={"high_noise": 2.0, "low_noise": 1.0},
    )


@pytest.fixture(scope="module")
def alone(shelf):
    """One process's."""
    return sampled(shelf, OffloadPolicy(), Peers())


@pytest.mark.parametrize(
    ("size", "policy"),
    [
        *((2, OffloadPolicy(experts, blocks)) for experts, blocks in itertools.product(EXPERTS, (False, True))),
        (3, OffloadPolicy()),  # gathers keys and values
        (6, OffloadPolicy("cpu", blocks=True)),  # exchanges heads among two, thrice
    ],
    ids=str,
)
def test_latents(size, policy, alone, shelf):
    """All processes end with the same bits, within 1e-5 of one process, under every offload policy."""
    found = Threads(size, num_heads=4).each(lambda sequence: sampled(shelf, policy, Peers(sequence)))
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert (found[0] - alone).norm() <= 1e-5 * alone.norm()


@pytest.mark.parametrize(("size", "height", "width"), [(2, 8, 14), (3, 8, 8), (4, 5, 5), (4, 4, 9)])
def test_tiles(size, height, width):
    """Tiles shared out are assembled to the bits of one process; each decodes its part of them alone."""
    latents = torch.randn(1, 16, 2, height, width, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    vae = WanVAE(base_dim=4)
    counts = []

    def decoding(peers):
        calls = []
        tiled = Tiled(lambda part: (calls.append(0), vae.decode(part))[1], 4, peers)
        with torch.inference_mode():
            result = tiled(latents)
        counts.append(len(calls))
        return result

    whole = decoding(Peers())
    found = Threads(size, num_heads=4).each(lambda sequence: decoding(Peers(sequence)))
    assert all(torch.equal(whole, other) for other in found)
    assert {*counts[1:]} == {-(-counts[0] // size)}


def test_first_decides():
    """What is missing of a list is what the first process sees."""
    found = Threads(3, num_heads=4).each(lambda sequence: Peers(sequence).agreed([sequence.rank, 1, 255]))
    assert found == [[0, 1, 255]] * 3
    assert Peers().agreed([True, False]) == [1, 0] and Threads(2).each(lambda own: Peers(own).agreed([])) == [[], []]


def test_other_machines(monkeypatch):
    """Memory of the host is shared by processes of one machine only."""
    sequence = Threads(4).sequence(1)
    assert Peers(sequence).node().first is False and Peers().node() is None
    monkeypatch.setattr("wantrain.util.distributed.local_world_size", lambda: 6)
    assert Peers(sequence).node() is None


def test_memory_of_each():
    """The plan of one of four processes has its part of the step's memory, and the tiles of all."""
    wide = {**SIZE, "attention_head_dim": 64, "ffn_dim": 1024}

    def planned(processes, tile=None):
        call = memory.Call(Bucket(9, 256, 256), tile=tile, processes=processes)
        text = memory.describe(
            lambda: WanTransformer(**wide, num_layers=1), lambda: WanVAE(base_dim=4), call,
            names=["dense"], dtype=torch.float32, policy=OffloadPolicy(),
        )  # fmt: skip
        return text, *(float(re.search(rf"{what} ([\d.]+) MiB", text)[1]) for what in ("step", "decoding"))

    (_, step, tiled), (said, shared, tiles) = planned(1, 64), planned(4, 64)
    assert "1 at once, shared by 4 processes" in said and shared < 0.45 * step, "what lies outside the blocks stays"
    assert 0 < tiles - tiled <= 2 * 4 * (9 * 64 * 64 * 3 * 4) / 2**20 + 0.01


@pytest.mark.slow
def test_four_processes(pair, launch, call, tmp_path):
    """Two pairs of processes share a list: the same files as one process makes, in tiles too; a list resumes."""
    prompts = ["a red ring", "a cat", "一只猫"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    words = (f"weights={pair}", "prompts=prompts.txt", "tile=16", *SMALL)
    how = ("sequence_parallel=2", "offload.experts=cpu", "offload.blocks=true")
    sample = {"script": ROOT / "sample.py"}
    said = launch("ddp", *words, *how, processes=4, **sample).stdout
    call("sample.py", *words, "out=alone")
    made, wanted = ({path.name: path for path in (tmp_path / out).iterdir()} for out in ("samples", "alone"))
    assert made.keys() == wanted.keys() and len(list((tmp_path / "samples").glob("*.mp4"))) == 3
    assert said.count("wrote ") == 2, "the first pair's, by its first process alone"
    for name, path in wanted.items():
        if path.suffix == ".mp4":
            ours, theirs = (torch.tensor(read_mp4(each)).int() for each in (made[name], path))
            assert (ours - theirs).abs().max() <= 2, name
    lost = next((tmp_path / "samples").glob("001_*.json"))
    lost.unlink()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "samples").glob("*.mp4")}
    said = launch("ddp", *words, "sequence_parallel=2", processes=2, **sample).stdout
    changed = {path.name[:3] for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed == {"001"} and lost.is_file() and "2 of 3 videos are there already and are kept" in said


def test_bad_numbers():
    """As many processes as make whole groups; a dry run in one process plans for them."""
    cfg = compose("sample", ["sequence_parallel=4", "prompt=x"])
    for processes in (1, 6):
        with pytest.raises(ValueError, match=f"sequence_parallel=4 processes share a clip, and {processes} were"):
            checks.check(cfg, processes=processes)
    checks.check(cfg, processes=8)
    checks.check(compose("sample", ["sequence_parallel=4", "dry_run=true"]), processes=1)
