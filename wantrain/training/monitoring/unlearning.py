"""Preference tuning that only unlearns: the margin grows because losers get worse, and the winners get worse too.

Watched is the winners' error over that of the base at the same noise, as a running geometric mean over steps. It is 1
where nothing has changed and below 1 where the winners are learned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from wantrain.util.console import say

#: Steps that are seen before anything is said, and how fast the mean follows the run after them.
SEEN, RATE = 20, 0.05


@dataclass
class Unlearning:
    """The running means of a run's experts; `see` after each step.

    warn  share by which the mean may exceed 1 before that is reported; None: any
    stop  share at which the run ends; None: it does not
    means  of each expert: the mean of the logarithm, how many steps it has seen, and whether it was reported
    """

    warn: float | None = 0.02
    stop: float | None = 0.1
    means: dict[str, tuple[float, int, bool]] = field(default_factory=dict)

    def see(self, expert: str, step: int, log_ratio: float) -> dict[str, Any] | None:
        """The mean logarithm of one step's ratios, the same in every process. Returns what is to be recorded, if there
        is anything to report. ValueError where the run is to end.
        """
        mean, count, reported = self.means.get(expert, (0.0, 0, False))
        count += 1
        mean += max(RATE, 1 / count) * (log_ratio - mean)
        rise = math.expm1(mean)
        if count >= SEEN and self.stop is not None and rise > self.stop:
            raise ValueError(
                f"step {step}: {expert} is only unlearning: the error of the winners themselves is {rise:.1%} above "
                f"the base's (safeguards.unlearning_stop={self.stop:g}), and the margin comes from losers that got "
                "worse still. Lower optimizer.lr or loss.beta, or give loss.anchor=1; an earlier checkpoint may be good"
            )
        above = count >= SEEN and self.warn is not None and rise > self.warn
        self.means[expert] = mean, count, above
        if not above or reported:
            return None
        say(
            f"step {step}: {expert} is getting worse at the winners themselves: their error is {rise:.1%} above the "
            f"base's (safeguards.unlearning={self.warn:g}); a lower optimizer.lr or loss.beta, or loss.anchor=1, holds "
            "them"
        )
        return {"winners_over_base": 1 + rise}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {name: list(own) for name, own in self.means.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self.means = {name: (float(mean), int(count), bool(said)) for name, (mean, count, said) in state.items()}
