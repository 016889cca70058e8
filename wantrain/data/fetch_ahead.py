"""Fetching ahead: files in the order in which they will be read, several at once, within a budget of bytes."""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future

#: Files that are fetched at once.
THREADS = 4
#: Files that may be held open until they are read, far below what a process may have open.
FILES = 256

_Queue = queue.SimpleQueue[tuple[str, Future[int]] | None]


class FetchAhead:
    """Fetches files before they are read, and holds them open until then, so that nobody removes them. Losing the last
    reference ends its threads after what they are at.

    fetch   gives an open handle of a file, by its name; its errors are raised by `arrived`. It must not refer to this
            object
    sizes   bytes of each file, by its name
    budget  bytes of files foreseen and not yet read from which on no more are wanted
    """

    def __init__(self, fetch: Callable[[str], int], sizes: Mapping[str, int], budget: int) -> None:
        self.sizes, self.budget = sizes, budget
        self._coming: dict[str, Future[int]] = {}
        self._bytes = 0
        self._lock = threading.Lock()
        names: _Queue = queue.SimpleQueue()
        self._names = names
        for number in range(THREADS):
            # Daemons: a download must not hold up the end of the process.
            threading.Thread(target=_fetch_all, args=(names, fetch), name=f"fetch {number}", daemon=True).start()
        self.close = weakref.finalize(self, _end, names, self._coming)

    def foresee(self, names: Iterable[str]) -> bool:
        """Fetch these files in turn; True if more are wanted."""
        with self._lock:
            for name in names:
                if name not in self._coming:
                    self._coming[name] = Future()
                    self._bytes += self.sizes[name]
                    self._names.put((name, self._coming[name]))
            return self._bytes < self.budget and len(self._coming) < FILES

    def arrived(self, name: str) -> int | None:
        """The handle of a file that was foreseen, which is waited for and belongs to the caller from now on; raises
        what its fetch has raised. None for another file.
        """
        with self._lock:
            coming = self._coming.pop(name, None)
            if coming is None:
                return None
            self._bytes -= self.sizes[name]
        return coming.result()


def _fetch_all(names: _Queue, fetch: Callable[[str], int]) -> None:
    """A thread of a FetchAhead."""
    while (item := names.get()) is not None:
        name, coming = item
        try:
            handle = fetch(name)
        except BaseException as error:  # raised where the file is read
            coming.set_exception(error)
        else:
            coming.set_result(handle)
        del item, coming  # an error leads, by where it was raised, to the FetchAhead: it could never be lost


def _end(names: _Queue, coming: Mapping[str, Future[int]]) -> None:
    while not names.empty():
        try:
            names.get_nowait()
        except queue.Empty:
            break
    for _ in range(THREADS):
        names.put(None)
    for each in coming.values():
        each.add_done_callback(_let_go)


def _let_go(arrived: Future[int]) -> None:
    """Close a file that nobody will read."""
    if arrived.exception() is None:
        os.close(arrived.result())
