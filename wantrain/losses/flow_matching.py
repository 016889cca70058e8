"""The velocity loss of rectified flow: noise a clean latent, predict the velocity, compare.

It knows no expert and no task: an expert is a noise window, a task is the conditioning that travels in the batch.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wantrain import flow
from wantrain.batch import Batch, PackedBatch
from wantrain.geometry import num_tokens
from wantrain.losses.noise import NoiseDistribution, narrowed
from wantrain.losses.record import Draws, Loss, LossFunction, Model, NoiseLevelValidation
from wantrain.losses.regions import MaskWeights, area, region_means, weighted_mean
from wantrain.losses.shifts import ShiftByTokens
from wantrain.losses.weighting import Weighting
from wantrain.util.seeds import generator_at


class FlowMatching(LossFunction):
    """Error of the velocity at sigmas drawn from the expert's own distribution.

    density     distribution of u before the shift: "uniform", "logit_normal", or an object of wantrain.flow
    shift       flow shift k, or a callable that gives one for a number of tokens
    low, high   the expert's noise window in sigma
    min_sigma, max_sigma  the part of the window that is drawn from; null: its end
    weighting   weight per sample by its sigma: "none" (Wan), another name of losses.weighting, or a callable
    sets        by the name of a data set, what of density, shift, weighting, min_sigma and max_sigma differs for it
    huber       null: squared error; else the error of an element above which it counts linearly (see `distance`)
    mask        none | focus | ignore: what of a clip counts, by the mask beside it (see `MaskWeights`)
    mask_rest   weight of the rest, where the region has 1
    mask_normalize  true: a clip's loss is a mean, whatever the area that counts; false: a small region weighs little
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
        min_sigma: float | None = None,
        max_sigma: float | None = None,
        weighting: str | Weighting = "none",
        sets: Mapping[str, Mapping[str, Any]] | None = None,
        huber: float | None = None,
        mask: str = "none",
        mask_rest: float = 0.0,
        mask_normalize: bool = True,
        stratified: bool = False,
        batch_size: int | None = 1,
        seed: int = 0,
    ) -> None:
        if huber is not None and not huber > 0:
            raise ValueError(f"loss.huber={huber} must be above 0; null is the squared error")
        if stratified and batch_size is None:
            raise ValueError("loss.stratified=true shares a step out over its samples, and batch_size=null; give it")
        expert = flow.NoiseWindow(low, high)
        self.noise = NoiseDistribution(density, shift, narrowed(expert, min_sigma, max_sigma), weighting)
        self.noise_of_sets = {name: self.noise.of_set(name, own, expert) for name, own in (sets or {}).items()}
        self.density, self.shift, self.weighting, self.huber = density, shift, weighting, huber
        self.min_sigma, self.max_sigma, self.sets = min_sigma, max_sigma, sets
        self.mask, self.mask_rest, self.mask_normalize = mask, mask_rest, mask_normalize
        self.masks = MaskWeights(mask, mask_rest, mask_normalize)
        self.stratified, self.batch_size, self.seed = stratified, batch_size, seed
        windows = [each.window for each in (self.noise, *self.noise_of_sets.values())]
        self.window: flow.NoiseWindow = flow.NoiseWindow(
            min(window.low for window in windows), max(window.high for window in windows)
        )

    def prepare(self, batch: Batch | PackedBatch, generators: Sequence[torch.Generator]) -> Draws:
        """Sample i draws its sigma, then its noise, from generators[i]; on the host."""
        left = iter(generators)
        each = [(part, [*itertools.islice(left, len(part))]) for part in batch.parts]
        for part, _ in each:
            self.masks.checked(part)
        sigma = torch.cat([self.draw(*own) for own in each])
        noise = tuple(draw_noise(part.latents_BCTHW, own) for part, own in each)
        return Draws(generators, sigma, noise if isinstance(batch, PackedBatch) else noise[0])

    def __call__(self, model: Model, batch: Batch | PackedBatch, draws: Draws) -> Loss:
        """Loss of one batch, on the device that batch and draws are on."""
        sigma, noise = draws.sigma, draws.noise_BCTHW
        assert sigma is not None and noise is not None, "made by `prepare`"
        distances = velocity_distances(model, batch, sigma, noise, huber=self.huber)
        sigmas = sigma.split([len(part) for part in batch.parts])
        error = self._errors(batch, distances)
        weighted = error * torch.cat(list(map(self.weight, batch.parts, sigmas)))
        mean = weighted.mean() * batch.weight if isinstance(batch, PackedBatch) else weighted.mean()
        parts = {} if self.masks.mode == "none" else region_means(distances, batch.parts, self.masks)
        return Loss(mean, error.detach(), sigma, parts)

    def draw(self, batch: Batch, generators: Sequence[torch.Generator]) -> Tensor:
        """The sigma of each sample, (B,), from the expert's distribution, or from that of the sample's set."""
        p = torch.cat([torch.rand(1, dtype=torch.float64, generator=generator) for generator in generators])
        if self.stratified:
            assert self.batch_size is not None
            p = (self._strata(batch.positions) + p) / self.batch_size
        tokens = num_tokens(batch.latents_BCTHW.shape[2:])
        return torch.cat([noise.quantiles(p[own], tokens) for noise, own in self._noises(batch)])

    def weight(self, batch: Batch, sigma: Tensor) -> Tensor:
        """What each sample's error counts, (B,): by its noise level, its clip, and without mask_normalize its area."""
        weight = torch.cat([noise.weight(sigma[own]) for noise, own in self._noises(batch)])
        cells_BTHW = self.masks.weights(batch)
        if cells_BTHW is not None and not self.masks.normalize:
            weight = weight * area(cells_BTHW, batch)
        return weight if batch.weight_B is None else weight * batch.weight_B

    def _errors(self, batch: Batch | PackedBatch, distances: Sequence[Tensor]) -> Tensor:
        """The error of each sample, by the weights of its mask, (B,)."""
        each = zip(distances, batch.parts, strict=True)
        return torch.cat([sample_means(own, part, self.masks.weights(part)) for own, part in each])

    def _noises(self, batch: Batch) -> list[tuple[NoiseDistribution, slice]]:
        """The distribution of each sample, in order: (distribution, its samples)."""
        if not (self.noise_of_sets and batch.sets):
            return [(self.noise, slice(None))]
        return [(self.noise_of_sets.get(name, self.noise), slice(i, i + 1)) for i, name in enumerate(batch.sets)]

    def _strata(self, positions: Sequence[int]) -> Tensor:
        """Which of `batch_size` equal parts of the distribution each position draws from: a permutation per step."""
        assert self.batch_size is not None
        steps = [divmod(position, self.batch_size) for position in positions]
        return torch.tensor([_permutation(self.seed, step, self.batch_size)[place] for step, place in steps])

    @property
    def validation(self) -> NoiseLevelValidation:
        """Squared velocity errors, unweighted but for masks, at the distribution's own noise levels."""
        masks = self.masks
        if masks.mode == "none":
            return NoiseLevelValidation(self.quadrature, velocity_error)
        return NoiseLevelValidation(self.quadrature, self._masked_error, masks.checked, masks.about)

    def _masked_error(self, model: Model, batch: Batch, sigma: Tensor, noise_BCTHW: Tensor) -> Tensor:
        """The squared velocity error of each sample by the weights of its mask, (B,)."""
        return self._errors(batch, velocity_distances(model, batch, sigma, noise_BCTHW))

    @property
    def mass(self) -> float:  # type: ignore[override]
        """Share of the unrestricted distribution that falls into the window."""
        return self.noise.mass

    def quadrature(self, num_points: int) -> Tensor:
        """Sigmas at the midpoints of `num_points` equal slices of the distribution: a fixed stand-in for drawing.

        One list for all clips, so that levels compare: where the shift goes by tokens, it is that of
        `noise.shift_for()`, and where sets have distributions of their own, the expert's.
        """
        return self.noise.quantiles((torch.arange(num_points, dtype=torch.float64) + 0.5) / num_points)


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


