"""A clip of the training data to look at, without the VAE: its latents in false colours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wantrain.video import Frames, filmstrip, jpeg

#: Frames of a filmstrip, and its height in pixels.
COLUMNS, HEIGHT = 5, 48
#: Shares of the values of a component that become black and white.
DARKEST, BRIGHTEST = 0.01, 0.99
#: Strength of the false colours.
CHROMA = 0.4


@dataclass(frozen=True)
class ClipView:
    """A clip to look at: a filmstrip as JPEG, its caption and its bucket ("FxHxW" in pixels)."""

    strip: bytes
    caption: str
    bucket: str


def view_of(latents_CTHW: Tensor, caption: str, bucket: str) -> ClipView:
    """The view of a clip from its latents."""
    strip = filmstrip(false_colours(latents_CTHW), columns=COLUMNS, cell=HEIGHT)
    return ClipView(jpeg(strip, quality=65), caption, bucket)


def false_colours(latents_CTHW: Tensor) -> Frames:
    """Latents (C, T, H, W) as pictures (T, H, W, 3): the three directions of most variance as brightness and colours.

    The first component is the luminance, the other two are the colour differences of BT.601, so that shapes can be
    recognised; the colours themselves mean nothing.
    """
    channels, *size = latents_CTHW.shape
    values = latents_CTHW.double().reshape(channels, -1)
    values = values - values.mean(dim=1, keepdim=True)
    _, vectors = torch.linalg.eigh(values @ values.T)  # ascending
    kept = vectors[:, -min(3, channels) :].flip(1)
    # The sign of an eigenvector is arbitrary: its largest entry is made positive, so that a clip looks the same again.
    kept = kept * kept.gather(0, kept.abs().argmax(dim=0, keepdim=True)).sign()
    components = torch.zeros(3, values.shape[1], dtype=torch.float64)
    components[: kept.shape[1]] = kept.T @ values
    low, high = (components.quantile(share, dim=1, keepdim=True) for share in (DARKEST, BRIGHTEST))
    y, blue, red = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    blue, red = (blue - 0.5) * CHROMA, (red - 0.5) * CHROMA
    rgb = torch.stack([y + 1.402 * red, y - 0.344 * blue - 0.714 * red, y + 1.772 * blue], dim=-1)
    frames: Frames = (rgb.clamp(0, 1) * 255).round().byte().reshape(*size, 3).numpy().astype(np.uint8)
    return frames
