"""A run's log as a page needs it: read as it grows, and kept in bounded memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wantrain.runs.pages.bins import Bins, WorstStep

#: Points of a chart over steps, columns of a heat map, and clips of one step that are kept, at most.
POINTS, COLUMNS, CLIPS = 1200, 160, 8
#: The most unusual steps that the page names.
UNUSUAL = 24
#: Values of an optimizer step that its expert has, and those that the whole run has.
OF_EXPERT = ("loss", "grad_norm", "lr", "times_usual", "update_ratio")
OF_RUN = ("samples", "seconds", "tokens_per_second", "mfu", "host_gb", "device_gb", "save_seconds")
#: Slices of the noise range in which a clip's loss is compared with that of others, and how fast their mean follows.
SLICES, RATE = 20, 0.02


@dataclass
class ClipLoss:
    """How a clip's losses compare with those of others at the same noise: a sum of logarithms, and their number."""

    total: float = 0.0
    count: int = 0

    @property
    def ratio(self) -> float:
        return math.exp(self.total / self.count)


@dataclass
class Tail:
    """The new lines of a JSON Lines file that grows."""

    path: Path
    place: int = 0
    inode: int = 0

    def was_replaced(self) -> bool:
        """True, once, if the file is not the one that was read so far: a resume cuts it back. It is read anew then."""
        if not self.path.is_file():
            return False
        now = self.path.stat()
        replaced = bool(self.inode) and (now.st_ino != self.inode or now.st_size < self.place)
        self.inode, self.place = now.st_ino, 0 if replaced else self.place
        return replaced

    def rows(self) -> Iterator[dict[str, Any]]:
        """The objects of the lines that are complete and new."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(self.place)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self.place += len(line)
                with suppress(ValueError):  # a line that a kill has cut
                    row = json.loads(line)
                    if isinstance(row, dict) and "step" in row:
                        yield row


@dataclass
class RunLog:
    """What the rows of a metrics.jsonl say, in bins.

    expert  name of the expert of steps that name none: the run has one only
    """

    expert: str
    steps: Bins = field(default_factory=lambda: Bins(POINTS))
    heat: dict[str, Bins] = field(default_factory=dict)
    validations: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    last_step: int = 0
    unusual: list[tuple[float, int, str]] = field(default_factory=list)
    picked: dict[int, WorstStep] = field(default_factory=dict)
    by_clip: dict[str, ClipLoss] = field(default_factory=dict)
    usual: dict[tuple[str, int], float] = field(default_factory=dict)

    def add(self, row: Mapping[str, Any]) -> None:
        """Take in one row, in their order."""
        step, expert = int(row["step"]), str(row.get("expert", self.expert))
        self.last_step = max(self.last_step, step)
        if "loss" in row:
            self._add_step(step, expert, row)
        for key, value in row.items():
            if key.endswith("loss_by_sigma") and "validation" not in key and value:
                self._add_heat(step, key.rpartition("/")[0] or self.expert, value)
            if key.endswith(("validation_loss", "validation_psnr")):
                prefix = key.removesuffix("loss").removesuffix("psnr").removesuffix("validation_")
                own = {
                    name.removeprefix(prefix): inner
                    for name, inner in row.items()
                    if name.startswith(f"{prefix}validation_")
                }
                name = prefix.rstrip("/") or self.expert
                self.validations.setdefault(name, []).append({"step": step, **own})

    def _add_step(self, step: int, expert: str, row: Mapping[str, Any]) -> None:
        binned = self.steps.at(step)
        values = {key: float(row[key]) for key in OF_EXPERT if row.get(key) is not None}
        for key, value in values.items():
            binned.add(f"{expert}/{key}", value)
        for key, value in row.items():
            if value is not None and (key in OF_RUN or key.startswith("time/")):
                binned.add(key, float(value))
        clips = tuple((str(clip), sigma, loss) for clip, sigma, loss in row.get("clips", ()))
        for clip, sigma, loss in clips:
            self._add_clip(expert, clip, sigma, loss)
        most = sorted(clips, key=lambda clip: -(clip[2] if clip[2] is not None else math.inf))[:CLIPS]
        score = values.get("times_usual", values.get("loss", math.inf))
        worst = WorstStep(step, score, values, tuple(most))
        binned.see(expert, worst)
        if "times_usual" in values:
            self.unusual.append((score, step, expert))
            self.picked[step] = worst
            if len(self.unusual) > 4 * UNUSUAL:
                self._forget()

    def _forget(self) -> None:
        """Keep the most unusual steps only."""
        self.unusual = sorted(self.unusual, reverse=True)[:UNUSUAL]
        kept = {step for _, step, _ in self.unusual}
        self.picked = {step: found for step, found in self.picked.items() if step in kept}

    def _add_heat(self, step: int, expert: str, losses: Mapping[str, float]) -> None:
        binned = self.heat.setdefault(expert, Bins(COLUMNS)).at(step)
        for sigma, loss in losses.items():
            if loss is not None:
                binned.add(sigma, float(loss))

    def _add_clip(self, expert: str, clip: str, sigma: float | None, loss: float | None) -> None:
        """Compare a clip's loss with the usual one at its noise, and let that follow."""
        if sigma is None or loss is None or not 0 < loss < math.inf:
            return
        slot, logarithm = (expert, int(sigma * SLICES)), math.log(loss)
        usual = self.usual.setdefault(slot, logarithm)
        self.usual[slot] = usual + RATE * (logarithm - usual)
        own = self.by_clip.setdefault(clip, ClipLoss())
        own.total += logarithm - usual
        own.count += 1
