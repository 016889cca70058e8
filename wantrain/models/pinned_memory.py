"""Host memory that a GPU copies from and to: mappings of their exact size, pinned (page-locked) if there is a GPU.

Copies between pinned memory and a GPU run at the bus's full speed, while the host goes on. torch's own pinned allocator
rounds every allocation up to a power of two: the tensors of an A14B expert, 29.0 GB in bf16, would take 44.3 GB. An
arena holds the weights of one expert in one mapping that CUDA locks (`cudaHostRegister`). The processes of one machine
can share it.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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


@dataclass(frozen=True)
class Node:
    """The processes of one machine, which hold the same weights and share one arena. Linux only.

    first     True in one of them: it fills the arena
    exchange  gives each process what the first one of its machine passes; all of them call it
    wait      returns when all have called it
    """

    first: bool
    exchange: Callable[[str], str]
    wait: Callable[[], None]


def move_to_arena(
    tensors: Iterable[Tensor],
    node: Node | None = None,
    *,
    dtypes: Iterable[torch.dtype] | None = None,
    lock: bool = True,
) -> None:
    """Move parameters or buffers into an arena of their own, which stays allocated and locked as long as any of them.

    One at a time: its old memory is freed as soon as it is copied, so that the host holds all of them once and the
    largest twice. With `node` one arena serves all its processes, which call this with equal tensors. ValueError if
    CUDA cannot lock that much.

    dtypes  what each becomes there; None: they keep their own
    lock    False leaves pages unlocked, for an arena that is freed soon
    """
    tensors = list(tensors)
    shapes = [torch.empty_like(tensor, device="meta", dtype=dtype) for tensor, dtype in
              zip(tensors, dtypes or (tensor.dtype for tensor in tensors), strict=True)]  # fmt: skip
    begins, size = layout(shape.nbytes for shape in shapes)
    if size == 0:
        return
    memory = np.frombuffer(_anonymous(size) if node is None else _shared(size, node), dtype=np.uint8)
    arena = torch.from_numpy(memory)
    for tensor, begin, shape in zip(tensors, begins, shapes, strict=True):
        place = view_of(arena, begin, shape)
        if node is None or node.first:
            make_pages(place)
            report_progress("moving offloaded weights into pinned memory")
            place.copy_(tensor.detach())
        tensor.data = place
    if node is not None:
        node.wait()
    if lock:
        _lock(memory, "offloaded weights", "offload otherwise: in sample.py offload.experts=disk, in train.py "
              "experts.offload=none or fewer swap.blocks, for previews sample.offload.experts=disk")  # fmt: skip


def allocate(size: int, what: str, otherwise: str) -> Tensor:
    """Pinned host memory: (size,) bytes without values. ValueError if CUDA cannot lock it.

    `what` it is for, and what to do `otherwise`, are words of the error.
    """
    memory = np.frombuffer(_anonymous(layout([size])[1]), dtype=np.uint8)
    _lock(memory, what, otherwise)
    return torch.from_numpy(memory)[:size]


def view_of(memory: Tensor, begin: int, like: Tensor) -> Tensor:
    """The place in a tensor of bytes that begins at `begin`, with the dtype and shape of another tensor."""
    return memory[begin : begin + like.nbytes].view(like.dtype).view(like.shape)


def _anonymous(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _shared(size: int, node: Node) -> mmap.mmap:
    """A mapping that all processes of a machine have. Its file has no name, so that none is left if they are killed,
    and does not count against the size of /dev/shm, which is 64 MB in a container.
    """
    own = os.memfd_create("wantrain") if node.first else -1
    if node.first:
        os.ftruncate(own, size)
    path = node.exchange(f"/proc/{os.getpid()}/fd/{own}")
    file = own if node.first else os.open(path, os.O_RDWR)
    mapping = mmap.mmap(file, size, flags=mmap.MAP_SHARED)
    node.wait()  # all have opened it
    os.close(file)
    return mapping


def cuda_runtime() -> Any:
    """The functions of CUDA's runtime; None where there is no GPU, so that nothing is locked."""
    return torch.cuda.cudart() if torch.cuda.is_available() else None


def _lock(memory: NDArray[np.uint8], what: str, otherwise: str) -> None:
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
            f"CUDA could not lock {memory.nbytes / 1e9:.1f} GB of host memory for {what} (CUDA error {code}); free "
            f"host memory, or {otherwise}"
        )
    # Not at exit: the process's memory is freed anyway, and CUDA may be shut down by then.
    weakref.finalize(memory, _unlock, runtime, address).atexit = False


def _unlock(runtime: Any, address: int) -> None:
    torch.cuda.synchronize()  # copies from it may still run
    if code := int(runtime.cudaHostUnregister(address)):
        say(f"warning: CUDA could not unlock host memory (CUDA error {code})")
