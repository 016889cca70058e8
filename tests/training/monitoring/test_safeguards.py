"""Every safeguard trips on its planted fault, at its first step; a run without faults trips none."""

import json
import math
import re
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from wantrain import flow
from wantrain.losses import FlowMatching
from wantrain.models import adapters
from wantrain.models.formats.weights import read_file
from wantrain.training.engine import optim
from wantrain.training.engine.engine import Stepper
from wantrain.training.monitoring.loss_baseline import BINS, SEEN, LossBaseline
from wantrain.training.monitoring.safeguards import StepGuard
from wantrain.util.distributed import DataRanks

ROOT = Path(__file__).resolve().parent.parent.parent.parent
RUN = ("init=scratch", "batch_size=4", "steps=6", "checkpoint.every=1", "checkpoint.keep=9", "run=r")
LOSS, DRAW = FlowMatching.__call__, FlowMatching.draw


def spoiled(monkeypatch, steps, how):
    """Give the loss of some steps (from 1) another value: `how(record)` is what replaces it."""
    calls = iter(range(1, 1000))

    def loss(self, model, batch, draws):
        record = LOSS(self, model, batch, draws)
        return how(record) if next(calls) in steps else record

    monkeypatch.setattr(FlowMatching, "__call__", loss)


def replaced(record, **fields):
    return type(record)(**{**vars(record), **fields})


def rows_of(tmp_path, name):
    path = tmp_path / "runs" / "r" / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def checkpoint(tmp_path, step):
    folder = tmp_path / "runs" / "r" / "checkpoints" / f"step_{step:06d}"
    return {
        f"{path.relative_to(folder)}/{key}": value
        for path in sorted(folder.rglob("*.safetensors"))
        for key, value in read_file(path)[0].items()
    }


def test_run_without_faults(tiny, call, tmp_path):
    """A run without faults trips no safeguard."""
    ended = call("train.py", *tiny.train, *RUN)
    assert not (tmp_path / "runs" / "r" / "safeguards.jsonl").exists()
    assert "skipped" not in ended.stdout and "times the usual" not in ended.stdout


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("more", [(), ("accumulate=2", "ema=0.9")], ids=["plain", "accumulated"])
def test_non_finite_loss(value, more, tiny, call, tmp_path, monkeypatch):
    """A step with a NaN or infinite loss updates nothing, and its samples are recorded."""
    micro = 2 if more else 1
    # Infinity is added: its slope is finite, and all the same no step is made on it.
    spoiled(monkeypatch, {2 * micro + 1}, lambda record: replaced(record, value=record.value + value))
    ended = call("train.py", *tiny.train, *RUN, *more)
    before, after, next_one = (checkpoint(tmp_path, step) for step in (2, 3, 4))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items()), "weights, moments, average"
    assert any(not torch.equal(next_one[key], tensor) for key, tensor in after.items()), "and then it goes on"
    (row,) = rows_of(tmp_path, "safeguards.jsonl")
    assert (row["step"], row["safeguard"], row["expert"], len(row["samples"])) == (3, "gradient", "low_noise", 4)
    assert [sample["position"] for sample in row["samples"]] == [8, 9, 10, 11]
    assert all(0 < sample["sigma"] < 0.875 and sample["id"] for sample in row["samples"])
    assert "step 3 skipped: the gradient's norm is" in ended.stdout
    logged = {row["step"]: row for row in rows_of(tmp_path, "metrics.jsonl") if "samples" in row}
    assert logged[3]["loss"] is None and all(logged[step]["loss"] for step in (1, 2, 4, 5, 6))
    clips = [[sample["id"], pytest.approx(sample["sigma"], rel=1e-5)] for sample in row["samples"]]
    assert [clip[:2] for clip in logged[3]["clips"]] == clips, "the log names the clips of each step"
    assert sum(loss for *_, loss in logged[1]["clips"]) / 4 == pytest.approx(logged[1]["loss"], rel=1e-4)


def test_non_finite_gradient(tiny, call, tmp_path, monkeypatch):
    """A step with one NaN element in a gradient updates nothing."""
    backward, calls = Stepper.backward, iter(range(1, 1000))

    def planted(self, loss, *, last):
        backward(self, loss, last=last)
        if next(calls) == 2:
            next(iter(optim.named_trainable(self.module).values())).grad.view(-1)[0] = math.nan

    monkeypatch.setattr(Stepper, "backward", planted)
    call("train.py", *tiny.train, *RUN)
    before, after = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert [row["step"] for row in rows_of(tmp_path, "safeguards.jsonl")] == [2]


