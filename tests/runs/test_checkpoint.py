"""Checkpoints can be trusted: killed at any moment, on a full or refusing disk, or tampered with, the last is good."""

import contextlib
import errno
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from wantrain.models.formats.weights import read_file, write_file, write_part
from wantrain.runs import checkpoint
from wantrain.runs.checkpoint import STATE, Checkpoints, Copier, damaged_files, read_state, steps_to_keep
from wantrain.util.files import file_hash


def content(value, numbers=64):
    """write(folder) as a run has it: a part with its config, the optimizer's tensors beside it, and a folder more."""

    def write(folder):
        hashes = write_part(folder / "transformer", {"value": value}, {"w": torch.full((numbers,), float(value))})
        path = folder / "optimizer.safetensors"
        hashes[path] = write_file(path, {"w/exp_avg": torch.full((numbers,), -float(value))})
        (folder / "more").mkdir()
        (folder / "more" / "notes.txt").write_text("not synced by whoever wrote it")
        return hashes

    return write


def value_of(folder):
    """What `content` wrote; every tensor must agree."""
    tensors = read_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")[0]["w"]
    moments = read_file(folder / "optimizer.safetensors")[0]["w/exp_avg"]
    assert tensors.unique().tolist() == [-moments[0]] and (moments == moments[0]).all()
    assert json.loads((folder / "transformer" / "config.json").read_text()) == {"value": tensors[0].item()}
    return tensors[0].item()


def store(folder, **settings):
    """Checkpoints in `folder`, made ready."""
    checkpoints = Checkpoints(folder, **{"keep": 2, **settings})
    checkpoints.prepare()
    return checkpoints


def steps(checkpoints):
    return [int(path.name.removeprefix("step_")) for path in checkpoints.complete()]


def hidden(folder):
    return sorted(path.name for path in folder.glob(".*"))


KILLED = 9
OPEN = io.open


