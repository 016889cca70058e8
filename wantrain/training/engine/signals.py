"""Signals that ask a run to stop: noted when they come, obeyed where the loop saves."""

from __future__ import annotations

import signal
from contextlib import AbstractContextManager
from types import FrameType, TracebackType


class Signals(AbstractContextManager["Signals"]):
    """SIGTERM, SIGINT, SIGUSR1 and SIGHUP ask for a stop; the loop leaves through its usual save.

    SIGHUP comes when a terminal is closed. Where it is ignored already (nohup), it stays ignored.
    """

    watched = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> Signals:
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        watched = [number for number in self.watched if not (nohup and number == signal.SIGHUP)]
        self.before = {number: signal.signal(number, self._note) for number in watched}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
