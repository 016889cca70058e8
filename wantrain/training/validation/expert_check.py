"""Which expert is this? Measured, where nothing in a file says so: its error at a few noise levels in both windows.

A Wan expert is good where it was trained. The error is taken relative to the best linear predictor's, which makes high
and low noise comparable. THRESHOLD was calibrated on wan-tiny alone (docs/log.md): a sign, not a proof.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wantrain.batch import Batch
from wantrain.losses import FlowMatching
from wantrain.training.engine.engine import Stepper
from wantrain.training.validation.measure import Evaluator, one_by_one
from wantrain.util.console import say

#: Noise levels measured in each window.
POINTS = 3
#: Most that the log of the relative error may favour the other window before the expert is taken for the other one.
THRESHOLD = 0.4


@dataclass(frozen=True)
class Profile:
    """Relative error (model / best linear predictor) by sigma, in the window of each expert."""

    errors: Mapping[str, Mapping[float, float]]

    def level(self, expert: str) -> float:
        """Mean logarithm of the relative error in an expert's window: 0 is no better than linear, below is better."""
        values = self.errors[expert].values()
        return sum(math.log(value) for value in values) / len(values)

    def says(self, expert: str) -> str | None:
        """What is wrong with taking this model for `expert`; None if nothing is."""
        other = "low_noise" if expert == "high_noise" else "high_noise"
        gap = self.level(expert) - self.level(other)
        if gap <= THRESHOLD:
            return None
        return (
            f"this model is {math.exp(gap):.1f} times better in the window of {other} than in that of {expert}, beside "
            f"the best linear predictor: it looks like the {other} expert"
        )

    def __str__(self) -> str:
        rows = (
            f"{expert}: " + ", ".join(f"{error:.2f} at sigma {sigma:.3f}" for sigma, error in levels.items())
            for expert, levels in self.errors.items()
        )
        return "error beside the best linear predictor's, " + "; ".join(rows)


def measure(stepper: Stepper, batch: Batch, *, boundary: float, shift: float, seed: int) -> Profile:
    """The model's profile on one batch of latents."""
    errors = {}
    for expert, (low, high) in {"high_noise": (boundary, 1.0), "low_noise": (0.0, boundary)}.items():
        loss = FlowMatching(shift=shift, low=low, high=high)
        evaluator, clips = Evaluator(stepper, loss.quadrature(POINTS), seed), one_by_one([batch])
        levels = evaluator.errors(clips).mean(dim=0), evaluator.linear(clips)
        measured = zip(evaluator.sigmas.tolist(), *(level.tolist() for level in levels), strict=True)
        errors[expert] = {sigma: error / straight for sigma, error, straight in measured}
    return Profile(errors)


def check(stepper: Stepper, batch: Batch, *, model: Mapping[str, Any], expert: str, how: str, seed: int) -> None:
    """Measure and say; what looks like the other expert is a ValueError for how="stop", else a warning."""
    stepper.module.eval()
    profile = measure(stepper, batch, boundary=model["boundary"], shift=model["shift"], seed=seed)
    say(f"check_expert: {profile}")
    wrong = profile.says(expert)
    if wrong and how == "stop":
        raise ValueError(f"expert={expert}: {wrong}. Give the right file, or check_expert=off if you know better")
    if wrong:
        say(f"warning: expert={expert}: {wrong}; check the file (check_expert=stop makes this an error)")
