"""Validation as a measurement: fixed clips, fixed noise, fixed noise levels inside the expert's own law.

Beside the loss stands the best linear predictor v = a(sigma) * x_sigma, fitted to these very clips and noises: a
model that is not below it has learned nothing but to copy noise.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from wantrain import flow, world
from wantrain.batch import Batch
from wantrain.losses.flow_matching import FlowMatching, velocity_error
from wantrain.training.stepper import Stepper


@dataclass
class Validator:
    """Hook: the mean velocity error over held-out clips and noise levels, every `every` steps and at the ends.

    Where there are several, `prefix` tells their results apart.
    """

    stepper: Stepper
    loss: FlowMatching
    batches: list[Batch]
    every: int
    steps: int
    points: int
    seed: int
    prefix: str = ""
    baseline: dict[str, Any] = field(default_factory=dict)

    def due(self, step: int) -> bool:
        """True at every `every`-th step and the last one, if there are clips."""
        return bool(self.batches) and (step % self.every == 0 or step == self.steps)

    def __call__(self, step: int) -> dict[str, Any]:
        if not self.baseline:
            self.baseline = self.linear_baseline()
        by_level = self.measure()
        world.say(
            f"step {step}: {self.prefix}validation loss {by_level.mean():.4f} "
            f"(best linear predictor {self.baseline['validation_linear']:.4f})"
        )
        found = {
            "validation_loss": by_level.mean().item(),
            "validation_by_sigma": dict(zip(_keys(self.sigmas), by_level.tolist(), strict=True)),
            **self.baseline,
        }
        return {f"{self.prefix}{key}": value for key, value in found.items()}

    @property
    def sigmas(self) -> Tensor:
        """The noise levels that are measured, (points,)."""
        return self.loss.quadrature(self.points)

    def measure(self) -> Tensor:
        """The model's mean velocity error at each level, (points,) float64."""
        errors = []
        with torch.no_grad(), self.stepper.forward_context():
            for batch in self.batches:
                here = batch.to(self.stepper.device)
                noises = self._noises(batch)
                for level, noise in zip(self.sigmas, noises, strict=True):
                    sigma = level.expand(len(batch))
                    errors.append(velocity_error(self.stepper.module, here, sigma, noise.to(self.stepper.device)))
        return _by_level(errors, self.points)

    def linear_baseline(self) -> dict[str, Any]:
        """Error of v = a(sigma)*x_sigma with the a that is best on these clips at each level."""
        sigmas, sums = self.sigmas, torch.zeros(self.points, 3, dtype=torch.float64)
        elements = 0.0
        for batch in self.batches:
            x0 = batch.latents_BCTHW
            mask_BT = torch.ones(len(x0), x0.shape[2]) if batch.mask_BT is None else batch.mask_BT
            # Clips weigh the same whatever their size, and of each only the noised frames count, as in the loss above.
            counted = mask_BT.sum(dim=1, keepdim=True) * x0[0, :, 0].numel()
            weight = flow.over_frames(mask_BT.double() / counted, x0)
            for i, (level, noise) in enumerate(zip(sigmas, self._noises(batch), strict=True)):
                noisy = flow.path(x0, noise, flow.noised(level.expand(len(batch)), batch.mask_BT)).double()
                target = flow.velocity(x0, noise).double()
                terms = [noisy * target, noisy * noisy, target * target]
                sums[i] += torch.stack([(weight * term).sum() for term in terms])
            elements += len(batch)
        cross, noisy_power, target_power = sums.unbind(1)
        by_level = (target_power - cross**2 / noisy_power) / elements
        return {
            "validation_linear": by_level.mean().item(),
            "validation_linear_by_sigma": dict(zip(_keys(sigmas), by_level.tolist(), strict=True)),
        }

    def _noises(self, batch: Batch) -> list[Tensor]:
        """One noise per level for the whole batch; each clip's own, drawn by its identity."""
        generators = [world.generator(self.seed, "validation", name) for name in batch.ids]
        shape = batch.latents_BCTHW.shape[1:]
        return [torch.stack([torch.randn(shape, generator=g) for g in generators]) for _ in range(self.points)]


def _by_level(errors: Iterable[Tensor], points: int) -> Tensor:
    """Mean error per level from per-clip errors that were collected batch by batch, level by level."""
    flat = list(errors)
    return torch.stack([torch.cat(flat[i::points]).double().mean() for i in range(points)])


def _keys(sigmas: Tensor) -> list[str]:
    return [f"{sigma:.4f}" for sigma in sigmas.tolist()]


@dataclass
class ReconstructionValidator:
    """Hook: PSNR of a VAE on held-out clips, through its posterior mean."""

    stepper: Stepper
    batches: list[Batch]
    every: int
    steps: int

    def due(self, step: int) -> bool:
        """True at every `every`-th step and the last one, if there are clips."""
        return bool(self.batches) and (step % self.every == 0 or step == self.steps)

    def __call__(self, step: int) -> dict[str, Any]:
        errors = []
        with torch.no_grad(), self.stepper.forward_context():
            for batch in self.batches:
                pixels = batch.latents_BCTHW.to(self.stepper.device)
                rebuilt, _, _ = self.stepper.module(pixels, torch.zeros)
                errors.append((rebuilt.clamp(-1, 1) - pixels).square().mean(dim=(1, 2, 3, 4)))
        psnr = (-10 * torch.log10(torch.cat(errors) / 4)).mean().item()
        world.say(f"step {step}: validation PSNR {psnr:.2f} dB")
        return {"validation_psnr": psnr}
