"""The samples of each bucket as endless streams in a fixed order: what the samplers of a run draw from. NumPy only.

The samples of one bucket of one set form an endless stream: one shuffled cycle (a pass over all of them) after
another. The streams of a bucket's sets are interleaved by the sets' shares. The order depends only on the samples'
buckets, weights and sets, and the seed. Nothing is computed for a whole epoch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

#: Up to this many items are shuffled by sorting random numbers; more, by a pseudorandom permutation of each place.
TABLE = 4096
#: A bucket with several sets is interleaved in rounds of about this many samples; each set has its share in a round.
ROUND = 256
#: Sampling weights are rounded to multiples of 1 / PARTS.
PARTS = 1000


class Samplable(Protocol):
    """The attributes of a data set that determine the order of its samples; see BucketStreams for each."""

    @property
    def buckets(self) -> NDArray[np.integer]: ...

    @property
    def weights(self) -> NDArray[Any] | None: ...

    @property
    def sets(self) -> NDArray[np.integer] | None: ...

    @property
    def shares(self) -> Sequence[float]: ...


class BucketStreams:
    """An endless stream of samples for each bucket.

    buckets  (N,) bucket number of each sample
    weights  (N,) how often each sample comes in an epoch, rounded to thousandths; None: once
    sets     (N,) set number of each sample, into `shares`; None: one set
    shares   the sets' shares of all samples, in any unit (0.7 and 0.3, or 7 and 3). An epoch has as many samples as
             one pass over each set together

    numbers  the buckets' numbers, in order, of those with samples of weight above 0
    rates    of each, its samples per epoch

    Keeps about 4 bytes per sample. ValueError for no samples, and weights or shares that are out of range.
    """

    def __init__(
        self,
        buckets: NDArray[np.integer],
        *,
        seed: int,
        weights: NDArray[Any] | None = None,
        sets: NDArray[np.integer] | None = None,
        shares: Sequence[float] = (1.0,),
    ) -> None:
        if len(buckets) == 0:
            raise ValueError(
                "there are no samples to train on; make shards with shard.py and encode.py, or lower data.holdout"
            )
        self._seed = seed
        self._sources, self._owners = _streams_of(np.asarray(buckets), weights, sets, len(shares), seed)
        if not all(math.isfinite(share) and share > 0 for share in shares):
            raise ValueError(f"the sets' shares {list(shares)} must all be above 0; remove a set that is not wanted")
        self._arrange(shares, [0] * len(self._sources))

    def going_on(self, shares: Sequence[float], drawn: Sequence[int]) -> BucketStreams:
        """The same streams with other shares of the sets, each from where it is when `drawn` samples of each bucket (as
        in `numbers`) have been drawn: a sample comes again only when its cycle is over.

        A set of share 0 is not drawn. ValueError where nothing is.
        """
        other = copy.copy(self)
        other._arrange(shares, self._moved(drawn))
        return other

    def _arrange(self, shares: Sequence[float], moved: Sequence[int]) -> None:
        """Interleave the streams of sets with a share above 0; `moved` is the next item of each stream."""
        self._next = list(moved)
        active = [place for place, (_, owner) in enumerate(self._owners) if shares[owner] > 0]
        found = _rates_of(
            [self._sources[place] for place in active], [self._owners[place][1] for place in active], shares
        )
        rates = dict(zip(active, found, strict=True))
        self.numbers = sorted({self._owners[place][0] for place in active})
        self.rates: list[Fraction] = []
        self._members: list[list[int]] = []
        self._orders: list[Interleave] = []
        for number, bucket in enumerate(self.numbers):
            own = [place for place in active if self._owners[place][0] == bucket]
            rate = sum((rates[place] for place in own), Fraction(0))
            self.rates.append(rate)
            self._members.append(own)
            self._orders.append(Interleave([rates[place] * ROUND / rate for place in own], self._seed, 2, number))

    def _moved(self, drawn: Sequence[int]) -> list[int]:
        """The next item of each stream after `drawn` samples of each bucket."""
        moved = list(self._next)
        for own, order, count in zip(self._members, self._orders, drawn, strict=True):
            for place, items in zip(own, order.counts(count) if len(own) > 1 else [count], strict=True):
                moved[place] += items
        return moved

    def draws(self, bucket: int, first: int, count: int) -> Indices:
        """`count` samples of a bucket's stream from its item `first` on, (count,); `bucket` is a place in `numbers`."""
        own = self._members[bucket]
        if len(own) == 1:
            return self._sources[own[0]].draws(np.arange(first, first + count) + self._next[own[0]])
        drawn = np.empty(count, dtype=np.int64)
        chosen, places = self._orders[bucket].items(first, count)
        for number in np.unique(chosen):
            stream = own[number]
            drawn[chosen == number] = self._sources[stream].draws(places[chosen == number] + self._next[stream])
        return drawn


def as_streams(buckets: NDArray[np.integer] | BucketStreams, **others: Any) -> BucketStreams:
    """The streams of these samples, which may be given as streams already."""
    return buckets if isinstance(buckets, BucketStreams) else BucketStreams(buckets, **others)


class _Stream:
    """The endless stream of the samples of one bucket and one set: one shuffled cycle after another.

    With weights, a cycle has as many draws as the weights sum to (systematic sampling): the draws lie at even distances
    on the line of all weights, from a start that moves from cycle to cycle. A sample of weight 2.5 comes two or three
    times a cycle.
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
        cycles, places = np.divmod(ranks, self.slots)
        for cycle in np.unique(cycles).tolist():
            slots = self._shuffle(places[cycles == cycle], cycle)
            drawn[cycles == cycle] = self.members[slots if self.line is None else self._on_line(slots, cycle)]
        return drawn

    def _shuffle(self, places: Indices, cycle: int) -> Indices:
        """The slots at these places of a cycle."""
        seed, *rest = self.position
        if self.slots > TABLE:
            return _scattered(places, self.slots, seed, 0, *rest, cycle)
        if self._table is None or self._table[0] != cycle:
            self._table = cycle, shuffled(self.slots, seed, 0, *rest, cycle)
        return self._table[1][places]

    def _on_line(self, slots: Indices, cycle: int) -> NDArray[np.integer]:
        """The members that the slots of a cycle fall on, on the line of weights."""
        assert self.line is not None
        length = int(self.line[-1])
        seed, *rest = self.position
        start = int(np.random.PCG64(_entropy(seed, 3, *rest)).random_raw())
        # Steps by the golden ratio cover the line most evenly: a sample of weight 0.5 comes in about every other cycle.
        start = (start + cycle * round(length * (math.sqrt(5) - 1) / 2)) % length
        whole, part = divmod(length, self.slots)
        points = slots * whole + (slots * part + start) // self.slots
        return np.searchsorted(self.line, points, side="right")


class Interleave:
    """Endless streams interleaved into one, each at its own rate: every item is the next one of some stream.

    Part p has floor(rate * (p+1)) - floor(rate * p) items of each stream, in shuffled order.
    """

    def __init__(self, rates: Sequence[Fraction], *position: int) -> None:
        self.per = math.lcm(*(rate.denominator for rate in rates))
        self.rates = [int(rate * self.per) for rate in rates]
        self.position = position
        self._part: tuple[int, NDArray[np.int64]] | None = None

    def items(self, first: int, count: int) -> tuple[Indices, Indices]:
        """(stream, number in that stream) of `count` items from item `first` on."""
        tables: list[NDArray[np.int64]] = []
        while count:
            start, table = self._holding(first)
            tables.append(table[:, first - start : first - start + count])
            first, count = first + tables[-1].shape[1], count - tables[-1].shape[1]
        streams, numbers = np.concatenate(tables, axis=1)
        return streams, numbers

    def counts(self, items: int) -> list[int]:
        """How many of the first `items` items are of each stream."""
        start, table = self._holding(items)
        within = np.bincount(table[0][: items - start], minlength=len(self.rates))
        part = self.part_of(items)
        return [rate * part // self.per + int(more) for rate, more in zip(self.rates, within, strict=True)]

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
        """The number of items in all parts before `part`."""
        return sum(rate * part // self.per for rate in self.rates)

    def _holding(self, item: int) -> tuple[int, NDArray[np.int64]]:
        """The part that holds an item: its first item, and (stream, number in that stream) of each item, (2, items).

        The order of the streams is shuffled; the items of each stream come in order, so that at any step the use counts
        of its samples differ by at most one. The part computed last is cached.
        """
        if self._part is None or not 0 <= item - self._part[0] < self._part[1].shape[1]:
            part = self.part_of(item)
            before = np.array([rate * part // self.per for rate in self.rates], dtype=np.int64)
            counts = np.array([rate * (part + 1) // self.per for rate in self.rates], dtype=np.int64) - before
            stream = np.repeat(np.arange(len(counts)), counts)[shuffled(int(counts.sum()), *self.position, part)]
            within = np.arange(len(stream)) - np.repeat(np.cumsum(counts) - counts, counts)
            number = np.empty_like(stream)
            number[np.argsort(stream, kind="stable")] = within + np.repeat(before, counts)
            self._part = int(before.sum()), np.stack([stream, number])
        return self._part


def _streams_of(
    buckets: NDArray[np.integer],
    weights: NDArray[Any] | None,
    sets: NDArray[np.integer] | None,
    num_sets: int,
    seed: int,
) -> tuple[list[_Stream], list[tuple[int, int]]]:
    """A stream for each bucket of each set that has samples with weight above 0, and (bucket, set) of each stream."""
    key = buckets.astype(np.int64) if sets is None else buckets.astype(np.int64) * num_sets + sets
    # The smallest type sorts fastest: numbers of up to 16 bits are counted, not compared.
    order = np.argsort(key.astype(np.min_scalar_type(int(key.max()))), kind="stable")
    order = order.astype(np.min_scalar_type(len(order)))
    counts = np.bincount(key)
    rounded = None if weights is None else _rounded(np.asarray(weights), len(buckets))
    if rounded is not None and (rounded == PARTS).all():
        rounded = None
    streams: list[_Stream] = []
    owners: list[tuple[int, int]] = []
    for place, members in zip(np.flatnonzero(counts), np.split(order, np.cumsum(counts[counts > 0])[:-1]), strict=True):
        own = None if rounded is None else rounded[members]
        if own is None or own.any():
            streams.append(_Stream(members, own, seed, len(streams)))
            owners.append(divmod(int(place), num_sets))
    return streams, owners


def _rounded(weights: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Weights as integers in units of 1 / PARTS. ValueError for weights that are out of range, or all 0."""
    if len(weights) != count:
        raise ValueError(f"{len(weights)} weights were given for {count} samples")
    if not (np.isfinite(weights).all() and (weights >= 0).all() and (weights <= PARTS).all()):
        raise ValueError(f"weights of samples must lie between 0 and {PARTS}, not {weights.min()} to {weights.max()}")
    rounded = np.rint(weights.astype(np.float64) * PARTS).astype(np.int64)
    if not rounded.any():
        raise ValueError(
            "every sample has weight 0 (less than half a thousandth), so nothing is left to train on; raise the "
            "weights in the footage's metadata"
        )
    return rounded


def _rates_of(streams: list[_Stream], owners: list[int], shares: Sequence[float]) -> list[Fraction]:
    """Samples of each stream per epoch, as exact fractions; a set of share 0 has none. ValueError for an empty set."""
    if len(shares) == 1:
        return [stream.weight for stream in streams]
    set_sizes = [Fraction(0)] * len(shares)  # samples in one pass over each set
    for stream, owner in zip(streams, owners, strict=True):
        set_sizes[owner] += stream.weight
    if empty := [number for number, share in enumerate(shares) if share > 0 and not set_sizes[number]]:
        raise ValueError(f"set {empty[0]} has nothing to train on (no samples, or all of weight 0); remove it")
    parts = [Fraction(repr(float(share))) for share in shares]
    epoch = sum((size for size, part in zip(set_sizes, parts, strict=True) if part), Fraction(0))
    passes = [
        epoch * part / sum(parts) / size if part else Fraction(0) for part, size in zip(parts, set_sizes, strict=True)
    ]
    return [stream.weight * passes[owner] for stream, owner in zip(streams, owners, strict=True)]


def _entropy(*position: int) -> list[int]:
    return [number % 2**64 for number in position]


def shuffled(count: int, *position: int) -> Indices:
    """A permutation of range(count), a fixed function of the position.

    It is made from the generator's raw bits, which NumPy promises never to change, unlike the result of `permutation`:
    a resume after an upgrade must continue in the same order.
    """
    bits = np.random.PCG64(_entropy(*position))
    return np.argsort(bits.random_raw(count), kind="stable")


def _scattered(places: Indices, count: int, *position: int) -> Indices:
    """The images of `places` under a permutation of range(count) that is a fixed function of the position.

    The permutation is not stored. A Feistel network permutes all numbers with as many bits as count - 1; a result
    outside the range goes through it again until it is inside (Black and Rogaway, "Ciphers with arbitrary finite
    domains", 2002).
    """
    bits = (count - 1).bit_length()
    keys = np.random.PCG64(_entropy(*position)).random_raw(6)
    images, outside = places.astype(np.uint64), np.full(len(places), True)
    while outside.any():
        images[outside] = _feistel(images[outside], bits, keys)
        outside = images >= count
    return images.astype(np.int64)


def _feistel(numbers: NDArray[np.uint64], bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A permutation of the numbers with `bits` bits; one round per key, an even number of keys."""
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
