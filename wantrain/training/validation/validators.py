"""The validations of a run: how much they measure, and one for each expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

from torch import nn

from wantrain.batch import Batch
from wantrain.losses import FlowMatching
from wantrain.models import WanTransformer
from wantrain.models.flops import training_flops
from wantrain.training.expert import ExpertTrainer
from wantrain.training.loop import Run
from wantrain.training.protocols import Hook, Latents
from wantrain.training.validation.budget import BEST, Budget, Extent, Memory
from wantrain.training.validation.history import EvalHistory
from wantrain.training.validation.measure import Clips, Evaluator, one_by_one
from wantrain.training.validation.validator import ReconstructionValidator, Validator, describe, should_stop
from wantrain.util import distributed
from wantrain.util.console import say


def build_validators(
    run: Run, *, together: int, share: float, early_stopping_patience: int | None, **given: int | None
) -> list[Hook]:
    """The validation that goes with each expert's loss; it may end the run.

    `given` are every, clips and points (see Extent); what is None is chosen so that it takes at most `share` of
    training, and noted in the run folder.
    """
    trainers = list(run.trainers.values())
    memory = Memory(run.metrics.path.with_name("validation.json"), share)
    fixed = memory.recall(given)
    batches = run.data.heldout_batches(fixed.get("clips", BEST.clips))
    if early_stopping_patience is not None and not (
        batches and all(isinstance(m.loss, FlowMatching) for m in trainers)
    ):
        raise ValueError(
            f"validation.early_stopping_patience={early_stopping_patience} asks held-out clips of a "
            "transformer when to end, but there are none; raise data.holdout, or give "
            "validation.early_stopping_patience=null"
        )
    if not batches:
        say("no clips are held out (data.holdout is 0, or there are too few files): there is no validation")
        return []
    if not all(isinstance(trainer.loss, FlowMatching) for trainer in trainers):
        # A VAE reads each clip once: 16 samples in 100 steps are within any share, so nothing is chosen.
        every = replace(BEST, **fixed).every
        return [ReconstructionValidator(trainer.stepper, one_by_one(batches), every, run.steps) for trainer in trainers]
    extent, heldout, train = settle_validation(run, memory, given, fixed, together)
    readings = EvalHistory(run.metrics.path.with_name("validation.jsonl"))
    validators = [
        Validator(
            trainer,
            evaluator_of(run, trainer, extent.points, together),
            heldout,
            train,
            readings,
            every=extent.every,
            steps=run.steps,
            prefix=f"{trainer.name}/" if len(trainers) > 1 else "",
        )
        for trainer in trainers
    ]
    run.should_stop = partial(should_stop, validators, early_stopping_patience)
    return [*validators]


def settle_validation(
    run: Run, memory: Memory, given: Mapping[str, int | None], fixed: Mapping[str, int], together: int
) -> tuple[Extent, Clips, Clips]:
    """What validations of transformers measure: the extent and its held-out and training clips; says what it costs.

    A forward is timed only where something is still to be chosen.
    """
    data, trainers, seconds = cast(Latents, run.data), list(run.trainers.values()), None

    def clips(count: int) -> list[Clips]:
        return [measured_clips(data, some) for some in (data.heldout_batches(count), data.train_batches(count))]

    extent = replace(BEST, **fixed)
    heldout, train = clips(extent.clips)
    first, clip = trainers[0], typical([*heldout.batches, *train.batches])
    budget = Budget(
        share=memory.share,
        samples=first.plan.batch_size / distributed.world_size(),
        per_sample=forwards_per_sample(first.trainable.module, clip),
        passes=sum(1 if trainer.ema is None else 2 for trainer in trainers),
        processes=distributed.world_size(),
        heldout=len(heldout),
        train=len(train),
        steps=run.steps,
    )
    if len(fixed) < len(given):
        extent = budget.choose(fixed)
        memory.note(given, extent)
        heldout, train = clips(extent.clips)
        levels = min(together, extent.points)
        with first.watched():
            seconds = evaluator_of(run, first, levels, together).seconds(clip) / levels
    say(describe(heldout, train, budget.describe(extent, seconds)))
    return extent, heldout, train


def typical(clips: Sequence[Batch]) -> Batch:
    """The clip whose size is nearest to the mean of some."""
    mean = sum(clip.num_tokens for clip in clips) / len(clips)
    return min(clips, key=lambda clip: abs(clip.num_tokens - mean))


def forwards_per_sample(module: nn.Module, clip: Batch) -> float:
    """What training on a clip costs, in forwards: 3 for all weights, less for a LoRA, 1 more with recomputing."""
    assert isinstance(module, WanTransformer)
    flops = training_flops(module, tokens=clip.num_tokens, text_rows=module.text_length)
    return flops.executed / flops.forward


def evaluator_of(run: Run, trainer: ExpertTrainer, points: int, together: int) -> Evaluator:
    """The eval_key of an expert: `points` levels of its own distribution."""
    return Evaluator(trainer.stepper, cast(FlowMatching, trainer.loss).quadrature(points), run.seed, together)


def measured_clips(data: Latents, batches: list[Batch]) -> Clips:
    """Clips as validation takes them: each alone, with the file that it is of and its tags."""
    singles = one_by_one(batches)
    numbers = [clip.positions[0] for clip in singles]
    return Clips(singles, data.groups_of(numbers), data.tags_of(numbers))
