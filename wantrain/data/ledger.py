"""The ledger: a place for every file, clip and second. What came in is what was used and what was dropped, by reason.

Seconds are counted in whole microseconds, so that the sums are exact.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

MICRO = 1_000_000


@dataclass
class Account:
    """One thing that is counted: how much came in, how much was used, and what became of the rest."""

    given: int = 0
    used: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def use(self, amount: int) -> None:
        """Enter what is used."""
        self.given += amount
        self.used += amount

    def drop(self, reason: str, amount: int) -> None:
        """Enter what is not."""
        if amount:
            self.given += amount
            self.dropped[reason] += amount

    def told(self, scale: int = 1) -> dict[str, Any]:
        """For a manifest: given, used, dropped by reason; the largest first."""
        assert self.given == self.used + sum(self.dropped.values()), "the ledger does not add up"

        def units(amount: int) -> float:
            return amount / scale if scale > 1 else amount

        dropped = sorted(self.dropped.items(), key=lambda item: (-item[1], item[0]))
        return {
            "given": units(self.given),
            "used": units(self.used),
            "dropped": {reason: units(amount) for reason, amount in dropped},
        }


@dataclass
class Ledger:
    """The accounts of a folder of shards.

    Files that are not looked into (no caption, no file...) or cannot be read have neither clips nor seconds.
    """

    files: Account = field(default_factory=Account)
    clips: Account = field(default_factory=Account)
    micros: Account = field(default_factory=Account)

    def use_clip(self, seconds: float) -> None:
        """One clip that is used."""
        self.clips.use(1)
        self.micros.use(round(seconds * MICRO))

    def drop_clip(self, reason: str, seconds: float) -> None:
        """One clip that is not."""
        self.clips.drop(reason, 1)
        self.drop_seconds(reason, seconds)

    def drop_seconds(self, reason: str, seconds: float) -> None:
        """Footage that no clip covers."""
        self.micros.drop(reason, max(0, round(seconds * MICRO)))

    def told(self) -> dict[str, Any]:
        """For a manifest."""
        return {
            "files": self.files.told(),
            "clips": self.clips.told(),
            "seconds": self.micros.told(MICRO),
        }

    def summary(self) -> list[str]:
        """For people: one line for each account."""
        return [_line(name, account) for name, account in self.told().items()]


def _line(name: str, account: dict[str, Any]) -> str:
    parts = [f"{account['used']:,.10g} used"] + [f"{amount:,.10g} {why}" for why, amount in account["dropped"].items()]
    return f"{name}: {account['given']:,.10g} = {' + '.join(parts)}"
