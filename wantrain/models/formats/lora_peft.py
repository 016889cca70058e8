"""peft's config of an adapter: in a file's header, as diffusers writes it, or in adapter_config.json beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wantrain.models.formats.lora_dialects import PEFT_PREFIX, SECOND_PREFIX, diffusers_module, without_prefix
from wantrain.models.formats.lora_layers import Layer
from wantrain.models.formats.weights import PICKLES, read_json

#: Where diffusers and peft keep ranks and alphas: an entry of the safetensors header.
PEFT = "lora_adapter_metadata"
#: The two files of an adapter's folder that peft writes.
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
#: Kinds of adapters that are read; a config of another kind is refused.
_TYPES = ("LORA", "LOHA", "LOKR")
#: Initialisations that also change the base's weights, so that the adapter fits no published base. peft offers to
#: convert such an adapter when it is saved (path_initial_model_for_weight_conversion); the config then says "true".
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class PeftConfig:
    """What a config says of an adapter's layers; `settings` has peft's own keys, without a prefix."""

    settings: Mapping[str, Any]

    def alpha(self, layer: str, rank: int) -> float | None:
        """The alpha of a layer (by the file's own name) that has `rank`, such that its scale is alpha / rank; None if
        the config has none.

        rsLoRA's scale is alpha / sqrt(rank): as alpha / rank that is an alpha larger by sqrt(rank).
        """
        whole = self.settings.get("lora_alpha", self.settings.get("alpha"))
        alpha = self._of_layer("alpha_pattern", layer, whole)
        return None if alpha is None else float(alpha) * (rank**0.5 if self.settings.get("use_rslora") else 1.0)

    def rank(self, layer: str) -> int | None:
        """The rank that the config gives a layer: a LoKr may have it, and be scaled by it, in no tensor."""
        rank = self._of_layer("rank_pattern", layer, self.settings.get("r"))
        return None if rank is None else int(rank)

    def _of_layer(self, patterns: str, layer: str, default: Any) -> Any:
        """The value of the first pattern that fits a layer, by peft's rule; else `default`."""
        name, given = without_prefix(layer), self.settings.get(patterns) or {}
        return next((value for key, value in given.items() if re.fullmatch(rf"(.*\.)?({key})", name)), default)


def lora_file(path: str | Path) -> Path:
    """The adapter's file: `path` itself, or that in a folder which peft wrote.

    ValueError for another folder, and for a pickle.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        if (path / WEIGHTS).is_file():
            return path / WEIGHTS
        pickle = next((file for file in sorted(path.iterdir()) if file.suffix in PICKLES), None)
        if not (path / CONFIG).is_file() or pickle is None:
            inside = ", ".join(sorted(file.name for file in path.glob("*.safetensors"))[:5]) or "it holds none"
            raise ValueError(f"{path} is a folder, not a LoRA file; give the .safetensors file in it ({inside})")
        path = pickle
    if path.suffix in PICKLES:
        raise ValueError(
            f"{path} is a pickle, and loading one may run code from the file; a LoRA is read from safetensors only. "
            "Save it again with peft's save_pretrained(safe_serialization=True), its default"
        )
    return path


def peft_config(path: Path, metadata: Mapping[str, str], keys: Iterable[str]) -> PeftConfig | None:
    """The config in a file's header, or beside a file that peft wrote; None where there is none.

    path, metadata, keys  the file, its metadata, and the names of the tensors that are read

    ValueError if it is damaged or of an adapter that is not supported.
    """
    keys = list(keys)
    if PEFT in metadata:
        second = bool(keys) and all(key.startswith(SECOND_PREFIX) for key in keys)
        settings, where = _header(path, metadata[PEFT], second), f"{path}: {PEFT} in its header"
    elif not any(key.startswith(PEFT_PREFIX) for key in keys):
        return None
    elif (path.parent / CONFIG).is_file():
        settings, where = read_json(path.parent / CONFIG), str(path.parent / CONFIG)
    else:
        return None
    kind = settings.get("peft_type")
    if kind is not None and str(kind).rpartition(".")[2].upper() not in _TYPES:
        raise ValueError(f"{where} says that it is peft's {kind}; {', '.join(_TYPES)} are supported")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise ValueError(
            f"{where} has init_lora_weights={start}, which also changed the base's weights, so that the adapter fits "
            "that base alone; save it with peft's path_initial_model_for_weight_conversion, which converts it"
        )
    return PeftConfig(settings)


def _header(path: Path, text: str, second: bool) -> dict[str, Any]:
    """The settings in a header, of the second expert if `second`; diffusers puts the component's name before each."""
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: {PEFT} in its header is not JSON ({error}); export the file again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: {PEFT} in its header is not a JSON object; export the file again")
    for prefix in (SECOND_PREFIX, "transformer.") if second else ("transformer.",):
        own = {key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)}
        if own:
            return own
    return config


def peft_header(layers: Mapping[str, Layer]) -> dict[str, object]:
    """peft's config as diffusers reads it: rank and alpha of the first layer for all, and by name where they differ."""
    first = next(iter(layers.values()))
    by_name = {diffusers_module(name): layer for name, layer in layers.items()}
    config = {
        "peft_type": "LORA",
        "r": first.rank,
        "lora_alpha": first.alpha,
        "target_modules": sorted(by_name),
        "rank_pattern": {name: layer.rank for name, layer in by_name.items() if layer.rank != first.rank},
        "alpha_pattern": {name: layer.alpha for name, layer in by_name.items() if layer.alpha != first.alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": first.magnitude is not None,
        "use_rslora": False,
    }
    return {f"transformer.{key}": value for key, value in config.items()}
