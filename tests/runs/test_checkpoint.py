"""Checkpoints: what is stored, which stay, and saving in the background."""

import errno
import hashlib
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from checkpoint_helpers import both, content, hidden, refused, steps, store, value_of
from safetensors.torch import save_file

from wantrain.models.formats.weights import read_file
from wantrain.runs import checkpoint
from wantrain.runs.checkpoint import STATE, Checkpoints, Copier, read_state, steps_to_keep
from wantrain.util.files import file_hash


@both
def test_checkpoint_state(background, tmp_path):
    """The state of a checkpoint records the versions that wrote it and the files in it."""
    checkpoints = store(tmp_path / "c", background=background)
    state = {"data": "abc", "samples": 12, "nested": {"a": [1]}}
    checkpoints.save(3, content(1), state, size=1000, score=0.25)
    state["nested"]["a"].append(2)  # what happens later is not in the checkpoint
    checkpoints.wait()
    said = read_state(checkpoints.newest())
    assert {key: said[key] for key in ("data", "samples", "step", "score")} == {
        "data": "abc", "samples": 12, "step": 3, "score": 0.25,
    }  # fmt: skip
    assert background is False or said["nested"] == {"a": [1]}
    assert {"python", "wantrain", "torch", "accelerate", "deepspeed", "peft"} == said["versions"].keys()
    assert said["versions"]["torch"] == torch.__version__
    assert list(said["files"]) == [
        "more/notes.txt",
        "optimizer.safetensors", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    assert checkpoints.failure is None and hidden(tmp_path / "c") == []


@both
def test_hash_while_writing(background, tmp_path):
    """Tensors are hashed while they are written, and are never read again."""
    checkpoints, real, read = store(tmp_path, background=background), file_hash, []
    with mock.patch.object(checkpoint, "file_hash", lambda path: read.append(path.name) or real(path)):
        checkpoints.save(3, content(1), {})
        checkpoints.wait()
    assert sorted(read) == ["config.json", "notes.txt"]
    newest = checkpoints.newest()
    files = [path for path in newest.rglob("*") if path.is_file() and path.name != STATE]
    assert read_state(newest)["files"] == {
        path.relative_to(newest).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def test_step_order(tmp_path):
    """Steps beyond a million come after those below."""
    checkpoints = store(tmp_path, keep=3)
    for step in (999_998, 999_999, 1_000_000, 10_000_000):
        checkpoints.save(step, content(step % 1000), {})
    assert steps(checkpoints) == [999_999, 1_000_000, 10_000_000]
    assert value_of(checkpoints.newest()) == 0 and checkpoints.newest().name == "step_10000000"
    for other in ("step_12", "step_final", "step_0000001", "step_000001x"):
        (tmp_path / other).mkdir()
        (tmp_path / other / STATE).write_text("{}")
    assert len(checkpoints.complete()) == 3


@pytest.mark.parametrize(
    ("scores", "keep", "keep_every", "keep_best", "stay"),
    [
        ({1: None, 2: None, 3: None}, 2, None, False, {2, 3}),
        ({1: None, 2: None, 3: None}, 9, None, False, {1, 2, 3}),
        ({}, 1, 5, True, set()),
        ({5: None, 6: None, 10: None, 11: None}, 1, 5, False, {5, 10, 11}),
        ({1: 0.5, 2: 0.1, 3: 0.9}, 1, None, True, {2, 3}),
        ({1: 0.5, 2: 0.1, 3: 0.9}, 1, None, False, {3}),
        ({1: 0.1, 2: 0.1, 3: 0.9}, 1, None, True, {1, 3}),  # a tie: the older
        ({1: None, 2: math.nan, 3: 0.9, 4: None}, 1, None, True, {3, 4}),
        ({1: None, 2: math.nan, 3: None}, 1, None, True, {3}),
        ({1: -1.0, 4: 7.0, 5: 3.0, 6: 2.0, 7: 1.0}, 2, 4, True, {1, 4, 6, 7}),
        ({999_999: None, 1_000_000: None}, 1, None, False, {1_000_000}),
    ],
)
def test_steps_to_keep(scores, keep, keep_every, keep_best, stay):
    """The rule keeps the newest, every n-th and the best step, whatever the order of the scores."""
    assert steps_to_keep(scores, keep, keep_every, keep_best) == stay
    shuffled = list(scores.items())
    random.Random(1).shuffle(shuffled)
    assert steps_to_keep(dict(shuffled), keep, keep_every, keep_best) == stay


def test_retention_on_disk(tmp_path):
    """The checkpoints on disk are those that the rule keeps, also for a new process."""
    checkpoints = store(tmp_path, keep=2, keep_every=4, keep_best=True)
    losses = {1: 0.9, 2: 0.3, 3: None, 4: 0.5, 5: math.nan, 6: 0.3, 7: 0.8, 8: 0.7, 9: 0.6}
    for number, (step, score) in enumerate(losses.items(), 1):
        checkpoints.save(step, content(step), {}, score=score)
        assert set(steps(checkpoints)) >= {step, *list(losses)[max(0, number - 2) : number]}
    assert steps(checkpoints) == [2, 4, 8, 9]
    assert read_state(tmp_path / "step_000002")["score"] == 0.3
    checkpoints.save(10, content(10), {}, score=0.1)
    assert steps(checkpoints) == [4, 8, 9, 10]
    # A new process, which has only what the folders say.
    again = store(tmp_path, keep=1, keep_best=True)
    again.save(11, content(11), {}, score=0.2)
    assert steps(again) == [10, 11]


def test_damaged_later_checkpoint(tmp_path):
    """A damaged checkpoint of a later step does not displace the good ones."""
    checkpoints = store(tmp_path, keep=1)
    checkpoints.save(9, content(9), {})
    (tmp_path / "step_000009" / "optimizer.safetensors").write_bytes(b"lost")
    checkpoints.save(6, content(6), {})  # as after a resume from before
    assert steps(checkpoints) == [6, 9]
    assert value_of(checkpoints.newest()) == 6
    checkpoints.save(9, content(10), {})
    assert steps(checkpoints) == [9] and value_of(checkpoints.newest()) == 10 and hidden(tmp_path) == []


def test_failed_removal(tmp_path, capsys):
    """A checkpoint that cannot be removed is reported, and removed at the next save."""
    checkpoints = store(tmp_path, keep=1)
    checkpoints.save(1, content(1), {})
    with mock.patch.object(checkpoint.shutil, "rmtree", side_effect=OSError(errno.EBUSY, "busy")):
        checkpoints.save(2, content(2), {})
    assert "could not be removed: [Errno 16] busy" in capsys.readouterr().out
    assert steps(checkpoints) == [2] and hidden(tmp_path) == [".step_000001.gone"]
    checkpoints.save(3, content(3), {})
    assert steps(checkpoints) == [3] and hidden(tmp_path) == [] and capsys.readouterr().out == ""


def test_background_save(tmp_path):
    """Training continues while a checkpoint is written, and the next save waits for it."""
    checkpoints, going = store(tmp_path, background=True), threading.Event()
    order = []

    def slow(folder):
        going.wait(10)
        order.append("first")
        content(1)(folder)

    def next_one(folder):
        order.append("second")
        content(2)(folder)

    checkpoints.save(1, slow, {})
    assert steps(checkpoints) == [] and hidden(tmp_path) in ([], [".step_000001.tmp"])
    threading.Timer(0.2, going.set).start()
    started = time.perf_counter()
    checkpoints.save(2, next_one, {})
    assert time.perf_counter() - started > 0.1 and steps(checkpoints)[0] == 1
    checkpoints.wait()
    assert order == ["first", "second"] and steps(checkpoints) == [1, 2]
    assert len({thread.name for thread in threading.enumerate() if "checkpoint" in thread.name}) >= 1


def test_background_failure(tmp_path, capsys):
    """A failure in the background is reported at once and raised at the next save."""
    checkpoints = store(tmp_path, background=True)

    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints.save(1, full, {})
    give_up = time.monotonic() + 10
    while checkpoints.failure is None and time.monotonic() < give_up:
        time.sleep(0.001)
    assert "No space left on device" in refused(checkpoints.save, 2, content(2), {})
    said = capsys.readouterr().out
    assert said.startswith("warning: checkpoint ") and said.count("No space left") == 1
    checkpoints.save(3, content(3), {})
    checkpoints.wait()
    assert steps(checkpoints) == [3]


def test_signals_while_waiting(tmp_path):
    """Signal handlers run while the program waits for a save."""
    checkpoints, going, seen = store(tmp_path, background=True), threading.Event(), []

    def handler(number, frame):
        seen.append(number)
        going.set()

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        checkpoints.save(1, lambda folder: going.wait(10) and content(1)(folder), {})
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        started = time.perf_counter()
        checkpoints.wait()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1] and time.perf_counter() - started < 5 and steps(checkpoints) == [1]


def test_commit_at_exit(tmp_path, environment):
    """A program that ends without waiting still commits its checkpoint."""
    program = """
import sys, time
from pathlib import Path
import torch
from wantrain.models.formats.weights import write_file
from wantrain.runs.checkpoint import Checkpoints

def slow(folder):
    time.sleep(0.5)  # by now the interpreter waits for this thread alone
    write_file(folder / "x.safetensors", {"x": torch.ones(3)})

checkpoints = Checkpoints(Path(sys.argv[1]), keep=1, background=True)
checkpoints.prepare()
checkpoints.save(1, slow, {})
raise RuntimeError("the training broke")
"""
    root = Path(checkpoint.__file__).resolve().parents[2]
    command = [sys.executable, "-c", program, str(tmp_path)]
    ended = subprocess.run(command, env={**environment, "PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert ended.returncode == 1 and "the training broke" in ended.stderr
    newest = Checkpoints(tmp_path, keep=1).newest()
    assert newest is not None and read_file(newest / "x.safetensors")[0]["x"].tolist() == [1, 1, 1]


def test_copier():
    """Copies hold the tensors' values at the time of copying, and later copies use their memory again."""
    source = [
        torch.randn(4, 6).t(),  # not contiguous
        torch.randn(3).bfloat16(),
        torch.tensor(7.0),
        torch.randn(2, requires_grad=True),
        torch.empty(0, 3),
    ]
    copier = Copier()
    first = [copier(tensor) for tensor in source]
    wanted = [tensor.detach().clone() for tensor in source]
    for tensor in source:
        tensor.data.add_(1)
    for copied, value, tensor in zip(first, wanted, source, strict=True):
        assert torch.equal(copied, value) and copied.dtype == tensor.dtype
        assert copied.is_contiguous() and not copied.requires_grad and copied.device.type == "cpu"
    copier.begin()
    second = [copier(tensor) for tensor in source]
    for copied, tensor, before in zip(second, source, first, strict=True):
        assert torch.equal(copied, tensor) and copied.data_ptr() == before.data_ptr()


def test_copier_other_shapes():
    """Memory of another shape or dtype is not used again."""
    copier = Copier()
    first = [copier(torch.zeros(4)) for _ in range(3)]
    copier.begin()
    second = [copier(torch.ones(5)), copier(torch.ones(4).half())]
    assert second[0].shape == (5,) and second[1].dtype == torch.float16
    assert not any(copied.any() for copied in first)


def test_copier_tied_tensors(tmp_path):
    """Tied tensors have separate copies, which can be written."""
    whole, copier = torch.arange(4.0), Copier()
    save_file({"a": copier(whole), "b": copier(whole)}, tmp_path / "x.safetensors")
    assert torch.equal(read_file(tmp_path / "x.safetensors")[0]["b"], whole)
