"""From prompts to frames: noise, two experts that switch at the boundary, guidance, a solver, the VAE.

sample.py and the previews of a training run call the same `generate`. It gets built modules and loads nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from wantrain import flow, geometry
from wantrain.batch import pad_texts
from wantrain.conditioning import EncodePixels, ModelInputs, model_inputs
from wantrain.sampling.conditioning import ConditioningPixels
from wantrain.sampling.memory import kept
from wantrain.sampling.solvers import schedule, solver_named
from wantrain.util.progress import report_progress
from wantrain.util.seeds import generator_at
from wantrain.video import Frames, to_frames

#: A velocity model: (latents, timestep, text, **conditioning) -> velocity.
Velocity = Callable[..., Tensor]


@dataclass(frozen=True)
class Experts:
    """The velocity models by name. `boundary` is the sigma from which high_noise is used; None: one model."""

    models: Mapping[str, Velocity]
    boundary: float | None = None

    def name_at(self, timestep: int) -> str:
        """The expert of an integer timestep; a tie at the boundary is high noise."""
        if len(self.models) == 1:
            return next(iter(self.models))
        assert self.boundary is not None, "two experts need a boundary"
        return "high_noise" if timestep >= self.boundary * flow.TIMESTEPS else "low_noise"


@dataclass(frozen=True)
class Settings:
    """Settings of sampling; a model's defaults come from its conf/model file.

    guidance   guidance scale per expert name; 1 calls the model once per step instead of twice
    solver     "unipc", "dpm++" or "euler"
    steps      solver steps, one call of the model (two with guidance) each
    shift      flow shift of the schedule, as in the model's training
    negative_prompt  text that guidance pushes away from
    """

    guidance: Mapping[str, float]
    shift: float
    steps: int = 30
    solver: str = "unipc"
    negative_prompt: str = ""


class Texts(NamedTuple):
    """Text embeddings (B, L, D), zeros after each text: of the prompts, and of the negative prompts."""

    prompt_BLD: Tensor
    negative_BLD: Tensor


@torch.no_grad()  # not inference_mode: weights that an engine gathers here must serve in training again
def generate(
    experts: Experts,
    *,
    latents: Tensor,
    texts: Texts,
    sigmas: Tensor,
    guidance: Mapping[str, float],
    solver: str = "unipc",
    inputs: ModelInputs | None = None,
    on_step: Callable[[int, str], None] | None = None,
) -> Tensor:
    """Follow the velocity from `latents` (noise, (B, C, T, H, W) float32) to clean latents of the same shape.

    `inputs` are the conditioning, the same for every step, expert and branch of the guidance. Frames whose `noised_BT`
    is 0 are clean in `latents`, and stay. `sigmas` descends to 0 and sets the steps; models see
    integer timesteps floor(1000*sigma), as published samplers do. `on_step(i, expert name)` is called at every step.
    ValueError for an unknown solver or absent guidance.
    """
    if absent := sorted(name for name in experts.models if guidance.get(name) is None):
        raise ValueError(f"guidance lacks a scale for {', '.join(absent)}")
    stepper = solver_named(solver, sigmas)
    start = x = latents.float()
    noised_BT, further = (None, {}) if inputs is None else (inputs.noised_BT, inputs.conditioning)
    noised = None if noised_BT is None else (noised_BT > 0)[:, None, :, None, None]
    at_work = ""
    for i, timestep in enumerate(flow.sampling_timesteps(sigmas).tolist()):
        name = experts.name_at(timestep)
        report_progress(f"solver step {i + 1} of {len(sigmas) - 1}")
        if on_step is not None:
            on_step(i, name)
        model = experts.models[name]
        if name != at_work:  # what the expert before has kept of the texts is freed here
            at_work, (prompt, negative) = name, (kept(model, x, text) for text in texts)
        level = flow.noised(torch.full((len(x),), float(timestep), device=x.device), noised_BT)
        velocity = model(x, level, prompt, **further)
        scale = guidance[name]
        if scale != 1.0:
            away = model(x, level, negative, **further)
            velocity = away + scale * (velocity - away)
        x = stepper.step(i, x, velocity)
        if noised is not None:
            x = torch.where(noised, x, start)
    return x


@dataclass
class Sampler:
    """Prompts to frames, with everything that a pipeline holds: experts, VAE, text encoder.

    encode_texts   list of str -> list of (L, D)
    decode         latents -> pixels in [-1, 1]
    channels, temporal_stride, spatial_stride  the VAE's
    conditioning   the experts' conditioning type (wantrain/conditioning.py)
    encode_pixels  known pixels -> latents; None where the experts take none
    texts          embeddings that exist already; each further text is encoded once
    """

    experts: Experts
    encode_texts: Callable[[list[str]], list[Tensor]]
    decode: Callable[[Tensor], Tensor]
    channels: int
    temporal_stride: int = 4
    spatial_stride: int = 8
    device: torch.device | str = "cpu"
    conditioning: str = "none"
    encode_pixels: EncodePixels | None = None
    texts: dict[str, Tensor] = field(default_factory=dict)

    def __call__(
        self,
        prompt: str,
        *,
        bucket: geometry.Bucket,
        settings: Settings,
        seed: int,
        inputs: ModelInputs | None = None,
        on_step: Callable[[int, str], None] | None = None,
    ) -> Frames:
        """One video, uint8 frames (F, H, W, 3). The same seed gives the same noise on every machine."""
        return self.batch([prompt], bucket=bucket, settings=settings, seeds=[seed], inputs=inputs, on_step=on_step)[0]

    def batch(
        self,
        prompts: Sequence[str],
        *,
        bucket: geometry.Bucket,
        settings: Settings,
        seeds: Sequence[int],
        inputs: ModelInputs | None = None,
        on_step: Callable[[int, str], None] | None = None,
    ) -> list[Frames]:
        """A video for each prompt with its seed, all at once: for small models, where one by one is slow.

        `inputs` are the conditioning of each of them, or (B = 1) of all. ValueError for a size that VAE and transformer
        cannot take.
        """
        multiple = self.spatial_stride * geometry.PATCH[1]
        geometry.check_size(bucket.height, bucket.width, multiple, key="height, width")
        shape = geometry.latent_shape(bucket, self.temporal_stride, self.spatial_stride)
        noise = [torch.randn((self.channels, *shape), generator=generator_at(seed, "sample")) for seed in seeds]
        latents, conditioning, noised = self._conditioned(torch.stack(noise), inputs or ModelInputs())
        latents = generate(
            self.experts,
            latents=latents,
            texts=Texts(self._texts(prompts), self._texts([settings.negative_prompt] * len(prompts))),
            sigmas=schedule(settings.solver, settings.steps, settings.shift),
            guidance=settings.guidance,
            solver=settings.solver,
            inputs=ModelInputs(conditioning, noised),
            on_step=on_step,
        )
        report_progress("decoding")
        with torch.inference_mode():
            return [to_frames(pixels) for pixels in self.decode(latents)]

    @torch.no_grad()
    def encode_conditioning(self, pixels: ConditioningPixels) -> ModelInputs:
        """What the experts are given of a video with these known pixels. ValueError if they take no conditioning."""
        assert self.encode_pixels is not None, "known pixels are encoded"
        strides = {"temporal_stride": self.temporal_stride, "spatial_stride": self.spatial_stride}
        record = pixels.encode(self.encode_pixels, conditioning=self.conditioning, **strides)
        return model_inputs(record, self.conditioning)

    def warm(self, prompts: Sequence[str]) -> None:
        """Encode now, all at once, the prompts that are not encoded yet."""
        fresh = [text for text in dict.fromkeys(prompts) if text not in self.texts]
        if fresh:
            self.texts.update(zip(fresh, self.encode_texts(fresh), strict=True))

    def _texts(self, prompts: Sequence[str]) -> Tensor:
        self.warm(prompts)
        return pad_texts([self.texts[prompt] for prompt in prompts]).float().to(self.device)

    def _conditioned(self, noise_BCTHW: Tensor, inputs: ModelInputs) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Where sampling starts, conditioning and `noised_BT`, for a batch of that much noise, on the device."""
        start, count = noise_BCTHW.to(self.device), len(noise_BCTHW)
        conditioning = {
            name: tensor.to(self.device).expand(count, *tensor.shape[1:])
            for name, tensor in inputs.conditioning.items()
        }
        if inputs.noised_BT is None:
            return start, conditioning, None
        assert inputs.latents_BCTHW is not None, "frames that are not noised have latents"
        noised = inputs.noised_BT.to(self.device).expand(count, -1)
        clean = inputs.latents_BCTHW.to(self.device)
        return torch.where(noised[:, None, :, None, None] > 0, start, clean), conditioning, noised
