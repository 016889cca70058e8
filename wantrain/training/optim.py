"""What is trained, how fast: parameter groups, and learning-rate schedules as functions of progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Schedule:
    """Scale of the learning rate by optimizer step: linear warm-up, then `shape` down to `floor`.

    shape   "cosine" or "constant"
    warmup  optimizer steps until the peak (at most a tenth of the run, so that a short run still learns)
    floor   share of the peak at the end
    """

    shape: str = "cosine"
    warmup: int = 0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.shape not in {"cosine", "constant"}:
            raise ValueError(f"schedule.shape={self.shape!r} is unknown; choose cosine or constant")

    def __call__(self, step: int, steps: int) -> float:
        """The scale for the update that leads from `step` to `step + 1`, of `steps` in all."""
        warmup = min(self.warmup, steps // 10)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.shape == "constant":
            return 1.0
        progress = (step - warmup) / max(1, steps - warmup)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))


def named_trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training moves, by name, in the module's own order."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def build_optimizer(
    make: Callable[[Iterable[dict[str, Any]]], torch.optim.Optimizer], module: nn.Module
) -> torch.optim.Optimizer:
    """The optimizer over two groups: matrices, and everything else, which has no weight decay.

    Each group remembers the learning rate it was made with as `peak_lr`, which the schedule scales.
    """
    parameters = list(named_trainable(module).values())
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2 and parameter.shape[0] > 1]
    others = [parameter for parameter in parameters if not (parameter.ndim >= 2 and parameter.shape[0] > 1)]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    optimizer = make([group for group in groups if group["params"]])
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer
