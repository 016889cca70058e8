"""The velocity loss of rectified flow: noise a clean latent, predict the velocity, compare.

It knows no expert and no task: an expert is a noise window, a task is the conditioning that travels in the batch.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from wantrain import flow
from wantrain.batch import Batch, PackedBatch
from wantrain.geometry import num_tokens
from wantrain.losses.record import Draws, Loss, LossFunction, Model, NoiseLevelValidation
from wantrain.losses.shifts import ShiftByTokens
from wantrain.losses.weighting import Weighting, weighting_named
from wantrain.util.seeds import generator_at


class FlowMatching(LossFunction):
    """Error of the velocity at sigmas drawn from the expert's own distribution.

    density     distribution of u before the shift: "uniform", "logit_normal", or an object of wantrain.flow
    shift       flow shift k, or a callable that gives one for a number of tokens
    low, high   the expert's noise window in sigma
    weighting   weight per sample by its sigma: "none" (Wan), another name of losses.weighting, or a callable
    huber       null: squared error; else the error of an element above which it counts linearly (see `distance`)
    stratified  share the distribution out over a step: each sample of the global batch draws from its own equal part
    batch_size, seed  the run's, by which samples find their parts; a run of batch_tokens has no batch size
    """

    packs = True

    def __init__(
        self,
        *,
        density: str | flow.Density = "uniform",
        shift: float | ShiftByTokens = 1.0,
        low: float = 0.0,
        high: float = 1.0,
        weighting: str | Weighting = "none",
        huber: float | None = None,
        stratified: bool = False,
        batch_size: int | None = 1,
        seed: int = 0,
    ) -> None:
        if huber is not None and not huber > 0:
            raise ValueError(f"loss.huber={huber} must be above 0; null is the squared error")
        if stratified and batch_size is None:
            raise ValueError("loss.stratified=true shares a step out over its samples, and batch_size=null; give it")
        self.density, self.shift, self.weighting, self.huber = density, shift, weighting, huber
        self.stratified, self.batch_size, self.seed = stratified, batch_size, seed
        self.window: flow.NoiseWindow = flow.NoiseWindow(low, high)
        self.weight = weighting_named(weighting)
        self.quadrature(1)  # refuses a bad density or shift, or a window without mass, at once

    def prepare(self, batch: Batch | PackedBatch, generators: Sequence[torch.Generator]) -> Draws:
        """Sample i draws its sigma, then its noise, from generators[i]; on the host."""
        left = iter(generators)
        each = [(part, [*itertools.islice(left, len(part))]) for part in batch.parts]
        sigma = torch.cat([self.draw(*own) for own in each])
        noise = tuple(draw_noise(part.latents_BCTHW, own) for part, own in each)
        return Draws(generators, sigma, noise if isinstance(batch, PackedBatch) else noise[0])

    def __call__(self, model: Model, batch: Batch | PackedBatch, draws: Draws) -> Loss:
        """Loss of one batch, on the device that batch and draws are on."""
        sigma, noise = draws.sigma, draws.noise_BCTHW
        assert sigma is not None and noise is not None, "made by `prepare`"
        error = velocity_error(model, batch, sigma, noise, huber=self.huber)
        weighted = error * self.weight(sigma)
        mean = weighted.mean() * batch.weight if isinstance(batch, PackedBatch) else weighted.mean()
        return Loss(mean, error.detach(), sigma)

    def draw(self, batch: Batch, generators: Sequence[torch.Generator]) -> Tensor:
        """The sigma of each sample, (B,), from the expert's distribution."""
        p = torch.cat([torch.rand(1, dtype=torch.float64, generator=generator) for generator in generators])
        if self.stratified:
            assert self.batch_size is not None
            p = (self._strata(batch.positions) + p) / self.batch_size
        shift = self.shift_for(num_tokens(batch.latents_BCTHW.shape[2:]))
        return flow.sigma_quantiles(p, density=self.density, shift=shift, window=self.window)

    def _strata(self, positions: Sequence[int]) -> Tensor:
        """Which of `batch_size` equal parts of the distribution each position draws from: a permutation per step."""
        assert self.batch_size is not None
        steps = [divmod(position, self.batch_size) for position in positions]
        return torch.tensor([_permutation(self.seed, step, self.batch_size)[place] for step, place in steps])

    def shift_for(self, tokens: int | None = None) -> float:
        """The flow shift for samples of that many tokens; None asks for the size that the shift was made for."""
        if isinstance(self.shift, int | float):
            return self.shift
        return self.shift(self.shift.reference_tokens if tokens is None else tokens)

    @property
    def validation(self) -> NoiseLevelValidation:
        """Squared velocity errors, unweighted, at the distribution's own noise levels."""
        return NoiseLevelValidation(self.quadrature, velocity_error)

    @property
    def mass(self) -> float:  # type: ignore[override]
        """Share of the unrestricted distribution that falls into the window."""
        return flow.window_mass(self.window, density=self.density, shift=self.shift_for())

    def share_below(self, sigma: float) -> float:
        """Share of the draws at or below a sigma; where the shift goes by tokens, at the size it was made for."""
        level = torch.tensor(sigma, dtype=torch.float64)
        own = {"density": self.density, "shift": self.shift_for(), "window": self.window}
        return flow.sigma_cdf(level, **own).item()  # type: ignore[arg-type]

    def quadrature(self, num_points: int) -> Tensor:
        """Sigmas at the midpoints of `num_points` equal slices of the distribution: a fixed stand-in for drawing.

        One list for all clips, so that levels compare: where the shift goes by tokens, it is that of `shift_for()`.
        """
        p = (torch.arange(num_points, dtype=torch.float64) + 0.5) / num_points
        return flow.sigma_quantiles(p, density=self.density, shift=self.shift_for(), window=self.window)


