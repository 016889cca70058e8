"""Is it better, or is it chance? A change's interval and p-value, from the same clips measured twice.

The bootstrap draws whole source files, because clips of one file are alike, and it is studentized: each draw is taken
in units of its own standard error, which keeps its level with few files (Efron and Tibshirani, An Introduction to the
Bootstrap, chapter 12; by clusters: Cameron, Gelbach and Miller 2008). docs/numerics.md has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wantrain.util.seeds import generator_at

#: Chance of calling an unchanged model changed; the interval holds the truth in all other cases.
LEVEL = 0.01
#: Resamples: LEVEL * (DRAWS + 1) is whole, so that interval and p-value agree at the edge.
DRAWS = 4999
#: With fewer files nothing is significant at this level: too many draws would repeat one file.
FEWEST_FILES = 5


@dataclass(frozen=True)
class Change:
    """A mean difference with its interval and the p-value of "there is none".

    low, high  ends of the interval; None where the files are too few to give one
    """

    mean: float
    low: float | None
    high: float | None
    p: float

    @property
    def distinct(self) -> bool:
        """True if it is not chance: the interval leaves out 0."""
        return self.p <= LEVEL

    @property
    def verdict(self) -> str:
        """In a word, of a loss: better, worse, or not distinguishable."""
        if not self.distinct:
            return "not distinguishable"
        return "better" if self.mean < 0 else "worse"

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:+.4f}, too few files for an interval"
        return f"{self.mean:+.4f}, {1 - LEVEL:.0%} interval {self.low:+.4f} to {self.high:+.4f}, p {self.p:.2g}"


def change(differences: Tensor, files: Sequence[Hashable]) -> Change:
    """The mean of per-clip differences (N,), with clips of one file (N labels) taken together."""
    return _judged(_resampled(differences, files, "first"))


def contrast(first: Tensor, files: Sequence[Hashable], second: Tensor, others: Sequence[Hashable]) -> Change:
    """How much larger the mean of `first` is than that of `second`, over other clips of other files."""
    one, two = _resampled(first, files, "first"), _resampled(second, others, "second")
    return _judged(
        _Sample(
            one.mean - two.mean, math.hypot(one.error, two.error), one.means - two.means, one.errors.hypot(two.errors)
        )
    )


@dataclass(frozen=True)
class _Sample:
    """A mean, its standard error, and both again in each resample (DRAWS,)."""

    mean: float
    error: float
    means: Tensor
    errors: Tensor


def _resampled(values: Tensor, files: Sequence[Hashable], which: str) -> _Sample:
    numbers = {file: number for number, file in enumerate(dict.fromkeys(files))}
    places = torch.tensor([numbers[file] for file in files])
    sums = torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, places, values.double())
    counts = torch.bincount(places, minlength=len(numbers)).double()
    mean, error = _ratio(sums, counts)
    drawn = torch.randint(len(sums), (DRAWS, len(sums)), generator=generator_at("bootstrap", which))
    means, errors = _ratio(sums[drawn], counts[drawn])
    # A draw of one file alone has no spread; rounding must not lend it one.
    return _Sample(mean.item(), error.item(), means, errors.where(errors > 1e-9 * error, 0.0))


def _ratio(sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over clips from sums and counts by file (..., G), and its standard error by linearisation, both (...)."""
    groups, total = sums.shape[-1], counts.sum(-1)
    mean = sums.sum(-1) / total
    spread = (sums - mean.unsqueeze(-1) * counts).square().sum(-1) * groups / max(groups - 1, 1)
    return mean, spread.sqrt() / total


def _judged(sample: _Sample) -> Change:
    if not math.isfinite(sample.mean) or sample.error == 0:
        # The very same figures twice; or one file, or no number: nothing to tell by.
        same = sample.mean == 0
        return Change(sample.mean, 0.0 if same else None, 0.0 if same else None, 1.0)
    drawn = (sample.means - sample.mean).abs() / sample.errors
    drawn = drawn.nan_to_num(nan=math.inf, posinf=math.inf).sort().values
    p = (1 + int((drawn >= abs(sample.mean) / sample.error).sum())) / (DRAWS + 1)
    reach = drawn[round((1 - LEVEL) * (DRAWS + 1)) - 1].item() * sample.error
    if not math.isfinite(reach):
        return Change(sample.mean, None, None, p)
    return Change(sample.mean, sample.mean - reach, sample.mean + reach, p)
