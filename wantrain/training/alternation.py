"""Whose optimizer step it is, where two experts train in one job: arithmetic on the step, nothing to save.

After n steps an expert of share s has had s*n of them, rounded: exact at every moment, whatever the length of the run,
and the same on all ranks. What an expert sees depends on its own count alone, so that a pair trained in one job is the
two single runs, a step of one after a step of the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction


class ExpertAlternation:
    """The order in which one or two experts take their optimizer steps.

    share  of the steps, by expert: above 0, summing to 1. ValueError otherwise, naming `experts.share`.
    """

    def __init__(self, share: Mapping[str, float]) -> None:
        # As they are written: 0.7 is 7/10, not the float beside it.
        shares = {name: Fraction(str(value)) for name, value in share.items()}
        if sum(shares.values()) != 1 or min(shares.values()) <= 0:
            given = ", ".join(f"{name} {value}" for name, value in share.items())
            raise ValueError(f"experts.share ({given}) must be above 0 for each expert, and 1 together")
        self.names = list(shares)
        self._first = shares[self.names[0]]

    @classmethod
    def of(cls, names: Sequence[str], share: Mapping[str, float]) -> ExpertAlternation:
        """The order of one expert alone, or of a pair by its `share`."""
        return cls(share if len(names) > 1 else dict.fromkeys(names, 1))

    def count(self, name: str, steps: int) -> int:
        """How many of the first `steps` steps are this expert's."""
        firsts = int(self._first * steps + Fraction(1, 2))
        return firsts if name == self.names[0] else steps - firsts

    def at(self, step: int) -> tuple[str, int]:
        """The expert that takes step `step` (from 0), and how many it has taken before."""
        first = self.count(self.names[0], step + 1) > self.count(self.names[0], step)
        name = self.names[0] if first else self.names[1]
        return name, self.count(name, step)