def velocity_distances(
    model: Model,
    batch: Batch | PackedBatch,
    sigma: Tensor,
    noise_BCTHW: Tensor | tuple[Tensor, ...],
    *,
    huber: float | None = None,
) -> list[Tensor]:
    """Velocity error (squared, or Huber's) of each element, (B, C, T, H, W) float32, of each part of the batch."""
    if isinstance(batch, PackedBatch):
        return _packed_distances(model, batch.parts, sigma, tuple(noise_BCTHW), huber)
    assert isinstance(noise_BCTHW, Tensor)
    predicted = model(*_noised(batch, sigma, noise_BCTHW), batch.text_BLD, **batch.conditioning)
    return [_distance(predicted, batch, noise_BCTHW, huber)]


def _packed_distances(
    model: Model, parts: Sequence[Batch], sigma: Tensor, noises: Sequence[Tensor], huber: float | None
) -> list[Tensor]:
    """`velocity_distances` of batches of different shapes, which the model takes as tuples."""
    sigmas = sigma.split([len(part) for part in parts])
    noisy, timesteps = zip(*map(_noised, parts, sigmas, noises), strict=True)
    conditioning = {name: tuple(part.conditioning[name] for part in parts) for name in parts[0].conditioning}
    predicted = model(noisy, timesteps, tuple(part.text_BLD for part in parts), **conditioning)
    each = zip(predicted, parts, noises, strict=True)
    return [_distance(own, part, noise, huber) for own, part, noise in each]


def _noised(batch: Batch, sigma: Tensor, noise_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latents, and their timesteps: (B,), or (B, T) where frames are given clean."""
    level = flow.noised(sigma.to(batch.latents_BCTHW.device), batch.noised_BT)
    return flow.path(batch.latents_BCTHW, noise_BCTHW, level), flow.TIMESTEPS * level


def _distance(predicted: Tensor, batch: Batch, noise_BCTHW: Tensor, huber: float | None) -> Tensor:
    """The error of each element of a prediction."""
    return distance(predicted.float() - flow.velocity(batch.latents_BCTHW, noise_BCTHW), huber)


def sample_means(distance_BCTHW: Tensor, batch: Batch, weight_BTHW: Tensor | None = None) -> Tensor:
    """Mean error of each sample, (B,): over its noised frames, or by the weights of its cells."""
    if weight_BTHW is not None:
        return weighted_mean(distance_BCTHW, weight_BTHW)
    error_BT = distance_BCTHW.mean(dim=(1, 3, 4))
    if batch.noised_BT is None:
        return error_BT.mean(dim=1)
    return (error_BT * batch.noised_BT).sum(dim=1) / batch.noised_BT.sum(dim=1)


def velocity_error(
    model: Model, batch: Batch | PackedBatch, sigma: Tensor, noise_BCTHW: Tensor | tuple[Tensor, ...]
) -> Tensor:
    """Squared velocity error of each sample, (B,) float32, over its noised frames."""
    distances = velocity_distances(model, batch, sigma, noise_BCTHW)
    return torch.cat([sample_means(own, part) for own, part in zip(distances, batch.parts, strict=True)])
