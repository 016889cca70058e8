"""Bringing experts together: from runs, from base models, with LoRAs added. Used by sample.py and export.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wantrain import geometry, world
from wantrain.models import Base, WanTransformer, load_transformer, open_base
from wantrain.models.base import PARTS
from wantrain.models.lora import merge_lora
from wantrain.models.weights import read_tensors
from wantrain.sampling import Experts, House, Sampler, Tiled
from wantrain.sampling.generate import Velocity
from wantrain.training.run import TrainedExpert, read_config, trained_experts

#: How a path in a config is found: from the current folder, or among what ships with the project.
Locate = Callable[[str | Path], Path]
#: Bytes that encoding a text takes on a GPU beside the encoder's weights: activations of 512 tokens, and workspaces.
ENCODING = 1 << 30


@dataclass(frozen=True)
class Found:
    """Where each expert will come from, the base that the other parts come from, and the runs (if any).

    Nothing is loaded yet: a pair of 14B experts need not be in memory together.
    """

    names: tuple[str, ...]
    base: Base
    trained: tuple[TrainedExpert, ...]
    locate: Locate

    def load(
        self, name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> WanTransformer:
        """The expert `name`: what a run trained, its adapter merged, or the base's own."""
        for expert in self.trained:
            if expert.name == name:
                return load_trained(expert, self.base, self.locate, device, dtype)
        return self.base.transformer(name, device=device, dtype=dtype)

    def has_adapter(self, name: str) -> bool:
        """True if the expert is a LoRA that loading merges."""
        return any(expert.name == name and expert.adapter is not None for expert in self.trained)

    def identity(self, more: Iterable[str | Path] = ()) -> str:
        """Changes when any file that sampling reads does, those of `more` (LoRA files) too: by name, size and time.

        Hashing 100 GB would take longer than a video.
        """
        places = [part for name in ("vae", "text_encoder", "tokenizer") if (part := self.base.find(name)) is not None]
        made = {expert.name: expert for expert in self.trained}
        for name in self.names:
            own = made.get(name)
            if own is not None:
                places.append(own.checkpoint if own.adapter is None else own.adapter)
            if own is None or own.adapter is not None:
                places += [path for path in [self.base.find(name)] if path is not None]
        told = [_state_of(file) for place in [*places, *map(Path, more)] for file in _files_below(place)]
        return hashlib.sha256(json.dumps([self.names, told]).encode()).hexdigest()[:12]

    def label(self) -> str:
        """Whose weights they are, in a few words."""
        runs = dict.fromkeys(f"{expert.config['run']} step {expert.step}" for expert in self.trained)
        return " + ".join(runs) or self.base.name

    def origin(self) -> dict[str, dict[str, object]]:
        """Where each expert came from, in words for its file and the card."""
        found: dict[str, dict[str, object]] = {name: {"base": self.base.name} for name in self.names}
        for expert in self.trained:
            facts = {"run": expert.config["run"], "step": expert.step}
            settings = {"recipe": expert.config.get("recipe"), "adapter": expert.config["adapter"]["name"]}
            found[expert.name] = {**facts, **settings, "base": Path(str(expert.config["weights"])).name}
        return found


def _files_below(place: Path) -> list[Path]:
    """A file itself, or all files of a folder."""
    return [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())


def _state_of(file: Path) -> list[str | int]:
    state = file.stat()
    return [file.name, state.st_size, state.st_mtime_ns]


def find_experts(
    names: list[str],
    *,
    model: str,
    boundary: float | None,
    run: str | None,
    runs: str | Path,
    base: Base | None,
    locate: Locate,
    alone: bool = False,
) -> Found:
    """The experts `names` of `model`: those that `run` trained, the others from `base` or else the runs' own base.

    ValueError where one is missing (unless `alone` allows a single expert), or a run trained another model.
    """
    if run is None and base is None:
        raise ValueError("nothing to load: give run=NAME (or run=NAME,NAME) or weights=FOLDER")
    trained = trained_experts(run, runs) if run is not None else []
    for expert in trained:
        if expert.config["model"]["name"] != model:
            raise ValueError(
                f"run {run} trained model={expert.config['model']['name']}, not model={model}; add model= to match"
            )
    made = {expert.name for expert in trained}
    rest = [name for name in names if name not in made]
    if base is None:
        base = base_of(trained[0].config, locate, [*rest, "vae", "text_encoder", "tokenizer"])
    elif trained:
        base = replace(base, like=trained[0].config["model"]["transformer"])
    if any(base.holds(name) for name in rest):
        base.check_boundary(boundary)
    held = tuple(name for name in names if name in made or base.holds(name))
    missing = [name for name in names if name not in held]
    if missing and not (alone and held):
        raise ValueError(
            f"{', '.join(missing)} is missing: neither run={run} nor {base} has it. Give both runs (run=ONE,OTHER), or "
            "weights= with a pipeline that holds it; sample.py alone=true lets one expert answer for every noise level"
        )
    if missing:
        world.say(f"alone=true: {', '.join(held)} answers for every noise level; it was trained for its own only")
    return Found(held, base, tuple(trained), locate)


def find_compared(
    names: list[str], find: Callable[[str | None, Base | None], Found], *, runs: str | Path, locate: Locate
) -> dict[str, Found]:
    """What is to be compared, all of it before the first video: a run, a pair of runs ("high+low"), or "base": what
    weights= gives, or else what the first run began with. `find(run, base)` finds experts."""
    first = next((name.split("+")[0] for name in names if name != "base"), None)
    found: dict[str, Found] = {}
    for name in map(str, names):
        if name != "base" or first is None:
            found[name] = find(None if name == "base" else name.replace("+", ","), None)
            continue
        settings = read_config(Path(runs).expanduser() / first)
        wanted = [*settings["model"]["experts"], "vae", "text_encoder", "tokenizer"]
        found[name] = find(None, base_of(settings, locate, wanted))
    return found


