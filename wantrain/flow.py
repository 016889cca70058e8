"""Rectified-flow mathematics: noise distributions, expert windows, the straight path, its velocity, sampling schedules.

With flow shift k and an expert's window [a, b), sigma is drawn by pushing u through sigma = k*u / (1 + (k-1)*u),
*conditioned on the window*. The shift is invertible, so this is a truncated draw in u, in closed form: no clamping
(which would pile samples on the edge), no rejection, no fallback.

Conventions: sigma in [0, 1] (0 clean, 1 noise), timestep = 1000*sigma, x_sigma = (1-sigma)*x0 + sigma*noise,
velocity = noise - x0. Distributions are computed in float64 and returned in float32, which is kept up to the embedding.
Sources: Wan report (arXiv 2503.20314) and the Wan2.2 code's constants; SD3 (Esser et al. 2024, arXiv 2403.03206) for
shift, logit-normal and mode sampling.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

TIMESTEPS = 1000
#: Where the authors' 1,000-step training grid begins, one step below pure noise, and their UniPC with it.
SECOND_NOISIEST = 1 - 1 / TIMESTEPS


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

    def bin_edges(self, count: int) -> Tensor:
        """The edges of `count` bins of equal width, (count + 1,) float64."""
        return torch.linspace(self.low, self.high, count + 1, dtype=torch.float64)

    def bin_of(self, sigma: Tensor, count: int) -> Tensor:
        """The bin of each sigma, int64; what lies outside the window counts to the nearest one."""
        width = (self.high - self.low) / count
        return ((sigma.double() - self.low) / width).long().clamp(0, count - 1)


class Density(Protocol):
    """A distribution of u on [0, 1], before the shift; both methods take and give float64 tensors, elementwise."""

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

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"noise.density.std={self.std} must be above 0")

    def cdf(self, u: Tensor) -> Tensor:
        return torch.special.ndtr((torch.logit(u) - self.mean) / self.std)

    def quantile(self, p: Tensor) -> Tensor:
        return torch.sigmoid(torch.special.ndtri(p) * self.std + self.mean)


@dataclass(frozen=True)
class Mode:
    """SD3's mode sampling: flat where `scale` is 0, heavier in the middle above, at the ends below.

    scale  -1 to 2/(pi - 2) = 1.75; SD3 tried 1.29
    """

    scale: float = 1.29

    def __post_init__(self) -> None:
        if not -1.0 <= self.scale <= 2 / (math.pi - 2):
            raise ValueError(f"noise.density.scale={self.scale} must lie between -1 and {2 / (math.pi - 2):.4f}")

    def cdf(self, u: Tensor) -> Tensor:
        # The quantile has no inverse in closed form; 60 halvings reach float64's last digit.
        low, high = torch.zeros_like(u), torch.ones_like(u)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.quantile(middle) < u
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return torch.where(u >= 1, 1.0, torch.where(u <= 0, 0.0, high))

    def quantile(self, p: Tensor) -> Tensor:
        return p - self.scale * (torch.sin(math.pi / 2 * p) ** 2 - p)


@dataclass(frozen=True)
class Beta:
    """u ~ Beta(alpha, beta): one peak at (alpha - 1)/(alpha + beta - 2) where both are above 1; 1 and 1 are uniform."""

    alpha: float
    beta: float

    def __post_init__(self) -> None:
        if not (self.alpha > 0 and self.beta > 0):
            raise ValueError(f"noise.density: alpha={self.alpha} and beta={self.beta} must be above 0")

    @functools.cached_property
    def _curve(self) -> Curve:
        # In z = logit(u) the density has no pole and falls exponentially at both ends, so an even grid of z covers it.
        spread = 9 * math.sqrt(1 / self.alpha + 1 / self.beta)
        middle = math.log(self.alpha / self.beta)
        low, high = max(-700.0, middle - spread - 37 / self.alpha), min(36.0, middle + spread + 37 / self.beta)
        z = torch.linspace(low, high, 2**15, dtype=torch.float64)
        log_u, log_rest = torch.nn.functional.logsigmoid(z), torch.nn.functional.logsigmoid(-z)
        height = (self.alpha - 1) * log_u + (self.beta - 1) * log_rest
        return Curve(log_u.exp(), (height - height.max()).exp())

    def cdf(self, u: Tensor) -> Tensor:
        return self._curve.cdf(u)

    def quantile(self, p: Tensor) -> Tensor:
        return self._curve.quantile(p)


class Curve:
    """A piecewise linear density given at points, 0 outside them; cdf and quantile are exact for it.

    u, height  float64 tensors (n,): rising points in [0, 1]; the density there, up to a factor
    """

    def __init__(self, u: Tensor, height: Tensor) -> None:
        rising = torch.cat([torch.ones(1, dtype=torch.bool), u.diff() > 0])  # float64 runs out of points near 1
        u, height = u[rising], height[rising]
        below = torch.cat([torch.zeros(1, dtype=torch.float64), (u.diff() * (height[1:] + height[:-1]) / 2).cumsum(0)])
        self.u, self.height, self.below = u, height / below[-1], below / below[-1]
        self.slope = self.height.diff() / u.diff()

    def cdf(self, u: Tensor) -> Tensor:
        i = (torch.searchsorted(self.u, u.contiguous(), right=True) - 1).clamp(0, len(self.slope) - 1)
        along = (u - self.u[i]).clamp(torch.zeros_like(u), self.u[i + 1] - self.u[i])
        return self.below[i] + along * (self.height[i] + self.slope[i] * along / 2)

    def quantile(self, p: Tensor) -> Tensor:
        i = (torch.searchsorted(self.below, p.contiguous(), right=True) - 1).clamp(0, len(self.slope) - 1)
        rest = p - self.below[i]
        # The root of slope/2 * x^2 + height*x = rest, in the form that allows a slope of 0.
        root = (self.height[i] ** 2 + 2 * self.slope[i] * rest).clamp(min=0).sqrt()
        along = torch.where(rest > 0, 2 * rest / (self.height[i] + root), 0.0)
        return self.u[i] + along.clamp(torch.zeros_like(p), self.u[i + 1] - self.u[i])


class Table(Curve):
    """A user's density: [u, height] points with straight lines between them, as a list or in a text file.

    points  rising u in [0, 1], heights up to a factor; nothing is drawn outside the first and last u
    file    instead: one point per line, two numbers with a space or comma between; # begins a comment
    """

    def __init__(self, *, points: Sequence[Sequence[float]] | None = None, file: str | None = None) -> None:
        if (points is None) == (file is None):
            raise ValueError("noise.density: give points=[[u, height], ...] or file=FILE, one of the two")
        self.points, self.file = points, file
        where = "noise.density.points" if file is None else f"noise.density.file={file}"
        rows = points if points is not None else _read_points(Path(str(file)).expanduser(), where)
        if len(rows) < 2 or any(len(row) != 2 for row in rows):
            raise ValueError(f"{where}: at least two points of two numbers each are needed, [[0, 1], [1, 2]]")
        u, height = torch.tensor(rows, dtype=torch.float64).unbind(1)
        if not (bool((u.diff() > 0).all()) and u[0] >= 0 and u[-1] <= 1):
            raise ValueError(f"{where}: u must rise from point to point and stay in [0, 1], not {u.tolist()}")
        if not (bool(torch.isfinite(height).all()) and bool((height >= 0).all()) and height.max() > 0):
            raise ValueError(f"{where}: heights must not be negative, and one must be above 0, not {height.tolist()}")
        super().__init__(u, height)


def _read_points(path: Path, where: str) -> list[list[float]]:
    """The points of a table's file. ValueError names a line that is not two numbers."""
    if not path.is_file():
        raise ValueError(f"{where}: there is no such file")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        words = line.partition("#")[0].replace(",", " ").split()
        try:
            rows += [[float(word) for word in words]] if words else []
        except ValueError:
            raise ValueError(f"{where}: line {number} is not two numbers: {line.strip()!r}") from None
    return rows


