"""Base: a model on disk in any of the common layouts, and the location of each of its parts.

Layouts: diffusers' (transformer/, transformer_2/, vae/, ...), Wan's official one (high_noise_model/, low_noise_model/,
*.pth, google/umt5-xxl), and single files for single parts. The state dicts of the two experts, and of Wan2.1's 14B,
have the same keys and shapes. So which expert a file holds is read from its layout, its name or its metadata, and never
guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from wantrain.models.formats import hub
from wantrain.models.formats.fp8 import is_fp8
from wantrain.models.formats.loading import load_text_encoder, load_transformer, load_vae
from wantrain.models.formats.weights import PICKLES, read_json, read_metadata, read_tensors
from wantrain.models.quantize import Format
from wantrain.models.text import TextEncoder
from wantrain.models.transformer import WanTransformer
from wantrain.models.vae import Half, WanVAE

#: Folders of the diffusers layout: the high-noise expert (or the only model) is `transformer`.
PARTS = {"high_noise": "transformer", "low_noise": "transformer_2", "dense": "transformer"}
#: Folders of the official layout; a single model lies at the top.
OFFICIAL = {"high_noise": "high_noise_model", "low_noise": "low_noise_model", "dense": "."}

#: Patterns of the files that each part needs of a repository, in both layouts.
_FILES = {
    "high_noise": ("transformer/*", "high_noise_model/*"),
    "low_noise": ("transformer_2/*", "low_noise_model/*"),
    "dense": ("transformer/*", "config.json", "diffusion_pytorch_model*"),
    "vae": ("vae/*", "Wan2.?_VAE.*"),
    "text_encoder": ("text_encoder/*", "models_t5_*"),
    "tokenizer": ("tokenizer/*", "google/*"),
}
_ALWAYS = ("model_index.json", "scheduler/*")


@dataclass(frozen=True)
class Base:
    """The locations of a model's parts.

    folder  the model's folder, in the diffusers or the official layout
    parts   parts outside it (a folder or a single file each), used instead of the folder's
    like    the transformer's keywords in the chosen model's config; a file of another shape is refused
    """

    folder: Path | None = None
    parts: Mapping[str, Path] = field(default_factory=dict)
    like: Mapping[str, Any] | None = None
    repository: str | None = None  # of the hub, if the folder was downloaded

    @property
    def name(self) -> str:
        """Its name in files that others get; it contains no path of this machine."""
        folder = [] if self.folder is None else [self.repository or self.folder.name]
        return " + ".join([*folder, *(f"{part}={path.name}" for part, path in self.parts.items())])

    def __str__(self) -> str:
        return " + ".join([str(self.folder)] * (self.folder is not None) + [f"{k}={v}" for k, v in self.parts.items()])

    def find(self, name: str) -> Path | None:
        """The folder or file of part `name` (an expert, vae, text_encoder, tokenizer); None if it has none."""
        if name in self.parts:
            return self.parts[name]
        if self.folder is None:
            return None
        place = next((path for path in self._places(self.folder, name) if path.exists()), None)
        return place.parent if place is not None and place.name == "config.json" else place

    def need(self, name: str) -> Path:
        """`find`, or a ValueError that says how to give the part."""
        path = self.find(name)
        if path is None:
            raise ValueError(
                f"{self or 'weights=null'} holds no {name}; give weights=FOLDER with one, or parts.{name}="
            )
        return path

    def holds(self, name: str) -> bool:
        """True if part `name` is there."""
        return self.find(name) is not None

    def _places(self, folder: Path, name: str) -> Iterable[Path]:
        """Where part `name` may be in a folder, by layout."""
        if name in PARTS:
            # transformer/ is the high-noise expert of a pair or the only model; only the index can say which.
            two = has_two_experts(folder)
            if not (two is True and name == "dense") and not (two is False and name == "high_noise"):
                yield folder / PARTS[name] / "config.json"
            yield folder / OFFICIAL[name] / "config.json"
        elif name == "vae":
            yield folder / "vae"
            yield from sorted(folder.glob("Wan2.?_VAE.*"))
        elif name == "text_encoder":
            yield folder / "text_encoder"
            yield from sorted(folder.glob("models_t5_*"))
        elif name == "tokenizer":
            yield folder / "tokenizer"
            yield folder / "google" / "umt5-xxl"

    def transformer(
        self,
        name: str,
        *,
        expand_inputs: bool = False,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        fp32: Iterable[str] = (),
        stored: Format | None = None,
        mapped: bool = False,
    ) -> WanTransformer:
        """The expert `name`; ValueError if its file is stated to be another one. Parameters named in `fp32` are float32
        whatever `dtype` says; `stored` is the format of the blocks' frozen weights (quantize.py). `expand_inputs` loads
        a text-to-video transformer, with as many channels in as out, and adds the further input channels that `like`
        has. `mapped` leaves weights in mapped files (load_transformer).
        """
        path, like = self.need(name), dict(self.like or {})
        if expand_inputs:
            like["in_channels"] = like["out_channels"]
        check_stated(path, name)
        how: dict[str, Any] = {"device": device, "dtype": dtype, "fp32": fp32, "stored": stored, "mapped": mapped}
        module = load_transformer(path, part=PARTS[name], like=like or None, **how)
        if expand_inputs and self.like is not None:
            module.expand_input_channels(self.like["in_channels"])
        return module

    def is_fp8(self, name: str) -> bool:
        """True if the expert's weights are stored in float8. Reads the files' headers."""
        return is_fp8(read_tensors(self.need(name)))

    def vae(self, *, half: Half | None = None, device: str | torch.device = "cpu") -> WanVAE:
        """The VAE, or a half of it, frozen, in float32."""
        return load_vae(self.need("vae"), half=half, device=device)

    def text_encoder(self, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> TextEncoder:
        """The text encoder with its tokenizer, frozen."""
        path, tokenizer = self.need("text_encoder"), self.find("tokenizer")
        return load_text_encoder(path, tokenizer=tokenizer, device=device, dtype=dtype)

    def check_boundary(self, boundary: float | None) -> None:
        """Raise ValueError if the folder's model_index.json says another boundary than the chosen model, or one for a
        model without a second transformer."""
        index = None if self.folder is None else self.folder / "model_index.json"
        if index is None or not index.is_file():
            return
        stored = read_json(index).get("boundary_ratio")
        if stored is not None and not has_two_experts(self.folder):
            raise ValueError(
                f"{index} has boundary_ratio={stored} but names no transformer_2: there is no expert below the "
                "boundary. For a single model (Wan2.1, the 5B) set boundary_ratio to null there; for a pair, get the "
                "second expert"
            )
        if stored != boundary:
            raise ValueError(
                f"{index} has boundary_ratio={stored}, the chosen model has boundary={boundary}; choose model= to match"
            )


def open_base(
    weights: str | None,
    parts: Mapping[str, str | None] | None = None,
    *,
    wanted: Iterable[str] = (),
    revision: str | None = None,
    like: Mapping[str, Any] | None = None,
    locate: Callable[[str | Path], Path] = Path,
) -> Base:
    """The Base that `weights` (a folder, or a repository of the hub) and `parts` (part -> path) name.

    Of a repository only the `wanted` parts are downloaded, without those that `parts` gives; an interrupted download
    continues. ValueError for a path or a repository that does not exist, or an unknown part.
    """
    given = {name: _part_at(name, locate(path)) for name, path in (parts or {}).items() if path is not None}
    if weights is None:
        return Base(None, given, like)
    folder, repository = locate(weights), None
    if not folder.exists() and hub.is_repository(str(weights)):
        repository = str(weights)
        folder = _fetch(repository, revision, [name for name in wanted if name not in given])
    if not folder.is_dir():
        what = "is a single file: give it as parts.high_noise=, parts.vae=, ..." if folder.exists() else "is not there"
        raise ValueError(f"weights={folder} {what}; weights= takes a folder, or a repository of the hub (owner/name)")
    return Base(folder, given, like, repository)


def _part_at(name: str, path: Path) -> Path:
    """The file or folder of part `name` at `path`: `path` itself, or the part inside a model's folder."""
    if not path.exists():
        raise ValueError(f"parts.{name}={path} does not exist; give a folder or a single file")
    own = "tokenizer.json" if name == "tokenizer" else "config.json"
    if path.is_file() or (path / own).is_file():
        return path
    inside = Base(path)
    # An expert may start from a single model, as Wan2.2's low-noise expert did from Wan2.1.
    part = inside.find(name) or (inside.find("dense") if name in PARTS else None)
    if part is None:
        raise ValueError(f"parts.{name}={path} holds no {name}; give a single file, its folder, or a model's folder")
    return part