def in_child(work):
    """What `work()` returns, as json, run in a forked child, which may lower its own limits; None if it was KILLED."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, json.dumps(work()).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED), "the child broke; its traceback is above"
    return json.loads(said) if code == 0 else None


def refused(work, *args, **kwargs):
    """The message of the ValueError that work(...) raises."""
    with pytest.raises(ValueError) as error:
        work(*args, **kwargs)
    return str(error.value)


both = pytest.mark.parametrize("background", [False, True], ids=["at once", "background"])


# What is stored -------------------------------------------------------------------------------------------------------


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


# Retention ------------------------------------------------------------------------------------------------------------


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


# Killed at every boundary (R3, R17) -----------------------------------------------------------------------------------


class TornFile:
    """A file open for writing that has two moments for each write: before it, and with half of it on the disk."""

    def __init__(self, file, moment):
        self.file, self.moment = file, moment

    def write(self, data):
        self.moment("write")
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.moment("half a write")
        return self.file.write(data[len(data) // 2 :])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


class Operations:
    """Every operation on the file system of a save, counted; at the n-th the process dies as by kill -9.

    Death comes before an operation; every write to a file also has a moment half-way.
    """

    watched = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "chmod", "open")

    def __init__(self, die_at):
        self.die_at, self.names = die_at, []

    def moment(self, name):
        self.names.append(name)
        if len(self.names) == self.die_at:
            os._exit(KILLED)

    def watch(self, name, real):
        def watched(*args, **kwargs):
            self.moment(name)
            return real(*args, **kwargs)

        return watched

    def opened(self, path, mode="r", *args, **kwargs):
        self.moment("io.open")
        file = OPEN(path, mode, *args, **kwargs)
        return TornFile(file, self.moment) if "w" in mode else file

    @contextlib.contextmanager
    def hooked(self):
        with contextlib.ExitStack() as stack:
            for name in self.watched:
                real = (lambda handle: None) if name == "fsync" else getattr(os, name)  # a kill, not a power cut
                stack.enter_context(mock.patch.object(os, name, self.watch(name, real)))
            stack.enter_context(mock.patch.object(io, "open", self.opened))
            yield self


def saved_or_killed(folder, step, value, die_at, **settings):
    """Save in a forked child that dies at operation `die_at`; the operations it did, or None if it died."""

    def work():
        checkpoints = Checkpoints(folder, **settings)
        with Operations(die_at).hooked() as operations:
            checkpoints.save(step, content(value), {"data": value})
            checkpoints.wait()
        return operations.names

    return in_child(work)


@both
@pytest.mark.parametrize(
    ("step", "settings"),
    [(4, {"keep": 1}), (3, {"keep": 1}), (4, {"keep": 2, "keep_best": True})],
    ids=["the one before is purged", "the same step again", "an older one is purged"],
)
def test_kill_during_save(step, settings, background, tmp_path):
    """After a kill at any operation of a save, the newest checkpoint is the old or the new one."""
    before = tmp_path / "before"
    for old in (1, 2, 3):
        store(before, keep=3).save(old, content(old), {"data": old}, score=float(old))
    settings = {**settings, "background": background}
    for old in (1, 2) if settings["keep"] == 1 else ():
        shutil.rmtree(before / f"step_00000{old}")
    seen = []
    for die_at in itertools.count(1):
        folder = tmp_path / str(die_at)
        shutil.copytree(before, folder)
        done = saved_or_killed(folder, step, 4, die_at, **settings)
        checkpoints = Checkpoints(folder, **settings)
        for path in folder.glob("step_*"):  # whatever carries a final name is whole, its state.json included
            assert damaged_files(path) == [] and value_of(path) in (1, 2, 3, 4)
        checkpoints.prepare()
        assert hidden(folder) == []
        newest = checkpoints.newest()
        seen.append(value_of(newest))
        assert read_state(newest)["data"] == seen[-1] and seen[-1] in (3, 4)
        checkpoints.save(5, content(5), {})  # and it goes on
        checkpoints.wait()
        assert value_of(checkpoints.newest()) == 5 and hidden(folder) == []
        shutil.rmtree(folder)
        if done is not None:
            break
    assert seen == sorted(seen) and seen[0] == 3 and seen[-1] == 4  # one commit, once and for all
    assert len(seen) == len(done) + 1 > 30
    assert {"write", "half a write", "fsync", "rename", "unlink", "rmdir", "mkdir", "io.open"} <= set(done)


def test_sync_order(tmp_path):
    """Every file is synced before the rename, and the rename before anything is deleted."""
    checkpoints = store(tmp_path, keep=1)
    checkpoints.save(1, content(1), {})
    done, real = [], {name: getattr(os, name) for name in ("fsync", "rename", "rmdir", "unlink")}

    def fsync(handle):
        done.append(("fsync", Path(f"/proc/self/fd/{handle}").readlink().name))

    def rename(source, target, **kwargs):
        done.append(("rename", Path(target).name))
        real["rename"](source, target, **kwargs)

    def rmdir(path, **kwargs):
        done.append(("rmdir", Path(path).name))
        real["rmdir"](path, **kwargs)

    with mock.patch.multiple(os, fsync=fsync, rename=rename, rmdir=rmdir):
        checkpoints.save(2, content(2), {})
    commit = done.index(("rename", "step_000002"))
    files = [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "optimizer.safetensors",
        "transformer",
        "notes.txt",
        "more",
    ]
    assert {("fsync", name) for name in [*files, ".step_000002.tmp"]} <= set(done[:commit])
    assert any(what == "fsync" and name.startswith(".state.json") for what, name in done[:commit])
    assert done[commit + 1 :][:3] == [
        ("fsync", tmp_path.name), ("rename", ".step_000001.gone"), ("fsync", tmp_path.name),
    ]  # fmt: skip
    assert ("rmdir", ".step_000001.gone") in done[commit + 4 :] and not any(
        what == "rmdir" for what, _ in done[:commit]
    )


# A disk that refuses (R5) ---------------------------------------------------------------------------------------------


@both
def test_full_disk(background, tmp_path):
    """A full disk is reported before anything is written."""
    checkpoints = store(tmp_path / "c", background=background)
    checkpoints.save(1, content(1), {})
    checkpoints.wait()
    usage = shutil._ntuple_diskusage(10**12, 10**12 - 5_000_000, 5_000_000)
    with mock.patch.object(checkpoint.shutil, "disk_usage", return_value=usage):
        error = refused(checkpoints.save, 2, pytest.fail, {}, size=2_000_000_000)
    assert f"checkpoint {tmp_path}/c/step_000002 of 2,000,000,000 bytes could not be written" in error
    assert "disk full: 5,000,000 bytes are free, 2,016,777,216 needed; free disk space" in error
    assert checkpoints.failure == error and hidden(tmp_path / "c") == []
    assert value_of(checkpoints.newest()) == 1
    checkpoints.save(2, content(2), {}, size=2000)
    checkpoints.wait()
    assert value_of(checkpoints.newest()) == 2 and checkpoints.failure is None


@both
@pytest.mark.parametrize("on_failure", ["stop", "continue"])
def test_file_size_limit(on_failure, background, tmp_path):
    """A limit that is met while writing leaves the checkpoint before, and no incomplete one.

    The kernel really refuses in the middle of a file: none may pass 64 KiB.
    """
    settings = {"background": background, "on_failure": on_failure}

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        checkpoints = store(tmp_path, **settings)
        said, raised = io.StringIO(), None
        checkpoints.save(1, content(1), {})
        with contextlib.redirect_stdout(said):
            try:
                checkpoints.save(2, content(2, numbers=1 << 16), {}, size=1 << 18)
                checkpoints.wait()
            except ValueError as error:
                raised = str(error)
        left = hidden(tmp_path), steps(checkpoints)
        failed = checkpoints.failure
        checkpoints.save(3, content(3), {})  # the next is tried again
        checkpoints.wait()
        return raised, said.getvalue(), left, failed, checkpoints.failure

    raised, said, left, failed, after = in_child(work)
    words = f"checkpoint {tmp_path}/step_000002 of 262,144 bytes could not be written: "
    assert failed.startswith(words) and "[Errno 27] File too large; raise the largest file size" in failed
    assert raised == (failed if on_failure == "stop" else None) and after is None
    assert (failed in said) == (background or on_failure == "continue")
    assert ("training goes on, and the next save tries again" in said) == (on_failure == "continue")
    assert left == [[], [1]]
    assert value_of(tmp_path / "step_000001") == 1 and value_of(Checkpoints(tmp_path, keep=2).newest()) == 3


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("where", ["mkdir", "fsync", "rename", "io.open"])
def test_disk_errors(number, where, tmp_path):
    """Whatever operation the disk refuses, the error has its name, and no partial file stays."""
    checkpoints = store(tmp_path)
    checkpoints.save(1, content(1), {})
    owner, name = (io, "open") if where == "io.open" else (os, where)
    with mock.patch.object(owner, name, side_effect=OSError(number, os.strerror(number))):
        error = refused(checkpoints.save, 2, content(2), {}, size=10)
    assert f"step_000002 of 10 bytes could not be written: [Errno {number}] {os.strerror(number)}; " in error
    assert "runs=" in error and hidden(tmp_path) == []
    assert steps(checkpoints) == [1] and value_of(checkpoints.newest()) == 1


def test_failed_replacement(tmp_path):
    """If a replacement cannot be renamed, the old checkpoint is put back."""
    checkpoints, real = store(tmp_path), os.rename
    checkpoints.save(1, content(1), {})

    def rename(source, target):
        if Path(source).name.endswith(".tmp"):
            raise OSError(errno.EIO, "no")
        real(source, target)

    with mock.patch.object(os, "rename", rename):
        refused(checkpoints.save, 1, content(2), {})
    assert value_of(checkpoints.newest()) == 1 and hidden(tmp_path) == []


def test_read_only_folder():
    """The error for a folder that cannot be written names it."""
    with tempfile.TemporaryDirectory() as scratch:
        closed = Path(scratch) / "closed"
        closed.mkdir()
        Path(scratch).chmod(0o755)
        closed.chmod(0o555)

        def work():
            if os.geteuid() == 0:
                os.setuid(65534)  # root may write anywhere; nobody may not
            checkpoints = Checkpoints(closed, keep=1)
            return refused(checkpoints.save, 1, content(1), {}), refused(Checkpoints(closed / "deeper", keep=1).prepare)

        saving, preparing = in_child(work)
        closed.chmod(0o755)
    assert saving.startswith(f"checkpoint {closed}/step_000001 could not be written: [Errno 13] Permission denied")
    assert "make the folder writable" in saving
    assert preparing.startswith(f"checkpoints cannot be kept in {closed}/deeper: [Errno 13] Permission denied")


def test_file_in_place_of_folder(tmp_path):
    """The error for a file in the place of the folder names it."""
    (tmp_path / "c").touch()
    assert f"checkpoints cannot be kept in {tmp_path}/c: [Errno 17] File exists" in refused(
        Checkpoints(tmp_path / "c", keep=1).prepare
    )
    checkpoints = Checkpoints(tmp_path / "gone", keep=1)
    assert "step_000001 could not be written: [Errno 2] No such file" in refused(checkpoints.save, 1, content(1), {})


@both
@pytest.mark.parametrize("on_failure", ["stop", "continue"])
def test_bug_is_no_disk_error(on_failure, background, tmp_path):
    """An error of the code is raised as it is, and is not reported as an error of the disk."""
    checkpoints = store(tmp_path, background=background, on_failure=on_failure)

    def bug(folder):
        (folder / "half").write_bytes(b"x")
        raise TypeError("a bug")

    def overlapping(folder):
        whole = torch.zeros(4)
        save_file({"a": whole, "b": whole}, folder / "x.safetensors")

    for write, kind in ((bug, TypeError), (overlapping, RuntimeError)):
        with pytest.raises(kind):
            checkpoints.save(1, write, {})
            checkpoints.wait()
        assert hidden(tmp_path) == [] and steps(checkpoints) == []
    checkpoints.wait()  # told once


# In the background ----------------------------------------------------------------------------------------------------


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


# Snapshots ------------------------------------------------------------------------------------------------------------


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


# Tampered with (R12) --------------------------------------------------------------------------------------------------


class Payload:
    """What runs if anybody unpickles it."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def two(tmp_path):
    """Checkpoints of steps 1 and 2."""
    checkpoints = store(tmp_path / "c")
    for step in (1, 2):
        checkpoints.save(step, content(step), {})
    return checkpoints


