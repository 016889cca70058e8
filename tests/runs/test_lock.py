"""A run's folder on a disk without locks: a file keeps others out, and is taken over from a holder that is gone."""

import errno
import fcntl
import gc
import json
import os
import signal
import threading
import time
from dataclasses import replace
from unittest import mock

import pytest

from wantrain.runs import lock
from wantrain.runs.lock import HELD, Holder, HolderFile, RunLock
from wantrain.util import progress


@pytest.fixture
def without_locks(monkeypatch):
    """flock as such a disk answers, and seconds that suit a test."""
    for name, seconds in (("RENEWED", 0.02), ("STALE", 0.3), ("LOOK", 0.02)):
        monkeypatch.setattr(lock, name, seconds)

    def flock(*_):  # a new error each time: one that is kept would keep the lock with its traceback
        raise OSError(errno.ENOLCK, "No locks available")

    with mock.patch.object(fcntl, "flock", flock):
        yield


def left(path, holder):
    """A holder's file as a killed process leaves it."""
    path.write_text(json.dumps(vars(holder)))


def elsewhere(**other):
    """A holder on another machine."""
    return replace(Holder.this_process(), host="node7", machine="another", **other)


def refused(folder):
    with pytest.raises(ValueError) as error:
        RunLock(folder)
    return str(error.value)


def test_living_holder(without_locks, tmp_path):
    """A second holder is refused with the name of the first, and let in when that has ended in order."""
    mine = RunLock(tmp_path)
    held = json.loads((tmp_path / HELD).read_text())
    assert (held["process"], held["host"]) == (os.getpid(), os.uname().nodename)
    for _ in range(2):  # being refused changes nothing for the holder
        expected = (
            f"run {tmp_path.name} is being trained by process {os.getpid()} on {os.uname().nodename}; wait or stop it"
        )
        assert refused(tmp_path) == expected
    mine.close()
    assert not (tmp_path / HELD).exists()
    RunLock(tmp_path).close()


def test_lock_that_is_collected(without_locks, tmp_path):
    """A lock that nothing refers to is let go of, with its thread."""
    before = threading.active_count()
    mine = RunLock(tmp_path)
    assert threading.active_count() == before + 1 and (tmp_path / HELD).exists()
    del mine
    gc.collect()
    assert threading.active_count() == before and not (tmp_path / HELD).exists()


def test_killed_on_this_machine(without_locks, tmp_path, monkeypatch, capsys):
    """The file of a process of this machine that was killed is taken over at once."""
    monkeypatch.setattr(lock, "STALE", 1000.0)
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        mine = RunLock(tmp_path)
        os.write(tell, b"held" if mine else b"")
        time.sleep(60)
        os._exit(1)
    assert os.read(ready, 4) == b"held"
    os.kill(child, signal.SIGKILL)
    taken = RunLock(tmp_path)  # before its parent has waited for it, too
    os.waitpid(child, 0)
    assert f"process {child} on {os.uname().nodename} is gone: this process takes over" in capsys.readouterr().out
    taken.close()


def test_reused_process_number(tmp_path):
    """Another process with the number of a holder is not that holder."""
    mine = Holder.this_process()
    assert not mine.is_gone
    assert replace(mine, began="1").is_gone and replace(mine, process=2**22 + 1).is_gone
    assert not replace(mine, began="1", machine="another").is_gone, "of another machine nothing is known"


def test_gone_on_another_machine(without_locks, tmp_path, capsys):
    """A holder on another machine is gone when its number has stayed the same for STALE seconds; waiting is progress."""
    left(tmp_path / HELD, elsewhere(number=7))
    began, words = time.monotonic(), []
    with progress.listening(words.append):
        taken = RunLock(tmp_path)
    assert time.monotonic() - began >= lock.STALE and len(words) > 3
    said = capsys.readouterr().out
    assert "waiting up to 0 s for a sign that it lives" in said and "on node7 is gone" in said
    assert [path.name for path in tmp_path.iterdir() if "held" in path.name] == [HELD], "nothing is left aside"
    assert refused(tmp_path).startswith(f"run {tmp_path.name} is being trained by process {os.getpid()}")
    taken.close()


def test_slow_holder(without_locks, tmp_path):
    """A holder on another machine that raises its number before STALE seconds are over keeps the run."""
    left(tmp_path / HELD, elsewhere())
    later = threading.Timer(0.15, lambda: left(tmp_path / HELD, elsewhere(number=1)))
    later.start()
    assert (
        refused(tmp_path) == f"run {tmp_path.name} is being trained by process {os.getpid()} on node7; wait or stop it"
    )
    later.join()


def test_one_of_many_takes_over(without_locks, tmp_path):
    """Of several that find a file whose holder is gone, one takes it."""
    left(tmp_path / HELD, elsewhere())
    taken, errors = [], []

    def take():
        try:
            taken.append(HolderFile(tmp_path / HELD))
        except ValueError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(taken) == 1 and len(errors) == 7 and all("is being trained by" in each for each in errors)
    time.sleep(3 * lock.RENEWED)  # the one that has it is not ended by its own thread
    assert json.loads((tmp_path / HELD).read_text())["number"] > 0
    taken[0].close()


def test_holder_that_stood_still(without_locks, tmp_path):
    """A holder whose file was taken from it ends itself: two processes must not write into one folder."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        mine = RunLock(tmp_path)
        os.write(tell, b"held" if mine else b"")
        time.sleep(60)
        os._exit(1)
    assert os.read(ready, 4) == b"held"
    os.kill(child, signal.SIGSTOP)
    left(tmp_path / HELD, replace(json_holder(tmp_path / HELD), machine="another"))
    taken = RunLock(tmp_path)
    os.kill(child, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert (tmp_path / HELD).exists(), "the file of the one that has it now stays"
    taken.close()


def json_holder(path):
    return Holder(**json.loads(path.read_text()))


def test_file_beside_locks(tmp_path, monkeypatch):
    """Where this machine has locks and another one had none, its file is heeded."""
    monkeypatch.setattr(lock, "STALE", 0.1)
    monkeypatch.setattr(lock, "LOOK", 0.02)
    left(tmp_path / HELD, elsewhere())
    later = threading.Timer(0.05, lambda: left(tmp_path / HELD, elsewhere(number=1)))
    later.start()
    assert "on node7; wait or stop it" in refused(tmp_path)
    later.join()


def test_other_refusals(tmp_path):
    """Any other answer of the disk is an error."""
    broken = mock.patch.object(fcntl, "flock", side_effect=OSError(errno.EIO, "Input/output error"))
    with broken, pytest.raises(ValueError, match=r"cannot be locked .*Input/output error.*runs="):
        RunLock(tmp_path)
