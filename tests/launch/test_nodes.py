"""Two launches on one machine as two nodes: every engine, a process that dies, and SLURM's scripts under a stand-in."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import stand_in_slurm
from engine_runs import measured

ROOT = Path(__file__).resolve().parents[2]
#: The shape of the fixture's experts.
MICRO = ("model.transformer.num_layers=2", "model.transformer.ffn_dim=64", "model.transformer.attention_head_dim=32")
#: Long enough that a signal finds the run under way.
STEPS = ("steps=150", "batch_size=8", "checkpoint.every=10", "validation=off")


def free_port():
    """A port of this machine that nobody listens at."""
    with socket.socket() as listening:
        listening.bind(("", 0))
        return str(listening.getsockname()[1])


@pytest.fixture
def site(environment, tmp_path):
    """The environment of a node: launch/ lies in the current folder, as it does in a checkout; a free port."""
    if not (tmp_path / "launch").exists():
        (tmp_path / "launch").symlink_to(ROOT / "launch")
    own = {"LAUNCH": "cpu_ddp", "GPUS": "1", "RESTARTS": "2", "GRACE": "60", "MASTER_PORT": free_port()}
    own |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hub")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**environment, "PATH": path, **own}


@pytest.fixture
def nodes(site, tmp_path):
    """nodes("run=r", ...): the same words on two nodes, in their folders, or on one of them; a list of their processes."""
    started = []

    def start(*words, folders=(tmp_path, tmp_path), only=(0, 1), **own):
        for node in only:
            env = {**site, "NODES": "2", "NODE": str(node), "MASTER_ADDR": "127.0.0.1", **own}
            env["PET_LOCAL_ADDR"] = "127.0.0.1"
            command = ["bash", str(ROOT / "launch/node.sh"), "train", *map(str, words)]
            said = (tmp_path / f"node{node}.log").open("a")
            how = {"cwd": folders[node], "env": env, "stdout": said, "stderr": said, "start_new_session": True}
            started.append(subprocess.Popen(command, **how))
        return started[-len(only) :]

    yield start
    for process in started:
        end_all(process)


def end_all(process):
    """Kill what is left of a process and below it."""
    if psutil.pid_exists(process.pid):
        for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            each.kill()
    process.wait()


def said(folder):
    return "".join(file.read_text() for file in sorted(folder.glob("*.log")))


def begun(folder):
    """The steps at which each start of the run has begun."""
    return [int(step) for step in re.findall(r"^run .*: step (\d+) of", said(folder), flags=re.M)]


def wait_for_step(run, step, process, folder, seconds=200):
    """Until the log of a run has reached a step."""
    log, until = run / "metrics.jsonl", time.monotonic() + seconds
    while not (log.is_file() and log.read_text().count("\n") >= step):
        assert process.poll() is None and time.monotonic() < until, said(folder)
        time.sleep(0.1)


def workers(launcher):
    """The training processes of a launcher, which are its children."""
    return [child for child in psutil.Process(launcher.pid).children() if "train" in child.cmdline()]


@pytest.fixture(scope="module")
def unbroken(tiny, environment, launch_command, tmp_path_factory):
    """The run of two processes that nothing disturbs."""
    folder = tmp_path_factory.mktemp("unbroken")
    subprocess.run(
        launch_command("ddp", *tiny.train, "init=scratch", *STEPS, "run=r"),
        cwd=folder,
        env=environment,
        check=True,
        timeout=400,
    )
    return folder / "runs/r"


@pytest.mark.slow
@pytest.mark.parametrize("own", [{}, {"only": (0,), "NODES": "1", "GPUS": "2"}], ids=["two nodes", "one"])
def test_killed_process_goes_on(own, tiny, nodes, unbroken, tmp_path):
    """A process dies by kill -9: the launchers of all nodes start theirs again, and the losses are those of the unbroken
    run."""
    launchers = nodes(*tiny.train, "init=scratch", *STEPS, "run=r", **own)
    wait_for_step(tmp_path / "runs/r", 30, launchers[0], tmp_path)
    workers(launchers[-1])[-1].kill()
    assert all(process.wait(timeout=300) == 0 for process in launchers), said(tmp_path)
    assert measured(tmp_path / "runs/r") == measured(unbroken)
    assert len(begun(tmp_path)) == 2 and begun(tmp_path)[1] >= 20, said(tmp_path)


@pytest.mark.slow
def test_node_comes_back(tiny, nodes, unbroken, tmp_path):
    """A node is gone, launcher and all: the other waits for it, and when it is started again the run goes on."""
    words = (*tiny.train, "init=scratch", *STEPS, "run=r")
    first, second = nodes(*words)
    wait_for_step(tmp_path / "runs/r", 30, first, tmp_path)
    end_all(second)
    (third,) = nodes(*words, only=(1,))
    assert [process.wait(timeout=300) for process in (first, third)] == [0, 0], said(tmp_path)
    assert measured(tmp_path / "runs/r") == measured(unbroken)
    assert len(begun(tmp_path)) == 2 and begun(tmp_path)[1] >= 20


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "gpus"), [("zero2", 1), ("zero3", 1), ("fsdp2", 1), ("fsdp2_hybrid", 2)])
def test_engine_on_two_nodes(engine, gpus, tiny, nodes, unbroken, tmp_path):
    """Each engine trains on two nodes as DDP does on one machine, and writes one checkpoint from both."""
    words = (*tiny.train, "init=scratch", *STEPS, "run=r", "stop_after=10")
    both = nodes(*words, LAUNCH=f"cpu_{engine}", GPUS=str(gpus))
    assert [process.wait(timeout=300) for process in both] == [0, 0], said(tmp_path)
    wanted, found = measured(unbroken), measured(tmp_path / "runs/r")
    assert len(found) == 10 and all(abs(value / wanted[key] - 1) < 1e-5 for key, value in found.items())
    assert (tmp_path / "runs/r/checkpoints/step_000010/state.json").is_file()


@pytest.mark.slow
def test_settings_error_ends_at_once(tiny, nodes, tmp_path):
    """An error of settings is said once, and the launchers of both nodes end without another start."""
    both = nodes(*tiny.train, *STEPS, "run=r", "batch_size=7", RESTARTS="3")
    assert all(process.wait(timeout=100) for process in both)
    assert len(re.findall("^error: ", said(tmp_path), flags=re.M)) == 1, said(tmp_path)
    assert said(tmp_path).count("(exitcode: 2)") <= 2, said(tmp_path)  # of each node's process, once


@pytest.mark.slow
def test_folder_of_each_node_refused(tiny, nodes, tmp_path):
    """With a run folder on each node's own disk nothing is trained, and one line says why."""
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    both = nodes(*tiny.train, "init=scratch", *STEPS, "run=r", folders=folders, RESTARTS="0")
    assert all(process.wait(timeout=300) for process in both)
    errors = [line for line in said(tmp_path).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "give runs= a folder on a disk that all machines share" in errors[0], said(tmp_path)
    assert not list(tmp_path.rglob("step_*"))


@pytest.fixture
def batch(site, tmp_path):
    """batch("launch/slurm/train.sbatch", "run=r", ...): `sbatch` of the stand-in, in tmp_path."""
    env, started = {**site, **stand_in_slurm.install(tmp_path / "slurm")}, []

    def submit(*words):
        log = (tmp_path / "job.log").open("a")
        how = {"cwd": tmp_path, "env": env, "stdout": log, "stderr": log, "start_new_session": True}
        started.append(subprocess.Popen(["sbatch", *map(str, words)], **how))
        return started[-1]

    yield submit
    for process in started:
        end_all(process)


@pytest.mark.slow
def test_slurm_job_is_requeued(tiny, batch, unbroken, tmp_path):
    """A job on two nodes whose time is up, and of which a node fails later, goes on twice at the next sample."""
    job, run = batch("launch/slurm/train.sbatch", *tiny.train, "init=scratch", *STEPS, "run=r"), tmp_path / "runs/r"
    wait_for_step(run, 20, job, tmp_path)
    os.kill(int((tmp_path / "slurm/batch").read_text()), signal.SIGUSR1)  # as --signal=B:USR1@300 has it
    until = time.monotonic() + 200
    while len(begun(tmp_path)) < 2:
        assert job.poll() is None and time.monotonic() < until, said(tmp_path)
        time.sleep(0.1)
    reached = begun(tmp_path)[1]
    assert reached >= 20 and (run / f"checkpoints/step_{reached:06d}/state.json").is_file()
    assert "stopped by a signal, after a checkpoint" in said(tmp_path)
    wait_for_step(run, reached + 20, job, tmp_path)
    job.send_signal(signal.SIGUSR2)  # a node fails: all processes die
    assert job.wait(timeout=300) == 0, said(tmp_path)
    assert "the time is up: job 7 goes back into the queue" in said(tmp_path)
    assert begun(tmp_path)[2] % 10 == 0 and begun(tmp_path)[2] > reached
    assert measured(run) == measured(unbroken)


@pytest.mark.slow
def test_slurm_data(tiny, pair, batch, call, tmp_path):
    """shard.sbatch cuts footage; encode.sbatch makes the tars of one process, and sample.sbatch all videos of a list, in
    two tasks of an array."""
    assert (
        batch("launch/slurm/shard.sbatch", f"source={tiny.footage}", "out=videos", "num_frames=9").wait(timeout=200)
        == 0
    ), said(tmp_path)
    given = ("shards=videos", f"weights={tiny.base}", "area=1024", "shard_clips=3", "report=none")
    assert batch("--array=0-1", "launch/slurm/encode.sbatch", *given, "out=two").wait(timeout=300) == 0, said(tmp_path)
    assert re.search(r"part [12] of 2 is done; \d+ of \d+ tars are still to come", said(tmp_path))
    call("encode.py", *given, "out=one")
    one, two = (
        sorted(file.name for file in (tmp_path / name).iterdir() if file.suffix == ".tar") for name in ("one", "two")
    )
    assert one == two and all(
        (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in one
    )
    (tmp_path / "prompts.txt").write_text("a red square\na blue circle\na green square\n")
    wanted = (*MICRO, f"weights={pair}", "prompts=prompts.txt", "steps=2", "model.num_frames=5", "out=samples")
    assert batch("--array=0-1", "launch/slurm/sample.sbatch", *wanted).wait(timeout=300) == 0, said(tmp_path)
    videos, page = list((tmp_path / "samples").glob("*.mp4")), (tmp_path / "samples" / "index.html").read_text()
    assert len(videos) == 3 and all(video.name in page for video in videos), said(tmp_path)
    assert len(re.findall("^wrote samples/.*mp4$", said(tmp_path), flags=re.M)) == 3, said(
        tmp_path
    )  # each task says it
