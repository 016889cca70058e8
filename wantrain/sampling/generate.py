"""From prompts to frames: noise, two experts with the switch at the boundary, guidance, a solver, the VAE.

The same `generate` serves sample.py and the previews inside training, so a preview is the real inference path.
It is given built modules and loads nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wantrain import flow, geometry
from wantrain.batch import pad_texts
from wantrain.conditioning import Condition, told
from wantrain.sampling.conditioning import Known
from wantrain.sampling.solvers import schedule, solver_named
from wantrain.util.progress import report_progress
from wantrain.util.seeds import generator_at
from wantrain.video import Frames, to_frames

#: A velocity model: (latents, timestep, text, condition) -> velocity.
Velocity = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


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
    condition_BCTHW: Tensor | None = None,
    mask_BT: Tensor | None = None,
    on_step: Callable[[int, str], None] | None = None,
) -> Tensor:
    """Follow the velocity from `latents` (noise, (B, C, T, H, W) float32) to clean latents of the same shape.

    Condition and mask are a `Batch`'s, the same for every step, expert and branch of the guidance; frames that the
    mask has 0 for are given clean in `latents`, and stay. `sigmas` descends to 0 and sets the steps; models see integer
    timesteps floor(1000*sigma), as published samplers do. `on_step(i, expert name)` is told about every step.
    ValueError for an unknown solver or absent guidance.
    """
    if absent := sorted(name for name in experts.models if guidance.get(name) is None):
        raise ValueError(f"guidance lacks a scale for {', '.join(absent)}")
    stepper = solver_named(solver, sigmas)
    given = x = latents.float()
    noised = None if mask_BT is None else (mask_BT > 0)[:, None, :, None, None]
    for i, timestep in enumerate(flow.sampling_timesteps(sigmas).tolist()):
        name = experts.name_at(timestep)
        report_progress(f"solver step {i + 1} of {len(sigmas) - 1}")
        if on_step is not None:
            on_step(i, name)
        level = flow.noised(torch.full((len(x),), float(timestep), device=x.device), mask_BT)
        velocity = experts.models[name](x, level, text_BLD, condition_BCTHW)
        scale = guidance[name]
        if scale != 1.0:
            away = experts.models[name](x, level, negative_BLD, condition_BCTHW)
            velocity = away + scale * (velocity - away)
        x = stepper.step(i, x, velocity)
        if noised is not None:
            x = torch.where(noised, x, given)
    return x


@dataclass
class Sampler:
    """Prompts to frames, with everything a pipeline holds: experts, VAE, text encoder.

    `encode_texts(list of str) -> list of (L, D)`; `decode(latents) -> pixels in [-1, 1]`. Strides and channels are
    the VAE's. `way` is how the experts are told what is known of a video (conditioning.py), None: not at all; what is
    known goes through `encode_pixels(pixels in [-1, 1]) -> latents`. Texts are encoded once and kept; `texts` are those
    that are there already, and `warm` encodes many at once.
    """

    experts: Experts
    encode_texts: Callable[[list[str]], list[Tensor]]
    decode: Callable[[Tensor], Tensor]
    channels: int
    temporal_stride: int = 4
    spatial_stride: int = 8
    device: torch.device | str = "cpu"
    way: str | None = None
    encode_pixels: Callable[[Tensor], Tensor] | None = None
    texts: dict[str, Tensor] = field(default_factory=dict)

    def __call__(
        self,
        prompt: str,
        *,
        bucket: geometry.Bucket,
        settings: Settings,
        seed: int,
        known: Condition | None = None,
        on_step: Callable[[int, str], None] | None = None,
    ) -> Frames:
        """One video, uint8 frames (F, H, W, 3). The same seed gives the same noise on every machine."""
        return self.batch([prompt], bucket=bucket, settings=settings, seeds=[seed], known=known, on_step=on_step)[0]

    def batch(
        self,
        prompts: Sequence[str],
        *,
        bucket: geometry.Bucket,
        settings: Settings,
        seeds: Sequence[int],
        known: Condition | None = None,
        on_step: Callable[[int, str], None] | None = None,
    ) -> list[Frames]:
        """A video for each prompt with its seed, all at once: for small models, where one by one is slow.

        `known` is what is known of each of them, or (B = 1) of all. ValueError for a size that VAE and transformer
        cannot take, and for what the experts cannot be told.
        """
        multiple = self.spatial_stride * geometry.PATCH[1]
        geometry.check_size(bucket.height, bucket.width, multiple, key="height, width")
        shape = geometry.latent_shape(bucket, self.temporal_stride, self.spatial_stride)
        noise = [torch.randn((self.channels, *shape), generator=generator_at(seed, "sample")) for seed in seeds]
        latents, condition, mask = self._told(torch.stack(noise), known)
        latents = generate(
            self.experts,
            latents=latents,
            text_BLD=self._texts(prompts),
            negative_BLD=self._texts([settings.negative_prompt] * len(prompts)),
            sigmas=schedule(settings.solver, settings.steps, settings.shift),
            guidance=settings.guidance,
            solver=settings.solver,
            condition_BCTHW=condition,
            mask_BT=mask,
            on_step=on_step,
        )
        report_progress("decoding")
        with torch.inference_mode():
            return [to_frames(pixels) for pixels in self.decode(latents)]

    @torch.no_grad()
    def tell(self, known: Known) -> Condition:
        """What the experts are told of a video that is partly known."""
        assert self.encode_pixels is not None and self.way is not None, "nothing is known without a way to tell it"
        strides = {"temporal_stride": self.temporal_stride, "spatial_stride": self.spatial_stride}
        return known.encode(self.encode_pixels, way=self.way, **strides)

    def warm(self, prompts: Sequence[str]) -> None:
        """Encode texts now, those that are not known yet."""
        fresh = [text for text in dict.fromkeys(prompts) if text not in self.texts]
        if fresh:
            self.texts.update(zip(fresh, self.encode_texts(fresh), strict=True))

    def _texts(self, prompts: Sequence[str]) -> Tensor:
        self.warm(prompts)
        return pad_texts([self.texts[prompt] for prompt in prompts]).float().to(self.device)

    def _told(self, noise_BCTHW: Tensor, known: Condition | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What sampling starts from, condition and mask, for a batch of that much noise, on the device."""
        start = noise_BCTHW.to(self.device)
        condition, mask = told(known, self.way)
        if condition is not None:
            condition = condition.to(self.device).expand(len(start), *condition.shape[1:])
        if known is not None and mask is not None:
            mask = mask.to(self.device).expand(len(start), -1)
            start = torch.where(mask[:, None, :, None, None] > 0, start, known.latents_BCTHW.to(self.device))
        return start, condition, mask
