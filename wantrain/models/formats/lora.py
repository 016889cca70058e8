"""LoRA and DoRA files in the common dialects: read, written, and merged into weights.

A layer's change is alpha / rank * up @ down. In a file without an alpha it is the rank, except in VideoX-Fun's files,
which omit the alpha that they were trained with, so that the user must give it. A DoRA also has a magnitude, the length
of each row of the changed weight (arXiv 2402.09353). Layers have Wan's official module names; how files name them is
their dialect (lora_dialects.py).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from wantrain.models.formats.lora_dialects import (
    DIALECTS,
    PEFT,
    dialect_of,
    diffusers_module,
    official_names,
    peft_alphas,
)
from wantrain.models.formats.weights import read_file, write_file

_MATRIX = re.compile(r"(?P<layer>.+?)\.lora(?:_|\.)(?P<side>A|B|down|up)(?P<default>\.default)?\.weight")
_ALPHA = re.compile(r"(?P<layer>.+)\.alpha")
#: A DoRA's magnitude. peft and diffusers write (out,) as `lora_magnitude_vector`; LyCORIS writes, ComfyUI
#: reads `dora_scale`, (out, 1) for rows (LyCORIS' `wd_on_out`) or (1, in) for columns. ComfyUI's weight_decompose in
#: comfy/weight_adapter/base.py tells the two apart by this shape and multiplies a bare (out,) along the wrong axis
#: (Comfy-Org/ComfyUI issue 12938); for rows it divides by the lengths in the base weight, where LyCORIS, peft and the
#: paper divide by those in the changed one (its pull request 15458, open in August 2026).
_MAGNITUDE = re.compile(r"(?P<layer>.+?)\.(?:dora_scale|lora_magnitude_vector(?:\.default)?(?:\.weight)?)")
#: What other kinds of adapters leave in a file (patterns), and what they are.
_FOREIGN = {
    r"\.hada_": "a LoHa",
    r"\.lokr_": "a LoKr",
    r"\.diff(_b)?$": "a LoRA that also replaces whole weights or biases",
    r"[kv]_img|add_[kv]_proj|img_emb|image_embedder": "a LoRA for Wan2.1's image-to-video with a CLIP branch",
}


@dataclass(frozen=True)
class Layer:
    """The change of one linear layer: `down` (rank, in), `up` (out, rank), `alpha`.

    A DoRA also has `magnitude` (out,), the length of each row of the changed weight.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Width of the change."""
        return self.down.shape[0]

    def tensors(self) -> list[Tensor]:
        """Its two or three tensors."""
        return [self.down, self.up, *([] if self.magnitude is None else [self.magnitude])]

    @property
    def scale(self) -> float:
        """The factor of up @ down: alpha / rank."""
        return self.alpha / self.rank

    def change(self) -> Tensor:
        """What is added to the weight, (out, in), float32; of a DoRA before rows are scaled to their magnitude."""
        return (self.up.float() @ self.down.float()) * self.scale

    def merged(self, weight: Tensor, scale: float = 1.0) -> Tensor:
        """`weight` (out, in) with `scale` times the change in it, float32 on the weight's device.

        For a DoRA it is interpolated linearly from the weight (0) to the changed one (1), as in ComfyUI. (diffusers
        always applies the whole magnitude.)
        """
        before = weight.float()
        if self.magnitude is None:
            return before + (scale * self.change()).to(before.device)
        changed = before + self.change().to(before.device)
        changed *= (self.magnitude.float().to(before.device) / row_lengths(changed))[:, None]
        return before + scale * (changed - before)


def row_lengths(weight: Tensor) -> Tensor:
    """Euclidean length of each row of a weight (out, in), float32: what a DoRA's magnitude starts from."""
    return torch.linalg.vector_norm(weight.float(), dim=1)


@dataclass(frozen=True)
class LoRA:
    """A LoRA file: its layers by official module name, its dialect, and the metadata of its header."""

    layers: dict[str, Layer]
    dialect: str
    metadata: dict[str, str]

    @property
    def is_dora(self) -> bool:
        """True if its layers have magnitudes: all of them, or none."""
        return any(layer.magnitude is not None for layer in self.layers.values())


