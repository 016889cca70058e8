"""The order of a run as arithmetic: which samples make up optimizer step n. Pure NumPy, no state to save.

Every batch comes from one bucket, so that its samples share a shape. Each bucket is an endless stream: one
permutation of its samples per epoch, one after another. In epoch e a bucket of n samples gives
floor(n*(e+1)/B) - floor(n*e/B) batches of B, so what does not fill a batch opens the next epoch instead of being
dropped or repeated. The order depends on the seed and the batch size alone: not on processes, workers or restarts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


class Plan:
    """The order of batches of `batch_size` samples (over all processes and accumulation) of a data set.

    buckets  the bucket number of each sample, (N,)
    """

    def __init__(self, buckets: NDArray[np.integer], *, batch_size: int, seed: int) -> None:
        if len(buckets) == 0:
            raise ValueError("there are no samples to train on; shard and encode some footage first")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.batch_size, self.seed = batch_size, seed
        self.samples_per_epoch = len(buckets)
        order = np.argsort(buckets, kind="stable")
        _, starts = np.unique(np.asarray(buckets)[order], return_index=True)
        self._members: list[Indices] = [part.astype(np.int64) for part in np.split(order, starts[1:])]
        self._sizes = np.array([len(part) for part in self._members], dtype=np.int64)
        self._cached_epoch: tuple[int, NDArray[np.int64]] | None = None
        self._cached_laps: dict[int, tuple[int, Indices]] = {}

    def batch(self, step: int) -> Indices:
        """The sample numbers of optimizer step `step`, (batch_size,)."""
        epoch = self.epoch(step)
        bucket, number = self._batches_of(epoch)[step - self._first_step(epoch)].tolist()
        members = self._members[bucket]
        stream = np.arange(number * self.batch_size, (number + 1) * self.batch_size)
        laps, places = np.divmod(stream, len(members))
        picked = [members[self._permutation(bucket, int(lap))[places[laps == lap]]] for lap in np.unique(laps)]
        return np.concatenate(picked)

    def epoch(self, step: int) -> int:
        """The epoch that `step` belongs to, by bisection over exact counts."""
        low, high = 0, (step + len(self._sizes) + 1) * self.batch_size // self.samples_per_epoch + 2
        while low < high:
            middle = (low + high) // 2
            if self._first_step(middle + 1) > step:
                high = middle
            else:
                low = middle + 1
        return low

    def steps_for_epochs(self, epochs: float) -> int:
        """Optimizer steps until the samples of `epochs` passes have been used, rounded up."""
        return max(1, math.ceil(epochs * self.samples_per_epoch / self.batch_size))

    def _first_step(self, epoch: int) -> int:
        """How many batches all epochs before `epoch` gave."""
        return int((self._sizes * epoch // self.batch_size).sum())

    def _batches_of(self, epoch: int) -> NDArray[np.int64]:
        """(bucket, number in that bucket's stream) of every batch of an epoch, in the order they are used.

        Which bucket comes when is shuffled; each bucket's own stream is used in order, so that at any step no sample
        of a bucket has been used twice more than another.
        """
        if self._cached_epoch is not None and self._cached_epoch[0] == epoch:
            return self._cached_epoch[1]
        first, last = self._sizes * epoch // self.batch_size, self._sizes * (epoch + 1) // self.batch_size
        counts = last - first
        in_order = np.repeat(np.arange(len(counts)), counts)
        bucket = in_order[_shuffled(len(in_order), self.seed, 1, epoch)]
        number = np.empty_like(bucket)
        within = np.arange(len(bucket)) - np.repeat(np.cumsum(counts) - counts, counts)
        number[np.argsort(bucket, kind="stable")] = within + np.repeat(first, counts)
        table = np.stack([bucket, number], axis=1)
        self._cached_epoch = (epoch, table)
        return table

    def _permutation(self, bucket: int, lap: int) -> Indices:
        """The order of a bucket's samples in one pass; the last one of each bucket is kept."""
        kept = self._cached_laps.get(bucket)
        if kept is None or kept[0] != lap:
            kept = (lap, _shuffled(len(self._members[bucket]), self.seed, 0, bucket, lap))
            self._cached_laps[bucket] = kept
        return kept[1]


def _shuffled(count: int, *position: int) -> Indices:
    """A permutation of range(count) that is a fixed function of the position.

    From the generator's raw bits, which NumPy promises never to change, unlike what its `permutation` makes of them:
    a resume after an upgrade must go on in the same order.
    """
    bits = np.random.PCG64([number % 2**64 for number in position])
    return np.argsort(bits.random_raw(count), kind="stable")


def share(batch: Sequence[int] | Indices, micro_step: int, accumulate: int, rank: int, world: int) -> Indices:
    """One process's part of one micro-step: (accumulate, world, micro)[micro_step, rank]."""
    whole = np.asarray(batch)
    if len(whole) % (accumulate * world):
        raise ValueError(f"batch_size={len(whole)} must divide by accumulate x processes = {accumulate} x {world}")
    return whole.reshape(accumulate, world, -1)[micro_step, rank]
