"""Counting the bytes that operations read and write, on real tensors or on fake ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wantrain.util.live_bytes import tensors_in

#: Operations whose time is that of their arithmetic, not of the bytes they move.
ARITHMETIC = ("mm", "addmm", "bmm", "baddbmm", "linear", "convolution", "scaled_dot_product")
#: Operations that write their first operand without reading it.
_OVERWRITING = ("copy_", "fill_", "zero_", "normal_", "uniform_")


class MovedBytes(TorchDispatchMode):
    """While active, sums what operations move.

    total    bytes
    by_name  the same for each operation
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.by_name: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        size = moved_by(func, args, kwargs or {}, result)
        if size:
            self.total += size
            name = func.overloadpacket.__name__
            self.by_name[name] = self.by_name.get(name, 0) + size
        return result


def moved_by(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Bytes that an operation reads and writes: its operands and its results, each as often as it has elements.

    Views, matrix products and attention count nothing; each operation counts by itself, as if no cache held what the
    one before it wrote.
    """
    name = func.overloadpacket.__name__
    if getattr(func, "is_view", False) or any(word in name for word in ARITHMETIC):
        return 0
    written = _written(func, name, args, kwargs, result)
    return sum(map(_size, [*written, *_read(name, func, args, kwargs)])) if written else 0


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor's elements; those that are one in memory (an expanded dimension) count once."""
    count = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= length if stride else min(length, 1)
    return count * tensor.element_size()


def _arguments(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    """Each argument that is given, with what the operation's schema says of it."""
    for place, argument in enumerate(func._schema.arguments):
        if place < len(args):
            yield argument, args[place]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _read(name: str, func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operation reads, each once."""
    if name.endswith("_like") or name.startswith("new_"):
        return []
    seen: dict[int, Tensor] = {}
    for argument, value in _arguments(func, args, kwargs):
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if not (writes and (argument.is_out or name in _OVERWRITING)):
            seen |= {id(tensor): tensor for tensor in tensors_in((value,))}
    return list(seen.values())


def _written(func: Any, name: str, args: Any, kwargs: Any, result: Any) -> list[Tensor]:
    """The tensors that an operation writes: what it changes, else its results that are no operand's memory."""
    if name.startswith(("empty", "new_empty")):  # memory to which nothing is written yet
        return []
    changed = [
        tensor
        for argument, value in _arguments(func, args, kwargs)
        if argument.alias_info is not None and argument.alias_info.is_write
        for tensor in tensors_in((value,))
    ]
    if changed:
        return changed
    own = {id(tensor.untyped_storage()) for tensor in tensors_in(args, kwargs.values())}
    return [tensor for tensor in tensors_in((result,)) if id(tensor.untyped_storage()) not in own]
