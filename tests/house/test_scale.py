"""benchmarks/scale.py: docs/scale.md is what its results say, they come out again, and what must be true of any run is."""

import json
import os
import re
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from wantrain import geometry
from wantrain.data import PackSampler
from wantrain.util.cards import find_card

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "scale.md"


@pytest.fixture(scope="module")
def parts():
    """The benchmark's modules; scripts of that folder import each other by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        names = ("assumptions", "charts", "cluster", "failures", "order", "page", "storage")
        yield SimpleNamespace(
            main=import_module("scale"), **{name: import_module(f"scale_parts.{name}") for name in names}
        )


@pytest.fixture(scope="module")
def results():
    return json.loads((ROOT / "benchmarks" / "scale.json").read_text(encoding="utf-8"))


def small(parts, **values):
    """Assumptions of a small cluster."""
    defaults = {"processes": 64, "clips": 200_000, "pass_tokens": 8192, "steps_seen": 300}
    return parts.assumptions.Assumptions(**{**defaults, **values})


def near(found, stored, where="", tolerance=0.05):
    """Equal but for measured times, and for so much of a number; the best interval for a point of its grid."""
    if isinstance(stored, dict):
        assert found.keys() == stored.keys(), where
        for key in stored.keys() - {"measured"}:
            near(found[key], stored[key], f"{where}/{key}", max(tolerance, 0.2 * (key in {"best", "flat"})))
    elif isinstance(stored, list):
        assert len(found) == len(stored), where
        for number, pair in enumerate(zip(found, stored, strict=True)):
            near(*pair, f"{where}/{number}", tolerance)
    elif isinstance(stored, str | bool) or stored is None:
        assert found == stored, where
    else:
        assert found == pytest.approx(stored, rel=tolerance, abs=1e-3 if isinstance(stored, float) else 1), where


def test_page_of_results(parts, results, tmp_path):
    """The page and the words in its pictures are those of the results; WANTRAIN_WRITE_DOCS=1 writes them."""
    if os.environ.get("WANTRAIN_WRITE_DOCS"):
        PAGE.write_text(parts.page.page(results), encoding="utf-8")
        parts.charts.draw(results, PAGE.parent / "images")
    text = PAGE.read_text(encoding="utf-8")
    assert text == parts.page.page(results)
    parts.charts.draw(results, tmp_path)
    for name in parts.charts.NAMES:
        drawn, stored = (
            re.findall(r"<text[^>]*>([^<]*)</text>", (folder / name).read_text(encoding="utf-8"))
            for folder in (tmp_path, PAGE.parent / "images")
        )
        assert drawn == stored and len(stored) > 10 and f"images/{name}" in text


def test_page_of_another_cluster(parts, results):
    """The report of given assumptions has the one command that makes it."""
    text = parts.page.page(results, words=["clips=1e7"])
    (block,) = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    assert block == "python benchmarks/scale.py clips=1e7\n" and "It writes this page" in text


def test_failures_again(parts, results):
    """Checkpoints and Monte Carlo, from the planner's figures in the results, come out as stored."""
    taken = parts.assumptions.Assumptions(**results["assumptions"])
    step = parts.cluster.Step(**results["costs"][0]["largest"])
    found = parts.failures.failures(taken, results["failures"]["parts"], find_card(taken.card), step)
    near(json.loads(json.dumps(found)), results["failures"], tolerance=1e-6)


@pytest.mark.slow
def test_simulation_again(parts, results):
    """Everything comes out as stored, from the samplers of all clips to the planner's seconds."""
    near(parts.main.simulate(parts.assumptions.Assumptions(), said=lambda _: None), results)


