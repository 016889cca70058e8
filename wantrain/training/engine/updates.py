"""How an update reaches the weights that are trained: in which dtype they are kept, and when they move."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wantrain.training.engine.optim import named_trainable
from wantrain.training.engine.parameterwise import ParameterwiseOptimizer
from wantrain.util.libraries import is_dtensor


@dataclass(frozen=True)
class UpdateOptions:
    """How trained weights are kept and updated.

    dtype        fp32, or bf16: all but those that the model keeps in float32 are bfloat16, and so are their gradients
    rounding     of bf16 weights: stochastic or kahan (parameterwise.py)
    in_backward  each parameter is updated in the backward pass, when its gradient is there, and the gradient is freed
    """

    dtype: str = "fp32"
    rounding: str = "stochastic"
    in_backward: bool = False

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> UpdateOptions:
        """From train.py's settings."""
        return cls(**settings["trained"], in_backward=settings["update_in_backward"])

    @property
    def parameterwise(self) -> bool:
        """True if parameters are updated one at a time."""
        return self.dtype == "bf16" or self.in_backward

    def applied(self, optimizer: torch.optim.Optimizer, module: nn.Module, *, seed: int) -> torch.optim.Optimizer:
        """The optimizer of a module's trained weights, made to update them so; `seed` is that of stochastic rounding.

        ValueError if it cannot.
        """
        if not self.parameterwise:
            return optimizer
        names = {parameter: name for name, parameter in named_trainable(module).items()}
        return ParameterwiseOptimizer(optimizer, names, rounding=self.rounding, seed=seed)


class BackwardUpdates:
    """Updates each parameter of `optimizer` in the backward pass, as soon as its gradient is there, and frees that.

    Such an update cannot wait for the whole gradient's norm. So `clip` is the largest norm of one parameter's gradient
    (None: none), and a gradient that is not finite counts as zero.
    """

    def __init__(self, optimizer: ParameterwiseOptimizer, parameters: Iterable[nn.Parameter], clip: float | None):
        self.optimizer, self.clip = optimizer, clip
        self.paused = False
        self._norms: list[Tensor] = []
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._update)

    @torch.no_grad()
    def _update(self, parameter: nn.Parameter) -> None:
        if not self.paused:
            norm = clip_own(parameter, self.clip)
            assert parameter.grad is not None
            parameter.grad.masked_fill_(~norm.isfinite(), 0)
            self._norms.append(norm)
            self.optimizer.update(parameter)
        parameter.grad = None

    def norm(self, device: torch.device) -> Tensor:
        """The norm of the whole gradient of the last backward, before it was clipped; NaN if there was none."""
        norms, self._norms = self._norms, []
        return total_norm(norms) if norms else torch.full((), torch.nan, device=device)


def clip_gradients(parameters: Iterable[nn.Parameter], clip: float | None, by: str) -> Tensor:
    """Scale gradients to a norm of at most `clip` (None: any); returns the norm that the whole gradient had.

    by  whole: the norm is that of all gradients together; parameter: each has its own
    """
    found = [parameter for parameter in parameters if parameter.grad is not None]
    if by == "parameter":
        return total_norm(clip_own(parameter, clip) for parameter in found)
    norm = nn.utils.clip_grad_norm_(found, math.inf if clip is None else clip)
    return norm.full_tensor() if is_dtensor(norm) else norm


@torch.no_grad()
def clip_own(parameter: nn.Parameter, clip: float | None) -> Tensor:
    """Scale a parameter's gradient to a norm of at most `clip`; returns the norm it had, a scalar on its device."""
    assert parameter.grad is not None
    norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
    if clip is not None:
        parameter.grad.mul_((clip / (norm + 1e-6)).clamp(max=1.0))
    return norm


def total_norm(norms: Iterable[Tensor]) -> Tensor:
    """The norm of a gradient by those of its parts. The order of the parts changes no bit."""
    return torch.stack(list(norms)).double().sort().values.square().sum().sqrt().float()
