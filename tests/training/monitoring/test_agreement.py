"""What the processes of a run must have in common: each difference is named once, and nothing hangs."""

import os
import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from wantrain.training.monitoring import agreement
from wantrain.training.monitoring.agreement import ProcessFacts, differences, differing_settings, places, spread
from wantrain.util import files

SAME = {"wantrain": "0.9 (commit a)", "torch": "2.13.0", "accelerate": "1.15.0"}


def processes(count, **how):
    """So many records that agree, eight to a machine."""
    facts = {"versions": SAME, "device": "NVIDIA H200 (151 GB)", "free": 10**12, "clock": 100.0, **how}
    return [ProcessFacts(rank=rank, host=f"node{rank // 8}", card=f"gpu{rank}", **facts) for rank in range(count)]


def judged(records, main=None, times=(100.0, 100.5), checkpoint=10**9):
    return differences(records, main or {}, times, checkpoint)


def test_no_difference():
    """Processes that agree give no message."""
    assert judged(processes(1024)) == ([], [])


def test_versions():
    """Another wantrain or minor version of torch is an error, another patch or library a warning; each said once."""
    records = processes(1024)
    records[9:12] = [replace(each, versions={**SAME, "torch": "2.12.1", "wantrain": "0.8"}) for each in records[9:12]]
    records[40] = replace(records[40], versions={"torch": "2.13.1", "wantrain": SAME["wantrain"]})
    errors, warnings = judged(records)
    assert errors == [
        "torch 2.13.0 on 1020 processes, 2.12.1 on node1:9-11, 2.13.1 on node5:40",
        "wantrain 0.9 (commit a) on 1021 processes, 0.8 on node1:9-11",
    ]
    assert warnings == ["accelerate 1.15.0 on 1023 processes, none on node5:40"]
    records = processes(2)
    records[1] = replace(records[1], versions={**SAME, "torch": "2.13.1"})
    assert judged(records) == ([], ["torch 2.13.0 on 1 process, 2.13.1 on node0:1"])


def test_settings():
    """Settings that differ are named with their values; where each machine has the data may differ."""
    main = {"steps": "10", "data.shards": "'/a'", "data.sets.cats.cache": "'/a'", "seed": "0", "weights": "'/w'"}
    own = {"steps": "20", "data.shards": "'/b'", "data.sets.cats.cache": "'/b'", "seed": "0", "gpu": "None"}
    differing = differing_settings(main, own)
    assert differing == {"steps": "20", "weights": "not set", "gpu": "None"}
    records = processes(4)
    records[2] = replace(records[2], settings=differing)
    assert judged(records, main) == (
        [
            "gpu: not set on 3 processes, None on node0:2",
            "steps: 10 on 3 processes, 20 on node0:2",
            "weights: '/w' on 3 processes, not set on node0:2",
        ],
        [],
    )


def test_card_of_several_processes():
    """Two processes on one card are an error; processes without a card are not."""
    records = processes(4)
    records[3] = replace(records[3], card="gpu0")
    assert judged(records) == (["one card for several processes: node0:0,3"], [])
    assert judged([replace(each, card="") for each in records]) == ([], [])


def test_warnings():
    """Other cards, clocks that are apart and a small disk are warnings."""
    records = processes(9)
    records[8] = replace(records[8], device="NVIDIA A100 (85 GB)", clock=40.0, free=10**8)
    assert judged(records) == (
        [],
        [
            "devices: NVIDIA H200 (151 GB) on 8 processes, NVIDIA A100 (85 GB) on node1:8; the slowest sets the pace",
            "clocks: 60 s or more away from the main process's on node1:8; times in logs do not compare",
            "little free disk: 0.1 GB for the run's folder on node1:8, and a checkpoint takes 1 GB",
        ],
    )
    late = [replace(each, clock=104.9) for each in processes(2)]
    assert judged(late, times=(80.0, 100.0)) == ([], []), "what was between is no difference"


def test_places():
    """Processes are named by machine, in ranges, and at most NAMED machines."""
    hosts = [f"node{rank // 8}" for rank in range(80)]
    assert places([0, 1, 2, 5, 8, 9], hosts) == "node0:0-2,5 node1:8,9"
    assert places(range(0, 80, 8), hosts) == "node0:0 node1:8 node2:16 node3:24 node4:32 node5:40 and 4 more"
    assert spread(["b", "a", "a"], hosts) == "a on 2 processes, b on node0:0"


# Threads as processes -------------------------------------------------------------------------------------------------


class Threads(threading.local):
    rank = 0


