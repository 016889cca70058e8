"""A run that is killed, stopped, damaged, split or extended is the run that was never disturbed."""

import contextlib
import functools
import itertools
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from preloaded import forked

from wantrain.models import load_transformer
from wantrain.models.formats.weights import read_file, read_tensors
from wantrain.runs.checkpoint import Checkpoints

TRAIN = Path(__file__).resolve().parent.parent.parent / "train.py"
STEPS, EVERY = 60, 2


def rows(run):
    """The objects of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    """Loss and gradient norm of each step; the steps must be 1, 2, 3, ... without a gap or a repeat."""
    log = rows(run)
    assert [row["step"] for row in log] == list(range(1, len(log) + 1))
    return [(row["loss"], row["grad_norm"]) for row in log]


def near(run, other):
    """The largest relative difference between the losses of two runs of equal length."""
    pairs = list(zip(losses(run), losses(other), strict=True))
    return max(abs(mine[0] - theirs[0]) / theirs[0] for mine, theirs in pairs)


def saved(run):
    """The steps of the complete checkpoints."""
    return [int(path.name.removeprefix("step_")) for path in Checkpoints(run / "checkpoints", keep=1).complete()]


def rewind(run, step):
    """As if the run had been killed right after the checkpoint of `step`, which must be there."""
    for newer in [other for other in saved(run) if other > step]:
        shutil.rmtree(run / "checkpoints" / f"step_{newer:06d}")
    assert saved(run)[-1] == step


def equal_weights(run, other, part="transformer_2"):
    """True if the newest checkpoints of two runs hold the same bits."""
    mine, theirs = (
        read_tensors(folder / "checkpoints" / f"step_{saved(folder)[-1]:06d}" / part) for folder in (run, other)
    )
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.fixture(scope="module")
def arguments(tiny):
    """The command of this file's long run."""
    return (*tiny.train, "run=r", "batch_size=2", f"steps={STEPS}", f"checkpoint.every={EVERY}")


@pytest.fixture(scope="module")
def unbroken(arguments, command, tmp_path_factory):
    """The run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("unbroken")
    command("train.py", *arguments, cwd=folder)
    assert len(losses(folder / "runs" / "r")) == STEPS
    return folder / "runs" / "r"


class Training:
    """A real training, in a process of its own or in several under a launcher, to be killed or signalled."""

    def __init__(self, command, cwd, environment):
        self.python = command[0]
        self.run, self.log = cwd / "runs" / "r", cwd / f"log_{time.time_ns()}"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def wait_for(self, condition):
        """Until condition() is true, looked at every 0.2 ms; the process must be running still."""
        give_up = time.monotonic() + 400
        while not condition():
            assert self.process.poll() is None, f"it ended before it could be disturbed:\n{self.log.read_text()}"
            assert time.monotonic() < give_up, self.log.read_text()
            time.sleep(0.0002)

    def wait_for_step(self, step):
        self.wait_for(lambda: any(other >= step for other in saved(self.run)))

    def saving(self):
        """The folder of a checkpoint that is being written now."""
        return next((self.run / "checkpoints").glob(".step_*.tmp"), None)

    def everybody(self):
        """The launcher, if there is one, and all that it has started."""
        launcher = psutil.Process(forked(self.python, self.process.pid))
        return [launcher, *launcher.children(recursive=True)]

    def kill(self):
        """As a power cut does it: all at once."""
        everybody = self.everybody()
        for process in everybody:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        for process in everybody:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        assert self.process.wait() == -signal.SIGKILL, self.log.read_text()
        psutil.wait_procs(everybody, timeout=20)

    def kill_inside_a_save(self):
        """Hold the process as soon as it has begun a checkpoint; kill it if it has not finished that by then."""
        while True:
            self.wait_for(self.saving)
            everybody = self.everybody()
            for process in everybody:
                process.suspend()
            time.sleep(0.05)  # the signal must have arrived before the folder is looked at again
            if self.saving():
                break
            for process in everybody:
                process.resume()
        self.kill()
        assert self.saving(), "the kill must have left a half-written checkpoint"

    def clear(self):
        """Leave nothing behind."""
        if self.process.poll() is None:
            self.kill()

    def end(self):
        """Let it end by itself; returns what it said."""
        assert self.process.wait(timeout=400) == 0, self.log.read_text()
        return self.log.read_text()


def disturbed(command, cwd, environment, kinds, steps=STEPS):
    """Start `command` again and again and kill it, each time in another way, then let it end; returns what it said.

    early  before the first checkpoint        step  some steps later, at any moment        save  while it writes
    Whatever carries a final name must be whole after each kill.
    """
    moments, run, reached, training = random.Random(2), cwd / "runs" / "r", 0, None
    try:
        for kind in kinds:
            training = Training(command, cwd, environment)
            if kind == "early":
                training.wait_for((run / "config.yaml").is_file)
            else:
                training.wait_for_step(reached + moments.randint(2, 8))
            if kind == "save":
                training.kill_inside_a_save()
            else:
                time.sleep(moments.uniform(0, 0.1))
                training.kill()
            assert kind == "early" or f"step {reached} of {steps}" in training.log.read_text()
            found = Checkpoints(run / "checkpoints", keep=2)
            if found.complete():
                assert found.newest() == found.complete()[-1]
                load_transformer(found.newest(), part="transformer_2")
                reached = saved(run)[-1]
            assert kind == "early" or reached > 0
        training = Training(command, cwd, environment)
        said = training.end()
        assert f"step {reached} of {steps}" in said
    finally:
        if training is not None:
            training.clear()
    return said


def test_resume_after_kill(arguments, unbroken, environment, python, tmp_path):
    """A run that is killed at five moments is bit equal to the unbroken run."""
    kinds = ("early", "step", "save", "step", "step")
    disturbed([python, str(TRAIN), *arguments], tmp_path, environment, kinds)
    run = tmp_path / "runs" / "r"
    assert losses(run) == losses(unbroken)
    assert equal_weights(run, unbroken)
    assert saved(run) == saved(unbroken) and not list((run / "checkpoints").glob(".*"))


#: Engines whose sums come in the same order whoever asks; the others may differ in the last digits after a restart.
EXACT = ("single", "ddp")
TWENTY = ("early", *itertools.islice(itertools.cycle(("step", "save", "step", "step")), 19))


@pytest.mark.parametrize(
    ("engine", "kinds", "steps"),
    [
        pytest.param("ddp", ("save",), 20, marks=pytest.mark.slow),
        *(
            pytest.param(engine, TWENTY, 220, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])
            for engine in ("single", "ddp", "zero2", "zero3", "fsdp2")
        ),
    ],
)
def test_resume_after_kill_by_engine(engine, kinds, steps, tiny, environment, launch_command, tmp_path):
    """Under every engine a killed run equals the unbroken one: exact engines bit for bit, others within 1e-6."""
    command = (*tiny.train, "run=r", "batch_size=8", f"steps={steps}", f"checkpoint.every={EVERY}")
    start = [sys.executable, str(TRAIN), *command] if engine == "single" else launch_command(engine, *command)
    for name in ("killed", "unbroken"):
        (tmp_path / name).mkdir()
        disturbed(start, tmp_path / name, environment, kinds if name == "killed" else (), steps)
    killed, unbroken = (tmp_path / name / "runs" / "r" for name in ("killed", "unbroken"))
    assert len(losses(killed)) == steps
    if engine in EXACT:
        assert losses(killed) == losses(unbroken) and equal_weights(killed, unbroken)
    assert near(killed, unbroken) <= 1e-6


def test_resume_after_sigterm(arguments, unbroken, environment, python, call, tmp_path):
    """SIGTERM writes a checkpoint, and the same command continues the run bit for bit."""
    training = Training([python, str(TRAIN), *arguments], tmp_path, environment)
    try:
        training.wait_for_step(10)
        training.process.terminate()
        assert training.process.wait(timeout=200) == 128 + signal.SIGTERM
    finally:
        training.process.kill()
        training.process.wait()
    assert "the same command continues" in training.log.read_text()
    stopped = rows(training.run)[-1]["step"]
    assert 10 <= stopped < STEPS and saved(training.run)[-1] == stopped
    said = call("train.py", *arguments).stdout
    assert f"step {stopped} of {STEPS}" in said
    assert losses(training.run) == losses(unbroken) and equal_weights(training.run, unbroken)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_other_signals(number, arguments, unbroken, call, tmp_path, request):
    """SIGINT, SIGUSR1 and SIGHUP stop a run after a checkpoint too, and the signal handlers are restored."""
    run, before = tmp_path / "runs" / "r", signal.default_int_handler
    request.addfinalizer(functools.partial(signal.signal, number, signal.signal(number, before)))

    def send():
        give_up = time.monotonic() + 60
        while not saved(run) and time.monotonic() < give_up:
            time.sleep(0.001)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    ended = call("train.py", *arguments, check=False)
    sender.join()
    assert ended.returncode == 128 + number and "the same command continues" in ended.stdout
    assert signal.getsignal(number) == before
    done = losses(run)
    assert 0 < len(done) < STEPS and saved(run)[-1] == len(done) and done == losses(unbroken)[: len(done)]


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["| head -2", "2>&1 | head -2", "> /dev/full 2>&1"])
def test_reader_goes_away(reader, arguments, unbroken, environment, tmp_path):
    """A run whose output nobody reads any more, or that a full disk refuses, trains to its end."""
    words = shlex.join([sys.executable, str(TRAIN), *map(str, arguments)])
    ended = subprocess.run(f"set -o pipefail; {words} {reader}", shell=True, executable="/bin/bash", cwd=tmp_path,
                           env=environment, capture_output=True, text=True, timeout=300)  # fmt: skip
    assert ended.returncode == 0 and ended.stdout.count("\n") == (0 if "full" in reader else 2)
    assert losses(tmp_path / "runs" / "r") == losses(unbroken)


def test_finished_run_extended(tiny, call, tmp_path):
    """A finished run reports that it is finished, and a larger steps= extends it."""
    constant = (*tiny.train, "batch_size=2", "schedule=constant", "schedule.warmup=0")
    call("train.py", *constant, "run=long", "steps=10")
    call("train.py", *constant, "run=short", "steps=6")
    before = (tmp_path / "runs" / "short" / "metrics.jsonl").read_bytes()
    again = call("train.py", *constant, "run=short", "steps=6")
    assert again.returncode == 0 and "step 6 of 6; this run is finished, a larger steps= continues it" in again.stdout
    assert (tmp_path / "runs" / "short" / "metrics.jsonl").read_bytes() == before
    assert "step 6 of 10" in call("train.py", *constant, "run=short", "steps=10").stdout
    assert losses(tmp_path / "runs" / "short") == losses(tmp_path / "runs" / "long")
    assert equal_weights(tmp_path / "runs" / "short", tmp_path / "runs" / "long")


@pytest.mark.parametrize(
    ("adapter", "more"),
    [
        ("lora", ("adapter.rank=4",)),
        ("lora", ("adapter.rank=4", "accumulate=2", "recompute=block")),
        ("lora", ("adapter.rank=4", "precision=bf16")),
        ("lora", ("adapter.rank=3", "adapter.rank_stabilized=true", "adapter.targets=all", "precision=bf16",
                  "adapter.rank_pattern={ffn: 5, blocks.1: 2}", "adapter.alpha_pattern={cross_attn: 0.1}")),
        ("dora", ("adapter.rank=4",)),
        ("dora", ("adapter.rank=3", "adapter.rank_stabilized=true", "adapter.targets=all", "precision=bf16",
                  "recompute=block", "accumulate=2")),
        ("lokr", ("adapter.rank=2", "adapter.alpha=3", "adapter.factor=4", "recompute=block", "precision=bf16",
                  "adapter.rank_pattern={ffn: 400}")),
        ("partial", ("adapter.layers=1", "adapter.tags=[attention,norm,head]", "optimizer=muon")),
        ("partial", ("adapter.tags=[ffn,modulation,text_embedding]", "precision=bf16", "recompute=block")),
    ],
)  # fmt: skip
def test_adapter_resume(adapter, more, tiny, pair, call, tmp_path):
    """A run of an adapter or of a part of the layers resumes bit for bit."""
    run = tmp_path / "runs" / "r"
    command = (
        "train.py", *tiny.train, *more, f"weights={pair}", f"adapter={adapter}", "run=r", "batch_size=2",
        "steps=8", "checkpoint.every=3", "checkpoint.keep=9", "optimizer.lr=1e-2",
    )  # fmt: skip
    call(*command)
    last, part = run / "checkpoints" / "step_000008", "transformer_2/diffusion_pytorch_model.safetensors"
    held = part if adapter == "partial" else "adapter.safetensors"
    config = ["transformer_2/config.json"] if adapter == "partial" else []
    first, weights = losses(run), read_file(last / held)
    assert sorted(path.relative_to(last).as_posix() for path in last.rglob("*") if path.is_file()) == sorted(
        [held, *config, "optimizer.safetensors", "state.json"]
    )
    rewind(run, 3)
    assert "step 3 of 8" in call(*command).stdout
    again = read_file(last / held)
    assert losses(run) == first
    assert again[1] == weights[1] and all(torch.equal(again[0][key], weights[0][key]) for key in weights[0])


@pytest.mark.parametrize("optimizer", [pytest.param("prodigy", marks=pytest.mark.slow), "schedule_free"])
def test_adaptive_resume(optimizer, tiny, pair, call, tmp_path):
    """Runs whose optimizer finds a rate or an average by itself resume bit for bit, however often they are validated;
    what is exported of schedule-free AdamW is its average.
    """
    pytest.importorskip({"prodigy": "prodigyopt"}.get(optimizer, "schedulefree"), reason="the extra adaptive is absent")
    command = (
        "train.py", *tiny.train, f"weights={pair}", "adapter=lora", "adapter.rank=4", f"optimizer={optimizer}",
        "schedule=constant", "batch_size=2", "steps=8", "checkpoint.every=3", "checkpoint.keep=9", "data.holdout=0.2",
        "validation.clips=2", "validation.points=2",
    )  # fmt: skip

    def learned(run):
        return [(row["loss"], row["grad_norm"]) for row in rows(run) if "loss" in row]  # step 0 is validated alone

    call(*command, "run=r")
    run = tmp_path / "runs" / "r"
    last = run / "checkpoints" / "step_000008"
    files = [path.relative_to(last).as_posix() for path in last.rglob("*.safetensors")]
    first, held = learned(run), {file: read_file(last / file)[0] for file in files}
    assert ("ema/adapter.safetensors" in files) == (optimizer == "schedule_free")
    rewind(run, 3)
    assert "step 3 of 8" in call(*command, "run=r").stdout
    assert learned(run) == first
    call(*command, "run=watched", "validation.every=1")
    assert learned(tmp_path / "runs" / "watched") == first and len(first) == 8
    for file, tensors in held.items():
        again = read_file(last / file)[0]
        assert again.keys() == tensors.keys() and all(torch.equal(again[key], tensors[key]) for key in again), file
    if optimizer == "schedule_free":
        live, average = held["adapter.safetensors"], held["ema/adapter.safetensors"]
        assert live.keys() == average.keys() and any(not torch.equal(live[key], average[key]) for key in live)
        call("export.py", "run=r", "alone=true", "out=made")
        exported = next(path for path in (tmp_path / "made").rglob("*.safetensors") if "lora" in path.as_posix())
        assert all(torch.equal(tensor, average[key]) for key, tensor in read_file(exported)[0].items())


def test_gradient_accumulation(tiny, call, tmp_path):
    """Gradient accumulation changes losses and gradient norms by rounding alone."""
    for name, accumulate in (("whole", 1), ("halves", 2), ("eighths", 8)):
        call("train.py", *tiny.train, f"run={name}", "batch_size=8", f"accumulate={accumulate}", "steps=6")
    whole, halves, eighths = (tmp_path / "runs" / name for name in ("whole", "halves", "eighths"))
    assert near(halves, whole) < 1e-5 and near(eighths, whole) < 1e-5
    norms = [[row["grad_norm"] for row in rows(run)] for run in (whole, eighths)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_recompute(tiny, call, tmp_path):
    """Recomputation changes no loss."""
    for name, recompute in (("kept", "none"), ("recomputed", "block")):
        call("train.py", *tiny.train, f"run={name}", "batch_size=2", f"recompute={recompute}", "steps=4")
    assert losses(tmp_path / "runs" / "recomputed") == losses(tmp_path / "runs" / "kept")


@pytest.mark.slow
def test_validation_without_side_effects(tiny, call, tmp_path):
    """Validation and previews change no loss and no gradient norm of a run."""
    command = ("train.py", *tiny.train, "batch_size=2", "steps=4", "data.holdout=0.2")
    watched = ("validation.every=1", "validation.clips=2", "validation.points=2")
    call(*command, "run=alone")
    call(*command, "run=watched", *watched, "sample.every=3", "sample.count=1", "sample.steps=1", "model.num_frames=9")
    alone, seen = (tmp_path / "runs" / name for name in ("alone", "watched"))
    pairs = [[(row["loss"], row["grad_norm"]) for row in rows(run) if "loss" in row] for run in (alone, seen)]
    assert pairs[0] == pairs[1] and len(pairs[0]) == 4
    assert [row["step"] for row in rows(seen) if "validation_loss" in row] == [0, 1, 2, 3, 4]
    assert sorted(path.name for path in (seen / "samples").glob("*.mp4")) == [
        f"step_{step:06d}_0.mp4" for step in (0, 3, 4)
    ]


def test_damaged_checkpoint(tiny, call, tmp_path):
    """Resume skips damaged checkpoints with a warning and truncates the log to the step where it continues."""
    run = tmp_path / "runs" / "r"
    command = ("train.py", *tiny.train, "run=r", "batch_size=2", "steps=9", "checkpoint.every=3", "checkpoint.keep=9")
    call(*command)
    first, (three, six, nine) = losses(run), (run / "checkpoints" / f"step_{step:06d}" for step in (3, 6, 9))
    weights = nine / "transformer_2" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-7] ^= 1  # one bit
    weights.write_bytes(content)
    (six / "state.json").write_text('{"step": 6, "fi')
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 10, "lo')  # a line that a kill has cut
    said = call(*command).stdout
    assert f"warning: {nine.relative_to(tmp_path)} is damaged (transformer_2/{weights.name})" in said
    assert f"warning: {six.relative_to(tmp_path)} is damaged (state.json)" in said
    assert "step 3 of 9" in said
    assert losses(run) == first
    (three / "optimizer.safetensors").unlink()
    assert "step 9 of 9" in call(*command).stdout
    shutil.rmtree(run / "checkpoints")  # nothing left: from the start, with a new log
    assert "step 0 of 9" in call(*command).stdout
    assert losses(run) == first


def test_run_on_other_shards(tiny, call, tmp_path):
    """A run refuses to continue on other shards than it was trained on."""
    shards = tmp_path / "latents"
    shutil.copytree(tiny.latents, shards)
    command = ("train.py", *tiny.train, f"data.shards={shards}", "run=r", "batch_size=2", "steps=2")
    call(*command)
    manifest = json.loads((shards / "manifest.json").read_text())
    (shards / "manifest.json").write_text(json.dumps({**manifest, "note": "made again"}))
    assert "was trained on other shards than data.shards holds now" in call(*command, "steps=4", check=False).error
    assert len(losses(tmp_path / "runs" / "r")) == 2


TWO = """
import json, runpy, sys
from pathlib import Path
from wantrain.training.engine import accelerator as engines

