"""Judging a composed config before work starts: every problem, with its key and its fix, at once.

What can be judged only with weights or data in hand is judged where they are opened.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from omegaconf import DictConfig, ListConfig, OmegaConf

from wantrain import config, geometry
from wantrain.data import ConditioningInputs
from wantrain.models import partial
from wantrain.models.offload import EXPERTS
from wantrain.models.quantize import FORMATS
from wantrain.util.numbers import is_number


def check(cfg: DictConfig, *, processes: int = 1) -> None:
    """Everything about a composed config that can be judged before work starts; all problems, raised once.

    Each problem names its key and the fix. Keys that a command does not have are not judged.
    """
    problems: list[str] = []

    def judge(test: Callable[[], object]) -> None:
        try:
            test()
        except ValueError as error:
            problems.append(str(error))

    if "aspects" in cfg:
        judge(lambda: config.buckets(cfg))
    if "mask_types" in cfg:
        judge(lambda: config.conditioning_inputs(cfg))
    if "lengths" in cfg:
        judge(lambda: _check_lengths(cfg))
    judge(lambda: config.plain(cfg))  # missing values (???) and broken references
    if "num_frames" in cfg:
        judge(lambda: _check_num_frames(cfg, "num_frames"))
    if "model" in cfg:
        judge(lambda: _check_num_frames(cfg, "model.num_frames"))
    if cfg.get("height") is not None or cfg.get("width") is not None:
        judge(lambda: _check_picture(cfg))
    if "expert" in cfg:
        judge(lambda: _check_experts(cfg))
        judge(lambda: _check_batch(cfg, processes))
        judge(lambda: _check_length(cfg))
        problems.extend(_adapter_problems(cfg))
        judge(lambda: config.shards(cfg))
        if cfg.sample.prompts is not None and cfg.model.conditioning == "channel_concat":
            problems.append(
                f"sample.prompts={cfg.sample.prompts}: model={cfg.model.name} needs a conditioning input, so its "
                "previews go on from held-out clips; leave it out"
            )
        if "mask_types" in cfg.data:
            types, conditioning = config.plain(cfg.data.mask_types), cfg.data.conditioning
            judge(lambda: ConditioningInputs(types, conditioning, key="data.mask_types"))
        if cfg.adapter.name == "partial":
            part = config.plain(cfg.adapter)
            judge(lambda: partial.check(part["layers"], part["tags"], cfg.model.transformer.num_layers))
    if "guidance" in cfg and not isinstance(cfg.guidance, DictConfig):
        first = next(iter(cfg.model.experts))
        problems.append(f"guidance={cfg.guidance} must be given per expert: guidance.{first}=...")
    for key in ("offload", "sample.offload"):
        value = OmegaConf.select(cfg, key)
        if value is not None and not isinstance(value, DictConfig):
            problems.append(f"{key}={value} must be given as {key}.experts= and {key}.blocks=")
    for key, allowed in _CHOICES.items():
        value = OmegaConf.select(cfg, key)
        if value is not None and value not in allowed:
            problems.append(f"{key}={value} is unknown; choose one of {', '.join(allowed)}")
    for key in (*_WHOLE, *_POSITIVE):
        value = OmegaConf.select(cfg, key)
        if value in _WORDS.get(key, ()) or (key == "area" and isinstance(value, ListConfig)):
            continue
        if value is not None and not is_number(value, whole=key in _WHOLE):
            words = f", or one of {', '.join(_WORDS[key])}" if key in _WORDS else ""
            problems.append(f"{key}={value} must be a {'whole ' if key in _WHOLE else ''}number{words}")
        elif value is not None and not value > 0:
            problems.append(f"{key}={value} must be above 0")
    for key in _SWITCHES:
        value = OmegaConf.select(cfg, key)
        if value is not None and not isinstance(value, bool):
            problems.append(f"{key}={value} must be true or false")
    for key in ("every", "keep", "keep_best", "background", "on_failure"):
        if "checkpoint" in cfg and cfg.checkpoint[key] is None:
            problems.append(f"checkpoint.{key}=null says nothing; leave it out for its default")
    if problems:
        many = f"{len(problems)} problems:\n  - " if len(problems) > 1 else ""
        raise ValueError(many + "\n  - ".join(problems))


_CHOICES = {
    "precision": ("fp32", "bf16"),
    "vae_precision": ("fp32", "bf16"),
    "dtype": ("fp32", "bf16", "fp16"),
    "base.dtype": ("fp32", "bf16", *FORMATS),
    "device": ("auto", "cpu", "cuda"),
    "solver": ("unipc", "dpm++", "euler"),
    "caption.missing": ("error", "skip", "empty"),
    "clips": ("all", "first", "middle", "random"),
    "report": ("page", "decode", "none"),
    "init": ("base", "expand_input_channels", "scratch"),
    "check_expert": ("warn", "stop", "off"),
    "experts.offload": ("none", "cpu"),
    "offload.experts": EXPERTS,
    "sample.offload.experts": EXPERTS,
    "checkpoint.on_failure": ("stop", "continue"),
    "layout": ("diffusers", "official", "comfyui"),
    "lora.dialect": ("comfyui", "diffusers", "kohya"),
    "adapter.targets": ("attention", "attention+ffn", "all"),
    "scenes": ("off", "split"),
    "static": ("report", "drop"),
    "duplicates": ("report", "drop"),
}
#: Keys that hold a number or one of these words.
_WORDS = {"fps": ("native", "resample")}
_WHOLE = (
    "safeguards.max_skipped_steps", "steps", "stop_after", "batch_size", "accumulate", "count", "shard_mb", "area",
    "tile", "stride", "tokens", "shard_clips", "decode.workers",
    "checkpoint.every", "checkpoint.keep", "checkpoint.keep_every",
    "validation.every", "validation.clips", "validation.points", "validation.together",
    "validation.early_stopping_patience", "adapter.rank", "sample.steps", "sample.count", "model.train.micro_batch",
)  # fmt: skip
_SWITCHES = (
    "check", "decode.retry", "stretch", "checkpoint.keep_best", "checkpoint.background", "gradient_checkpointing",
    "offload.blocks", "sample.offload.blocks",
)  # fmt: skip
_POSITIVE = (
    "decode.timeout",
    "heartbeat_timeout",
    "safeguards.spike",
    "safeguards.refuse",
    "safeguards.hang",
    "validation.share",
    "epochs",
    "clip",
    "fps",
    "shift",
    "adapter.alpha",
    "optimizer.lr",
    "data.cache_gb",
)


def _check_num_frames(cfg: DictConfig, key: str) -> None:
    value = OmegaConf.select(cfg, key)
    if not is_number(value, whole=True):
        raise ValueError(f"{key}={value} must be a whole number")
    geometry.check_num_frames(value, key=key)


def _check_lengths(cfg: DictConfig) -> None:
    for length in cfg.lengths:
        if not is_number(length, whole=True):
            raise ValueError(f"lengths={cfg.lengths} must be whole numbers of frames")
        geometry.check_num_frames(length, key="lengths")


def _check_picture(cfg: DictConfig) -> None:
    if cfg.height is None or cfg.width is None:
        raise ValueError("height and width go together; give both, or neither for the model's own size")
    if not (is_number(cfg.height, whole=True) and is_number(cfg.width, whole=True)):
        raise ValueError(f"height={cfg.height}, width={cfg.width} must be whole numbers of pixels")
    geometry.check_size(cfg.height, cfg.width, cfg.model.multiple, key="height, width")


def _check_experts(cfg: DictConfig) -> None:
    for own in config.experts(cfg).values():
        _check_expert(own)
        _check_optimizer(own.optimizer)
        config.build(own.schedule)
        config.build(own.loss)  # its own words on a noise distribution that cannot be


def _check_expert(cfg: DictConfig) -> None:
    name, experts = cfg.expert.name, list(cfg.model.experts)
    if cfg.ema is not None and not (is_number(cfg.ema, whole=False) and 0 < cfg.ema < 1):
        raise ValueError(f"ema={cfg.ema} must lie between 0 and 1, e.g. 0.999; null keeps no average")
    further = cfg.model.transformer.in_channels - cfg.model.transformer.out_channels
    if cfg.init == "expand_input_channels" and name in experts and (not further or cfg.adapter.name != "none"):
        raise ValueError(
            f"init=expand_input_channels with model={cfg.model.name} (which has {further} further input channels) and "
            f"adapter={cfg.adapter.name}: it is for a model of conditioning channel_concat, all of whose weights are "
            "trained; give init=base, or adapter=none"
        )
    if cfg.init == "scratch" and cfg.adapter.name != "none":
        raise ValueError(
            f"init=scratch with adapter={cfg.adapter.name}: an adapter changes a trained model; give init=base"
        )
    given = [part for part, path in cfg.parts.items() if path is not None]
    if cfg.weights is None and name != "vae" and not {"vae", "text_encoder"} <= set(given):
        raise ValueError(
            "weights=null: VAE and text encoder must come from somewhere; give a model's folder, or parts.vae= and "
            "parts.text_encoder="
        )
    if (name == "vae") != cfg.data.get("_target_", "").endswith("PixelData"):
        raise ValueError(
            f"expert={name} with the wrong data=: expert=vae and data=pixels go together (recipe=wan_tiny_vae)"
        )
    if name == "vae":
        if cfg.expert.trains not in {"all", "decoder"}:
            raise ValueError(f"expert.trains={cfg.expert.trains} is unknown; choose one of all, decoder")
        if cfg.weights is None and cfg.parts.vae is None and "vae" not in cfg.model:
            raise ValueError("expert=vae needs weights= to start from, or model.vae as in recipe=wan_tiny_vae_images")
    elif name not in experts:  # also both, where the model is one transformer
        raise ValueError(
            f"expert={name}: model={cfg.model.name} has {', '.join(experts)}; "
            f"use {' or '.join(f'expert={other}' for other in experts)}, or another model="
        )


def _check_optimizer(node: DictConfig) -> None:
    """Raise ValueError if the optimizer's class cannot be imported, or has not the keywords that are given."""
    name, given = node._target_, [str(key) for key in node if key != "_target_"]
    try:
        takes = inspect.signature(config.named(name)).parameters
    except Exception as error:  # whatever importing somebody's module raises
        raise ValueError(f"optimizer._target_={name} is no class that can be imported: {error}") from error
    keywords = [key for key in list(takes)[1:] if takes[key].kind not in {inspect.Parameter.VAR_KEYWORD}]
    if len(keywords) == len(takes) - 1 and (wrong := [key for key in given if key not in keywords]):
        raise ValueError(f"optimizer.{wrong[0]} is no keyword of {name}; it takes {', '.join(keywords)}")
    if missing := [key for key in keywords if takes[key].default is inspect.Parameter.empty and key not in given]:
        raise ValueError(f"{name} needs optimizer.{missing[0]}; give +optimizer.{missing[0]}=VALUE")


