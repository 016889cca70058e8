"""Where experts come from: runs, base models, LoRAs. Used by sample.py and export.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from wantrain.models import Base, WanTransformer, load_transformer, open_base
from wantrain.models.formats.base import PARTS
from wantrain.models.formats.lora import merge_lora
from wantrain.models.formats.weights import part_folder, read_tensors
from wantrain.runs.folder import TrainedExpert, read_config, trained_experts
from wantrain.runs.loras import Lora, LoraSettings
from wantrain.util.console import say
from wantrain.util.files import file_hash

#: How a path in a config is found: from the current folder, or among what ships with the project.
Locate = Callable[[str | Path], Path]


@dataclass(frozen=True)
class ExpertSources:
    """The source of each expert: the runs that trained some, and the base for the others and all other parts.

    model  the model's name in conf/model
    loras  what `load` merges into each expert, in order; a run's own LoRA is the first

    Nothing is loaded before `load`: a pair of 14B experts need not be in memory together.
    """

    names: tuple[str, ...]
    base: Base
    trained: tuple[TrainedExpert, ...]
    locate: Locate
    model: str
    loras: Mapping[str, tuple[Lora, ...]]

    def with_loras(self, settings: LoraSettings) -> ExpertSources:
        """The same with the LoRAs and strengths of `settings`.

        Every LoRA file is read once, so that a wrong one is an error before any work. ValueError as `LoraSettings.over`
        and `Lora.read`.
        """
        loras = settings.over(_own_loras(self.trained), self.names)
        for name, some in loras.items():
            for lora in some:
                lora.read(name)
        return replace(self, loras=loras)

    def load(
        self, name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> WanTransformer:
        """The expert `name`: what a run trained or the base's own, its LoRAs merged."""
        expert = self._trained(name)
        if expert is not None and expert.adapter is None:
            module = load_transformer(expert.checkpoint, part=PARTS[name], device=device, dtype=dtype)
        else:
            module = self._base_of(name, aloud=True).transformer(name, device=device, dtype=dtype)
        for lora in self.loras[name]:
            strength, alpha = lora.strength, lora.alpha
            count = merge_lora(lora.path, module, scale=strength, expert=name, base=self.model, alpha=alpha)
            if lora.run is None or lora.strength != 1:
                say(f"{name}: {lora.label} added to {count} layers at scale {lora.strength:g}")
        return module

    def _trained(self, name: str) -> TrainedExpert | None:
        return next((expert for expert in self.trained if expert.name == name), None)

    def _base_of(self, name: str, *, aloud: bool = False) -> Base:
        """The base of an expert: the one that its LoRA was trained on, unless that was moved since."""
        expert = self._trained(name)
        if expert is None:
            return self.base
        try:
            return base_of(expert.config, self.locate, [name])
        except ValueError:
            if aloud:
                run = expert.config["run"]
                say(f"the base of run {run} is not where it was; its LoRA is merged into {self.base}")
            return self.base

    def place(self, name: str) -> Path:
        """The folder or file that holds the weights of an expert, LoRAs apart."""
        expert = self._trained(name)
        return self._base_of(name).need(name) if expert is None or expert.adapter is not None else expert.checkpoint

    def places(self, parts: Iterable[str]) -> list[Path]:
        """Everything that is read: the experts' weights, their LoRAs, and the given parts of the base."""
        loras = [lora.path for some in self.loras.values() for lora in some]
        found = [place for part in parts if (place := self.base.find(part)) is not None]
        return [*(self.place(name) for name in self.names), *loras, *found]

    def num_parameters(self) -> int:
        """Parameters of all experts together, from the headers of their files."""
        count = 0
        for name in self.names:
            place = self.place(name)
            tensors = read_tensors(place if place.is_file() else part_folder(place, PARTS[name]))
            count += sum(tensor.numel() for tensor in tensors.values())
        return count

    def num_bytes(self, parts: Iterable[str]) -> int:
        """Bytes of the files of the given parts of the base."""
        places = (self.base.find(part) for part in parts)
        return sum(file.stat().st_size for place in places if place is not None for file in _files_below(place))

    def identity(self) -> str:
        """Twelve hex digits: a hash of all weights that sampling reads, and of the place that each has.

        Of a LoRA the contents count, with its expert, its strength and its alpha; of other files name, size and time:
        to hash 100 GB would take longer than a video.
        """
        parts = {name: self.base.find(name) for name in ("vae", "text_encoder", "tokenizer")}
        places = {**parts, **{name: self.place(name) for name in self.names}}
        files = {name: [_state_of(file) for file in _files_below(place)] for name, place in places.items() if place}
        loras = {
            name: [[[file_hash(file) for file in _files_below(lora.path)], lora.strength, lora.alpha] for lora in some]
            for name, some in self.loras.items()
        }
        return hashlib.sha256(json.dumps([self.model, files, loras], sort_keys=True).encode()).hexdigest()[:12]

    def label(self) -> str:
        """The runs and their steps, or the base's name."""
        runs = dict.fromkeys(f"{expert.config['run']} step {expert.step}" for expert in self.trained)
        return " + ".join(runs) or self.base.name

    def origin(self) -> dict[str, dict[str, object]]:
        """Where each expert came from, for the metadata of its file and the model card."""
        origin: dict[str, dict[str, object]] = {name: {"base": self.base.name} for name in self.names}
        for name, some in self.loras.items():
            if merged := [_merged(lora) for lora in some if lora.run is None or lora.strength != 1]:
                origin[name]["merged"] = ", ".join(merged)
        for expert in self.trained:
            facts = {"run": expert.config["run"], "step": expert.step}
            settings = {"recipe": expert.config.get("recipe"), "adapter": expert.config["adapter"]["name"]}
            origin[expert.name] |= {**facts, **settings, "base": Path(str(expert.config["weights"])).name}
        return origin


