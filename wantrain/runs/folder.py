"""The run folder: `runs/<name>/` with config.yaml, run.json, metrics.jsonl, checkpoints/, samples/.

The same name and the same config continue a run; another config is refused, naming the settings that differ. The stored
config is data: it is read and compared, never instantiated.
"""

from __future__ import annotations

import fcntl
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from wantrain.runs.checkpoint import Checkpoints, read_state
from wantrain.util.files import claim_folder, write_atomically
from wantrain.util.renamed import upgraded_config

CONFIG = "config.yaml"
ADAPTER = "adapter.safetensors"
#: Folder of a checkpoint with the averaged weights, in the same layout as the weights.
EMA = "ema"

#: Settings that may differ between two starts of one run: they do not change what has been computed so far.
#: Shards may be elsewhere: a checkpoint holds their manifest's hash.
FREE = (
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
    "data.cache",
    "data.cache_gb",
    "loss.batch_size",  # equals batch_size, which is compared
    "model.train",  # defaults of settings that are compared themselves
    "model.transformer.attention",  # changes rounding at most, as do the next two and the number of processes
    "accumulate",
    "gradient_checkpointing",
)


@dataclass
class RunFolder:
    """One run's folder, held by one process at a time (on this machine)."""

    path: Path
    lock: IO[str] | None = None

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

    def open(self, config: dict[str, Any]) -> bool:
        """Make the folder or continue in it; True if it existed. Main process only. ValueError for another config."""
        existed = (self.path / CONFIG).is_file()
        claim_folder(self.path, sentinel=CONFIG, key="run")
        self._lock()
        if existed:
            differing = differences(read_config(self.path), config)
            if differing:
                raise ValueError(
                    f"run {self.path.name} exists with another config: {'; '.join(differing)}. "
                    f"Give the new run its own name (run=NAME), or put these back, or remove {self.path}"
                )
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        write_atomically(self.path / CONFIG, text)
        return existed

    def _lock(self) -> None:
        """Keep other processes out of the folder; the kernel releases the lock when this process ends."""
        self.lock = (self.path / ".lock").open("a+")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.seek(0)
            holder = self.lock.read().strip() or "another process"
            raise ValueError(f"run {self.path.name} is being trained by {holder}; wait or stop it") from None
        except OSError as error:  # a network disk without locks: two processes in one folder would corrupt it
            raise ValueError(
                f"run {self.path.name} cannot be locked ({error}); give runs= a folder on a disk with locks"
            ) from error
        self.lock.truncate(0)
        self.lock.write(f"process {os.getpid()} on {os.uname().nodename}")
        self.lock.flush()


def read_config(folder: Path) -> dict[str, Any]:
    """The stored config of a run, as plain data with today's names. ValueError if there is no such run."""
    path = folder / CONFIG
    if not path.is_file():
        names = sorted(other.parent.name for other in folder.parent.glob(f"*/{CONFIG}"))
        raise ValueError(
            f"there is no run {folder.name} in {folder.parent}; {'it has ' + ', '.join(names) if names else 'none yet'}"
        )
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(config, dict)
    return upgraded_config(config)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`key: old -> new` of every setting that differs and may not."""
    before, after = _flat(old), _flat(new)
    pair = "both" in (before.get("expert.name"), after.get("expert.name"))  # without one, `experts` has no effect
    compared = [key for key in before.keys() | after.keys() if pair or not key.startswith("experts.")]
    keys = sorted(key for key in compared if not _is_free(key))
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys if before.get(key) != after.get(key)]


def _is_free(key: str) -> bool:
    moved = re.fullmatch(r"data\.sets\.[^.]+\.(shards|cache|cache_gb)", key) is not None
    return moved or any(key == free or key.startswith(f"{free}.") for free in FREE)


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted keys."""
    if not isinstance(config, dict):
        return {prefix: config}
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat.update(_flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


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
