"""The order of a run as arithmetic: which samples make up optimizer step n. Pure NumPy, no state to save.

Every batch comes from one bucket, so that its samples share a shape, and all processes have equal work in every step.
A bucket is an endless stream; of several sets, each gives it its share. A set's part of a bucket is an endless stream
too: one shuffled pass over its samples after another. Streams are woven by their rates, so that what does not fill a
batch opens the next epoch instead of being dropped or repeated. The order depends on the samples' buckets, weights and
sets, the seed and the batch size alone: not on processes, workers or restarts. Nothing is computed for a whole epoch of
many samples: a batch of a million costs what one of a thousand does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

#: Up to this many things are shuffled by sorting random numbers, more by arithmetic on each one's place.
TABLE = 4096
#: Of the draws of a bucket that several sets share, about this many make up a round in which each has its share.
ROUND = 256
#: Weights of samples are counted in these parts of one.
PARTS = 1000


class Planned(Protocol):
    """What a plan asks of a data set; `weights`, `sets` and `shares` may be missing or None (see Plan)."""

    @property
    def buckets(self) -> NDArray[np.integer]: ...


class Plan:
    """The order of batches of `batch_size` samples (over all processes and accumulation) of a data set.

    buckets  the bucket number of each sample, (N,)
    weights  how often each sample comes in an epoch, (N,), in thousandths; None: once
    sets     which set each sample is of, (N,), a number into `shares`: the sets' shares of all samples, in any unit
             (0.7 and 0.3, or 7 and 3). An epoch is as many samples as the sets have together in one pass each

    About 12 bytes a sample are kept.
    """

    def __init__(
        self,
        buckets: NDArray[np.integer],
        *,
        batch_size: int,
        seed: int,
        weights: NDArray[Any] | None = None,
        sets: NDArray[np.integer] | None = None,
        shares: Sequence[float] = (1.0,),
    ) -> None:
        if len(buckets) == 0:
            raise ValueError("there are no samples to train on; shard and encode some footage first")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.batch_size, self.seed = batch_size, seed
        streams, owners = _streams(np.asarray(buckets), weights, sets, len(shares), seed)
        rates = _rates(streams, [set_number for _, set_number in owners], shares)
        total = sum(rates, Fraction(0))
        self.samples_per_epoch = max(1, round(total))
        # Long epochs are woven in parts, so that no table grows with them.
        self._parts = max(1, math.ceil(total / batch_size / TABLE))
        self._streams: list[list[_Stream]] = []
        self._turns: list[_Interleave] = []
        per_bucket = []
        for number, bucket in enumerate(sorted({bucket for bucket, _ in owners})):
            own = [place for place, (other, _) in enumerate(owners) if other == bucket]
            rate = sum((rates[place] for place in own), Fraction(0))
            self._streams.append([streams[place] for place in own])
            self._turns.append(_Interleave([rates[place] * ROUND / rate for place in own], seed, 2, number))
            per_bucket.append(rate / (batch_size * self._parts))
        self._batches = _Interleave(per_bucket, seed, 1)

    @classmethod
    def of(cls, data: Planned, *, batch_size: int, seed: int) -> Plan:
        """The plan of a data set, with the weights and shares that it has."""
        found = {name: getattr(data, name, None) for name in ("weights", "sets", "shares")}
        told = {name: value for name, value in found.items() if value is not None}
        return cls(data.buckets, batch_size=batch_size, seed=seed, **told)

    def batch(self, step: int) -> Indices:
        """The sample numbers of optimizer step `step`, (batch_size,)."""
        buckets, numbers = self._batches.items(step, 1)
        streams, turns = self._streams[int(buckets[0])], self._turns[int(buckets[0])]
        first = int(numbers[0]) * self.batch_size
        if len(streams) == 1:
            return streams[0].draws(np.arange(first, first + self.batch_size))
        batch = np.empty(self.batch_size, dtype=np.int64)
        whose, ranks = turns.items(first, self.batch_size)
        for number in np.unique(whose):
            batch[whose == number] = streams[number].draws(ranks[whose == number])
        return batch

    def epoch(self, step: int) -> int:
        """The epoch that `step` belongs to."""
        return self._batches.part_of(step) // self._parts

    def steps_for_epochs(self, epochs: float) -> int:
        """Optimizer steps until the samples of `epochs` passes have been used, rounded up."""
        return max(1, math.ceil(epochs * self.samples_per_epoch / self.batch_size))


class _Stream:
    """The samples of one bucket and one set without end: a shuffled pass over them after another.

    With weights, a pass is as many draws as they sum up to, at even distances along the line of all weights, from a
    place that moves from pass to pass: a sample of weight 2.5 comes two or three times a pass.
    """

    def __init__(self, members: NDArray[np.integer], weights: NDArray[np.int64] | None, *position: int) -> None:
        self.members, self.position = members, position
        self.line = None if weights is None else np.cumsum(weights)
        self.weight = Fraction(len(members)) if self.line is None else Fraction(int(self.line[-1]), PARTS)
        self.slots = max(1, round(self.weight))
        self._table: tuple[int, Indices] | None = None

    def draws(self, ranks: Indices) -> Indices:
        """The samples at these places of the stream, (len(ranks),)."""
        drawn = np.empty(len(ranks), dtype=np.int64)
        laps, places = np.divmod(ranks, self.slots)
        for lap in np.unique(laps).tolist():
            slots = self._shuffle(places[laps == lap], lap)
            drawn[laps == lap] = self.members[slots if self.line is None else self._on_line(slots, lap)]
        return drawn

    def _shuffle(self, places: Indices, lap: int) -> Indices:
        seed, *rest = self.position
        if self.slots > TABLE:
            return _scattered(places, self.slots, seed, 0, *rest, lap)
        if self._table is None or self._table[0] != lap:
            self._table = lap, _shuffled(self.slots, seed, 0, *rest, lap)
        return self._table[1][places]

    def _on_line(self, slots: Indices, lap: int) -> NDArray[np.integer]:
        """Which members the slots of a pass fall on."""
        assert self.line is not None
        length = int(self.line[-1])
        seed, *rest = self.position
        start = int(np.random.PCG64(_entropy(seed, 3, *rest)).random_raw())
        # Steps of the golden ratio fill the line most evenly: a sample of weight 0.5 comes in every other pass or so.
        start = (start + lap * round(length * (math.sqrt(5) - 1) / 2)) % length
        whole, part = divmod(length, self.slots)
        points = slots * whole + (slots * part + start) // self.slots
        return np.searchsorted(self.line, points, side="right")


class _Interleave:
    """Endless streams woven into one, each at its own rate: every item is the next one of some stream.

    Part p of the weave has floor(rate * (p+1)) - floor(rate * p) items of each stream, in shuffled order.
    """

    def __init__(self, rates: Sequence[Fraction], *position: int) -> None:
        self.per = math.lcm(*(rate.denominator for rate in rates))
        self.rates = [int(rate * self.per) for rate in rates]
        self.position = position
        self._part: tuple[int, NDArray[np.int64]] | None = None

    def items(self, first: int, count: int) -> tuple[Indices, Indices]:
        """(stream, number in that stream) of `count` items from `first` on."""
        found: list[NDArray[np.int64]] = []
        while count:
            start, table = self._holding(first)
            found.append(table[:, first - start : first - start + count])
            first, count = first + found[-1].shape[1], count - found[-1].shape[1]
        streams, numbers = np.concatenate(found, axis=1)
        return streams, numbers

    def part_of(self, item: int) -> int:
        """The part that an item belongs to, by bisection over exact counts."""
        low, high = 0, (item + len(self.rates) + 1) * self.per // sum(self.rates) + 2
        while low < high:
            middle = (low + high) // 2
            if self._first(middle + 1) > item:
                high = middle
            else:
                low = middle + 1
        return low

    def _first(self, part: int) -> int:
        """How many items all parts before `part` have."""
        return sum(rate * part // self.per for rate in self.rates)

    def _holding(self, item: int) -> tuple[int, NDArray[np.int64]]:
        """The part that holds an item: its first item, and (stream, number in it) of each, (2, items).

        Whose turn it is is shuffled; each stream is used in order, so that at any step no sample of it has been used
        twice more than another. The part that was asked for last is kept.
        """
        if self._part is None or not 0 <= item - self._part[0] < self._part[1].shape[1]:
            part = self.part_of(item)
            before = np.array([rate * part // self.per for rate in self.rates], dtype=np.int64)
            counts = np.array([rate * (part + 1) // self.per for rate in self.rates], dtype=np.int64) - before
            stream = np.repeat(np.arange(len(counts)), counts)[_shuffled(int(counts.sum()), *self.position, part)]
            within = np.arange(len(stream)) - np.repeat(np.cumsum(counts) - counts, counts)
            number = np.empty_like(stream)
            number[np.argsort(stream, kind="stable")] = within + np.repeat(before, counts)
            self._part = int(before.sum()), np.stack([stream, number])
        return self._part


def _streams(
    buckets: NDArray[np.integer],
    weights: NDArray[Any] | None,
    sets: NDArray[np.integer] | None,
    num_sets: int,
    seed: int,
) -> tuple[list[_Stream], list[tuple[int, int]]]:
    """A stream for each bucket of each set that has samples of some weight, and (bucket, set) of each."""
    key = buckets.astype(np.int64) if sets is None else buckets.astype(np.int64) * num_sets + sets
    # The smallest type sorts fastest: numbers of up to 16 bits are counted, not compared.
    order = np.argsort(key.astype(np.min_scalar_type(int(key.max()))), kind="stable")
    order = order.astype(np.min_scalar_type(len(order)))
    counts = np.bincount(key)
    units = None if weights is None else _units(np.asarray(weights), len(buckets))
    if units is not None and (units == PARTS).all():
        units = None
    streams: list[_Stream] = []
    owners: list[tuple[int, int]] = []
    for place, members in zip(np.flatnonzero(counts), np.split(order, np.cumsum(counts[counts > 0])[:-1]), strict=True):
        own = None if units is None else units[members]
        if own is None or own.any():
            streams.append(_Stream(members, own, seed, len(streams)))
            owners.append(divmod(int(place), num_sets))
    return streams, owners


def _units(weights: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Weights in whole thousandths. ValueError for what is no weight."""
    if len(weights) != count:
        raise ValueError(f"{len(weights)} weights were given for {count} samples")
    if not (np.isfinite(weights).all() and (weights >= 0).all() and (weights <= PARTS).all()):
        raise ValueError(f"weights of samples must lie between 0 and {PARTS}, not {weights.min()} to {weights.max()}")
    units = np.rint(weights.astype(np.float64) * PARTS).astype(np.int64)
    if not units.any():
        raise ValueError("every sample has weight 0 (less than half a thousandth); nothing is left to train on")
    return units


