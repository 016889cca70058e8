"""Where experts come from: runs, base models, LoRA files. Used by sample.py and export.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from wantrain.models import Base, WanTransformer, load_transformer, open_base
from wantrain.models.formats.base import PARTS
from wantrain.models.formats.lora import merge_lora
from wantrain.runs.folder import TrainedExpert, read_config, trained_experts
from wantrain.util.console import say

#: How a path in a config is found: from the current folder, or among what ships with the project.
Locate = Callable[[str | Path], Path]


@dataclass(frozen=True)
class ExpertSources:
    """The source of each expert: the runs that trained some, and the base for the others and all other parts.

    Nothing is loaded before `load`: a pair of 14B experts need not be in memory together.
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
        """Hash of name, size and time of every file that sampling reads, and of `more` (LoRA files).

        The contents are not hashed: 100 GB would take longer than a video.
        """
        places = [part for name in ("vae", "text_encoder", "tokenizer") if (part := self.base.find(name)) is not None]
        trained = {expert.name: expert for expert in self.trained}
        for name in self.names:
            expert = trained.get(name)
            if expert is not None:
                places.append(expert.checkpoint if expert.adapter is None else expert.adapter)
            if expert is None or expert.adapter is not None:
                places += [path for path in [self.base.find(name)] if path is not None]
        files = [_state_of(file) for place in [*places, *map(Path, more)] for file in _files_below(place)]
        return hashlib.sha256(json.dumps([self.names, files]).encode()).hexdigest()[:12]

    def label(self) -> str:
        """The runs and their steps, or the base's name."""
        runs = dict.fromkeys(f"{expert.config['run']} step {expert.step}" for expert in self.trained)
        return " + ".join(runs) or self.base.name

    def origin(self) -> dict[str, dict[str, object]]:
        """Where each expert came from, for the metadata of its file and the model card."""
        origin: dict[str, dict[str, object]] = {name: {"base": self.base.name} for name in self.names}
        for expert in self.trained:
            facts = {"run": expert.config["run"], "step": expert.step}
            settings = {"recipe": expert.config.get("recipe"), "adapter": expert.config["adapter"]["name"]}
            origin[expert.name] = {**facts, **settings, "base": Path(str(expert.config["weights"])).name}
        return origin


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
) -> ExpertSources:
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
    covered = {expert.name for expert in trained}
    rest = [name for name in names if name not in covered]
    if base is None:
        base = base_of(trained[0].config, locate, [*rest, "vae", "text_encoder", "tokenizer"])
    elif trained:
        base = replace(base, like=trained[0].config["model"]["transformer"])
    if any(base.holds(name) for name in rest):
        base.check_boundary(boundary)
    held = tuple(name for name in names if name in covered or base.holds(name))
    missing = [name for name in names if name not in held]
    if missing and not (alone and held):
        raise ValueError(
            f"{', '.join(missing)} is missing: neither run={run} nor {base} has it. Give both runs (run=ONE,OTHER), or "
            "weights= with a pipeline that holds it; sample.py alone=true uses one expert for every noise level"
        )
    if missing:
        say(f"alone=true: {', '.join(held)} is used for every noise level, though trained for its own window only")
    return ExpertSources(held, base, tuple(trained), locate)


def find_compared(
    names: list[str], find: Callable[[str | None, Base | None], ExpertSources], *, runs: str | Path, locate: Locate
) -> dict[str, ExpertSources]:
    """The experts of each name in a comparison, all found before the first video is made.

    A name is a run, a pair of runs ("high+low"), or "base": weights=, or else the base of the first run.
    `find(run, base)` finds experts.
    """
    first = next((name.split("+")[0] for name in names if name != "base"), None)
    found: dict[str, ExpertSources] = {}
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
    except ValueError:  # moved since: the given base is used instead
        say(f"the base of run {expert.config['run']} is not where it was; its LoRA is merged into {base}")
    module = base.transformer(expert.name, device=device, dtype=dtype)
    merge_lora(expert.adapter, module, expert=expert.name)
    return module


@dataclass(frozen=True)
class Loras:
    """LoRA files to merge, by expert.

    scale  strength of all of them
    alpha  for files that do not hold theirs
    """

    files: Mapping[str, str]
    scale: float = 1.0
    alpha: float | None = None

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Loras:
        """From a config's lora: a file or None for each expert, scale and alpha."""
        files = {name: file for name, file in settings.items() if name not in {"scale", "alpha"} and file is not None}
        return cls(files, settings["scale"], settings["alpha"])

    def only(self, expert: str) -> Loras:
        """The file for one expert, if there is one."""
        return replace(self, files={name: file for name, file in self.files.items() if name == expert})


def add_loras(experts: Mapping[str, WanTransformer], loras: Loras, *, model: str) -> None:
    """Merge LoRA files into their experts. ValueError for the file of an expert that is not there."""
    check_loras(loras.files, experts)
    for name, file in loras.files.items():
        count = merge_lora(file, experts[name], scale=loras.scale, expert=name, base=model, alpha=loras.alpha)
        say(f"{name}: {file} added to {count} layers at scale {loras.scale}")


def check_loras(files: Mapping[str, str], names: Iterable[str]) -> None:
    """Raise ValueError for the LoRA file of an expert that is not there."""
    for name, file in files.items():
        if name not in names:
            raise ValueError(f"lora.{name}={file}: this model has {', '.join(names)}, no {name}")