def _fetch(repository: str, revision: str | None, wanted: Iterable[str]) -> Path:
    """A snapshot of the parts `wanted` of a hub repository, on this machine."""
    patterns = [*_ALWAYS, *(pattern for name in wanted for pattern in _FILES[name])]
    return hub.fetch(repository, revision, patterns, key="weights", revision_key="revision")


def has_two_experts(folder: Path | None) -> bool | None:
    """Whether a pipeline folder's model_index.json names two experts; None where there is no such file."""
    if folder is None or not (folder / "model_index.json").is_file():
        return None
    second = read_json(folder / "model_index.json").get("transformer_2")
    return second is not None and second != [None, None]


def stated_expert(path: Path) -> str | None:
    """The expert that a part's metadata, its folder or its file name states; None if none does.

    ValueError if they contradict each other.
    """
    stated_by: dict[str, str] = {}
    if path.is_dir():
        by_folder = {folder: name for name, folder in OFFICIAL.items() if folder != "."}
        two = has_two_experts(path.parent)
        if path.name in by_folder:
            stated_by["its folder"] = by_folder[path.name]
        elif two is not None and path.name in {"transformer", "transformer_2"}:
            alone = "high_noise" if two else "dense"
            stated_by["the pipeline it lies in"] = alone if path.name == "transformer" else "low_noise"
    elif match := re.search(r"(high|low)[_-]?noise", path.name.lower()):
        stated_by["its file name"] = f"{match[1]}_noise"
    if path.suffix not in PICKLES and (stated := read_metadata(path).get("expert")) in PARTS:
        stated_by["its metadata"] = stated
    if len(set(stated_by.values())) > 1:
        raise ValueError(f"{path}: " + ", but ".join(f"{source} says {name}" for source, name in stated_by.items()))
    return next(iter(stated_by.values()), None)


def check_stated(path: Path, expert: str) -> None:
    """Raise ValueError if the part is stated to be another expert than `expert`.

    A single model may become either expert: Wan2.2's low-noise expert was fine-tuned from Wan2.1.
    """
    stated = stated_expert(path)
    if stated is not None and stated not in {expert, "dense"}:
        raise ValueError(
            f"{path} is the {stated} expert, asked for as {expert}; its tensors do not show such a "
            f"mistake. Give expert={stated}, or the other file"
        )
