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
from wantrain.training.expert import Member
from wantrain.training.loop import Run
from wantrain.training.protocols import Hook, Latents
from wantrain.training.validation.budget import BEST, Budget, Extent, Memory
from wantrain.training.validation.history import Readings
from wantrain.training.validation.measure import Clips, Probe, one_by_one
from wantrain.training.validation.validator import ReconstructionValidator, Validator, describe, settled
from wantrain.util import distributed
from wantrain.util.console import say


def build_validators(
    run: Run, *, together: int, share: float, stop_after: int | None, **given: int | None
) -> list[Hook]:
    """The validation that goes with each expert's loss; it may end the run.

    `given` are every, clips and points (see Extent); what is None is chosen so that it takes at most `share` of
    training, and noted in the run folder.
    """
    members = list(run.members.values())
    memory = Memory(run.metrics.path.with_name("validation.json"), share)
    fixed = memory.recall(given)
    batches = run.data.heldout_batches(fixed.get("clips", BEST.clips))
    if stop_after is not None and not (batches and all(isinstance(m.loss, FlowMatching) for m in members)):
        raise ValueError(
            f"validation.stop_after={stop_after} asks held-out clips of a transformer when to end, but there are none; "
            "raise data.holdout, or give validation.stop_after=null"
        )
    if not batches:
        say("no clips are held out (data.holdout is 0, or there are too few files): there is no validation")
        return []
    if not all(isinstance(member.loss, FlowMatching) for member in members):
        # A VAE reads each clip once: 16 samples in 100 steps are within any share, so nothing is chosen.
        every = replace(BEST, **fixed).every
        return [ReconstructionValidator(member.stepper, one_by_one(batches), every, run.steps) for member in members]
    extent, heldout, train = settle_validation(run, memory, given, fixed, together)
    readings = Readings(run.metrics.path.with_name("validation.jsonl"))
    validators = [
        Validator(
            member,
            probe_of(run, member, extent.points, together),
            heldout,
            train,
            readings,
            every=extent.every,
            steps=run.steps,
            prefix=f"{member.name}/" if len(members) > 1 else "",
        )
        for member in members
    ]
    run.settled = partial(settled, validators, stop_after)
    return [*validators]


def settle_validation(
    run: Run, memory: Memory, given: Mapping[str, int | None], fixed: Mapping[str, int], together: int
) -> tuple[Extent, Clips, Clips]:
    """What validations of transformers measure: the extent and its held-out and training clips; says what it costs.

    A forward is timed only where something is still to be chosen.
    """
    data, members, seconds = cast(Latents, run.data), list(run.members.values()), None

    def clips(count: int) -> list[Clips]:
        return [measured_clips(data, some) for some in (data.heldout_batches(count), data.train_batches(count))]

    extent = replace(BEST, **fixed)
    heldout, train = clips(extent.clips)
    first, clip = members[0], typical([*heldout.batches, *train.batches])
    budget = Budget(
        share=memory.share,
        samples=first.plan.batch_size / distributed.world_size(),
        per_sample=forwards_per_sample(first.trainee.module, clip),
        passes=sum(1 if member.ema is None else 2 for member in members),
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
            seconds = probe_of(run, first, levels, together).seconds(clip) / levels
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


def probe_of(run: Run, member: Member, points: int, together: int) -> Probe:
    """The ruler of an expert: `points` levels of its own law."""
    return Probe(member.stepper, cast(FlowMatching, member.loss).quadrature(points), run.seed, together)


def measured_clips(data: Latents, batches: list[Batch]) -> Clips:
    """Clips as validation takes them: each alone, with the file that it is of and its tags."""
    singles = one_by_one(batches)
    numbers = [clip.positions[0] for clip in singles]
    return Clips(singles, data.groups_of(numbers), data.tags_of(numbers))
