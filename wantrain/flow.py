"""Rectified-flow mathematics: noise laws, expert windows, the straight path, its velocity, sampling schedules.

The one sentence the field gets wrong, held here once: with flow shift k and an expert's window [a, b), sigma is
drawn by pushing u through sigma = k*u / (1 + (k-1)*u), *conditioned on the window*. The shift is invertible, so this
is a truncated draw in u: no clamping (which piles samples on the edge), no rejection, no fallback.

Conventions: sigma in [0, 1] (0 clean, 1 noise), timestep = 1000*sigma, x_sigma = (1-sigma)*x0 + sigma*noise,
velocity = noise - x0. Laws are computed in float64 and handed out in float32, which is kept up to the embedding.
Sources: Wan report (arXiv 2503.20314) and the Wan2.2 code's constants; Esser et al. 2024 (arXiv 2403.03206) for
shift, logit-normal and the loss weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

TIMESTEPS = 1000


@dataclass(frozen=True)
class NoiseWindow:
    """The sigmas one expert is responsible for: low included, high excluded, except that 1.0 is included.

    So the two windows [0, b) and [b, 1] share no sigma, and a tie at the boundary belongs to high noise.
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.low < self.high <= 1.0:
            raise ValueError(f"noise window [{self.low}, {self.high}) must satisfy 0 <= low < high <= 1")

    def contains(self, sigma: Tensor) -> Tensor:
        """Boolean tensor: which sigmas lie in the window (compared in float64)."""
        value = sigma.double()
        return (value >= self.low) & ((value < self.high) | ((value == 1.0) & (self.high == 1.0)))