start = engines.start_accelerator

def noted(*args, **how):
    accelerator = start(*args, **how)
    about = {"processes": accelerator.num_processes, "kind": accelerator.distributed_type.value}
    Path(f"rank_{accelerator.process_index}.json").write_text(json.dumps(about))
    return accelerator

engines.start_accelerator = noted
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def launched_twice(script, command, cwd, environment):
    """`script` in two processes; it runs train.py with `command`."""
    launch = (
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", script, TRAIN,
    )  # fmt: skip
    return subprocess.run(
        [*map(str, launch), *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=400
    )


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_signal_to_launcher(engine, tiny, environment, launch_command, tmp_path):
    """A signal to the launcher, as from a scheduler, ends all processes after a checkpoint.

    More signals to the ranks change nothing.
    """
    command = (*tiny.train, "batch_size=8", "steps=60", "checkpoint.every=1000", "run=r")
    training = Training(launch_command(engine, *command), tmp_path, environment)
    try:
        training.wait_for(lambda: (training.run / "metrics.jsonl").is_file() and rows(training.run))
        everybody = training.everybody()
        training.process.terminate()
        time.sleep(0.02)
        for process in everybody[1:]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        assert training.process.wait(timeout=200) != 0
        _, alive = psutil.wait_procs(everybody, timeout=10)
        assert not alive, "nothing is left behind"
    finally:
        training.clear()
    assert "the same command continues" in training.log.read_text()
    stopped = rows(training.run)[-1]["step"]
    assert 10 <= stopped < 60 and saved(training.run) == [stopped]
    training = Training(launch_command(engine, *command), tmp_path, environment)
    try:
        assert f"step {stopped} of 60" in training.end()
    finally:
        training.clear()
    assert len(losses(training.run)) == 60


SIGNALLED = """
import os, runpy, signal, sys
from wantrain.training.engine.engine import Stepper

clip, seen = Stepper.clip_gradients, []

def signalled(self):
    seen.append(self)
    if os.environ["RANK"] == "1" and len(seen) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return clip(self)

Stepper.clip_gradients = signalled
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_signal_to_one_rank(tiny, environment, call, tmp_path):
    """A signal that one of two processes receives stops both at the same step."""
    command = (*tiny.train, "batch_size=8", "steps=6", "checkpoint.every=100", "run=two")
    (tmp_path / "signalled.py").write_text(SIGNALLED)
    ended = launched_twice("signalled.py", command, tmp_path, environment)
    assert ended.returncode != 0 and "stopped by a signal, after a checkpoint" in ended.stdout, ended.stderr
    run = tmp_path / "runs" / "two"
    assert saved(run) == [3] and len(losses(run)) == 3
    assert "step 3 of 6" in call("train.py", *command).stdout and len(losses(run)) == 6


@pytest.mark.slow
def test_two_processes(tiny, environment, call, tmp_path):
    """Two processes train as one process does, and one process can continue their run."""
    command = (*tiny.train, "batch_size=8", "steps=6", "checkpoint.every=3")
    call("train.py", *command, "run=one")
    (tmp_path / "two.py").write_text(TWO)
    ended = launched_twice("two.py", (*command, "run=two"), tmp_path, environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for rank in (0, 1):
        assert json.loads((tmp_path / f"rank_{rank}.json").read_text()) == {"processes": 2, "kind": "MULTI_CPU"}
    one, two = tmp_path / "runs" / "one", tmp_path / "runs" / "two"
    assert near(two, one) < 1e-5
    assert ended.stdout.count("step 6/6  loss") == 1, "only the main process speaks"
    rewind(two, 3)
    assert "step 3 of 6" in call("train.py", *command, "run=two").stdout
    assert near(two, one) < 1e-5


SMALL_FILES = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit is an error then, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("background", [pytest.param(each, marks=pytest.mark.slow) for each in ("true", "false")])
def test_checkpoint_write_failure(background, tiny, environment, call, tmp_path):
    """A checkpoint that cannot be written is one error, and the checkpoint before it stays."""
    run = tmp_path / "runs" / "r"
    command = (*tiny.train, "run=r", "batch_size=2", "checkpoint.every=2", f"checkpoint.background={background}")
    call("train.py", *command, "steps=2")
    (tmp_path / "small.py").write_text(SMALL_FILES)

    def limited(*more):
        started = [sys.executable, "small.py", str(TRAIN), *command, "steps=8", *more]
        return subprocess.run(started, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    for more in ((), ("checkpoint.on_failure=continue",)):
        ended = limited(*more)
        (error,) = (line for line in ended.stderr.splitlines() if line.startswith("error: "))
        assert ended.returncode == 2 and "step_00000" in error and "could not be written" in error and "runs=" in error
        assert bool(more) == ("the last checkpoint is missing" in error)
        assert bool(more) == ("training goes on, and the next save tries again" in ended.stdout)
        assert saved(run) == [2] and not list((run / "checkpoints").glob(".*"))
    assert "step 2 of 8" in call("train.py", *command, "steps=8").stdout
    assert saved(run)[-1] == 8 and len(losses(run)) == 8