def test_max_skipped_steps(tiny, call, tmp_path, monkeypatch):
    """Three skipped steps in a row end the run, and its last good checkpoint remains."""
    spoiled(monkeypatch, {2, 4, 5, 6}, lambda record: replaced(record, per_sample=record.per_sample * math.nan,
                                                              value=record.value * math.nan))  # fmt: skip
    ended = call("train.py", *tiny.train, *RUN, check=False)
    assert "step 6 skipped: the gradient's norm is nan" in ended.error and "3 steps in a row" in ended.error
    first = rows_of(tmp_path, "safeguards.jsonl")[-1]["samples"][0]["id"]
    assert f"first such sample: {first}" in ended.error
    assert (tmp_path / "runs/r/checkpoints/step_000005").is_dir()
    monkeypatch.undo()
    assert "step 5 of 6" in call("train.py", *tiny.train, *RUN).stdout, "the same command goes on"


def test_loss_spike_report(tiny, call, tmp_path, monkeypatch):
    """A loss of thirty times the baseline is reported with its worst sample."""
    steps = 80
    spoiled(monkeypatch, {steps - 3}, lambda record: replaced(record, per_sample=record.per_sample * 30))
    ended = call("train.py", *tiny.train, *RUN[:2], "run=r", f"steps={steps}", "batch_size=8")
    (row,) = rows_of(tmp_path, "safeguards.jsonl")
    assert (row["step"], row["safeguard"]) == (steps - 3, "spike") and 10 < row["times_usual"] < 90
    worst = max(row["samples"], key=lambda sample: sample["loss"])
    assert f"the worst sample {worst['id']}" in ended.stdout
    call("train.py", *tiny.train, *RUN[:2], "run=quiet", f"steps={steps}", "batch_size=8", "safeguards.spike=null")
    assert not (tmp_path / "runs/quiet/safeguards.jsonl").exists()


def test_loss_spike_after_resume(tiny, call, tmp_path, monkeypatch):
    """A loss of a thousand times the baseline updates nothing, also in the first step after a resume.

    The baseline is part of a checkpoint: the run that is resumed at step 60 has it.
    """
    train = ("train.py", *tiny.train, RUN[0], "run=r", "steps=80", "batch_size=8", "checkpoint.keep=9")
    call(*train, "stop_after=60")
    spoiled(monkeypatch, {1}, lambda record: replaced(record, per_sample=1000 * record.per_sample,
                                                      value=1000 * record.value))  # fmt: skip
    ended = call(*train, "stop_after=61")
    monkeypatch.undo()
    call(*train, "stop_after=62")
    before, after, next_one = (checkpoint(tmp_path, step) for step in (60, 61, 62))
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items()), "weights and moments"
    assert any(not torch.equal(next_one[key], tensor) for key, tensor in after.items()), "and then it goes on"
    (row,) = rows_of(tmp_path, "safeguards.jsonl")
    assert (row["step"], row["safeguard"]) == (61, "spike") and 300 < row["times_usual"] < 3000
    assert re.search(r"step 61 skipped: the loss is \d+ times .* \(safeguards.refuse=100\)", ended.stdout)


def test_loss_baseline_by_sigma():
    """The loss baseline is learned for each noise level.

    Losses that differ a thousandfold between noise levels are all usual; tenfold at one level is not.
    """
    usual = LossBaseline(flow.NoiseWindow(0.0, 0.875))
    sigmas = [0.875 * (slot + 0.5) / BINS for slot in range(BINS)]
    losses = [10 ** (-3 * slot / BINS) for slot in range(BINS)]
    sigmas, losses = torch.tensor(sigmas), torch.tensor(losses)
    assert usual.excess(sigmas, losses) == 1.0, "nothing is known yet"
    for turn in range(2 * SEEN):
        usual.learn(sigmas, losses * (1.5 if turn % 2 else 1 / 1.5))
    assert usual.excess(sigmas, losses) == pytest.approx(1.0, rel=0.2)
    for sigma, loss in zip(sigmas, losses, strict=True):
        assert usual.excess(sigma[None], 10 * loss[None]) == pytest.approx(10.0, rel=0.2)
    once, apart = (LossBaseline(flow.NoiseWindow(0.0, 0.875)) for _ in range(2))
    for _ in range(SEEN):
        once.learn(sigmas.repeat(4), losses.repeat(4))
        for _ in range(4):
            apart.learn(sigmas, losses)
    assert torch.allclose(once.means, apart.means) and torch.equal(once.counts, apart.counts), "however it is batched"


