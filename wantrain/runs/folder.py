"""The run folder: `runs/<name>/` with config.yaml, run.json, metrics.jsonl, checkpoints/, samples/.

The same name and the same config continue a run; another config is refused, naming the settings that differ. The name
is the folder's, and files are the same wherever they lie: a run goes on when its folder was renamed or its base moved.
The stored config is data: it is read and compared, never instantiated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from wantrain.models.formats.weights import read_json
from wantrain.runs.checkpoint import Checkpoints, read_state
from wantrain.runs.lock import RunLock
from wantrain.util.files import claim_folder, write_atomically
from wantrain.util.renamed import ADDED, upgraded_config

CONFIG = "config.yaml"
ADAPTER = "adapter.safetensors"
#: Folder of a checkpoint with the averaged weights, in the same layout as the weights.
EMA = "ema"

#: Settings that may differ between two starts of one run: they do not change what has been computed so far.
#: Shards may be elsewhere: a checkpoint holds their manifest's hash.
FREE = (
    "run",  # the folder's name, which may be given another
    "recipe",
    "check_expert",
    "device",
    "steps",
    "epochs",
    "runs",
    "tracker",
    "checkpoint",
    "validation",
    "safeguards",
    "sample",
    "dry_run",
    "stop_after",
    "replay",
    "data.shards",
    "data.pairs",  # its contents' hash is part of the data's
    "data.cache",
    "data.cache_gb",
    "data.schedule",  # its entries up to the checkpoint's step are compared when the run goes on
    "loss.batch_size",  # equals batch_size, which is compared
    "data.batch_size",
    "model.train",  # defaults of settings that are compared themselves
    "attention",  # changes rounding at most, as do the next eight and the number of processes
    "compile",
    "sequence_parallel",
    "accumulate",
    "memory",
    "recompute",
    "activations",
    "swap",
    "update_in_backward",
)
#: Settings that say where files lie. They may differ between two starts if the files are the same (`sources` of open).
PLACES = ("weights", "revision", "parts", "model.weights", "adapter.init", "experts.high_noise.init",
          "experts.low_noise.init")  # fmt: skip
#: Names that a run cannot have: sample.py compare=[base] means the base model.
RESERVED = ("base",)
#: Longest name of a run in bytes; file systems take 255, and exported files append to it.
LONGEST_NAME = 200


def check_name(name: str) -> None:
    """Raise ValueError for a run's name that cannot be used later: in a path, or in run=ONE,OTHER and compare=."""
    name = str(name)
    why = ""
    if found := re.search(r"[,+/\\\x00-\x1f\x7f]", name):
        why = f"contains {found[0]!r}, which separates runs in run=ONE,OTHER and compare=, or folders"
    elif not name.strip() or name != name.strip():
        why = "is empty, or begins or ends with a blank"
    elif name.startswith("."):
        why = "begins with a dot, so it would be a hidden folder"
    elif name in RESERVED:
        why = "means the base model in compare="
    elif len(name.encode()) > LONGEST_NAME:
        why = f"has {len(name.encode())} bytes, more than {LONGEST_NAME}"
    if why:
        raise ValueError(
            f"run={name!r} {why}; give a name of letters, digits, '_', '-', '.' and '='. An earlier run of that name "
            "goes on when its folder is renamed"
        )


@dataclass
class RunFolder:
    """One run's folder, held by one process at a time (lock.py)."""

    path: Path
    lock: RunLock | None = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def record(self) -> Path:
        return self.path / "run.json"

    @property
    def safeguards(self) -> Path:
        return self.path / "safeguards.jsonl"

    @property
    def validation(self) -> Path:
        """How much validation measures, where that was chosen for the run."""
        return self.path / "validation.json"

    @property
    def eval_history(self) -> Path:
        return self.path / "validation.jsonl"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def open(self, config: dict[str, Any], sources: Mapping[str, str] | None = None) -> bool:
        """Make the folder or continue in it; True if it existed. Main process only. ValueError for another config.

        `sources` are the identities of the files that the run starts from, by what they are for. Where an earlier start
        recorded the same ones, the paths in PLACES may differ; others are refused whatever the paths say.
        """
        existed = (self.path / CONFIG).is_file()
        claim_folder(self.path, sentinel=CONFIG, key="run")
        self.lock = RunLock(self.path)
        if existed:
            self._check(config, dict(sources or {}))
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        write_atomically(self.path / CONFIG, text)
        return existed

    def _check(self, config: dict[str, Any], sources: Mapping[str, str]) -> None:
        """Raise ValueError unless the run may go on with `config` and the files `sources`."""
        before = self.sources()
        if before is not None and before != sources:
            keys = sorted(key for key in before.keys() | sources.keys() if before.get(key) != sources.get(key))
            raise ValueError(
                f"run {self.path.name} started from other files: {', '.join(keys)} differs in content (weights=, "
                "parts= or init=). Give those it started from, wherever they lie now, or the new run its own name "
                "(run=NAME)"
            )
        differing = differences(read_config(self.path), config, same_files=before is not None)
        if not differing:
            return
        moved = ""
        if before is None and any(_is_place(line.split(":")[0]) for line in differing):
            moved = (
                "; the run is of a version that did not record what these files were, so where they only moved, put a "
                "link at the old place"
            )
        raise ValueError(
            f"run {self.path.name} exists with another config: {'; '.join(differing)}. "
            f"Give the new run its own name (run=NAME), or put these back{moved}"
        )

    def sources(self) -> dict[str, str] | None:
        """The identities of the files that the run started from; None for a run that did not record them."""
        starts = read_json(self.record).get("starts", []) if self.record.is_file() else []
        return next((dict(start["sources"]) for start in starts if "sources" in start), None)


