"""Batches ahead of the consumer: a few threads that load, in order.

Threads, not processes: reading a mapped file and stacking arrays hold the interpreter only briefly, and a pipe to
another process costs more than the work.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

from wantrain.batch import Batch

#: Seconds after which it is looked whether a batch that does not come still has somebody who loads it.
PATIENCE = 1.0


def prefetch(requests: Iterator[Callable[[], Batch]], *, threads: int = 2, depth: int = 3) -> Prefetch:
    """Answer requests in order, `threads` at a time and up to `depth` ahead of the consumer; errors are raised here."""
    return Prefetch(requests, threads, depth)


class Prefetch(Iterator[Batch]):
    """Batches in order from threads that load ahead. `close` ends the threads; so do the last reference and exit.

    They are waited for, because one that is inside torch while the interpreter is taken down aborts the process with
    another exit code.
    """

    def __init__(self, requests: Iterator[Callable[[], Batch]], threads: int, depth: int) -> None:
        # The threads must not hold `self`, or the last reference would never go.
        self._line = _Line(requests, threading.Semaphore(depth))
        self._threads = [
            threading.Thread(target=_serve, args=(self._line,), name="prefetch", daemon=True) for _ in range(threads)
        ]
        self.close = weakref.finalize(self, _end, self._threads, self._line)
        for thread in self._threads:
            thread.start()

    def __next__(self) -> Batch:
        if not self.close.alive:
            raise StopIteration
        place = self._next_place()
        if place is None:
            self.close()
            raise StopIteration
        while not wait([place.batch], PATIENCE).done:
            self._check_alive([place.thread])
        self._line.room.release()
        if place.batch.exception() is not None:
            self.close()
        return place.batch.result()

    def _next_place(self) -> _Place | None:
        while True:
            try:
                return self._line.places.get(timeout=PATIENCE)
            except queue.Empty:
                self._check_alive(self._threads)

    def _check_alive(self, threads: list[threading.Thread]) -> None:
        """ValueError if all of these are gone without a word, for then nothing would ever come."""
        if not any(thread.is_alive() for thread in threads):
            raise ValueError(
                "the thread that loads data is gone, and has left no batch; the last checkpoint is good: the same "
                "command goes on from it"
            )


@dataclass(frozen=True)
class _Place:
    """A batch that will come, and who loads it."""

    thread: threading.Thread
    batch: Future[Batch]


@dataclass
class _Line:
    """What the threads share: requests, taken in turn, and their places in the order; None ends it."""

    requests: Iterator[Callable[[], Batch]]
    room: threading.Semaphore
    places: queue.SimpleQueue[_Place | None] = field(default_factory=queue.SimpleQueue)
    turn: threading.Lock = field(default_factory=threading.Lock)
    stopped: threading.Event = field(default_factory=threading.Event)

    def take(self) -> tuple[_Place, Callable[[], Batch]] | None:
        """The next request and its place; None if there is none, or nobody listens. What it raises has a place too."""
        self.room.acquire()
        with self.turn:
            if self.stopped.is_set():
                return None
            place = _Place(threading.current_thread(), Future())
            try:
                request = next(self.requests)
            except StopIteration:
                self.stopped.set()
                self.places.put(None)
                return None
            except BaseException as error:  # handed to the consumer, who raises it
                self.stopped.set()
                place.batch.set_exception(error)
                self.places.put(place)
                return None
            self.places.put(place)
            return place, request


def _serve(line: _Line) -> None:
    """A thread of a Prefetch: answers in turn."""
    while (taken := line.take()) is not None:
        place, request = taken
        del taken
        try:
            place.batch.set_result(request())
        except BaseException as error:  # handed to the consumer, who raises it
            place.batch.set_exception(error)
            return
        del place, request  # or a thread that waits for room would keep the last batch
    line.room.release()  # for the next that waits to see that it is over


def _end(threads: list[threading.Thread], line: _Line) -> None:
    line.stopped.set()
    line.room.release()
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join()
