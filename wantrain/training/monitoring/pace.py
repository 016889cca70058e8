"""The pace of several processes: which one the others wait for.

Processes meet where gradients are summed, so a step takes all of them as long as the slowest. Its own time shows in the
parts of a step in which nobody waits for others: data, and forward where no weights or tokens are exchanged in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from wantrain.training.engine.engine import Stepper
from wantrain.training.monitoring.agreement import host_of
from wantrain.util.console import say

#: Share of a step for which the others may wait for one process before it is said.
SLOW = 0.25


class Spans(Protocol):
    """The parts of a step, in seconds by name."""

    def seconds(self) -> dict[str, float]: ...


@dataclass(frozen=True)
class Waiting:
    """Which process the others wait for.

    own     seconds of each of its steps before it meets the others: data, forward
    others  seconds of theirs, on average
    share   of a step for which they wait
    """

    process: int
    own: tuple[float, float]
    others: float
    share: float

    @classmethod
    def of(cls, rows: Tensor) -> Waiting:
        """From each process's seconds for data, for forward, and for a step (N, 3), at least two of them."""
        before = rows[:, :2].sum(1)
        others = (before.sum() - before) / (len(rows) - 1)
        process = int((before - others).argmax())
        data, forward, _ = rows[process].tolist()
        share = float((before - others)[process] / rows[:, 2].mean().clamp(min=1e-9))
        return cls(process, (data, forward), float(others[process]), share)

    def __str__(self) -> str:
        data, forward = self.own
        return (
            f"process {self.process} on {host_of(self.process)} is slower than the others: of each step it takes "
            f"{data:.2g} s for data and {forward:.2g} s for forward before it meets them, they {self.others:.2g} s. "
            f"They wait for it, {self.share:.0%} of a step; look at that machine's disk, cores and card"
        )


class Pace:
    """Compares the processes at each line of the log; says once which one is slow, until it no longer is."""

    def __init__(self) -> None:
        self.steps: list[Spans] = []
        self.first = True
        self.named: set[int] = set()

    def add(self, spans: Spans) -> None:
        """One step. The first of a start does not count: it loads and compiles."""
        if not self.first:
            self.steps.append(spans)
        self.first = False

    def report(self, stepper: Stepper) -> dict[str, float]:
        """What the log says of the steps since the last report; all processes call it. Empty in a run of one."""
        steps, self.steps = self.steps, []
        if stepper.processes == 1 or not steps:
            return {}
        seconds = [each.seconds() for each in steps]
        alone = ("data",) if stepper.forwards_together else ("data", "forward")
        own = [sum(each.get(part, 0.0) for each in seconds) * (part in alone) for part in ("data", "forward")]
        row = torch.tensor([[*own, sum(map(_total, seconds))]], dtype=torch.float64) / len(seconds)
        waiting = Waiting.of(stepper.gather(row.to(stepper.device)).cpu())
        if waiting.share > SLOW and waiting.process not in self.named:
            self.named.add(waiting.process)
            say(f"warning: {waiting}")
        elif waiting.share < SLOW / 2:
            self.named.clear()
        return {"slowest/process": waiting.process, "slowest/share": waiting.share}


def _total(seconds: dict[str, float]) -> float:
    return sum(seconds.values())
