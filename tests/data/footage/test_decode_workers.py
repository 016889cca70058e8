"""Decoding in processes: the order asked for, and no file that can stop the others, whatever it does to its decoder."""

import faulthandler
import gc
import itertools
import os
import signal
import threading
import time
from collections import Counter

import numpy as np
import psutil
import pytest

from wantrain.data.footage import decode_workers
from wantrain.data.footage.decode_process import Damaged
from wantrain.data.footage.decode_workers import Decoders, Job


def frames_of(name, start):
    """Frames that say where they come from."""
    return np.full((2, 3, 4, 3), (hash(name) + int(start)) % 251, dtype=np.uint8)


def read(request):
    for window in request["windows"]:
        time.sleep(request.get("sleep", 0))
        yield frames_of(request["name"], window["start"])


def job(name, clips=1, **more):
    return Job({"name": name, "windows": [{"start": start} for start in range(clips)], **more})


def decode(jobs, *, read=read, workers=2, timeout=20.0):
    with Decoders(read, workers=workers, timeout=timeout) as decoders:
        return list(decoders.decode(jobs))


def numbers(items):
    return [int(item.frames[0, 0, 0, 0]) for item in items if item.frames is not None]


def wanted(jobs):
    return [
        int(frames_of(each.request["name"], window["start"])[0, 0, 0, 0])
        for each in jobs
        for window in each.request["windows"]
    ]


def children():
    return {child.pid for child in psutil.Process().children(recursive=True) if child.status() != "zombie"}


@pytest.fixture(autouse=True)
def no_orphans():
    before = children()
    yield
    assert children() <= before


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_clip_order(workers):
    """Clips come in the order of the jobs, for any number of workers."""
    random = np.random.default_rng(0)
    jobs = [job(n, int(random.integers(1, 4)), sleep=float(random.uniform(0, 0.004))) for n in range(60)]
    found = decode(jobs, workers=workers)
    assert numbers(found) == wanted(jobs)
    assert found[0].frames.shape == (2, 3, 4, 3) and found[0].frames.dtype == np.uint8


class Waiting:
    """An object that cannot end in another process, as a decord reader, whose threads a fork does not copy."""

    def __init__(self):
        self.process, self.itself = os.getpid(), self

    def __del__(self):
        if os.getpid() != self.process:
            time.sleep(60)


def test_objects_of_the_parent_are_left_alone():
    """A worker that collects garbage does not end what its parent had lost before the fork."""

    def collecting(request):
        gc.collect()
        yield from read(request)

    gc.collect()
    gc.disable()
    try:
        Waiting()
        assert numbers(decode([job("a")], read=collecting, timeout=5)) == wanted([job("a")])
    finally:
        gc.enable()
        gc.collect()


def test_untaken_clips():
    """Many decoded clips that the caller has not taken yet block no worker."""
    jobs = [job(n) for n in range(2000)]
    with Decoders(read, workers=2, timeout=20) as decoders:
        found = decoders.decode(jobs)
        first = next(found)
        time.sleep(1)  # all the others are ready
        assert numbers([first, *found]) == wanted(jobs)


@pytest.mark.parametrize("least", [0, 4 << 20], ids=["bytes", "small clips by number"])
def test_queue_bound(least, monkeypatch, tmp_path):
    """The decoded clips that wait are bounded by their bytes, and small clips by their number."""
    monkeypatch.setattr(decode_workers, "LEAST_BYTES", least)
    monkeypatch.setattr(decode_workers, "WAITING_BYTES", 3 * max(least, frames_of(0, 0).nbytes))

    def counted(request):
        for frames in read(request):
            (tmp_path / f"{request['name']}-{time.monotonic_ns()}").touch()
            yield frames

    jobs = [job(n, 5) for n in range(8)]
    with Decoders(counted, workers=3, timeout=20) as decoders:
        found = decoders.decode(jobs)
        items = [next(found)]
        time.sleep(0.5)
        assert len(list(tmp_path.iterdir())) <= 2 * 3 + 1 + 3  # as may wait, the one taken, one of each worker
        assert numbers([*items, *found]) == wanted(jobs)


@pytest.mark.parametrize("how", ["sleeps", "opens a pipe that nobody writes to", "spins"])
def test_hanging_file(how, tmp_path):
    """A file that hangs its decoder is given up within the timeout and 5 s; the other files are decoded."""
    os.mkfifo(tmp_path / "pipe")

    def hang(request):
        yield from itertools.islice(read(request), 1 if request["name"] == "bad" else None)
        if request["name"] == "bad":
            if how == "sleeps":
                time.sleep(1000)
            elif how == "spins":
                while True:
                    pass
            (tmp_path / "pipe").read_bytes()

    jobs = [job("a", 2), job("bad", 3), job("b", 2), job("c")]
    began = time.monotonic()
    found = decode(jobs, read=hang, timeout=1.0)
    assert time.monotonic() - began < 1.0 + 5
    assert [item.reason for item in found if item.frames is None] == ["its decoder gave no clip within 1 s"]
    assert numbers(found) == [*wanted(jobs)[:3], *wanted(jobs)[5:]]


