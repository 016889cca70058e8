"""Adapter files (LoRA, DoRA, LoHa, LoKr, whole differences) in the common dialects: read, written, merged into weights.

A layer's change is alpha / rank * up @ down. In a file without an alpha it is the rank, except in VideoX-Fun's files,
which omit the alpha that they were trained with, so that the user must give it. A DoRA also has a magnitude, the length
of each row of the changed weight (arXiv 2402.09353). Layers have Wan's official module names; how files name them is
their dialect (lora_dialects.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from wantrain.models.formats.lora_dialects import DIALECTS, PEFT_PREFIX, dialect_of, diffusers_module, official_names
from wantrain.models.formats.lora_expert import check_lora_expert
from wantrain.models.formats.lora_keys import (
    Parts,
    check_finite,
    check_pair,
    choose_expert,
    factor_rank,
    factored,
    row_magnitudes,
    sort_tensors,
    widened,
    without_clip,
)
from wantrain.models.formats.lora_layers import (
    KINDS,
    Change,
    Difference,
    Hadamard,
    Kronecker,
    Layer,
    Trainable,
    kind_of,
)
from wantrain.models.formats.lora_peft import CONFIG, PEFT, PeftConfig, lora_file, peft_config, peft_header
from wantrain.models.formats.weights import read_file, write_file
from wantrain.models.quantize import quantized_layers
from wantrain.util.console import say
from wantrain.util.files import naming


@dataclass(frozen=True)
class LoRA:
    """An adapter file: its changes, its dialect, and the metadata of its header.

    layers  by official module name; the difference of a bias by the bias's own ("blocks.0.self_attn.q.bias")
    """

    layers: dict[str, Change]
    dialect: str
    metadata: dict[str, str]

    @property
    def is_dora(self) -> bool:
        """True if its layers have magnitudes: all of them, or none."""
        return any(isinstance(layer, Layer) and layer.magnitude is not None for layer in self.layers.values())

    @property
    def kind(self) -> str:
        """What adapter= is called that trains such layers: dora, lokr, else lora."""
        kronecker = any(isinstance(layer, Kronecker) for layer in self.layers.values())
        return "dora" if self.is_dora else "lokr" if kronecker else "lora"

    def trainable(self, where: str | Path) -> dict[str, Trainable]:
        """Its layers, to train on from. ValueError (naming the file, `where`) for two kinds, or one only merged."""
        found: dict[str, Trainable] = {}
        for name, layer in self.layers.items():
            if not isinstance(layer, Trainable):
                raise ValueError(
                    f"{where} changes {name} by a {KINDS[type(layer)]}, which is merged but not trained on; merge the "
                    "file into weights (export.py weights= lora.EXPERT=) and train a new LoRA on those"
                )
            found[name] = layer.as_stored() if isinstance(layer, Kronecker) else layer
        kinds = {kind_of(layer): name for name, layer in found.items()}
        if len(kinds) > 1:
            both = " and ".join(f"{name} by a {kind}" for kind, name in kinds.items())
            raise ValueError(
                f"{where} changes {both}: one kind of adapter is trained at a time; merge the file into weights "
                "(export.py weights= lora.EXPERT=) and train a new one on those"
            )
        return found


def read_lora(path: str | Path, *, alpha: float | None = None, expert: str | None = None) -> LoRA:
    """Read an adapter file of any dialect, or the folder that peft wrote.

    alpha   for files that omit the one they were trained with
    expert  which is read from a file that holds two (diffusers' `transformer.` and `transformer_2.`)

    ValueError if `alpha` differs from a file's own, and for what is no LoRA of a Wan transformer, incomplete, or not
    supported. The metadata has the expert that the names of the tensors state.
    """
    path = lora_file(path)
    tensors, metadata = read_file(path)
    tensors, stated_expert = choose_expert(path, tensors, expert)
    tensors = widened(path, without_clip(path, tensors))
    parts, dialect = sort_tensors(path, tensors), dialect_of(tensors)
    linear = official_names([*parts.matrices, *parts.factors], dialect)
    whole = official_names([layer for layer, _ in parts.differences], dialect, whole=True)
    _check_known(path, parts, linear, whole)
    for layer, pair in parts.matrices.items():
        check_pair(path, layer, pair)
    alphas = _Alphas(path, alpha, parts.alphas, peft_config(path, metadata, tensors))
    alphas.check(parts, dialect)
    magnitudes = row_magnitudes(path, parts)
    changes: list[tuple[str, str, Change]] = []
    for layer, pair in parts.matrices.items():
        strength = alphas.of(layer, linear[layer], pair["down"].shape[0])
        changes.append((linear[layer], layer, Layer(pair["down"], pair["up"], strength, magnitudes.get(layer))))
    for layer, factors in parts.factors.items():
        rank = alphas.rank(layer, factor_rank(path, layer, factors))
        strength = 1.0 if rank is None else alphas.of(layer, linear[layer], rank)
        changes.append((linear[layer], layer, factored(path, layer, factors, strength, rank)))
    for (layer, which), values in parts.differences.items():
        name = whole[layer] if which == "weight" else f"{whole[layer]}.bias"
        changes.append((name, layer, Difference(values)))
    check_finite(path, tensors)
    layers = _once(path, changes)
    about = {key: value for key, value in metadata.items() if key not in {"format", PEFT}}
    if stated_expert is not None and about.setdefault("expert", stated_expert) != stated_expert:
        raise ValueError(
            f"{path}: its metadata says {about['expert']}, but the names of its tensors say {stated_expert}"
        )
    return LoRA(layers, dialect, about)


def _check_known(path: Path, parts: Parts, linear: Mapping[str, str], whole: Mapping[str, str]) -> None:
    """Raise ValueError unless every name in a file is that of a layer, and there is one."""
    scaled = {*parts.matrices, *parts.factors}
    unknown = [*parts.unknown, *sorted(scaled - linear.keys())]
    unknown += sorted(layer for layer, _ in parts.differences if layer not in whole)
    unknown += sorted({*parts.alphas, *parts.magnitudes} - scaled)
    if unknown or not (scaled or parts.differences):
        example = unknown[0] if unknown else "none there"
        raise ValueError(
            f"{path}: {len(unknown)} names are not those of a LoRA for a Wan transformer (first: {example}); expected "
            "diffusion_model.blocks.N.self_attn.q.lora_A.weight and so on, as ComfyUI, diffusers or kohya's tools write"
        )


@dataclass(frozen=True)
class _Alphas:
    """The alphas of a file's layers: the file's own keys, else peft's config, else what the user gave, else the rank.

    Layers are given by the file's own names, and by the official ones for messages.
    """

    path: Path
    given: float | None
    stored: Mapping[str, float]
    config: PeftConfig | None

    def of(self, layer: str, name: str, rank: int) -> float:
        """The alpha of a layer. ValueError if the file's and the user's differ."""
        own = self._own(layer, rank)
        if own is not None and self.given is not None and own != self.given:
            raise ValueError(f"{self.path} holds its own alpha, {own:g} for {name}; leave out alpha={self.given:g}")
        return next((each for each in (own, self.given) if each is not None), float(rank))

    def rank(self, layer: str, rank: int | None) -> int | None:
        """The rank that scales a LoKr's layer: its own, else that in peft's config. LyCORIS scales by none where
        nothing is factored; peft does."""
        return rank if rank is not None or self.config is None else self.config.rank(layer)

    def _own(self, layer: str, rank: int) -> float | None:
        stored = self.stored.get(layer)
        return self.config.alpha(layer, rank) if stored is None and self.config is not None else stored

    def check(self, parts: Parts, dialect: str) -> None:
        """Raise ValueError if a needed alpha is not given, or the given one does nothing; say what is assumed."""
        without = {layer for layer in {*parts.matrices, *parts.factors} if self._own(layer, 1) is None}
        if dialect == "videox-fun" and self.given is None and without:
            raise ValueError(
                f"{self.path} is VideoX-Fun's: it was trained with an alpha that the file does not hold, and without "
                "it the strength would be wrong; give the network_alpha of its training as lora.alpha= (sample.py, "
                "export.py; to train on from it, first write it in another dialect with export.py)"
            )
        if self.given is not None and not (parts.matrices or parts.factors):
            raise ValueError(f"{self.path} holds whole differences, which have no alpha; leave out lora.alpha=")
        if self.given is None and any(layer.startswith(PEFT_PREFIX) for layer in without):
            say(
                f"note: {self.path} is peft's, with no {CONFIG} beside it, which holds alpha; alpha = rank is assumed "
                "(another one: lora.alpha=)"
            )


def _once(path: Path, changes: Iterable[tuple[str, str, Change]]) -> dict[str, Change]:
    """Changes by official name, from (official name, the file's name, change); ValueError if two have one name."""
    first: dict[str, str] = {}
    layers = {}
    for name, layer, change in changes:
        if name in first:
            raise ValueError(f"{path} holds {name} twice, as {first[name]} and as {layer}; keep the one that counts")
        first[name], layers[name] = layer, change
    return layers


def write_lora(
    path: str | Path,
    layers: Mapping[str, Change],
    *,
    dialect: str = "comfyui",
    metadata: Mapping[str, object] = MappingProxyType({}),
) -> str:
    """Write a LoRA file in one of `DIALECTS`, under a temporary name that is then renamed. Returns its sha256.

    "comfyui" is loaded by ComfyUI, diffusers and us, "diffusers" (alphas in the header) by diffusers and us. diffusers
    loads layers outside the blocks and DoRAs only as "diffusers", and "kohya" only if `is_complete`.
    ValueError for another dialect, where there are no layers, and for changes that diffusers' dialect cannot hold.
    """
    if dialect not in DIALECTS:
        raise ValueError(f"lora.dialect={dialect} is unknown; choose one of {', '.join(DIALECTS)}")
    path = Path(path)
    if not layers:
        raise ValueError(f"there are no layers to write to {path}; a LoRA changes at least one")
    tensors: dict[str, Tensor] = {}
    about, plain = dict(metadata), dict[str, Layer]()
    for name, layer in layers.items():
        module = name.removesuffix(".bias")
        if dialect == "comfyui":
            key = f"diffusion_model.{module}"
        elif dialect == "kohya":
            key = f"lora_unet_{module.replace('.', '_')}"
        elif isinstance(layer, Layer):
            key, plain[name] = f"transformer.{diffusers_module(module)}", layer
        else:
            raise ValueError(
                f"lora.dialect=diffusers cannot hold a {KINDS[type(layer)]}, which {path.name} has for {name}; choose "
                "lora.dialect=comfyui or kohya, or merge the file into weights"
            )
        ends = _tensors_by_end(layer, dialect, is_bias=module != name)
        tensors |= {f"{key}.{end}": tensor for end, tensor in ends.items()}
    if dialect == "diffusers":
        about[PEFT] = json.dumps(peft_header(plain))
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with naming(path):
            digest = write_file(beside, tensors, about)
            beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return digest


def _tensors_by_end(layer: Change, dialect: str, *, is_bias: bool) -> dict[str, Tensor]:
    """The tensors of one change by the ends of their names."""
    if isinstance(layer, Difference):
        return {"diff_b" if is_bias else "diff": layer.values}
    if isinstance(layer, Hadamard):
        ends = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        return {**dict(zip(ends, layer.tensors(), strict=True)), "alpha": torch.tensor(float(layer.alpha))}
    if isinstance(layer, Kronecker):
        layer = layer.as_stored()
        found = {} if layer.alpha is None else {"alpha": torch.tensor(layer.alpha)}
        for name, factor in (("lokr_w1", layer.first), ("lokr_w2", layer.second)):
            parts = (name,) if len(factor) == 1 else (f"{name}_a", f"{name}_b")
            found |= dict(zip(parts, factor, strict=True))
        return found
    assert isinstance(layer, Layer)
    down, up = ("lora_down", "lora_up") if dialect == "kohya" else ("lora_A", "lora_B")
    tensors = {f"{down}.weight": layer.down, f"{up}.weight": layer.up}
    if dialect != "diffusers":
        tensors["alpha"] = torch.tensor(float(layer.alpha))
    if layer.magnitude is not None and dialect == "diffusers":
        tensors["lora_magnitude_vector"] = layer.magnitude
    elif layer.magnitude is not None:
        tensors["dora_scale"] = layer.magnitude[:, None]
    return tensors


def merge_lora(
    path: str | Path,
    module: nn.Module,
    *,
    scale: float = 1.0,
    expert: str | None = None,
    base: str | None = None,
    alpha: float | None = None,
) -> int:
    """Merge an adapter file's changes, times `scale`, into a module's weights. Returns the number of changed tensors.

    ValueError if the file says that it is for another expert (lora_expert.py) or another model than `base`, or if any
    layer does not fit: nothing is merged in part.
    """
    lora = read_lora(path, alpha=alpha, expert=expert)
    check_lora_expert(path, lora.metadata, expert)
    model = lora.metadata.get("model")
    if base is not None and model not in {None, base}:
        raise ValueError(f"{path} was trained for model={model}, not for model={base}; choose model= to match")
    check_fits(lora, module, path)
    parameters = dict(module.named_parameters())
    for name, layer in lora.layers.items():
        parameter = parameters.get(f"{name}.weight", parameters.get(name))
        assert parameter is not None
        parameter.data = layer.merged(parameter.data, scale).to(parameter.dtype)
    return len(lora.layers)


def check_fits(lora: LoRA, module: nn.Module, path: str | Path) -> None:
    """Raise ValueError unless every layer of a LoRA is in `module`, in its shape."""
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    shapes |= {f"{name}.weight": tuple(layer.stored.shape) for name, layer in quantized_layers(module)}
    for name, layer in lora.layers.items():
        expected = shapes.get(f"{name}.weight", shapes.get(name))
        if expected is None:
            raise ValueError(f"{path} changes {name}, which this model does not have; it is for another base model")
        if expected != layer.shape:
            ours, theirs = (" x ".join(map(str, shape)) for shape in (expected, layer.shape))
            raise ValueError(f"{path}: {name} is {theirs}, the model's layer {ours}; it is for another base model")
