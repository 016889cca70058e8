"""Fetching ahead: files in the order in which they will be read, several at once, within a budget of bytes."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future

#: Files that are fetched at once.
THREADS = 4

_Queue = queue.SimpleQueue[tuple[str, Future[None]] | None]


class FetchAhead:
    """Fetches files before they are read. Losing the last reference ends its threads after what they are at.

    fetch   brings a file, by its name, to where it is read; its errors are raised by `arrived`. It must not refer to
            this object
    sizes   bytes of each file, by its name
    budget  bytes of files foreseen and not yet read from which on there is no room
    """

    def __init__(self, fetch: Callable[[str], None], sizes: Mapping[str, int], budget: int) -> None:
        self.sizes, self.budget = sizes, budget
        self._coming: dict[str, Future[None]] = {}
        self._bytes = 0
        self._lock = threading.Lock()
        names: _Queue = queue.SimpleQueue()
        self._names = names
        for number in range(THREADS):
            # Daemons: a download must not hold up the end of the process.
            threading.Thread(target=_fetch_all, args=(names, fetch), name=f"fetch {number}", daemon=True).start()
        self.close = weakref.finalize(self, _end, names)

    def foresee(self, names: Iterable[str]) -> bool:
        """Fetch these files in turn; True if there is room for more."""
        with self._lock:
            for name in names:
                if name not in self._coming:
                    self._coming[name] = Future()
                    self._bytes += self.sizes[name]
                    self._names.put((name, self._coming[name]))
            return self._bytes < self.budget

    def arrived(self, name: str) -> None:
        """Wait for a file if it was foreseen, and raise what its fetch has raised. It is read now and gives room."""
        with self._lock:
            coming = self._coming.get(name)
        if coming is None:
            return
        try:
            coming.result()
        finally:
            with self._lock:
                if self._coming.pop(name, None) is not None:
                    self._bytes -= self.sizes[name]


def _fetch_all(names: _Queue, fetch: Callable[[str], None]) -> None:
    """A thread of a FetchAhead."""
    while (item := names.get()) is not None:
        name, coming = item
        try:
            fetch(name)
        except BaseException as error:  # raised where the file is read
            coming.set_exception(error)
        else:
            coming.set_result(None)
        del item, coming  # an error leads, by where it was raised, to the FetchAhead: it could never be lost


def _end(names: _Queue) -> None:
    while not names.empty():
        try:
            names.get_nowait()
        except queue.Empty:
            break
    for _ in range(THREADS):
        names.put(None)
