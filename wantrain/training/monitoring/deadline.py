"""Ends a process whose interpreter answers no more: timers of the C library say why, show the stacks and exit.

A thread that never gives the interpreter back keeps every other Python thread from running, a watchdog's too. POSIX
timers (timer_create(2) with SIGEV_THREAD) need no interpreter: they run a C function of one argument in a thread of
their own. faulthandler's timer, the only other one that Python has, can exit with code 1 alone, and without a word.
"""

from __future__ import annotations

import ctypes
import faulthandler
import sys
from contextlib import suppress
from typing import IO, Any

CLOCK_MONOTONIC, SIGEV_THREAD = 1, 2
#: Bytes for the message; what is longer than half of it is cut, for each % takes two.
ROOM = 1000
#: Seconds after the message until the stacks, and from them until the end: a slow disk or terminal takes them in time.
PAUSES = (0.5, 2.0)


class _Event(ctypes.Structure):
    """sigevent, as Linux has it: 64 bytes."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("rest", ctypes.c_char * 32),
    )


class _Times(ctypes.Structure):
    """itimerspec: how often again, and how long until the first time."""

    _fields_ = tuple((name, ctypes.c_long) for name in ("again_s", "again_ns", "seconds", "nanoseconds"))


class Deadline:
    """Ends the process with exit code `code` when the time that was set last is over. Close it, or it will.

    Where the system has no such timers, faulthandler's does it: with the stacks, but with code 1 and without the
    message.
    """

    def __init__(self, code: int, file: IO[str]) -> None:
        self._file, self._text = file, ctypes.create_string_buffer(ROOM)
        self._timers = _timers({"warnx": ctypes.addressof(self._text), "_exit": code})

    @property
    def speaks(self) -> bool:
        """True if it says its message and leaves with its code."""
        return bool(self._timers)

    def say(self, message: str) -> None:
        """What is said when the time is over."""
        # warnx takes a format; it reads while this writes at worst, and there is always a zero at the end.
        self._text.value = message.encode()[: ROOM // 2 - 1].replace(b"%", b"%%")

    def set(self, seconds: float) -> None:
        """The time is over in `seconds` from now."""
        stacks, end = PAUSES[0], sum(PAUSES)
        for timer, later in zip(self._timers, (0.0, end), strict=False):
            _set(timer, seconds + later)
        faulthandler.dump_traceback_later(seconds + stacks, exit=not self.speaks, file=self._file)

    def close(self) -> None:
        """It ends nothing any more."""
        faulthandler.cancel_dump_traceback_later()
        for timer in self._timers:
            _delete(timer)
        self._timers = []


def _function(name: str) -> Any:
    """A function of the C library; None where it has none of that name."""
    for library in (None, "librt.so.1"):  # glibc before 2.34 keeps timers apart
        with suppress(OSError, AttributeError):
            return getattr(ctypes.CDLL(library), name)
    return None


_create, _settime, _delete = (_function(f"timer_{name}") for name in ("create", "settime", "delete"))


def _timers(calls: dict[str, int]) -> list[ctypes.c_void_p]:
    """A timer for each function of the C library with its argument; none where there are no such timers."""
    functions = {name: _function(name) for name in calls}
    if not sys.platform.startswith("linux") or None in (_create, *functions.values()):
        return []
    timers = []
    for name, argument in calls.items():
        function = ctypes.cast(functions[name], ctypes.c_void_p)
        event, timer = _Event(argument, 0, SIGEV_THREAD, function), ctypes.c_void_p()
        if _create(CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)):
            return []  # the user's limit on pending signals
        timers.append(timer)
    return timers


def _set(timer: ctypes.c_void_p, seconds: float) -> None:
    whole = int(seconds)
    times = _Times(0, 0, whole, int((seconds - whole) * 1e9))
    _settime(timer, 0, ctypes.byref(times), None)
