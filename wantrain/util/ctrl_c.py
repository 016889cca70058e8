"""Ctrl-C as one line while a command's libraries load, which takes seconds, and while they end; it imports none."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

#: Exit code after Ctrl-C, as shells have it.
INTERRUPTED = 128 + signal.SIGINT
STOPPED = "stopped by Ctrl-C; the same command starts again from what is finished"


def ends_at_once() -> None:
    """Let Ctrl-C end the program with one line and `INTERRUPTED`, without clean-up: for times with nothing to clean up.

    An exception would not do: modules of C and callbacks of the import system drop it, or make another error of it.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raises() -> bool:
    """Let Ctrl-C raise KeyboardInterrupt again; False if it does already, or if somebody else handles it."""
    if signal.getsignal(signal.SIGINT) is not _end:
        return False
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return True


def _end(number: int, frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{STOPPED}\n".encode())  # print is not reentrant
    os._exit(INTERRUPTED)
