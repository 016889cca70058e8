"""Counting the bytes of the tensors that are alive while something computes, on real tensors or on fake ones.

Only what PyTorch's operations return is seen: workspaces inside a kernel and what an allocator rounds up are not.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """While active, sums the bytes of every storage from the operation that allocates it until it is freed.

    now   bytes alive; tensors that were there before are not counted
    peak  the most that were alive at any moment; set it to `now` to begin a new peak
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()
        self.counted: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # fake tensors are asked for theirs all the time
            return func(*args, **kwargs)
        for tensor in tensors_in(args, kwargs.values()):
            self.seen.add(tensor.untyped_storage())
        result = func(*args, **kwargs)
        self.observe(func, args, kwargs, result)
        for tensor in tensors_in((result,)):
            storage = tensor.untyped_storage()
            if storage not in self.seen:
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.counted[storage] = weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def observe(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Called after each operation, for what else is to be counted."""

    def forget(self, tensor: Tensor) -> None:
        """Stop counting a tensor, which is counted elsewhere."""
        storage = tensor.untyped_storage()
        finalizer = self.counted.pop(storage, None)
        if finalizer is not None and finalizer.detach():
            self.now -= storage.nbytes()

    def _freed(self, size: int) -> None:
        self.now -= size


def tensors_in(*values: Iterable[Any]) -> list[Tensor]:
    """The tensors among an operation's arguments or results, and in the lists among them."""
    found: list[Tensor] = []
    for value in itertools.chain(*values):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(value)
    return found
