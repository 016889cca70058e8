"""Optimizers that choose for themselves: Prodigy its rate, schedule-free AdamW an average in place of a schedule.

Both keep numbers of a whole group of parameters beside the state of each parameter: they are saved with it, so that a
resumed run is exact. Both are the libraries of their authors, in one process or under DDP.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wantrain.util import libraries


def prodigy(
    params: Iterable[dict[str, Any]],
    *,
    lr: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    d0: float = 1e-6,
    d_coef: float = 1.0,
) -> torch.optim.Optimizer:
    """Prodigy (arXiv 2306.06101): AdamW whose learning rate is lr times an estimate that grows in training.

    lr      a factor of the estimate, which the schedule scales; 1
    d0      the estimate at the start
    d_coef  a factor that the estimate approaches: 0.5 to 2, to tune it

    With bias correction, and with the estimate kept apart from warm-up, as its authors advise for diffusion.
    ValueError if prodigyopt is not there.
    """
    with libraries.optional("prodigy", "prodigyopt", "adaptive"):
        from prodigyopt import Prodigy
    how: dict[str, Any] = {"use_bias_correction": True, "safeguard_warmup": True, "d0": d0, "d_coef": d_coef}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that weight decay is decoupled
        optimizer: torch.optim.Optimizer = Prodigy(
            params, lr=lr, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay, **how
        )
    return optimizer


def schedule_free(
    params: Iterable[dict[str, Any]],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> torch.optim.Optimizer:
    """Schedule-free AdamW (arXiv 2405.15682): gradients are taken at y, between the fast weights z and their average x.

    y = (1 - beta_1) z + beta_1 x is what is in training, x what is validated, sampled and exported (ema.py).
    ValueError if schedulefree is not there.
    """
    with libraries.optional("schedule_free", "schedulefree", "adaptive"):
        from schedulefree import AdamWScheduleFree
    optimizer: torch.optim.Optimizer = AdamWScheduleFree(
        params, lr=lr, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay
    )
    optimizer.train()  # type: ignore[attr-defined]
    return optimizer


#: What each keeps of a group besides its settings.
_NUMBERS = {
    "Prodigy": ("k", "d", "d_max", "d_numerator"),
    "AdamWScheduleFree": ("k", "weight_sum", "lr_max"),
}
#: What a group's numbers are called among the saved state of its parameters.
NUMBERS = "group"


def adaptive_name(target: str) -> str | None:
    """What users call an optimizer of this file, by its `_target_`; None for others."""
    module, _, name = target.rpartition(".")
    return name if module == __name__ else None


def keeps_average(settings: Mapping[str, Any]) -> bool:
    """True if an expert's run keeps an average of its weights: an EMA, or the optimizer's own."""
    return settings["ema"] is not None or adaptive_name(settings["optimizer"]["_target_"]) == "schedule_free"


def group_numbers(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, Tensor]:
    """What an optimizer of this file keeps of the group of each parameter, float64; empty for others."""
    keys = _NUMBERS.get(type(optimizer).__name__, ())
    return {
        parameter: torch.tensor([float(group[key]) for key in keys], dtype=torch.float64)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if keys
    }


def set_group_numbers(optimizer: torch.optim.Optimizer, numbers: Mapping[nn.Parameter, Tensor], where: object) -> None:
    """Give an optimizer what `group_numbers` gave. ValueError, naming `where` it comes from, if it has none."""
    keys = _NUMBERS.get(type(optimizer).__name__, ())
    for group in optimizer.param_groups if keys else ():
        found = numbers.get(group["params"][0])
        if found is None or len(found) != len(keys):
            raise ValueError(f"{where} holds no {', '.join(keys)}; it belongs to a run of another optimizer")
        values = dict(zip(keys, found.tolist(), strict=True))
        group.update({**values, "k": int(values["k"])})  # the step's number
