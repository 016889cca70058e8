"""Files that are whole or absent: synced, hashed, written atomically; folders that are claimed before writing."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wantrain
from wantrain.util.progress import report_progress


def sync_file(path: Path) -> None:
    """Make a file's content, or a folder's names, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, in hex; tells of its progress, for a checkpoint of 170 GB takes minutes."""
    digest, chunk = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(chunk):
            report_progress(f"hashing {path}")
            digest.update(chunk[:size])
    return digest.hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file so that a kill leaves the old one or the new one, never half of either."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync_file(path.parent)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """`write_atomically` for a JSON object, readable by people (indented, Unicode as it is)."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def claim_folder(folder: Path, *, sentinel: str | None, key: str) -> None:
    """Make `folder` ours to write into, or refuse: it must be absent, empty, or hold the file `sentinel` (None:
    no such).

    Hidden files do not count: they are our own locks and half-written files, which a kill may leave.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{key}={folder} is a file; give a folder")
    holds = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
    if holds and (sentinel is None or not (folder / sentinel).exists()):
        why = "" if sentinel is None else f" (no {sentinel} in it)"
        raise ValueError(f"{key}={folder} holds something else{why}; give a new or empty folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{key}={folder} cannot be made ({error.strerror}); give a folder that can be") from error


@functools.cache
def made_by() -> str:
    """What files say wrote them: this version, and the commit where it runs from a checkout."""
    root = Path(wantrain.__file__).resolve().parent.parent
    commit = ""
    if (root / ".git").exists():
        asked = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
        )
        commit = f", commit {asked.stdout.strip()}" if asked.returncode == 0 else ""
    return f"wantrain {wantrain.__version__}{commit}"
