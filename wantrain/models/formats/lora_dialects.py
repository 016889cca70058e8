"""The dialects of LoRA files: what each calls a layer.

Here layers have Wan's official module names (`blocks.0.self_attn.q`). Sources: the tools' own conventions, checked by
loading our files in diffusers and its files here (docs/models.md).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from wantrain.models.formats.names import to_diffusers

#: Dialects that are written; "diffsynth", "lycoris" and "videox-fun" are read besides.
DIALECTS = ("comfyui", "diffusers", "kohya")
#: peft's prefix of every name in its own files.
PEFT_PREFIX = "base_model.model."
#: diffusers' prefix of the low-noise expert's names, where one file holds both experts.
SECOND_PREFIX = "transformer_2."

#: (prefix of a layer's name, dialect); the first that fits counts.
_PREFIXES = (
    ("lora_unet__", "videox-fun"),
    ("lora_unet_", "kohya"),
    ("lycoris_", "lycoris"),
    ("model.diffusion_model.", "comfyui"),
    ("diffusion_model.", "comfyui"),
    (SECOND_PREFIX, "diffusers"),
    ("transformer.", "diffusers"),
    (PEFT_PREFIX, "diffusers"),
)
#: Dialects in which the dots of a name are underscores.
_FLAT = frozenset(("kohya", "lycoris", "videox-fun"))
_DIFFUSERS_NAME = re.compile(r"(blocks\.\d+\.(attn[12]|ffn\.net)|condition_embedder|proj_out)\.")
_OUTSIDE = (
    "text_embedding.0",
    "text_embedding.2",
    "time_embedding.0",
    "time_embedding.2",
    "time_projection.1",
    "head.head",
)
_INSIDE = (*(f"{attention}.{part}" for attention in ("self_attn", "cross_attn") for part in "qkvo"), "ffn.0", "ffn.2")
#: What only a whole difference changes: no linear layers.
_WHOLE_OUTSIDE = ("patch_embedding", "head.modulation")
_WHOLE_INSIDE = (
    *(f"{attention}.norm_{part}" for attention in ("self_attn", "cross_attn") for part in "qk"),
    "norm3",
    "modulation",
)


def dialect_of(keys: Iterable[str]) -> str:
    """The dialect of a file's keys."""
    keys = list(keys)
    for prefix, dialect in _PREFIXES:
        if any(key.startswith(prefix) for key in keys):
            return dialect
    if any(_DIFFUSERS_NAME.match(key) for key in keys):
        return "diffusers"
    return "diffsynth" if any(".default." in key for key in keys) else "comfyui"


def official_names(layers: Iterable[str], dialect: str, *, whole: bool = False) -> dict[str, str]:
    """The official module name of each layer of a file; layers that no Wan transformer has are left out.

    Only linear layers, or with `whole` every module, and the modulations.
    """
    bare = {layer: without_prefix(layer) for layer in layers}
    blocks = {int(match[1]) for name in bare.values() if (match := re.match(r"blocks[._](\d+)[._]", name))}
    outside, inside = (_OUTSIDE + _WHOLE_OUTSIDE, _INSIDE + _WHOLE_INSIDE) if whole else (_OUTSIDE, _INSIDE)
    official_layers = [*outside, *(f"blocks.{block}.{part}" for block in sorted(blocks) for part in inside)]
    table = {official: official for official in official_layers}
    if dialect == "diffusers" or dialect in _FLAT:
        table |= {diffusers_module(official): official for official in official_layers}
    if dialect in _FLAT:
        table = {name.replace(".", "_"): official for name, official in table.items()}
    return {layer: table[name] for layer, name in bare.items() if name in table}


def without_prefix(layer: str) -> str:
    """A layer's name in a file without its dialect's prefix."""
    for prefix, _ in _PREFIXES:
        if layer.startswith(prefix):
            bare = layer.removeprefix(prefix)
            return without_prefix(bare) if prefix == PEFT_PREFIX else bare
    return layer


def is_complete(layers: Iterable[str]) -> bool:
    """True if `layers` are all ten linear layers of blocks 0 to n and no others: diffusers loads kohya's dialect only
    then.
    """
    names = set(layers)
    blocks = {name.split(".")[1] for name in names if name.startswith("blocks.")}
    return names == {f"blocks.{block}.{part}" for block in range(len(blocks)) for part in _INSIDE}


def diffusers_module(name: str) -> str:
    """diffusers' name of a module or modulation, given its official one."""
    if name.endswith("modulation"):
        return to_diffusers(name)
    return to_diffusers(f"{name}.weight").removesuffix(".weight")
