"""The tensors of an adapter file sorted by what their names say, and those of one layer put together.

Names of layers stay the file's own here; lora_dialects.py translates them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from wantrain.models.formats.lora_dialects import SECOND_PREFIX
from wantrain.models.formats.lora_layers import Hadamard, Kronecker
from wantrain.util.console import say

_MATRIX = re.compile(r"(?P<layer>.+?)\.lora(?:_|\.)(?P<side>A|B|down|up)(?P<default>\.default)?\.weight")
_ALPHA = re.compile(r"(?P<layer>.+)\.alpha")
#: LyCORIS' and peft's parts of a LoHa and a LoKr.
_FACTOR = re.compile(r"(?P<layer>.+)\.(?P<part>hada_w[12]_[ab]|lokr_w[12](?:_[ab])?)")
#: Whole differences: ComfyUI's and LyCORIS' names of one for a weight, or for a bias.
_DIFFERENCE = re.compile(r"(?P<layer>.+)\.(?P<part>diff|w_norm|diff_b|b_norm)")
#: A DoRA's magnitude. peft and diffusers write (out,) as `lora_magnitude_vector`; LyCORIS writes, ComfyUI
#: reads `dora_scale`, (out, 1) for rows (LyCORIS' `wd_on_out`) or (1, in) for columns. ComfyUI's weight_decompose in
#: comfy/weight_adapter/base.py tells the two apart by this shape and multiplies a bare (out,) along the wrong axis
#: (Comfy-Org/ComfyUI issue 12938); for rows it divides by the lengths in the base weight, where LyCORIS, peft and the
#: paper divide by those in the changed one (its pull request 15458, open in August 2026).
_MAGNITUDE = re.compile(r"(?P<layer>.+?)\.(?:dora_scale|lora_magnitude_vector(?:\.default)?(?:\.weight)?)")
_TUCKER = re.compile(r"\.(hada_t[12]|lokr_t2)$")
#: Layers of the CLIP branch of Wan2.1's image-to-video, in all dialects. Wan2.2 has no such branch.
_CLIP = re.compile(r"[kv]_img|add_[kv]_proj|norm_added_[kqv]|img_emb|image_embedder")
#: ComfyUI's mark of a file with scaled fp8 tensors.
_MARK = "scaled_fp8"


@dataclass
class Parts:
    """A file's tensors by the file's own layer names.

    matrices     a LoRA's `down` and `up` of each layer
    factors      those of a LoHa or LoKr, by LyCORIS' names (hada_w1_a, lokr_w2, ...)
    differences  whole differences, by layer and "weight" or "bias"
    unknown      keys that are none of these
    """

    matrices: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    factors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    differences: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def is_adapter(keys: Iterable[str]) -> bool:
    """True if the names are those of an adapter's tensors, or say that they are a LoRA's."""
    return any("lora" in key.lower() or _FACTOR.fullmatch(key) or _DIFFERENCE.fullmatch(key) for key in keys)


def experts_held(keys: Collection[str]) -> tuple[str, ...]:
    """The experts that a file's keys tell apart, by diffusers' prefixes `transformer.` and `transformer_2.`.

    Empty for most files, which hold one expert and do not say which.
    """
    if not any(key.startswith(SECOND_PREFIX) for key in keys):
        return ()
    return ("low_noise",) if all(key.startswith(SECOND_PREFIX) for key in keys) else ("high_noise", "low_noise")


def choose_expert(path: Path, tensors: dict[str, Tensor], expert: str | None) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of one expert, and its name if the keys state it.

    ValueError if the file holds both and `expert` is neither, or has a second prefix that is not diffusers'.
    """
    held = experts_held(tensors)
    if len(held) < 2:
        return tensors, held[0] if held else None
    others = [key for key in tensors if not key.startswith((SECOND_PREFIX, "transformer."))]
    if others:
        raise ValueError(f"{path} holds both experts, transformer. and transformer_2., and {others[0]}, of neither")
    if expert not in held:
        raise ValueError(
            f"{path} holds a LoRA for each of two experts (transformer. and transformer_2.); give it as "
            "lora.high_noise=, as lora.low_noise=, or as both, to a model of two experts"
        )
    prefix = SECOND_PREFIX if expert == "low_noise" else "transformer."
    return {key: tensor for key, tensor in tensors.items() if key.startswith(prefix)}, expert


