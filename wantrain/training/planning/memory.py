"""What training keeps in memory from step to step: weights, their average, gradients and the optimizer's state, before
anything is loaded. Activations come on top; they depend on the clip's size and on recomputation.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Container, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from wantrain.training.engine.optim import MakeOptimizer, adamw_8bit, build_optimizer, named_trainable, plain_tensors
from wantrain.training.engine.updates import UpdateOptions

#: Bytes of a card of 80 GB, as CUDA counts them.
CARD = 85_500_000_000
#: Share of a card that may be kept from step to step: activations need the rest.
ROOM = 0.9
#: Optimizers of small state that the planner proposes, where their library is there.
EIGHT_BIT: Mapping[str, MakeOptimizer] = (
    {"adamw_8bit": functools.partial(adamw_8bit, lr=1e-4)} if importlib.util.find_spec("torchao") else {}
)
#: Sides of the matrix on which an optimizer shows how large its state is.
SIDE = 256


@dataclass(frozen=True)
class Standing:
    """Bytes on a device that holds the whole run."""

    weights: int
    gradients: int
    optimizer: int
    average: int = 0

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def __str__(self) -> str:
        parts = {name: size for name, size in vars(self).items() if size or name != "average"}
        equation = " + ".join(f"{name} {size / 1e9:.3g}" for name, size in parts.items())
        return f"{equation} = {self.total / 1e9:.4g} GB"

    def warning(self, card: int = CARD) -> str | None:
        """A line where it leaves activations no room on one card of so many bytes; else None."""
        if self.total <= ROOM * card:
            return None
        return (
            f"{self} are kept from step to step, before activations: too much for one card of {card / 2**30:.0f} GiB "
            f"({card / 1e9:.4g} GB). Give adapter=lora, trained.dtype=bf16 with optimizer=adamw_8bit, or several GPUs "
            "that share it (launch/README.md)"
        )


def standing(
    modules: Mapping[str, nn.Module | None],
    updates: Mapping[str, UpdateBytes],
    *,
    averaged: Container[str] = (),
    offload: str = "none",
) -> Standing:
    """What these experts keep, by the bytes of each one's update. Their parameters need no values; None counts nothing.

    `averaged` are those with an average of their weights, in float32. With `offload="cpu"` the frozen weights of only
    one expert are on the device.
    """
    frozen, gradients, state, average = [0], 0, 0, 0
    for name, module in modules.items():
        if module is not None:
            trained = named_trainable(module).values()
            own = sum(parameter.nbytes for parameter in trained)
            frozen.append(sum(parameter.nbytes for parameter in module.parameters()) - own)
            gradients += own if updates[name].gradient else 0
            average += 4 * sum(parameter.numel() for parameter in trained) * (name in averaged)
            state += round(sum(parameter.numel() for parameter in trained) * updates[name].state)
    return Standing(gradients + (max(frozen) if offload == "cpu" else sum(frozen)), gradients, state, average)


class OneMatrix(nn.Module):
    """A network of one block that holds one matrix."""

    repeated_blocks = ("blocks",)

    def __init__(self, matrix: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleList([matrix])])


@dataclass(frozen=True)
class UpdateBytes:
    """Bytes of one element of a trained matrix: the one place that knows them, for planner, search and docs.

    weight    of the weight
    gradient  of its gradient between backward and update; 0 where updates happen in the backward
    state     what the optimizer keeps: moments, and Kahan's compensation
    passing   more while its own parameter is updated: float32 copies of weight and gradient, and in the backward the
              gradient; what the library's kernels need on top is not counted
    """

    weight: float
    gradient: float
    state: float
    passing: float = 0.0

    @property
    def total(self) -> float:
        """What stays from step to step, with the gradient."""
        return self.weight + self.gradient + self.state

    @classmethod
    def of(cls, make: MakeOptimizer, options: UpdateOptions) -> UpdateBytes:
        """Those of an optimizer with these options."""
        rounded = options.dtype == "bf16"
        weight = 2.0 if rounded else 4.0
        compensation = 2.0 if rounded and options.rounding == "kahan" else 0.0
        return cls(
            weight=weight,
            gradient=0.0 if options.in_backward else weight,
            state=state_bytes(make) + compensation,
            passing=(8.0 if rounded else 0.0) + (weight if options.in_backward else 0.0),
        )


def state_bytes(make: MakeOptimizer) -> float:
    """Bytes that an optimizer keeps for each element of a large matrix: it takes a step on one and is looked at."""
    matrix = nn.Linear(SIDE, SIDE, bias=False)
    optimizer = build_optimizer(make, OneMatrix(matrix))
    matrix.weight.grad = torch.zeros_like(matrix.weight)
    with torch.compiler.set_stance("force_eager"):  # torchao's optimizers compile their step, which takes long
        optimizer.step()
    tensors = plain_tensors(dict(optimizer.state[matrix.weight]))
    return sum(tensor.nbytes for tensor in tensors.values() if tensor.dim()) / matrix.weight.numel()
