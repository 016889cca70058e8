"""What a run will be, computed on the meta device: no weights are opened, no data made, no network used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from wantrain.data import TrainingData
from wantrain.models import WanTransformer
from wantrain.models.quantize import FORMATS
from wantrain.training.alternation import ExpertAlternation
from wantrain.training.batching import Batching
from wantrain.training.engine.accelerator import copies_asked_for
from wantrain.training.engine.adaptive import keeps_average
from wantrain.training.engine.updates import UpdateOptions
from wantrain.training.expert import ExpertTrainer
from wantrain.training.options import ExpertOptions
from wantrain.training.planning import estimate, memory
from wantrain.training.planning.outline import Clips, check_size, clips_of, outline
from wantrain.training.planning.plan import GB
from wantrain.training.planning.planner import Planner
from wantrain.training.planning.trial_step import try_largest
from wantrain.util.cards import Card, planned_card
from wantrain.util.console import say


@dataclass(frozen=True)
class Forecast:
    """The forecast of a run.

    modules  what each expert trains, without values; None for a VAE whose sizes only its weights say
    kept     what stays in memory from step to step
    """

    settings: Mapping[str, Any]
    experts: Mapping[str, ExpertOptions]
    alternation: ExpertAlternation
    batching: Batching
    modules: Mapping[str, nn.Module | None]
    kept: memory.Standing

    @classmethod
    def of(
        cls,
        settings: Mapping[str, Any],
        experts: Mapping[str, ExpertOptions],
        alternation: ExpertAlternation,
        batching: Batching,
        dtype: torch.dtype,
    ) -> Forecast:
        """The forecast by a run's settings; `dtype` is that of frozen weights."""
        modules = {name: outline(expert.network, expert.settings, dtype) for name, expert in experts.items()}
        options = UpdateOptions.of(settings)
        updates = {name: memory.UpdateBytes.of(expert.optimizer, options) for name, expert in experts.items()}
        averaged = {name for name, expert in experts.items() if keeps_average(expert.settings)}
        kept = memory.standing(modules, updates, averaged=averaged, offload=settings["experts"]["offload"])
        return cls(settings, experts, alternation, batching, modules, kept)

    @property
    def length(self) -> dict[str, Any]:
        """What says how long the run is."""
        return {
            "steps": self.settings["steps"],
            "epochs": self.settings["epochs"],
            "default": self.settings["model"]["steps"],
        }

    @property
    def checkpoint_bytes(self) -> int:
        """What one checkpoint takes on disk; 0 where only weights could tell."""
        return sum(estimate.checkpoint_bytes(self.modules, self.kept).values())

    def check_device(self, device: torch.device, *, asked: str) -> None:
        """ValueError if a large transformer would be trained on a CPU that nobody asked for; `asked` is device=."""
        check_size(self.modules, device, asked)

    def start(self, data: TrainingData[Any], engine: str, device: torch.device) -> str:
        """How a step is computed, and on a GPU what the largest bucket takes of it; with settings that fit, if that is
        too much.
        """
        lines = [estimate.chosen(self.settings, self.batching)]
        card = None if device.type != "cuda" else planned_card(None)
        if card is not None and (planner := self.planner(engine)) is not None:
            lines.append(planner.advice(clips_of(data, self.settings), card))
        return "\n".join(lines)

    def share_of_steps(self, steps: int | None) -> str:
        """For a pair: each expert's steps; empty for one expert, or an unknown length."""
        losses = {name: expert.loss for name, expert in self.experts.items()}
        return estimate.share_of_steps(self.alternation, losses, steps)

    def describe(self, clips: Clips, *, engine: str, card: Card | None) -> str:
        """Lines for `dry_run=true`: what the run will be, each figure as an equation; `card` is the one to plan for."""
        steps = estimate.foreseen_length(clips.plan, **self.length)
        losses = {name: expert.loss for name, expert in self.experts.items()}
        checkpoints = self.settings["checkpoint"]
        facts = (clips, self.modules, self.batching, steps, self.kept, checkpoints, losses, self.alternation)
        lines = estimate.describe(*facts)
        planner = self.planner(engine)
        plans = None if planner is None else planner.describe(clips, card, steps)
        noise = estimate.noise_levels(losses)
        return "\n".join(filter(None, (self.share_of_steps(steps), lines, noise, plans)))

    def try_largest(self, trainers: Mapping[str, ExpertTrainer], data: TrainingData[Any], engine: str) -> None:
        """Run the largest bucket's step first, without an update, where that is possible (see `trial_step`), and say
        the measured and the planned memory.
        """
        bucket = try_largest(trainers, data, self.batching)
        if bucket is None or (planner := self.planner(engine)) is None:
            return
        device = next(iter(trainers.values())).stepper.device
        planned = max(planner.plan(clips_of(data, self.settings), bucket), key=lambda each: each.device)
        plan = f"{planned.tensors / GB:.4g} GB planned (and {planned.allowance / GB:.2g} GB for CUDA and fragmentation)"
        peak = torch.cuda.max_memory_allocated(device) / GB if device.type == "cuda" else None
        what = "the fullest pack" if self.batching.tokens else f"largest bucket {bucket}"
        say(f"{what} was tried: {'' if peak is None else f'{peak:.4g} GB at the peak, '}{plan}")

    def advice(self, data: TrainingData[Any], engine: str) -> str:
        """What a run that is out of memory should change."""
        planner, card = self.planner(engine), planned_card(None)
        if planner is None or card is None:
            return "Give recompute=block or a smaller batch_size=, or encode smaller clips (area= or num_frames=)"
        return planner.advice(clips_of(data, self.settings), card)

    def engine(self, asked: str) -> str:
        """The engine of the run, by that of the processes that were started: for a dry run in one process, which plans
        for the cards that share a clip, DDP.
        """
        return "ddp" if asked == "single" and self.batching.processes > 1 else asked

    def planner(self, asked: str) -> Planner | None:
        """What plans memory and time under the engine asked for; None for what is no transformer."""
        modules = {}
        for name, module in self.modules.items():
            if self.settings["base"]["dtype"] in FORMATS:  # planned from the sizes of its plain weights
                expert = self.experts[name]
                plain = {**expert.settings, "base": {"dtype": None, "low_rank": None}}
                module = outline(expert.network, plain, torch.bfloat16)
            if not isinstance(module, WanTransformer):
                return None
            modules[name] = module
        optimizers = {name: expert.optimizer for name, expert in self.experts.items()}
        rows = max(expert.loss.rows for expert in self.experts.values())
        engine, processes = self.engine(asked), self.batching.processes
        return Planner(modules, optimizers, self.settings, self.batching, engine, processes, rows, copies_asked_for())
