"""Building a run from its setup: the run's folder, the experts' trainers, and the record that the loop moves."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wantrain.data import TrainingData
from wantrain.data.loading.schedule import check_past, entries_of
from wantrain.losses import LossFunction, Model
from wantrain.models import Base, adapters
from wantrain.models.attention import DEFAULT
from wantrain.models.formats.fingerprints import identity, identity_of
from wantrain.models.formats.loading import settled_dtype
from wantrain.runs import replay
from wantrain.runs.checkpoint import Checkpoints, read_state
from wantrain.runs.folder import CONFIG, RunFolder
from wantrain.runs.pages.live import RunPage
from wantrain.training.engine.accelerator import first_store
from wantrain.training.engine.adaptive import keeps_average
from wantrain.training.engine.ema import Ema, OwnAverage
from wantrain.training.engine.engine import StepOptions, Stepper
from wantrain.training.engine.joint_save import Crew, JointSaver
from wantrain.training.engine.main_process import on_main
from wantrain.training.engine.optim import build_optimizer
from wantrain.training.engine.placement import device_name
from wantrain.training.engine.updates import UpdateOptions
from wantrain.training.expert import ExpertTrainer, read_average
from wantrain.training.initialize import Initializer
from wantrain.training.loop import Run
from wantrain.training.monitoring import agreement
from wantrain.training.monitoring.costs import Costs
from wantrain.training.monitoring.metrics import Metrics
from wantrain.training.monitoring.safeguards import Safeguards
from wantrain.training.monitoring.supply import Supply
from wantrain.training.monitoring.throughput import Throughput, peak_of
from wantrain.training.monitoring.unlearning import Unlearning
from wantrain.training.options import ExpertOptions, RunSetup
from wantrain.training.trainable import TrainableModule
from wantrain.training.validation import expert_check
from wantrain.training.validation.build import Evaluations
from wantrain.util import distributed
from wantrain.util.console import say
from wantrain.util.seeds import seed_at

#: Frozen networks that a loss may name; see LossFunction.
NETWORKS = ("reference", "base")


def parts_needed(settings: Mapping[str, Any], experts: Iterable[str]) -> list[str]:
    """The parts of the base that a run reads: what trains, what encodes class prompts, and with previews all that
    sampling takes.

    Of a repository of the hub these alone are downloaded.
    """
    texts = ["text_encoder", "tokenizer"] if settings["preserve"]["weight"] else []
    if not settings["sample"]["every"]:
        return [*experts, *texts]
    return [*dict.fromkeys([*experts, *settings["model"]["experts"]]), "vae", "text_encoder", "tokenizer"]


def open_run(setup: RunSetup, command: Iterable[str]) -> tuple[Checkpoints, Path | None]:
    """Open the run's folder and record how it was started; its checkpoints, and the newest good one, on which all
    processes agree. `command` is what was typed.
    """
    folder, settings, placement = setup.folder, setup.settings, setup.placement
    options = {key: value for key, value in settings["checkpoint"].items() if key != "every"}
    checkpoints = Checkpoints(folder.checkpoints, **options)

    def open_folder() -> tuple[Path | None, dict[Path, int]]:
        sources = sources_of(setup.experts, setup.base)
        folder.open(dict(settings), sources)
        start = replay.described(
            command,
            data=setup.data.fingerprint,
            sources=sources,
            engine=placement.engine,
            processes=placement.processes,
            sequence_parallel=settings["sequence_parallel"],
            device=device_name(placement.device),
            attention=None if setup.kernel is None else setup.kernel.name,
        )
        if settings["replay"]:
            replay.compare_starts(Path(settings["replay"]), start)
        replay.record(folder.record, start, settings)
        checkpoints.prepare()
        newest = checkpoints.newest()
        files = [] if newest is None else [path for path in newest.rglob("*") if path.is_file()]
        return newest, {path: path.stat().st_size for path in [folder.path / CONFIG, *files]}

    newest, files = on_main(open_folder, "opening the run's folder")
    agreement.check_files(files)
    return checkpoints, newest


def sources_of(experts: Mapping[str, ExpertOptions], base: Base) -> dict[str, str]:
    """The identities of the files that each expert starts from: its part of the base, and the adapter it goes on from,
    unless it starts from random values; and of its class prompts.
    """
    found = {}
    for name, expert in experts.items():
        if expert.settings["init"] != "scratch" and base.holds(name):
            found[name] = identity(base, name)
        if file := expert.settings["adapter"].get("init"):
            path = Path(file).expanduser()
            files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
            found[f"{name}.init"] = identity_of(files)
        if file := expert.settings["preserve"]["prompts"]:
            found["preserve.prompts"] = identity_of([Path(file).expanduser()])
    return found


def compare_replay(folder: RunFolder, settings: Mapping[str, Any]) -> None:
    """Compare a replay's losses with those of the run it repeats. ValueError if they differ."""
    if settings["replay"] and distributed.is_main():
        say(replay.compare(Path(settings["replay"]), folder.metrics))


