"""The largest bucket's step, before the first: a run that does not fit its card ends at once, with advice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from wantrain.data import PackSampler, TrainingData, phases_of
from wantrain.data.loading.packs import Pack, tokens_of
from wantrain.geometry import Bucket
from wantrain.training.batching import Batching
from wantrain.training.expert import ExpertTrainer
from wantrain.training.planning.outline import samples_by_bucket
from wantrain.training.planning.plan import GB
from wantrain.util.progress import report_progress
from wantrain.util.seeds import generator_at


def try_largest(trainers: Mapping[str, ExpertTrainer], data: TrainingData[Any], batching: Batching) -> str | None:
    """Forward and backward of the largest bucket, or of the fullest pack, for each expert; nothing is updated, and the
    run's randomness is not touched. Returns the largest bucket; None where it is not tried: on a CPU, and under ZeRO,
    whose backward updates.
    """
    steppers = [trainer.stepper for trainer in trainers.values()]
    if any(stepper.device.type == "cpu" or stepper.engine.startswith("zero") for stepper in steppers):
        return None
    passes = samples_by_bucket(data, next(iter(trainers.values())).plan, batching)
    bucket, clips = largest(data, passes)
    if steppers[0].device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(steppers[0].device)
    for trainer in trainers.values():
        report_progress(f"trying the largest bucket, {bucket}")
        stepper = trainer.stepper
        samplers = [phase.sampler for phase in phases_of(trainer.plan)]
        if packs := [sampler.fullest() for sampler in samplers if isinstance(sampler, PackSampler)]:
            batch = max(packs, key=lambda pack: _tokens(pack, data)).load(data)
        else:
            micro = passes.get(bucket, batching.micro)
            batch = data.load(np.resize(clips, micro), np.arange(micro))
        draws = trainer.loss.prepare(batch, [generator_at(0, "trial", place) for place in range(len(batch))])
        trainer.trainable.module.train()
        with stepper.forward_context():
            loss = trainer.loss(stepper.wrapped, batch.to(stepper.device), draws.to(stepper.device))
        stepper.rehearse(loss.value)
    return bucket


def _tokens(pack: Pack, data: TrainingData[Any]) -> int:
    tokens = tokens_of(data)
    return sum(len(samples) * tokens[int(data.buckets[samples[0]])] for samples, _ in pack.groups)


def largest(data: TrainingData[Any], passes: Mapping[str, int] | None = None) -> tuple[str, np.ndarray[Any, Any]]:
    """The bucket of the most pixels that has clips, and the numbers of its clips; where backward passes have other
    numbers of samples by bucket (`passes`), of the most pixels in one.
    """
    names = np.asarray(data.bucket_names)

    def pixels(name: str) -> int:
        bucket = Bucket(*map(int, name.split("x")))
        return bucket.num_frames * bucket.height * bucket.width * (passes or {}).get(name, 1)

    name = max(np.unique(names).tolist(), key=pixels)
    return name, np.flatnonzero(names == name)


@contextmanager
def out_of_memory(device: torch.device, advice: Callable[[], str]) -> Iterator[None]:
    """Turn an out-of-memory error of the device into one message, with what `advice` says."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        peak = torch.cuda.max_memory_allocated(device) / GB if device.type == "cuda" else 0.0
        raise ValueError(f"{device} is out of memory after {peak:.4g} GB were allocated. {advice()}") from error
