"""Who am I: ranks from the environment, threads, randomness by position, run folders, and speaking once.

Randomness is a function of position, never of history: `generator(seed, "noise", 1234)` is the same stream on any
rank, in any process, before and after a resume. So nothing about random state is ever saved.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import wantrain


def rank() -> int:
    """This process among all, from the environment a launcher sets (0 without one)."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes the launcher started (1 without one)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process among those on its machine (0 without a launcher)."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """How many processes the launcher started on this machine (1 without one)."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


def is_main() -> bool:
    """True in the one process that writes and speaks."""
    return rank() == 0


def say(message: str) -> None:
    """Tell the user something, once: rank 0 only, on standard output, at once."""
    if is_main():
        print(message, flush=True)


_listeners: list[Callable[[str], None]] = []


def progress(doing: str) -> None:
    """A unit of work is done and `doing` begins: whoever listens is told, a watchdog for one. Cheap: call it often."""
    for listener in tuple(_listeners):
        listener(doing)


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """While active, `listener(doing)` is called at every `progress`, in the thread that made it."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def single_process(verb: str) -> None:
    """Raise ValueError if a launcher started several processes of a verb that works as one."""
    if world_size() > 1:
        raise ValueError(f"{verb} runs as one process, but {world_size()} were started; use python {verb}")


def cores() -> int:
    """This process's share of the cores of its machine."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, available // local_world_size())


def set_threads() -> None:
    """Give each process its share of the cores.

    A bare `accelerate launch` sets OMP_NUM_THREADS=1 and `python` uses all cores: losses would then differ between
    the two in the last digits and the first be half as fast. WANTRAIN_THREADS overrides.
    """
    torch.set_num_threads(int(os.environ.get("WANTRAIN_THREADS", cores())))


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


def seed_at(*position: int | str) -> int:
    """A 63-bit seed that is a fixed function of where we are: (seed, purpose, counts...)."""
    digest = hashlib.blake2b(json.dumps(position).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*position: int | str) -> torch.Generator:
    """A CPU generator for one position, e.g. (seed, "noise", sample position); equal on every device and world."""
    return torch.Generator().manual_seed(seed_at(*position))


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
            progress(f"hashing {path}")
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


def claim_folder(folder: Path, *, mark: str | None, key: str) -> None:
    """Make `folder` ours to write into, or refuse: it must be absent, empty, or hold the file `mark` (None: no such).

    Hidden files do not count: they are our own locks and half-written files, which a kill may leave.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{key}={folder} is a file; give a folder")
    holds = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
    if holds and (mark is None or not (folder / mark).exists()):
        why = "" if mark is None else f" (no {mark} in it)"
        raise ValueError(f"{key}={folder} holds something else{why}; give a new or empty folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{key}={folder} cannot be made ({error.strerror}); give a folder that can be") from error


@contextmanager
def errors_to_exit_code() -> Iterator[None]:
    """At the door of a program: a ValueError is one clear line for the user and exit code 2; the rest is a bug."""
    try:
        yield
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def alone() -> dict[str, str]:
    """The environment for a child that is to run by itself, not as one of the launcher's processes."""
    launcher = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "OMP_NUM_THREADS",
    )
    return {key: value for key, value in os.environ.items() if key not in launcher and "ACCELERATE" not in key}