def without_clip(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without those of a CLIP branch, with one line about it. ValueError if there are no others."""
    clip = [key for key in tensors if _CLIP.search(key)]
    if clip and len(clip) == len(tensors):
        raise ValueError(f"{path} changes only Wan2.1's CLIP image branch ({clip[0]}), which no model here has")
    if clip:
        say(
            f"note: {path}: {len(clip)} tensors of Wan2.1's CLIP image branch are left out (first: {clip[0]}); no "
            "model here has one"
        )
    return {key: tensor for key, tensor in tensors.items() if not _CLIP.search(key)}


def widened(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with fp8 widened, exactly: to bfloat16, or with a scale of its own to float32.

    Scales are ComfyUI's `KEY.scale_weight` or `KEY.weight_scale` beside `KEY.weight`: one number, or one per row.
    ValueError for a scale that does not fit, and for quantised integers.
    """
    scales = {
        key: name
        for key in tensors
        for name in (f"{key}_scale", f"{key.removesuffix('.weight')}.scale_weight")
        if name in tensors and name != key
    }
    wide = {}
    for key, tensor in tensors.items():
        if key == _MARK or key in scales.values():
            continue
        if key in scales:
            scale = tensors[scales[key]].float()
            if scale.numel() not in {1, tensor.shape[0]}:
                raise ValueError(
                    f"{path}: {scales[key]} is {tuple(scale.shape)}, not one number or one for each row of {key}"
                )
            tensor = tensor.float() * (
                scale.reshape(-1, *[1] * (tensor.ndim - 1)) if scale.numel() > 1 else scale.view(())
            )
        elif "float8" in str(tensor.dtype):
            tensor = tensor.to(torch.bfloat16)
        elif not tensor.is_floating_point() and not _ALPHA.fullmatch(key):
            raise ValueError(f"{path}: {key} is {tensor.dtype}, a quantised format; take the bf16 or fp16 file")
        wide[key] = tensor
    return wide


def sort_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Parts:
    """Sort a file's tensors by their names. ValueError for kinds that are not supported, and for contradictions."""
    parts = Parts()
    for key, tensor in tensors.items():
        if _TUCKER.search(key) or (tensor.ndim > 2 and not _DIFFERENCE.fullmatch(key)):
            raise ValueError(f"{path} changes a convolution ({key}), which is not supported; a LoRA or DoRA is needed")
        if match := _MATRIX.fullmatch(key):
            side = {"A": "down", "B": "up"}.get(match["side"], match["side"])
            pair = parts.matrices.setdefault(match["layer"], {})
            if side in pair:
                raise ValueError(f"{path} holds {match['layer']} twice, the second as {key}; keep the one that counts")
            pair[side] = tensor
        elif match := _FACTOR.fullmatch(key):
            parts.factors.setdefault(match["layer"], {})[match["part"]] = tensor
        elif match := _DIFFERENCE.fullmatch(key):
            place = (match["layer"], "weight" if match["part"] in {"diff", "w_norm"} else "bias")
            if place in parts.differences:
                raise ValueError(f"{path} holds {match['layer']} twice, the second as {key}; keep the one that counts")
            parts.differences[place] = tensor
        elif match := _ALPHA.fullmatch(key):
            parts.alphas[match["layer"]] = _one_number(path, key, tensor)
        elif match := _MAGNITUDE.fullmatch(key):
            parts.magnitudes[match["layer"]] = tensor
        else:
            parts.unknown.append(key)
    return parts


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError for a tensor with NaN or infinity."""
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{path}: {key} holds NaN or infinity; its training went wrong, take an earlier checkpoint"
            )


def _one_number(path: Path, key: str, tensor: Tensor) -> float:
    if tensor.numel() != 1 or not math.isfinite(float(tensor)):
        raise ValueError(f"{path}: {key} is not one finite number; the file is damaged, export it again")
    return float(tensor)


def check_pair(path: Path, layer: str, pair: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless a LoRA's layer has both matrices, of one rank, at least 1."""
    absent = {"down", "up"} - pair.keys()
    if absent:
        ends = {"down": "lora_A (lora_down)", "up": "lora_B (lora_up)"}
        raise ValueError(f"{path}: {layer} has no {ends[absent.pop()]}; the file is incomplete")
    _check_product(path, layer, pair["up"], pair["down"])


def _check_product(path: Path, layer: str, up: Tensor, down: Tensor) -> None:
    if down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0]:
        raise ValueError(f"{path}: {layer} is {tuple(up.shape)} x {tuple(down.shape)}, which do not multiply")
    if down.shape[0] == 0:
        raise ValueError(f"{path}: {layer} has rank 0; the file is damaged, export it again")


