"""Checkpoints: folders that are either complete or absent.

A checkpoint is written under a temporary name, every file is synced, and the folder is renamed: from then on it is
visible. `state.json`, written last, holds the hash of every other file; hashes of tensors are made while they are
written, so that nothing is read again. A kill at any moment leaves the previous checkpoint as it was. A checkpoint is
deleted by renaming it first, then removing its files. A disk error is one message with its fix. No pickles: tensors are
safetensors, the rest is json. There is no random state to save: randomness is a function of position.

Hidden folders are temporary: `.step_N.tmp` is being written, `.step_N.old` was replaced by another step_N (and is
renamed back if that one is absent), `.step_N.gone` is being deleted.
"""

from __future__ import annotations

import copy
import errno
import functools
import importlib.metadata
import math
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

import wantrain
from wantrain.models.formats.weights import PICKLES, read_json
from wantrain.util import renamed
from wantrain.util.console import say
from wantrain.util.files import file_hash, sync_file, write_json
from wantrain.util.progress import report_progress
from wantrain.util.renamed import upgraded_fields
from wantrain.util.restarts import Transient

STATE = "state.json"
#: Writes a checkpoint's tensors into a folder; may return the sha256 of files that it hashed while writing them.
Write = Callable[[Path], Mapping[Path, str] | None]
#: What to do when a checkpoint cannot be written.
ON_FAILURE = ("stop", "continue")
#: Bytes of disk that a checkpoint must leave free, for the log and for other programs.
RESERVE = 16 << 20
#: A larger state.json was not written here; it is not read, so that it cannot fill the memory.
STATE_BYTES = 4 << 20
#: Suffixes of files that a loader may open.
_LOADABLE = PICKLES | {".safetensors", ".json", ".pkl", ".ckpt"}

_FIXES = {
    errno.ENOSPC: "free disk space, lower checkpoint.keep, or move the run to a larger disk (runs=)",
    errno.EDQUOT: "free some of your quota, lower checkpoint.keep, or move the run to another disk (runs=)",
    errno.EFBIG: "raise the largest file size allowed (ulimit -f), or move the run to another disk (runs=)",
    errno.EACCES: "make the folder writable, or move the run (runs=)",
    errno.EPERM: "make the folder writable, or move the run (runs=)",
    errno.EROFS: "make the disk writable, or move the run (runs=)",
}
_OTHER_FIX = "check the path and the disk, or move the run to another disk (runs=)"


