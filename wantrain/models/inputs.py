"""What the transformer makes of its inputs: their grid of patches, patches of latents and back, and rows of text.

Tensor suffixes as in transformer.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wantrain.geometry import PATCH
from wantrain.models.positions import ROPE_LENGTH


def grid_of(x_BCTHW: Tensor, timestep: Tensor, channels: int) -> tuple[int, int, int]:
    """Frames, rows and columns of patches; ValueError for what a model of so many input channels cannot take."""
    batch, found, frames, height, width = x_BCTHW.shape
    if found != channels:
        raise ValueError(f"the transformer takes {channels} input channels, got {found}")
    if height % PATCH[1] or width % PATCH[2]:
        raise ValueError(f"latent height x width {height}x{width} must be even (patch 2x2)")
    if max(frames, height // PATCH[1], width // PATCH[2]) > ROPE_LENGTH:
        raise ValueError(f"latent {frames}x{height}x{width} exceeds {ROPE_LENGTH} positions on an axis")
    if timestep.shape not in {(batch,), (batch, frames)}:
        raise ValueError(f"timestep has shape {tuple(timestep.shape)}, expected ({batch},) or ({batch}, {frames})")
    if timestep.is_floating_point() and timestep.dtype in {torch.float16, torch.bfloat16}:
        raise ValueError(f"timestep is {timestep.dtype}, which rounds 998.7 to 1000; keep it float32")
    return frames, height // PATCH[1], width // PATCH[2]


def patches_of(x_BCTHW: Tensor) -> Tensor:
    """(B, T, P, C*2*2): the values of each 1x2x2 patch."""
    patches = x_BCTHW.unflatten(4, (-1, PATCH[2])).unflatten(3, (-1, PATCH[1]))
    # (B, C, T, h, 2, w, 2) -> (B, T, h*w, C*2*2): the order in which the kernel flattens.
    return patches.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(2, 3)


def unpatched(patches_BTPD: Tensor, grid: tuple[int, int, int], channels: int) -> Tensor:
    """(B, T, P, 2*2*C), channel fastest -> (B, C, T, H, W)."""
    x = patches_BTPD.unflatten(2, grid[1:]).unflatten(4, (PATCH[1], PATCH[2], channels))
    return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


def text_rows(text_BLD: Tensor, length: int) -> tuple[Tensor, Tensor | None]:
    """The text padded to `length` rows of zeros, with all rows that are only padding folded into one.

    Those rows are equal for every sample, so softmax over n of them is softmax over one whose logit is raised by ln n:
    the same result and gradient for a fraction of the work. Returns the rows and that bias per row.
    """
    rows, spare = text_BLD.shape[1], length - text_BLD.shape[1]
    if spare < 0:
        raise ValueError(f"a text has {rows} tokens, more than the model's {length}; encode it truncated")
    if spare == 0:
        return text_BLD, None
    bias = torch.zeros(rows + 1, device=text_BLD.device)
    bias[rows] = math.log(spare)
    return F.pad(text_BLD, (0, 0, 0, 1)), bias


def stacked_texts(texts_BLD: Sequence[Tensor]) -> Tensor:
    """The texts of several batches as one (B, L, D), with zeros up to the longest one's rows."""
    longest = max(text.shape[1] for text in texts_BLD)
    return torch.cat([F.pad(text, (0, 0, 0, longest - text.shape[1])) for text in texts_BLD])
