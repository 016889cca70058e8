"""Progress of long work: code reports each step of it, and listeners, such as a watchdog, receive it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_listeners: list[Callable[[str], None]] = []


def report_progress(doing: str) -> None:
    """Report to all listeners that the step `doing` begins. Cheap enough to be called often."""
    for listener in tuple(_listeners):
        listener(doing)


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Inside the `with`, every `report_progress` calls `listener(doing)`, in the reporting thread."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
