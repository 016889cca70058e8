"""Tiled decoding of a VAE's latents, for pictures that do not fit into memory.

Neighbouring tiles overlap and are blended linearly there. The result differs from decoding the whole picture: Wan's
decoder attends over the whole frame once, in its middle, and its convolutions reach further than the overlap
(docs/numerics.md has the difference). A tile that covers the whole picture gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from wantrain.sampling.peers import ALONE, Peers

#: Overlap of neighbouring tiles, as a share of a tile's side.
OVERLAP = 0.25


@dataclass(frozen=True)
class Tiled:
    """Decodes squares of `tile` latent rows and columns, so that memory depends on the tile alone.

    The pixels are assembled on the host. Processes that make one video together decode a tile each and exchange them;
    each assembles all, in the same order as one process does.
    """

    decode: Callable[[Tensor], Tensor]
    tile: int
    peers: Peers = ALONE

    def __call__(self, latents_BCTHW: Tensor) -> Tensor:
        """Latents (B, C, T, H, W) -> pixels (B, 3, F, s*H, s*W); s is the spatial stride of `decode`."""
        height, width = latents_BCTHW.shape[3:]
        if max(height, width) <= self.tile:
            return self.decode(latents_BCTHW)
        total = weight = torch.empty(0)
        places = [(top, left) for top in starts(height, self.tile) for left in starts(width, self.tile)]
        for (top, left), pixels in zip(places, self._decoded(latents_BCTHW, places), strict=True):
            rows, columns = min(self.tile, height), min(self.tile, width)
            stride = pixels.shape[3] // rows
            if total.numel() == 0:
                size = (height * stride, width * stride)
                total, weight = pixels.new_zeros(*pixels.shape[:3], *size), pixels.new_zeros(size)
            ramp_H = ramp(rows, height, top, self.tile, stride)
            ramp_W = ramp(columns, width, left, self.tile, stride)
            ramp_HW = ramp_H[:, None] * ramp_W
            here = (
                slice(top * stride, top * stride + pixels.shape[3]),
                slice(left * stride, left * stride + pixels.shape[4]),
            )
            total[(..., *here)] += pixels * ramp_HW
            weight[here] += ramp_HW
        return total.div_(weight)

    def _decoded(self, latents_BCTHW: Tensor, places: list[tuple[int, int]]) -> Iterator[Tensor]:
        """The pixels of the tile at each place, on the host. Where a round has fewer tiles than there are processes,
        the last tile is decoded by all that have none.
        """
        for first in range(0, len(places), self.peers.size):
            top, left = places[min(first + self.peers.rank, len(places) - 1)]
            own = self.decode(latents_BCTHW[:, :, :, top : top + self.tile, left : left + self.tile]).float()
            for pixels in self.peers.gathered(own)[: len(places) - first]:
                yield pixels.cpu()


def starts(length: int, tile: int) -> list[int]:
    """Starts of the tiles along an axis, with the overlap between them; the last tile ends with the axis."""
    if length <= tile:
        return [0]
    step = max(1, tile - round(tile * OVERLAP))
    return [*range(0, length - tile, step), length - tile]


def ramp(size: int, length: int, start: int, tile: int, stride: int) -> Tensor:
    """Blending weights along one axis of a tile, in pixels: rising, and falling, over the overlap with a neighbour."""
    weights = torch.ones(size * stride)
    overlap = max(1, round(tile * OVERLAP)) * stride
    rising = (torch.arange(overlap) + 0.5) / overlap
    if start > 0:
        weights[:overlap] = rising
    if start + size < length:
        weights[-overlap:] = torch.minimum(weights[-overlap:], rising.flip(0))
    return weights
