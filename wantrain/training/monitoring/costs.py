"""What validation and previews cost beside training, in seconds: measured, for the log.

How much a validation measures is chosen by counted operations (validation/budget.py), so that every machine and start
chooses alike. Where a forward of one clip takes longer than the count says, the choice stays, and that is said.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from wantrain.training.protocols import Hook
from wantrain.util.console import say

#: How many times the share a validation may take before it is reported, and after how many validations.
BEYOND, SEEN = 1.5, 2


@dataclass
class Costs:
    """Seconds of training and of each kind of hook, since this start of the run.

    share  of training that validation was chosen to take at most; None: it was given what to measure
    """

    share: float | None = None
    clock: Callable[[], float] = time.perf_counter
    training: float = 0.0
    spent: dict[str, dict[int, float]] = field(default_factory=dict)  # of each kind, by step
    said: bool = False

    def timed(self, hook: Hook, step: int) -> dict[str, Any]:
        """What a hook returns, with its seconds, and what its kind has taken so far beside training, as a share.

        The readings at step 0, and at a last step between two intervals, belong to no interval: they have no share.
        """
        began = self.clock()
        found, seconds = dict(hook(step)), self.clock() - began
        spent = self.spent.setdefault(hook.kind, {})
        spent[step] = spent.get(step, 0.0) + seconds  # two experts have a validation each
        found[f"cost/{hook.kind}_seconds"] = spent[step]
        if step and step % hook.every == 0 and self.training:
            counted = [seconds for at, seconds in spent.items() if at and at % hook.every == 0]
            found[f"cost/{hook.kind}_share"] = share = sum(counted) / self.training
            if hook.kind == "validation" and len(counted) >= SEEN:
                self._check(step, share)
        return found

    def _check(self, step: int, share: float) -> None:
        """Report a validation that takes far more than it was to take, once."""
        if self.said or self.share is None or share <= BEYOND * self.share:
            return
        self.said = True
        say(
            f"warning: step {step}: validation has taken {share:.0%} of the time of training, and was counted to take "
            f"{self.share:.0%} at most (validation.share): here a forward of one clip takes longer than its operations "
            "say. validation.together=8 measures several noise levels in one forward; a larger validation.every= "
            "measures less often"
        )
