"""What the steps of a run are fed: micro-batches in order with what their loss draws, one thread ahead of the steps.

Where they go to another device they wait in pinned memory, and each is copied while the one before it computes. Data at
an address hear what comes long before it is loaded, and fetch it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wantrain.batch import AnyBatch, map_tensors, pinned
from wantrain.data import PackSampler, phase_at, share
from wantrain.data.prefetch import Prefetch, prefetch
from wantrain.losses import Draws
from wantrain.training.alternation import ExpertAlternation
from wantrain.training.expert import ExpertTrainer
from wantrain.training.protocols import Samples
from wantrain.util.copy_stream import CopyStream
from wantrain.util.seeds import generator_at

#: A micro-batch, and what its loss draws.
Drawn = tuple[AnyBatch, Draws]
#: Micro-batches that data hear of ahead, at most.
MOST_AHEAD = 1024


@dataclass(frozen=True)
class Request:
    """A micro-batch to be loaded: samples and positions of each bucket, what loads them, and for whom."""

    groups: tuple[tuple[NDArray[Any], NDArray[Any]], ...]
    load: Callable[[], AnyBatch]
    trainer: ExpertTrainer


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch with its draws as they are on the host, and `here`, the same on the device that trains."""

    batch: AnyBatch
    draws: Draws
    here: Drawn


def micro_batches(
    data: Samples,
    trainers: Mapping[str, ExpertTrainer],
    alternation: ExpertAlternation,
    *,
    start: int,
    until: int,
    seed: int,
) -> Iterator[MicroBatch]:
    """This process's share of the optimizer steps from `start` to `until`."""

    def requests() -> Iterator[Request]:
        for step in range(start, until):
            name, own = alternation.at(step)
            phase, stepper = phase_at(trainers[name].plan, own), trainers[name].stepper
            plan, own = phase.sampler, own - phase.start
            accumulate, ranks = stepper.accumulate, stepper.data_ranks
            if isinstance(plan, PackSampler):
                for micro_step in range(accumulate):
                    pack = plan.pack(own, micro_step, ranks.rank, ranks.count).later(phase.before)
                    yield Request(pack.groups, partial(pack.load, data), trainers[name])
                continue
            samples = plan.batch(own)
            places = np.arange(own * plan.batch_size, (own + 1) * plan.batch_size) + phase.before
            for micro_step in range(accumulate):
                mine, positions = (
                    share(each, micro_step, accumulate, ranks.rank, ranks.count) for each in (samples, places)
                )
                yield Request(((mine, positions),), partial(data.load, mine, positions), trainers[name])

    device = next(iter(trainers.values())).stepper.device
    loaded = prefetch(partial(_ready, request, seed) for request in foreseen(requests(), data))
    if device.type == "cpu":
        return (MicroBatch(*drawn, here=drawn) for drawn in loaded)
    return sent_ahead(loaded, device)


def foreseen(requests: Iterator[Request], data: Samples) -> Iterator[Request]:
    """The same requests; the data hear of each as long before it is loaded as they want to."""
    coming: deque[Request] = deque()
    while True:
        wanted = True
        while wanted and len(coming) < MOST_AHEAD and (request := next(requests, None)) is not None:
            coming.append(request)
            for samples, positions in request.groups:
                wanted = data.foresee(samples, positions) and wanted
        if not coming:
            return
        yield coming.popleft()


def sent_ahead(loaded: Prefetch[Drawn], device: torch.device) -> Iterator[MicroBatch]:
    """Micro-batches in pinned memory, each copied to `device` in a stream of its own while the one before computes.

    One that is not loaded by then is copied when it is asked for: the host never waits for the loader early.
    """
    stream, coming = CopyStream(device), None
    try:
        while True:
            try:
                micro, event = coming or _sent(next(loaded), stream, device)
            except StopIteration:
                return
            stream.wait(event)
            following = loaded.waiting()
            coming = None if following is None else _sent(following, stream, device)
            yield micro
    finally:
        if coming is not None:
            stream.wait(coming[1])  # its memory may be given away only after the copy into it


def _sent(drawn: Drawn, stream: CopyStream, device: torch.device) -> tuple[MicroBatch, Any]:
    """A micro-batch on its way to the device, and the event to wait for."""
    pairs: list[tuple[Tensor, Tensor]] = []

    def place(source: Tensor) -> Tensor:
        pairs.append((torch.empty_like(source, device=device), source))
        return pairs[-1][0]

    batch, draws = drawn
    here = replace(batch, **map_tensors(batch, place)), replace(draws, **map_tensors(draws, place))
    return MicroBatch(batch, draws, here), stream.copy(pairs)


def _ready(request: Request, seed: int) -> Drawn:
    """A micro-batch and what its loss draws, by the samples' positions in the run."""
    batch, trainer = request.load(), request.trainer
    draws = trainer.loss.prepare(batch, [generator_at(seed, "noise", position) for position in batch.positions])
    if trainer.stepper.device.type == "cpu":
        return batch, draws
    return replace(batch, **pinned(batch)), replace(draws, **pinned(draws))
