"""Validation takes a bounded share of training where nobody says otherwise, and a run keeps to what was chosen for it."""

import itertools
import json
import re

import pytest

from wantrain.training.validation.budget import Budget, ChosenExtent, Extent
from wantrain.training.validation.history import EvalHistory
from wantrain.training.validation.measure import Evaluator

OPEN = {"every": None, "clips": None, "points": None}


def budget(**more):
    """A full fine-tuning of one sample a step in one process, with 16 clips of either kind."""
    usual = {"share": 0.1, "samples": 1, "per_sample": 3, "passes": 1, "processes": 1, "heldout": 16, "train": 16}
    return Budget(**{**usual, "steps": 10_000, **more})


@pytest.mark.parametrize(
    ("about", "fixed", "wanted"),
    [
        ({"samples": 16}, {}, (100, 16, 8)),  # 256 / (100 x 16 x 3) = 5.3 %: what it was before there was a share
        ({"samples": 16, "steps": 20}, {}, (100, 16, 8)),
        ({"samples": 16, "per_sample": 2}, {}, (100, 16, 8)),
        ({"samples": 16, "passes": 2}, {}, (200, 16, 8)),  # 10.7 %
        ({}, {}, (900, 16, 8)),  # 256 / 0.3 = 853
        ({"per_sample": 4}, {}, (700, 16, 8)),  # 640: recomputing makes training dearer
        ({"steps": 1800}, {}, (900, 16, 8)),
        ({"steps": 1799}, {}, (500, 16, 4)),  # 128 / 0.3 = 427
        ({"steps": 999}, {}, (300, 8, 4)),  # 64 / 0.3 = 213
        ({"steps": 100}, {}, (300, 8, 4)),  # both ends alone
        ({"samples": 4, "processes": 8}, {}, (100, 16, 8)),  # 4 x 8 = 32 forwards of each: 32 / 1200
        ({"processes": 8}, {}, (200, 16, 8)),  # 32 / 0.3 = 107
        ({"share": 0.5}, {}, (200, 16, 8)),  # 171
        ({"heldout": 3}, {}, (600, 16, 8)),  # 19 x 8 / 0.3 = 507
        ({}, {"points": 16}, (1800, 16, 16)),  # 1707
        ({"steps": 2000}, {"points": 16}, (900, 8, 16)),  # points stay, clips go
        ({}, {"clips": 64}, (900, 64, 8)),  # there are no more than 16
        ({}, {"every": 10}, (10, 8, 4)),  # 64 / 30 is too much still, and what was said
        ({}, {"every": 500}, (500, 16, 4)),
        ({}, {"every": 10_000}, (10_000, 16, 8)),
        ({}, {"every": 7, "clips": 3, "points": 2}, (7, 3, 2)),
    ],
)
def test_budget_by_hand(about, fixed, wanted):
    """The chosen interval, clips and noise levels are those computed by hand."""
    assert budget(**about).choose(fixed) == Extent(*wanted)