def _own_loras(trained: Iterable[TrainedExpert]) -> dict[str, Lora]:
    """What runs trained beside frozen weights, by expert."""
    return {
        expert.name: Lora(expert.adapter, run=str(expert.config["run"]))
        for expert in trained
        if expert.adapter is not None
    }


def _merged(lora: Lora) -> str:
    return lora.label if lora.strength == 1 else f"{lora.label} x {lora.strength:g}"


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

    `alone` takes a single expert of a pair: the one that `run` trained, or the only one that `base` holds.
    ValueError where one is missing without `alone`, where `alone` does not choose one, or a run trained another model.
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
    rest = [name for name in names if name not in covered and not (alone and covered)]
    if base is None:
        base = base_of(trained[0].config, locate, [*rest, "vae", "text_encoder", "tokenizer"])
    elif trained:
        base = replace(base, like=trained[0].config["model"]["transformer"])
    if any(base.holds(name) for name in rest):
        base.check_boundary(boundary)
    held = tuple(name for name in names if name in covered or (name in rest and base.holds(name)))
    missing = [name for name in names if name not in held]
    if missing and not (alone and held):
        raise ValueError(
            f"{', '.join(missing)} is missing: neither run={run} nor {base} has it. Give both runs (run=ONE,OTHER), or "
            "weights= with a pipeline that holds it; sample.py alone=true uses one expert for every noise level"
        )
    if alone and not missing:
        raise ValueError(
            f"alone=true takes one expert, and {', '.join(held)} are given (run={run}, weights={base}); leave it out, "
            "or give the run of one of them"
        )
    if missing:
        say(f"alone=true: {', '.join(held)} is used for every noise level, though trained for its own window only")
    loras = LoraSettings({}).over(_own_loras(trained), held)
    return ExpertSources(held, base, tuple(trained), locate, model, loras)


def check_used(found: Collection[ExpertSources], loras: LoraSettings, given: Iterable[str]) -> None:
    """ValueError for a setting of a LoRA, or a guidance scale that was given, whose expert is nowhere in `found`."""
    loras.check_used([sources.loras for sources in found])
    names = {name for sources in found for name in sources.names}
    for key in sorted(given):
        group, _, name = key.partition(".")
        if group == "guidance" and name and name not in names:
            raise ValueError(f"{key} has no effect: alone=true leaves {name} out; leave out one of them")


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
