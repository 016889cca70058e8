"""part=K/N of encode.py: the share of the work of one start of several that know nothing of each other."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from wantrain.util import distributed

#: The lock of the start that finishes the folder.
LOCK = ".finish.lock"


@dataclass(frozen=True)
class Part:
    """Part `number` (from 1) of `count`; a whole launch makes one part."""

    number: int = 1
    count: int = 1

    @classmethod
    def read(cls, text: str | None) -> Part:
        """From K/N; None: the whole. ValueError for what is neither."""
        if text is None:
            return cls()
        found = re.fullmatch(r"(\d+)/(\d+)", str(text))
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(
                f"part={text} must be K/N, the K-th of N starts with K from 1 to N: part=2/8. Of a SLURM array of 1-8: "
                "part=$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
            )
        return cls(int(found[1]), int(found[2]))

    @property
    def rank(self) -> int:
        """Number of this process among those of all parts."""
        return (self.number - 1) * distributed.world_size() + distributed.rank()

    @property
    def size(self) -> int:
        """Processes of all parts, where each has as many as this one."""
        return self.count * distributed.world_size()

    def __str__(self) -> str:
        return f"part {self.number} of {self.count}"


@contextmanager
def finishing(out: Path) -> Iterator[None]:
    """One start at a time finishes a folder. ValueError on a disk without locks."""
    handle = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            raise ValueError(
                f"out={out} cannot be locked ({error.strerror}), so that two parts might finish it at once; its tars "
                "are made, and when all parts have ended the same command without part= finishes it"
            ) from error
        yield
    finally:
        os.close(handle)
