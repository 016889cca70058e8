"""What a run is built from, as typed records: the entry point makes them from the config, the builders read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from wantrain.data import TrainingData
from wantrain.losses import LossFunction
from wantrain.models import Base, attention
from wantrain.models.attention import Kernel
from wantrain.models.compiling import BlockCompiler, check_compiler
from wantrain.runs.folder import RunFolder
from wantrain.training.alternation import ExpertAlternation
from wantrain.training.batching import Batching
from wantrain.training.engine.optim import MakeOptimizer, Schedule
from wantrain.training.engine.placement import Placement


@dataclass(frozen=True)
class ExpertOptions:
    """One expert of a run.

    settings   its config as plain data, with what `experts.NAME.*` overrides
    network    builds the module with random values
    optimizer  makes its optimizer over parameter groups
    """

    name: str
    settings: Mapping[str, Any]
    network: Callable[[], nn.Module]
    loss: LossFunction
    optimizer: MakeOptimizer
    schedule: Schedule


@dataclass(frozen=True)
class RunSetup:
    """Everything that a run is built from, before its weights are loaded.

    settings  the whole config as plain data
    dtype     of frozen weights; trained ones are float32
    steps     optimizer steps, of all experts together
    texts     embeddings (L, D) of the texts that losses and previews need, by text
    """

    settings: Mapping[str, Any]
    experts: Mapping[str, ExpertOptions]
    alternation: ExpertAlternation
    batching: Batching
    data: TrainingData
    base: Base
    placement: Placement
    folder: RunFolder
    dtype: torch.dtype
    steps: int
    texts: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def kernel(self) -> Kernel | None:
        """What transformers attend with; None for a VAE. ValueError if this machine has no such kernel."""
        if "vae" in self.experts:
            return None
        width = self.settings["model"]["transformer"]["attention_head_dim"]
        return attention.choose(self.settings["attention"], self.placement.device, self.dtype, width=width)

    @cached_property
    def compiler(self) -> BlockCompiler | None:
        """What compiles the transformers' blocks; None with compile=none. ValueError if it cannot on this machine."""
        if self.settings["compile"] == "none":
            return None
        check_compiler(self.placement.device)
        return BlockCompiler()