def density_named(density: str | Density) -> Density:
    """The density object for "uniform" or "logit_normal"; an object with cdf and quantile passes through."""
    if not isinstance(density, str):
        return density
    by_name: dict[str, Density] = {"uniform": Uniform(), "logit_normal": LogitNormal()}
    if density not in by_name:
        raise ValueError(
            f"density={density!r} is unknown; choose one of {', '.join(by_name)}, or for more noise=beta, mode or table"
        )
    return by_name[density]


def shift_sigma(u: Tensor, shift: float) -> Tensor:
    """Flow shift k: u -> k*u / (1 + (k-1)*u). Shifts compose by multiplication: 3 then 4 is 12."""
    return shift * u / (1 + (shift - 1) * u)


def unshift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Inverse of `shift_sigma`: sigma -> sigma / (k - (k-1)*sigma)."""
    return sigma / (shift - (shift - 1) * sigma)


def _edges(density: Density, shift: float, window: NoiseWindow) -> tuple[float, float]:
    """Cumulative probability of the unrestricted distribution below each end of the window."""
    if shift <= 0:
        raise ValueError(f"shift={shift} must be positive (1 leaves the distribution as it is)")
    ends = torch.tensor([window.low, window.high], dtype=torch.float64)
    low, high = density.cdf(unshift_sigma(ends, shift)).tolist()
    return low, high


def window_mass(window: NoiseWindow, *, density: str | Density, shift: float = 1.0) -> float:
    """Probability of `window` under the unrestricted distribution: the expert's natural share of training steps."""
    low, high = _edges(density_named(density), shift, window)
    return high - low