def rewritten(folder, **changes):
    """state.json with other values."""
    (folder / STATE).write_text(json.dumps({**read_state(folder), **changes}))


@pytest.mark.parametrize("name", ["adapter.pt", "transformer/diffusion_pytorch_model.bin", "x.pkl", "x.pth"])
def test_pickle_refused(name, two, tmp_path):
    """A pickle in a checkpoint is refused and never run."""
    payload = pickle.dumps(Payload(tmp_path / "ran"))
    planted = two.newest() / name
    planted.write_bytes(payload)
    error = refused(two.newest)
    assert f"step_000002 holds {name}, which wantrain did not write; remove that" in error
    planted.unlink()
    assert value_of(two.newest()) == 2
    # In the place of a file that belongs there, with the hash that fits.
    planted = two.newest() / "optimizer.safetensors"
    planted.write_bytes(payload)
    rewritten(planted.parent, files={**read_state(planted.parent)["files"], planted.name: file_hash(planted)})
    assert "optimizer.safetensors cannot be read as safetensors" in refused(read_file, two.newest() / planted.name)
    assert not (tmp_path / "ran").exists()


def test_planted_index_refused(two):
    """An index that points to other files is refused, and a text note does no harm."""
    (two.newest() / "NOTES.txt").write_text("the good one")
    (two.newest() / ".DS_Store").touch()
    assert value_of(two.newest()) == 2
    index = two.newest() / "transformer" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "../../../x.safetensors"}}))
    assert "holds transformer/model.safetensors.index.json, which wantrain did not write" in refused(two.newest)


