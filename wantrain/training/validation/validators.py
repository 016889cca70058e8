"""The validations of a run: how much they measure, and one for each expert, as its loss says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from wantrain.batch import Batch
from wantrain.data import TrainingData
from wantrain.losses import ClipValidation, NoiseLevelValidation
from wantrain.models import WanTransformer
from wantrain.models.flops import training_flops
from wantrain.training.expert import ExpertTrainer
from wantrain.training.options import RunSetup
from wantrain.training.protocols import Hook
from wantrain.training.validation.budget import BEST, Budget, ChosenExtent, Extent
from wantrain.training.validation.history import EvalHistory
from wantrain.training.validation.measure import Clips, Evaluator, one_by_one
from wantrain.training.validation.validator import ClipValidator, Validator, describe, should_stop
from wantrain.util.console import say


@dataclass(frozen=True)
class Evaluations:
    """What evaluates a run: its hooks, and whether validation asks it to end at a step."""

    hooks: Sequence[Hook] = ()
    should_stop: Callable[[int], bool] = lambda step: False


def build_validators(setup: RunSetup, trainers: Mapping[str, ExpertTrainer]) -> Evaluations:
    """The validation of each expert, as its loss says; it may end the run.

    What of `validation.every`, `clips` and `points` is null is chosen so that validation takes at most
    `validation.share` of training, and recorded in the run's folder. With `validation.every` 0 there is none.
    """
    settings = setup.settings["validation"]
    if settings["every"] == 0:
        say("validation.every=0: there is no validation")
        return Evaluations()
    chosen = ChosenExtent(setup.folder.validation, settings["share"])
    given = {key: settings[key] for key in ("every", "clips", "points")}
    fixed, most_stale = chosen.recall(given), settings["early_stopping_patience"]
    batches = setup.data.heldout_batches(fixed.get("clips", BEST.clips))
    validations = {name: trainer.loss.validation for name, trainer in trainers.items()}
    noisy = all(isinstance(validation, NoiseLevelValidation) for validation in validations.values())
    if most_stale is not None and not (batches and noisy):
        raise ValueError(
            f"validation.early_stopping_patience={most_stale} asks held-out clips of a transformer when to end, but "
            "there are none; raise data.holdout, or give validation.early_stopping_patience=null"
        )
    if not batches:
        say("no clips are held out (data.holdout is 0, or there are too few files): there is no validation")
        return Evaluations()
    if None in validations.values():
        say("the loss declares no validation: there is none")
        return Evaluations()
    if not noisy:
        # Each clip is read once: 16 samples in 100 steps are within any share, so nothing is chosen.
        every, clips = replace(BEST, **fixed).every, one_by_one(batches)
        return Evaluations(
            [
                ClipValidator(trainers[name].stepper, validation, clips, every, setup.steps)
                for name, validation in validations.items()
                if isinstance(validation, ClipValidation)
            ]
        )
    validators = _at_noise_levels(setup, trainers, chosen, given)
    return Evaluations(validators, partial(should_stop, validators, most_stale))


def _at_noise_levels(
    setup: RunSetup, trainers: Mapping[str, ExpertTrainer], chosen: ChosenExtent, given: Mapping[str, int | None]
) -> list[Validator]:
    """A validator for each expert, all of the same clips."""
    together = setup.settings["validation"]["together"]
    extent, heldout, train = choose_extent(setup, trainers, chosen, given)
    history = EvalHistory(setup.folder.eval_history)
    return [
        Validator(
            trainer,
            evaluator_of(trainer, extent.points, setup.settings["seed"], together),
            heldout,
            train,
            history,
            every=extent.every,
            steps=setup.steps,
            prefix=f"{name}/" if len(trainers) > 1 else "",
        )
        for name, trainer in trainers.items()
    ]


def choose_extent(
    setup: RunSetup, trainers: Mapping[str, ExpertTrainer], chosen: ChosenExtent, given: Mapping[str, int | None]
) -> tuple[Extent, Clips, Clips]:
    """How much validation measures, its held-out and its training clips; says what it costs.

    A forward is timed only where something is still to be chosen.
    """
    data, fixed, seconds = setup.data, chosen.recall(given), None
    together = setup.settings["validation"]["together"]

    def clips(count: int) -> list[Clips]:
        return [measured_clips(data, some) for some in (data.heldout_batches(count), data.train_batches(count))]

    extent = replace(BEST, **fixed)
    heldout, train = clips(extent.clips)
    first, clip = next(iter(trainers.values())), typical([*heldout.batches, *train.batches])
    budget = Budget(
        share=chosen.share,
        samples=first.plan.samples_per_step / first.stepper.data_ranks.count,
        per_sample=first.loss.rows * forwards_per_sample(first.trainable.module, clip) + first.loss.base_rows,
        passes=sum(1 if trainer.ema is None else 2 for trainer in trainers.values()),
        processes=first.stepper.data_ranks.count,
        heldout=len(heldout),
        train=len(train),
        steps=setup.steps,
    )
    if len(fixed) < len(given):
        extent = budget.choose(fixed)
        chosen.note(given, extent)
        heldout, train = clips(extent.clips)
        levels = min(together, extent.points)
        with first.evaluating():
            seconds = evaluator_of(first, levels, setup.settings["seed"], together).seconds(clip) / levels
    say(describe(heldout, train, budget.describe(extent, seconds)))
    if about := evaluator_of(first, 1, setup.settings["seed"], together).about:
        say(f"validation measures what {about} says; of clips without a mask all")
    return extent, heldout, train


def typical(clips: Sequence[Batch]) -> Batch:
    """The clip whose size is nearest to the mean."""
    mean = sum(clip.num_tokens for clip in clips) / len(clips)
    return min(clips, key=lambda clip: abs(clip.num_tokens - mean))


def forwards_per_sample(module: nn.Module, clip: Batch) -> float:
    """What training on a clip costs, in forwards: 3 for all weights, less for a LoRA, 1 more with recomputation.

    3 for what is no WanTransformer, whose operations nobody has counted.
    """
    if not isinstance(module, WanTransformer):
        return 3.0
    flops = training_flops(module, tokens=clip.num_tokens, text_rows=module.text_length)
    return flops.executed / flops.forward


def evaluator_of(trainer: ExpertTrainer, points: int, seed: int, together: int) -> Evaluator:
    """What measures an expert: `points` noise levels of its own distribution."""
    validation = trainer.loss.validation
    assert isinstance(validation, NoiseLevelValidation)
    levels = validation.levels(points)
    return Evaluator(
        trainer.stepper, levels, seed, together, validation.error, weight=validation.weight, about=validation.about
    )


def measured_clips(data: TrainingData[Batch], batches: Sequence[Batch]) -> Clips:
    """Clips as validation takes them: each alone, with its file's group and its tags."""
    singles = one_by_one(batches)
    numbers = [clip.clips[0] for clip in singles]
    return Clips(singles, data.groups_of(numbers), data.tags_of(numbers))
