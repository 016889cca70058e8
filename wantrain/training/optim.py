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


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon for the groups marked `hidden`, AdamW for all others, as one optimizer.

    Muon turns the update of a matrix into its nearest orthogonal one; it suits the matrices inside the blocks, not
    embeddings, the head, biases or norms. Its update is scaled to AdamW's usual size, so that learning rates of the
    two compare.

    lr            peak learning rate of AdamW
    muon_lr       peak learning rate of Muon
    betas, eps    AdamW's
    momentum      Muon's
    weight_decay  on matrices, for both
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        muon_lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        groups = [dict(group) for group in params]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "hidden": False})
        hidden = [{**group, "lr": muon_lr} for group in self.param_groups if group["hidden"]]
        others = [group for group in self.param_groups if not group["hidden"]]
        self.parts: list[torch.optim.Optimizer] = []
        if hidden:
            self.parts.append(torch.optim.Muon(hidden, momentum=momentum, adjust_lr_fn="match_rms_adamw"))
        if others:
            self.parts.append(torch.optim.AdamW(others, betas=(betas[0], betas[1]), eps=eps))
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self._share()

    def _share(self) -> None:
        """Let the parts work on this optimizer's own state and groups: what is saved and scaled is here."""
        start = 0
        for part in self.parts:
            end = start + len(part.param_groups)
            part.state, part.param_groups, start = self.state, self.param_groups[start:end], end

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # load_state_dict ends here, with new state and groups
        self._share()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every group."""
        for part in self.parts:
            part.step()


def build_optimizer(
    make: Callable[[Iterable[dict[str, Any]]], torch.optim.Optimizer], module: nn.Module
) -> torch.optim.Optimizer:
    """The optimizer over up to three groups: matrices inside blocks (`hidden`), other matrices, and everything else,
    which has no weight decay.

    Each group remembers the learning rate it was made with as `peak_lr`, which the schedule scales.
    """
    hidden: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in named_trainable(module).items():
        if parameter.ndim < 2 or parameter.shape[0] == 1:
            others.append(parameter)
        else:
            (hidden if "blocks." in name and parameter.ndim == 2 else matrices).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": hidden, "hidden": True},
        {"params": matrices},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = make([group for group in groups if group["params"]])
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer
