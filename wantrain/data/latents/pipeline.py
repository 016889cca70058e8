"""A pipeline of batches in three threads: one prepares batches, the caller's computes, a third stores the results.

While the device computes batch n, batch n+1 is read, stacked and copied to it, and batch n-1 is copied back and
written. All device work is issued from the caller's thread, because the current device, stream and inference mode are
per thread. At most six batches exist: one being read, one ready, one being copied to the device, one being computed,
and the results of two, one waiting and one being stored.
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
    """Moves batches from `source` to `store`, in order.

    source        yields functions that prepare one batch each; iterated and called in its own thread
    close_source  ends `source`, whatever it waits for; called from the caller's thread
    upload        starts to copy a batch to the device, one batch ahead of `work`
    work          a batch on the device -> its result
    store         stores all results of the iterator that it receives, in its own thread; if the pipeline ends early,
                  the iterator raises `Abandoned` after the last result

    An error in any of them is raised in the caller's thread, and no thread is left running.
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
        self.close_source()  # first: the thread may be waiting in it
        self._ready.close()

    def run(self) -> None:
        """Process all batches."""
        with _Storing(self.store) as storing:
            for batch in _one_ahead(map(self.upload, self._ready)):
                storing.put(self.work(batch))


class Abandoned(Exception):
    """The pipeline ended early: no more results will come."""


class _Storing(Generic[Result]):
    """The storing thread. Its error is raised by the next `put`, or at the end."""

    def __init__(self, store: Callable[[Iterator[Result]], None]) -> None:
        self.store = store
        self.results: queue.Queue[Result | None] = queue.Queue(maxsize=1)
        self.complete = False  # True if all results have been put
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="storing", daemon=True)

    def __enter__(self) -> _Storing[Result]:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.complete = kind is None
        self._put(None)
        self.thread.join()
        if self.error is not None and self.error is not error:
            raise self.error

    def put(self, result: Result) -> None:
        """Hand over a result; blocks while one result is being stored and another one waits."""
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
        results = self._results()
        try:
            self.store(results)
            assert next(results, None) is None, "store takes all results"
        except Abandoned:
            return  # the caller already has an error
        except BaseException as error:  # the caller raises it
            self.error = error

    def _results(self) -> Iterator[Result]:
        while (result := self.results.get()) is not None:
            yield result
        if not self.complete:
            raise Abandoned


def _one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items, each fetched before the previous one is yielded."""
    waiting: list[Item] = []
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting
