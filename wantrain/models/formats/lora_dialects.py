"""The dialects of LoRA files: what each calls a layer, and where it keeps alphas.

Here layers have Wan's official module names (`blocks.0.self_attn.q`). Sources: the tools' own conventions, checked by
loading our files in diffusers and its files here (docs/models.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from wantrain.models.formats.names import to_diffusers

#: Dialects that are written; "diffsynth" and "videox-fun" are read besides.
DIALECTS = ("comfyui", "diffusers", "kohya")
#: Where diffusers and peft keep ranks and alphas: an entry of the safetensors header.
PEFT = "lora_adapter_metadata"

#: (prefix of a layer's name, dialect); the first that fits counts.
_PREFIXES = (
    ("lora_unet__", "videox-fun"),
    ("lora_unet_", "kohya"),
    ("model.diffusion_model.", "comfyui"),
    ("diffusion_model.", "comfyui"),
    ("transformer.", "diffusers"),
    ("base_model.model.", "diffusers"),
)
_OUTSIDE = (
    "text_embedding.0",
    "text_embedding.2",
    "time_embedding.0",
    "time_embedding.2",
    "time_projection.1",
    "head.head",
)
_INSIDE = (*(f"{attention}.{part}" for attention in ("self_attn", "cross_attn") for part in "qkvo"), "ffn.0", "ffn.2")


def dialect_of(tensors: Mapping[str, Tensor]) -> str:
    """The dialect of a file's keys."""
    for prefix, dialect in _PREFIXES:
        if any(key.startswith(prefix) for key in tensors):
            return dialect
    return "diffsynth" if any(".default." in key for key in tensors) else "comfyui"


def official_names(layers: Mapping[str, Any], dialect: str) -> dict[str, str]:
    """The official module name of each layer of a file; layers that no Wan transformer has are left out."""
    bare = {layer: _without_prefix(layer) for layer in layers}
    blocks = {int(match[1]) for name in bare.values() if (match := re.match(r"blocks[._](\d+)[._]", name))}
    official_layers = [*_OUTSIDE, *(f"blocks.{block}.{part}" for block in sorted(blocks) for part in _INSIDE)]
    table = {official: official for official in official_layers}
    if dialect == "diffusers":
        table |= {diffusers_module(official): official for official in official_layers}
    elif dialect in {"kohya", "videox-fun"}:
        table = {official.replace(".", "_"): official for official in official_layers}
    return {layer: table[name] for layer, name in bare.items() if name in table}


def _without_prefix(layer: str) -> str:
    for prefix, _ in _PREFIXES:
        if layer.startswith(prefix):
            return (
                _without_prefix(layer.removeprefix(prefix)) if prefix == "base_model.model." else layer[len(prefix) :]
            )
    return layer


def peft_alphas(
    path: str | Path, metadata: Mapping[str, str], matrices: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, float]:
    """Alphas by the file's own layer names, from the header that peft and diffusers write."""
    if PEFT not in metadata:
        return {}
    try:
        config = json.loads(metadata[PEFT])
    except ValueError as error:
        raise ValueError(f"{path}: {PEFT} in its header is not JSON ({error}); export the file again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: {PEFT} in its header is not a JSON object; export the file again")
    whole, patterns = config.get("transformer.lora_alpha"), config.get("transformer.alpha_pattern") or {}
    rank_stabilised = bool(config.get("transformer.use_rslora"))
    alphas = {}
    for layer, pair in matrices.items():
        name = _without_prefix(layer)
        alpha = next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?{key}", name)), whole)
        if alpha is not None:
            # rsLoRA's scale is alpha / sqrt(rank): as alpha / rank that is an alpha larger by sqrt(rank).
            alphas[layer] = float(alpha) * (pair["down"].shape[0] ** 0.5 if rank_stabilised else 1.0)
    return alphas


def is_complete(layers: Iterable[str]) -> bool:
    """True if `layers` are all ten linear layers of blocks 0 to n and no others: diffusers loads kohya's dialect only
    then.
    """
    names = set(layers)
    blocks = {name.split(".")[1] for name in names if name.startswith("blocks.")}
    return names == {f"blocks.{block}.{part}" for block in range(len(blocks)) for part in _INSIDE}


def diffusers_module(name: str) -> str:
    """diffusers' name of a module, given its official one."""
    return to_diffusers(f"{name}.weight").removesuffix(".weight")
