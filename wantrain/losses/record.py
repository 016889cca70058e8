"""What every loss returns, and what it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

#: Any callable network; for flow matching model(latents, timestep, text, condition) -> velocity.
Model = Callable[..., Any]


@dataclass(frozen=True)
class Loss:
    """The scalar to differentiate, and what the log wants to know about it."""

    value: Tensor
    per_sample: Tensor
    sigma: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)
