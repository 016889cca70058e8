"""The velocity loss of rectified flow: noise a clean latent, ask the model for the way back, compare.

A loss is a callable loss(model, batch, generators) -> Loss. It knows no expert and no task: the expert is a noise
window, a task is a mask and a condition that travel in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wantrain import flow
from wantrain.batch import Batch
from wantrain.losses.record import Loss, Model


class FlowMatching:
    """Mean squared error of the velocity at sigmas drawn from the expert's own law.

    density    law of u before the shift: "uniform", "logit_normal"
    shift      flow shift k
    low, high  the expert's noise window in sigma
    weighting  "none" (Wan), "sigma_sqrt" or "cosmap": a weight per sample, by its sigma
    """

    def __init__(
        self,
        *,
        density: str = "uniform",
        shift: float = 1.0,
        low: float = 0.0,
        high: float = 1.0,
        weighting: str = "none",
    ) -> None:
        self.density, self.shift, self.weighting = density, shift, weighting
        self.window = flow.NoiseWindow(low, high)
        flow.window_mass(self.window, density=density, shift=shift)  # refuses a bad density or shift at once
        flow.loss_weight(torch.ones(1), weighting)

    def __call__(self, model: Model, batch: Batch, generators: Sequence[torch.Generator]) -> Loss:
        """Loss of one batch; sample i draws its sigma and its noise from generators[i]."""
        sigma = torch.cat([self.draw(generator) for generator in generators])
        noise = draw_noise(batch.latents_BCTHW, generators)
        error = velocity_error(model, batch, sigma, noise)
        weighted = error * flow.loss_weight(sigma, self.weighting).to(error.device)
        return Loss(weighted.mean(), error.detach(), sigma)

    def draw(self, generator: torch.Generator) -> Tensor:
        """One sigma, (1,), from the expert's law."""
        return flow.draw_sigma(1, density=self.density, shift=self.shift, window=self.window, generator=generator)

    def quadrature(self, num_points: int) -> Tensor:
        """Sigmas at the midpoints of `num_points` equal slices of the law: a fixed stand-in for drawing."""
        p = (torch.arange(num_points, dtype=torch.float64) + 0.5) / num_points
        return flow.sigma_quantiles(p, density=self.density, shift=self.shift, window=self.window)


def draw_noise(like_BCTHW: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise, one generator per sample; drawn on the CPU so that every device sees the same."""
    shape = like_BCTHW.shape[1:]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(like_BCTHW.device)


def velocity_error(model: Model, batch: Batch, sigma: Tensor, noise_BCTHW: Tensor) -> Tensor:
    """Squared velocity error of each sample, (B,) float32, averaged over the frames that its mask has noised."""
    x0 = batch.latents_BCTHW
    level = flow.noised(sigma.to(x0.device), batch.mask_BT)
    noisy = flow.path(x0, noise_BCTHW, level)
    timestep = flow.TIMESTEPS * level
    predicted = model(noisy, timestep, batch.text_BLD, batch.condition_BCTHW)
    error_BT = (predicted.float() - flow.velocity(x0, noise_BCTHW)).square().mean(dim=(1, 3, 4))
    if batch.mask_BT is None:
        return error_BT.mean(dim=1)
    return (error_BT * batch.mask_BT).sum(dim=1) / batch.mask_BT.sum(dim=1)
