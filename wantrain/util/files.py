"""Files that are complete or absent: atomic writes, sync, hashes; and folders that are claimed before writing."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import wantrain
from wantrain.util.console import FIXES, error_number
from wantrain.util.progress import report_progress

#: Bytes that a folder must take to count as writable: a disk without a free block refuses them.
BLOCK = 4096
#: Seconds until another machine's files must show on a shared disk: NFS may remember for 60 s what was there before.
SHOWN = 90.0


def sync_file(path: Path) -> None:
    """Flush a file's content, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError that names no file (of a write, not of an open) the name of `path`; an error of the system in a
    library's own class (safetensors) becomes an OSError.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
    except Exception as error:
        if (number := error_number(error)) is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, in hex; reports progress, since a checkpoint of 170 GB takes minutes."""
    digest, chunk = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(chunk):
            report_progress(f"hashing {path}")
            digest.update(chunk[:size])
    return digest.hexdigest()


def missing_files(sizes: Mapping[Path, int], *, seconds: float | None = None) -> list[Path]:
    """The files that this machine does not see with their sizes in bytes, once `seconds` (None: SHOWN) have passed; as
    soon as it sees all of them, none. Size -1 is any.
    """
    give_up, pause = time.monotonic() + (SHOWN if seconds is None else seconds), 0.01
    left = list(sizes)
    while left := [path for path in left if not _shows(path, sizes[path])]:
        if time.monotonic() > give_up:
            return left
        report_progress(f"waiting until {left[0]} shows on this machine")
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
        for folder in {path.parent for path in left}:
            with suppress(OSError):
                os.listdir(folder)  # noqa: PTH208 - makes a network disk ask its server again
    return []


def _shows(path: Path, size: int) -> bool:
    try:
        return size in (-1, path.stat().st_size)
    except OSError:
        return False


def write_atomically(path: Path, content: str | bytes, *, sync: bool = True) -> None:
    """Write a small file; a kill leaves the complete old file or the complete new one, and so does a full disk.

    `sync=False` is for what can be made again: after a power cut the file may be empty.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path):
        try:
            with partial.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:  # a full disk gets its bytes back
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
    if sync:
        sync_file(path.parent)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, indented and with Unicode characters as they are."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def check_writable(folder: Path, *, key: str) -> None:
    """Raise ValueError if nothing can be written into `folder`, or, where it is absent, into the nearest folder above
    it: for lack of permission, or of disk space. To be called before any work; it leaves nothing.

    `key` is the config key of the folder.
    """
    existing = next((place for place in (folder, *folder.absolute().parents) if place.exists()), folder)
    if existing.is_file():
        raise ValueError(f"{key}={folder} cannot be written, because {existing} is a file; give another folder")
    try:
        with tempfile.TemporaryFile(dir=existing, buffering=0) as file:
            file.write(bytes(BLOCK))
            os.fsync(file.fileno())
    except OSError as error:
        where = "" if existing == folder else f" ({existing} is the nearest folder that there is)"
        fix = FIXES.get(error.errno or 0, "check the path and the disk")
        raise ValueError(f"{key}={folder} cannot be written{where}: {error.strerror}; {fix}") from error


def claim_folder(folder: Path, *, sentinel: str | None, key: str) -> None:
    """Create `folder` for writing. It must be absent or empty, or contain the file `sentinel` (None: absent or empty).

    Hidden files do not count: they are our own locks and partial files, which a kill may leave. ValueError otherwise;
    `key` is the config key of the folder.
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
        raise ValueError(f"{key}={folder} cannot be created ({error.strerror}); give another folder") from error
    check_writable(folder, key=key)


@functools.cache
def made_by() -> str:
    """The program's version for metadata of files, with the commit if it runs from a git checkout."""
    root = Path(wantrain.__file__).resolve().parent.parent
    commit = ""
    if (root / ".git").exists():
        words = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        with suppress(OSError):  # a machine without git
            process = subprocess.run(words, capture_output=True, text=True, check=False)
            commit = f", commit {process.stdout.strip()}" if process.returncode == 0 else ""
    return f"wantrain {wantrain.__version__}{commit}"
