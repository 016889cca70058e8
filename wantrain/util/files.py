"""Files that are complete or absent: atomic writes, sync, hashes; and folders that are claimed before writing."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wantrain
from wantrain.util.progress import report_progress


def sync_file(path: Path) -> None:
    """Flush a file's content, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, in hex; reports progress, since a checkpoint of 170 GB takes minutes."""
    digest, chunk = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(chunk):
            report_progress(f"hashing {path}")
            digest.update(chunk[:size])
    return digest.hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file; a kill leaves the complete old file or the complete new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_file(path.parent)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, indented and with Unicode characters as they are."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


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


#: Errors of a disk or of permissions: nothing that the program could have done otherwise.
DISK_ERRORS = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
)


def check_writable(folder: Path, *, key: str) -> None:
    """Raise ValueError unless `folder` can be written, or can be created; `key` is its config key. Writes nothing."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"{key}={folder} cannot be a folder, because {existing} is a file; give another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{key}={folder} cannot be written (no permission in {existing}); give another folder")
    if os.statvfs(existing).f_bavail == 0:
        raise ValueError(
            f"{key}={folder} cannot be written (no space is left); free some space, or give another folder"
        )


@contextmanager
def disk_errors_in(folder: Path, *, key: str) -> Iterator[None]:
    """Turn an error of the disk or of permissions into a ValueError with the file and the fix."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise ValueError(
            f"{key}={folder}: {error.filename or 'a file'}: {error.strerror}; what is finished stays: free space or "
            "correct the permissions, and start the same command again"
        ) from error


@functools.cache
def made_by() -> str:
    """The program's version for metadata of files, with the commit if it runs from a git checkout."""
    root = Path(wantrain.__file__).resolve().parent.parent
    commit = ""
    if (root / ".git").exists():
        process = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
        )
        commit = f", commit {process.stdout.strip()}" if process.returncode == 0 else ""
    return f"wantrain {wantrain.__version__}{commit}"
