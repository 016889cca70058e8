"""A pipeline of batches: one thread makes them ready, the caller works on them, another thread stores what comes out.

While the device works on batch n, batch n+1 is read, stacked and copied to it, and batch n-1 is brought back and
written. Everything that the device is given comes from the caller's thread, because the current device, stream and
inference mode belong to a thread. Six batches exist at most: one being read, one that is ready, one on its way to the
device, one being worked on; and results of two, one waiting and one being stored.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

from wantrain.data.prefetch import prefetch

Ready = TypeVar("Ready")
Uploaded = TypeVar("Uploaded")
Result = TypeVar("Result")
Item = TypeVar("Item")


class Pipeline(Generic[Ready, Uploaded, Result]):
    """Batches on their way from `source` to `store`, in order.

    source        what makes each batch ready; iterated and called in a thread of its own, from `__enter__` on
    close_source  makes `source` end, whatever it waits for; called from the caller's thread
    upload        begins to copy a batch to the device, one batch ahead of `work`
    work          a batch on the device -> its result
    store         is given the results and stores them all, in a thread of its own; where the pipeline ends early, its
                  iterator raises `Abandoned` after those that were made

    An error of any of them is raised in the caller's thread, and leaves no thread behind.
    """

    def __init__(
        self,
        source: Iterator[Callable[[], Ready]],
        *,
        upload: Callable[[Ready], Uploaded],
        work: Callable[[Uploaded], Result],
        store: Callable[[Iterator[Result]], None],
        close_source: Callable[[], None],
    ) -> None:
        self.source, self.close_source = source, close_source
        self.upload, self.work, self.store = upload, work, store

    def __enter__(self) -> Pipeline[Ready, Uploaded, Result]:
        self._ready = prefetch(self.source, depth=1)
        return self

    def __exit__(self, *error: object) -> None:
        self.close_source()  # first, since the thread may be waiting in it
        self._ready.close()

    def run(self) -> None:
        """All batches from beginning to end."""
        with _Storing(self.store) as storing:
            for batch in _one_ahead(map(self.upload, self._ready)):
                storing.put(self.work(batch))


class Abandoned(Exception):
    """No more results will come, though more were to."""


class _Storing(Generic[Result]):
    """The thread that stores. Its error is raised by the next `put`, or at the end."""

    def __init__(self, store: Callable[[Iterator[Result]], None]) -> None:
        self.store = store
        self.results: queue.Queue[Result | None] = queue.Queue(maxsize=1)
        self.whole = False  # None has come because nothing is left
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="storing", daemon=True)

    def __enter__(self) -> _Storing[Result]:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.whole = kind is None
        self._put(None)
        self.thread.join()
        if self.error is not None and self.error is not error:
            raise self.error

    def put(self, result: Result) -> None:
        """Hand over a result; waits while one is being stored and another waits already."""
        self._put(result)
        if self.error is not None:
            raise self.error

    def _put(self, result: Result | None) -> None:
        while self.thread.is_alive():
            try:
                self.results.put(result, timeout=0.1)
                break
            except queue.Full:
                continue

    def _run(self) -> None:
        results = self._taken()
        try:
            self.store(results)
            assert next(results, None) is None, "store takes all results"
        except Abandoned:
            return  # the caller has an error already
        except BaseException as error:  # the caller raises it
            self.error = error

    def _taken(self) -> Iterator[Result]:
        while (result := self.results.get()) is not None:
            yield result
        if not self.whole:
            raise Abandoned


def _one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items, each asked for before the one before it is given."""
    waiting: list[Item] = []
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting
