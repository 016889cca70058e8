"""Building blocks of WanVAE: a clip's stream, causal convolutions, residual blocks, attention, resampling, shortcuts.

A block maps (B, C, T, H, W) to the same layout and stores in the stream the frames that its next chunk needs. So a clip
in chunks and a clip in one pass are the same code. vae.py puts the blocks together.

Tensor suffixes: B batch, C channels, T frames, H W rows and columns.
Sources: Wan report (arXiv 2503.20314) section 4.1; the released weights' shapes, names and constants.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wantrain.models import vae_convolutions as convolutions


class Stream:
    """State of one clip that passes through the layers in chunks: the position, and the frames that layers keep.

    first, last  whether the current chunk begins, ends the clip
    """

    def __init__(self) -> None:
        self.first = self.last = True
        self._kept: dict[nn.Module, Tensor] = {}

    def chunks(self, x_BCTHW: Tensor, length: int | None) -> Iterator[Tensor]:
        """The clip's first frame, then `length` frames at a time; for None the whole clip, as one chunk."""
        frames = x_BCTHW.shape[2]
        starts = [0] if length is None else [0, *range(1, frames, length)]
        for start, stop in pairwise([*starts, frames]):
            self.first, self.last = start == 0, stop == frames
            yield x_BCTHW[:, :, start:stop]

    def pairs(self, x_BCTHW: Tensor) -> Iterator[Tensor]:
        """The current chunk, two frames at a time where that saves memory and the layers' time is the same."""
        if self.first or not convolutions.fits(x_BCTHW):
            yield x_BCTHW
            return
        last, parts = self.last, x_BCTHW.split(2, dim=2)
        for number, part in enumerate(parts, start=1):
            self.last = last and number == len(parts)
            yield part

    def with_history(self, layer: nn.Module, x: Tensor, length: int) -> Tensor:
        """`x` after the `length` frames that `layer` saw before it, zeros before the clip."""
        before = self._kept.get(layer)
        x = F.pad(x, (0, 0, 0, 0, length, 0)) if before is None else torch.cat([before, x], dim=2)
        self.keep(layer, x, length)
        return x

    def keep(self, layer: nn.Module, x: Tensor, length: int) -> None:
        """Keep the last `length` frames of `x` for `layer`'s next chunk, if there is one."""
        newest, before = x[:, :, -length:], self._kept.pop(layer, None)
        if not self.last:
            # A copy: a view would keep the whole chunk in memory. In its place: moved, it would leave holes there.
            self._kept[layer] = newest.clone() if before is None or torch.is_grad_enabled() else before.copy_(newest)

    @contextmanager
    def frames(self, layer: nn.Module, x: Tensor, length: int) -> Iterator[list[Tensor]]:
        """The frames (B, C, H, W) of `with_history`, without copying `x`; not for the backward pass."""
        before = self._kept.get(layer)
        past = [torch.zeros_like(x[:, :, 0])] * length if before is None else list(before.unbind(2))
        frames = [*past, *x.unbind(2)]
        yield frames
        if self.last:
            self._kept.pop(layer, None)
        elif before is None:
            kept = torch.stack(frames[-length:], dim=2)
            self._kept[layer] = kept.contiguous(memory_format=torch.channels_last_3d)
        else:
            for place, frame in zip(past, frames[-length:], strict=True):
                place.copy_(frame)


class CausalConv3d(nn.Conv3d):
    """3x3x3 convolution that sees two frames back and none ahead; before the clip there are zeros."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=(0, 1, 1))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:  # type: ignore[override]
        alone = stream.first and x.shape[2] == 1
        if convolutions.fits(x):
            x = x.contiguous(memory_format=torch.channels_last_3d)
            with stream.frames(self, x, 2) as frames:
                return self._newest(x) if alone else convolutions.causal(frames, self.weight, self.bias)
        if alone:
            if not stream.last:
                stream.keep(self, F.pad(x, (0, 0, 0, 0, 1, 0)), 2)
            return self._newest(x)
        x = stream.with_history(self, x, 2)
        if x.device.type == "cpu":
            # Channels last in memory: convolutions of 8 to 24 channels take a quarter to two fifths less time.
            x = x.contiguous(memory_format=torch.channels_last_3d)
        return super().forward(x)

    def _newest(self, x: Tensor) -> Tensor:
        """A first frame alone: the kernel's other two frames are zeros, so a 2D convolution with the newest tap is
        enough, in half of the time.
        """
        frame = x[:, :, 0].contiguous(memory_format=torch.channels_last)
        return F.conv2d(frame, self.weight[:, :, 2], self.bias, padding=1).unsqueeze(2)


class ChannelNorm(nn.Module):
    """Scales each position's channels to root mean square 1, then by `gamma`; computed in float32 at least."""

    def __init__(self, channels: int, dims: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self._scaled(x).to(x.dtype)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # Written out: torch's vector norm over this axis takes a fifth of a training step on a CPU.
        scale = wide.square().sum(dim=1, keepdim=True).clamp_min(1e-24).rsqrt() * x.shape[1] ** 0.5
        return (wide * scale * self.gamma).to(x.dtype)

    def activated(self, x: Tensor, *, spent: bool = False) -> Tensor:
        """SiLU of the norm. `spent`: nobody needs `x` any more, and without gradients it may be overwritten."""
        if torch.is_grad_enabled():
            return F.silu(self(x))
        return F.silu(self._scaled(x, spent=spent), inplace=True).to(x.dtype)

    def _scaled(self, x: Tensor, *, spent: bool = False) -> Tensor:
        """The norm before its result is rounded, without gradients: one new tensor, or none if `x` is `spent`."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        scale = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=dtype)
        scale = scale.clamp_min_(1e-12).reciprocal_().mul_(x.shape[1] ** 0.5)
        y = x.mul_(scale) if spent and x.dtype == dtype else x * scale
        return y.mul_(self.gamma)


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice; added to the input (through a 1x1x1 convolution if the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = ChannelNorm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        same = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if same else nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        y = self.conv1(self.norm1.activated(x), stream)
        y = self.conv2(self.dropout(self.norm2.activated(y, spent=True)), stream)
        return y.add_(self.conv_shortcut(x))


class FrameAttention(nn.Module):
    """Single-head attention over the positions of each frame separately."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, dims=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        frames = frames_apart(x)
        q, k, v = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).view_as(frames)
        return x + frames_together(self.proj(y), x.shape[0])


def frames_apart(x_BCTHW: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B*T, C, H, W)."""
    return x_BCTHW.transpose(1, 2).flatten(0, 1)


def frames_together(x: Tensor, batch: int) -> Tensor:
    """(B*T, C, H, W) -> (B, C, T, H, W)."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


class Downsample(nn.Module):
    """Half the rows and columns; with `temporal`, also half the frames after the first."""

    def __init__(self, channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.temporal = temporal
        if temporal:
            self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = frames_together(self.resample(frames_apart(x)), x.shape[0])
        if not self.temporal:
            return x
        if not stream.first:
            return self.time_conv(stream.with_history(self, x, 1))
        # The clip's first frame skips the convolution, and is the history of the next frames.
        stream.keep(self, x, 1)
        first = x[:, :, :1]
        return torch.cat([first, self.time_conv(x)], dim=2) if x.shape[2] > 1 else first


class Upsample(nn.Module):
    """Twice the rows and columns, `out_channels`; with `temporal`, twice the frames after the first."""

    def __init__(self, channels: int, out_channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(channels, out_channels, 3, padding=1))
        self.temporal = temporal
        if temporal:
            self.time_conv = nn.Conv3d(channels, 2 * channels, (3, 1, 1))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if self.temporal:
            x = self._double_frames(x, stream)
        frames, convolution = frames_apart(x), self.resample[1]
        assert isinstance(convolution, nn.Conv2d)
        if convolutions.fits(x):
            return frames_together(convolutions.doubled(frames, convolution.weight, convolution.bias), x.shape[0])
        frames = F.interpolate(frames, scale_factor=2.0, mode="nearest-exact")
        return frames_together(convolution(frames), x.shape[0])

    def _double_frames(self, x: Tensor, stream: Stream) -> Tensor:
        """The clip's first frame stays one and skips the convolution; each other becomes two."""
        first, rest = x.tensor_split([1 if stream.first else 0], dim=2)
        if rest.shape[2] == 0:
            return first
        pairs = self.time_conv(stream.with_history(self, rest, 2))
        # (B, 2C, T, H, W): the first C channels are the even frames, the second C the odd ones.
        doubled = pairs.unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        return torch.cat([first, doubled], dim=2)


class MiddleBlock(nn.Module):
    """Residual, attention, residual at the lowest resolution."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels, dropout) for _ in range(2)])
        self.attentions = nn.ModuleList([FrameAttention(channels)])

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.resnets[0](x, stream)
        return self.resnets[1](self.attentions[0](x, stream), stream)


def residual_blocks(in_channels: int, out_channels: int, num_blocks: int, dropout: float) -> nn.ModuleList:
    """Residual blocks in sequence; the first changes the width."""
    widths = [in_channels, *[out_channels] * num_blocks]
    return nn.ModuleList([ResidualBlock(before, after, dropout) for before, after in pairwise(widths)])


class UpBlock(nn.Module):
    """A decoder level of VAE 2.1: residual blocks, then twice the size at half the width.

    temporal  the upsampling also doubles the frames; None: the last level, which has none
    """

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, temporal: bool | None, dropout: float
    ) -> None:
        super().__init__()
        self.resnets = residual_blocks(in_channels, out_channels, num_blocks, dropout)
        ups = [] if temporal is None else [Upsample(out_channels, out_channels // 2, temporal=temporal)]
        self.upsamplers = nn.ModuleList(ups)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        for block in (*self.resnets, *self.upsamplers):
            x = block(x, stream)
        return x


def unshuffle(x_BCTHW: Tensor, frames: int, side: int) -> Tensor:
    """Blocks of `frames` x `side` x `side` become channels: (B, C, fT, sH, sW) -> (B, C*f*s*s, T, H, W).

    Of a channel's new ones the frame in the block counts slowest, then the row, and the column fastest.
    """
    x = x_BCTHW.unflatten(4, (-1, side)).unflatten(3, (-1, side)).unflatten(2, (-1, frames))
    # (B, C, T, f, H, s, W, s) -> (B, C, f, s, s, T, H, W)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def shuffle(x_BCTHW: Tensor, frames: int, side: int) -> Tensor:
    """Channels become blocks of `frames` x `side` x `side`; the inverse of `unshuffle`."""
    x = x_BCTHW.unflatten(1, (-1, frames, side, side))
    # (B, C, f, s, s, T, H, W) -> (B, C, T, f, H, s, W, s)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def patchify(pixels_BCTHW: Tensor, side: int) -> Tensor:
    """Squares of `side` x `side` pixels become channels: (B, C, T, sH, sW) -> (B, C*s*s, T, H, W)."""
    # Here, unlike in the shortcuts, the column in the square counts slower than the row.
    return unshuffle(pixels_BCTHW.mT, 1, side).mT


def unpatchify(x_BCTHW: Tensor, side: int) -> Tensor:
    """Channels become squares of `side` x `side` pixels; the inverse of `patchify`."""
    return shuffle(x_BCTHW.mT, 1, side).mT


class AverageDown(nn.Module):
    """Shortcut past a downsampling of VAE 2.2, without parameters: blocks become channels, and neighbours an average.

    `frames` and `side` are the block's. ValueError if its channels cannot be averaged to `out_channels`.
    """

    def __init__(self, in_channels: int, out_channels: int, *, frames: int, side: int) -> None:
        super().__init__()
        unshuffled = in_channels * frames * side**2
        if unshuffled % out_channels:
            raise ValueError(
                f"the residual VAE's shortcut cannot average {unshuffled} channels ({in_channels} in blocks of "
                f"{frames}x{side}x{side}) to {out_channels}; choose dim_mult so that it divides"
            )
        self.out_channels, self.frames, self.side = out_channels, frames, side

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if stream.first:
            # The clip's first frame is a block by itself, its second half: before the clip there are zeros.
            x = F.pad(x, (0, 0, 0, 0, self.frames - 1, 0))
        return unshuffle(x, self.frames, self.side).unflatten(1, (self.out_channels, -1)).mean(2)


class DuplicateUp(nn.Module):
    """Shortcut past an upsampling of VAE 2.2, without parameters: channels are repeated, and the copies become blocks.

    `frames` and `side` are the block's. ValueError if repeating whole channels does not fill `out_channels` of them.
    """

    def __init__(self, in_channels: int, out_channels: int, *, frames: int, side: int) -> None:
        super().__init__()
        needed = out_channels * frames * side**2
        if needed % in_channels:
            raise ValueError(
                f"the residual VAE's shortcut cannot repeat {in_channels} channels to {needed} ({out_channels} in "
                f"blocks of {frames}x{side}x{side}); choose dim_mult so that it divides"
            )
        self.repeats, self.frames, self.side = needed // in_channels, frames, side

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = shuffle(x.repeat_interleave(self.repeats, dim=1), self.frames, self.side)
        # The clip's first frame stays one: the last of its copies.
        return x[:, :, self.frames - 1 :] if stream.first else x


class ResidualDownBlock(nn.Module):
    """An encoder level of VAE 2.2: residual blocks and a downsampling, with a shortcut past them all.

    temporal  the downsampling also halves the frames; None: the last level, which has none
    """

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, temporal: bool | None, dropout: float
    ) -> None:
        super().__init__()
        self.resnets = residual_blocks(in_channels, out_channels, num_blocks, dropout)
        self.downsampler = None if temporal is None else Downsample(out_channels, temporal=temporal)
        frames, side = 2 if temporal else 1, 1 if temporal is None else 2
        self.shortcut = AverageDown(in_channels, out_channels, frames=frames, side=side)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        y = x
        for block in self.resnets:
            y = block(y, stream)
        if self.downsampler is not None:
            y = self.downsampler(y, stream)
        return y.add_(self.shortcut(x, stream))


class ResidualUpBlock(nn.Module):
    """A decoder level of VAE 2.2: residual blocks and an upsampling that keeps the width, with a shortcut past them.

    temporal  the upsampling also doubles the frames; None: the last level, which has neither it nor the shortcut
    """

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, temporal: bool | None, dropout: float
    ) -> None:
        super().__init__()
        self.resnets = residual_blocks(in_channels, out_channels, num_blocks, dropout)
        self.upsampler = self.shortcut = None
        if temporal is not None:
            self.upsampler = Upsample(out_channels, out_channels, temporal=temporal)
            self.shortcut = DuplicateUp(in_channels, out_channels, frames=2 if temporal else 1, side=2)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        y = x
        for block in self.resnets:
            y = block(y, stream)
        if self.upsampler is None or self.shortcut is None:
            return y
        return self.upsampler(y, stream).add_(self.shortcut(x, stream))
