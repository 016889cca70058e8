"""The ledger: a place for every file, clip and second. What came in is what was used and what was dropped, by reason.

Seconds are counted in whole microseconds, so that the sums are exact.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

MICRO = 1_000_000


@dataclass
class StageCounts:
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
class DatasetStats:
    """The accounts of a folder of shards.

    Files that are not looked into (no caption, no file...) or cannot be read have neither clips nor seconds.
    """

    files: StageCounts = field(default_factory=StageCounts)
    clips: StageCounts = field(default_factory=StageCounts)
    micros: StageCounts = field(default_factory=StageCounts)
    cropped: list[float] = field(default_factory=list)

    def use_clip(self, seconds: float, cropped: float = 0.0) -> None:
        """One clip that is used, and the share of its picture that is not."""
        self.clips.use(1)
        self.micros.use(round(seconds * MICRO))
        if cropped > 0:
            self.cropped.append(cropped)

    def drop_clip(self, reason: str, seconds: float) -> None:
        """One clip that is not."""
        self.clips.drop(reason, 1)
        self.drop_seconds(reason, seconds)

    def drop_seconds(self, reason: str, seconds: float) -> None:
        """Footage that no clip covers."""
        self.micros.drop(reason, max(0, round(seconds * MICRO)))

    def told(self) -> dict[str, Any]:
        """For a manifest: the accounts that something was entered in."""
        accounts = {"files": (self.files, 1), "clips": (self.clips, 1), "seconds": (self.micros, MICRO)}
        return {name: account.told(scale) for name, (account, scale) in accounts.items() if account.given}

    def told_crops(self) -> dict[str, Any]:
        """For a manifest: how many of the used clips lose some of their picture, and which share of it."""
        mean = sum(self.cropped) / len(self.cropped) if self.cropped else 0.0
        return {"clips": len(self.cropped), "mean": round(mean, 4), "largest": round(max(self.cropped, default=0.0), 4)}

    def summary(self) -> list[str]:
        """For people: one line for each account, and one for what is cropped."""
        lines = [_line(name, account) for name, account in self.told().items()]
        if self.cropped:
            crops = self.told_crops()
            lines.append(
                f"cropped: {crops['clips']} of {self.clips.used} clips, {crops['mean']:.1%} of the picture on average, "
                f"at most {crops['largest']:.1%}"
            )
        return lines


def _line(name: str, account: dict[str, Any]) -> str:
    parts = [f"{account['used']:,.10g} used"] + [f"{amount:,.10g} {why}" for why, amount in account["dropped"].items()]
    return f"{name}: {account['given']:,.10g} = {' + '.join(parts)}"