class Checkpoints:
    """The checkpoints of one run, in `folder`; one process writes them.

    keep        how many of the newest stay
    keep_every  every step that it divides stays for ever (None: no such rule)
    keep_best   the one with the lowest score stays
    background  `save` returns before anything is written; one thread writes, `wait` waits for it
    on_failure  a disk error is a ValueError ("stop"), or a warning and training goes on ("continue")
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        keep_every: int | None = None,
        keep_best: bool = False,
        background: bool = False,
        on_failure: str = "stop",
    ) -> None:
        assert keep >= 1 and on_failure in ON_FAILURE
        self.folder, self.keep, self.keep_every, self.keep_best = folder, keep, keep_every, keep_best
        self.background, self.on_failure = background, on_failure
        # An executor's thread is no daemon: the interpreter waits for its write before it exits.
        self._writer = futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._under_way: futures.Future[None] | None = None
        #: Why the last checkpoint could not be written; None if it was.
        self.failure: str | None = None

    def prepare(self) -> None:
        """Make the folder and clean up after a kill (main process only). ValueError for a disk error."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in self._hidden("old"):
                final = self.folder / old.stem.removeprefix(".")
                if not final.exists():  # killed between the two renames of a replacement
                    old.rename(final)
            for leftover in [*self._hidden("tmp"), *self._hidden("old"), *self._hidden("gone")]:
                shutil.rmtree(leftover)
        except OSError as error:
            raise ValueError(f"checkpoints cannot be kept in {self.folder}: {_why(error)}") from error

    def save(
        self,
        step: int,
        write: Write,
        state: Mapping[str, Any],
        *,
        size: int = 0,
        score: float | None = None,
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        """Write checkpoint `step`, after waiting for the one being written, whose error is raised here.

        write  writes the tensors into a folder and returns hashes that it knows. In the background it runs while
               training goes on, so it must write copies (`Copier`), nothing that a step changes
        state  whatever else a resume needs, as json
        size   bytes the checkpoint will take; without that much free disk nothing is written
        score  a validation loss, the lower the better; NaN and None are never best
        ended  called when the save is over, whether it is complete or has failed
        """
        self.wait()
        with self._failures(step, size), ExitStack() as ending:
            ending.callback(ended)
            self._require(size)
            if self.background:
                snapshot, later = copy.deepcopy(dict(state)), ending.pop_all()
                self._under_way = self._writer.submit(self._write_behind, step, write, snapshot, size, score, later)
            else:
                self._write(step, write, state, score)

    def wait(self) -> None:
        """Wait until the checkpoint being written is complete; raises its error, once."""
        if self._under_way is not None:
            futures.wait([self._under_way])  # before it is forgotten: an interrupt may end this wait
            under_way, self._under_way = self._under_way, None
            under_way.result()

    def finish(self) -> None:
        """`wait`, at the end of a run: Transient if the last checkpoint is missing, also with "continue"."""
        self.wait()
        if self.failure is not None:
            raise Transient(f"the last checkpoint is missing: {self.failure}; the same command goes on from it")

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the checkpoint being written, also where the run ends with an error."""
        with suppress(Exception) if error is not None else nullcontext():
            self.wait()

    def complete(self) -> list[Path]:
        """All complete checkpoints, oldest first."""
        named = (path for path in self.folder.glob("step_*") if re.fullmatch(r"step_(\d{6}|[1-9]\d{6,})", path.name))
        return sorted((path for path in named if (path / STATE).is_file()), key=_step)

    def newest(self) -> Path | None:
        """The newest checkpoint whose files match their hashes; damaged ones are skipped with a warning.

        ValueError if it contains other files that a loader might open: the user can remove those, so that the run need
        not go back to an older checkpoint.
        """
        for path in reversed(self.complete()):
            damaged = damaged_files(path)
            if damaged:
                say(f"warning: {path} is damaged ({', '.join(damaged)}); trying the one before it")
                continue
            foreign = _foreign_files(path)
            if foreign:
                raise ValueError(
                    f"{path} holds {', '.join(foreign)}, which wantrain did not write; move that elsewhere"
                )
            return path
        return None

    def _require(self, size: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < size + RESERVE:
            raise OSError(errno.ENOSPC, f"disk full: {free:,} bytes are free, {size + RESERVE:,} needed")

    @contextmanager
    def _failures(self, step: int, size: int) -> Iterator[None]:
        """Turn a disk error into a Transient or a warning, by `on_failure`. Any other error is a bug."""
        try:
            yield
        except OSError as error:
            what = f"checkpoint {self._final(step)} of {size:,} bytes" if size else f"checkpoint {self._final(step)}"
            self.failure = f"{what} could not be written: {_why(error)}. Those before it are as they were"
            if self.on_failure == "stop":
                raise Transient(self.failure) from error
            say(f"warning: {self.failure}; training goes on, and the next save tries again")

    def _write_behind(
        self, step: int, write: Write, state: Mapping[str, Any], size: int, score: float | None, ending: ExitStack
    ) -> None:
        """Write in the thread. An error is reported at once: training raises it only at its next save, hours later."""
        try:
            with self._failures(step, size), ending:
                self._write(step, write, state, score)
        except BaseException as error:
            say(f"warning: {str(error) or repr(error)}")
            raise

    def _write(self, step: int, write: Write, state: Mapping[str, Any], score: float | None) -> None:
        """Write under a temporary name, sync, rename; then delete old checkpoints."""
        final = self._final(step)
        beside = final.with_name(f".{final.name}.tmp")
        if score is not None and not math.isfinite(score):
            score = None
        try:
            if beside.exists():
                shutil.rmtree(beside)
            beside.mkdir()
            hashes = write(beside) or {}
            files = {}
            for path in sorted(path for path in beside.rglob("*") if path.is_file()):
                report_progress(f"syncing {path}")
                sync_file(path)
                files[path.relative_to(beside).as_posix()] = hashes.get(path) or file_hash(path)
            about = {"step": step, "score": score, "versions": versions(), "files": files}
            write_json(beside / STATE, {**state, **about})
            for folder in {path.parent for path in beside.rglob("*")}:
                sync_file(folder)
            self._give_name(beside, final)
            self.failure = None
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)  # frees the disk; `prepare` removes what is left
            raise
        self._purge(step)

    def _give_name(self, beside: Path, final: Path) -> None:
        """Rename to the final name, which makes it visible. A damaged folder of that name is renamed first."""
        old = final.with_name(f".{final.name}.old")
        if final.exists():
            if old.exists():  # left by a replacement that could not be synced
                shutil.rmtree(old)
            final.rename(old)
        try:
            beside.rename(final)
        except OSError:
            if old.exists():
                old.rename(final)
            raise
        sync_file(self.folder)

    def _purge(self, newest: int) -> None:
        """Delete old checkpoints, now that `newest` is complete; an error is a warning, and the next save tries again.

        Steps after `newest` are damaged ones that a resume skipped. They do not count, so that they never displace good
        ones, and are not deleted.
        """
        try:
            complete = {_step(path): path for path in self.complete() if _step(path) <= newest}
            scores = {step: _score(path) if self.keep_best else None for step, path in complete.items()}
            stay = steps_to_keep(scores, self.keep, self.keep_every, self.keep_best)
            self._remove([*(path for step, path in complete.items() if step not in stay), *self._hidden("old")])
        except OSError as error:
            say(f"warning: old checkpoints in {self.folder} could not be removed: {_why(error)}")

    def _remove(self, paths: Iterable[Path]) -> None:
        """Delete folders: rename all, sync, then remove files, so that a kill leaves no partial checkpoint."""
        for path in paths:
            gone = self.folder / f".{path.stem.removeprefix('.')}.gone"
            if gone.exists():
                shutil.rmtree(gone)
            path.rename(gone)
        renamed_folders = self._hidden("gone")
        if renamed_folders:
            sync_file(self.folder)
        for path in renamed_folders:
            shutil.rmtree(path)

    def _final(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"

    def _hidden(self, ending: str) -> list[Path]:
        return sorted(self.folder.glob(f".step_*.{ending}"))


def steps_to_keep(scores: Mapping[int, float | None], keep: int, keep_every: int | None, keep_best: bool) -> set[int]:
    """The steps whose checkpoints stay: the newest `keep`, those that `keep_every` divides, and the lowest score.

    A score of None or NaN is never best; of equal scores the oldest is. The newest step always stays.
    """
    stay = set(sorted(scores)[-keep:])
    if keep_every is not None:
        stay |= {step for step in scores if step % keep_every == 0}
    scored = [(score, step) for step, score in scores.items() if score is not None and not math.isnan(score)]
    if keep_best and scored:
        stay.add(min(scored)[1])
    return stay


class Copier:
    """Makes copies on the CPU that a thread can write while training goes on.

    Each save reuses the memory of the save before: touching new memory takes longer than the copy. So call `begin`
    before each save, after the one before has been written (`Checkpoints.wait`).
    """

    def __init__(self) -> None:
        self._memory: list[Tensor] = []
        self._used = 0

    def begin(self) -> None:
        """Reuse all memory; what the last save did not use is freed."""
        del self._memory[self._used :]
        self._used = 0

    @torch.no_grad()
    def __call__(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of a tensor as it is now."""
        if self._used == len(self._memory):
            self._memory.append(torch.empty(0))
        memory = self._memory[self._used]
        if memory.shape != tensor.shape or memory.dtype != tensor.dtype:
            memory = self._memory[self._used] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        self._used += 1
        return memory.copy_(tensor)


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python, wantrain, torch, and of accelerate, DeepSpeed and peft where they are installed."""
    versions_by_name = {
        "python": platform.python_version(),
        "wantrain": wantrain.__version__,
        "torch": torch.__version__,
    }
    for name in ("accelerate", "deepspeed", "peft"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions_by_name[name] = importlib.metadata.version(name)
    return versions_by_name


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint. ValueError if it is damaged, or larger than we write."""
    path = checkpoint / STATE
    if path.is_file() and path.stat().st_size > STATE_BYTES:
        raise ValueError(f"{path} is larger than any that wantrain writes, so it is not a checkpoint of it")
    return upgraded_fields(read_json(path), renamed.STATE)


def damaged_files(checkpoint: Path) -> list[str]:
    """The files of a checkpoint that differ from what was written.

    Only state.json and the files that it names below the folder are opened, and those only to be hashed.
    """
    try:
        files = read_state(checkpoint)["files"]
    except (OSError, ValueError, KeyError, RecursionError):
        return [STATE]
    if not isinstance(files, dict) or not all(_is_below(name) for name in files):
        return [STATE]
    return [name for name, digest in files.items() if not _intact(checkpoint / name, digest)]


def _foreign_files(checkpoint: Path) -> list[str]:
    """Files in an undamaged checkpoint that a loader might open and wantrain did not write; text notes are allowed."""
    names = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if not path.is_dir()}
    ours = read_state(checkpoint)["files"].keys() | {STATE}
    return sorted(name for name in names - ours if PurePosixPath(name).suffix in _LOADABLE)


def _is_below(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _intact(path: Path, digest: object) -> bool:
    try:
        return path.is_file() and file_hash(path) == digest
    except OSError:  # a disk that cannot read the bytes
        return False


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _score(checkpoint: Path) -> float | None:
    """The score in a state.json; None if there is none, or it cannot be read."""
    try:
        score = read_state(checkpoint).get("score")
    except (ValueError, RecursionError):
        return None
    return float(score) if isinstance(score, int | float) else None


def _why(error: OSError) -> str:
    """The disk error, and its fix."""
    return f"{error}; {_FIXES.get(error.errno or 0, _OTHER_FIX)}"
