"""Faults between processes: each ends as docs/faults.md says, and the next start goes on without a sample lost.

Two launchers on this machine stand for two nodes, each with one process. One run meets all faults, one after the other,
so that in the end its losses are those of the run that met none.
"""

import contextlib
import json
import os
import re
import socket
import subprocess
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 26, 2

#: Around train.py: a fault in the process of node 1, before it takes its part in a step.
FAULTY = """
import os, runpy, signal, sys, time
from wantrain.runs import checkpoint
from wantrain.training import loop
from wantrain.training.engine import joint_save
from wantrain.training.monitoring import peers

fault, _, number = os.environ.get("FAULT", "").partition(":")
rank, first = int(os.environ["RANK"]), int(number or 0)
peers.EVERY, peers.LOOK, peers.SILENCE = 0.2, 1.0, 4.0
take_step = loop.take_step

def planted(batches, step):
    if rank == 1 and (step == first or fault == "slow"):
        launcher, me = os.getppid(), os.getpid()
        match fault:
            case "killed":
                os.kill(me, signal.SIGKILL)
            case "gone":
                os.kill(launcher, signal.SIGKILL)
                os.kill(me, signal.SIGKILL)
            case "silent":
                os.kill(launcher, signal.SIGSTOP)
                os.kill(me, signal.SIGSTOP)
            case "hangs":
                time.sleep(1000)
            case "preempted":
                os.kill(launcher, signal.SIGTERM)
            case "slow":
                time.sleep(0.3)
    while True:
        yield next(batches)

def step_with_fault(run, trainer, own, step, batches, signals):
    return take_step(run, trainer, own, step, planted(batches, step), signals)

loop.take_step = step_with_fault
if fault == "full":
    write, fill = checkpoint.Checkpoints._write, joint_save.fill_file
    def full(self, step, *args):
        if step >= first:
            raise OSError(28, os.strerror(28), str(self.folder))
        write(self, step, *args)
    def full_part(path, slices):
        if rank == 1 and int(path.parts[path.parts.index("checkpoints") + 1][6:12]) >= first:
            raise OSError(28, os.strerror(28), str(path))
        fill(path, slices)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        joint_save.fill_file = full_part
    else:
        checkpoint.Checkpoints._write = full
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Nodes:
    """train.py on two nodes: a launcher with one process for each."""

    def __init__(self, folder, launch_command, environment, arguments):
        (folder / "faulty.py").write_text(FAULTY)
        self.folder, self.environment, self.arguments = folder, environment, arguments
        self.launch_command, self.launchers = launch_command, []

    def start(self, fault="", *more, engine="ddp", others=()):
        """Start both, and wait until both have ended: the exit codes and what was said, by node. One that was stopped
        is killed when the other has ended.
        """
        port, logs = free_port(), [self.folder / f"log_{node}" for node in (0, 1)]
        for node, log in enumerate(logs):
            words = (*self.arguments, *more, *(others if node == 1 else ()))
            command = self.launch_command(engine, ROOT / "train.py", *words, script=self.folder / "faulty.py")
            at = command.index("--main_process_port")
            place = ["--num_machines", "2", "--machine_rank", str(node), "--main_process_ip", "127.0.0.1"]
            command[at : at + 2] = ["--main_process_port", str(port), *place]
            environment = {**self.environment, "FAULT": fault, "PYTHONPATH": str(ROOT)}
            with log.open("w") as out:
                self.launchers.append(
                    subprocess.Popen(command, cwd=self.folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
                )
        first, second = self.launchers[-2:]
        first.wait(timeout=200)
        if fault.startswith("silent"):
            self.clear()
        second.wait(timeout=100)
        return [first.returncode, second.returncode], [log.read_text() for log in logs]

    def clear(self):
        """Kill what is left."""
        for launcher in self.launchers:
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in [*psutil.Process(launcher.pid).children(recursive=True), psutil.Process(launcher.pid)]:
                    process.kill()


def steps_of(folder):
    """Of each step its number, its samples, its loss and the main process's clips."""
    rows = [json.loads(line) for line in (folder / "runs" / "r" / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["samples"], row["loss"], [clip[0] for clip in row["clips"]]) for row in rows]


