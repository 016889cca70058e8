"""What every loss returns, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from wantrain.batch import Batch, moved

#: Any callable network; for flow matching model(latents, timestep, text, condition) -> velocity.
Model = Callable[..., Any]


@dataclass(frozen=True)
class Draws:
    """What is random in the loss of one batch, drawn on the host before the model is asked: while a step before runs.

    generators   one per sample, whose next numbers are for what can only be drawn once the model has answered
    sigma        (B,) noise levels; None for a loss without any
    noise_BCTHW  standard normal noise of the latents' shape; None likewise
    """

    generators: Sequence[torch.Generator]
    sigma: Tensor | None = None
    noise_BCTHW: Tensor | None = None

    def to(self, device: torch.device | str) -> Draws:
        """The same on another device; generators stay on the host, so that every device sees the same numbers."""
        return replace(self, **moved(self, device))


@dataclass(frozen=True)
class Loss:
    """The scalar to differentiate, and what the log wants to know about it."""

    value: Tensor
    per_sample: Tensor
    sigma: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)


class LossFunction(Protocol):
    """What the loop asks of a loss: draw what is random, on the host; then ask the model, on the device."""

    def prepare(self, batch: Batch, generators: Sequence[torch.Generator]) -> Draws: ...

    def __call__(self, model: Model, batch: Batch, draws: Draws) -> Loss: ...