class Density(Protocol):
    """A law of u on [0, 1], before the shift; both methods take and give float64 tensors, elementwise."""

    def cdf(self, u: Tensor) -> Tensor: ...

    def quantile(self, p: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Uniform:
    """Every u equally likely."""

    def cdf(self, u: Tensor) -> Tensor:
        return u

    def quantile(self, p: Tensor) -> Tensor:
        return p


@dataclass(frozen=True)
class LogitNormal:
    """logit(u) ~ Normal(mean, std): most draws in the middle of the path."""

    mean: float = 0.0
    std: float = 1.0

    def cdf(self, u: Tensor) -> Tensor:
        return torch.special.ndtr((torch.logit(u) - self.mean) / self.std)

    def quantile(self, p: Tensor) -> Tensor:
        return torch.sigmoid(torch.special.ndtri(p) * self.std + self.mean)


def density_named(density: str | Density) -> Density:
    """The density object for "uniform" or "logit_normal"; an object with cdf and quantile passes through."""
    if not isinstance(density, str):
        return density
    known: dict[str, Density] = {"uniform": Uniform(), "logit_normal": LogitNormal()}
    if density not in known:
        raise ValueError(f"density={density!r} is unknown; choose one of {', '.join(known)}")
    return known[density]


def shift_sigma(u: Tensor, shift: float) -> Tensor:
    """Flow shift k: u -> k*u / (1 + (k-1)*u). Shifts compose by multiplication: 3 then 4 is 12."""
    return shift * u / (1 + (shift - 1) * u)


def unshift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Inverse of `shift_sigma`: sigma -> sigma / (k - (k-1)*sigma)."""
    return sigma / (shift - (shift - 1) * sigma)


def _edges(density: Density, shift: float, window: NoiseWindow) -> tuple[float, float]:
    """Cumulative probability of the unrestricted law below each end of the window."""
    if shift <= 0:
        raise ValueError(f"shift={shift} must be positive (1 leaves the law as it is)")
    ends = torch.tensor([window.low, window.high], dtype=torch.float64)
    low, high = density.cdf(unshift_sigma(ends, shift)).tolist()
    return low, high


def window_mass(window: NoiseWindow, *, density: str | Density, shift: float = 1.0) -> float:
    """Share of the unrestricted law that falls into `window`: the expert's natural share of training steps."""
    low, high = _edges(density_named(density), shift, window)
    return high - low


def sigma_quantiles(
    p: Tensor, *, density: str | Density, shift: float = 1.0, window: NoiseWindow = NoiseWindow(0.0, 1.0)
) -> Tensor:
    """Quantiles of the law of sigma truncated to `window`: p in [0, 1] (any shape) -> sigma, float32."""
    law = density_named(density)
    low, high = _edges(law, shift, window)
    if not high > low:
        raise ValueError(f"the noise law has no mass in [{window.low}, {window.high}); change density or shift")
    sigma = shift_sigma(law.quantile(low + p.double() * (high - low)), shift)
    # Rounding to float32 may step over an edge by one unit in the last place; step back, onto the window's own side.
    low32, high32 = (torch.tensor(end, dtype=torch.float32) for end in (window.low, window.high))
    if low32.item() < window.low:
        low32 = torch.nextafter(low32, torch.tensor(1.0))
    if window.high < 1.0 and high32.item() >= window.high:
        high32 = torch.nextafter(high32, torch.tensor(0.0))
    return sigma.float().clamp(low32.item(), high32.item())


def draw_sigma(
    shape: int | Sequence[int],
    *,
    density: str | Density,
    shift: float = 1.0,
    window: NoiseWindow = NoiseWindow(0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw sigma (float32, of `shape`) from the shifted law, conditioned on the expert's window.

    `density` is the law of u before the shift: "uniform", "logit_normal" or an object with cdf and quantile.
    Computed in float64 on the CPU, so that every device sees the same draws. ValueError for an unknown density,
    a shift that is not positive, or a window without mass.
    """
    size = (shape,) if isinstance(shape, int) else tuple(shape)
    p = torch.rand(size, dtype=torch.float64, generator=generator)
    return sigma_quantiles(p, density=density, shift=shift, window=window)


def over_frames(sigma: Tensor, like_BCTHW: Tensor) -> Tensor:
    """Sigma of shape (B,) or (B, T), made to broadcast over (B, C, T, H, W) on that tensor's device."""
    shaped = sigma[:, None] if sigma.ndim == 1 else sigma
    return shaped[:, None, :, None, None].to(like_BCTHW.device)


def noised(sigma_B: Tensor, mask_BT: Tensor | None) -> Tensor:
    """The noise level of each latent frame, (B, T): that of its sample where the mask is 1, none where it is 0.

    Without a mask it stays one level per sample, (B,).
    """
    return sigma_B if mask_BT is None else sigma_B[:, None] * mask_BT


def path(x0_BCTHW: Tensor, noise_BCTHW: Tensor, sigma: Tensor) -> Tensor:
    """The point on the straight line from data to noise: (1 - sigma)*x0 + sigma*noise."""
    level = over_frames(sigma, x0_BCTHW)
    return (1 - level) * x0_BCTHW + level * noise_BCTHW


def velocity(x0_BCTHW: Tensor, noise_BCTHW: Tensor) -> Tensor:
    """What the model predicts: the derivative of `path` by sigma, noise - x0."""
    return noise_BCTHW - x0_BCTHW


def data_prediction(x_BCTHW: Tensor, velocity_BCTHW: Tensor, sigma: Tensor) -> Tensor:
    """The clean sample that a velocity implies: x - sigma*v."""
    return x_BCTHW - over_frames(sigma, x_BCTHW) * velocity_BCTHW


def loss_weight(sigma: Tensor, scheme: str) -> Tensor:
    """Weight of the squared velocity error at each sigma, same shape, float32.

    "none" is 1 (Wan); "sigma_sqrt" is sigma^-2; "cosmap" is 2 / (pi*(1 - 2*sigma + 2*sigma^2)), both from SD3.
    """
    if scheme == "none":
        return torch.ones_like(sigma)
    if scheme == "sigma_sqrt":
        return sigma**-2
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    raise ValueError(f"loss weighting {scheme!r} is unknown; choose one of none, sigma_sqrt, cosmap")


def sampling_sigmas(num_steps: int, shift: float) -> Tensor:
    """Wan2.2's own inference schedule: `num_steps` shifted sigmas from about 0.999 down, then 0 (float64).

    The base grid ends are those of the authors' 1,000-step training grid (0.999 and 0); the shift is applied once.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1")
    base = torch.linspace(1 - 1 / TIMESTEPS, 0, num_steps + 1, dtype=torch.float64)[:-1]
    return torch.cat([shift_sigma(base, shift), torch.zeros(1, dtype=torch.float64)])


def sampling_timesteps(sigmas: Tensor) -> Tensor:
    """The integer timesteps that samplers show the model: floor(1000*sigma) of all but the final 0 (int64)."""
    return (sigmas[:-1] * TIMESTEPS).long()