def peak():
    """Bytes of this process's memory that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.parametrize("length", [2**60, 2**64 - 1, 10**9])
def test_huge_header(length, two):
    """A header that claims to be huge is an error and takes no memory."""
    folder = two.newest()
    planted = folder / "optimizer.safetensors"
    planted.write_bytes(length.to_bytes(8, "little") + b"{" * 100)
    before = peak()
    rewritten(folder, files={**read_state(folder)["files"], planted.name: file_hash(planted)})
    assert "optimizer.safetensors cannot be read as safetensors" in refused(read_file, two.newest() / planted.name)
    assert peak() - before < 50 << 20


@pytest.mark.parametrize("name", ["../x", "transformer/../../x", "/etc/hostname", "a/..", ""])
def test_state_with_outside_paths(name, two, tmp_path, capsys):
    """A checkpoint whose state names files outside its folder is skipped, and those files stay unopened."""
    newest = two.newest()
    (newest.parent / "x").write_text("secret")
    rewritten(newest, files={**read_state(newest)["files"], name: "0" * 64})
    opened = []
    with mock.patch.object(checkpoint, "file_hash", side_effect=lambda path: opened.append(path) or "0" * 64):
        assert damaged_files(newest)
    assert all(".." not in path.parts and newest in path.parents for path in opened)
    assert value_of(two.newest()) == 1
    assert f"warning: {newest} is damaged (" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "null", '{"step": 2}', '{"files": ["a"]}', '{"files": null}', '{"files": {"a": 1}}', "\ud800",
        "[" * 100_000, '{"files": {"a\\u0000b": "0"}}', '{"files": {"' + "a" * 5000 + '": "0"}}',
    ],
)  # fmt: skip
def test_malformed_state(text, two, capsys):
    """A checkpoint with a malformed state is skipped."""
    newest = two.newest()
    (newest / STATE).write_text(text, errors="surrogatepass")
    assert value_of(two.newest()) == 1 and f"{newest} is damaged" in capsys.readouterr().out
    two.keep_best = True
    two.save(3, content(3), {}, score=1.0)  # nor does it stop the purge, which looks for scores
    assert value_of(two.newest()) == 3


def test_huge_state_and_pipe(two, capsys):
    """A huge state is not read, and a pipe is not waited for."""
    newest = two.newest()
    os.truncate(newest / STATE, 1 << 40)
    before = peak()
    assert value_of(two.newest()) == 1 and peak() - before < 50 << 20
    older = newest.with_name("step_000001")
    (older / "optimizer.safetensors").unlink()
    os.mkfifo(older / "optimizer.safetensors")
    assert two.newest() is None
    assert "(optimizer.safetensors)" in capsys.readouterr().out
