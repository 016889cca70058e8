"""Decoding a VAE's latents tile by tile, when the whole picture does not fit into memory.

Neighbouring tiles overlap and are blended linearly there. It is not what the whole picture decodes to: Wan's decoder
attends over the whole frame once, in its middle, and its convolutions look further than the overlap
(docs/numerics.md says how far apart the two are). A tile that covers the picture is the picture, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: The part of a tile's side that it shares with the next one.
OVERLAP = 0.25


@dataclass(frozen=True)
class Tiled:
    """A decoder that works through squares of `tile` latent rows and columns; memory grows with them alone.

    The pixels are put together on the host.
    """

    decode: Callable[[Tensor], Tensor]
    tile: int

    def __call__(self, latents_BCTHW: Tensor) -> Tensor:
        """Latents (B, C, T, H, W) -> pixels (B, 3, F, s*H, s*W), s being whatever `decode` makes of a row."""
        height, width = latents_BCTHW.shape[3:]
        if max(height, width) <= self.tile:
            return self.decode(latents_BCTHW)
        total = weight = torch.empty(0)
        rows, columns = starts(height, self.tile), starts(width, self.tile)
        for top in rows:
            for left in columns:
                part = latents_BCTHW[:, :, :, top : top + self.tile, left : left + self.tile]
                pixels = self.decode(part).float().cpu()
                stride = pixels.shape[3] // part.shape[3]
                if total.numel() == 0:
                    size = (height * stride, width * stride)
                    total, weight = pixels.new_zeros(*pixels.shape[:3], *size), pixels.new_zeros(size)
                ramp_H = ramp(part.shape[3], height, top, self.tile, stride)
                ramp_W = ramp(part.shape[4], width, left, self.tile, stride)
                ramp_HW = ramp_H[:, None] * ramp_W
                here = (
                    slice(top * stride, top * stride + pixels.shape[3]),
                    slice(left * stride, left * stride + pixels.shape[4]),
                )
                total[(..., *here)] += pixels * ramp_HW
                weight[here] += ramp_HW
        return total.div_(weight)


def starts(length: int, tile: int) -> list[int]:
    """Where tiles begin along an axis: one after the other with the overlap, the last one flush with the end."""
    if length <= tile:
        return [0]
    step = max(1, tile - round(tile * OVERLAP))
    return [*range(0, length - tile, step), length - tile]


def ramp(size: int, length: int, start: int, tile: int, stride: int) -> Tensor:
    """Weights along one axis of a tile, in pixels: rising over the overlap from a neighbour, falling towards one."""
    weights = torch.ones(size * stride)
    overlap = max(1, round(tile * OVERLAP)) * stride
    rising = (torch.arange(overlap) + 0.5) / overlap
    if start > 0:
        weights[:overlap] = rising
    if start + size < length:
        weights[-overlap:] = torch.minimum(weights[-overlap:], rising.flip(0))
    return weights
