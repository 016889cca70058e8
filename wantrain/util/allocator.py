"""The C library's allocator, where tensors lie in the host's memory.

glibc gives freed memory back to the system as soon as enough of it lies at the end of the heap. A training step on a
CPU frees its activations and takes as much again in the next: each page is then mapped and cleared once more, some
20,000 times a step of a model of 15 M parameters.
"""

from __future__ import annotations

import ctypes
import os

#: mallopt's names for the options (malloc.h), and what they are set to: blocks of less than 32 MiB (the most that glibc
#: allows) come from the heap, of which up to 2 GiB may lie unused.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_OPTIONS = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: (1 << 31) - 1}


def keep_freed_memory() -> bool:
    """Let this process keep what it frees for what it allocates next: up to 2 GiB, in blocks of less than 32 MiB.

    Nothing is done, and False returned, where the environment sets the thresholds (MALLOC_TRIM_THRESHOLD_,
    MALLOC_MMAP_THRESHOLD_) or the C library has no such options.
    """
    if any(f"MALLOC_{name}_THRESHOLD_" in os.environ for name in ("TRIM", "MMAP")):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(option, value) for option, value in _OPTIONS.items())
