"""A new family member in a file of its own: a transformer that takes the camera of each latent frame, and its data."""

from dataclasses import replace

import torch

from wantrain.conditioning import ModelInputs
from wantrain.data import LatentData
from wantrain.models import WanTransformer
from wantrain.util.seeds import generator_at

AXES = 2


class CameraTransformer(WanTransformer):
    """A Wan whose forward takes `camera_BTK`: K numbers of each latent frame, as K further input channels."""

    def forward(self, latents_BCTHW, timestep, text_BLD, *, camera_BTK):
        size = latents_BCTHW.shape[3:]
        channels = camera_BTK.transpose(1, 2)[..., None, None].expand(-1, -1, -1, *size)
        return super().forward(latents_BCTHW, timestep, text_BLD, concat_BCTHW=channels)


class CameraData(LatentData):
    """Latents with a camera for each clip, drawn by its number."""

    def load(self, samples, positions):
        return self._filmed(super().load(samples, positions))

    def heldout_batches(self, count):
        return [self._filmed(batch) for batch in super().heldout_batches(count)]

    def train_batches(self, count):
        return [self._filmed(batch) for batch in super().train_batches(count)]

    def examples(self, count):
        return [
            (caption, bucket, ModelInputs({"camera_BTK": self._camera([number], (bucket.num_frames + 3) // 4)}))
            for number, (caption, bucket, _) in enumerate(super().examples(count))
        ]

    def _filmed(self, batch):
        camera = self._camera(batch.clips, batch.latents_BCTHW.shape[2])
        return replace(batch, conditioning={**batch.conditioning, "camera_BTK": camera})

    def _camera(self, clips, frames):
        return torch.stack([torch.randn(frames, AXES, generator=generator_at("camera", clip)) for clip in clips])