def row_magnitudes(path: Path, parts: Parts) -> dict[str, Tensor]:
    """The magnitudes of a DoRA as (out,), by the file's own layer names; empty for a LoRA.

    ValueError if only some layers have one, or if one is not a number per row.
    """
    matrices, magnitudes = parts.matrices, parts.magnitudes
    if layer := next((layer for layer in magnitudes if layer in parts.factors), None):
        raise ValueError(f"{path} is a LoHa or LoKr with a DoRA's magnitudes ({layer}), which is not supported")
    without = sorted(matrices.keys() - magnitudes.keys())
    if magnitudes and without:
        raise ValueError(
            f"{path} is a DoRA, but {len(without)} of its {len(matrices)} layers have no magnitude (first: "
            f"{without[0]}); the file is incomplete"
        )
    rows = {}
    for layer, magnitude in magnitudes.items():
        after, before = matrices[layer]["up"].shape[0], matrices[layer]["down"].shape[1]
        if tuple(magnitude.shape) == (1, before):
            raise ValueError(
                f"{path} is a DoRA that scales columns ({layer}: {tuple(magnitude.shape)}; LyCORIS without wd_on_out), "
                "which is not supported; merge it with its own tool, or train it on the output axis"
            )
        if tuple(magnitude.shape) not in {(after,), (after, 1)}:
            raise ValueError(
                f"{path}: the magnitude of {layer} is {tuple(magnitude.shape)}, the layer has {after} rows"
            )
        rows[layer] = magnitude.reshape(after)
    return rows


def factor_rank(path: Path, layer: str, factors: Mapping[str, Tensor]) -> int | None:
    """The rank of a LoHa's or LoKr's layer; None where nothing is factored. ValueError for what does not multiply,
    or is incomplete."""
    kinds = {part[:4] for part in factors}
    wanted = {"hada": ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"], "lokr": []}
    if len(kinds) > 1:
        raise ValueError(f"{path}: {layer} is a LoHa and a LoKr at once; keep the one that counts")
    names = wanted[kinds.pop()]
    for number in () if names else (1, 2):
        whole, split = f"lokr_w{number}", [f"lokr_w{number}_a", f"lokr_w{number}_b"]
        if whole in factors and factors.keys() & set(split):
            raise ValueError(f"{path}: {layer} holds {whole} twice, whole and as a product; keep the one that counts")
        names += [whole] if whole in factors else split
    absent = [name for name in names if name not in factors]
    if absent:
        raise ValueError(f"{path}: {layer} has no {absent[0]}; the file is incomplete")
    ranks = set()
    for name in names:
        if factors[name].ndim != 2 or 0 in factors[name].shape:
            raise ValueError(f"{path}: {layer} has {name} of shape {tuple(factors[name].shape)}, not a matrix")
        if name.endswith("_a"):
            _check_product(path, layer, factors[name], factors[name[:-1] + "b"])
            ranks.add(factors[name].shape[1])
    if len(ranks) > 1:
        raise ValueError(f"{path}: {layer} has two ranks, {' and '.join(map(str, sorted(ranks)))}; the file is damaged")
    return ranks.pop() if ranks else None


def factored(
    path: Path, layer: str, factors: Mapping[str, Tensor], alpha: float, rank: int | None
) -> Hadamard | Kronecker:
    """The change that a LoHa's or LoKr's tensors make; its scale is alpha / rank, and 1 where `rank` is None."""
    if "hada_w1_a" in factors:
        first, second = (tuple(factors[f"hada_w{number}_{side}"] for side in "ab") for number in (1, 2))
        if (first[0].shape[0], first[1].shape[1]) != (second[0].shape[0], second[1].shape[1]):
            raise ValueError(f"{path}: the two products of {layer} differ in shape; the file is damaged")
        return Hadamard(first[0], first[1], second[0], second[1], alpha)
    halves = []
    for name in ("lokr_w1", "lokr_w2"):
        parts = (name,) if name in factors else (f"{name}_a", f"{name}_b")
        halves.append(tuple(factors[part] for part in parts))
    return Kronecker(halves[0], halves[1], 1.0 if rank is None else alpha / rank)