def read_lora(path: str | Path, *, alpha: float | None = None) -> LoRA:
    """Read a LoRA file of any dialect.

    `alpha` is for files that omit the one they were trained with. ValueError if it differs from a file's own, and for
    what is no LoRA of a Wan transformer, incomplete, or not supported.
    """
    tensors, metadata = read_file(path)
    _refuse_foreign(tensors, path)
    dialect = dialect_of(tensors)
    matrices: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    magnitudes: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in tensors.items():
        if match := _MATRIX.fullmatch(key):
            side = {"A": "down", "B": "up"}.get(match["side"], match["side"])
            pair = matrices.setdefault(match["layer"], {})
            if side in pair:
                raise ValueError(f"{path} holds {match['layer']} twice, the second as {key}; keep the one that counts")
            pair[side] = tensor
        elif match := _ALPHA.fullmatch(key):
            alphas[match["layer"]] = _one_number(path, key, tensor)
        elif match := _MAGNITUDE.fullmatch(key):
            magnitudes[match["layer"]] = tensor
        else:
            unknown.append(key)
    official = official_names(matrices, dialect)
    unknown += sorted(layer for layer in matrices if layer not in official)
    unknown += sorted(layer for layer in {**alphas, **magnitudes} if layer not in matrices)
    if unknown or not matrices:
        example = unknown[0] if unknown else json.dumps(sorted(tensors)[:1])
        raise ValueError(
            f"{path}: {len(unknown)} names are not those of a LoRA for a Wan transformer (first: {example}); expected "
            "diffusion_model.blocks.N.self_attn.q.lora_A.weight and so on, as ComfyUI, diffusers or kohya's tools write"
        )
    for layer, pair in matrices.items():
        _check_pair(path, layer, pair)
    _check_once(path, official)
    magnitudes = _row_magnitudes(path, magnitudes, matrices)
    stated = {**peft_alphas(path, metadata, matrices), **alphas}
    if dialect == "videox-fun" and alpha is None and not matrices.keys() <= stated.keys():
        raise ValueError(
            f"{path} is VideoX-Fun's: it was trained with an alpha that the file does not hold, and without it the "
            "strength would be wrong; give the network_alpha of its training as lora.alpha= (sample.py, export.py; "
            "to train on from it, first write it in another dialect with export.py)"
        )
    layers = {}
    for layer, pair in matrices.items():
        in_file = stated.get(layer)
        if in_file is not None and alpha is not None and in_file != alpha:
            raise ValueError(
                f"{path} holds its own alpha, {in_file:g} for {official[layer]}; leave out alpha={alpha:g}"
            )
        strength = next((each for each in (in_file, alpha) if each is not None), float(pair["down"].shape[0]))
        layers[official[layer]] = Layer(pair["down"], pair["up"], strength, magnitudes.get(layer))
    about = {key: value for key, value in metadata.items() if key not in {"format", PEFT}}
    return LoRA(layers, dialect, about)


