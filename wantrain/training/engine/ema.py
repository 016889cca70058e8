"""An exponential moving average of the weights in training: what is sampled, validated and exported, if it is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from wantrain.training.engine.engine import Stepper, laid_out_like, local_part
from wantrain.training.engine.optim import named_trainable

#: Optimizer steps after which the average of a run that has just begun reaches back nine tenths of the run.
YOUNG = 9


class Ema:
    """The average of the weights that a Stepper trains, after each step moved by 1 - decay towards them.

    In a young run it moves faster, by YOUNG / (YOUNG + 1 + steps): it would else remember the random start for long.
    It is float32, whatever the weights are: a bfloat16 one would not move by small steps.
    `moved` is False while it is bit for bit the weights that the run began with.
    `start` is the average to go on from, whole tensors by name. Not under ZeRO-3.
    """

    def __init__(self, stepper: Stepper, decay: float, start: Mapping[str, Tensor] | None = None) -> None:
        assert stepper.engine != "zero3", "DeepSpeed moves parts of the weights behind the model's back"
        self.stepper, self.decay, self.moved = stepper, decay, start is not None
        self.average = {
            name: local_part(laid_out_like(p, start[name]) if start else p).detach().clone().float()
            for name, p in named_trainable(stepper.module).items()
        }

    @torch.no_grad()
    def follow(self, steps: int, *, update: bool | Tensor = True) -> None:
        """Move towards the weights after the optimizer's step number `steps`, unless that was no `update` of them."""
        if update is False:
            return
        self.moved = True
        weight: float | Tensor = max(1 - self.decay, YOUNG / (YOUNG + 1 + steps))
        if isinstance(update, Tensor):
            weight = torch.where(update, weight, 0.0)
        for name, parameter in named_trainable(self.stepper.module).items():
            self.average[name].lerp_(local_part(parameter).float(), weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While active, the model has the averaged weights, in float32 also where those in training are bfloat16."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in named_trainable(self.stepper.module).items():
            weights = local_part(parameter)
            if weights.dtype != self.average[name].dtype:  # a copy would round the average
                parameter.data, self.average[name] = self.average[name], parameter.data
                continue
            kept = weights.clone()
            weights.copy_(self.average[name])
            self.average[name].copy_(kept)


class OwnAverage(Ema):
    """The average x that schedule-free AdamW keeps by itself, in the place of an EMA: what is shown is made when it is
    asked for, and what trains is put back bit for bit, so that looking at a run does not change it.
    """

    def __init__(self, stepper: Stepper, *, moved: bool) -> None:
        self.stepper, self.moved = stepper, moved
        self.average = {}

    def follow(self, steps: int, *, update: bool | Tensor = True) -> None:
        """The optimizer's step has moved it already."""
        self.moved = self.moved or update is not False

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While active, the model has the averaged weights; inside itself, those in training again."""
        outermost = not self.average
        if outermost:
            self.average = self._made()
        try:
            with super().applied():
                yield
        finally:
            if outermost:
                self.average = {}

    @torch.no_grad()
    def _made(self) -> dict[str, Tensor]:
        """x = y + (z - y) (1 - 1 / beta_1) of each parameter; before the first step y itself."""
        optimizer = self.stepper.optimizer
        beta = {p: group["betas"][0] for group in optimizer.param_groups for p in group["params"]}
        made = {}
        for name, parameter in named_trainable(self.stepper.module).items():
            fast = optimizer.state.get(parameter, {}).get("z")
            made[name] = parameter.detach().clone()
            if fast is not None:
                made[name].lerp_(fast, 1 - 1 / beta[parameter])
        return made
