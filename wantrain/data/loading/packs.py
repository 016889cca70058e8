"""The pack sampler: a run's order where a backward pass takes a number of tokens, not of samples. NumPy only.

A pack is what one process computes in one pass: clips of any buckets, up to a budget of tokens. How many clips of each
bucket a pack has is planned once, from the buckets' sizes alone (`plan_packs`). Packs of equal tokens differ in cost,
as attention grows with the square of a clip's tokens, and the processes of a step wait for the slowest. So a step is
made of packs of like cost. Each epoch shuffles these steps and fills their packs from the buckets' streams
(streams.py): the packs of a step, and the place of each sample in the run, are arithmetic. A run resumes by seeking,
and all processes agree.

Packs that do not fill a step at the end of an epoch begin the next one; they are the cheapest. With weights or sets, a
bucket has as many samples in an epoch as its share rounded, at least one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from wantrain import geometry
from wantrain.batch import PackedBatch
from wantrain.data.loading.protocol import TrainingData
from wantrain.data.loading.streams import BucketStreams, Indices, as_streams, shuffled

#: How many more packs may be needed for packs of one mix, as a share.
EVEN = 0.01
#: The fewest packs are searched for to one in so many.
CLOSE = 256
#: Tokens of a clip whose self-attention costs what its linear layers cost: about those of Wan's models, forward and
#: backward. From 5,000 to 40,000 the busiest processes of the mix in benchmarks/packing.py compute the same to 0.2 %.
ATTENTION = 20_000


class Loads(Protocol):
    """What gives latents by number."""

    def load(self, samples: Indices, positions: Indices) -> Any: ...


@dataclass(frozen=True)
class Pack:
    """Samples of one pass of one process.

    groups  (samples, positions) of each bucket, that of the longest clips first
    weight  what the mean over its samples counts in the mean over the step's passes, so that all samples of the step
            count alike: 1 where all packs have as many samples
    most    the most samples that a process has in this step
    """

    groups: tuple[tuple[Indices, Indices], ...]
    weight: float
    most: int

    def later(self, before: int) -> Pack:
        """With so many samples before it, in a phase that does not begin the run."""
        return replace(self, groups=tuple((samples, places + before) for samples, places in self.groups))

    def load(self, data: Loads) -> PackedBatch:
        """Its samples, those of each bucket as one part."""
        parts = [data.load(samples, positions) for samples, positions in self.groups]
        return PackedBatch(tuple(parts), self.weight, self.most)


class PackSampler:
    """The order of packs of at most `budget` tokens, `passes` of them in a step, counted over all processes and
    gradient accumulation.

    tokens   of one clip, by bucket number
    others   as BucketStreams, which may be given in place of `buckets`

    samples_per_epoch, packs_per_epoch  of an epoch
    fill     tokens of an epoch over the budgets of its packs

    Keeps about 4 bytes per sample and 12 per bucket of a pack. ValueError for a clip of more tokens than the budget.
    """

    def __init__(
        self,
        buckets: NDArray[np.integer] | BucketStreams,
        tokens: Mapping[int, int],
        *,
        budget: int,
        passes: int,
        seed: int,
        weights: NDArray[Any] | None = None,
        sets: NDArray[np.integer] | None = None,
        shares: Sequence[float] = (1.0,),
    ) -> None:
        self._streams = as_streams(buckets, seed=seed, weights=weights, sets=sets, shares=shares)
        self.budget, self.passes, self.seed = budget, passes, seed
        self._tokens = np.array([tokens[number] for number in self._streams.numbers], dtype=np.int64)
        if (longest := int(self._tokens.max())) > budget:
            raise ValueError(
                f"batch_tokens={budget} is less than the {longest} tokens of the largest clip; give {longest} or more, "
                "or encode smaller clips"
            )
        self._counts = np.array([max(1, round(rate)) for rate in self._streams.rates], dtype=np.int64)
        packs = plan_packs(self._counts, self._tokens, budget)
        order = np.argsort(-self._tokens, kind="stable")
        # The buckets of each pack, one after another; `first`: which of its bucket's samples in an epoch come first.
        pack, column = np.nonzero(packs[:, order])
        self._bucket = order[column]
        self._count = packs[pack, self._bucket]
        self._first = (np.cumsum(packs, axis=0) - packs)[pack, self._bucket]
        self._ends = np.cumsum(np.bincount(pack, minlength=len(packs)))
        cost = packs @ (self._tokens * (ATTENTION + self._tokens))
        self._by_cost = np.argsort(-cost, kind="stable")
        self._sizes = packs.sum(axis=1)
        self.packs_per_epoch, self.samples_per_epoch = len(packs), int(self._counts.sum())
        self.fill = float(self._counts @ self._tokens) / (budget * len(packs))
        self._table: tuple[int, Indices, Indices] | None = None

    @classmethod
    def of(cls, data: TrainingData[Any], *, budget: int, passes: int, seed: int) -> PackSampler:
        """The sampler of latents, with their weights and their sets' shares."""
        return cls(
            data.buckets,
            tokens_of(data),
            budget=budget,
            passes=passes,
            seed=seed,
            weights=data.weights,
            sets=data.sets,
            shares=data.shares,
        )

    @property
    def samples_per_step(self) -> float:
        """Samples of a step, in the mean."""
        return self.samples_per_epoch * self.passes / self.packs_per_epoch

    def pack(self, step: int, micro_step: int, rank: int, world: int) -> Pack:
        """What process `rank` of `world` computes in a micro-step of optimizer step `step`."""
        first = step * self.passes
        sizes = np.array([self._sizes[self._at(first + number)[0]] for number in range(self.passes)])
        number = micro_step * world + rank
        most = int(sizes.reshape(-1, world).sum(axis=0).max())
        return Pack(self._groups(first + number), float(sizes[number] * self.passes / sizes.sum()), most)

    def fullest(self) -> Pack:
        """The pack of the most tokens, as in the first epoch."""
        tokens = np.add.reduceat(self._count * self._tokens[self._bucket], np.concatenate([[0], self._ends[:-1]]))
        place = int(np.flatnonzero(self._epoch(0)[0] == int(tokens.argmax()))[0])
        groups = self._groups(place)
        return Pack(groups, 1.0, sum(len(samples) for samples, _ in groups))

    @property
    def numbers(self) -> list[int]:
        """The numbers of the buckets that it draws from."""
        return self._streams.numbers

    def drawn(self, steps: int) -> list[int]:
        """Samples of each bucket in `numbers` up to the end of the epoch of its first steps: within an epoch the packs
        take them in any order.
        """
        epochs = -(-steps * self.passes // self.packs_per_epoch)
        return (epochs * self._counts).tolist()

    def first(self, count: int) -> Indices:
        """Its first samples, at most `count`, of one bucket."""
        return self._groups(0)[0][0][:count]

    def samples_before(self, step: int) -> int:
        """Samples of all steps before `step`."""
        return self._at(step * self.passes)[2]

    def steps_for_epochs(self, epochs: float) -> int:
        """Optimizer steps that use as many packs as `epochs` epochs have, rounded up."""
        return max(1, math.ceil(epochs * self.packs_per_epoch / self.passes))

    def _groups(self, number: int) -> tuple[tuple[Indices, Indices], ...]:
        """Samples and positions of the pack at this place of the run, by bucket."""
        pack, epoch, position = self._at(number)
        groups = []
        for entry in range(self._ends[pack - 1] if pack else 0, self._ends[pack]):
            bucket, count = int(self._bucket[entry]), int(self._count[entry])
            first = epoch * int(self._counts[bucket]) + int(self._first[entry])
            groups.append((self._streams.draws(bucket, first, count), np.arange(position, position + count)))
            position += count
        return tuple(groups)

    def _at(self, number: int) -> tuple[int, int, int]:
        """Of the pack at this place of the run: its number in the plan, its epoch, the position of its first sample."""
        epoch, place = divmod(number, self.packs_per_epoch)
        order, starts = self._epoch(epoch)
        return int(order[place]), epoch, epoch * self.samples_per_epoch + int(starts[place])

    def _epoch(self, epoch: int) -> tuple[Indices, Indices]:
        """The order of an epoch's packs, and how many of its samples come before each. The last epoch is cached."""
        table = self._table  # another thread may load ahead
        if table is None or table[0] != epoch:
            order = self._order(epoch)
            sizes = self._sizes[order]
            self._table = table = epoch, order, np.cumsum(sizes) - sizes
        return table[1], table[2]

    def _order(self, epoch: int) -> Indices:
        """The order of an epoch's packs: its steps shuffled, each of packs of like cost, the costliest first."""
        count = self.packs_per_epoch
        begun = min(-epoch * count % self.passes, count)  # packs that the step lacks in which the epoch before ends
        left = (count - begun) % self.passes
        whole, cheapest = np.split(self._by_cost, [count - begun - left])
        steps = whole.reshape(-1, self.passes)[shuffled(len(whole) // self.passes, self.seed, 4, epoch)]
        return np.concatenate([cheapest[left:], steps.ravel(), cheapest[:left]])


def tokens_of(data: TrainingData[Any]) -> dict[int, int]:
    """The tokens of a clip of each bucket, by its number."""
    found, first = np.unique(data.buckets, return_index=True)
    names = data.bucket_names
    strides = data.manifest["temporal_stride"], data.manifest["spatial_stride"]
    return {
        int(number): geometry.num_tokens(
            geometry.latent_shape(geometry.Bucket(*map(int, names[place].split("x"))), *strides)
        )
        for number, place in zip(found, first, strict=True)
    }


def plan_packs(counts: Indices, tokens: Indices, budget: int) -> Indices:
    """How many clips of each bucket every pack has, (packs, buckets), from the buckets' clips and the tokens of one.

    The fewest packs that hold all clips is a hard problem (bin packing). The longest clips come first: each goes
    into the emptiest of a fixed number of packs, or into the fullest that has space. The first makes packs of one mix,
    and is taken where it needs at most EVEN more packs than the second.
    """
    filled = _filled(counts, tokens, budget)
    low, high = math.ceil(int(counts @ tokens) / budget) - 1, math.floor(len(filled) * (1 + EVEN))
    packs = _spread(counts, tokens, budget, high)
    while packs is not None and high - low > max(1, high // CLOSE):
        middle = (low + high) // 2
        found = _spread(counts, tokens, budget, middle)
        if found is None:
            low = middle
        else:
            packs, high = found, middle
    return filled if packs is None else packs


def _filled(counts: Indices, tokens: Indices, budget: int) -> Indices:
    """The clips in packs, the longest first, each into the fullest that has space, else into a new one."""
    packs = np.zeros((0, len(counts)), dtype=np.int64)
    for bucket in np.argsort(-tokens, kind="stable").tolist():
        size, taken = int(tokens[bucket]), packs @ tokens
        fullest = np.argsort(-taken, kind="stable")
        space = (budget - taken[fullest]) // size
        before = np.cumsum(space) - space
        packs[fullest, bucket] = own = np.clip(counts[bucket] - before, 0, space)
        left = int(counts[bucket] - own.sum())
        more = np.zeros((-(-left // (budget // size)), len(counts)), dtype=np.int64)
        more[:, bucket] = np.clip(left - np.arange(len(more)) * (budget // size), 0, budget // size)
        packs = np.concatenate([packs, more])
    return packs


def _spread(counts: Indices, tokens: Indices, budget: int, packs: int) -> Indices | None:
    """The clips in so many packs, the longest first, each into the emptiest; None where they do not fit."""
    spread, taken = np.zeros((packs, len(counts)), dtype=np.int64), np.zeros(packs, dtype=np.int64)
    for bucket in np.argsort(-tokens, kind="stable").tolist():
        count, size = int(counts[bucket]), int(tokens[bucket])
        space = (budget - taken) // size
        if space.sum() < count:
            return None
        # The emptiest pack again and again fills all packs up to a level, which is found by bisection.
        low, high = -1, budget
        while high - low > 1:
            middle = (low + high) // 2
            if _up_to(middle, taken, size, space).sum() >= count:
                high = middle
            else:
                low = middle
        own, before = _up_to(high, taken, size, space), _up_to(high - 1, taken, size, space)
        at_level = np.flatnonzero(own > before)  # of these the last ones have one too many
        own[at_level[len(at_level) - (int(own.sum()) - count) :]] -= 1
        spread[:, bucket] = own
        taken += own * size
    return spread


def _up_to(level: int, taken: Indices, size: int, space: Indices) -> Indices:
    """How many clips of a size go into each pack while packs that hold `level` tokens or less take another."""
    return np.minimum(space, np.maximum(0, (level - taken) // size + 1))