def _refuse_foreign(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    for key, tensor in tensors.items():
        for pattern, what in _FOREIGN.items():
            if re.search(pattern, key):
                raise ValueError(f"{path} is {what} (it holds {key}), which is not supported; a LoRA or DoRA is needed")
        if tensor.ndim > 2:
            raise ValueError(f"{path} changes a convolution ({key}), which is not supported; a LoRA or DoRA is needed")


def _check_pair(path: str | Path, layer: str, pair: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless a layer has both matrices, of one rank, at least 1."""
    absent = {"down", "up"} - pair.keys()
    if absent:
        ends = {"down": "lora_A (lora_down)", "up": "lora_B (lora_up)"}
        raise ValueError(f"{path}: {layer} has no {ends[absent.pop()]}; the file is incomplete")
    down, up = pair["down"], pair["up"]
    if down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0]:
        raise ValueError(f"{path}: {layer} is {tuple(up.shape)} x {tuple(down.shape)}, which do not multiply")
    if down.shape[0] == 0:
        raise ValueError(f"{path}: {layer} has rank 0; the file is damaged, export it again")
    if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise ValueError(f"{path}: {layer} holds NaN or infinity; its training went wrong, take an earlier checkpoint")


def _check_once(path: str | Path, official: Mapping[str, str]) -> None:
    """Raise ValueError if two names in a file stand for one layer."""
    first: dict[str, str] = {}
    for layer, name in official.items():
        if name in first:
            raise ValueError(f"{path} holds {name} twice, as {first[name]} and as {layer}; keep the one that counts")
        first[name] = layer


def _row_magnitudes(
    path: str | Path, magnitudes: Mapping[str, Tensor], matrices: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The magnitudes of a DoRA as (out,), by the file's own layer names; empty for a LoRA.

    ValueError if only some layers have one, or if one is not a finite number per row.
    """
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
        if not torch.isfinite(magnitude).all():
            raise ValueError(
                f"{path}: {layer} holds NaN or infinity; its training went wrong, take an earlier checkpoint"
            )
        rows[layer] = magnitude.reshape(after)
    return rows


def _one_number(path: str | Path, key: str, tensor: Tensor) -> float:
    if tensor.numel() != 1 or not math.isfinite(float(tensor)):
        raise ValueError(f"{path}: {key} is not one finite number; the file is damaged, export it again")
    return float(tensor)


def write_lora(
    path: str | Path,
    layers: Mapping[str, Layer],
    *,
    dialect: str = "comfyui",
    metadata: Mapping[str, object] = MappingProxyType({}),
) -> str:
    """Write a LoRA file in one of `DIALECTS`, under a temporary name that is then renamed. Returns its sha256.

    "comfyui" is loaded by ComfyUI, diffusers and us, "diffusers" (alphas in the header) by diffusers and us. diffusers
    loads layers outside the blocks and DoRAs only as "diffusers", and "kohya" only if `is_complete`.
    ValueError for another dialect, or where there are no layers.
    """
    if dialect not in DIALECTS:
        raise ValueError(f"lora.dialect={dialect} is unknown; choose one of {', '.join(DIALECTS)}")
    path = Path(path)
    if not layers:
        raise ValueError(f"there are no layers to write to {path}; a LoRA changes at least one")
    tensors: dict[str, Tensor] = {}
    about = dict(metadata)
    for name, layer in layers.items():
        if dialect == "comfyui":
            key, ends = f"diffusion_model.{name}", ("lora_A", "lora_B")
        elif dialect == "diffusers":
            key, ends = f"transformer.{diffusers_module(name)}", ("lora_A", "lora_B")
        else:
            key, ends = f"lora_unet_{name.replace('.', '_')}", ("lora_down", "lora_up")
        tensors[f"{key}.{ends[0]}.weight"] = layer.down
        tensors[f"{key}.{ends[1]}.weight"] = layer.up
        if dialect != "diffusers":
            tensors[f"{key}.alpha"] = torch.tensor(float(layer.alpha))
        if layer.magnitude is not None and dialect == "diffusers":
            tensors[f"{key}.lora_magnitude_vector"] = layer.magnitude
        elif layer.magnitude is not None:
            tensors[f"{key}.dora_scale"] = layer.magnitude[:, None]
    if dialect == "diffusers":
        about[PEFT] = json.dumps(_peft_config(layers))
    beside = path.with_name(f".{path.name}.tmp")
    digest = write_file(beside, tensors, about)
    beside.replace(path)
    return digest


def _peft_config(layers: Mapping[str, Layer]) -> dict[str, object]:
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


def merge_lora(
    path: str | Path,
    module: nn.Module,
    *,
    scale: float = 1.0,
    expert: str | None = None,
    base: str | None = None,
    alpha: float | None = None,
) -> int:
    """Merge a LoRA file's change, times `scale`, into a module's weights. Returns the number of changed layers.

    ValueError if the file's metadata names another expert or another model than `base`, or if any layer does not fit:
    nothing is merged in part.
    """
    lora = read_lora(path, alpha=alpha)
    stated = lora.metadata.get("expert")
    if expert is not None and stated not in {None, expert}:
        raise ValueError(f"{path} was trained for {stated}, not for {expert}; swap the two files")
    model = lora.metadata.get("model")
    if base is not None and model not in {None, base}:
        raise ValueError(f"{path} was trained for model={model}, not for model={base}; choose model= to match")
    check_fits(lora, module, path)
    parameters = dict(module.named_parameters())
    for name, layer in lora.layers.items():
        weight = parameters[f"{name}.weight"]
        weight.data = layer.merged(weight.data, scale).to(weight.dtype)
    return len(lora.layers)


def check_fits(lora: LoRA, module: nn.Module, path: str | Path) -> None:
    """Raise ValueError unless every layer of a LoRA is in `module`, in its shape."""
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    for name, layer in lora.layers.items():
        expected, shape = shapes.get(f"{name}.weight"), (layer.up.shape[0], layer.down.shape[1])
        if expected is None:
            raise ValueError(f"{path} changes {name}, which this model does not have; it is for another base model")
        if expected != shape:
            raise ValueError(
                f"{path}: {name} is {shape[0]} x {shape[1]}, the model's layer {expected[0]} x {expected[1]}; it "
                "is for another base model"
            )
