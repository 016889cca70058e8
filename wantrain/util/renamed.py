"""What keys, values and fields were called before, and what they are called now: the one place that knows.

A command refuses an old key with one error that names the new one. Files written before are read: their fields come out
under the new names.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

#: Config keys: old -> new. A key stands for all below it, `*` for one part of a key. On the command line each old one
#: is an error.
KEYS: Mapping[str, str] = {
    "tripwires.patience": "safeguards.max_skipped_steps",
    "tripwires": "safeguards",
    "validation.stop_after": "validation.early_stopping_patience",
    "patience": "heartbeat_timeout",
    "gradient_checkpointing": "recompute",
    "model.train.gradient_checkpointing": "model.train.recompute",
    "experts.idle": "experts.offload",
    "sample.idle": "sample.offload.experts",
    "idle": "offload.experts",
    "model.told_by": "model.conditioning",
    "model.condition": "model.mask_types",
    "data.told_by": "data.conditioning",
    "data.condition": "data.mask_types",
    "data.sets.*.told_by": "data.sets.*.conditioning",
    "data.sets.*.condition": "data.sets.*.mask_types",
    "condition": "mask_types",
    "model.transformer.attention": "attention",
}
#: Modules that `_target_` names: old -> new.
TARGETS: Mapping[str, str] = {"wantrain.training.optim": "wantrain.training.engine.optim"}
#: Conditioning types: old -> new.
_CONDITIONING: Mapping[Any, Any] = {"channels": "channel_concat", "frames": "clean_frames", None: "none"}
#: Settings that a stored config may lack, with what they were before they could be set.
ADDED: Mapping[str, Any] = {
    "activations_dtype": "fp32",
    "base.low_rank": None,
    "trained.dtype": "fp32",
    "trained.rounding": "stochastic",
    "clip_by": "whole",
    "batch_tokens": None,
    "loss.mask": "none",
    "loss.mask_rest": 0.0,
    "loss.mask_normalize": True,
    "preserve.weight": 0.0,
    "preserve.prompt": None,
    "preserve.prompts": None,
}
#: Gradient checkpointing, by whether it was on.
_RECOMPUTE: Mapping[Any, Any] = {True: "block", False: "none"}
#: Values of config keys, by the new key: old -> new.
VALUES: Mapping[str, Mapping[Any, Any]] = {
    "recompute": _RECOMPUTE,
    "model.train.recompute": _RECOMPUTE,
    "attention": {"sdpa": "auto", "plain": "math"},
    "init": {"widen": "expand_input_channels"},
    "experts.offload": {"gpu": "none"},
    "sample.offload": {"none": {"blocks": False}, "blocks": {"blocks": True}},
    "offload": {"none": {"blocks": False}, "blocks": {"blocks": True}},
    "sample.offload.experts": {"gpu": "none"},
    "offload.experts": {"gpu": "none"},
    "model.conditioning": _CONDITIONING,
    "data.conditioning": _CONDITIONING,
    "data.sets.*.conditioning": _CONDITIONING,
}


def refuse_old_keys(words: Iterable[str]) -> None:
    """Raise ValueError if a word of a command line (`key=value`) has an old key or value; it names the new one."""
    problems = []
    for word in words:
        match = re.fullmatch(r"[+~]*([\w.]+)=(.*)", word, flags=re.DOTALL)
        if match is None:
            continue
        key, value = match.groups()
        new = new_key(key)
        values = _typed_values(new)
        if value in values:
            now = values[value]
            said = f"{new}={now}"
            if isinstance(now, Mapping):
                said = " ".join(f"{new}.{name}={str(setting).lower()}" for name, setting in now.items())
            problems.append(f"{key}={value} is now {said}")
        elif new != key:
            problems.append(f"{key} is now {new}: {new}={value}")
    if problems:
        raise ValueError("; ".join(problems))


def upgraded_words(words: Iterable[str]) -> list[str]:
    """A stored command line (`key=value` each) of any age with today's keys and values."""
    upgraded = []
    for word in words:
        key, separator, value = word.partition("=")
        key = new_key(key)
        now = _typed_values(key).get(value, value) if separator else value
        settings = (
            {f"{key}.{name}": str(each).lower() for name, each in now.items()} if isinstance(now, Mapping) else {}
        )
        upgraded += [f"{name}={each}" for name, each in settings.items()] or [f"{key}{separator}{now}"]
    return upgraded


def new_key(key: str) -> str:
    """Today's name of a config key."""
    for old, new in KEYS.items():
        if match := _pattern(old).match(key):
            return _pattern_filled(new, match) + key[match.end() :]
    return key


@functools.cache
def _pattern(key: str) -> re.Pattern[str]:
    """What matches a key of `KEYS` or `VALUES`, at the beginning of a longer key too."""
    return re.compile(re.escape(key).replace(r"\*", r"([^.]+)") + r"(?=\.|$)")


def _pattern_filled(key: str, match: re.Match[str]) -> str:
    """A new key with each `*` replaced by what the old one's matched."""
    for part in match.groups():
        key = key.replace("*", part, 1)
    return key


def _values(key: str) -> Mapping[Any, Any]:
    """The old values of a key of today, and the new ones."""
    return next((values for name, values in VALUES.items() if _pattern(name).fullmatch(key)), {})


def _typed_values(key: str) -> dict[str, Any]:
    """The same as typed on a command line."""
    words = {None: "null", True: "true", False: "false"}
    return {words.get(old, str(old)): now for old, now in _values(key).items()}


def new_target(target: str) -> str:
    """Today's place of a class or function that a stored config names."""
    for old, new in TARGETS.items():
        if target.startswith(f"{old}."):
            return new + target.removeprefix(old)
    return target


def upgraded_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A stored config of any age under today's names."""
    upgraded: dict[str, Any] = {}
    _upgrade("", config, upgraded)
    return upgraded


def _upgrade(prefix: str, config: Mapping[str, Any], into: dict[str, Any]) -> None:
    for name, value in config.items():
        key = new_key(f"{prefix}{name}")
        if isinstance(value, Mapping) and value:
            _upgrade(f"{prefix}{name}.", value, into)
            continue
        if name == "_target_":
            value = new_target(value)
        if not isinstance(value, list | Mapping):
            # Python takes 1 for True, and both may be values.
            value = next((now for old, now in _values(key).items() if old == value and type(old) is type(value)), value)
        place = into
        *parents, last = key.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
        if isinstance(value, Mapping) and isinstance(place.get(last), dict):
            place[last].update(value)
        else:
            place[last] = dict(value) if isinstance(value, Mapping) else value


def upgraded_fields(record: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A JSON object of any age with its fields under today's `names` (old -> new)."""
    return {names.get(key, key): value for key, value in record.items()}


def upgraded_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest of any age, and the settings in it, under today's names."""
    upgraded = upgraded_fields(manifest, MANIFEST)
    if isinstance(upgraded.get("settings"), Mapping):
        upgraded["settings"] = upgraded_fields(upgraded["settings"], MANIFEST)
    return upgraded


#: Fields of a manifest (of video and of latent shards).
MANIFEST = {"ledger": "stats", "condition": "mask_types"}
#: Fields of what a video shard says about a file.
VIDEO_SAMPLE = {"marks": "seek_points"}
#: Fields of a checkpoint's state.json.
STATE = {"usual": "loss_baselines"}
#: Fields of a line of validation.jsonl.
EVAL_RECORD = {"ruler": "eval_key"}
