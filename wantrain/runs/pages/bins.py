"""Values by step in a bounded number of bins, for charts of runs of any length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class Tally:
    """What a bin knows of one value: its sum, number, largest and last."""

    total: float = 0.0
    count: int = 0
    largest: float = -float("inf")
    last: float = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self.total += value
        self.count += 1
        self.largest = max(self.largest, value)
        self.last = value

    def merge(self, later: Tally) -> None:
        """Take in the tally of the bin after this one."""
        self.total += later.total
        self.count += later.count
        self.largest = max(self.largest, later.largest)
        self.last = later.last

    @property
    def mean(self) -> float:
        return self.total / self.count


@dataclass(frozen=True)
class WorstStep:
    """The step of a bin whose losses were furthest above the usual, with its clips as (id, sigma, loss)."""

    step: int
    score: float
    values: Mapping[str, float]
    clips: tuple[tuple[str, float | None, float | None], ...]


@dataclass
class Bin:
    """Some steps in a row: tallies by key, and the worst step by expert. `step` is the last one seen."""

    step: int = 0
    tallies: dict[str, Tally] = field(default_factory=dict)
    worst: dict[str, WorstStep] = field(default_factory=dict)

    def add(self, key: str, value: float) -> None:
        """Count one value of a key."""
        self.tallies.setdefault(key, Tally()).add(value)

    def see(self, expert: str, step: WorstStep) -> None:
        """Keep a step if it is the worst of its expert so far."""
        if expert not in self.worst or step.score > self.worst[expert].score:
            self.worst[expert] = step

    def merge(self, later: Bin) -> None:
        """Take in the bin after this one."""
        self.step = later.step
        for key, tally in later.tallies.items():
            self.tallies.setdefault(key, Tally()).merge(tally)
        for expert, step in later.worst.items():
            self.see(expert, step)


@dataclass
class Bins:
    """At most `limit` bins of `width` steps each; where a step needs more, pairs of bins become one."""

    limit: int
    width: int = 1
    bins: dict[int, Bin] = field(default_factory=dict)

    def at(self, step: int) -> Bin:
        """The bin of a step, which becomes its last one."""
        while step // self.width >= self.limit:
            self._double()
        found = self.bins.setdefault(step // self.width, Bin())
        found.step = step
        return found

    def sorted(self) -> list[Bin]:
        """All bins that hold something, in order."""
        return [self.bins[number] for number in sorted(self.bins)]

    def _double(self) -> None:
        halves, self.bins, self.width = self.bins, {}, 2 * self.width
        for number in sorted(halves):
            if number // 2 in self.bins:
                self.bins[number // 2].merge(halves[number])
            else:
                self.bins[number // 2] = halves[number]
