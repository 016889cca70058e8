"""Fingerprints of encoders that need not be loaded: noted beside what they made, while their files stay as they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wantrain import world

NOTES = ".fingerprints.json"


class Fingerprints:
    """Facts about parts of a model, as noted in `folder`: `of` finds them or looks again, `write` notes what it saw."""

    def __init__(self, folder: Path) -> None:
        self._notes = folder / NOTES
        self._known: dict[str, Any] = {}
        if self._notes.is_file():
            self._known = json.loads(self._notes.read_text(encoding="utf-8"))
        self._seen: dict[str, Any] = {}

    def of(self, about: str, paths: list[Path], look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """`look()`, or what it gave when path, size and time of every file below `paths` were what they are now.

        `about` says what else the facts depend on.
        """
        files = sorted(file for path in paths for file in [path, *path.rglob("*")] if file.is_file())
        seen = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        key = hashlib.sha256(json.dumps([about, seen]).encode()).hexdigest()[:32]
        self._seen[key] = self._known[key] if key in self._known else look()
        return dict(self._seen[key])

    def write(self) -> None:
        """Note what was asked for, and nothing older; rank 0 only."""
        if world.is_main() and self._seen != self._known:
            world.write_json(self._notes, self._seen)
