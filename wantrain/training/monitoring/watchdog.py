"""The watchdog: a run that does nothing for too long ends with every thread's stack, instead of hanging for days.

Of several processes it says too where each of them is, by what they say of themselves (peers.py).
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from contextlib import ExitStack
from types import TracebackType

from wantrain.training.monitoring.deadline import Deadline
from wantrain.training.monitoring.peers import ANSWER, Peers, is_broken_group
from wantrain.util import distributed
from wantrain.util.progress import listening

assert sys.__stderr__ is not None
STDERR = sys.__stderr__

#: Exit code of a run that the watchdog ended: EX_TEMPFAIL, so that a scheduler starts it again.
HUNG = 75
#: Seconds after which the C library's timers do the same, should a thread hold the interpreter for ever.
GRACE = 3.0
RESUME = "The same command goes on from the last checkpoint"
#: Letters of an error that other processes are given, at most.
LONGEST = 300


class Watchdog:
    """Ends the process where `seconds` pass without `report_progress`; None: never.

    It is entered before anything that it is to watch. Every rank has its own: where one stops before a reduction, all
    of them wait, and all of them end. A process that waits also ends, with the same code, where another one has given
    no sign of life for `peers.SILENCE` seconds.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.doing = "starting"
        self.last = self.armed = time.monotonic()
        self.over, self.arming, self.fed = threading.Event(), threading.Lock(), ExitStack()
        self.owner = threading.get_ident()
        self.thread: threading.Thread | None = None
        self.deadline: Deadline | None = None
        self.peers = Peers(self._now, self.owner)

    def __enter__(self) -> Watchdog:
        self.owner = threading.get_ident()
        if self.seconds is not None:
            self.deadline = Deadline(HUNG, STDERR)
            self.feed("starting")
            self._arm()
            self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self.thread.start()
        if self.seconds is not None or distributed.world_size() > 1:
            self.fed.enter_context(listening(self.feed))
        self.peers = Peers(self._now, self.owner)
        self.peers.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.fed.close()
        if self.thread is not None and self.deadline is not None:
            with self.arming:  # another thread's feed may be under way
                self.over.set()
                self.deadline.close()
            self.thread.join()
        if error is not None and is_broken_group(error):
            print(
                f"error: a process does not answer, while {self.doing}\n{self.peers.report()}", file=STDERR, flush=True
            )
        self.peers.end("in order" if error is None else f"{type(error).__name__}: {error}"[:LONGEST])

    def _now(self) -> tuple[str, float]:
        return self.doing, time.monotonic() - self.last

    def feed(self, doing: str) -> None:
        """Something was done, and `doing` begins. What other threads do shows that work goes on, and is not named: the
        one that entered is what all else waits for.
        """
        if threading.get_ident() == self.owner:
            self.doing = doing
            if self.deadline is not None:
                self.deadline.say(self.message)
        self.last = time.monotonic()
        if self.last - self.armed > 1.0:  # faulthandler's timer is a thread, which each time is another one
            self._arm()

    @property
    def message(self) -> str:
        """What is said when it ends the process."""
        return (
            f"error: nothing has happened for {self.seconds:g} s (safeguards.hang) while {self.doing}; every thread's "
            f"stack follows, and exit code {HUNG}. {RESUME}"
        )

    def _arm(self) -> None:
        with self.arming:
            if self.seconds is not None and self.deadline is not None and not self.over.is_set():
                self.armed = time.monotonic()
                self.deadline.set(self.seconds + GRACE)

    def _watch(self) -> None:
        assert self.seconds is not None
        while not self.over.wait(max(0.05, min(1.0, self.last + self.seconds - time.monotonic()))):
            if time.monotonic() - self.last > self.seconds:
                self._end(self.message)
            elif self.peers.gone is not None:
                self._end(f"error: {self.peers.gone}, while this one waits ({self.doing}); exit code {HUNG}. {RESUME}")

    def _end(self, message: str) -> None:
        print(message, file=STDERR, flush=True)
        with self.arming:
            if self.deadline is not None:
                self.deadline.set(4 * ANSWER)  # time for what follows
        faulthandler.dump_traceback(file=STDERR, all_threads=True)
        if report := self.peers.report():
            print(report, file=STDERR, flush=True)
        self.peers.end(message)
        os._exit(HUNG)  # a thread that hangs would keep any gentler end waiting
