"""runs/NAME/index.html: the page of a run, written again while it trains, and runs/index.html, which compares runs."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from wantrain import page
from wantrain.runs.folder import RunFolder, read_config
from wantrain.runs.pages.content import FindClip, Pictures, Progress, content
from wantrain.runs.pages.log import RunLog, Tail
from wantrain.runs.pages.overview import write_overview
from wantrain.util import distributed
from wantrain.util.console import say
from wantrain.util.files import write_atomically

INDEX = "index.html"
#: Seconds between two writes at least, and how many times as long as a write took the training before the next one is.
SOONEST, SHARE = 10.0, 100.0


@dataclass
class RunPage:
    """The page of one run, on the main process; a `with` around the training says how it ended.

    steps      of the whole run
    find_clip  gives the clips of the data to look at; None: the page names them only

    Writing takes at most one hundredth of the time. A page never ends a run: what fails is said once.
    """

    folder: RunFolder
    steps: int
    find_clip: FindClip | None = None
    clock: Callable[[], float] = time.monotonic
    failed: bool = False
    refused: bool = False
    next_write: float = 0.0
    interval: float = SOONEST
    log: RunLog | None = None
    tail: Tail | None = None
    pictures: Pictures = field(init=False)

    def __post_init__(self) -> None:
        self.pictures = Pictures(self.find_clip, page.data_uri)

    def __enter__(self) -> RunPage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is not None:
            lines = str(error).strip().splitlines() or [kind.__name__]
            self._write("failed", lines[0])
            return
        self._write("ended")

    def refresh(self, *, now: bool = False) -> None:
        """Write the page if it is time to; `now`: in any case, because there is something new to see."""
        if now or self.clock() >= self.next_write:
            self._write("running", overview=self.log is None)

    def _write(self, state: str, message: str = "", *, overview: bool = False) -> None:
        if self.failed or not distributed.is_main():
            return
        began = self.clock()
        try:
            self.write(state, message)
            if overview or state != "running":
                write_overview(self.folder.path.parent)
        except OSError as error:
            if not self.refused:
                say(
                    f"warning: {self.folder.path / INDEX} cannot be written ({error}); the run goes on. Free disk space"
                )
            self.refused = True  # a disk may have room later
        except Exception as error:  # a fault of the page must not cost a training of days
            lines = "".join(traceback.format_exception(error))
            say(f"warning: the run goes on without its page, which failed. Please report it:\n{lines}")
            self.failed = True
        took = self.clock() - began
        self.interval = max(SOONEST, SHARE * took)
        self.next_write = self.clock() + self.interval

    def write(self, state: str, message: str = "") -> Path:
        """Read what is new in the run's folder, and write the page.

        A run that has `ended` is finished if it reached its last step, and was stopped otherwise.
        """
        if self.tail is None:
            self.tail = Tail(self.folder.metrics)
        if self.tail.was_replaced() or self.log is None:
            self.log = RunLog(_expert_of(self.folder))
        for row in self.tail.rows():
            self.log.add(row)
        if state == "ended":
            state = "finished" if self.log.last_step >= self.steps else "stopped"
        refresh = self.interval if state == "running" else 0.0
        data = content(self.folder, self.log, Progress(state, self.steps, message, refresh), self.pictures)
        path = self.folder.path / INDEX
        write_atomically(path, page.render("run", self.folder.path.name, data=data), sync=False)
        return path


def _expert_of(folder: RunFolder) -> str:
    """The name of the expert of a run that trains one."""
    with suppress(ValueError):
        return str(read_config(folder.path)["expert"]["name"])
    return "run"