def _rates(streams: list[_Stream], owners: list[int], shares: Sequence[float]) -> list[Fraction]:
    """Samples of each stream in an epoch, exactly. ValueError for shares that cannot be."""
    if len(shares) == 1:
        return [stream.weight for stream in streams]
    passes = [Fraction(0)] * len(shares)  # samples in one pass over each set
    for stream, owner in zip(streams, owners, strict=True):
        passes[owner] += stream.weight
    if not all(math.isfinite(share) and share > 0 for share in shares):
        raise ValueError(f"the sets' shares {list(shares)} must all be above 0; leave out a set that is not wanted")
    if not all(passes):
        raise ValueError(f"set {passes.index(Fraction(0))} has nothing to train on (no samples, or all of weight 0)")
    parts = [Fraction(repr(float(share))) for share in shares]
    laps = [sum(passes) * part / sum(parts) / own for part, own in zip(parts, passes, strict=True)]
    return [stream.weight * laps[owner] for stream, owner in zip(streams, owners, strict=True)]


def _entropy(*position: int) -> list[int]:
    return [number % 2**64 for number in position]


def _shuffled(count: int, *position: int) -> Indices:
    """A permutation of range(count) that is a fixed function of the position.

    From the generator's raw bits, which NumPy promises never to change, unlike what its `permutation` makes of them:
    a resume after an upgrade must go on in the same order.
    """
    bits = np.random.PCG64(_entropy(*position))
    return np.argsort(bits.random_raw(count), kind="stable")


