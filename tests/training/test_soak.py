"""A long run leaks nothing: memory, files, shared memory and processes stay where they are (slow tier, minutes)."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS, EVERY = 2000, 50
WARM = 500  # steps after which caches are filled


@pytest.mark.slow
def test_soak(tiny, environment, tmp_path):
    """Two thousand steps with validation, saves and previews leak nothing.

    Validation, a save and a preview every fifty steps; memory grows by at most 1 KB a step after warming up.
    """
    command = (
        *tiny.train, "init=scratch", "run=r", "batch_size=2", f"steps={STEPS}", f"checkpoint.every={EVERY}",
        f"validation.every={EVERY}", "data.holdout=0.2", "validation.clips=2", f"sample.every={EVERY}",
        "sample.count=1", "sample.steps=2", "model.num_frames=5", "ema=0.99",
    )  # fmt: skip
    shared = set(Path("/dev/shm").iterdir())
    with (tmp_path / "log").open("w") as log:
        training = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *map(str, command)],
            cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        seen, process = [], psutil.Process(training.pid)
        metrics = tmp_path / "runs" / "r" / "metrics.jsonl"
        while training.poll() is None:
            step = sum(1 for _ in metrics.open()) if metrics.exists() else 0
            if step and (not seen or step > seen[-1][0]):
                try:
                    seen.append((step, process.memory_info().rss, process.num_fds(), process.num_threads()))
                except psutil.NoSuchProcess:
                    break
            time.sleep(0.3)
    assert training.returncode == 0, (tmp_path / "log").read_text()[-3000:]
    steps, memory, files, threads = np.array([row for row in seen if row[0] > WARM], dtype=np.float64).T
    assert len(steps) > 30, "looked often enough to say something"
    slope = np.polyfit(steps, memory, 1)[0]
    half = len(steps) // 2
    print(f"memory grows by {slope:.0f} bytes a step; {np.median(files):.0f} files, {np.median(threads):.0f} threads")
    assert slope <= 1024, f"memory grows by {slope:.0f} bytes a step"
    assert np.median(files[half:]) <= np.median(files[:half]) + 1 and np.median(threads[half:]) <= np.median(
        threads[:half]
    )
    assert set(Path("/dev/shm").iterdir()) <= shared
    assert not [child for child in psutil.Process().children(recursive=True) if child.pid == training.pid]
