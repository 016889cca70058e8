"""A tracker that is slow, down or refused, and a log that the disk refuses, never stop or slow a run."""

import errno
import importlib.util
import json
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
from accelerate import PartialState

from wantrain.training.engine.engine import Stepper
from wantrain.training.monitoring import trackers
from wantrain.training.monitoring.metrics import Metrics
from wantrain.training.monitoring.trackers import AsyncTracker, build_tracker


class Snapshot:
    """A tracker that keeps what it is told, after `delay` seconds each time."""

    def __init__(self, delay=0.0):
        self.delay, self.told = delay, []

    def scalars(self, step, values):
        time.sleep(self.delay)
        self.told.append((step, dict(values)))

    def previews(self, step, looks):
        self.told.append((step, looks))

    def close(self, *, failed=False):
        self.told.append("failed" if failed else "closed")


def steps(metrics, count):
    """Log `count` steps; the longest that one of them took."""
    longest = 0.0
    for step in range(1, count + 1):
        began = time.perf_counter()
        metrics.add(step, {"loss": 1.0 / step, "samples": step, "grad_norm": 1.0})
        metrics.flush(speak=False)
        longest = max(longest, time.perf_counter() - began)
    return longest


def logged(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_tracker_order(tmp_path):
    """A tracker receives every step in order, from its own thread."""
    kept, makers = Snapshot(), []
    metrics = Metrics(tmp_path / "metrics.jsonl", steps=9)
    metrics.tracker = AsyncTracker(lambda: makers.append(threading.current_thread()) or kept)
    steps(metrics, 9)
    metrics.tracker.close()
    assert [told[0] for told in kept.told[:-1]] == list(range(1, 10)) and kept.told[-1] == "closed"
    assert makers[0] is not threading.current_thread() and not makers[0].is_alive()


@pytest.mark.parametrize("fault", ["slow to begin", "slow", "no begin", "exits", "breaks off"])
def test_tracker_faults(fault, tmp_path, capsys):
    """A tracker that is slow, fails or exits neither delays the steps nor cuts the log."""

    def make():
        if fault == "slow to begin":
            time.sleep(30)
        if fault == "no begin":
            raise ConnectionError("no route to host")
        if fault == "exits":
            raise SystemExit(1)
        kept = Snapshot(30.0 if fault == "slow" else 0.0)
        if fault == "breaks off":
            kept.scalars = lambda step, values: 1 / 0
        return kept

    metrics = Metrics(tmp_path / "metrics.jsonl", steps=40)
    metrics.tracker = AsyncTracker(make, timeout=0.5)
    assert steps(metrics, 40) < 1.0, "nobody waits thirty seconds"
    began = time.perf_counter()
    metrics.tracker.close()
    assert time.perf_counter() - began < 2.0
    assert logged(tmp_path / "metrics.jsonl") == list(range(1, 41))
    said = capsys.readouterr().out
    assert said.count("warning: the tracker") == 1 and "metrics.jsonl" in said


def test_dropped_tracker_calls(tmp_path, capsys, monkeypatch):
    """Calls that a tracker cannot take in time are dropped, with one warning."""
    monkeypatch.setattr(trackers, "WAITING", 5)
    tracker = AsyncTracker(lambda: Snapshot(30.0), timeout=0.1)
    for step in range(50):
        tracker.scalars(step, {"loss": 1.0})
    tracker.close()
    assert tracker.dropped >= 44
    assert capsys.readouterr().out.count("calls behind") == 1


def test_run_with_broken_tracker(tiny, call, tmp_path, monkeypatch):
    """A run whose tracker fails at its start trains to the end, with a warning."""

    def broken(*_):
        raise OSError("proxy refused")

    monkeypatch.setattr(trackers, "WandbTracker", broken)
    run = (*tiny.train, "init=scratch", "batch_size=4", "steps=3", "run=r")
    ended = call("train.py", *run, "tracker=wandb")
    assert "warning: the tracker failed (OSError: proxy refused)" in ended.stdout
    assert logged(tmp_path / "runs" / "r" / "metrics.jsonl")[-1] == 3


def test_tracker_of_failed_run(tiny, call, tmp_path, monkeypatch):
    """When an error ends a run, its tracker receives the last steps and the failure.

    Steps since the last line on the console are in the log too.
    """
    kept, step, calls = Snapshot(), Stepper.step, iter(range(1, 100))

    def breaking(self, *, update):
        if next(calls) == 4:
            raise ValueError("the device is gone")
        return step(self, update=update)

    monkeypatch.setattr(trackers, "WandbTracker", lambda *_: kept)
    monkeypatch.setattr(Stepper, "step", breaking)
    run = (*tiny.train, "init=scratch", "batch_size=4", "steps=8", "run=r")
    ended = call("train.py", *run, "tracker=wandb", check=False)
    assert ended.returncode == 2 and "the device is gone" in ended.error
    assert kept.told[-1] == "failed" and [told[0] for told in kept.told[:-1]] == [1, 2, 3]
    assert logged(tmp_path / "runs" / "r" / "metrics.jsonl") == [1, 2, 3]


def test_log_on_full_disk(tmp_path, capsys, monkeypatch):
    """Log lines that the disk refuses are kept and written later, with one warning."""
    metrics = Metrics(tmp_path / "metrics.jsonl", steps=20)
    steps(metrics, 3)
    whole = Path.open

    def full(self, *how, **more):
        file = whole(self, *how, **more)
        if self.name == "metrics.jsonl" and how and how[0] == "a":
            file.write('{"step": 4, "lo')  # half a line arrives
            file.close()
            raise OSError(errno.ENOSPC, "No space left on device")
        return file

    monkeypatch.setattr(Path, "open", full)
    for step in range(4, 10):
        metrics.add(step, {"loss": 1.0, "samples": step, "grad_norm": 1.0})
        metrics.flush(speak=False)
    assert logged(tmp_path / "metrics.jsonl") == [1, 2, 3]
    monkeypatch.undo()
    metrics.add(10, {"loss": 1.0, "samples": 10, "grad_norm": 1.0})
    metrics.flush(speak=False)
    assert logged(tmp_path / "metrics.jsonl") == list(range(1, 11))
    assert capsys.readouterr().out.count("cannot be written") == 1


def test_tensorboard_scalars(tiny, call, tmp_path):
    """TensorBoard's events hold the logged losses."""
    pytest.importorskip("tensorboard", reason="tracker=tensorboard is an optional extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    call("train.py", *tiny.train, "init=scratch", "batch_size=4", "steps=4", "run=r", "tracker=tensorboard")
    events = EventAccumulator(str(tmp_path / "runs" / "r" / "tensorboard")).Reload()
    rows = [json.loads(line) for line in (tmp_path / "runs" / "r" / "metrics.jsonl").read_text().splitlines()]
    wanted = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert {event.step: event.value for event in events.Scalars("loss")} == pytest.approx(wanted)


def test_bad_tracker_refused(tmp_path, monkeypatch, call):
    """A tracker with an unknown name or a missing package is one clear error, before any work."""
    how = {"project": None, "run": "r", "folder": tmp_path, "config": {}}
    with pytest.raises(ValueError, match="choose one of wandb, tensorboard, trackio, mlflow, jsonl"):
        build_tracker("wands", **how)
    whole = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in trackers.TRACKERS else whole(name))
    for name in ("tensorboard", "trackio", "mlflow"):
        with pytest.raises(ValueError, match=rf'tracker={name} needs .* pip install "wantrain\[{name}\]"; or'):
            build_tracker(name, **how)
    ended = call("train.py", "tracker=trackio", "data.shards=nowhere", check=False)
    assert ended.error.startswith("tracker=trackio needs its package") and not list(tmp_path.iterdir())


class Library:
    """Trackio's or MLflow's module, with what accelerate calls of it."""

    def __init__(self):
        self.said, self.config = [], {}
        self.utils = types.SimpleNamespace(
            validation=types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
        )

    def init(self, **how):
        self.said.append(("init", how))
        return self

    start_run, log_params = init, lambda self, values: self.config.update(values)

    def search_experiments(self, **_):
        return []

    def create_experiment(self, name, **_):
        return name

    def log(self, values, step):
        self.said.append((step, values))

    def log_metrics(self, metrics, step):
        self.log(metrics, step)

    def finish(self):
        self.said.append("closed")

    end_run = finish


@pytest.mark.parametrize("name", ["trackio", "mlflow"])
def test_trackers_of_accelerate(name, tmp_path, monkeypatch):
    """Trackio and MLflow get the project, the run's name, its settings under dotted keys, and every step."""
    PartialState(cpu=True)  # as train.py has begun it by then
    library = Library()
    monkeypatch.setitem(sys.modules, name, library)
    monkeypatch.setattr(trackers, "check_tracker", lambda name: None)
    config = {"optimizer": {"lr": 0.1, "betas": [0.9, 0.95]}, "run": "r"}
    tracker = build_tracker(name, project="p", run="r", folder=tmp_path, config=config)
    tracker.scalars(1, {"loss": 0.5})
    tracker.previews(1, [])
    tracker.close()
    (_, how), *logged_steps = library.said
    assert {"trackio": how.get("project"), "mlflow": how.get("experiment_id")}[name] == "p"
    assert {"trackio": how.get("name"), "mlflow": how.get("run_name")}[name] == "r"
    flat = {"optimizer.lr": 0.1, "optimizer.betas": [0.9, 0.95], "run": "r"}
    assert {key: library.config[key] for key in flat} == flat
    assert logged_steps == [(1, {"loss": 0.5}), "closed"]


@pytest.mark.parametrize("name", ["trackio", "mlflow"])
def test_installed_tracker(name, tiny, call, tmp_path, monkeypatch):
    """Where the package is installed, it holds the logged losses."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when the package is imported
    library = pytest.importorskip(name, reason=f"tracker={name} is an optional extra")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    call("train.py", *tiny.train, "init=scratch", "batch_size=4", "steps=4", "run=r", f"tracker={name}")
    rows = [json.loads(line) for line in (tmp_path / "runs" / "r" / "metrics.jsonl").read_text().splitlines()]
    wanted = {row["step"]: row["loss"] for row in rows if "loss" in row}
    if name == "mlflow":
        (run,) = library.search_runs(experiment_names=["wantrain"], output_format="list")
        history = library.MlflowClient().get_metric_history(run.info.run_id, "loss")
        found = {metric.step: metric.value for metric in history}
        assert run.data.params["optimizer.lr"] == "0.0001"
    else:
        from trackio.sqlite_storage import SQLiteStorage

        found = {row["step"]: row["loss"] for row in SQLiteStorage.get_logs("wantrain", "r") if "loss" in row}
    assert found == pytest.approx(wanted)


@pytest.mark.slow
def test_wandb_key_of_login(tmp_path, monkeypatch):
    """The key that `wandb login` leaves in ~/.netrc counts as one."""
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {'0123456789' * 4}\n")
    code = "from wantrain.training.monitoring.trackers import _has_key; print(_has_key())"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert ended.stdout.strip() == "True", ended.stderr


def test_dead_service_at_exit(tmp_path, monkeypatch):
    """A tracker whose process hangs is ended when the program exits, so that the program does."""
    monkeypatch.setattr(trackers, "LAST_WAIT", 0.1)
    monkeypatch.setattr(trackers, "SERVICE", "sleep")
    at_exit = []
    monkeypatch.setattr(trackers.atexit, "register", at_exit.append)
    service = subprocess.Popen(["sleep", "100"])
    tracker = AsyncTracker(lambda: Snapshot(5.0), timeout=0.1)
    tracker.scalars(1, {"loss": 1.0})
    tracker.close()
    assert service.poll() is None and len(at_exit) == 1
    at_exit[0]()
    assert service.wait(10) == -signal.SIGKILL