def test_sigma_outside_window(tiny, call, monkeypatch):
    """A noise level outside the expert's window ends the run before an update.

    The planted fault is the common one: the whole range for one expert.
    """
    whole = FlowMatching(density="uniform", shift=3.0)
    monkeypatch.setattr(FlowMatching, "draw", lambda self, batch, generators: DRAW(whole, batch, generators))
    error = call("train.py", *tiny.train, *RUN, "batch_size=16", check=False).error
    assert re.search(r"low_noise drew sigma 0\.\d+, outside its window \[0, 0\.875\)", error)


def test_step_without_change(tiny, pair, call, monkeypatch):
    """A first step that changes no trained weight ends the run."""
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    for adapter, what in (("none", "trained tensor"), ("lora", "LoRA's B")):
        ended = call("train.py", *tiny.train, f"weights={pair}", *RUN[1:], f"adapter={adapter}", f"run={adapter}",
                     check=False)  # fmt: skip
        assert f"the first step of low_noise moved no {what} " in ended.error


def test_unexpected_trained_parameter(tiny, pair, call, monkeypatch):
    """A parameter that is trained beside the adapter ends the run."""
    inject = adapters.inject

    def planted(module, settings, *, seed):
        inject(module, settings, seed=seed)
        next(p for name, p in module.named_parameters() if "lora_" not in name).requires_grad_(True)

    monkeypatch.setattr(adapters, "inject", planted)
    error = call("train.py", *tiny.train, f"weights={pair}", *RUN[1:], "adapter=lora", check=False).error
    assert error.startswith("adapter=lora: ") and "is trained" in error


def test_optimizer_lacks_parameters(tiny, call, monkeypatch):
    """An optimizer that lacks trained parameters ends the run."""
    named = optim.named_trainable
    fewer = lambda module: dict(list(named(module).items())[: max(1, len(named(module)) - 1)])  # noqa: E731
    monkeypatch.setattr(optim, "named_trainable", fewer)
    error = call("train.py", *tiny.train, *RUN, check=False).error
    assert re.search(r"[\d,]+ parameters were to be trained, single trains [\d,]+ and its optimizer holds", error)


