"""Bringing experts together: from runs, from base models, with LoRAs added. Used by sample.py and export.py."""

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
        say(f"alone=true: {', '.join(held)} answers for every noise level; it was trained for its own only")
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
        say(f"the base of run {expert.config['run']} is not where it was; its LoRA goes into {base}")
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
        say(f"{name}: {file} added to {count} layers at scale {scale}")


def check_loras(files: Mapping[str, str | None], names: Iterable[str]) -> None:
    """Raise ValueError for the LoRA of an expert that is not there."""
    for name, file in files.items():
        if file is not None and name not in names:
            raise ValueError(f"lora.{name}={file}: this model has {', '.join(names)}, no {name}")
