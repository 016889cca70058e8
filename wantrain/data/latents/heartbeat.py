"""Heartbeats: each rank of a launch writes its progress into a small file, since there is no process group to ask."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from wantrain.util import distributed
from wantrain.util.files import write_atomically

#: Least seconds between two heartbeats of a rank.
INTERVAL = 2.0
#: Seconds after which the failure that a rank has written counts: it may be left from an earlier run, which that rank
#: has not removed yet.
GRACE = 20.0


class Heartbeat:
    """The heartbeat files of a launch, in `out`: writes this rank's, and lets rank 0 wait for the others'.

    work     name of the work; heartbeats of other work are ignored
    timeout  seconds without a heartbeat after which a rank counts as lost
    part     number of this launch among several in one folder
    """

    def __init__(self, out: Path, work: str, *, timeout: float, part: int = 1) -> None:
        self.out, self.work, self.timeout, self.part = out, work, timeout, part
        self._last = -INTERVAL
        self._path(distributed.rank()).unlink(missing_ok=True)

    def __enter__(self) -> Heartbeat:
        self.send("begun", now=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self.send("done" if kind is None else f"failed: {error or kind}", now=True)

    def send(self, state: str, *, now: bool = False) -> None:
        """Write this rank's state, at most once per `INTERVAL` unless `now`. A launch of one rank writes nothing."""
        if distributed.world_size() == 1 or not (now or time.monotonic() - self._last >= INTERVAL):
            return
        self._last = time.monotonic()
        # The time makes each heartbeat differ from the one before; it is not compared with a clock.
        content = {"work": self.work, "state": state, "host": os.uname().nodename, "time": time.time()}
        write_atomically(self._path(distributed.rank()), json.dumps(content))

    def wait(self) -> None:
        """On rank 0: wait until all other ranks are done. ValueError for one that failed, or is silent for too long."""
        others = {rank: (self._read(rank), time.monotonic()) for rank in range(1, distributed.world_size())}
        while waiting := [rank for rank, (last, _) in others.items() if last.get("state") != "done"]:
            for rank in waiting:
                current, (last, since) = self._read(rank), others[rank]
                if current != last:
                    others[rank] = current, time.monotonic()
                elif time.monotonic() - since > self.timeout:
                    raise ValueError(
                        f"rank {rank} of {distributed.world_size()} has given no sign of life for {self.timeout:g} s "
                        f"(its last state: {current.get('state', 'none')}); see its output, and start the same command "
                        "again: it continues from what is finished"
                    )
                elif str(current.get("state")).startswith("failed") and time.monotonic() - since > GRACE:
                    raise ValueError(f"rank {rank} of {distributed.world_size()} {current['state']}")
            time.sleep(0.1)

    def _read(self, rank: int) -> dict[str, Any]:
        """The last heartbeat of a rank; empty if there is none for this work."""
        try:
            content = json.loads(self._path(rank).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return content if content.get("work") == self.work else {}

    def _path(self, rank: int) -> Path:
        own = "" if self.part == 1 else f"{self.part}-"
        return self.out / f".rank-{own}{rank}.json"