def read_config(folder: Path) -> dict[str, Any]:
    """The stored config of a run, as plain data with today's names; `run` is the folder's name. ValueError if there is
    no such run.
    """
    path = folder / CONFIG
    if not path.is_file():
        names = sorted(other.parent.name for other in folder.parent.glob(f"*/{CONFIG}"))
        raise ValueError(
            f"there is no run {folder.name} in {folder.parent}; {'it has ' + ', '.join(names) if names else 'none yet'}"
        )
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(config, dict)
    return {**upgraded_config(config), "run": folder.name}


def differences(old: dict[str, Any], new: dict[str, Any], *, same_files: bool = False) -> list[str]:
    """`key: old -> new` of every setting that differs and may not; with `same_files`, paths in PLACES may."""
    before, after = flat(old), flat(new)
    before = {key: value for key, value in ADDED.items() if key in after} | before
    name = after.get("expert.name")  # what `experts` says of others than this one has no effect without a pair
    pair = "both" in (before.get("expert.name"), name)
    heard = "experts." if pair else f"experts.{name}."
    compared = [key for key in before.keys() | after.keys() if not key.startswith("experts.") or key.startswith(heard)]
    keys = sorted(key for key in compared if not _is_free(key) and not (same_files and _is_place(key)))
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys if before.get(key) != after.get(key)]


def _is_free(key: str) -> bool:
    moved = re.fullmatch(r"data\.sets\.[^.]+\.(shards|cache|cache_gb)", key) is not None
    return moved or _is_below(key, FREE)


def _is_place(key: str) -> bool:
    return _is_below(key, PLACES)


def _is_below(key: str, groups: tuple[str, ...]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted keys."""
    if not isinstance(config, dict):
        return {prefix: config}
    found: dict[str, Any] = {}
    for key, value in config.items():
        found.update(flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return found


@dataclass(frozen=True)
class TrainedExpert:
    """An expert in the newest good checkpoint of a run.

    checkpoint  the folder with its weights: the averaged ones, if the run keeps an average
    config      the run's stored config, as data
    """

    name: str
    checkpoint: Path
    config: dict[str, Any]
    step: int

    @property
    def adapter(self) -> Path | None:
        """The adapter file, if the run trained one."""
        path = self.checkpoint / ADAPTER
        return path if path.is_file() else None


def trained_experts(names: str, runs: str | Path) -> list[TrainedExpert]:
    """The trained experts of the runs `names`: "one", which may have trained both, or "one,other".

    ValueError if a run is absent or has no checkpoint yet, or if two runs do not make a pair.
    """
    trained = []
    for name in names.split(","):
        folder = RunFolder(Path(runs).expanduser() / name.strip())
        config = read_config(folder.path)
        newest = Checkpoints(folder.checkpoints, keep=1).newest()
        if newest is None:
            raise ValueError(f"run {folder.path} has no checkpoint yet; let it reach checkpoint.every steps")
        pair = config["expert"]["name"] == "both"
        for expert in config["model"]["experts"] if pair else [config["expert"]["name"]]:
            place = newest / expert if pair else newest
            place = place / EMA if (place / EMA).is_dir() else place
            trained.append(TrainedExpert(expert, place, config, read_state(newest)["step"]))
    twice = {expert.name for expert in trained if sum(other.name == expert.name for other in trained) > 1}
    if twice:
        raise ValueError(
            f"run={names}: more than one of these runs trained {', '.join(twice)}; name one run per expert"
        )
    models = {expert.config["model"]["name"] for expert in trained}
    if len(models) > 1:
        raise ValueError(f"run={names}: these runs trained different models ({', '.join(sorted(models))})")
    return trained