def base_of(settings: Mapping[str, Any], locate: Locate, wanted: Iterable[str]) -> Base:
    """The base that a run's stored config names."""
    return open_base(
        settings["weights"],
        settings.get("parts"),
        wanted=wanted,
        revision=settings.get("revision"),
        like=settings["model"]["transformer"],
        locate=locate,
    )


def load_trained(
    expert: TrainedExpert,
    base: Base,
    locate: Locate,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> WanTransformer:
    """The expert of a checkpoint; an adapter is merged into the base it was trained on."""
    if expert.adapter is None:
        return load_transformer(expert.checkpoint, part=PARTS[expert.name], device=device, dtype=dtype)
    try:
        base = base_of(expert.config, locate, [expert.name])
    except ValueError:  # moved since: the base that was given takes its place
        world.say(f"the base of run {expert.config['run']} is not where it was; its LoRA goes into {base}")
    module = base.transformer(expert.name, device=device, dtype=dtype)
    merge_lora(expert.adapter, module, expert=expert.name)
    return module


def add_loras(
    experts: Mapping[str, WanTransformer],
    files: Mapping[str, str | None],
    *,
    model: str,
    scale: float = 1.0,
    alpha: float | None = None,
) -> None:
    """Merge LoRA files into the experts they are named for. ValueError for an expert that is not there."""
    check_loras(files, experts)
    for name, file in files.items():
        if file is None:
            continue
        count = merge_lora(file, experts[name], scale=scale, expert=name, base=model, alpha=alpha)
        world.say(f"{name}: {file} added to {count} layers at scale {scale}")


def build_sampler(
    models: Mapping[str, Velocity],
    *,
    boundary: float | None,
    base: Base,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tile: int | None = None,
    way: str | None = None,
    texts: Mapping[str, Tensor] | None = None,
) -> Sampler:
    """A Sampler over given experts, with VAE (always float32) and text encoder from the base.

    `texts` are embeddings that are there already; the text encoder is loaded for others alone (see `encode_texts`).
    `tile` is the side in pixels of the squares that are decoded one by one; None decodes whole frames. `way` is how the
    experts are told what is known (condition.py). ValueError for a tile that the VAE cannot take.
    """
    vae = base.vae(device=device)
    decode: Callable[[Tensor], Tensor] = vae.decode
    if tile is not None:
        geometry.check_size(tile, tile, vae.spatial_stride, key=f"tile={tile}")
        decode = Tiled(vae.decode, tile // vae.spatial_stride)

    return Sampler(
        Experts(models, boundary),
        lambda fresh: [*encode_texts(base, fresh, device=device, dtype=dtype).values()],
        decode,
        vae.z_dim,
        vae.temporal_stride,
        vae.spatial_stride,
        device,
        way,
        lambda pixels: vae.encode(pixels.to(device)),
        dict(texts or {}),
    )


def encode_texts(
    base: Base, texts: Iterable[str], *, device: torch.device | str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Embeddings (L, D) of each text, on the host, by the base's text encoder, which is loaded for it and let go after.

    It goes to `device`, or where that has no room to the host, which is said: so texts are best encoded before experts
    are loaded. One text after the other, so that its embedding does not depend on the others' lengths.
    """
    texts, where = list(dict.fromkeys(texts)), _place_for_encoder(base, torch.device(device), dtype)
    encoder, embeddings = base.text_encoder(device=where, dtype=dtype), dict[str, Tensor]()
    for number, text in enumerate(texts, 1):
        world.progress(f"encoding text {number} of {len(texts)}")
        embeddings[text] = encoder.encode_unpadded([text])[0].cpu()
    del encoder
    if where.type == "cuda":
        torch.cuda.empty_cache()  # for the experts
    return embeddings


def _place_for_encoder(base: Base, device: torch.device, dtype: torch.dtype) -> torch.device:
    """The device, if it is no GPU or the text encoder fits into what is free there; else the host."""
    if device.type != "cuda":
        return device
    torch.cuda.empty_cache()  # what torch keeps for later counts as taken
    free = torch.cuda.mem_get_info(device)[0]
    stored = read_tensors(base.need("text_encoder")).values()  # mapped: only sizes are looked at
    needed = sum(tensor.numel() for tensor in stored) * dtype.itemsize + ENCODING
    if needed <= free:
        return device
    world.say(f"texts are encoded on the CPU: it takes {needed / 1e9:.1f} GB, {device} has {free / 1e9:.1f} GB free")
    return torch.device("cpu")


def house(
    found: Found,
    loras: Mapping[str, str | None],
    model: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    idle: str = "gpu",
    offload: str = "none",
    scale: float = 1.0,
    alpha: float | None = None,
) -> House:
    """The experts that were found, with LoRA files added, living as `idle` and `offload` say (see House)."""
    check_loras(loras, found.names)

    def load(name: str, where: torch.device) -> WanTransformer:
        module = found.load(name, device=where, dtype=dtype)
        add_loras({name: module}, {name: loras.get(name)}, model=model, scale=scale, alpha=alpha)
        return module

    return House(found.names, load, device, idle=idle, offload=offload)


def check_loras(files: Mapping[str, str | None], names: Iterable[str]) -> None:
    """Raise ValueError for the LoRA of an expert that is not there."""
    for name, file in files.items():
        if file is not None and name not in names:
            raise ValueError(f"lora.{name}={file}: this model has {', '.join(names)}, no {name}")
