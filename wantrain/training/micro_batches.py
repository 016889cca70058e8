"""What the steps of a run are fed: micro-batches in order with what their loss draws, one thread ahead of the steps.

Where they go to another device they wait in pinned memory, so that no step waits for a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from wantrain.batch import AnyBatch, pinned
from wantrain.data import PackSampler, share
from wantrain.data.prefetch import prefetch
from wantrain.losses import Draws
from wantrain.training.alternation import ExpertAlternation
from wantrain.training.expert import ExpertTrainer
from wantrain.training.protocols import Samples
from wantrain.util.seeds import generator_at


def micro_batches(
    data: Samples,
    trainers: Mapping[str, ExpertTrainer],
    alternation: ExpertAlternation,
    *,
    start: int,
    until: int,
    seed: int,
) -> Iterator[tuple[AnyBatch, Draws]]:
    """This process's share of the optimizer steps from `start` to `until`, on the host."""

    def requests() -> Iterator[Callable[[], tuple[AnyBatch, Draws]]]:
        for step in range(start, until):
            name, own = alternation.at(step)
            plan, stepper = trainers[name].plan, trainers[name].stepper
            accumulate, ranks = stepper.accumulate, stepper.data_ranks
            if isinstance(plan, PackSampler):
                for micro_step in range(accumulate):
                    pack = plan.pack(own, micro_step, ranks.rank, ranks.count)
                    yield partial(_ready, partial(pack.load, data), trainers[name], seed)
                continue
            samples = plan.batch(own)
            places = np.arange(own * plan.batch_size, (own + 1) * plan.batch_size)
            for micro_step in range(accumulate):
                mine, positions = (
                    share(each, micro_step, accumulate, ranks.rank, ranks.count) for each in (samples, places)
                )
                yield partial(_ready, partial(data.load, mine, positions), trainers[name], seed)

    return prefetch(requests())


def _ready(load: Callable[[], AnyBatch], trainer: ExpertTrainer, seed: int) -> tuple[AnyBatch, Draws]:
    """A micro-batch and what its loss draws, by the samples' positions in the run."""
    batch = load()
    draws = trainer.loss.prepare(batch, [generator_at(seed, "noise", position) for position in batch.positions])
    if trainer.stepper.device.type == "cpu":
        return batch, draws
    return replace(batch, **pinned(batch)), replace(draws, **pinned(draws))