def walked(running, steps, step, save):
    """Steps that outlive a failure, by going through the time one step after another."""
    now, done, kept, writing = 0.0, 0, 0, None  # writing: (steps in it, when it is visible)
    while now <= running:
        slow = writing is not None and writing[2]
        now += step + (save.cost - save.pause if slow else 0.0)
        if writing is not None:
            writing = (writing[0], writing[1], False)  # all that a save slows is counted on the first step after it
        done += 1
        if done % steps == 0:
            if writing is not None:
                now = max(now, writing[1])
                kept = writing[0] if writing[1] <= running else kept
            now += save.pause
            writing = (done, now + save.behind, True)
        if writing is not None and writing[1] <= min(now, running):
            kept = writing[0]
    return writing[0] if writing is not None and writing[1] <= running else kept


@pytest.mark.parametrize(
    ("pause", "behind", "slower"), [(0.5, 0.0, 0.0), (0.2, 7.0, 0.3), (1.0, 300.0, 4.0), (20.0, 0.0, 0.0)]
)
def test_kept_steps(parts, pause, behind, slower):
    """What a failure leaves is what one finds who walks through the run: also where a save waits for the one before."""
    save, chance = parts.failures.Save(pause, behind, pause + slower), np.random.default_rng(0)
    for steps in (1, 7, 50):
        running = chance.exponential(3000, size=60)
        found = parts.failures.kept_steps(running, steps, 12.0, save)
        assert found.tolist() == [walked(time, steps, 12.0, save) for time in running]


def test_equations_within_the_best(parts, results):
    """Young's and Daly's intervals are as good as the best of the simulation, and never is more kept than run."""
    for name, curve in results["failures"]["curves"].items():
        assert curve["at_best"] - curve["at_daly"] <= parts.failures.FLAT, name
        assert curve["flat"][0] <= curve["best"] <= curve["flat"][1]
        assert curve["flat"][0] * 0.9 <= curve["young"] <= curve["flat"][1] * 1.1
        assert max(curve["goodput"]) < 1 and curve["error"] < 0.005
    kinds = results["failures"]["curves"]
    assert kinds["rare, background"]["at_best"] > kinds["frequent, background"]["at_best"]
    assert kinds["frequent, background"]["at_best"] > kinds["frequent, waiting"]["at_best"]


def test_every_clip_once(parts):
    """Over 1,024 processes every clip comes once in an epoch, where each bucket fills its batches; else no more than one
    step of each bucket moves to the next epoch.
    """
    full = np.repeat(np.arange(3, dtype=np.uint8), [9 * 1024, 2 * 1024, 1024])
    assert (parts.order.clips_seen(full, processes=1024, seed=0) == 1).all()
    mixed = parts.order.bucket_numbers(30_000)
    counts = parts.order.clips_seen(mixed, processes=1024, seed=0)
    assert counts.max() <= 2 and (counts == 0).sum() <= 1024 * len(parts.order.MIX)


def test_order_of_all(parts):
    """Steps anywhere in an epoch have no sample in common, each is of one bucket, and half the processes see the same."""
    found = parts.order.whole_order(small(parts))
    assert found["distinct"] == found["samples_seen"] == 300 * 64
    assert found["one_bucket_in_each_step"] and found["same_on_half_the_processes"]
    assert found["steps_per_epoch"] == -(-200_000 // 64)
    assert sum(found["shares"].values()) == pytest.approx(1)


def test_packs_on_half_the_processes(parts):
    """Packs of a step are those of half as many processes in two passes each, from any step on; none is too large."""
    taken = small(parts, clips=5000)
    buckets, names = parts.order.bucket_numbers(taken.clips), list(parts.order.MIX)
    tokens = {number: parts.cluster.tokens_of(bucket) for number, bucket in enumerate(names)}
    plans = [PackSampler(buckets, tokens, budget=taken.pass_tokens, passes=64, seed=0) for _ in range(2)]
    assert plans[0].steps_for_epochs(1) == plans[1].steps_for_epochs(1)
    for step in (0, 7):
        whole = [plans[0].pack(step, 0, rank, 64) for rank in range(64)]
        half = [plans[1].pack(step, micro, rank, 32) for micro in range(2) for rank in range(32)]
        for one, other in zip(whole, half, strict=True):
            assert [samples.tolist() for samples, _ in one.groups] == [samples.tolist() for samples, _ in other.groups]
            assert (
                sum(len(samples) * tokens[int(buckets[samples[0]])] for samples, _ in one.groups) <= taken.pass_tokens
            )


def test_balance(results):
    """Buckets give all cards equal work; packs keep the busiest near the mean, and no card has more than its pass."""
    sides = results["balance"]["sides"]
    assert all(side["busiest"] == 1.0 for name, side in sides.items() if name != "packs")
    assert 1.0 <= sides["packs"]["busiest"] < 1.05 and sides["packs"]["fill"] > 0.97
    assert all(side["most"] <= results["assumptions"]["pass_tokens"] for side in sides.values())
    assert all(step["fits"] for step in [*results["balance"]["steps"].values(), *results["costs"]])


def test_cache_at_work(parts, monkeypatch):
    """The cache never holds more than its size, and fetches as often as one that forgets what was read longest ago."""
    monkeypatch.setattr(parts.storage, "READS", 200)
    monkeypatch.setattr(parts.storage, "HELD", (0.5,))
    for row in parts.storage.cache_at_work(small(parts)):
        assert row["on_disk"] <= 1.0
        assert row["amplification"] == pytest.approx(row["expected"], rel=0.3)


def test_bytes(parts, results, tmp_path):
    """Bytes of a clip are those of its values and a little more; what is fetched, read and stored adds up."""
    clips, row = parts.storage.clip_bytes(tmp_path, small(parts))
    for bucket, sizes in clips.items():
        shape = geometry.latent_shape(geometry.Bucket(*map(int, bucket.split("x"))), 4, 8)
        assert 0 < sizes["latents"] - 2 * 16 * np.prod(shape) < 6000
        assert 0 < sizes["text"] - 2 * 128 * 4096 < 6000
    found, taken = results["storage"], results["assumptions"]
    assert found["total"] == pytest.approx(taken["clips"] * sum(found["mean"].values()))
    need = found["read_per_second"]
    assert need["all"] == pytest.approx(taken["processes"] // taken["node"] * need["node"])
    for cut in found["cuts"]:
        assert cut["clips"] <= cut["shard_clips"] and cut["manifest"] == pytest.approx(cut["files"] * row, rel=0.01)
        assert cut["node"] == pytest.approx(cut["amplification"] * need["node"])


def test_checkpoint(parts, results):
    """Float32 weights with two moments each; every process writes the same share, on its own it would take longer."""
    found = results["failures"]
    assert found["size"] == sum(found["parts"].values()) == 12 * 14_288_491_584
    assert found["of_a_process"] * results["assumptions"]["processes"] == found["size"]
    behind = [save["behind"] for _, save in sorted(found["disks"].items(), key=lambda item: float(item[0]))]
    assert behind == sorted(behind, reverse=True)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("cards=8", "no assumption"),
        ("clips", "no assumption"),
        ("clips=many", "must be a number"),
        ("clips=nan", "must be a number"),
        ("clips=1.5", "must be a whole number above 0"),
        ("disk=0", "must be a number above 0"),
        ("slower=-1", "of 0 or more"),
        ("processes=12", "multiple of node=8"),
        ("clips=1000", "at least 100 for each process: 102400"),
        ("card=24GB", "its speed is not known"),
        ("card=abacus", "choose one of"),
        ("sizes=images=81x480", "must be set=bucket"),
        ("sizes=81x480x832", "must be set=bucket"),
    ],
)
def test_wrong_assumptions(parts, word, said):
    with pytest.raises(ValueError, match=said):
        parts.assumptions.read([word])


def test_given_assumptions(parts):
    taken = parts.assumptions.read(["clips=1e7", "processes=256", "disk=20e9", "slower=0", "sizes=images=1x64x64"])
    assert (taken.clips, taken.nodes, taken.disk, taken.slower) == (10_000_000, 32, 20e9, 0.0)
    assert taken.size_of() == {"images": "1x64x64"}
