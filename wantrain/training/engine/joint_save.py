"""A checkpoint that all processes write together, each what it holds: no process holds, or sends, a whole state.

The main process creates the files, each process fills in its parts (joint_file.py), and then each hashes some of the
files. The main process alone gives the checkpoint its name, once all have said that they are done. They speak through
the store of the process group, never by a collective, so that all of this can happen in a thread beside training.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from wantrain.models.formats.joint_file import Slice, create_file, fill_file
from wantrain.models.formats.weights import write_files
from wantrain.training.engine.slices import copied
from wantrain.util.files import file_hash, missing_files, write_json
from wantrain.util.progress import report_progress

#: Seconds between two reads of the store, at most.
LOOK = 0.25


@dataclass(frozen=True)
class Tensors:
    """Tensors of a checkpoint that go into one folder, as this process holds them.

    folder    below the checkpoint's own
    name      of the file, or of the files where they are too large for one
    config    what config.json there says; None: there is none
    metadata  of each file
    """

    folder: str
    name: str
    slices: Mapping[str, Slice]
    config: Mapping[str, Any] | None = None
    metadata: Mapping[str, object] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all whole tensors."""
        return sum(each.nbytes for each in self.slices.values())

    def copied(self, copy: Callable[[Tensor], Tensor]) -> Tensors:
        """The same with copies of this moment's values."""
        return replace(self, slices=copied(self.slices, copy))

    def create(self, checkpoint: Path) -> list[Path]:
        """Create the files, without values."""
        folder = checkpoint / self.folder
        folder.mkdir(parents=True, exist_ok=True)
        if self.config is not None:
            write_json(folder / "config.json", dict(sorted(self.config.items())))
        return list(write_files(folder, self.name, self.slices, self.metadata, write=create_file))


@dataclass(frozen=True)
class Crew:
    """The processes of a run: which this one is, how many they are, and the store by which they speak."""

    rank: int
    processes: int
    store: Any


class JointSave:
    """One checkpoint on its way to the disk. `number` tells the saves of a run apart, and is the same everywhere."""

    def __init__(self, crew: Crew, number: int, tensors: Sequence[Tensors]) -> None:
        self.crew, self.tensors = crew, tensors
        self._prefix = f"wantrain/save/{number}/"

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(each.nbytes for each in self.tensors)

    def write(self, folder: Path) -> dict[Path, str]:
        """In the main process: write into `folder` with the others, and return the sha256 of each file of tensors.

        What went wrong in any process is raised here, when none of them writes any more.
        """
        files = [(number, path) for number, each in enumerate(self.tensors) for path in each.create(folder)]
        places = [(number, path.relative_to(folder).as_posix()) for number, path in files]
        self._tell("begun", {"folder": str(folder), "files": places})
        digests = self._take_part(folder, places)
        return {folder / name: digest for name, digest in digests.items()}

    def ended(self) -> None:
        """In the main process, when the save is over, however: others that wait for it to begin need not."""
        self._tell("ended", {})

    def follow(self) -> None:
        """In the others: wait until the main process has created the files, then take part."""
        begun = self._hear("begun", "ended")
        if begun:
            self._take_part(Path(begun["folder"]), begun["files"])

    def _take_part(self, folder: Path, files: Sequence[tuple[int, str]]) -> dict[str, str]:
        """Fill in this process's parts, then hash its share of the files: digests of all of them, by name."""

        def fill() -> dict[str, str]:
            absent = missing_files({folder / name: -1 for _, name in files})
            if absent:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), str(absent[0]))
            for number, name in files:
                fill_file(folder / name, self.tensors[number].slices)
            return {}

        def digest() -> dict[str, str]:
            mine = files[self.crew.rank :: self.crew.processes]
            return {name: file_hash(folder / name) for _, name in mine}

        if self._together("filled", fill) is None:
            return {}
        return self._together("hashed", digest) or {}

    def _together(self, stage: str, work: Callable[[], dict[str, str]]) -> dict[str, str] | None:
        """The answers of all processes to a stage of the work, in the main process. Where one fails the main process
        raises its error, when all have answered, and the others get None.

        The main process alone reads the answers: if each read all, words would grow with the square of the processes.
        """
        raised: BaseException | None = None
        try:
            answer: dict[str, Any] = {"done": work()}
        except BaseException as error:
            raised = error
            answer = {"error": str(error) or repr(error), "errno": None, "host": os.uname().nodename}
            if isinstance(error, OSError) and error.errno is not None:
                answer |= {"error": error.strerror, "errno": error.errno, "file": error.filename}
        fault = None if isinstance(raised, OSError) else raised
        if self.crew.rank > 0:
            self._tell(f"{stage}/{self.crew.rank}", answer)
            if fault is not None:
                raise fault
            return {} if self._hear(stage)["whole"] else None
        others = [] if fault is not None else [self._hear(f"{stage}/{rank}") for rank in range(1, self.crew.processes)]
        answers = [answer, *others]
        failed = next(((rank, each) for rank, each in enumerate(answers) if "error" in each), None)
        self._tell(stage, {"whole": failed is None})
        if failed is None:
            return {key: value for each in answers for key, value in each["done"].items()}
        if fault is not None:
            raise fault
        rank, each = failed
        who = f"process {rank} on {each['host']}"
        if each["errno"] is None:
            raise RuntimeError(f"{who} could not write its part of a checkpoint: {each['error']}")
        raise OSError(each["errno"], f"{each['error']} ({who})", each["file"])

    def _tell(self, key: str, word: Mapping[str, Any]) -> None:
        self.crew.store.set(self._prefix + key, json.dumps(word))

    def _hear(self, *keys: str) -> dict[str, Any]:
        """The word under the first of these keys that has one; waits for it."""
        pause = 0.005
        while True:
            for key in keys:
                if self.crew.store.check([self._prefix + key]):
                    report_progress(f"writing a checkpoint: {key}")
                    word: dict[str, Any] = json.loads(self.crew.store.get(self._prefix + key))
                    return word
            time.sleep(pause)
            pause = min(2 * pause, LOOK)


class JointSaver:
    """The joint saves of a run in this process. `background`: this process writes its parts in a thread."""

    def __init__(self, crew: Crew, *, background: bool) -> None:
        self.crew, self.background = crew, background
        self._numbers = itertools.count()
        self._thread = futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._under_way: futures.Future[None] | None = None

    def begin(self, tensors: Sequence[Tensors]) -> JointSave:
        """A save of these tensors; all processes call it. Those that are not the main one take part in it: with
        `background` in a thread, else before this returns.
        """
        save = JointSave(self.crew, next(self._numbers), tensors)
        if self.crew.rank > 0 and self.background:
            self._under_way = self._thread.submit(save.follow)
        elif self.crew.rank > 0:
            save.follow()
        return save

    def wait(self) -> None:
        """Wait until this process has written its part of the last save; its memory may be used again then."""
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            under_way.result()