PLANT = """
import os, sys, math, runpy, torch
sys.path.insert(0, {root!r})
from wantrain.losses import FlowMatching
from wantrain.training import micro_batches
from wantrain.training.engine import engine
fault, rank = {fault!r}, int(os.environ["RANK"])
whole, calls = FlowMatching.__call__, iter(range(1, 1000))
if fault == "nan":       # on one rank only, in the third step
    def loss(self, model, batch, draws):
        record = whole(self, model, batch, draws)
        bad = rank == 1 and next(calls) == 3
        return type(record)(**{{**vars(record), "value": record.value * (math.nan if bad else 1)}})
    FlowMatching.__call__ = loss
elif fault == "spike":   # on one rank only, once enough is known
    def loss(self, model, batch, draws):
        record = whole(self, model, batch, draws)
        times = 1e5 if rank == 1 and next(calls) == 40 else 1
        return type(record)(**{{**vars(record), "value": record.value * times, "per_sample": record.per_sample * times}})
    FlowMatching.__call__ = loss
elif fault == "noise":   # every rank seeds by its place in its own batch
    generator_at = micro_batches.generator_at
    micro_batches.generator_at = lambda seed, purpose, *at: generator_at(seed, purpose, *([] if purpose == "noise" else at))
elif fault == "samples": # every rank takes rank 0's share
    share = micro_batches.share
    micro_batches.share = lambda batch, micro, accumulate, rank, world: share(batch, micro, accumulate, 0, world)
elif fault == "gradients":  # the forward passes by DDP's wrapper, and nothing is reduced
    prepare = engine.Stepper.__init__
    def init(self, accelerator, module, *more, **how):
        prepare(self, accelerator, module, *more, **how)
        self.wrapped = module
    engine.Stepper.__init__ = init
elif fault == "hang":    # one rank never comes to the reduction
    import time
    def loss(self, model, batch, draws):
        if rank == 1 and next(calls) == 2:
            time.sleep(1000)
        return whole(self, model, batch, draws)
    FlowMatching.__call__ = loss
sys.argv[0] = {root!r} + "/train.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def planted(tmp_path, launch):
    """planted("ddp", "nan", ...): train.py in two processes with a fault in it."""

    def run(engine, fault, *args, **how):
        script = tmp_path / "planted.py"
        script.write_text(PLANT.format(root=str(ROOT), fault=fault))
        return launch(engine, *args, script=script, **how)

    return run


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "engine", ["ddp", *(pytest.param(name, marks=slow) for name in ("zero1", "zero2", "zero3", "fsdp2"))]
)
def test_nan_on_one_rank(engine, tiny, planted, tmp_path):
    """A NaN on one rank skips the update on every rank."""
    planted(engine, "nan", *tiny.train, *RUN)
    before, after, next_one = (checkpoint(tmp_path, step) for step in (2, 3, 4))
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert any(not torch.equal(next_one[key], tensor) for key, tensor in after.items())
    rows = rows_of(tmp_path, "safeguards.jsonl")
    assert sorted((row["rank"], row["step"]) for row in rows) == [(0, 3), (1, 3)], "each rank writes its own samples"
    assert sorted(sample["position"] for row in rows for sample in row["samples"]) == [8, 9, 10, 11]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_spike_on_one_rank(engine, tiny, planted, tmp_path):
    """A loss spike on one rank skips the update on every rank."""
    train = (*tiny.train, RUN[0], "run=r", "batch_size=16", "steps=41", "checkpoint.keep=9", "checkpoint.every=1")
    planted(engine, "spike", *train)
    before, after, next_one = (checkpoint(tmp_path, step) for step in (39, 40, 41))
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert any(not torch.equal(next_one[key], tensor) for key, tensor in after.items())
    rows = rows_of(tmp_path, "safeguards.jsonl")
    assert sorted((row["rank"], row["step"], row["safeguard"]) for row in rows) == [(0, 40, "spike"), (1, 40, "spike")]
    assert rows[0]["times_usual"] == rows[1]["times_usual"] > 100


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        pytest.param("noise", "ranks share their noise: 4 drawn for one batch, 1 different", marks=slow),
        pytest.param("samples", "ranks share their samples: 4 drawn for one batch, 2 different", marks=slow),
        ("gradients", r"the gradients of \d+ of \d+ parameters differ between ranks"),
    ],
)
def test_mismatched_ranks(fault, told, tiny, planted, tmp_path):
    """Ranks that share noise or samples, or differ in their gradients, end the run at the first step."""
    ended = planted("ddp", fault, *tiny.train, *RUN, check=False)
    assert ended.returncode != 0 and re.search(told, ended.stderr)
    assert not list((tmp_path / "runs" / "r" / "checkpoints").glob("step_*"))


def test_hanging_rank(tiny, planted, tmp_path):
    """A rank that hangs ends all ranks, and its stack is printed."""
    began = time.monotonic()
    ended = planted("ddp", "hang", *tiny.train, *RUN, "safeguards.hang=4", "validation.every=1000", check=False)
    assert ended.returncode != 0 and time.monotonic() - began < 150
    assert "error: nothing has happened for 4 s (safeguards.hang) while training step 2" in ended.stderr
    assert "time.sleep(1000)" in ended.stderr or "planted.py" in ended.stderr, "the stack that hangs is shown"
    left = subprocess.run(["pgrep", "-f", str(tmp_path / "planted.py")], capture_output=True, text=True, check=False)
    assert not left.stdout, "no process stays behind"


@pytest.mark.parametrize(
    ("positions", "words"),
    [
        ([[0, 1], [0, 1], [2, 3], [2, 3]], None),
        ([[0, 1], [2, 3], [0, 1], [2, 3]], "the 2 processes that share the tokens of a clip differ in their samples"),
        ([[0, 1], [0, 1], [0, 1], [0, 1]], "ranks share their samples: 4 drawn for one batch, 2 different ones"),
    ],
)
def test_processes_that_share_tokens(positions, words):
    """Neighbours that share tokens must have the same samples, others must not."""
    gathered = torch.tensor(positions)
    stepper = SimpleNamespace(
        data_ranks=DataRanks(2), gather=lambda mine: gathered, device=torch.device("cpu"), replicated_gradients=False
    )
    samples = [{"position": position} for position in positions[0]]
    guard = SimpleNamespace(stepper=stepper, samples=samples, noises=positions[0], most=2)
    with nullcontext() if words is None else pytest.raises(ValueError, match=words):
        StepGuard._check_ranks(guard)
