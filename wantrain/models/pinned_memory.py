"""Host memory for the weights of one expert: one allocation of their exact size, locked for CUDA where that is there.

From locked (pinned) memory copies to a GPU run at the bus's full speed and beside the host's work. torch's own pinned
allocator rounds every allocation up to a power of two, so that the tensors of an A14B expert, 29.0 GB in bf16, lock
44.3 GB. Here they lie in one anonymous mapping, which CUDA is told to lock as it is.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from wantrain.models.formats.weights import ALIGNMENT, make_pages
from wantrain.util.console import say
from wantrain.util.progress import report_progress


def layout(sizes: Iterable[int]) -> tuple[list[int], int]:
    """Where tensors of so many bytes begin in an arena, and how many bytes it takes: whole pages."""
    begins, end = [], 0
    for size in sizes:
        begins.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return begins, -(-end // mmap.PAGESIZE) * mmap.PAGESIZE


def settle(parameters: Iterable[nn.Parameter]) -> None:
    """Move parameters into an arena of their own; it lives, and stays locked, as long as any tensor in it.

    One after the other: what a parameter lay in before is let go as soon as it is copied, so the host holds one copy
    and the largest tensor twice. ValueError if CUDA cannot lock that much.
    """
    parameters = list(parameters)
    begins, size = layout(parameter.nbytes for parameter in parameters)
    if size == 0:
        return
    memory = np.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=np.uint8)
    arena = torch.from_numpy(memory)
    for parameter, begin in zip(parameters, begins, strict=True):
        place = arena[begin : begin + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        make_pages(place)
        report_progress("moving idle weights into locked memory")
        place.copy_(parameter.detach())
        parameter.data = place
    _lock(memory)


def cuda_runtime() -> Any:
    """The functions of CUDA's runtime; None where there is no GPU, and memory stays as it is."""
    return torch.cuda.cudart() if torch.cuda.is_available() else None


def _lock(memory: NDArray[np.uint8]) -> None:
    """Have CUDA lock a mapping's pages until the last tensor in it goes.

    `memory` is the array over the mapping: it goes before the mapping does, so that CUDA unlocks what is still there.
    """
    runtime, address = cuda_runtime(), memory.ctypes.data
    if runtime is None:
        return
    if code := int(runtime.cudaHostRegister(address, memory.nbytes, 0)):
        # No way on with unlocked memory: torch would report CUDA's pending error at the next kernel.
        raise ValueError(
            f"CUDA could not lock {memory.nbytes / 1e9:.1f} GB of host memory for idle weights (CUDA error {code}); "
            "free host memory, or choose another idle= than cpu (in train.py experts.idle=, sample.idle=)"
        )
    # Nobody needs it unlocked when the process ends, and CUDA may be gone by then.
    weakref.finalize(memory, _unlock, runtime, address).atexit = False


def _unlock(runtime: Any, address: int) -> None:
    torch.cuda.synchronize()  # copies from it may still be on their way
    if code := int(runtime.cudaHostUnregister(address)):
        say(f"warning: CUDA could not unlock the memory of idle weights (CUDA error {code})")
