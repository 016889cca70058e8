"""A checkpoint that all processes write together: the same files, one error for all, whole or absent after a kill."""

import errno
import itertools
import json
import os
import re
import shutil
import signal
import threading
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from checkpoint_helpers import KILLED, both, hidden, store, value_of
from kills import Operations

from wantrain.models.formats.joint_file import Slice
from wantrain.models.formats.weights import PART
from wantrain.runs.checkpoint import Checkpoints, damaged_files, read_state
from wantrain.training.engine import joint_save
from wantrain.training.engine.joint_save import Crew, JointSaver, Tensors
from wantrain.util import files

NUMBERS = 10


def even(value, rank, processes):
    start, end = (NUMBERS * each // processes for each in (rank, rank + 1))
    return Slice(torch.Size([NUMBERS]), torch.float32, start, end - start, lambda: torch.full((end - start,), value))


def tensors(value, rank, processes):
    """What `content` of the other checkpoint tests has, in parts."""
    own = {"w": even(float(value), rank, processes)}
    moments = {"w/exp_avg": even(-float(value), rank, processes)}
    return [Tensors("transformer", PART, own, config={"value": value}), Tensors("", "optimizer", moments)]


def save(folder, step, value, crew, *, background=False, **settings):
    """One process's share of a save, as the loop does it."""
    checkpoints = Checkpoints(folder, **{"keep": 2, "background": background, **settings})
    saver = JointSaver(crew, background=background)
    mine = tensors(value, crew.rank, crew.processes)
    if background:
        mine = [each.copied(torch.clone) for each in mine]
    joint = saver.begin(mine)
    if crew.rank == 0:
        checkpoints.save(step, joint.write, {"data": value}, size=joint.size, ended=joint.ended)
        checkpoints.finish()
    saver.wait()


def in_threads(processes, work):
    """work(crew) in a thread each; the errors, by rank."""
    words, errors = dist.HashStore(), {}

    def run(rank):
        try:
            work(Crew(rank, processes, words))
        except BaseException as error:
            errors[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return errors


@both
@pytest.mark.parametrize("processes", [1, 2, 5])
def test_joint_checkpoint(processes, background, tmp_path):
    """Any number of processes write the checkpoint that one writes, with the hash of every file."""
    checkpoints = store(tmp_path)
    assert in_threads(processes, lambda crew: save(tmp_path, 3, 7, crew, background=background)) == {}
    newest = checkpoints.newest()
    assert value_of(newest) == 7 and damaged_files(newest) == [] and hidden(tmp_path) == []
    assert list(read_state(newest)["files"]) == [
        "optimizer.safetensors", "transformer/config.json", f"transformer/{PART}.safetensors",
    ]  # fmt: skip


def test_words_of_a_save(tmp_path):
    """Words in the store grow with the processes, not with their square."""
    count, words = 12, mock.Mock(wraps=dist.HashStore())

    def alone(crew):
        save(tmp_path, 3, 7, Crew(crew.rank, count, words))

    assert in_threads(count, alone) == {}
    assert words.get.call_count <= 5 * count and words.set.call_count <= 2 * count + 4
    assert value_of(store(tmp_path).newest()) == 7


@both
@pytest.mark.parametrize("culprit", [0, 2])
@pytest.mark.parametrize("on_failure", ["stop", "continue"])
def test_full_disk_in_one_process(culprit, on_failure, background, tmp_path, capsys):
    """A full disk under one process is one error of the main one, with its file; the checkpoint before it stays."""
    checkpoints = store(tmp_path)
    assert in_threads(3, lambda crew: save(tmp_path, 3, 7, crew)) == {}
    fill = joint_save.fill_file

    def full(path, slices):
        if slices[next(iter(slices))].start == NUMBERS * culprit // 3 and path.name == "optimizer.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        fill(path, slices)

    with mock.patch.object(joint_save, "fill_file", full):
        errors = in_threads(3, lambda crew: save(tmp_path, 4, 8, crew, background=background, on_failure=on_failure))
    assert errors.keys() == {0}, "finish says that the last checkpoint is missing, whatever on_failure"
    said = str(errors[0])
    assert (
        isinstance(errors[0], ValueError)
        and f"No space left on device (process {culprit} on {os.uname().nodename})" in said
    )
    assert "optimizer.safetensors" in said and "free disk space" in said
    assert value_of(checkpoints.newest()) == 7 and hidden(tmp_path) == []


def test_refused_before_it_begins(tmp_path):
    """Where the main process does not begin, for lack of space, the others do not wait for it."""
    store(tmp_path)
    huge = mock.patch.object(Tensors, "nbytes", property(lambda self: 1 << 60))
    with huge:
        errors = in_threads(3, lambda crew: save(tmp_path, 3, 7, crew))
    assert errors.keys() == {0} and "disk full" in str(errors[0])


def test_file_that_shows_late(tmp_path, monkeypatch):
    """Files that the main process has created are waited for where a network disk shows them late; one that it never
    shows is one error, with the machine.
    """
    monkeypatch.setattr(files, "SHOWN", 0.3)
    checkpoints, looks, real = store(tmp_path), itertools.count(), files._shows

    main = []

    def late(path, size):
        return threading.current_thread() in main or (next(looks) > 3 and real(path, size))

    def work(crew):
        if crew.rank == 0:
            main.append(threading.current_thread())
        save(tmp_path, 3, 7, crew)

    monkeypatch.setattr(files, "_shows", late)
    assert in_threads(2, work) == {} and value_of(checkpoints.newest()) == 7 and next(looks) > 4
    monkeypatch.setattr(files, "_shows", lambda path, size: threading.current_thread() in main)
    errors = in_threads(2, work)
    assert errors.keys() == {0} and f"No such file or directory (process 1 on {os.uname().nodename})" in str(errors[0])
    assert value_of(checkpoints.newest()) == 7 and hidden(tmp_path) == []


def test_fault_in_one_process(tmp_path):
    """An exception in one process ends the save in all: that process raises it, the main one says whose it was."""
    store(tmp_path)

    def broken(path, slices):
        if slices[next(iter(slices))].start:
            raise KeyError("w")
        return

    with mock.patch.object(joint_save, "fill_file", broken):
        errors = in_threads(2, lambda crew: save(tmp_path, 3, 7, crew))
    assert isinstance(errors[1], KeyError)
    assert isinstance(errors[0], RuntimeError) and re.search("process 1 on .* could not write its part", str(errors[0]))
    assert store(tmp_path).newest() is None and hidden(tmp_path) == []


def forked(work):
    """A child process that does `work()`; its number."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        os._exit(1)


def saved_or_killed(folder, step, value, victim, die_at, words, **settings):
    """Save by two processes of which one dies at its operation `die_at`, and the launcher then kills the other.

    Returns the operations of that process, or None if it died.
    """
    done = words.with_suffix(".operations")

    def work(rank):
        crew = Crew(rank, 2, dist.FileStore(str(words), 2))
        with Operations(die_at if rank == victim else 0).hooked() as operations:
            save(folder, step, value, crew, **settings)
        if rank == victim:
            done.write_text(json.dumps(operations.names))

    children = {rank: forked(lambda rank=rank: work(rank)) for rank in (0, 1)}
    code = os.waitstatus_to_exitcode(os.waitpid(children[victim], 0)[1])
    assert code in (0, KILLED)
    if code == KILLED:
        os.kill(children[1 - victim], signal.SIGKILL)
    other = os.waitstatus_to_exitcode(os.waitpid(children[1 - victim], 0)[1])
    assert code == KILLED or other == 0
    return None if code == KILLED else json.loads(done.read_text())


@pytest.mark.parametrize(
    ("victim", "background"),
    [(0, False), (1, False), *(pytest.param(victim, True, marks=pytest.mark.slow) for victim in (0, 1))],
    ids=["main", "other", "main in background", "other in background"],
)
def test_kill_during_joint_save(victim, background, tmp_path):
    """After a kill of either process at any operation, the newest checkpoint is the old or the new one."""
    before = tmp_path / "before"
    store(before)
    in_threads(2, lambda crew: save(before, 3, 3, crew))
    seen = []
    for die_at in itertools.count(1):
        folder = tmp_path / str(die_at)
        shutil.copytree(before, folder)
        words = tmp_path / f"words{die_at}"
        done = saved_or_killed(folder, 4, 4, victim, die_at, words, background=background, keep=1)
        for path in folder.glob("step_*"):
            assert damaged_files(path) == [] and value_of(path) in (3, 4)
        checkpoints = store(folder)
        assert hidden(folder) == []
        seen.append(value_of(checkpoints.newest()))
        shutil.rmtree(folder)
        if done is not None:
            break
    assert seen[0] == 3 and seen[-1] == 4
    if victim == 0:
        assert seen == sorted(seen), "one commit, once and for all"
    assert {"open", "pwrite", "fsync"} <= set(done)
