"""Work that the main process does while the others wait: downloads, hashes, writes, previews.

The others do not wait inside a collective: one that stays open for longer than the group's time-out ends the job, and a
rank inside it hears nothing. They read, a few times a second, what the main process puts into the group's
store: that it is alive, what it is doing, and in the end that it is done or has failed.
"""

from __future__ import annotations

import atexit
import itertools
import json
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist

from wantrain.training.engine.accelerator import first_store
from wantrain.util import distributed
from wantrain.util.console import exit_code
from wantrain.util.progress import listening, report_progress

#: Seconds between two announcements of the main process.
ANNOUNCE = 5.0
#: Seconds without an announcement after which the main process counts as dead.
SILENCE = 300.0
#: Seconds without an announcement of a main process whose work has failed, after which it is gone.
FAREWELL = 20.0
#: Seconds between two reads of the store, at most.
LOOK = 0.25
#: Where in the store the announcement stands; each replaces the one before.
KEY = "wantrain/on_main"

Result = TypeVar("Result")

_calls = itertools.count(1)


def on_main(work: Callable[[], Result], doing: str) -> Result:
    """What `work()` returns in the main process, in all processes; the others wait for it as long as it takes.

    All processes must call it, in the same order. `doing` says what for; every `report_progress` of the work is passed
    on to those who listen in the other processes. Where the work fails, the main process raises what it raised; the
    others wait until it is gone, and end without a word, with the exit code of `console.exit_code`. Were they to end
    first, a launcher would stop the main process before it has finished a checkpoint and said what is wrong. They
    raise RuntimeError if it goes without a word.
    """
    if distributed.world_size() == 1:
        return work()
    call = next(_calls)
    result: list[Any] = [None]
    if distributed.is_main():
        with Announcer(call, doing) as announcer, listening(announcer.advance):
            result = [work()]
    else:
        _wait_for_main(call, doing)
    dist.broadcast_object_list(result)  # all are here by now, or a moment later
    found: Result = result[0]
    return found


def main_first(work: Callable[[], Result], doing: str) -> Result:
    """What `work()` returns in this process. The main one does it first: the others find what it made or downloaded."""
    mine: list[Result] = []
    on_main(lambda: mine.append(work()), doing)
    return mine[0] if mine else work()


@dataclass(frozen=True)
class Word:
    """What the main process says of the work that the others wait for.

    call      which call of `on_main`, counted from 1
    said      announcements so far: a new one shows that the process is alive
    advanced  units of work done so far: a new one shows that the work gets on
    doing     the unit under way
    ended     None while it works, then the exit code of the others; 0: all is well, and they go on
    """

    call: int
    said: int
    advanced: int
    doing: str
    ended: int | None = None


class Announcer:
    """In the main process, around the work: says every few seconds how far it is, and in the end how it ended; that it
    failed is said until the process is gone.
    """

    def __init__(self, call: int, doing: str) -> None:
        self.call, self.doing, self.said, self.advanced = call, doing, 0, 0
        self.ended: int | None = None
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._repeat, name="announcer", daemon=True)

    def __enter__(self) -> Announcer:
        self._say()
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.ended = exit_code(error)
            self._say()
            atexit.register(self._stop)  # a thread inside torch while the interpreter is taken down aborts the process
            return
        self._stop()
        self.ended = 0
        self._say()

    def advance(self, doing: str) -> None:
        """A unit of the work is done, and `doing` begins."""
        self.doing, self.advanced = doing, self.advanced + 1

    def _stop(self) -> None:
        self.over.set()
        self.thread.join()

    def _repeat(self) -> None:
        while not self.over.wait(ANNOUNCE):
            self._say()

    def _say(self) -> None:
        self.said += 1
        word = Word(self.call, self.said, self.advanced, self.doing, self.ended)
        first_store().set(KEY, json.dumps(asdict(word)))


def _wait_for_main(call: int, doing: str) -> None:
    """Until the main process has done the work of its `call`-th `on_main`. Exits where that failed."""
    words: queue.Queue[Word | Exception] = queue.Queue()
    # By a thread, for a read of the store of a machine that has stopped never returns.
    threading.Thread(target=_listen, args=(call, words), name="listener", daemon=True).start()
    timeout = first_store().timeout.total_seconds()  # until it gets here; then it speaks all the time
    word = Word(call, 0, -1, doing)
    while not _is_done(word, call):
        try:
            new = _next(words, timeout, doing)
        except RuntimeError:
            if word.ended:
                sys.exit(word.ended)  # what is wrong was said by the main process
            raise
        if new.advanced != word.advanced:
            report_progress(f"waiting for the main process: {new.doing}")
        word, timeout = new, FAREWELL if new.ended else SILENCE


def _next(words: queue.Queue[Word | Exception], timeout: float, doing: str) -> Word:
    """The next announcement. RuntimeError if none comes for `timeout` seconds, or none can come."""
    resume = "The last checkpoint is good: the same command goes on from it"
    try:
        word = words.get(timeout=timeout)
    except queue.Empty as error:
        raise RuntimeError(
            f"the main process has said nothing for {timeout:.0f} s, while this one waited for it ({doing}): it was "
            f"killed, or its machine is gone. {resume}"
        ) from error
    if isinstance(word, Exception):
        raise RuntimeError(f"the main process is gone, and its store with it ({doing}). {resume}") from word
    return word


def _is_done(word: Word, call: int) -> bool:
    """True if the work of `call` is done, so also if a later one is under way."""
    return word.call > call or word.ended == 0


def _listen(call: int, words: queue.Queue[Word | Exception]) -> None:
    """Hand on what the main process says from its `call`-th work on, until that is done or its store is gone."""
    store, heard, pause = first_store(), None, 0.01
    try:
        while heard is None or not _is_done(heard, call):
            word = Word(**json.loads(store.get(KEY))) if store.check([KEY]) else None
            if word is not None and word.call >= call and word != heard:
                heard = word
                words.put(word)
            time.sleep(pause)
            pause = min(2 * pause, LOOK)
    except dist.DistError as error:
        words.put(error)