def test_budget_by_search():
    """The choice is the first of all that cost no more than the share.

    A search through every interval finds the same one.
    """
    for samples, per_sample, passes, processes, steps in itertools.product(
        (1, 2.5, 16), (2.1, 3, 4), (1, 2, 4), (1, 3), (150, 1000, 20_000)
    ):
        own = budget(samples=samples, per_sample=per_sample, passes=passes, processes=processes, steps=steps)
        for clips, points in ((16, 8), (16, 4), (8, 4)):
            cost = passes * -(-2 * clips // processes) * points
            every = next(n for n in itertools.count(100, 100) if cost <= 0.1 * n * samples * per_sample + 1e-6)
            if every == 100 or 2 * every <= steps:
                break
        assert own.choose({}) == Extent(every, clips, points)
        assert own.share_of(own.choose({})) <= 0.1 + 1e-9


def test_budget_description():
    """The description states the cost of validation as arithmetic."""
    said = budget(per_sample=4).describe(Extent(700, 16, 8), 3.4)
    assert said == "32 clips x 8 noise levels = 256 forwards of 3.4 s (14.5 min), every 700 steps: 9.1 % of training"
    said = budget(passes=2, processes=8, samples=2).describe(Extent(100, 16, 8), 0.02)
    assert said.startswith(
        "32 clips x 8 noise levels x 2 evaluations = 512 forwards, 64 on each of 8 processes, of 0.02 s"
    )
    assert said.endswith("(1.3 s), every 100 steps: 11 % of training")
    said = budget(steps=100).describe(Extent(300, 8, 4), None)
    assert said == "16 clips x 4 noise levels = 64 forwards, at step 0 and the last, 100: 43 % of training"


def test_chosen_extent(tmp_path):
    """A choice is stored for its share, and a value that the user gives takes precedence."""
    memory, path = ChosenExtent(tmp_path / "validation.json", 0.1), tmp_path / "validation.json"
    assert memory.recall(OPEN) == {} and memory.recall({**OPEN, "every": 7}) == {"every": 7}
    memory.note({**OPEN, "every": 7}, Extent(7, 8, 4))
    assert json.loads(path.read_text()) == {"share": 0.1, "chosen": {"clips": 8, "points": 4}}
    assert memory.recall(OPEN) == {"clips": 8, "points": 4}
    memory.note(OPEN, Extent(500, 8, 4))
    assert memory.recall(OPEN) == {"every": 500, "clips": 8, "points": 4}
    assert memory.recall({**OPEN, "clips": 2}) == {"every": 500, "clips": 2, "points": 4}
    assert ChosenExtent(path, 0.2).recall(OPEN) == {}, "another share is another question"
    path.write_text("[")
    with pytest.raises(ValueError, match=r"validation\.json cannot be read as JSON"):
        memory.recall(OPEN)


# Whole runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def timed(monkeypatch):
    """Counts the forwards that were timed."""
    calls, seconds = [], Evaluator.seconds
    monkeypatch.setattr(Evaluator, "seconds", lambda self, clip: calls.append(clip) or seconds(self, clip))
    return calls


def row_of(run, step):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(row for row in rows if row["step"] == step)


def test_budget_of_a_run(tiny, call, timed, tmp_path):
    """A run keeps its choice on resume, so its records stay comparable.

    Five held-out clips cost too much beside two steps of one sample: they are measured at step 0 and the last.
    """
    command = ("train.py", *tiny.train[:-1], "init=scratch", "data.holdout=0.3", "batch_size=1", "checkpoint.every=1")
    command, run = (*command, "check_expert=off", "run=r"), tmp_path / "runs" / "r"
    said = call(*command, "steps=2").stdout
    assert "5 held-out clips of 3 files and 8 training clips; 13 clips x 4 noise levels = 52 forwards of" in said
    share = float(re.search(r"at step 0 and the last, 2: (\d+) % of training", said)[1])
    assert share == pytest.approx(100 * 2 * 52 / (2 * 3), rel=0.1), "3 forwards a sample, as good as"
    kept = json.loads((run / "validation.json").read_text())
    assert kept == {"share": 0.1, "chosen": {"every": 200, "clips": 8, "points": 4}} and len(timed) == 1
    # Of 700 steps more could have been measured; what was measured before is measured again, and nothing is timed.
    said = call(*command, "steps=700", "stop_after=3", "validation.every=3").stdout
    assert "13 clips x 4 noise levels = 52 forwards, every 3 steps" in said and len(timed) == 1
    row = row_of(run, 3)
    first = row_of(run, 0)["validation_loss"]
    assert row["validation_change"] == pytest.approx(row["validation_loss"] - first) and row["validation_change"] != 0
    assert len({one.eval_key for one in EvalHistory(run / "validation.jsonl").all}) == 1
    assert json.loads((run / "validation.json").read_text()) == kept, "what was given is not noted"
    said = call(*command, "steps=700", "stop_after=4", "validation.points=2", "validation.every=4").stdout
    assert "13 clips x 2 noise levels" in said and len(timed) == 1, "the user's word is last"


@pytest.mark.slow
def test_budget_on_two_processes(tiny, launch, tmp_path):
    """Two processes make one choice and divide the clips."""
    command = (*tiny.train[:-1], "init=scratch", "data.holdout=0.3", "batch_size=2", "steps=1", "check_expert=off")
    said = launch("ddp", *command, "run=r").stdout
    assert "13 clips x 4 noise levels = 52 forwards, 28 on each of 2 processes, of" in said, "7 of 13 clips each"
    assert json.loads((tmp_path / "runs/r/validation.json").read_text())["chosen"] == {
        "every": 100, "clips": 8, "points": 4
    }  # fmt: skip


def test_given_extent(tiny, call, timed, tmp_path):
    """A given extent is measured, and no forward is timed."""
    size = ("init=scratch", "batch_size=1", "steps=1", "check_expert=off")
    command = ("train.py", *tiny.train, *size, "data.holdout=0.3")
    said = call(*command, "validation.clips=2", "validation.points=3", "run=given").stdout
    assert "2 held-out clips of 2 files and 2 training clips; 4 clips x 3 noise levels = 12 forwards, at step 0" in said
    call(*command[:-1], "data.holdout=0", "run=none")
    assert not timed and not (tmp_path / "runs/given/validation.json").exists()
    assert "validation.share=0 must be above 0" in call(*command, "validation.share=0", check=False).error


def test_budget_of_a_vae(tiny, call, timed, tmp_path):
    """A VAE's validation chooses nothing and times nothing."""
    command = ("recipe=wan_tiny_vae", f"weights={tiny.base}", f"data.shards={tiny.videos}", "validation.every=null")
    size = ("data.holdout=0.3", "data.area=1024", "data.num_frames=5", "batch_size=1", "steps=1", "tracker=jsonl")
    said = call("train.py", *command, *size, "run=v").stdout
    assert "step 1: validation PSNR" in said and not timed and not (tmp_path / "runs/v/validation.json").exists()
