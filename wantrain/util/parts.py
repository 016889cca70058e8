"""Loops over parts of a tensor, which a trace need not run to their end: parts of one size cost the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

#: A place in a tensor: a row, and tokens of it.
Place = tuple[int, slice]

_counts: ContextVar[Callable[[int], None] | None] = ContextVar("counts", default=None)


def parts(rows: int, tokens: int, most: int) -> Iterator[Place]:
    """Every row's tokens in parts of at most `most`. Inside `shortened`, two parts of each size."""
    return _run([(row, slice(at, min(at + most, tokens))) for row in range(rows) for at in range(0, tokens, most)])


def parts_of(lengths: Sequence[int], most: int) -> Iterator[Place]:
    """As `parts` of rows of different lengths that lie one after another: a row, and tokens of the whole."""
    ends = enumerate(zip(lengths, itertools.accumulate(lengths), strict=True))
    return _run(
        [(row, slice(at, min(at + most, end))) for row, (own, end) in ends for at in range(end - own, end, most)]
    )


def _run(places: Sequence[Place]) -> Iterator[Place]:
    counts = _counts.get()
    if counts is None:
        yield from places
        return
    for alike in _by_size(places):
        yield alike[0]
        if len(alike) > 1:
            counts(len(alike) - 1)
            yield alike[1]
            counts(1)


@contextmanager
def shortened(counts: Callable[[int], None]) -> Iterator[None]:
    """Run two parts of each size and leave out the others: for tensors without values. `counts` gets, for
    each part that runs, how many it stands for.
    """
    before = _counts.set(counts)
    try:
        yield
    finally:
        _counts.reset(before)


def _by_size(places: Iterable[Place]) -> list[list[Place]]:
    found: dict[int, list[Place]] = {}
    for row, part in places:
        found.setdefault(part.stop - part.start, []).append((row, part))
    return list(found.values())
