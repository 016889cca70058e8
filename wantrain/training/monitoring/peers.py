"""What the other processes of a run are doing: each says it every few seconds, and one that gets no further reads it.

The words stand in the store of the process group, never in a collective, so that they are there when a collective
fails. A thread with a connection of its own does all of it: a step costs nothing, and a store that answers no more
stops nothing else.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

import wantrain
from wantrain.training.engine.accelerator import first_store
from wantrain.training.monitoring.agreement import places
from wantrain.util import distributed

#: Seconds between two words of a process.
EVERY = 5.0
#: Seconds without progress after which a process looks at what the others say.
LOOK = 30.0
#: Seconds without a new word, seen while it looks, after which another process counts as gone.
SILENCE = 300.0
#: Seconds that the store may take to answer.
ANSWER = 3.0
#: Groups of processes that a report names, at most.
NAMED = 8
#: Where in the store the words stand.
KEY = "wantrain/doing/"

Result = TypeVar("Result")


@dataclass(frozen=True)
class Stage:
    """What a process says of itself.

    doing    what it began last
    seconds  how long ago that was, when it said so
    place    where in the program it was
    number   words so far: a new one shows that it lives
    at       when it said so, in seconds of its machine's clock
    ended    why it has ended; empty while it runs
    """

    rank: int
    host: str
    doing: str
    seconds: float
    place: str
    number: int
    at: float
    ended: str = ""

    @property
    def age(self) -> float:
        """Seconds since it was said, by this machine's clock."""
        return max(0.0, time.time() - self.at)


class Peers:
    """This process's words, and those of the others.

    now    what this process is doing, and for how many seconds
    owner  the thread that does it
    """

    def __init__(self, now: Callable[[], tuple[str, float]], owner: int) -> None:
        self._now, self._owner, self._rank, self._number = now, owner, distributed.rank(), 0
        self._store: Any = None
        self._changed: dict[int, tuple[int, float]] = {}  # by rank: a number, and when it was new
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        #: Why this process should wait no longer; None while it may.
        self.gone: str | None = None

    def start(self) -> None:
        """Begin to speak, as soon as there is a process group. Nothing in a run of one process."""
        if distributed.world_size() > 1:
            self._thread = threading.Thread(target=self._repeat, name="peers", daemon=True)
            self._thread.start()

    def end(self, why: str) -> None:
        """The last word of this process."""
        if self._thread is None:
            return
        self._over.set()
        self._thread.join(ANSWER)
        _within(ANSWER, lambda: self._say(why))

    def report(self) -> str:
        """What all processes were doing, in lines, those without progress for longest first; empty in a run of one
        process, and where the store does not answer it says so.
        """
        if self._thread is None:
            return ""
        stages = _within(ANSWER, self._read)
        if stages is None:
            return "the other processes cannot be asked: the machine that holds their store is gone, or does not answer"
        return "\n".join(
            ["what the processes were doing, those without progress for longest first:", *lines_of(stages)]
        )

    def look(self) -> None:
        """Note whose words are new; `gone` says if one has been silent for too long."""
        now = time.monotonic()
        for stage in self._read():
            number, since = self._changed.get(stage.rank, (-1, now))
            if stage.number != number:
                self._changed[stage.rank] = stage.number, now
            elif now - since > SILENCE and not stage.ended:
                self.gone = (
                    f"process {stage.rank} on {stage.host} has given no sign of life for {SILENCE:.0f} s: it was "
                    "killed, or its machine is gone"
                )

    def _repeat(self) -> None:
        while not self._over.wait(EVERY):
            try:
                self._say()
                if self._store is None or distributed.local_rank() > 0:  # one of each machine looks: fewer reads
                    continue
                if self._now()[1] > LOOK:
                    self.look()
                else:
                    self._changed.clear()
            except dist.DistNetworkError:  # the store has gone with its process: what waits for the others says so
                return
            except RuntimeError:  # torch's own errors of stores, such as an answer that takes too long
                continue

    def _say(self, ended: str = "") -> None:
        if self._store is None:
            self._store = _connection()
        if self._store is None:
            return
        self._number += 1
        doing, seconds = self._now()
        rank, host, place = self._rank, os.uname().nodename, _place(self._owner)
        word = Stage(rank, host, doing, round(seconds, 3), place, self._number, time.time(), ended)
        self._store.set(f"{KEY}{rank}", json.dumps(asdict(word)))

    def _read(self) -> list[Stage]:
        """The words of all that have spoken, in the order of ranks."""
        if self._store is None:
            return []
        keys = [f"{KEY}{rank}" for rank in range(distributed.world_size())]
        if not self._store.check(keys):
            keys = [key for key in keys if self._store.check([key])]
        return [Stage(**json.loads(word)) for word in self._store.multi_get(keys)] if keys else []


def lines_of(stages: Sequence[Stage]) -> list[str]:
    """A line for each group of processes that did the same, those without progress for longest first."""
    groups: dict[tuple[str, str, str, bool], list[Stage]] = {}
    for stage in stages:
        silent = stage.age > 3 * EVERY and not stage.ended
        groups.setdefault((stage.doing, stage.place, stage.ended, silent), []).append(stage)
    ordered = sorted(groups.values(), key=lambda group: max(map(_standing, group)), reverse=True)
    lines = [_line(group) for group in ordered[:NAMED]]
    left = sum(len(group) for group in ordered[NAMED:])
    return [*lines, f"  and {left} more"] if left else lines


def _standing(stage: Stage) -> float:
    """For how many seconds a process has made no progress, as far as is known: for ever, if it has ended."""
    return math.inf if stage.ended else stage.seconds + stage.age


def _line(group: Sequence[Stage]) -> str:
    first = max(group, key=_standing)
    who = places([stage.rank for stage in group], {stage.rank: stage.host for stage in group})
    place = f" ({first.place})" if first.place else ""
    if first.ended:
        return f"  {who} ended while {first.doing}{place}: {first.ended}"
    heard = f"; last heard of {first.age:.0f} s ago" if first.age > 3 * EVERY else ""
    return f"  {who} {first.doing} for {_standing(first):.0f} s{place}{heard}"


def is_broken_group(error: BaseException) -> bool:
    """True for what torch raises where a process of the group does not answer: gloo's errors have no class."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _connection() -> Any:
    """A connection of its own to the group's store; None while there is no group."""
    if not dist.is_initialized():
        return None
    store = first_store().clone()
    store.set_timeout(timedelta(seconds=ANSWER))
    return store


def _place(owner: int) -> str:
    """Where in the package a thread is: file, line and function."""
    frame, root = sys._current_frames().get(owner), str(Path(wantrain.__file__).parent)
    while frame is not None and not frame.f_code.co_filename.startswith(root):
        frame = frame.f_back
    return "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"


def _within(seconds: float, work: Callable[[], Result]) -> Result | None:
    """What `work()` returns; None if it takes longer, or fails as a store does: a read of the store of a machine that
    has stopped may never return.
    """
    answers: list[Result] = []

    def answer() -> None:
        with suppress(RuntimeError):
            answers.append(work())

    thread = threading.Thread(target=answer, name="peers' answer", daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None
