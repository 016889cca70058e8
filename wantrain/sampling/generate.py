"""From prompts to frames: noise, two experts with the switch at the boundary, guidance, a solver, the VAE.

The same `generate` serves sample.py and the previews inside training, so a preview is the real inference path.
It is given built modules and loads nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wantrain import flow, geometry, world
from wantrain.batch import pad_texts
from wantrain.sampling.solvers import schedule, solver_named
from wantrain.video import Frames, to_frames

#: A velocity model: (latents, timestep, text) -> velocity.
Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Experts:
    """The velocity models by noise level. `boundary` is the sigma from which high noise answers; None: one model."""

    models: Mapping[str, Velocity]
    boundary: float | None = None

    def name_at(self, timestep: int) -> str:
        """Which expert answers at an integer timestep; a tie at the boundary belongs to high noise."""
        if len(self.models) == 1:
            return next(iter(self.models))
        assert self.boundary is not None, "two experts need a boundary"
        return "high_noise" if timestep >= self.boundary * flow.TIMESTEPS else "low_noise"


@dataclass(frozen=True)
class Settings:
    """How to sample; defaults of a model come from its conf/model file.

    guidance   guidance scale per expert name; 1 asks the model once per step instead of twice
    solver     "unipc", "dpm++" or "euler"
    steps      solver steps, one call of the model (two with guidance) each
    shift      flow shift of the schedule; part of what the model was trained for
    negative_prompt  what guidance pushes away from
    """

    guidance: Mapping[str, float]
    shift: float
    steps: int = 30
    solver: str = "unipc"
    negative_prompt: str = ""


@torch.no_grad()  # not inference_mode: weights that an engine gathers here must serve in training again
def generate(
    experts: Experts,
    *,
    latents: Tensor,
    text_BLD: Tensor,
    negative_BLD: Tensor,
    sigmas: Tensor,
    guidance: Mapping[str, float],
    solver: str = "unipc",
    on_step: Callable[[int, str], None] | None = None,
) -> Tensor:
    """Follow the velocity from `latents` (noise, (B, C, T, H, W) float32) to clean latents of the same shape.

    `sigmas` descends to 0 and sets the steps; models see integer timesteps floor(1000*sigma), as published samplers
    do. `on_step(i, expert name)` is told about every step. ValueError for an unknown solver or absent guidance.
    """
    if absent := sorted(name for name in experts.models if guidance.get(name) is None):
        raise ValueError(f"guidance lacks a scale for {', '.join(absent)}")
    stepper = solver_named(solver, sigmas)
    x = latents.float()
    for i, timestep in enumerate(flow.sampling_timesteps(sigmas).tolist()):
        name = experts.name_at(timestep)
        if on_step is not None:
            on_step(i, name)
        level = torch.full((len(x),), float(timestep), device=x.device)
        velocity = experts.models[name](x, level, text_BLD)
        scale = guidance[name]
        if scale != 1.0:
            away = experts.models[name](x, level, negative_BLD)
            velocity = away + scale * (velocity - away)
        x = stepper.step(i, x, velocity)
    return x


@dataclass
class Sampler:
    """Prompts to frames, with everything a pipeline holds: experts, VAE, text encoder.

    `encode_texts(list of str) -> list of (L, D)`; `decode(latents) -> pixels in [-1, 1]`. Strides and channels are
    the VAE's. Texts are encoded once and kept; `warm` does it for all that will be asked for, before anything else
    takes memory.
    """

    experts: Experts
    encode_texts: Callable[[list[str]], list[Tensor]]
    decode: Callable[[Tensor], Tensor]
    channels: int
    temporal_stride: int = 4
    spatial_stride: int = 8
    device: torch.device | str = "cpu"
    texts: dict[str, Tensor] = field(default_factory=dict)

    def __call__(
        self,
        prompt: str,
        *,
        bucket: geometry.Bucket,
        settings: Settings,
        seed: int,
        on_step: Callable[[int, str], None] | None = None,
    ) -> Frames:
        """One video, uint8 frames (F, H, W, 3). The same seed gives the same noise on every machine."""
        return self.batch([prompt], bucket=bucket, settings=settings, seeds=[seed], on_step=on_step)[0]

    def batch(
        self,
        prompts: Sequence[str],
        *,
        bucket: geometry.Bucket,
        settings: Settings,
        seeds: Sequence[int],
        on_step: Callable[[int, str], None] | None = None,
    ) -> list[Frames]:
        """A video for each prompt with its seed, all at once: for small models, where one by one is slow.

        ValueError for a size that VAE and transformer cannot take.
        """
        multiple = self.spatial_stride * geometry.PATCH[1]
        geometry.check_size(bucket.height, bucket.width, multiple, key="height, width")
        shape = geometry.latent_shape(bucket, self.temporal_stride, self.spatial_stride)
        noise = [torch.randn((self.channels, *shape), generator=world.generator(seed, "sample")) for seed in seeds]
        latents = generate(
            self.experts,
            latents=torch.stack(noise).to(self.device),
            text_BLD=self._texts(prompts),
            negative_BLD=self._texts([settings.negative_prompt] * len(prompts)),
            sigmas=schedule(settings.solver, settings.steps, settings.shift),
            guidance=settings.guidance,
            solver=settings.solver,
            on_step=on_step,
        )
        with torch.inference_mode():
            return [to_frames(pixels) for pixels in self.decode(latents)]

    def warm(self, prompts: Sequence[str]) -> None:
        """Encode texts now, those that are not known yet."""
        fresh = [text for text in dict.fromkeys(prompts) if text not in self.texts]
        if fresh:
            self.texts.update(zip(fresh, self.encode_texts(fresh), strict=True))

    def _texts(self, prompts: Sequence[str]) -> Tensor:
        self.warm(prompts)
        return pad_texts([self.texts[prompt] for prompt in prompts]).float().to(self.device)