def saved(folder):
    return sorted(int(path.name.removeprefix("step_")) for path in (folder / "runs/r/checkpoints").glob("step_*"))


@pytest.fixture
def arguments(tiny):
    return (*tiny.train, "init=scratch", "run=r", "batch_size=4", f"steps={STEPS}", f"checkpoint.every={EVERY}")


@pytest.fixture
def nodes(arguments, launch_command, environment, tmp_path):
    (tmp_path / "faulty").mkdir()
    found = Nodes(tmp_path / "faulty", launch_command, environment, arguments)
    yield found
    found.clear()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_run_that_meets_every_fault(nodes, arguments, launch):
    """Each fault ends as documented, and in the end the steps, samples and losses are those of the run without faults."""
    host, folder = os.uname().nodename, nodes.folder
    codes, (main, other) = nodes.start(others=("seed=1",))
    assert codes == [1, 1] and not (folder / "runs" / "r").exists(), "the launchers have a code of their own"
    assert (
        f"error: the 2 processes of this run do not belong together: seed: 0 on 1 process, 1 on {host}:1; data.seed: "
        in main
    )
    assert "error: " not in other and "exitcode  : 2" in main + other

    codes, (main, other) = nodes.start("killed:4")
    assert 0 not in codes and saved(folder) == [2] and "step 0 of" in main
    assert "error: a process does not answer, while training step 4, " in main
    # A process's last words may be seconds old, or those of its writer of checkpoints.
    assert all(re.search(rf"^  {host}:{rank} \S.* for \d+ s \(\w+\.py:\d+", main, flags=re.M) for rank in (0, 1))

    codes, (main, other) = nodes.start("hangs:7", "safeguards.hang=15")
    assert 0 not in codes and saved(folder) == [4, 6] and "step 2 of" in main
    assert "error: nothing has happened for 15 s (safeguards.hang) while training step 7, data" in other
    report = other.partition("those without progress for longest first:\n")[2]
    assert f"  {host}:1 training step 7, data for 15 s (loop.py" in report
    assert f"  {host}:0 training step 7, backward for 15 s (engine.py" in report
    assert "exitcode  : 75" in other

    codes, (main, other) = nodes.start("gone:9")
    assert 0 not in codes and saved(folder) == [6, 8] and "step 6 of" in main
    assert "error: a process does not answer, while training step 9, " in main

    codes, (main, other) = nodes.start("silent:11")
    assert 0 not in codes and saved(folder) == [8, 10] and "step 8 of" in main
    assert (
        f"error: process 1 on {host} has given no sign of life for 4 s: it was killed, or its machine is gone" in main
    )
    assert "exitcode  : 75" in main and "last heard of" in main

    codes, (main, other) = nodes.start("preempted:13")
    stopped = saved(folder)[-1]
    assert 0 not in codes and 13 <= stopped <= 16 and "step 10 of" in main
    assert "stopped by a signal, after a checkpoint; the same command continues" in main

    codes, (main, other) = nodes.start("full:18")
    assert 0 not in codes and saved(folder)[-1] == 16
    assert f"step {stopped} of" in main and main.count("\nerror: ") == 1 and "No space left on device" in main
    assert "error: " not in other

    codes, (main, other) = nodes.start("slow")
    assert codes == [0, 0] and f"step {saved(folder)[-1]} of" not in main
    assert f"warning: process 1 on {host} is slower than the others: of each step it takes 0.3" in main

    launch("ddp", *arguments)
    assert steps_of(folder) == steps_of(folder.parent) and len(steps_of(folder)) == STEPS


@pytest.mark.slow
def test_full_disk_under_parts(nodes, launch, arguments, monkeypatch):
    """Where all processes write a checkpoint and the disk refuses one of them, one error names it; the last one stays."""
    monkeypatch.setenv("FAULT", "full:4")
    ended = launch("fsdp2", ROOT / "train.py", *arguments, script=nodes.folder / "faulty.py", check=False)
    assert ended.returncode != 0 and saved(nodes.folder.parent) == [2], ended.stderr
    assert ended.stderr.count("error: ") == 1 and f"(process 1 on {os.uname().nodename})" in ended.stderr