def _scattered(places: Indices, count: int, *position: int) -> Indices:
    """Where a permutation of range(count) puts `places`, without the permutation: a fixed function of the position.

    A Feistel network permutes all numbers of as many bits as count - 1 has; what falls outside the range goes through
    it again until it is inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    bits = (count - 1).bit_length()
    keys = np.random.PCG64(_entropy(*position)).random_raw(6)
    found, outside = places.astype(np.uint64), np.full(len(places), True)
    while outside.any():
        found[outside] = _feistel(found[outside], bits, keys)
        outside = found >= count
    return found.astype(np.int64)


def _feistel(numbers: NDArray[np.uint64], bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A permutation of the numbers of `bits` bits; an even number of keys, one a round."""
    high, low = bits - bits // 2, bits // 2
    left, right = numbers >> np.uint64(low), numbers & np.uint64(2**low - 1)
    for key in keys:
        mixed = right + key
        # The finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & np.uint64(2**high - 1))
        high, low = low, high
    return (left << np.uint64(low)) | right


def share(batch: Sequence[int] | Indices, micro_step: int, accumulate: int, rank: int, world: int) -> Indices:
    """One process's part of one micro-step: (accumulate, world, micro)[micro_step, rank]."""
    whole = np.asarray(batch)
    if len(whole) % (accumulate * world):
        raise ValueError(f"batch_size={len(whole)} must divide by accumulate x processes = {accumulate} x {world}")
    return whole.reshape(accumulate, world, -1)[micro_step, rank]
