"""Prefetching: one thread loads batches, or other items, ahead of the consumer, in order.

A thread, not a process: reading a mapped file and stacking arrays hold the interpreter lock only briefly, and a pipe to
another process costs more than the work.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


def prefetch(requests: Iterator[Callable[[], T]], depth: int = 2) -> Prefetch[T]:
    """Call the requests in order in a thread, up to `depth` results ahead; its errors are raised in the consumer."""
    return Prefetch(requests, depth)


class Prefetch(Iterator[T], Generic[T]):
    """Results of requests, from a thread that runs ahead. `close`, losing the last reference, and exit end it.

    Ending waits for the thread: a thread inside torch while the interpreter shuts down would abort the process with
    another exit code.
    """

    def __init__(self, requests: Iterator[Callable[[], T]], depth: int) -> None:
        self._ready: queue.Queue[T | BaseException | None] = queue.Queue(maxsize=depth)
        self._last: tuple[BaseException | None] | None = None  # what ended the thread, where `waiting` came upon it
        stopped = threading.Event()
        # The thread must not hold `self`, or the last reference would never be lost.
        thread = threading.Thread(target=_answer, args=(requests, self._ready, stopped), name="prefetch", daemon=True)
        self._thread = thread
        self.close = weakref.finalize(self, _end, thread, stopped)
        thread.start()

    def __next__(self) -> T:
        if not self.close.alive:
            raise StopIteration
        item = self._next_item()
        if item is not None and not isinstance(item, BaseException):
            return item
        self.close()
        raise StopIteration if item is None else item

    def waiting(self) -> T | None:
        """The next item if it is there already; None if it is not, or if an error or the end comes next."""
        if self._last is not None or not self.close.alive:
            return None
        try:
            item = self._ready.get_nowait()
        except queue.Empty:
            return None
        if item is None or isinstance(item, BaseException):
            self._last = (item,)
            return None
        return item

    def _next_item(self) -> T | BaseException | None:
        """The next item; ValueError if the thread died without an error, since nothing would ever come."""
        if self._last is not None:
            return self._last[0]
        while True:
            try:
                return self._ready.get(timeout=1.0)
            except queue.Empty:
                if not self._thread.is_alive() and self._ready.empty():
                    raise ValueError(
                        "the thread that loads data has ended without an error and without a batch; start the same "
                        "command again: it continues from what is finished"
                    ) from None


def _answer(
    requests: Iterator[Callable[[], T]],
    ready: queue.Queue[T | BaseException | None],
    stopped: threading.Event,
) -> None:
    """The thread of a Prefetch: puts results in order, then an error or None."""

    def put(item: T | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                break
            except queue.Full:
                continue

    try:
        for request in requests:
            put(request())
            if stopped.is_set():
                return
        put(None)
    except BaseException as error:  # raised in the consumer
        put(error)


def _end(thread: threading.Thread, stopped: threading.Event) -> None:
    stopped.set()
    if thread is not threading.current_thread():
        thread.join()
