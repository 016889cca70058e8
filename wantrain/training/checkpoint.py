"""Checkpoints: folders that are either complete or not there.

A checkpoint is written beside its final name, every file synced, and renamed; `state.json`, written last, holds the
hash of every other file. A kill at any moment leaves the previous checkpoint as it was. No pickles: tensors are
safetensors, the rest is json. Random state is not saved, for there is none: randomness is a function of position.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from wantrain import world
from wantrain.world import file_hash

STATE = "state.json"


class Checkpoints:
    """The checkpoints of one run, in `folder`; the newest `keep` stay."""

    def __init__(self, folder: Path, *, keep: int, **_: object) -> None:
        self.folder, self.keep = folder, keep

    def prepare(self) -> None:
        """Make the folder and clear what a kill left half written (main process only)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".*.tmp"):
            shutil.rmtree(leftover)

    def wait(self) -> None: ...

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        state: Mapping[str, Any],
        *,
        size: int = 0,
        score: float | None = None,
    ) -> Path:
        """Write checkpoint `step`: `write(folder)` puts the tensors in, `state` is what else a resume must know."""
        final = self.folder / f"step_{step:06d}"
        beside = self.folder / f".{final.name}.tmp"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        write(beside)
        files = {}
        for path in sorted(path for path in beside.rglob("*") if path.is_file()):
            world.sync_file(path)
            files[path.relative_to(beside).as_posix()] = file_hash(path)
        world.write_json(beside / STATE, {**state, "step": step, "files": files})
        for folder in {path.parent for path in beside.rglob("*")}:
            world.sync_file(folder)
        shutil.rmtree(final, ignore_errors=True)
        beside.rename(final)
        world.sync_file(self.folder)
        for old in self.complete()[: -self.keep]:
            shutil.rmtree(old)
        return final

    def complete(self) -> list[Path]:
        """All checkpoints under a final name, oldest first."""
        return sorted(path for path in self.folder.glob("step_*") if (path / STATE).is_file())

    def newest(self) -> Path | None:
        """The newest checkpoint whose files are what was written; a damaged one is passed over, and said."""
        for path in reversed(self.complete()):
            damaged = damaged_files(path)
            if not damaged:
                return path
            world.say(f"warning: {path} is damaged ({', '.join(damaged)}); trying the one before it")
        return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint."""
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    assert isinstance(state, dict)
    return state


def damaged_files(checkpoint: Path) -> list[str]:
    """The files of a checkpoint that are not what was written."""
    try:
        files = read_state(checkpoint)["files"]
    except (ValueError, KeyError):
        return [STATE]
    return [name for name, digest in files.items() if not _intact(checkpoint / name, digest)]


def _intact(path: Path, digest: str) -> bool:
    return path.is_file() and file_hash(path) == digest
