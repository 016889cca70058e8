"""What processes say of themselves, and what one reads that gets no further."""

import os
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from wantrain.training.monitoring import peers
from wantrain.training.monitoring.peers import Peers, Stage, is_broken_group, lines_of


def stage(rank, doing="training step 12, backward", seconds=3590.0, **how):
    facts = {"host": f"node{rank // 8}", "place": "engine.py:9 backward", "number": 1, "at": time.time(), **how}
    return Stage(rank=rank, doing=doing, seconds=seconds, **facts)


@pytest.fixture
def started(monkeypatch):
    """started(rank, doing): a process of four, with a store that all share, ended after the test."""
    store, running = dist.HashStore(), []
    store.set_timeout(timedelta(seconds=5))
    monkeypatch.setattr(peers, "EVERY", 0.02)
    monkeypatch.setattr(peers, "_connection", lambda: store)
    monkeypatch.setattr(peers.distributed, "world_size", lambda: 4)
    monkeypatch.setattr(peers.distributed, "local_rank", lambda: 0)

    def start(rank, doing, seconds=0.0):
        monkeypatch.setattr(peers.distributed, "rank", lambda: rank)
        running.append(Peers(lambda: (doing, seconds), threading.get_ident()))
        running[-1].start()
        return running[-1]

    yield start
    for each in running:
        each._over.set()
        each._thread.join()


def soon(condition):
    give_up = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_report(started):
    """Every process is named with its machine, what it does, for how long and where; the one that stopped first leads."""
    mine = started(0, "training step 12, backward", 4.0)
    started(1, "training step 12, data", 5.0)
    other = started(2, "training step 12, backward", 4.0)
    soon(lambda: len(mine._read()) == 3)
    host = os.uname().nodename
    head, first, second = mine.report().splitlines()
    assert head == "what the processes were doing, those without progress for longest first:"
    assert first.startswith(f"  {host}:1 training step 12, data for 5 s")
    assert second.startswith(f"  {host}:0,2 training step 12, backward for 4 s")
    other.end("ValueError: no such clip")
    first = mine.report().splitlines()[1]
    assert first.endswith("ValueError: no such clip") and f"{host}:2 ended while training step 12, backward" in first


def test_single_process():
    """In a run of one process there is no thread, and nothing to report."""
    before = threading.active_count()
    mine = Peers(lambda: ("training", 0.0), threading.get_ident())
    mine.start()
    assert mine.report() == "" and threading.active_count() == before
    mine.end("in order")


def test_silent_process(started, monkeypatch):
    """A process that waits, and whose neighbour speaks no more, learns it; one that ended in order is not missed."""
    monkeypatch.setattr(peers, "SILENCE", 0.3)
    monkeypatch.setattr(peers, "LOOK", 1.0)
    killed, waiting = started(0, "training step 3, data"), started(1, "training step 3, backward", 2.0)
    ended, busy = started(2, "writing the last checkpoint"), started(3, "training step 3, forward", 0.5)
    soon(lambda: len(waiting._read()) == 4)
    ended.end("in order")
    time.sleep(0.6)
    assert waiting.gone is None
    killed._over.set()  # no word any more
    soon(lambda: waiting.gone is not None)
    assert waiting.gone.startswith(
        f"process 0 on {os.uname().nodename} has given no sign of life for 0 s: it was killed"
    )
    assert busy.gone is None, "one that gets on looks at nobody"


def test_store_that_is_gone(started, monkeypatch):
    """A store that does not answer, or never, is one line and no exception."""
    monkeypatch.setattr(peers, "ANSWER", 0.1)
    mine = started(0, "training", 0.0)
    soon(lambda: mine._store is not None)

    class Gone:
        def __getattr__(self, name):
            raise dist.DistNetworkError("Connection reset by peer")

    class Silent:
        def __getattr__(self, name):
            return lambda *_: time.sleep(2)

    for store in (Gone(), Silent()):
        mine._store = store
        assert mine.report().startswith(
            "the other processes cannot be asked: the machine that holds their store is gone"
        )
    mine.end("in order")


def test_many_processes():
    """Of a thousand processes those that do the same are one line, and the lines are few."""
    stages = [stage(rank) for rank in range(1024)]
    stages[13] = stage(13, "training step 12, data", 3600.0, place="dataset.py:70 load")
    lines = lines_of(stages)
    assert lines[0] == "  node1:13 training step 12, data for 3600 s (dataset.py:70 load)"
    assert lines[1].startswith("  node0:0-7 node1:8-12,14,15 node2:16-23") and " and 976 more " not in lines[0]
    assert "training step 12, backward for 3590 s" in lines[1] and len(lines) == 2
    different = lines_of([stage(rank, f"hashing file {rank}") for rank in range(20)])
    assert len(different) == peers.NAMED + 1 and different[-1] == "  and 12 more"


def test_process_without_words():
    """A process whose last word is old is named first, with its age."""
    stages = [stage(0, seconds=300.0), stage(1, seconds=1.0, at=time.time() - 312)]
    assert lines_of(stages)[0].endswith("for 313 s (engine.py:9 backward); last heard of 312 s ago")


def test_broken_group():
    """gloo's errors are known by their text, torch's own by their class; a bug is none of them."""
    assert is_broken_group(RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed"))
    assert is_broken_group(dist.DistBackendError("NCCL")) and not is_broken_group(RuntimeError("shapes differ"))
    assert not is_broken_group(ValueError("gloo"))
