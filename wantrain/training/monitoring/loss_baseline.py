"""The usual loss at each noise level, which a step's losses are held against (safeguards.py)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from wantrain import flow

#: Losses are compared within bins of an expert's noise window, once a bin has seen so many samples.
BINS, SEEN = 10, 20
#: How fast the usual loss of a bin follows the run.
RATE = 0.02


@dataclass
class LossBaseline:
    """The usual loss in each bin of a window, as a running mean of logarithms.

    Everything is computed on the device of the losses, without reading a value, so that nothing waits for a GPU.
    """

    window: flow.NoiseWindow
    means: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))
    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))

    def excess(self, sigmas: Tensor, errors: Tensor) -> Tensor:
        """How many times the usual a batch's losses (B,) are, as a geometric mean; 1 where too few were seen."""
        self.means, self.counts = self.means.to(errors.device), self.counts.to(errors.device)
        bins = self.window.bin_of(sigmas, BINS)
        comparable = (self.counts[bins] >= SEEN) & (errors > 0) & errors.isfinite()
        above = torch.where(comparable, errors.double().log() - self.means[bins], 0.0)
        return (above.sum() / comparable.sum().clamp(min=1)).exp()

    def learn(self, sigmas: Tensor, errors: Tensor, usual: Tensor | None = None) -> None:
        """Count a batch's losses as usual ones, if they are: `usual`, a scalar on the device (None: they are)."""
        usable = (errors > 0) & errors.isfinite()
        usable = usable if usual is None else usable & usual
        each = torch.arange(BINS, device=errors.device)
        places = ((self.window.bin_of(sigmas, BINS)[:, None] == each) & usable[:, None]).double()
        more, sums = places.sum(0), torch.where(usable, errors.double().log(), 0.0) @ places
        self.counts += more
        rates = torch.maximum(1 - (1 - RATE) ** more, more / self.counts.clamp(min=1))
        self.means += rates * (sums / more.clamp(min=1) - self.means)
