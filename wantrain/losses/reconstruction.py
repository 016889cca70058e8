"""The loss that trains a small VAE: pixels in, pixels out, edges kept, latents kept near a unit normal.

It is not part of training a Wan model, whose VAE is given and frozen; it made the tiny model's VAE.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wantrain.batch import PixelBatch
from wantrain.losses.record import ClipValidation, Draws, Loss, LossFunction, Model


class Reconstruction(LossFunction):
    """Squared and absolute error of pixels and of their differences in space and time, and a KL term.

    absolute  weight of the absolute error beside the squared one; more of it alone learns grey before colour
    edges     weight of the absolute error of neighbouring differences, which blur would lose
    kl        weight of the KL divergence per latent element; small, so that latents stay informative
    """

    def __init__(self, *, absolute: float = 0.1, edges: float = 0.1, kl: float = 1e-4) -> None:
        self.absolute, self.edges, self.kl = absolute, edges, kl

    @property
    def validation(self) -> ClipValidation:
        """PSNR of clips through their posterior means."""
        return ClipValidation("psnr", "dB", _clip_error, _mean_psnr)

    def prepare(self, batch: PixelBatch, generators: Sequence[torch.Generator]) -> Draws:
        """Nothing can be drawn ahead: only the model knows the shape of its latents."""
        return Draws(generators)

    def __call__(self, model: Model, batch: PixelBatch, draws: Draws) -> Loss:
        """Loss of one batch of pixels; sample i draws its latent from draws.generators[i]."""
        pixels = batch.pixels_BCFHW

        def noise(shape: torch.Size) -> Tensor:
            return torch.stack([torch.randn(shape[1:], generator=generator) for generator in draws.generators])

        rebuilt, mean, logvar = model(pixels, noise)
        error = rebuilt - pixels
        squared = error.square().mean(dim=(1, 2, 3, 4))
        pixel = squared.mean() + self.absolute * error.abs().mean()
        edge = sum((_difference(error, dim).abs().mean() for dim in (2, 3, 4)), start=pixels.new_zeros(()))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        psnr = -10 * torch.log10(squared.detach() / 4).mean()  # pixels span [-1, 1]: the peak is 2
        return Loss(
            pixel + self.edges * edge + self.kl * kl,
            squared.detach(),
            parts={"psnr": psnr, "kl": kl.detach()},
        )


def _clip_error(model: Model, batch: PixelBatch) -> Tensor:
    """Mean squared error of each clip's pixels through its posterior mean, (B,) float64."""
    pixels = batch.pixels_BCFHW
    rebuilt, _, _ = model(pixels, torch.zeros)
    return (rebuilt.clamp(-1, 1) - pixels).square().mean(dim=(1, 2, 3, 4)).double()


def _mean_psnr(errors: Tensor) -> Tensor:
    """Mean PSNR in dB of clips with these squared errors; pixels span [-1, 1], so the peak is 2."""
    return (-10 * torch.log10(errors / 4)).mean()


def _difference(x: Tensor, dim: int) -> Tensor:
    """Difference of neighbours along `dim`; zero where there is only one."""
    if x.shape[dim] == 1:
        return torch.zeros_like(x)
    return x.diff(dim=dim)
