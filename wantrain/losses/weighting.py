"""Weights of the squared velocity error by noise level: callables sigma -> weight, elementwise, float32.

What is learned from is the density of the draws times the weight. Sources: SD3 (arXiv 2403.03206) and its public
training scripts for sigma_sqrt and cosmap; min-SNR (Hang et al. 2023, arXiv 2303.09556).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: sigma in [0, 1], any shape -> weight of the same shape.
Weighting = Callable[[Tensor], Tensor]


def sigma_sqrt(sigma: Tensor) -> Tensor:
    """sigma^-2: the error of the velocity, counted as that of the noise-to-signal scale. Held below sigma = 1/1000,
    where the grids that it comes from end; it would grow without bound.
    """
    return sigma.clamp(min=1e-3) ** -2


def cosmap(sigma: Tensor) -> Tensor:
    """2 / (pi * (1 - 2*sigma + 2*sigma^2)): the density of SD3's cosmap sampling, highest at mid-noise."""
    return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))


@dataclass(frozen=True)
class MinSNR:
    """Min-SNR-gamma for a velocity: min((1 - sigma)^2, gamma * sigma^2).

    The data prediction x - sigma*v is off by sigma times the velocity's error, so min(SNR, gamma) on the data's squared
    error is sigma^2 * min(SNR, gamma) on the velocity's, and SNR = ((1 - sigma) / sigma)^2.

    gamma  signal-to-noise ratio above which the data's error counts no more
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"noise.weighting.gamma={self.gamma} must be above 0")

    def __call__(self, sigma: Tensor) -> Tensor:
        return torch.minimum((1 - sigma) ** 2, self.gamma * sigma**2)


@dataclass(frozen=True)
class Gaussian:
    """A bell over sigma: peak * exp(-(sigma - center)^2 / (2 * width^2)), the middle of the path counting most.

    center, width  of the bell, in sigma
    peak           its height
    to_zero        let it down so that it is 0 at the end of [0, 1] that is farther from its center
    """

    center: float = 0.5
    width: float = 0.25
    peak: float = 1.0
    to_zero: bool = False

    def __post_init__(self) -> None:
        if not (self.width > 0 and self.peak > 0 and 0 <= self.center <= 1):
            raise ValueError(
                f"noise.weighting: width={self.width} and peak={self.peak} must be above 0, and center={self.center} "
                "in [0, 1]"
            )

    def __call__(self, sigma: Tensor) -> Tensor:
        bell = torch.exp(-((sigma - self.center) ** 2) / (2 * self.width**2))
        if not self.to_zero:
            return self.peak * bell
        least = math.exp(-(max(self.center, 1 - self.center) ** 2) / (2 * self.width**2))
        return self.peak * (bell - least).clamp(min=0) / (1 - least)


NAMED: dict[str, Weighting] = {
    "none": torch.ones_like,
    "sigma_sqrt": sigma_sqrt,
    "cosmap": cosmap,
    "min_snr": MinSNR(),
    "gaussian": Gaussian(),
}


def weighting_named(weighting: str | Weighting) -> Weighting:
    """The weighting of that name, with its usual numbers; a callable passes through."""
    if not isinstance(weighting, str):
        return weighting
    if weighting not in NAMED:
        raise ValueError(f"loss weighting {weighting!r} is unknown; choose one of {', '.join(NAMED)}")
    return NAMED[weighting]
