"""Checkpoints and failures: how long a checkpoint takes, what a failure costs, and how often to save."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scale_parts.assumptions import Assumptions
from scale_parts.cluster import Step, largest_file
from wantrain.util.cards import Card

#: Bytes per second of shared disks, for the table.
DISKS = (5e9, 20e9, 50e9, 200e9)
#: A goodput within so much of the best is as good.
FLAT = 0.001


@dataclass(frozen=True)
class Save:
    """Seconds of one checkpoint of a run.

    pause   that training waits for it: the copy to the host, and what is agreed on
    behind  from then until it is visible: written by all processes, hashed, renamed
    cost    by which it makes the run longer
    """

    pause: float
    behind: float
    cost: float

    @classmethod
    def of(
        cls, taken: Assumptions, parts: Mapping[str, float], card: Card, *, disk: float, background: bool = True
    ) -> Save:
        """A save as JointSave makes it: every process writes its part, then each file is read back by one of them."""
        size = sum(parts.values())
        copy = size / taken.processes / card.link
        write = size / disk + largest_file(parts) / taken.hashing
        if not background:
            return cls(taken.pause + write, 0.0, taken.pause + write)
        pause = taken.pause + copy
        return cls(pause, write, pause + taken.slower * write)


@dataclass(frozen=True)
class Outage:
    """How often the whole run is interrupted, and how long until it goes on; seconds."""

    between: float
    restart: float


def young(save: Save, outage: Outage) -> float:
    """The best interval in seconds to first order (Young, 1974)."""
    return math.sqrt(2 * save.cost * outage.between)


def daly(save: Save, outage: Outage) -> float:
    """The best interval in seconds to higher order (Daly, 2006, equation 37), without the save itself."""
    part = save.cost / (2 * outage.between)
    return young(save, outage) * (1 + math.sqrt(part) / 3 + part / 9) - save.cost if part < 1 else outage.between


def kept_steps(running: NDArray[np.float64], steps: int, step: float, save: Save) -> NDArray[np.float64]:
    """Steps that outlive a failure after `running` seconds, where every `steps` steps of `step` seconds are saved.

    As Checkpoints does it: the run stops for `pause`, the rest is written beside the next steps, which are slower
    meanwhile; a save waits for the one before; what is not visible when the failure comes is lost.
    """
    first = steps * step
    later = max(first + save.cost - save.pause, save.behind) + save.pause
    saves = np.floor((running - first - save.pause - save.behind) / later) + 1
    return steps * np.maximum(0.0, saves)


def goodput(draws: NDArray[np.float64], steps: int, step: float, save: Save, outage: Outage) -> tuple[float, float]:
    """(share of all time that became steps which stayed, its standard error) over failures at exponential distances.

    Each stretch begins with a restart; a failure within it costs the stretch.
    """
    between = draws * outage.between
    useful = kept_steps(np.maximum(0.0, between - outage.restart), steps, step, save) * step
    share = float(useful.sum() / between.sum())
    return share, float(np.std(useful - share * between) / between.mean() / math.sqrt(len(draws)))


def failures(taken: Assumptions, parts: Mapping[str, float], card: Card, step: Step) -> dict[str, Any]:
    """The checkpoint on several disks, and goodput over intervals for rare and frequent failures."""
    seconds = step.most
    disks = {f"{disk / 1e9:g}": vars(Save.of(taken, parts, card, disk=disk)) for disk in DISKS}
    read_back = sum(parts.values()) / taken.disk
    draws = np.random.default_rng(taken.seed).exponential(size=taken.failures)
    grid = sorted({max(1, round(3600 / seconds * 2.0**power)) for power in np.arange(-6, 4.01, 0.25)})
    curves = {}
    for background in (True, False):
        save = Save.of(taken, parts, card, disk=taken.disk, background=background)
        for name in ("rare", "frequent"):
            hours = getattr(taken, name) / taken.processes
            outage = Outage(3600 * hours, taken.restart + read_back)
            curves[f"{name}, {'background' if background else 'waiting'}"] = {
                "hours_between": hours,
                **_curve(draws, grid, seconds, save, outage),
            }
    return {
        "parts": dict(parts),
        "size": sum(parts.values()),
        "of_a_process": sum(parts.values()) / taken.processes,
        "step_seconds": seconds,
        "disks": disks,
        "restart_seconds": taken.restart + read_back,
        "curves": curves,
    }


def _curve(
    draws: NDArray[np.float64], grid: Sequence[int], seconds: float, save: Save, outage: Outage
) -> dict[str, Any]:
    """Goodput over intervals, the best of them, and what the equations say."""
    found = [goodput(draws, steps, seconds, save, outage) for steps in grid]
    best = max(range(len(grid)), key=lambda place: found[place][0])
    flat = [steps for steps, (share, _) in zip(grid, found, strict=True) if share >= found[best][0] - FLAT]
    asked = max(1, round(daly(save, outage) / seconds))
    default, _ = goodput(draws, 100, seconds, save, outage)
    return {
        "steps": list(grid),
        "goodput": [round(share, 5) for share, _ in found],
        "error": round(max(error for _, error in found), 5),
        "best": grid[best],
        "flat": [flat[0], flat[-1]],
        "young": young(save, outage) / seconds,
        "daly": daly(save, outage) / seconds,
        "at_best": found[best][0],
        "at_daly": goodput(draws, asked, seconds, save, outage)[0],
        "at_100": default,
        "lost_hours": outage.between * (1 - found[best][0]) / 3600,
    }
