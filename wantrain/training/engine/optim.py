"""What is trained, how fast: parameter groups, and learning-rate schedules as functions of progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from wantrain.models.facts import place_in_blocks
from wantrain.util import libraries

#: Makes an optimizer over parameter groups.
MakeOptimizer = Callable[[Iterable[dict[str, Any]]], torch.optim.Optimizer]
#: How the learning rate falls: share of the way down that is left, by progress through the fall in [0, 1].
FALLS: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "sqrt": lambda progress: 1 - math.sqrt(progress),
}


@dataclass(frozen=True)
class Schedule:
    """Scale of the learning rate by optimizer step: linear warm-up, the peak, then a fall to `floor` at the end.

    shape   of the fall: "cosine", "linear", "sqrt" (fast at first), or "constant" for none
    warmup  optimizer steps until the peak (at most a tenth of the run, so that a short run still learns)
    decay   share of the run, at its end, over which the rate falls; 1 begins with the end of the warm-up
    floor   share of the peak at the end
    """

    shape: str = "cosine"
    warmup: int = 0
    decay: float = 1.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.shape not in FALLS:
            raise ValueError(f"schedule.shape={self.shape!r} is unknown; choose one of {', '.join(FALLS)}")
        if self.warmup < 0:
            raise ValueError(f"schedule.warmup={self.warmup} must not be below 0")
        for key in ("decay", "floor"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"schedule.{key}={getattr(self, key)} is a share and must lie between 0 and 1")

    def __call__(self, step: int, steps: int) -> float:
        """The scale for the update that leads from `step` to `step + 1`, of `steps` in all."""
        warmup = min(self.warmup, steps // 10)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        start = max(warmup, steps - round(self.decay * steps))
        progress = min(1.0, max(0.0, (step - start) / max(1, steps - start)))
        return self.floor + (1 - self.floor) * FALLS[self.shape](progress)


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


def adamw_8bit(
    params: Iterable[dict[str, Any]],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    block_size: int = 256,
) -> torch.optim.Optimizer:
    """torchao's AdamW, whose moments take 8 bits an element (those of small tensors stay in float32).

    block_size  elements that share one scale

    ValueError if torchao is not there.
    """
    with libraries.optional("adamw_8bit", "torchao", "8bit"):
        from torchao.optim import AdamW8bit
    optimizer: torch.optim.Optimizer = AdamW8bit(
        params, lr=lr, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay, block_size=block_size
    )
    return optimizer


def is_quantised(value: object) -> bool:
    """True for a tensor that is kept as several plain ones, such as codes and scales."""
    return is_traceable_wrapper_subclass(value) and not libraries.is_dtensor(value)


def plain_tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """The optimizer state of one parameter as plain tensors: of a quantised one its parts, under `key.part`.

    ValueError if it keeps anything but tensors and a count of steps.
    """
    plain: dict[str, Tensor] = {}
    for key, value in state.items():
        if key == "step" and isinstance(value, int):
            value = torch.tensor(float(value))
        if not isinstance(value, Tensor):
            raise ValueError(f"the optimizer keeps {key} as {type(value).__name__}; only tensors can be saved")
        if is_quantised(value):
            plain |= {f"{key}.{part}": getattr(value, part) for part in value.__tensor_flatten__()[0]}  # type: ignore[attr-defined]
        else:
            plain[key] = value
    return plain


@torch.no_grad()
def fill_state(
    optimizer: torch.optim.Optimizer, state: Mapping[nn.Parameter, Mapping[str, Tensor]], where: object
) -> None:
    """Give an optimizer the state that `plain_tensors` gave, each tensor in its own dtype.

    torch's load_state_dict would cast it to the parameters' dtype. So the optimizer makes its own state, and the values
    are copied into that. ValueError, naming `where` they come from, if they are those of another optimizer.
    """
    make_state(optimizer, state)
    for parameter, saved in state.items():
        own = plain_tensors(optimizer.state.get(parameter, {}))
        if own.keys() != saved.keys():
            raise ValueError(
                f"{where} holds {', '.join(sorted(saved))} of a parameter where this optimizer keeps "
                f"{', '.join(sorted(own))}; it belongs to another run"
            )
        for key, tensor in own.items():
            tensor.copy_(saved[key])


@torch.no_grad()
def make_state(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Have an optimizer make its state, by updates that move nothing: gradients and learning rates are zero.

    One parameter at a time, so that no more than one gradient takes memory.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        parameter.grad = None
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def build_optimizer(make: MakeOptimizer, module: nn.Module) -> torch.optim.Optimizer:
    """The optimizer over up to three groups, by tag: `hidden`, the matrices inside blocks; `matrices`, the others; and
    `rest`, which has no weight decay.

    Each group remembers the learning rate it was made with as `peak_lr`, which the schedule scales. Every trained
    parameter is in exactly one. ValueError if the optimizer does not take its settings.
    """
    tagged: dict[str, list[nn.Parameter]] = {"hidden": [], "matrices": [], "rest": []}
    for name, parameter in named_trainable(module).items():
        if parameter.ndim < 2 or parameter.shape[0] == 1:
            tagged["rest"].append(parameter)
        else:
            tagged["hidden" if place_in_blocks(module, name) and parameter.ndim == 2 else "matrices"].append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": trainers, "tag": tag, "hidden": tag == "hidden"} for tag, trainers in tagged.items() if trainers
    ]
    for group in groups:
        if group["tag"] == "rest":
            group["weight_decay"] = 0.0
    try:
        optimizer = make(groups)
    except (TypeError, RuntimeError) as error:  # a setting that it does not take, or not on this device
        raise ValueError(f"the optimizer cannot be made: {error}") from error
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len({id(parameter) for parameter in grouped}) == len(grouped) == len(named_trainable(module)), (
        "one group each"
    )
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer
