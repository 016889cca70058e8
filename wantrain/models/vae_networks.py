"""Encoder and decoder of WanVAE: the blocks of vae_layers.py, level by level.

Tensor suffixes and sources as in vae.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wantrain.models.vae_layers import (
    CausalConv3d,
    ChannelNorm,
    Downsample,
    MiddleBlock,
    ResidualDownBlock,
    ResidualUpBlock,
    Stream,
    UpBlock,
    residual_blocks,
)


@dataclass(frozen=True)
class Levels:
    """What encoder and decoder are built from.

    channels        of what the network sees as one pixel
    widths          channels of each level, at full resolution first
    base            channels before the encoder's first level
    num_res_blocks  per encoder level; a decoder level has one more
    temporal        whether the step from a level to the next, lower one also halves the frames
    dropout         in the residual blocks, in training
    residual        2.2: shortcuts past each level's resampling
    """

    channels: int
    widths: tuple[int, ...]
    base: int
    num_res_blocks: int
    temporal: tuple[bool, ...]
    dropout: float
    residual: bool


class Encoder(nn.Module):
    """Pixels to 2z channels; each level but the last halves the size, and by `levels.temporal` the frames."""

    def __init__(self, levels: Levels, z_dim: int) -> None:
        super().__init__()
        widths, count, dropout = levels.widths, levels.num_res_blocks, levels.dropout
        self.conv_in = CausalConv3d(levels.channels, levels.base)
        self.down_blocks, large = nn.ModuleList(), 0
        for before, width, down in zip((levels.base, *widths), widths, (*levels.temporal, None), strict=False):
            if levels.residual:
                self.down_blocks.append(ResidualDownBlock(before, width, count, down, dropout))
            else:
                # 2.1 numbers the layers of all levels consecutively.
                self.down_blocks.extend(residual_blocks(before, width, count, dropout))
                if down is not None:
                    self.down_blocks.append(Downsample(width, temporal=down))
            large = large or (len(self.down_blocks) if down else 0)
        self._large = large or len(self.down_blocks)  # the blocks that see every frame
        self.mid_block = MiddleBlock(widths[-1], dropout)
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * z_dim)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = torch.cat([self._down(part, stream) for part in stream.pairs(x)], dim=2)
        for block in self.down_blocks[self._large :]:
            x = block(x, stream)
        x = self.mid_block(x, stream)
        return self.conv_out(self.norm_out.activated(x, spent=True), stream)

    def _down(self, x: Tensor, stream: Stream) -> Tensor:
        """Through the blocks that see every frame, whose tensors are the largest."""
        x = self.conv_in(x, stream)
        for block in self.down_blocks[: self._large]:
            x = block(x, stream)
        return x


class Decoder(nn.Module):
    """z channels back to pixels; each level but the last doubles the size, and by `levels.temporal` the frames."""

    def __init__(self, levels: Levels, z_dim: int) -> None:
        super().__init__()
        widths, dropout = levels.widths[::-1], levels.dropout
        self.conv_in = CausalConv3d(z_dim, widths[0])
        self.mid_block = MiddleBlock(widths[0], dropout)
        # An upsampling of 2.1 halves the channels, so every level but the first starts from half the one before.
        befores = widths[:-1] if levels.residual else tuple(width // 2 for width in widths[:-1])
        block_class = ResidualUpBlock if levels.residual else UpBlock
        self.up_blocks = nn.ModuleList(
            block_class(before, width, levels.num_res_blocks + 1, up, dropout)
            for before, width, up in zip((widths[0], *befores), widths, (*levels.temporal[::-1], None), strict=True)
        )
        # The blocks that see not every frame yet.
        self._small = len(levels.temporal) - levels.temporal.index(True) if any(levels.temporal) else 0
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], levels.channels)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.mid_block(self.conv_in(x, stream), stream)
        for block in self.up_blocks[: self._small]:
            x = block(x, stream)
        return torch.cat([self._up(part, stream) for part in stream.pairs(x)], dim=2)

    def _up(self, x: Tensor, stream: Stream) -> Tensor:
        """Through the blocks that see every frame, whose tensors are the largest."""
        for block in self.up_blocks[self._small :]:
            x = block(x, stream)
        return self.conv_out(self.norm_out.activated(x, spent=True), stream)