def build_initializers(setup: RunSetup) -> dict[str, Initializer]:
    """What each expert starts from; says which kernel its attention takes."""
    placement, kernel = setup.placement, setup.kernel
    if kernel is not None:
        say(f"attention: {kernel.name}")
    return {
        name: Initializer.of(
            expert.network,
            expert.settings,
            base=setup.base,
            device=placement.weights_device,
            dtype=setup.dtype,
            mapped=placement.maps_weights,
            recipe=setup.settings["recipe"],
            kernel=kernel or DEFAULT,
            compiler=setup.compiler,
            sequence=placement.sequence,
        )
        for name, expert in setup.experts.items()
    }


def build_trainers(
    setup: RunSetup, trainables: Mapping[str, TrainableModule], checkpoint: Path | None
) -> dict[str, ExpertTrainer]:
    """The trainer of each expert, with the weights of the newest checkpoint if there is one."""
    return {name: build_expert(setup, setup.experts[name], trainables[name], checkpoint) for name in setup.experts}


def build_expert(
    setup: RunSetup, expert: ExpertOptions, trainable: TrainableModule, checkpoint: Path | None
) -> ExpertTrainer:
    """The trainer of one expert: the loss's frozen networks, then the checkpoint's weights, then the engine."""
    settings, placement = expert.settings, setup.placement
    folder = expert.name if len(setup.experts) > 1 else ""
    reference = _frozen_copy(trainable, expert)
    average = None if checkpoint is None else read_average(trainable, checkpoint / folder)
    updates = UpdateOptions.of(settings)
    optimizer = build_optimizer(expert.optimizer, trainable.module)
    optimizer = updates.applied(optimizer, trainable.module, seed=seed_at(settings["seed"], "updates", expert.name))
    options = StepOptions(
        setup.batching.accumulate,
        settings["clip"],
        settings["precision"],
        clip_by=settings["clip_by"],
        in_backward=updates.in_backward,
        sequence_parallel=settings["sequence_parallel"],
    )
    if reference is not None:
        placement.place(reference)
    stepper = placement.stepper(trainable.module, optimizer, options, frozen=trainable.frozen)
    expert.loss.attach(_networks(expert.loss, stepper, reference), setup.texts)
    return ExpertTrainer(
        name=expert.name,
        trainable=trainable,
        stepper=stepper,
        loss=expert.loss,
        schedule=expert.schedule,
        plan=setup.batching.order(setup.data, setup.settings["seed"]),
        steps=setup.alternation.count(expert.name, setup.steps),
        ema=_average(stepper, settings, average),
        folder=folder,
    )


def _average(stepper: Stepper, settings: Mapping[str, Any], start: Mapping[str, Tensor] | None) -> Ema | None:
    """The average of the weights that a run keeps, from `start` if it goes on; None if it keeps none."""
    if settings["ema"] is not None:
        return Ema(stepper, settings["ema"], start)
    return OwnAverage(stepper, moved=start is not None) if keeps_average(settings) else None


def _frozen_copy(trainable: TrainableModule, expert: ExpertOptions) -> torch.nn.Module | None:
    """A copy of what the expert starts from, for a loss that needs a reference.

    None where that is the module with its adapter off: a new adapter adds nothing, one that continues from a file does.
    """
    loss = expert.loss
    if wrong := [name for name in loss.networks if name not in NETWORKS]:
        raise ValueError(
            f"the loss {type(loss).__name__} needs a network {wrong[0]!r}; train.py provides: {', '.join(NETWORKS)}"
        )
    adapted = adapters.has_adapter(trainable.module)
    if "base" in loss.networks and not adapted:
        raise ValueError(
            f"the loss {type(loss).__name__} compares with the base, which is the model with its adapter off; give "
            f"adapter=lora, dora or lokr, not adapter={expert.settings['adapter']['name']}"
        )
    if "reference" not in loss.networks or (adapted and expert.settings["adapter"]["init"] is None):
        return None
    frozen = copy.deepcopy(trainable.module).requires_grad_(False).eval()
    trained = dict(trainable.module.named_parameters())
    for name, parameter in frozen.named_parameters():
        dtype = settled_dtype(trainable.module, name, trained[name], trainable.frozen)
        parameter.data = parameter.data.to(dtype)
    return frozen


