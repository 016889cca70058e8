"""Signals that ask a run to stop: noted when they come, obeyed where the loop saves."""

from __future__ import annotations

import signal
from contextlib import AbstractContextManager
from types import FrameType, TracebackType


class Signals(AbstractContextManager["Signals"]):
    """SIGTERM, SIGINT and SIGUSR1 ask for a stop; the loop leaves through its usual save."""

    watched = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> Signals:
        self.before = {number: signal.signal(number, self._note) for number in self.watched}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
