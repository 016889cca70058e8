"""The check that trains: footage is drawn, encoded, and wan-tiny takes two steps on it, by the commands themselves."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from wantrain.demo.footage import make_footage
from wantrain.doctor.finding import Finding, Options
from wantrain.util import distributed

#: Seconds that one command may take.
LONGEST = 600


def check_training(options: Options) -> Iterator[Finding]:
    """Two steps of a LoRA of wan-tiny on the device, from drawn footage, in a temporary folder."""
    cuda = options.device != "cpu" and torch.cuda.is_available()
    device = [f"device={options.device}"]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="wantrain-doctor-") as name:
        folder = Path(name)
        make_footage(folder / "footage", num_videos=2, num_images=0, size=32)
        for words in (
            ["shard.py", "source=footage", "out=videos", "num_frames=9", "report=none", "decode.workers=1"],
            ["encode.py", "shards=videos", "out=latents", "area=1024", "report=none", "decode.workers=1", *device],
            [
                "train.py", "expert=low_noise", "adapter=lora", "data.shards=latents", "steps=2", "batch_size=2",
                "run=doctor", "tracker=jsonl", "validation=off", f"precision={'bf16' if cuda else 'fp32'}", *device,
            ],
        ):  # fmt: skip
            if why := _failure(options.root, words, folder):
                fix = "see what it says; a traceback is a bug to report"
                yield Finding("training", f"{words[0]} of wan-tiny failed: {why}", fix, broken=True)
                return
        losses = _losses(folder / "runs" / "doctor" / "metrics.jsonl")
    seconds = time.monotonic() - started
    finite = len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    found = f"two steps of wan-tiny on {'cuda' if cuda else 'cpu'}, footage and encoding included, in {seconds:.0f} s"
    wrong = f"its losses are {losses}; report it with this output"
    yield Finding("training", found, "" if finite else wrong, broken=not finite)


def _failure(root: Path, words: list[str], folder: Path) -> str | None:
    """Run a command; what it said last if it failed."""
    command = [sys.executable, str(root / words[0]), *words[1:]]
    environment = distributed.environment_without_launcher()
    try:
        ended = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LONGEST, check=False
        )
    except subprocess.TimeoutExpired:
        return f"it did not end in {LONGEST} s"
    if ended.returncode == 0:
        return None
    lines = [line.strip() for line in ended.stderr.replace("\r", "\n").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "no message")


def _losses(log: Path) -> list[float]:
    rows = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    return [float(row["loss"]) for row in rows if row.get("loss") is not None]
