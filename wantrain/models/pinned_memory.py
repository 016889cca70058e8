"""An arena: host memory for the weights of one expert, one allocation of their exact size, pinned if there is a GPU.

Copies from pinned (page-locked) memory to a GPU run at the bus's full speed, while the host goes on. torch's own pinned
allocator rounds every allocation up to a power of two: the tensors of an A14B expert, 29.0 GB in bf16, would take
44.3 GB. An arena is one anonymous mapping that CUDA locks (`cudaHostRegister`).
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
    """Offset of each tensor in an arena, given their sizes in bytes, and the arena's size, a multiple of the page."""
    begins, end = [], 0
    for size in sizes:
        begins.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return begins, -(-end // mmap.PAGESIZE) * mmap.PAGESIZE


def move_to_arena(parameters: Iterable[nn.Parameter]) -> None:
    """Move parameters into an arena of their own, which stays allocated and locked as long as any tensor in it.

    One parameter at a time: its old memory is freed as soon as it is copied, so that the host holds all of them once
    and the largest twice. ValueError if CUDA cannot lock that much.
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
        report_progress("moving offloaded weights into pinned memory")
        place.copy_(parameter.detach())
        parameter.data = place
    _lock(memory)


def cuda_runtime() -> Any:
    """The functions of CUDA's runtime; None where there is no GPU, so that nothing is locked."""
    return torch.cuda.cudart() if torch.cuda.is_available() else None


def _lock(memory: NDArray[np.uint8]) -> None:
    """Have CUDA lock a mapping's pages until the last tensor in it is freed.

    `memory` is the array over the mapping. It is freed before the mapping, so that CUDA unlocks memory that still
    exists.
    """
    runtime, address = cuda_runtime(), memory.ctypes.data
    if runtime is None:
        return
    if code := int(runtime.cudaHostRegister(address, memory.nbytes, 0)):
        # Going on without the lock would fail: torch would report CUDA's pending error at the next kernel.
        raise ValueError(
            f"CUDA could not lock {memory.nbytes / 1e9:.1f} GB of host memory for offloaded weights (CUDA error "
            f"{code}); free host memory, or offload otherwise: in sample.py offload.experts=disk, in train.py "
            "experts.offload=none, for previews sample.offload.experts=disk"
        )
    # Not at exit: the process's memory is freed anyway, and CUDA may be shut down by then.
    weakref.finalize(memory, _unlock, runtime, address).atexit = False


def _unlock(runtime: Any, address: int) -> None:
    torch.cuda.synchronize()  # copies from it may still run
    if code := int(runtime.cudaHostUnregister(address)):
        say(f"warning: CUDA could not unlock the memory of offloaded weights (CUDA error {code})")
