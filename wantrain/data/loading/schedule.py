"""data.schedule: from given steps on, other weights of the sets and another batch size. phases.py goes by it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wantrain.util.numbers import is_number

#: The keys of an entry.
KEYS = ("from", "sets", "batch_size")
EXAMPLE = "[{from: 0, sets: {images: 1}}, {from: 1000, sets: {images: 0.2, videos: 0.8}}]"


@dataclass(frozen=True)
class Entry:
    """What holds from step `start` on: the weight of every set, and the samples of a step (None: the run's)."""

    start: int
    weights: Mapping[str, float]
    batch_size: int | None = None

    def __str__(self) -> str:
        total = sum(self.weights.values())
        return ", ".join(f"{weight / total:.0%} {name}" for name, weight in self.weights.items() if weight)


def read_schedule(value: Any, sets: Iterable[str]) -> tuple[Entry, ...]:
    """The entries of data.schedule for sets of these names; ValueError says what is wrong with it."""
    if not isinstance(value, list | tuple) or not value or not all(isinstance(each, Mapping) for each in value):
        raise ValueError(f"data.schedule={value} must be a list of entries: {EXAMPLE}")
    names, entries = list(sets), []
    for number, each in enumerate(value):
        key = f"data.schedule[{number}]"
        if wrong := [name for name in each if name not in KEYS]:
            raise ValueError(f"{key}.{wrong[0]} is no key of an entry; it takes {', '.join(KEYS)}")
        start, own, size = each.get("from"), each.get("sets"), each.get("batch_size")
        if not _is_count(start, least=0):
            raise ValueError(f"{key}.from={start} must be a step: a whole number, at least 0")
        if size is not None and not _is_count(size, least=1):
            raise ValueError(f"{key}.batch_size={size} must be a whole number above 0, or left out")
        if not isinstance(own, Mapping) or not own:
            raise ValueError(
                f"{key}.sets={own} must give weights by set: {{{', '.join(f'{name}: 1' for name in names)}}}"
            )
        if other := [name for name in own if name not in names]:
            raise ValueError(f"{key}.sets.{other[0]}: there is no such set; data.sets has {', '.join(names)}")
        for name, weight in own.items():
            if not (is_number(weight) and 0 <= weight < float("inf")):
                raise ValueError(f"{key}.sets.{name}={weight} must be a number, at least 0")
        weights = {name: float(own.get(name, 0)) for name in names}
        if not any(weights.values()):
            raise ValueError(f"{key}.sets={dict(own)} draws nothing; give one set a weight above 0")
        entries.append(Entry(start, weights, size))
    if entries[0].start != 0:
        raise ValueError(f"data.schedule[0].from={entries[0].start} must be 0: what the run begins with")
    for number, (one, other_one) in enumerate(itertools.pairwise(entries), start=1):
        if other_one.start <= one.start:
            raise ValueError(
                f"data.schedule[{number}].from={other_one.start} must be above {one.start}, the entry's before it"
            )
    if undrawn := [name for name in names if not any(entry.weights[name] for entry in entries)]:
        raise ValueError(f"data.sets.{undrawn[0]} is drawn by no entry of data.schedule; leave the set out")
    return tuple(entries)


def entries_of(config: Mapping[str, Any]) -> tuple[Entry, ...]:
    """The entries that a run's data= config means; without a schedule the sets' own weights all along."""
    if config.get("schedule") is not None:
        return read_schedule(config["schedule"], config["sets"])
    return (Entry(0, {name: float(own.get("weight", 1)) for name, own in config["sets"].items()}),)


def _is_count(value: Any, *, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_past(before: Sequence[Entry], now: Sequence[Entry], steps: int) -> None:
    """Raise ValueError if two schedules differ in the first `steps` steps, which are made; later entries are free."""
    ours, theirs = ([entry for entry in entries if entry.start < steps] for entries in (before, now))
    for number, (old, new) in enumerate(itertools.zip_longest(ours, theirs)):
        if old != new:
            raise ValueError(
                f"data.schedule[{number}] has changed: {_said(old)} -> {_said(new)}, and {steps} steps are made; put "
                f"it back (entries from {steps} on are free), or give the new run its own name (run=NAME)"
            )


def _said(entry: Entry | None) -> str:
    if entry is None:
        return "none"
    size = "" if entry.batch_size is None else f", batch_size {entry.batch_size}"
    weights = ", ".join(f"{name}: {weight:g}" for name, weight in entry.weights.items() if weight)
    return f"{{from {entry.start}, {weights}{size}}}"
