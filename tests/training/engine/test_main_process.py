"""The main process may take as long as it needs: the others wait for it, hear how far it is, and end when it fails."""

import json
import os
import signal
import socket
import subprocess
from datetime import timedelta
from pathlib import Path

import pytest

from wantrain.training.engine import accelerator, main_process
from wantrain.training.monitoring.watchdog import GRACE

ROOT = Path(__file__).resolve().parent.parent.parent.parent

#: One of two processes, without train.py. No collective may take longer than two seconds, and the work of
#: the main process takes six.
PAIR = """
import os, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from wantrain.training.engine import main_process
from wantrain.util.console import errors_to_exit_code
from wantrain.util.progress import listening, report_progress

main_process.ANNOUNCE, main_process.SILENCE, main_process.FAREWELL = 0.1, 4.0, 2.0
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
dist.barrier()
dist.group.WORLD.set_timeout(timedelta(seconds=2))
rank, heard = dist.get_rank(), []

def work():
    for number in range(4):
        report_progress(f"file {number}")
        time.sleep(1.5 if sys.argv[1] in ("works", "barrier") else 0.1)
    print("working", flush=True)
    match sys.argv[1]:
        case "refuses" | "saves":
            raise ValueError("the disk is full")
        case "leaves":
            sys.exit(7)
        case "breaks":
            raise TypeError("a bug")
        case "stands":
            time.sleep(100)
    return {"tensor": torch.arange(3), "path": rank}

with errors_to_exit_code(), listening(heard.append):
    if sys.argv[1] == "barrier":
        if rank == 0:
            work()
        dist.barrier()
    try:
        found = main_process.on_main(work, "hashing")
    finally:
        if rank == 0 and sys.argv[1] == "saves":  # longer than silence may last: a checkpoint is being finished
            time.sleep(6)
            print("saved", flush=True)
    first = main_process.main_first(lambda: rank, "looking")
    if rank == 1:  # late for a work that is long done
        time.sleep(0.3)
    again = [main_process.on_main(lambda: number, "counting") for number in range(5)]
    print(found["tensor"].tolist(), found["path"], first, again, *heard, sep="|", flush=True)
"""


slow = pytest.mark.slow


@pytest.fixture
def pair(tmp_path, environment, python):
    """pair("refuses"): starts PAIR twice, and gives the two processes; whatever is left of them is killed in the end."""
    (tmp_path / "pair.py").write_text(PAIR)
    started = []

    def start(scenario):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        for rank in (0, 1):
            place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            env = {**environment, **place, "PYTHONPATH": str(ROOT)}
            command = [python, str(tmp_path / "pair.py"), scenario]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen(command, env=env, **pipes))
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ended(processes):
    """(exit code, stdout, stderr) of each."""
    said = [process.communicate(timeout=100) for process in processes]
    return [(process.returncode, *each) for process, each in zip(processes, said, strict=True)]


def test_on_main_outlasts_timeout(pair):
    """Other processes wait for the main one longer than the group's time-out, and receive its progress."""
    (main, main_said, _), (other, other_said, other_err) = ended(pair("works"))
    assert (main, other) == (0, 0), other_err
    heard, wanted = main_said.splitlines()[-1].split("|"), other_said.strip().split("|")
    assert heard[:4] == ["[0, 1, 2]", "0", "0", "[0, 1, 2, 3, 4]"]
    assert wanted[:4] == ["[0, 1, 2]", "0", "1", "[0, 1, 2, 3, 4]"], "its own, where each works for itself"
    files = [f"waiting for the main process: file {number}" for number in range(4)]
    assert [told for told in wanted[4:] if "file" in told] == files, "each unit of work is passed on, and once"


@slow
def test_barrier_times_out(pair):
    """A barrier in place of on_main times out, so the test above can fail."""
    (_, said, _), (other, _, error) = ended(pair("barrier"))
    assert other == 1 and "Timed out" in error and "|" not in said


@pytest.mark.parametrize(
    ("scenario", "code"),
    [("refuses", 2), pytest.param("leaves", 7, marks=slow), pytest.param("breaks", 1, marks=slow)],
)
def test_on_main_failure(scenario, code, pair):
    """An error in the main process ends the others with the same exit code, and is printed once."""
    (main, _, error), (other, _, silence) = ended(pair(scenario))
    assert (main, other) == (code, code)
    assert "error: " not in silence and "Traceback" not in silence, "torch alone may say that the store is gone"
    assert {"refuses": error == "error: the disk is full\n", "leaves": error == "", "breaks": "a bug" in error}[
        scenario
    ]