@functools.lru_cache(maxsize=8)
def _permutation(seed: int, step: int, count: int) -> list[int]:
    """A permutation of range(count) for one step of a run, the same on every rank."""
    order: list[int] = torch.randperm(count, generator=generator_at(seed, "strata", step)).tolist()
    return order


def draw_noise(like_BCTHW: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise, one generator per sample; drawn on the CPU so that every device sees the same."""
    shape = like_BCTHW.shape[1:]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(like_BCTHW.device)


def distance(difference: Tensor, huber: float | None) -> Tensor:
    """Elementwise: the square, or Huber's: the square up to |d| = huber, the tangent huber * (2|d| - huber) beyond."""
    if huber is None:
        return difference.square()
    size = difference.abs()
    return torch.where(size <= huber, difference.square(), huber * (2 * size - huber))


def velocity_error(
    model: Model,
    batch: Batch | PackedBatch,
    sigma: Tensor,
    noise_BCTHW: Tensor | tuple[Tensor, ...],
    *,
    huber: float | None = None,
) -> Tensor:
    """Velocity error (squared, or Huber's) of each sample, (B,) float32, over its noised frames."""
    if isinstance(batch, PackedBatch):
        return _packed_error(model, batch.parts, sigma, tuple(noise_BCTHW), huber)
    assert isinstance(noise_BCTHW, Tensor)
    predicted = model(*_noised(batch, sigma, noise_BCTHW), batch.text_BLD, **batch.conditioning)
    return _error(predicted, batch, noise_BCTHW, huber)


def _packed_error(
    model: Model, parts: Sequence[Batch], sigma: Tensor, noises: Sequence[Tensor], huber: float | None
) -> Tensor:
    """`velocity_error` of batches of different shapes, which the model takes as tuples."""
    sigmas = sigma.split([len(part) for part in parts])
    noisy, timesteps = zip(*map(_noised, parts, sigmas, noises), strict=True)
    conditioning = {name: tuple(part.conditioning[name] for part in parts) for name in parts[0].conditioning}
    predicted = model(noisy, timesteps, tuple(part.text_BLD for part in parts), **conditioning)
    each = zip(predicted, parts, noises, strict=True)
    return torch.cat([_error(own, part, noise, huber) for own, part, noise in each])


def _noised(batch: Batch, sigma: Tensor, noise_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latents, and their timesteps: (B,), or (B, T) where frames are given clean."""
    level = flow.noised(sigma.to(batch.latents_BCTHW.device), batch.noised_BT)
    return flow.path(batch.latents_BCTHW, noise_BCTHW, level), flow.TIMESTEPS * level


def _error(predicted: Tensor, batch: Batch, noise_BCTHW: Tensor, huber: float | None) -> Tensor:
    """The error of each sample's prediction, (B,)."""
    difference = predicted.float() - flow.velocity(batch.latents_BCTHW, noise_BCTHW)
    error_BT = distance(difference, huber).mean(dim=(1, 3, 4))
    if batch.noised_BT is None:
        return error_BT.mean(dim=1)
    return (error_BT * batch.noised_BT).sum(dim=1) / batch.noised_BT.sum(dim=1)
