"""Whether steps waited for shards from an address, how fast these came, and how fast they would have to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from wantrain.data.remote import Traffic
from wantrain.util.console import say

#: Steps between two lines on the console, and the share of their time from which on waiting is said.
SAY_EVERY, SAID_FROM = 100, 0.02


@dataclass(frozen=True)
class Window:
    """Some steps: their seconds, those of them that waited for shards, and the bytes that came meanwhile."""

    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    fetched: int = 0

    def plus(self, other: Window) -> Window:
        """Both windows as one."""
        return Window(
            self.steps + other.steps,
            self.seconds + other.seconds,
            self.waited + other.waited,
            self.fetched + other.fetched,
        )

    @property
    def share(self) -> float:
        """The share of the time that was waited."""
        return self.waited / self.seconds if self.seconds else 0.0

    @property
    def rate(self) -> float:
        """10^6 bytes per second that came."""
        return self.fetched / self.seconds / 1e6 if self.seconds else 0.0

    @property
    def needed(self) -> float:
        """10^6 bytes per second with which the same bytes would have come while the steps computed."""
        return self.fetched / max(self.seconds - self.waited, 1e-9) / 1e6


class Supply:
    """The waits of this process: `report` at each line of the log.

    traffic  what was fetched from each address so far; empty for data on a disk
    """

    def __init__(self, traffic: Callable[[], Sequence[Traffic]]) -> None:
        self.traffic = traffic
        self._seen = {each.url: each for each in traffic()}
        self._said = Window()
        self._early = True  # the first wait is said at once

    def report(self, steps: int, seconds: float, waited: float) -> dict[str, float]:
        """For the log, of the `steps` since the last report: their seconds and those in which they waited for a batch.

        A wait counts as far as the thread that loads waited for shards too. Says a line where it was long.
        """
        now = {each.url: each for each in self.traffic()}
        if not now:
            return {}
        none = Traffic("", 0, 0.0)
        more = [
            replace(each, fetched=each.fetched - old.fetched, waited=each.waited - old.waited)
            for each, old in ((each, self._seen.get(url, none)) for url, each in now.items())
        ]
        self._seen = now
        fetched, for_shards = sum(each.fetched for each in more), sum(each.waited for each in more)
        window = Window(steps, seconds, min(waited, for_shards), fetched)
        self._say(window, [each.url for each in more if each.waited > 0])
        return {
            "data/wait": window.waited,
            "data/mb_per_second": window.rate,
            "data/mb_per_second_needed": window.needed,
        }

    def _say(self, window: Window, urls: Sequence[str]) -> None:
        whole = self._said.plus(window)
        if whole.share >= SAID_FROM and (whole.steps >= SAY_EVERY or self._early):
            rates = f"{whole.rate:.3g} MB/s came, {whole.needed:.3g} MB/s are needed"
            places = ", ".join(urls)
            say(f"waited {whole.share:.0%} of the last {whole.steps} steps for {places}: {rates} (docs/data.md)")
            self._early = False
        self._said = whole if whole.steps < SAY_EVERY else Window()