@pytest.mark.slow
def test_exit_after_failed_main(pair):
    """The other processes stay until a main process that failed has exited.

    A launcher stops all processes as soon as one has failed: the main one may still be finishing a checkpoint.
    """
    main, other = pair("saves")
    assert [main.stdout.readline() for _ in range(2)] == ["working\n", "saved\n"]
    assert other.poll() is None, "it waits while the main process works"
    assert [code for code, *_ in ended([main, other])] == [2, 2]


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGKILL, "the main process is gone, and its store with it"),
        pytest.param(signal.SIGSTOP, "the main process has said nothing for 4 s", marks=slow),  # its store stands too
    ],
)
def test_main_process_dies(number, told, pair):
    """If the main process dies or stops, the processes that wait for it end with an error."""
    main, other = pair("stands")
    assert main.stdout.readline() == "working\n"
    os.kill(main.pid, number)
    _, error = other.communicate(timeout=60)
    assert other.returncode == 1 and f"RuntimeError: {told}" in error and "The last checkpoint is good" in error


def test_on_main_single_process():
    """With one process, on_main and main_first return the function's result without waiting."""
    assert main_process.on_main(lambda: 3, "counting") == main_process.main_first(lambda: 3, "counting") == 3


def test_group_timeout():
    """The group's time-out is longer than the watchdog's limit and its grace period together."""
    assert accelerator.group_timeout(3600) > timedelta(seconds=3600 + GRACE)
    assert accelerator.group_timeout(None) == timedelta(days=1)


#: Around train.py: from the start on no collective may take longer than LIMIT, and whatever the main process does for
#: all takes three times as long. The other process must not read what the main one reads for all.
LIMIT, SLEEP = 4, 12
SLOW = f"""
import os, runpy, sys, time
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from wantrain import config
from wantrain.runs import checkpoint
from wantrain.training.engine import accelerator as engines, engine, main_process
from wantrain.training.validation import history, preview

start, rank = engines.start_accelerator, int(os.environ["RANK"])
main_process.ANNOUNCE = 1.0

def limited(*args, **how):
    accelerator = start(*args, **how)
    dist.barrier()
    for group in dist.distributed_c10d._world.pg_map:
        group.set_timeout(timedelta(seconds={LIMIT}))
    return accelerator

def slow(owner, name, what):
    real = getattr(owner, name)
    def outer(*args, **how):
        if rank == 0 and not Path(what).exists():
            Path(what).touch()
            time.sleep({SLEEP})
        assert rank == 0 or what == "download", what
        return real(*args, **how)
    setattr(owner, name, outer)

engines.start_accelerator = limited
engine.share_timeout = lambda: None  # which would take the limit away again
slow(config, "base", "download")
slow(checkpoint.Checkpoints, "newest", "hash")
slow(history, "_read", "records")
slow(preview.Preview, "_sample", "preview")
slow(checkpoint.Checkpoints, "_write", "write")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
EVERYTHING = ("download", "hash", "records", "preview", "write")


def slow_run(launch, tiny, tmp_path, now, *more, **how):
    """train.py in two processes, the main one slow in what is in `now` and in nothing else."""
    (tmp_path / "slow.py").write_text(SLOW)
    for what in set(EVERYTHING) - set(now):
        (tmp_path / what).touch()
    command = (
        *tiny.train,
        "init=scratch",
        "batch_size=2",
        "steps=2",
        "checkpoint.every=1",
        "check_expert=off",
        "run=r",
    )
    watched = ("data.holdout=0.2", "validation.clips=1", "validation.points=1", "sample.every=2", "sample.steps=1")
    small = ("sample.count=1", "model.num_frames=5")
    return launch("ddp", ROOT / "train.py", *command, *watched, *small, *more, script=tmp_path / "slow.py", **how)


@pytest.mark.parametrize(
    ("now", "more"),
    [
        pytest.param(("write",), (), marks=slow),
        pytest.param(("download", "preview"), (), marks=slow),
        pytest.param(("write",), ("checkpoint.background=false",), marks=slow),
        pytest.param(("hash", "records"), (), marks=slow),
    ],
)
def test_slow_main_process(now, more, tiny, launch, tmp_path):
    """Two processes finish a run although the main one works for three times the group's time-out."""
    slow_run(launch, tiny, tmp_path, now, *more)
    run = tmp_path / "runs" / "r"
    assert [row["step"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())] == [0, 1, 2]
    assert sorted(path.name for path in (run / "checkpoints").glob("*")) == ["step_000001", "step_000002"]
    assert all((tmp_path / what).exists() for what in EVERYTHING) and list((run / "samples").glob("*.mp4"))
