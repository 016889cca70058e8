"""What of the optimizer, and of how its updates reach the weights, does not go together."""

from __future__ import annotations

import inspect

from omegaconf import DictConfig

from wantrain import config


def check_optimizer(node: DictConfig) -> None:
    """ValueError if the optimizer needs a keyword that is not given, or refuses what is given."""
    parameters = inspect.signature(config.named(node._target_)).parameters
    needed = [
        key
        for key, each in list(parameters.items())[1:]
        if each.default is each.empty and each.kind != each.VAR_KEYWORD
    ]
    if missing := [key for key in needed if key not in node]:
        raise ValueError(f"{node._target_} needs optimizer.{missing[0]}; give +optimizer.{missing[0]}=VALUE")


def check_adaptive(cfg: DictConfig) -> None:
    """The usual traps of optimizers that choose their rate or average by themselves."""
    from wantrain.training.engine.adaptive import adaptive_name

    target, lr, where = cfg.optimizer._target_, cfg.optimizer.get("lr"), f"experts.{cfg.expert.name}"
    if target.startswith(("prodigyopt.", "schedulefree.")):
        raise ValueError(
            f"optimizer._target_={target}: what it keeps beside the weights would not be saved; give "
            "optimizer=prodigy or optimizer=schedule_free"
        )
    name = adaptive_name(target)
    if name is None:
        return
    if name == "prodigy" and lr != 1:
        raise ValueError(
            f"optimizer=prodigy estimates the learning rate, and lr={lr:g} would multiply what it finds; leave "
            f"optimizer.lr (and {where}.lr) at 1, and give optimizer.d_coef=0.5 to 2 for a lower or higher rate"
        )
    if name == "schedule_free" and cfg.schedule.get("shape") != "constant":
        raise ValueError(
            f"optimizer=schedule_free: its average takes the place of a falling rate (schedule.shape="
            f"{cfg.schedule.get('shape')}); give schedule=constant, whose warm-up it heeds"
        )
    if name == "schedule_free" and cfg.ema is not None:
        raise ValueError(
            f"ema={cfg.ema:g} with optimizer=schedule_free, which keeps an average of its own: that is what is "
            f"validated, sampled and exported; leave out ema (and {where}.ema)"
        )
    if cfg.update_in_backward or cfg.trained.dtype == "bf16":
        given = "update_in_backward=true" if cfg.update_in_backward else "trained.dtype=bf16"
        raise ValueError(
            f"{given} updates one parameter at a time, and optimizer={name} looks at all of them together; use "
            "optimizer=adamw"
        )


def check_updates(cfg: DictConfig, processes: int) -> None:
    """What bf16 weights and updates in the backward pass do not go together with."""
    if cfg.trained.dtype == "bf16" and cfg.precision == "fp32":
        raise ValueError("trained.dtype=bf16: precision=fp32 computes with float32 weights; give precision=bf16 too")
    one_by_one = "update_in_backward=true" if cfg.update_in_backward else "trained.dtype=bf16"
    target = cfg.optimizer._target_
    one_at_a_time = target.startswith(("torch.optim.", "wantrain.")) and target != "torch.optim.LBFGS"
    if (cfg.update_in_backward or cfg.trained.dtype == "bf16") and not one_at_a_time:
        raise ValueError(
            f"{one_by_one} updates one parameter at a time, and whether {target} can do so is not known; use an "
            "optimizer of torch.optim or of this project"
        )
    if not cfg.update_in_backward:
        return
    if (batching := config.batching(cfg, processes)).accumulate > 1:
        if batching.tokens:
            raise ValueError("update_in_backward=true: each backward pass of a step would update; give accumulate=1")
        raise ValueError(
            f"update_in_backward=true: each of the {batching.accumulate} backward passes of a step would update; give "
            f"batch_size={batching.micro * processes}, or accumulate=1 if that many samples fit at once"
        )
    if cfg.clip is not None and cfg.clip_by == "whole":
        raise ValueError(
            f"update_in_backward=true: the norm of the whole gradient, which clip={cfg.clip:g} limits, is not known "
            "before the first update; give clip_by=parameter, or clip=null"
        )
