"""The batch sampler: which samples make up optimizer step n, as a pure function. NumPy only, no state to save.

Every batch comes from one bucket, so its samples have one shape, and all processes have equal work in every step.

Each bucket has an endless stream of samples (streams.py). The batches of all buckets are interleaved by the buckets'
sizes. Samples that do not fill a batch at the end of an epoch begin the next one; none is dropped or repeated.

The order depends only on the samples' buckets, weights and sets, the seed and the batch size; not on processes,
workers or restarts. Nothing is computed for a whole epoch: a batch of a million samples costs as much as one of a
thousand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wantrain.data.loading.streams import TABLE, BucketStreams, Indices, Interleave, Samplable, as_streams


class BatchSampler:
    """The order of batches of `batch_size` samples, counted over all processes and gradient accumulation.

    The other arguments are those of BucketStreams, which may be given in place of `buckets`. Keeps about 12 bytes per
    sample. ValueError for no samples, a batch size below 1, and weights or shares that are out of range.
    """

    def __init__(
        self,
        buckets: NDArray[np.integer] | BucketStreams,
        *,
        batch_size: int,
        seed: int,
        weights: NDArray[Any] | None = None,
        sets: NDArray[np.integer] | None = None,
        shares: Sequence[float] = (1.0,),
    ) -> None:
        self._streams = as_streams(buckets, seed=seed, weights=weights, sets=sets, shares=shares)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.batch_size, self.seed = batch_size, seed
        total = sum(self._streams.rates, Fraction(0))
        self.samples_per_epoch = max(1, round(total))
        # Long epochs are interleaved in parts, so that no table grows with them.
        self._parts = max(1, math.ceil(total / batch_size / TABLE))
        self._batches = Interleave([rate / (batch_size * self._parts) for rate in self._streams.rates], seed, 1)

    @classmethod
    def of(cls, data: Samplable, *, batch_size: int, seed: int) -> BatchSampler:
        """The sampler of a data set, with its weights and its sets' shares."""
        return cls(
            data.buckets,
            batch_size=batch_size,
            seed=seed,
            weights=data.weights,
            sets=data.sets,
            shares=data.shares,
        )

    @property
    def numbers(self) -> list[int]:
        """The numbers of the buckets that it draws from."""
        return self._streams.numbers

    @property
    def samples_per_step(self) -> float:
        """Samples of a step, in the mean."""
        return self.batch_size

    def batch(self, step: int) -> Indices:
        """The sample numbers of optimizer step `step`, (batch_size,)."""
        buckets, numbers = self._batches.items(step, 1)
        return self._streams.draws(int(buckets[0]), int(numbers[0]) * self.batch_size, self.batch_size)

    def first(self, count: int) -> Indices:
        """Its first samples, at most `count`, of one bucket."""
        return self.batch(0)[:count]

    def samples_before(self, step: int) -> int:
        """Samples of all steps before `step`."""
        return step * self.batch_size

    def drawn(self, steps: int) -> list[int]:
        """Samples that its first steps draw of each bucket in `numbers`."""
        return [count * self.batch_size for count in self._batches.counts(steps)]

    def epoch(self, step: int) -> int:
        """The epoch that `step` belongs to."""
        return self._batches.part_of(step) // self._parts

    def steps_for_epochs(self, epochs: float) -> int:
        """Optimizer steps that use as many samples as `epochs` epochs have, rounded up."""
        return max(1, math.ceil(epochs * self.samples_per_epoch / self.batch_size))


def share(batch: Sequence[int] | Indices, micro_step: int, accumulate: int, rank: int, world: int) -> Indices:
    """One process's samples of one micro-step: the batch as (accumulate, world, micro)[micro_step, rank]."""
    whole = np.asarray(batch)
    if len(whole) % (accumulate * world):
        raise ValueError(
            f"batch_size={len(whole)} must be a multiple of accumulate x processes = {accumulate} x {world}"
        )
    return whole.reshape(accumulate, world, -1)[micro_step, rank]
