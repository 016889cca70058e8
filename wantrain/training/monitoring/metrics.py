"""What a run says: metrics.jsonl always (one object per optimizer step), one console line, a tracker if wanted.

Values may live on the device, or be functions, until the lines are flushed: then the device is read once for all.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from wantrain.training.monitoring.costs import Costs
from wantrain.training.monitoring.trackers import NoTracker, Tracker
from wantrain.util import distributed
from wantrain.util.console import say
from wantrain.util.copy_stream import Readback
from wantrain.util.files import write_atomically


class Metrics:
    """One object per optimizer step into `path`, with what happened at it: loss, rates, validation.

    A `with` around a run closes its tracker, and writes what an error has left pending.
    """

    def __init__(self, path: Path, *, steps: int, peak: float | None = None, costs: Costs | None = None) -> None:
        self.path, self.steps, self.peak, self.costs = path, steps, peak, costs or Costs()
        self.noted: dict[str, float] = {}
        self.unwritten: list[str] = []
        self.refused = False
        self.tracker: Tracker = NoTracker()
        self.pending: list[dict[str, Any]] = []
        self.last_step = time.perf_counter()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            with suppress(Exception):  # a device that has failed gives no values; the error itself goes on
                self.flush(speak=False)
        self.tracker.close(failed=kind is not None)

    def cut_back(self, step: int) -> None:
        """Drop what was logged after the checkpoint that the run continues from (main process only)."""
        if not distributed.is_main() or not self.path.exists():
            return
        kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
        write_atomically(self.path, "".join(f"{line}\n" for line in kept))

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Remember one step's values; tensors stay where they are, and functions are not called, until `flush`."""
        now = time.perf_counter()
        self.costs.training += now - self.last_step
        self.pending.append({"step": step, **values, "seconds": now - self.last_step, **self.noted})
        self.last_step, self.noted = now, {}

    def note(self, key: str, value: float) -> None:
        """Something that happened between two steps, for the object of the next one."""
        self.noted[key] = value

    def annotate(self, step: int, values: Mapping[str, Any]) -> None:
        """Add to the object of `step` (made if there is none): results that came after its update."""
        if values:
            if not self.pending or self.pending[-1]["step"] != step:
                self.pending.append({"step": step})
            self.pending[-1].update(values)
        self.last_step = time.perf_counter()  # the next step does not pay for validation and previews

    def flush(self, *, speak: bool = True) -> None:
        """Write what is pending, sync it, and say one line."""
        if not self.pending:
            return
        rows = [_plain_row(row) for row in _read(self.pending)]
        self.pending = []
        measured = [row for row in rows if "tokens" in row]
        if measured:
            measured[-1].update(rates(measured, peak=self.peak))
        if not distributed.is_main():
            return
        self._write(rows)
        for row in rows:
            # A pair's two experts are two curves each.
            prefix = f"{row['expert']}/" if "expert" in row else ""
            scalars = {
                key if "/" in key else f"{prefix}{key}": value
                for key, value in row.items()
                if isinstance(value, float | int) and key != "step"
            }
            self.tracker.scalars(row["step"], scalars)
        losses = [row for row in rows if row.get("loss") is not None]
        if speak and losses:
            self._speak(losses)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        """Append rows; where the disk refuses them they wait for the next time. A log never ends a run."""
        self.unwritten += [json.dumps(row) + "\n" for row in rows]
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(self.unwritten)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with suppress(OSError):  # not half a line, and nothing twice
                os.truncate(self.path, size)
            if not self.refused:
                say(
                    f"warning: {self.path} cannot be written ({error}); the run goes on, and what it could not say "
                    f"waits in memory. Free disk space"
                )
            self.refused = True
            return
        self.unwritten, self.refused = [], False

    def _speak(self, rows: list[dict[str, Any]]) -> None:
        step = rows[-1]["step"]
        loss = sum(row["loss"] for row in rows) / len(rows)
        seconds = sum(row["seconds"] for row in rows) / len(rows)
        left = (self.steps - step) * seconds
        samples = rows[-1]["samples"] / step / seconds
        last = rows[-1]
        speed = f"  {last['tokens_per_second']:,.0f} tokens/s" if last.get("tokens_per_second") else ""
        use = f"  MFU {100 * last['mfu']:.0f} %" if "mfu" in last else ""
        say(
            f"step {step}/{self.steps}  loss {loss:.4f}  {seconds:.2f} s/step  {samples:.1f} samples/s{speed}{use}  "
            f"{int(left) // 60}m{int(left) % 60:02d}s left"
        )


def rates(rows: Sequence[Mapping[str, Any]], *, peak: float | None) -> dict[str, float]:
    """How fast the steps of some rows were, over all processes; mfu where the device's peak (operations per second of
    each process) is known.
    """
    seconds = sum(row["seconds"] for row in rows)
    speed = {
        "tokens_per_second": sum(row["tokens"] for row in rows) / seconds,
        "video_seconds_per_second": sum(row["video_seconds"] for row in rows) / seconds,
        "tflops": sum(row["flops"] for row in rows) / seconds / 1e12,
    }
    if peak is not None:
        speed["mfu"] = speed["tflops"] * 1e12 / peak / distributed.world_size()
    return speed


def _read(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with numbers for scalar tensors, which one readback brings from the device."""
    tensors = [value for row in rows for value in row.values() if isinstance(value, Tensor)]
    numbers = iter(Readback(*tensors).values() if tensors else [])
    return [
        {key: next(numbers)[0] if isinstance(value, Tensor) else value for key, value in row.items()} for row in rows
    ]


def _plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as JSON has it; a step's times become one value each."""
    plain = {key: _plain(value) for key, value in row.items() if key != "times"}
    times = row["times"].seconds() if "times" in row else {}
    return plain | {f"time/{part}": took for part, took in times.items()}


def _plain(value: Any) -> Any:
    """A value as JSON has it: what is no number is null."""
    number = value() if callable(value) else value
    return None if isinstance(number, float) and not math.isfinite(number) else number


def _step_of(line: str) -> float:
    """The step of one logged line; a line cut by a kill counts as later than any checkpoint."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")