@pytest.fixture
def launch_of(monkeypatch):
    """launch_of(3): with it, each thread is a process of its own number, and they share a store."""
    own = Threads()

    def launched(count, work, absent=()):
        store, errors, barrier = dist.HashStore(), {}, threading.Barrier(count - len(absent))
        store.set_timeout(timedelta(seconds=10))
        monkeypatch.setattr(agreement, "first_store", lambda: store)
        monkeypatch.setattr(agreement.distributed, "world_size", lambda: count)
        monkeypatch.setattr(agreement.distributed, "rank", lambda: own.rank)
        monkeypatch.setattr(agreement.distributed, "is_main", lambda: own.rank == 0)

        def on_main(judge, doing):
            """What main_process.on_main does, with threads: the others end without a word where it fails."""
            try:
                if own.rank == 0:
                    judge()
            finally:
                barrier.wait(20)
            if own.rank and 0 in errors:
                raise SystemExit(2)

        monkeypatch.setattr(agreement, "on_main", on_main)

        def run(rank):
            own.rank = rank
            try:
                work(rank)
            except BaseException as error:
                errors[rank] = error

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count) if rank not in absent]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads)
        return errors

    return launched


def start(settings, tmp_path):
    agreement.check_start(settings, tmp_path / "runs" / "r", torch.device("cpu"), checkpoint=0)


def test_start(launch_of, tmp_path, capsys):
    """Processes with the same command start; one with another gets an error of the main process that names it."""
    config = {"steps": 3, "adapter": {"rank": 4}, "data": {"shards": "a"}, "optimizer": {"betas": [0.9, 0.99]}}
    assert launch_of(3, lambda rank: start({**config, "data": {"shards": str(rank)}}, tmp_path)) == {}
    assert capsys.readouterr().out == ""
    errors = launch_of(3, lambda rank: start({**config, "adapter": {"rank": 4 + rank // 2}}, tmp_path))
    assert isinstance(errors[0], ValueError) and "the 3 processes of this run do not belong together: " in str(
        errors[0]
    )
    assert f": adapter.rank: 4 on 2 processes, 5 on {os.uname().nodename}:2. Start all" in str(errors[0])


def test_absent_process(launch_of, tmp_path, monkeypatch):
    """A process that does not report is named."""
    monkeypatch.setattr(agreement, "ABSENT", 0.1)
    errors = launch_of(4, lambda rank: start({"steps": 3}, tmp_path), absent=(1, 3))
    assert str(errors[0]).startswith("of 4 processes 1,3 did not report within 0 s: they hang, or have ended")


def test_data(launch_of):
    """Shards with another manifest on one machine are an error."""
    assert launch_of(3, lambda rank: agreement.check_data("a" * 64)) == {}
    errors = launch_of(3, lambda rank: agreement.check_data("ab"[rank // 2] * 64))
    assert str(errors[0]).startswith(
        f"data.shards= holds other data on some machines: manifest {'a' * 12} on 2 processes"
    )


def test_files_that_show_late(launch_of, tmp_path, monkeypatch):
    """A file that another machine shows later is waited for, and one that it never shows is named with the machine."""
    monkeypatch.setattr(files, "SHOWN", 0.5)
    file, real = tmp_path / "config.yaml", Path.stat
    file.write_text("steps: 3\n")
    hidden_until = {}

    def stale(path, **how):
        """What a network disk shows to process 1: for a while, nothing."""
        if agreement.distributed.rank() == 1 and path.name in hidden_until:
            hidden_until[path.name] -= 1
            if hidden_until[path.name] > 0:
                raise FileNotFoundError(path)
        return real(path, **how)

    monkeypatch.setattr(Path, "stat", stale)
    hidden_until["config.yaml"] = 4
    assert launch_of(3, lambda rank: agreement.check_files({file: 9})) == {} and hidden_until["config.yaml"] <= 0
    hidden_until["config.yaml"] = 10**9
    errors = launch_of(3, lambda rank: agreement.check_files({file: 9}))
    host = os.uname().nodename
    assert str(errors[0]).startswith(
        f"{file}, which the main process on {host} has, is not to be seen on {host}:1; give"
    )
    hidden_until.clear()
    assert "is not to be seen" in str(launch_of(3, lambda rank: agreement.check_files({file: 8}))[0]), "an old size"


def test_single_process(tmp_path, capsys):
    """One process compares nothing; it still says that the disk is too small for a checkpoint."""
    agreement.check_start({"steps": 1}, tmp_path, torch.device("cpu"), checkpoint=1 << 60)
    agreement.check_data("a")
    agreement.check_files({tmp_path / "absent": 3})
    assert "warning: little free disk: " in capsys.readouterr().out
    assert agreement.host_of(0) == os.uname().nodename