def _adapter_problems(cfg: DictConfig) -> list[str]:
    """What is wrong with the settings of the chosen adapter, numbers and choices apart, which all groups share."""
    settings, problems = config.plain(cfg.adapter), []
    if settings["name"] != "none" and cfg.expert.name == "vae":
        problems.append(f"adapter={settings['name']} is for transformers; with expert=vae give adapter=none")
    if cfg.base.dtype is not None and settings["name"] not in {"lora", "dora"}:
        problems.append(
            f"base.dtype={cfg.base.dtype} is for the frozen base of adapter=lora or dora; with adapter="
            f"{settings['name']} leave it out"
        )
    if cfg.base.dtype == "bf16" and cfg.precision == "fp32":
        problems.append("base.dtype=bf16: precision=fp32 computes with float32 weights; give precision=bf16 too")
    if not isinstance(settings.get("rank_stabilized", False), bool):
        problems.append(f"adapter.rank_stabilized={settings['rank_stabilized']} must be true or false")
    for key, whole in (("rank_pattern", True), ("alpha_pattern", False)):
        pattern = settings.get(key)
        if pattern is None:
            continue
        if not isinstance(pattern, dict):
            problems.append(f"adapter.{key}={pattern} must give numbers to parts of layer names: {{ffn: 8}}")
            continue
        wrong = [part for part, value in pattern.items() if not (is_number(value, whole=whole) and value > 0)]
        problems += [
            f"adapter.{key}: {part}: {pattern[part]} must be a {'whole ' if whole else ''}number above 0"
            for part in wrong
        ]
        if settings["init"] is not None:
            problems.append(f"adapter.{key} and adapter.init: the file has its own; leave out one of them")
    return problems


def _check_batch(cfg: DictConfig, processes: int) -> None:
    given = [value for value in (cfg.batch_size, cfg.accumulate, cfg.model.train.micro_batch) if value is not None]
    if all(is_number(value, whole=True) and value >= 1 for value in given):  # else said with the other numbers
        config.batching(cfg, processes)


def _check_length(cfg: DictConfig) -> None:
    if cfg.steps is not None and cfg.epochs is not None:
        raise ValueError(f"steps={cfg.steps} and epochs={cfg.epochs} both set the length; give one of them")
