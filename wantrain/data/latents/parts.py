"""part=K/N of encode.py: of several starts that know nothing of each other the last finishes the folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: The lock of the start that finishes the folder.
LOCK = ".finish.lock"


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