def _networks(loss: LossFunction, stepper: Stepper, reference: torch.nn.Module | None) -> dict[str, Model]:
    """The frozen networks that a loss names, each as a callable without gradients."""

    @torch.no_grad()
    def base(*args: Any, **keywords: Any) -> Any:
        with adapters.switched_off(stepper.module):
            return stepper.module(*args, **keywords)

    @torch.no_grad()
    def copied(*args: Any, **keywords: Any) -> Any:
        assert reference is not None
        return reference.to(stepper.device)(*args, **keywords)

    answers = {"base": base, "reference": base if reference is None else copied}
    return {name: answers[name] for name in loss.networks}


def build_monitoring(setup: RunSetup) -> tuple[Metrics, Throughput, Safeguards]:
    """The log of a run, its throughput and its safeguards. The watchdog is none of them: it starts before the run."""
    settings = setup.settings
    limits = {key: settings["safeguards"][key] for key in ("max_skipped_steps", "spike", "refuse")}
    unlearning = Unlearning(settings["safeguards"]["unlearning"], settings["safeguards"]["unlearning_stop"])
    chosen = None in [settings["validation"][key] for key in ("every", "clips", "points")]
    costs = Costs(settings["validation"]["share"] if chosen else None)
    return (
        Metrics(setup.folder.metrics, steps=setup.steps, peak=peak_of(setup.placement.device), costs=costs),
        Throughput(settings["model"]["fps"], compiler=setup.compiler, supply=Supply(setup.data.traffic)),
        Safeguards(setup.folder.safeguards, **limits, unlearning=unlearning),
    )


def resume(
    trainers: Mapping[str, ExpertTrainer],
    safeguards: Safeguards,
    metrics: Metrics,
    checkpoint: Path | None,
    *,
    data: TrainingData[Any],
) -> int:
    """Go on from a checkpoint whose weights the trainers have already; returns its step (0: from the start).

    ValueError if the checkpoint was trained on other data, or by another schedule of them up to its step.
    """
    if checkpoint is None:
        metrics.cut_back(-1)
        return 0
    state = read_state(checkpoint)
    if state["data"] != data.fingerprint:
        raise ValueError(
            f"{checkpoint} was trained on other shards than data.shards holds now (another manifest, or other pairs); "
            "give those it was trained on, or a new run=NAME"
        )
    made = state.get("experts", {})  # older runs have none
    stored = state["config"]["data"]
    if data.schedule or stored.get("schedule"):
        now = data.schedule or entries_of({**stored, "schedule": None})
        check_past(entries_of(stored), now, max(made.values()))
    used = sum(trainers[name].plan.samples_before(own) for name, own in made.items()) if made else state["samples"]
    if state["samples"] != used:  # batch_tokens= with another number of packs in a step: batch_size= was compared
        raise ValueError(
            f"{checkpoint} has used {state['samples']} samples, and with as many packs in a step as now it would be "
            f"{used}; give accumulate= so that accumulate x processes is what it was, or a new run=NAME"
        )
    for trainer in trainers.values():
        trainer.restore_optimizer(checkpoint)
    safeguards.restore(state, trainers)
    metrics.cut_back(state["step"])
    return int(state["step"])


def check_experts(
    trainers: Mapping[str, ExpertTrainer], initializers: Mapping[str, Initializer], setup: RunSetup
) -> None:
    """Measure whether each loaded expert is the one it was asked for (expert_check.py), where that can be measured and
    `check_expert=` wants it.
    """
    how, seed = setup.settings["check_expert"], setup.settings["seed"]
    for name, trainer in trainers.items():
        if how != "off" and initializers[name].is_measurable():
            batch = trainer.first_batch(setup.data)
            with trainer.evaluating():
                expert_check.check(
                    trainer.stepper, batch, model=initializers[name].model, expert=name, how=how, seed=seed
                )


def build_run(
    setup: RunSetup,
    trainers: Mapping[str, ExpertTrainer],
    checkpoints: Checkpoints,
    monitoring: tuple[Metrics, Throughput, Safeguards],
    evaluations: Evaluations,
) -> Run:
    """The run as the loop takes it."""
    settings, (metrics, throughput, safeguards) = setup.settings, monitoring
    saver = None
    if all(trainer.saves_jointly for trainer in trainers.values()):
        crew = Crew(distributed.rank(), setup.placement.processes, first_store())
        saver = JointSaver(crew, background=checkpoints.background)
    return Run(
        trainers=trainers,
        alternation=setup.alternation,
        data=setup.data,
        checkpoints=checkpoints,
        metrics=metrics,
        throughput=throughput,
        safeguards=safeguards,
        page=RunPage(setup.folder, setup.steps, setup.data.view),
        hooks=evaluations.hooks,
        should_stop=evaluations.should_stop,
        steps=setup.steps,
        until=min(setup.steps, settings["stop_after"] or setup.steps),
        seed=settings["seed"],
        checkpoint_every=settings["checkpoint"]["every"],
        facts={"data": setup.data.fingerprint, "engine": setup.placement.engine, "config": settings},
        saver=saver,
    )