def sigma_cdf(
    sigma: Tensor, *, density: str | Density, shift: float = 1.0, window: NoiseWindow = NoiseWindow(0.0, 1.0)
) -> Tensor:
    """Probability of a draw at or below each sigma (any shape), truncated to `window`; float64."""
    distribution = density_named(density)
    low, high = _edges(distribution, shift, window)
    return ((distribution.cdf(unshift_sigma(sigma.double(), shift)) - low) / (high - low)).clamp(0, 1)


def sigma_quantiles(
    p: Tensor, *, density: str | Density, shift: float = 1.0, window: NoiseWindow = NoiseWindow(0.0, 1.0)
) -> Tensor:
    """Quantiles of the distribution of sigma truncated to `window`: p in [0, 1] (any shape) -> sigma, float32."""
    distribution = density_named(density)
    low, high = _edges(distribution, shift, window)
    if not high > low:
        raise ValueError(
            f"the noise distribution has no mass in [{window.low}, {window.high}); change density or shift"
        )
    sigma = shift_sigma(distribution.quantile(low + p.double() * (high - low)), shift)
    # Rounding to float32 may cross an edge of the window by one unit in the last place; step back inside.
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
    """Draw sigma (float32, of `shape`) from the shifted distribution, conditioned on the expert's window.

    `density` is the distribution of u before the shift: "uniform", "logit_normal" or an object with cdf and
    quantile, as those above are.
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


def noised(sigma_B: Tensor, noised_BT: Tensor | None) -> Tensor:
    """The noise level of each latent frame, (B, T): that of its sample where `noised_BT` is 1, zero where it is 0.

    Without `noised_BT` it stays one level per sample, (B,).
    """
    return sigma_B if noised_BT is None else sigma_B[:, None] * noised_BT


def path(x0_BCTHW: Tensor, noise_BCTHW: Tensor, sigma: Tensor) -> Tensor:
    """The point on the straight line from data to noise: (1 - sigma)*x0 + sigma*noise."""
    level = over_frames(sigma, x0_BCTHW)
    return (1 - level) * x0_BCTHW + level * noise_BCTHW


def velocity(x0_BCTHW: Tensor, noise_BCTHW: Tensor) -> Tensor:
    """What the model predicts: the derivative of `path` by sigma, noise - x0."""
    return noise_BCTHW - x0_BCTHW


def sampling_sigmas(num_steps: int, shift: float, *, start: float = SECOND_NOISIEST) -> Tensor:
    """Wan2.2's own inference schedule: `num_steps` shifted sigmas from `start` down, then 0 (float64).

    The shift is applied once, to an even grid that would reach 0 after as many steps.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1")
    base = torch.linspace(start, 0, num_steps + 1, dtype=torch.float64)[:-1]
    return torch.cat([shift_sigma(base, shift), torch.zeros(1, dtype=torch.float64)])


def sampling_timesteps(sigmas: Tensor) -> Tensor:
    """The integer timesteps that published samplers use: floor(1000*sigma) of all sigmas but the final 0 (int64)."""
    return (sigmas[:-1] * TIMESTEPS).long()
