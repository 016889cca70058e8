"""The keys of every command and what each may hold.

A key has one line here, or in common.py if several commands have it, and one in conf/COMMAND.yaml, which holds its
default and its meaning. What stands below a `_target_` needs no line: the constructor's annotations are its schema. A
line here narrows them where they are wider than what makes sense (torch's `lr: float`). A kind that is a mapping covers
all keys below it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from annotated_types import Len

from wantrain.settings.common import BASE, LORA, MODEL, Frames, Masks, Precision, Recompute
from wantrain.settings.kinds import (
    BelowOne,
    Count,
    File,
    FreeText,
    Inside,
    IsPath,
    Natural,
    NotNegative,
    Object,
    Positive,
    Says,
    Share,
    Text,
    TypedFreely,
    has,
)

Lengths = Annotated[list[int], Says("whole numbers of frames: [17, 49, 81]")]
Betas = Annotated[list[BelowOne], Len(2, 2), Says("two numbers of at least 0 and below 1: [0.9, 0.99]")]
#: One layer's pattern or a number of blocks, as partial.py reads them.
Layers = Annotated[int | str | list[int | str], Says("block numbers: 0-9, or [0, 1, 20-29]")]

SHARD: Mapping[str, Any] = {
    **MODEL,
    "init": File | None,
    "source": File,
    "out": File,
    "caption.missing": Literal["error", "skip", "empty"],
    "caption.prefix": FreeText,
    "caption.default": FreeText,
    "clips": Literal["all", "first", "middle", "random"],
    "num_frames": Frames,
    "lengths": Lengths,
    "fps": Positive | Literal["native", "resample"],
    "stride": Count,
    "stretch": bool,
    "scenes": Literal["off", "split"],
    "static": Literal["report", "drop"],
    "duplicates": Literal["report", "drop"],
    "interlaced": Literal["refuse", "deinterlace"],
    "seed": Natural,
    "decode.workers": Count | None,
    "decode.timeout": Positive,
    "rejects.limit": Share,
    "shard_mb": Count,
    "report": Literal["page", "none"],
}

CAPTION: Mapping[str, Any] = {
    **MODEL,
    **BASE,
    "source": File,
    "captioner": File,
    "captioner_revision": Text | None,
    "template": File,
    "trigger": FreeText,
    "words": Count,
    "recaption": Literal["none", "own", "all"],
    "frames.per_second": Positive,
    "frames.most": Count,
    "frames.pixels": Count,
    "max_tokens": Count,
    "batch_size": Count,
    "review": bool,
    "apply": File | None,
    "device": Literal["auto", "cpu", "cuda"],
    "precision": Precision,
    "decode.workers": Count | None,
    "decode.timeout": Positive,
}

ENCODE: Mapping[str, Any] = {
    **MODEL,
    **BASE,
    "shards": File,
    "out": File,
    "check": bool,
    "area": Count | Annotated[list[Count], Len(1), Says("a list of such numbers")],
    "aspects": Annotated[list[Positive], Len(1), Says("a list of numbers above 0, width / height")],
    "tokens": Count | None,
    "upscale.limit": float,
    "mask_types": Masks,
    "device": Literal["auto", "cpu", "cuda"],
    "precision": Precision,
    "vae_precision": Precision,
    "rejects.limit": Share,
    "shard_mb": Count,
    "shard_clips": Count,
    "batch_pixels": Count,
    "decode.workers": Count | None,
    "decode.timeout": Positive,
    "decode.retry": bool,
    "heartbeat_timeout": Positive,
    "report": Literal["page", "decode", "none"],
}

#: Settings that an expert of a pair may have for itself: their names under experts.NAME, and their kinds.
#: Settings that an expert of a pair may have for itself, and their places in the config.
OF_AN_EXPERT: Mapping[str, str] = {
    "lr": "optimizer.lr",
    "muon_lr": "optimizer.muon_lr",
    "rank": "adapter.rank",
    "alpha": "adapter.alpha",
    "init": "adapter.init",
    "ema": "ema",
    "shift": "noise.shift",
}
_KINDS_OF_AN_EXPERT: Mapping[str, Any] = {
    "lr": Positive | None,
    "muon_lr": Positive | None,
    "rank": Count | None,
    "alpha": Positive | None,
    "init": File | None,
    "ema": Inside | None,
    "shift": Positive | None,
}
_WINDOW: Mapping[str, Any] = {"part": Text, "low": Share | None, "high": Share | None}

#: The groups of which train.py has one option each.
_OPTIONS: Mapping[str, Any] = {
    **{f"expert.{key}": kind for key, kind in _WINDOW.items()},
    "expert.name": Literal["high_noise", "low_noise", "dense", "both", "vae"],
    "expert.high_noise.name": Literal["high_noise"],
    "expert.low_noise.name": Literal["low_noise"],
    "expert.trains": Literal["all", "decoder"],
    **{f"expert.{name}.{key}": kind for name in ("high_noise", "low_noise") for key, kind in _WINDOW.items()},
    "adapter.name": Literal["none", "lora", "dora", "lokr", "partial"],
    "adapter.rank": Count,
    "adapter.alpha": Positive,
    "adapter.rank_stabilized": bool,
    "adapter.factor": Count | None,
    "adapter.decompose_both": bool,
    "adapter.targets": Literal["attention", "attention+ffn", "all"],
    "adapter.rank_pattern": Annotated[dict[str, Any], Says("numbers for parts of layer names: {ffn: 8}")] | None,
    "adapter.alpha_pattern": Annotated[dict[str, Any], Says("numbers for parts of layer names: {ffn: 8}")] | None,
    "adapter.init": File | None,
    "adapter.layers": Layers | None,
    "adapter.tags": Annotated[str | list[str], Says("a tag, or a list of tags: [ffn, head]")] | None,
    "data.shards": File,
    "data.sets": Annotated[dict[str, Any], Says("sets by name: {cats: {shards: DIR, weight: 0.7}}")] | None,
    "data.cache": File,
    "data.cache_gb": Positive,
    "data.holdout": BelowOne,
    "data.caption_dropout": Share,
    "data.conditioning": Text,
    "data.mask_types": Masks,
    "data.num_frames": Frames,
    "data.area": Count,
    "data.multiple": Count,
    "data.max_gb": Positive,
    "data.seed": Natural,
    "noise.density": Literal["uniform", "logit_normal"] | Object,
    "noise.density.file": File | None,
    "noise.shift": Positive | Object,
    "noise.shift.base": Positive,
    "noise.shift.num_frames": Count,
    "noise.shift.area": Count,
    "noise.shift.multiple": Count,
    "noise.shift.low_tokens": Count,
    "noise.shift.high_tokens": Count,
    "noise.weighting": Literal["none", "sigma_sqrt", "cosmap", "min_snr", "gaussian"] | Object,
    "loss": Object,
    "loss.density": Literal["uniform", "logit_normal"] | Object,
    "loss.shift": Positive | Object,
    "loss.weighting": Literal["none", "sigma_sqrt", "cosmap", "min_snr", "gaussian"] | Object,
    "loss.low": Share | None,
    "loss.high": Share | None,
    "loss.huber": Positive | None,
    "loss.batch_size": Count | None,
    "loss.seed": Natural,
    "loss.absolute": NotNegative,
    "loss.edges": NotNegative,
    "loss.kl": NotNegative,
    "optimizer": Object,
    "optimizer.lr": Positive,
    "optimizer.muon_lr": Positive,
    "optimizer.betas": Betas,
    "optimizer.momentum": BelowOne,
    "optimizer.weight_decay": NotNegative,
    "optimizer.block_size": Count,
    "optimizer.d0": Positive,
    "optimizer.d_coef": Positive,
    "schedule": Object,
    "schedule.shape": Literal["constant", "linear", "cosine", "sqrt"],
    "schedule.warmup": Natural,
    "schedule.decay": Share,
    "schedule.floor": Share,
    "tracker.name": Literal["wandb", "tensorboard", "trackio", "mlflow", "jsonl"],
    "tracker.project": FreeText | None,
}

TRAIN: Mapping[str, Any] = {
    **MODEL,
    **BASE,
    **_OPTIONS,
    "run": FreeText,
    "runs": File,
    "init": Literal["base", "scratch", "expand_input_channels"],
    "base.dtype": Literal["fp32", "bf16", "fp8", "int8", "nf4"] | None,
    "check_expert": Literal["warn", "stop", "off"],
    "experts.share.high_noise": Inside,
    "experts.share.low_noise": Inside,
    "experts.offload": Literal["none", "cpu"],
    **{
        f"experts.{name}.{key}": kind
        for key, kind in _KINDS_OF_AN_EXPERT.items()
        for name in ("high_noise", "low_noise")
    },
    "steps": Count | None,
    "epochs": Positive | None,
    "stop_after": Count | None,
    "replay": File | None,
    "batch_size": Count | None,
    "batch_tokens": Count | None,
    "accumulate": Count | None,
    "device": Literal["auto", "cpu", "cuda"],
    "precision": Precision,
    "attention": Text,
    "compile": Literal["none", "blocks"],
    "sequence_parallel": Count,
    "memory": Literal["manual", "auto"],
    "recompute": Recompute,
    "activations": Literal["gpu", "cpu"],
    "activations_dtype": Literal["fp32", "bf16"],
    "swap.blocks": Natural | Literal["auto"],
    "trained.dtype": Literal["fp32", "bf16"],
    "trained.rounding": Literal["stochastic", "kahan"],
    "update_in_backward": bool,
    "ema": Inside | None,
    "clip": Positive | None,
    "clip_by": Literal["whole", "parameter"],
    "seed": Natural,
    "checkpoint.every": Count,
    "checkpoint.keep": Count,
    "checkpoint.keep_every": Count | None,
    "checkpoint.keep_best": bool,
    "checkpoint.background": bool,
    "checkpoint.on_failure": Literal["stop", "continue"],
    "safeguards.max_skipped_steps": Count,
    "safeguards.spike": Positive | None,
    "safeguards.refuse": Positive | None,
    "safeguards.hang": Positive | None,
    "validation.every": Natural | None,
    "validation.clips": Count | None,
    "validation.points": Count | None,
    "validation.share": Positive,
    "validation.together": Count,
    "validation.early_stopping_patience": Count | None,
    "sample.every": Natural,
    "sample.prompts": File | None,
    "sample.count": Count,
    "sample.steps": Count,
    "sample.seed": Natural,
    "sample.offload.experts": Literal["none", "cpu", "disk"],
    "sample.offload.blocks": bool,
    "dry_run": bool,
    "gpu": Text | None,
    "bucket": Text | None,
}

SAMPLE: Mapping[str, Any] = {
    **MODEL,
    **BASE,
    **LORA,
    "prompt": FreeText | None,
    "prompts": File | None,
    "negative_prompt": FreeText | None,
    "image": File | None,
    "last_image": File | None,
    "video": File | None,
    "keep": Count | None,
    "mask": File | None,
    "compare": Annotated[list[str], Len(1), Says("a list of runs: [one,other,base]")] | None,
    "run": FreeText | None,
    "runs": File,
    "alone": bool,
    "out": File | None,
    "seed": Natural,
    "count": Count,
    "batch_size": Count,
    "steps": Count,
    "solver": Literal["unipc", "dpm++", "euler"],
    "shift": Positive,
    "guidance.high_noise": NotNegative | None,
    "guidance.low_noise": NotNegative | None,
    "guidance.dense": NotNegative | None,
    "num_frames": Frames,
    "height": Count | None,
    "width": Count | None,
    "device": Literal["auto", "cpu", "cuda"],
    "offload.experts": Literal["none", "cpu", "disk"],
    "offload.blocks": bool,
    "tile": Count | None,
    "precision": Precision,
    "dry_run": bool,
}

EXPORT: Mapping[str, Any] = {
    **MODEL,
    **BASE,
    **LORA,
    "inspect": File | None,
    "run": FreeText | None,
    "runs": File,
    "alone": bool,
    "lora.dialect": Literal["comfyui", "diffusers", "kohya"],
    "out": File | None,
    "overwrite": bool,
    "layout": Literal["diffusers", "official", "comfyui"],
    "dtype": Literal["fp32", "bf16", "fp16"],
    "shard_gb": Positive,
    "measure": File | None,
}

_CHECKS = Literal[
    "python", "packages", "extras", "compiler", "build_locks", "card", "attention", "memory", "shared_memory", "disk",
    "hub", "wandb", "training",
]  # fmt: skip

DOCTOR: Mapping[str, Any] = {
    "checks": Annotated[list[_CHECKS], Says(f"a list of these: {', '.join(get_args(_CHECKS))}")],
    "device": Literal["auto", "cpu", "cuda"],
    "runs": File,
    "timeout": Positive,
}

COMMANDS: Mapping[str, Mapping[str, Any]] = {
    "caption": CAPTION,
    "shard": SHARD,
    "encode": ENCODE,
    "train": TRAIN,
    "sample": SAMPLE,
    "export": EXPORT,
    "doctor": DOCTOR,
}

#: Keys whose values are taken as typed. Without quoting, Hydra reads a comma as a sweep and `(`, `=`, `!`, `~`, Chinese
#: or an emoji as a syntax error.
TEXT_KEYS = frozenset(key for keys in COMMANDS.values() for key, kind in keys.items() if has(kind, TypedFreely))
PATH_KEYS = frozenset(key for keys in COMMANDS.values() for key, kind in keys.items() if has(kind, IsPath))
