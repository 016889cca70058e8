"""inspect=FILE: dialect, expert, rank, layers, dtype and size of a file or folder of weights, in a few lines."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from wantrain.models.formats import names
from wantrain.models.formats.base import PARTS, Base, stated_expert
from wantrain.models.formats.fp8 import split
from wantrain.models.formats.loading import VARIANTS, refuse_foreign, transformer_sizes
from wantrain.models.formats.lora import LoRA, read_lora
from wantrain.models.formats.lora_expert import stated_lora_expert
from wantrain.models.formats.lora_keys import experts_held, is_adapter
from wantrain.models.formats.lora_layers import KINDS, Hadamard, Kronecker, Layer
from wantrain.models.formats.lora_peft import CONFIG, lora_file
from wantrain.models.formats.weights import dtypes, read_metadata, read_tensors, tensor_files


def describe(path: Path) -> str:
    """Lines that describe a file or folder. ValueError if it cannot be read, or holds no weights of a Wan model."""
    if not path.exists():
        raise ValueError(f"inspect={path} does not exist")
    if path.is_dir() and (path / CONFIG).is_file():
        path = lora_file(path)
    if path.is_dir() and not (path / "config.json").is_file():
        return _model(path)
    files = tensor_files(path)
    tensors = read_tensors(path)
    size = sum(file.stat().st_size for file in files)
    count = sum(tensor.numel() for tensor in tensors.values())
    lines = [*_contents(path, tensors)]
    lines.append(f"tensors   {len(tensors)}, {count:,} values, {dtypes(tensors.values())}")
    lines.append(f"size      {_bytes(size)} in {len(files)} file{'s' * (len(files) > 1)}")
    about = {key: value for key, value in read_metadata(path).items() if key not in {"format", "lora_adapter_metadata"}}
    lines += [f"says      {key}: {value}" for key, value in about.items()]
    return "\n".join([f"{path}", *(f"  {line}" for line in lines)])


def _model(path: Path) -> str:
    """A model's folder, part by part."""
    base = Base(path)
    places = {name: base.find(name) for name in (*PARTS, "vae", "text_encoder") if base.holds(name)}
    if not places:
        files = ", ".join(sorted(file.name for file in path.glob("*.safetensors"))[:5])
        fix = f"; give one of its files ({files})" if files else ""
        raise ValueError(f"{path} holds no part of a Wan model in the diffusers or the official layout{fix}")
    parts = [f"{name}:\n{describe(part)}" for name, part in places.items() if part is not None]
    return "\n".join([f"{path}: {', '.join(places)}", *parts])


def _contents(path: Path, tensors: Mapping[str, Tensor]) -> list[str]:
    """Which network or adapter the weights are of, with its facts."""
    if is_adapter(tensors):
        alpha, lines = _any_alpha(tensors), list[str]()
        for expert in experts_held(tensors) or (None,):
            lines += _lora(path, read_lora(path, alpha=alpha, expert=expert), has_alpha=alpha is None)
        return lines
    if any("patch_embedding." in key for key in tensors):
        return _transformer(path, tensors)
    if "post_quant_conv.weight" in tensors or "encoder.conv1.weight" in tensors:
        dialect = "diffusers" if "post_quant_conv.weight" in tensors else "official"
        key = "post_quant_conv.weight" if dialect == "diffusers" else "conv2.weight"
        version = {16: "2.1 (4x8x8)", 48: "2.2 (4x16x16)"}.get(tensors[key].shape[0], "of unknown size")
        return ["kind      Wan-VAE " + version, f"dialect   {dialect}"]
    if "shared.weight" in tensors or "token_embedding.weight" in tensors:
        dialect = "transformers" if "shared.weight" in tensors else "official"
        return ["kind      umT5 text encoder", f"dialect   {dialect}"]
    raise ValueError(f"{path} holds no weights of a Wan model; its first names are {', '.join(sorted(tensors)[:3])}")


def _any_alpha(tensors: Mapping[str, Tensor]) -> float | None:
    """A stand-in for the alpha that a VideoX-Fun file lacks, so that it can be described; None for other files."""
    bare = any(key.startswith("lora_unet__") for key in tensors) and not any(key.endswith(".alpha") for key in tensors)
    return 1.0 if bare else None


def _lora(path: Path, lora: LoRA, *, has_alpha: bool) -> list[str]:
    blocks = sorted({int(match[1]) for name in lora.layers if (match := re.match(r"blocks\.(\d+)\.", name))})
    layers = sorted({re.sub(r"^blocks\.\d+\.", "", name) for name in lora.layers})
    ranks = sorted({layer.rank for layer in lora.layers.values() if layer.rank is not None})
    scaled = [layer.alpha for layer in lora.layers.values() if isinstance(layer, Layer | Hadamard | Kronecker)]
    alphas = _list({f"{alpha:g}" for alpha in scaled if alpha is not None})
    where = f"blocks {blocks[0]} to {blocks[-1]}" if blocks else "outside the blocks"
    plain = "DoRA" if lora.is_dora else "LoRA"
    kinds = {KINDS.get(type(layer), plain) for layer in lora.layers.values()}
    return [
        f"kind      {' and '.join(sorted(kinds))}",
        f"dialect   {lora.dialect}",
        f"expert    {stated_lora_expert(path, lora.metadata) or 'not stated, and nothing in the tensors shows it'}",
        f"rank      {_list(map(str, ranks)) or 'none'}",
        f"alpha     {(alphas or 'none') if has_alpha else 'not in the file (give lora.alpha=)'}",
        f"layers    {len(lora.layers)} in {where}: {', '.join(layers)}",
    ]


def _transformer(path: Path, tensors: Mapping[str, Tensor]) -> list[str]:
    try:
        tensors = split(tensors, path)[0]
        refuse_foreign(tensors, path)
    except ValueError as error:
        return ["kind      transformer", f"not usable {error}"]
    prefix = names.common_prefix(tensors)
    bare = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    sizes = transformer_sizes(path, bare, None)
    width = bare["patch_embedding.weight"].shape[0]
    dialect = "diffusers" if "proj_out.weight" in bare else "official"
    fitting = VARIANTS.get((width, sizes["in_channels"]), "none of the published models")
    return [
        "kind      transformer",
        f"dialect   {dialect}" + (f", with the prefix {prefix}" if prefix else ""),
        f"expert    {stated_expert(path) or 'not stated, and nothing in the tensors shows it'}",
        f"fits      {fitting}",
        f"shape     width {width}, {sizes['num_layers']} blocks, {sizes['in_channels']} input channels",
    ]


def _list(values: object) -> str:
    return ", ".join(sorted(values))  # type: ignore[call-overload]


def _bytes(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError
