"""Dataset statistics: every file, clip and second that came in is counted as used, or as dropped for a reason.

Seconds are counted in whole microseconds, so that the sums are exact.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

MICRO = 1_000_000


@dataclass
class StageCounts:
    """Counts of one quantity at one stage: `given` came in, `used` went on, `dropped` did not, by reason."""

    given: int = 0
    used: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def use(self, amount: int) -> None:
        """Count an amount as used."""
        self.given += amount
        self.used += amount

    def drop(self, reason: str, amount: int) -> None:
        """Count an amount as dropped."""
        if amount:
            self.given += amount
            self.dropped[reason] += amount

    def to_dict(self, scale: int = 1) -> dict[str, Any]:
        """For a manifest: given, used, and dropped by reason, the largest first; amounts are divided by `scale`."""
        assert self.given == self.used + sum(self.dropped.values()), "the counts do not add up"

        def scaled(amount: int) -> float:
            return amount / scale if scale > 1 else amount

        dropped = sorted(self.dropped.items(), key=lambda item: (-item[1], item[0]))
        return {
            "given": scaled(self.given),
            "used": scaled(self.used),
            "dropped": {reason: scaled(amount) for reason, amount in dropped},
        }


@dataclass
class DatasetStats:
    """Statistics of a folder of shards: files, clips and microseconds of footage.

    `cropped` holds, for each used clip that is cropped, the share of the picture that is lost. Files that are not read
    (no caption, not a file...) or cannot be read count neither clips nor seconds.
    """

    files: StageCounts = field(default_factory=StageCounts)
    clips: StageCounts = field(default_factory=StageCounts)
    micros: StageCounts = field(default_factory=StageCounts)
    cropped: list[float] = field(default_factory=list)

    def use_clip(self, seconds: float, cropped: float = 0.0) -> None:
        """Count one used clip, of which the share `cropped` of the picture is lost."""
        self.clips.use(1)
        self.micros.use(round(seconds * MICRO))
        if cropped > 0:
            self.cropped.append(cropped)

    def drop_clip(self, reason: str, seconds: float) -> None:
        """Count one dropped clip."""
        self.clips.drop(reason, 1)
        self.drop_seconds(reason, seconds)

    def drop_seconds(self, reason: str, seconds: float) -> None:
        """Count footage that no clip uses."""
        self.micros.drop(reason, max(0, round(seconds * MICRO)))

    def to_dict(self) -> dict[str, Any]:
        """For a manifest: the counts of each quantity of which something came in."""
        counts = {"files": (self.files, 1), "clips": (self.clips, 1), "seconds": (self.micros, MICRO)}
        return {name: stage.to_dict(scale) for name, (stage, scale) in counts.items() if stage.given}

    def crops_to_dict(self) -> dict[str, Any]:
        """For a manifest: how many of the used clips are cropped, and the mean and largest share that is lost."""
        mean = sum(self.cropped) / len(self.cropped) if self.cropped else 0.0
        return {"clips": len(self.cropped), "mean": round(mean, 4), "largest": round(max(self.cropped, default=0.0), 4)}

    def summary(self) -> list[str]:
        """One line of text for each quantity, and one about cropping."""
        lines = [_line(name, counts) for name, counts in self.to_dict().items()]
        if self.cropped:
            crops = self.crops_to_dict()
            lines.append(
                f"cropped: {crops['clips']} of {self.clips.used} clips, {crops['mean']:.1%} of the picture on average, "
                f"at most {crops['largest']:.1%}"
            )
        return lines


def _line(name: str, counts: dict[str, Any]) -> str:
    parts = [f"{counts['used']:,.10g} used"]
    parts += [f"{amount:,.10g} {reason}" for reason, amount in counts["dropped"].items()]
    return f"{name}: {counts['given']:,.10g} = {' + '.join(parts)}"
