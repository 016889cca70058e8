"""The watchdog: a run that does nothing for too long ends with every thread's stack, instead of hanging for days."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from types import TracebackType

assert sys.__stderr__ is not None
STDERR = sys.__stderr__

#: Exit code of a run that the watchdog ended: EX_TEMPFAIL, so that a scheduler starts it again.
HUNG = 75
#: Seconds after which the C library's own timer does the same, should a thread hold the interpreter for ever.
GRACE = 3.0


class Watchdog:
    """Ends the process where `seconds` pass between two beats; None: never.

    Every rank has its own: where one stops before a reduction, all of them wait, and all of them end.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.doing = "starting"
        self.last = self.armed = time.monotonic()
        self.over = threading.Event()
        self.thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self.seconds is not None:
            self.beat("starting")
            self._arm(self.seconds)
            self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.thread is not None:
            self.over.set()
            self.thread.join()
            faulthandler.cancel_dump_traceback_later()

    def beat(self, doing: str) -> None:
        """Something was done, and `doing` begins."""
        self.doing, self.last = doing, time.monotonic()
        if self.seconds is not None and self.last - self.armed > 1.0:  # setting the C library's timer starts a thread
            self._arm(self.seconds)

    def _arm(self, seconds: float) -> None:
        self.armed = time.monotonic()
        faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=STDERR)

    def _watch(self) -> None:
        assert self.seconds is not None
        while not self.over.wait(max(0.05, min(1.0, self.last + self.seconds - time.monotonic()))):
            if time.monotonic() - self.last > self.seconds:
                self._end()

    def _end(self) -> None:
        print(
            f"error: nothing has happened for {self.seconds:g} s (tripwires.hang) while {self.doing}; every thread's "
            "stack follows. The last checkpoint is good: the same command goes on from it",
            file=STDERR,
            flush=True,
        )
        faulthandler.dump_traceback(file=STDERR, all_threads=True)
        os._exit(HUNG)  # a thread that hangs would keep any gentler end waiting
