"""Checkpoints: folders that are either complete or not there.

A checkpoint is written beside its final name, every file synced, and renamed; `state.json`, written last, holds the
hash of every other file: of tensors made while they are written, so that nothing is read again. A kill at any moment
leaves the previous checkpoint as it was, and one that is to go loses its name before its files. What the disk refuses
is one error with its fix. No pickles: tensors are safetensors, the rest is json. Random state is not saved, for there
is none: randomness is a function of position.

Hidden names are ours: `.step_N.tmp` is half written, `.step_N.old` was replaced by another step_N (and comes back if
that one never came), `.step_N.gone` is being deleted.
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
from contextlib import contextmanager, nullcontext, suppress
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

STATE = "state.json"
#: What puts a checkpoint's tensors into a folder; it may give the sha256 of files that it hashed while writing them.
Write = Callable[[Path], Mapping[Path, str] | None]
#: What is done when the disk refuses a checkpoint.
ON_FAILURE = ("stop", "continue")
#: Bytes that stay free beside a checkpoint, for the log and for everybody else.
RESERVE = 16 << 20
#: A larger state.json is not ours; it is not read, so that it cannot fill the memory.
STATE_BYTES = 4 << 20
#: Endings of what a loader may open.
_LOADABLE = PICKLES | {".safetensors", ".json", ".pkl", ".ckpt"}

_MENDS = {
    errno.ENOSPC: "free disk space, lower checkpoint.keep, or move the run to a larger disk (runs=)",
    errno.EDQUOT: "free some of your quota, lower checkpoint.keep, or move the run to another disk (runs=)",
    errno.EFBIG: "raise the largest file size allowed (ulimit -f), or move the run to another disk (runs=)",
    errno.EACCES: "make the folder writable, or move the run (runs=)",
    errno.EPERM: "make the folder writable, or move the run (runs=)",
    errno.EROFS: "make the disk writable, or move the run (runs=)",
}
_OTHER_FIX = "look at what the path names and at the disk, or move the run to another disk (runs=)"


class Checkpoints:
    """The checkpoints of one run, in `folder`; one process writes them.

    keep        how many of the newest stay
    keep_every  every step that it divides stays for ever (None: no such rule)
    keep_best   the one with the lowest score stays
    background  `save` returns before anything is written; one thread writes, `wait` waits for it
    on_failure  what the disk refuses is a ValueError ("stop"), or a warning and training goes on ("continue")
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
        # An executor's thread is not a daemon: the interpreter waits for a write under way before it exits.
        self._writer = futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._under_way: futures.Future[None] | None = None
        #: What the disk refused the last checkpoint with; None if that was written.
        self.failure: str | None = None

    def prepare(self) -> None:
        """Make the folder and clear what a kill left half done (main process only). ValueError if the disk refuses."""
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
    ) -> None:
        """Write checkpoint `step`, after the one under way: its failure is raised here.

        write  puts the tensors into the folder it is given, and says of which files it knows the hash. In the
               background it runs beside the training, so it must write copies (`Copier`) and nothing that a step
               changes
        state  what else a resume must know, as json
        size   bytes the checkpoint will take; without that much free disk nothing is begun
        score  a validation loss, the lower the better; NaN and None are never best
        """
        self.wait()
        with self._failures(step, size):
            self._require(size)
            if self.background:
                told = copy.deepcopy(dict(state))
                self._under_way = self._writer.submit(self._write_behind, step, write, told, size, score)
            else:
                self._write(step, write, state, score)

    def wait(self) -> None:
        """Until the write under way has been committed; raises what it failed with, once."""
        if self._under_way is not None:
            futures.wait([self._under_way])  # forgotten only when it has ended: an interrupt may break this off
            under_way, self._under_way = self._under_way, None
            under_way.result()

    def finish(self) -> None:
        """`wait`, at the end of a run: ValueError if the last checkpoint is missing, also with "continue"."""
        self.wait()
        if self.failure is not None:
            raise ValueError(f"the last checkpoint is missing: {self.failure}; the same command goes on from it")

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What is being written is a good checkpoint, also where the run ends with an error."""
        with suppress(Exception) if error is not None else nullcontext():
            self.wait()

    def complete(self) -> list[Path]:
        """All checkpoints under a final name, oldest first."""
        named = (path for path in self.folder.glob("step_*") if re.fullmatch(r"step_(\d{6}|[1-9]\d{6,})", path.name))
        return sorted((path for path in named if (path / STATE).is_file()), key=_step)

    def newest(self) -> Path | None:
        """The newest checkpoint whose files are what was written; a damaged one is passed over, and said.

        ValueError if somebody put files into it that a loader might open: those can be taken out again, so that the
        run need not go back.
        """
        for path in reversed(self.complete()):
            damaged = damaged_files(path)
            if damaged:
                say(f"warning: {path} is damaged ({', '.join(damaged)}); trying the one before it")
                continue
            foreign = _foreign_files(path)
            if foreign:
                raise ValueError(
                    f"{path} holds {', '.join(foreign)}, which wantrain did not write; take it out of there"
                )
            return path
        return None

    def _require(self, size: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < size + RESERVE:
            raise OSError(errno.ENOSPC, f"disk full: {free:,} bytes are free, {size + RESERVE:,} needed")

    @contextmanager
    def _failures(self, step: int, size: int) -> Iterator[None]:
        """What the disk refuses, raised in words or said, as `on_failure` has it. Anything else is a bug."""
        try:
            yield
        except OSError as error:
            what = f"checkpoint {self._final(step)} of {size:,} bytes" if size else f"checkpoint {self._final(step)}"
            self.failure = told = f"{what} could not be written: {_why(error)}. Those before it are as they were"
            if self.on_failure == "stop":
                raise ValueError(told) from error
            say(f"warning: {told}; training goes on, and the next save tries again")

    def _write_behind(self, step: int, write: Write, state: Mapping[str, Any], size: int, score: float | None) -> None:
        """What the thread does. A failure is said at once, for the training may hear of it only hours later."""
        try:
            with self._failures(step, size):
                self._write(step, write, state, score)
        except BaseException as error:
            say(f"warning: {str(error) or repr(error)}")
            raise

    def _write(self, step: int, write: Write, state: Mapping[str, Any], score: float | None) -> None:
        """Write beside the final name, sync, rename; then remove what need not stay."""
        final = self._final(step)
        beside = final.with_name(f".{final.name}.tmp")
        if score is not None and not math.isfinite(score):
            score = None
        try:
            if beside.exists():
                shutil.rmtree(beside)
            beside.mkdir()
            known = write(beside) or {}
            files = {}
            for path in sorted(path for path in beside.rglob("*") if path.is_file()):
                report_progress(f"syncing {path}")
                sync_file(path)
                files[path.relative_to(beside).as_posix()] = known.get(path) or file_hash(path)
            about = {"step": step, "score": score, "versions": versions(), "files": files}
            write_json(beside / STATE, {**state, **about})
            for folder in {path.parent for path in beside.rglob("*")}:
                sync_file(folder)
            self._give_name(beside, final)
            self.failure = None
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)  # the disk gets its space back; `prepare` finds what is left
            raise
        self._purge(step)

    def _give_name(self, beside: Path, final: Path) -> None:
        """The commit. A folder that has the name already (a damaged one, before a resume) steps aside for it."""
        old = final.with_name(f".{final.name}.old")
        if final.exists():
            if old.exists():  # of a replacement that arrived, but could not be synced
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
        """Remove what need not stay, now that `newest` is committed; what cannot be removed is said and tried again.

        Steps after `newest` are damaged ones that a resume passed over: they neither count nor go, so that they can
        never push out the good ones.
        """
        try:
            found = {_step(path): path for path in self.complete() if _step(path) <= newest}
            scores = {step: _score(path) if self.keep_best else None for step, path in found.items()}
            stay = kept(scores, self.keep, self.keep_every, self.keep_best)
            self._remove([*(path for step, path in found.items() if step not in stay), *self._hidden("old")])
        except OSError as error:
            say(f"warning: old checkpoints in {self.folder} could not be removed: {_why(error)}")

    def _remove(self, paths: Iterable[Path]) -> None:
        """Delete folders: first their names, all at once and synced, then their files. No kill leaves half of one."""
        for path in paths:
            gone = self.folder / f".{path.stem.removeprefix('.')}.gone"
            if gone.exists():
                shutil.rmtree(gone)
            path.rename(gone)
        gone_by_now = self._hidden("gone")
        if gone_by_now:
            sync_file(self.folder)
        for path in gone_by_now:
            shutil.rmtree(path)

    def _final(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"

    def _hidden(self, ending: str) -> list[Path]:
        return sorted(self.folder.glob(f".step_*.{ending}"))


def kept(scores: Mapping[int, float | None], keep: int, keep_every: int | None, keep_best: bool) -> set[int]:
    """Which of the steps stay: the newest `keep`, those that `keep_every` divides, and the one with the lowest score.

    A score of None or NaN is never best; of equal ones the older is. The newest step always stays.
    """
    stay = set(sorted(scores)[-keep:])
    if keep_every is not None:
        stay |= {step for step in scores if step % keep_every == 0}
    scored = [(score, step) for step, score in scores.items() if score is not None and not math.isnan(score)]
    if keep_best and scored:
        stay.add(min(scored)[1])
    return stay


class Copier:
    """Makes copies on the CPU, for a thread to write while the training goes on.

    The copies of one save use the memory of the save before it: the first touch of memory costs more than the copy.
    So call `begin` before each save, and only when the one before has been written (`Checkpoints.wait`).
    """

    def __init__(self) -> None:
        self._memory: list[Tensor] = []
        self._used = 0

    def begin(self) -> None:
        """All memory may be used again; what the last save did not use is given back."""
        del self._memory[self._used :]
        self._used = 0

    @torch.no_grad()
    def __call__(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of a tensor as it is now."""
        if self._used == len(self._memory):
            self._memory.append(torch.empty(0))
        kept = self._memory[self._used]
        if kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = self._memory[self._used] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        self._used += 1
        return kept.copy_(tensor)


