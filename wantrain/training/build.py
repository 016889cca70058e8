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
from wantrain.training.engine.placement import Home, device_name
from wantrain.training.expert import Member, read_average
from wantrain.training.initialize import Start
from wantrain.training.loop import Run
from wantrain.training.monitoring.metrics import Metrics
from wantrain.training.monitoring.safeguards import Tripwires
from wantrain.training.monitoring.throughput import Meter, peak_of
from wantrain.training.trainable import Trainee
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
    folder: RunFolder, settings: Mapping[str, Any], home: Home, *, data: str, command: Iterable[str]
) -> tuple[Checkpoints, Path | None]:
    """Open a run's folder for `settings` and write down how it was started; its checkpoints, and the newest good one,
    which all processes agree on. `data` is the manifest's hash, `command` what was typed.
    """
    how = {key: value for key, value in settings["checkpoint"].items() if key != "every"}
    checkpoints = Checkpoints(folder.checkpoints, **how)

    def open_and_look() -> Path | None:
        folder.open(dict(settings))
        processes, device = home.accelerator.num_processes, device_name(home.accelerator.device)
        start = replay.described(command, data=data, engine=home.engine, processes=processes, device=device)
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


def enlist(
    trainee: Trainee,
    home: Home,
    *,
    checkpoint: Path | None,
    optimizer: Callable[[Iterable[dict[str, Any]]], torch.optim.Optimizer],
    how: Mapping[str, Any],
    ema: float | None,
    **own: Any,
) -> Member:
    """Make what is trained a member of a run: first its weights from the checkpoint if there is one, then its engine.

    `optimizer` makes one over parameter groups; `how` is what a Stepper is told; `own` is the rest of a Member.
    """
    average = None if checkpoint is None else read_average(trainee, checkpoint / own["folder"])
    stepper = Stepper(home.accelerator, trainee.module, build_optimizer(optimizer, trainee.module), **how)
    if home.residence is not None:
        home.residence.add(trainee.module)
    kept = None if ema is None else Ema(stepper, ema, average)
    return Member(trainee=trainee, stepper=stepper, ema=kept, **own)


def guards(folder: RunFolder, home: Home, *, steps: int, fps: float, tripwires: Mapping[str, Any]) -> dict[str, Any]:
    """What watches over a run, as a Run takes it: its log, its meter and its tripwires."""
    # The watchdog is none of them: it watches from before there is a run.
    wires = {key: value for key, value in tripwires.items() if key != "hang"}
    return {
        "metrics": Metrics(folder.metrics, steps=steps, peak=peak_of(home.accelerator.device)),
        "meter": Meter(fps),
        "tripwires": Tripwires(folder.tripped, **wires),
    }


def check_experts(run: Run, starts: Mapping[str, Start], *, how: str) -> None:
    """Measure whether what was loaded is the expert it is taken for (see which_expert), where that can be known and is
    asked for: `how` is warn, stop or off.
    """
    for name, member in run.members.items():
        if how != "off" and starts[name].is_measurable():
            told: dict[str, Any] = {"model": starts[name].model, "expert": name, "how": how, "seed": run.seed}
            with member.watched():
                expert_check.check(member.stepper, run.first_batch(), **told)