def test_far_clip_timeout():
    """A clip gets one more timeout for each whole minute of footage before it."""
    slow = Job({"name": "long", "windows": [{"start": 180.0}], "sleep": 1.0})
    assert decode([slow], timeout=0.5)[0].frames is not None
    assert decode([job("short", sleep=1.0)], timeout=0.5)[0].frames is None


def test_idle_caller():
    """Time in which the caller takes no clips does not count towards the timeout."""
    with Decoders(read, workers=1, timeout=0.3) as decoders:
        found = decoders.decode([job(n, 3) for n in range(4)])
        items = []
        for item in found:
            items.append(item)
            time.sleep(0.2)
    assert all(item.frames is not None for item in items) and len(items) == 12


def test_crash_retry(tmp_path):
    """A file whose decoder crashes is tried once more, and rejected if that crashes too."""

    def crash(request):
        for frames in read(request):
            started = tmp_path / str(request["name"])
            if request["name"] == "always" or (request["name"] == "once" and not started.exists()):
                started.touch()
                faulthandler.disable()  # pytest's: this death is meant
                os.abort()
            yield frames

    jobs = [job("a", 2), job("always", 2), job("once", 2), job("b")]
    found = decode(jobs, read=crash)
    assert [item.reason for item in found if item.frames is None] == ["its decoder died 2 times (killed by SIGABRT)"]
    assert numbers(found) == [*wanted(jobs)[:2], *wanted(jobs)[4:]]


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_workers(workers):
    """Kill -9 of decode workers in the middle of their files loses no clip and repeats none."""
    jobs = [job(n, 4, sleep=0.005) for n in range(40)]
    random = np.random.default_rng(workers)
    with Decoders(read, workers=workers, timeout=20) as decoders:
        found, items = decoders.decode(jobs), []
        for count, item in enumerate(found):
            items.append(item)
            if count % 20 == 10:
                os.kill(random.choice([worker.process.pid for worker in decoders._workers]), signal.SIGKILL)
    assert Counter(item.reason for item in items) == {"": 160}
    assert numbers(items) == wanted(jobs)


def test_decode_errors(tmp_path):
    """Damage and bugs are raised; a ValueError or MemoryError rejects the file."""

    def fail(request):
        yield from read(request)
        if error := request.get("error"):
            raise {"damaged": Damaged, "value": ValueError, "memory": MemoryError, "bug": KeyError}[error]("the reason")

    found = decode([job("a"), job("bad", 2, error="value"), job("b", error="memory")], read=fail)
    assert [item.reason for item in found] == ["", "", "", "the reason", "", "the reason"]
    with pytest.raises(Damaged, match="the reason"):
        decode([job("a"), job("bad", error="damaged")], read=fail)
    with pytest.raises(RuntimeError, match=r"(?s)in a decoder process.*KeyError"):
        decode([job("a"), job("bad", error="bug")], read=fail)


def test_missing_clips():
    """A file that gives fewer clips than its windows is rejected."""

    def short(request):
        yield from itertools.islice(read(request), 1)

    found = decode([job("a", 3), job("b")], read=short)
    assert [item.reason for item in found] == ["", "gave 1 clips only", ""]


def test_early_close():
    """Closing before the last clip ends the workers at once."""
    began = time.monotonic()
    with Decoders(read, workers=3, timeout=60) as decoders:
        found = decoders.decode(job(n, sleep=30 if n > 3 else 0) for n in itertools.count())
        assert numbers(itertools.islice(found, 2)) == wanted([job(0), job(1)])
        found.close()
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("decoding_begins", ["first", "last"])
def test_concurrent_close(decoding_begins, monkeypatch):
    """A thread of ours begins to decode at the moment in which the caller closes: either all of it is ended, or it
    never begins. No worker is killed twice, none is left."""
    start, closing, errors = threading.Thread.start, [], []

    def close():
        try:
            decoders.close()
        except BaseException as error:
            errors.append(error)

    def start_and_close(thread):
        start(thread)
        if thread.name == "decoders":
            closing.append(threading.Thread(target=close))
            start(closing[0])
            time.sleep(0.3)

    monkeypatch.setattr(threading.Thread, "start", start_and_close)
    decoders = Decoders(read, workers=3, timeout=60)
    if decoding_begins == "last":
        decoders.close()
        assert list(decoders.decode(job(n) for n in range(9))) == []
    else:
        assert len(list(decoders.decode(job(n, sleep=30) for n in range(9)))) == 0
        closing[0].join()
    assert not errors
