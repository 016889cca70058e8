"""Locks that a killed build of compiled kernels leaves: every later build waits for them without end."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

#: Minutes that a build of DeepSpeed's kernels takes at most.
BUILD_MINUTES = 15


def stale_locks() -> list[tuple[Path, float]]:
    """The locks of torch's builds of extensions, DeepSpeed's kernels among them, that are older than BUILD_MINUTES,
    with their age in minutes.
    """
    from torch.utils.cpp_extension import get_default_build_root  # slow to import, and few need it

    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    found = []
    for lock in (path for pattern in ("*/lock", "*/*/lock") for path in folder.glob(pattern)):
        with suppress(FileNotFoundError):  # just released
            minutes = (time.time() - lock.stat().st_mtime) / 60
            if minutes > BUILD_MINUTES:
                found.append((lock, minutes))
    return found
