"""Progress of long work: code reports each unit of it, and a watchdog, for one, listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_listeners: list[Callable[[str], None]] = []


def report_progress(doing: str) -> None:
    """A unit of work is done and `doing` begins: whoever listens is told, a watchdog for one. Cheap: call it often."""
    for listener in tuple(_listeners):
        listener(doing)


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """While active, `listener(doing)` is called at every `report_progress`, in the thread that made it."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
