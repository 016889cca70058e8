"""What every stage is given: a device, sizes, checks, a way to run the commands; and how time and memory are measured.

All that is particular to CUDA stands here: events that measure time in the device's stream, and its peak of memory.
Elsewhere time is the host's clock, and memory is not measured (None).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gpu_stages.predictions import PREDICTED
from wantrain.training.monitoring.throughput import Times, moment, peak_of
from wantrain.util.cards import card_model
from wantrain.util.files import write_json

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Check:
    """One thing that must hold: what was measured, the largest value allowed, and why it is that one."""

    name: str
    measured: float | bool
    tolerance: float | bool
    passed: bool
    why: str


@dataclass
class Context:
    """What a stage is given, and where it leaves what it found.

    device  what is measured
    small   small shapes, with which every stage runs on a CPU within seconds
    work    a folder that all stages of a run share
    kept    the file into which everything is written as soon as it is known: a stage that is killed leaves it
    cases   comparisons of two sides, in the format of benchmarks/result.py
    """

    device: torch.device
    small: bool
    work: Path
    kept: Path | None = None
    measured: dict[str, Any] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)

    def note(self, **values: Any) -> None:
        """Keep what was measured, also if what follows fails."""
        self.measured |= values
        self._write()

    def compare(self, name: str, case: dict[str, Any]) -> None:
        """Keep a comparison, with what was predicted of it. Sides that do not compute the same fail the stage."""
        self.cases[name] = {**case, "predicted": self.predicted(name)}
        for what, row in case["errors"].items():
            self.check(f"{name}: {what}", row["measured"], row["allowed"], "the sides must compute the same")
        self._write()

    def predicted(self, name: str) -> dict[str, float]:
        """What was predicted of a case on this card, by side; empty where nothing was."""
        if self.small or self.device.type != "cuda":
            return {}
        return PREDICTED.get(card_model(torch.cuda.get_device_name(self.device)), {}).get(name, {})

    def check(self, name: str, measured: float, at_most: float, why: str) -> None:
        """`measured` must not be above `at_most` (nor be no number)."""
        self.checks.append(Check(name, measured, at_most, measured <= at_most, why))
        self._write()

    def require(self, name: str, holds: bool, why: str) -> None:
        """Something that must be true."""
        self.checks.append(Check(name, holds, True, holds, why))
        self._write()

    def _write(self) -> None:
        if self.kept is not None:
            checks = [asdict(check) for check in self.checks]
            found = {"measured": self.measured, "checks": checks, "cases": self.cases}
            write_json(self.kept, found)

    def command(self, program: str, *words: str, cpu: bool = False, tf32: bool = False) -> float:
        """Run a command of the project in `work`, on the device or on the CPU; returns its seconds.

        RuntimeError with the end of what it said if it fails. TF32 is off in it, unless `tf32` leaves that to torch and
        the command itself.
        """
        environment = {**os.environ, "WANDB_MODE": "disabled", **({} if tf32 else {"NVIDIA_TF32_OVERRIDE": "0"})}
        if cpu or self.device.type == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        began = time.perf_counter()
        command = [sys.executable, str(ROOT / program), *words]
        ended = subprocess.run(command, cwd=self.work, env=environment, capture_output=True, text=True, check=False)
        if ended.returncode:
            said = "\n".join((ended.stdout + ended.stderr).splitlines()[-20:])
            raise RuntimeError(f"python {program} {' '.join(words)} ended with {ended.returncode}:\n{said}")
        return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Wait for what the device still does."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    device: torch.device, parts: Mapping[str, Callable[[], Any]], *, repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each of `parts`, which are run in turn, `repeats` times after `warmup` rounds that do not count."""
    rounds = []
    for number in range(warmup + repeats):
        if number == warmup:
            reset_peak(device)
        begin, spans = moment(device), []
        last = begin
        for name, work in parts.items():
            work()
            spans.append((name, last, now := moment(device)))
            last = now
        rounds.append(Times(tuple(spans), begin, last))
    synchronize(device)
    took = [times.seconds() for times in rounds[warmup:]]
    return {name: [seconds[name] for seconds in took] for name in parts}


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, least and most of repeated measurements, in seconds."""
    return {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}


def reset_peak(device: torch.device) -> None:
    """Peaks count from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gb(device: torch.device) -> float | None:
    """The most memory that tensors took since `reset_peak`, in units of 1e9 bytes; None where nobody counts it."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def release(device: torch.device) -> None:
    """Give cached memory back, so that the next measurement begins with all of it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def product_rate(device: torch.device, side: int) -> float:
    """Operations per second of a bf16 product of two random matrices."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / summary(measure(device, {"product": lambda: a @ b}, repeats=10, warmup=3)["product"])["median"]


def speed(device: torch.device, flops: int, seconds: float) -> dict[str, float | None]:
    """TFLOP/s, and the share of what the device could do in dense bfloat16 (None for a device that nobody knows)."""
    peak = peak_of(device)
    return {"tflops": flops / seconds / 1e12, "mfu": None if peak is None else flops / seconds / peak}


@torch.no_grad()
def random_weights(
    build: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype, *, fp32_parts: Iterable[str] = ()
) -> nn.Module:
    """A module with random weights that are made on the device, tensor by tensor; those of `fp32_parts` in float32.

    Matrices keep the variance of their input, norms are ones, biases zeros: what is computed stays of order one. Every
    call draws the same numbers.
    """
    torch.manual_seed(0)
    with torch.device("meta"):
        module = build()
    kept = tuple(fp32_parts)
    for name, parameter in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        own = torch.float32 if any(part in name for part in kept) else dtype
        value = torch.empty(parameter.shape, device=device, dtype=own)
        rows = parameter.shape[0] if parameter.ndim else 1
        if leaf == "bias":
            value.zero_()
        elif "norm" in name or parameter.numel() == rows:
            value.fill_(1.0)
        else:
            value.normal_(std=(rows / parameter.numel()) ** 0.5)
        setattr(module.get_submodule(owner), leaf, nn.Parameter(value))
    assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    return module


def read_losses(run: Path) -> list[float]:
    """The loss of every step of a run, as its log has it."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]
