"""Putting a run's pieces together from plain settings: what is trained, what watches it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from wantrain.runs import replay
from wantrain.runs.checkpoint import Checkpoints
from wantrain.runs.folder import RunFolder
from wantrain.training.engine.ema import Ema
from wantrain.training.engine.engine import Stepper
from wantrain.training.engine.main_process import on_main
from wantrain.training.engine.optim import build_optimizer
from wantrain.training.engine.placement import Placement, device_name
from wantrain.training.expert import ExpertTrainer, read_average
from wantrain.training.initialize import Initializer
from wantrain.training.loop import Run
from wantrain.training.monitoring.metrics import Metrics
from wantrain.training.monitoring.safeguards import Safeguards
from wantrain.training.monitoring.throughput import Meter, peak_of
from wantrain.training.trainable import TrainableModule
from wantrain.training.validation import expert_check
from wantrain.util import distributed
from wantrain.util.console import say


def wanted(settings: Mapping[str, Any], experts: Iterable[str]) -> list[str]:
    """The parts of the base that a run reads: what trains, and with previews all that sampling takes.

    Of a repository of the hub these alone are downloaded.
    """
    if not settings["sample"]["every"]:
        return list(experts)
    return [*dict.fromkeys([*experts, *settings["model"]["experts"]]), "vae", "text_encoder", "tokenizer"]


def open_run(
    folder: RunFolder, settings: Mapping[str, Any], placement: Placement, *, data: str, command: Iterable[str]
) -> tuple[Checkpoints, Path | None]:
    """Open a run's folder for `settings` and write down how it was started; its checkpoints, and the newest good one,
    which all processes agree on. `data` is the manifest's hash, `command` what was typed.
    """
    how = {key: value for key, value in settings["checkpoint"].items() if key != "every"}
    checkpoints = Checkpoints(folder.checkpoints, **how)

    def open_and_look() -> Path | None:
        folder.open(dict(settings))
        processes, device = placement.accelerator.num_processes, device_name(placement.accelerator.device)
        start = replay.described(command, data=data, engine=placement.engine, processes=processes, device=device)
        if settings["replay"]:
            replay.told(Path(settings["replay"]), start)
        replay.record(folder.record, start, settings)
        checkpoints.prepare()
        return checkpoints.newest()

    return checkpoints, on_main(open_and_look, "opening the run's folder")


def compare_replay(folder: RunFolder, settings: Mapping[str, Any]) -> None:
    """Hold a replay's losses against those of the run it repeats. ValueError if they part."""
    if settings["replay"] and distributed.is_main():
        say(replay.compare(Path(settings["replay"]), folder.metrics))


def build_expert(
    trainable: TrainableModule,
    placement: Placement,
    *,
    checkpoint: Path | None,
    optimizer: Callable[[Iterable[dict[str, Any]]], torch.optim.Optimizer],
    how: Mapping[str, Any],
    ema: float | None,
    **own: Any,
) -> ExpertTrainer:
    """The trainer of one expert: first its weights from the checkpoint if there is one, then its engine.

    `optimizer` makes one over parameter groups; `how` is what a Stepper is told; `own` is the rest of a ExpertTrainer.
    """
    average = None if checkpoint is None else read_average(trainable, checkpoint / own["folder"])
    stepper = Stepper(placement.accelerator, trainable.module, build_optimizer(optimizer, trainable.module), **how)
    if placement.swapper is not None:
        placement.swapper.add(trainable.module)
    kept = None if ema is None else Ema(stepper, ema, average)
    return ExpertTrainer(trainable=trainable, stepper=stepper, ema=kept, **own)


def guards(
    folder: RunFolder, placement: Placement, *, steps: int, fps: float, safeguards: Mapping[str, Any]
) -> dict[str, Any]:
    """What watches over a run, as a Run takes it: its log, its meter and its safeguards."""
    # The watchdog is none of them: it watches from before there is a run.
    safeguards = {key: value for key, value in safeguards.items() if key != "hang"}
    return {
        "metrics": Metrics(folder.metrics, steps=steps, peak=peak_of(placement.accelerator.device)),
        "meter": Meter(fps),
        "safeguards": Safeguards(folder.tripped, **safeguards),
    }


def check_experts(run: Run, starts: Mapping[str, Initializer], *, how: str) -> None:
    """Measure whether what was loaded is the expert it is taken for (see which_expert), where that can be known and is
    asked for: `how` is warn, stop or off.
    """
    for name, trainer in run.trainers.items():
        if how != "off" and starts[name].is_measurable():
            told: dict[str, Any] = {"model": starts[name].model, "expert": name, "how": how, "seed": run.seed}
            with trainer.watched():
                expert_check.check(trainer.stepper, run.first_batch(), **told)
