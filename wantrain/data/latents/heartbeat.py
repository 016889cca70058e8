"""Heartbeat: how far each process of a launch is, told through small files, where there is no process group to ask."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from wantrain.util import distributed
from wantrain.util.files import write_atomically

#: A rank writes how far it is at most this often, and a failure counts once it has stood for so long (seconds): it may
#: be one of an earlier run, which that rank has not removed yet.
BEAT, GRACE = 2.0, 20.0


class Heartbeat:
    """How far each process is, in small files, since there is no process group to ask.

    plan      what is being done, in a word: what was said about another plan does not count
    timeout  seconds without a sign of life after which a rank counts as lost
    """

    def __init__(self, out: Path, plan: str, *, timeout: float) -> None:
        self.out, self.plan, self.timeout = out, plan, timeout
        self._said = -BEAT
        self._path(distributed.rank()).unlink(missing_ok=True)

    def __enter__(self) -> Heartbeat:
        self.say("begun", now=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self.say("done" if kind is None else f"failed: {error or kind}", now=True)

    def say(self, state: str, *, now: bool = False) -> None:
        """Note how far this rank is; not more often than every two seconds unless `now`."""
        if distributed.world_size() == 1 or not (now or time.monotonic() - self._said >= BEAT):
            return
        self._said = time.monotonic()
        # The time makes each note another one; nobody compares it with a clock.
        told = {"plan": self.plan, "state": state, "host": os.uname().nodename, "time": time.time()}
        write_atomically(self._path(distributed.rank()), json.dumps(told))

    def wait(self) -> None:
        """Rank 0: until all others are done; ValueError names one that failed, or has been silent for too long."""
        heard = {rank: (self._read(rank), time.monotonic()) for rank in range(1, distributed.world_size())}
        while waiting := [rank for rank, (told, _) in heard.items() if told.get("state") != "done"]:
            for rank in waiting:
                told, since = self._read(rank), heard[rank][1]
                if told != heard[rank][0]:
                    heard[rank] = told, time.monotonic()
                elif time.monotonic() - since > self.timeout:
                    raise ValueError(
                        f"rank {rank} of {distributed.world_size()} has given no sign of life for {self.timeout:g} s "
                        f"(its last: {told.get('state', 'none')}); look at its output, and start the same "
                        "command again: it goes on where this one ends"
                    )
                elif str(told.get("state")).startswith("failed") and time.monotonic() - since > GRACE:
                    raise ValueError(f"rank {rank} of {distributed.world_size()} {told['state']}")
            time.sleep(0.1)

    def _read(self, rank: int) -> dict[str, Any]:
        try:
            told = json.loads(self._path(rank).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return told if told["plan"] == self.plan else {}

    def _path(self, rank: int) -> Path:
        return self.out / f".rank-{rank}.json"