@functools.cache
def versions() -> dict[str, str]:
    """What wrote a checkpoint: Python, wantrain, torch, and those of the libraries around them that are installed."""
    found = {"python": platform.python_version(), "wantrain": wantrain.__version__, "torch": torch.__version__}
    for name in ("accelerate", "deepspeed", "peft"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint. ValueError if it is damaged, or larger than we write."""
    path = checkpoint / STATE
    if path.is_file() and path.stat().st_size > STATE_BYTES:
        raise ValueError(f"{path} is larger than any that wantrain writes; it is not ours")
    return upgraded_fields(read_json(path), renamed.STATE)


def damaged_files(checkpoint: Path) -> list[str]:
    """The files of a checkpoint that are not what was written.

    None is opened but state.json and those that it names below the folder, and these only to be hashed.
    """
    try:
        files = read_state(checkpoint)["files"]
    except (OSError, ValueError, KeyError, RecursionError):
        return [STATE]
    if not isinstance(files, dict) or not all(_is_below(name) for name in files):
        return [STATE]
    return [name for name, digest in files.items() if not _intact(checkpoint / name, digest)]


def _foreign_files(checkpoint: Path) -> list[str]:
    """Files in an undamaged checkpoint that a loader might open and that we did not write; notes do no harm."""
    names = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if not path.is_dir()}
    ours = read_state(checkpoint)["files"].keys() | {STATE}
    return sorted(name for name in names - ours if PurePosixPath(name).suffix in _LOADABLE)


def _is_below(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _intact(path: Path, digest: object) -> bool:
    try:
        return path.is_file() and file_hash(path) == digest
    except OSError:  # a disk that cannot give the bytes back
        return False


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _score(checkpoint: Path) -> float | None:
    """The score in a state.json; None if there is none, or none that can be read."""
    try:
        score = read_state(checkpoint).get("score")
    except (ValueError, RecursionError):
        return None
    return float(score) if isinstance(score, int | float) else None


def _why(error: OSError) -> str:
    """What the disk said, and the fix."""
    return f"{error}; {_MENDS.get(error.errno or 0, _OTHER_FIX)}"
