"""WanVAE: Wan's causal video autoencoder 2.1 (4x8x8, 16 channels), streamed or in one pass by the same code.

A clip is 1 + 4k frames: the first frame alone, then groups of four. Every convolution in time looks back only, so a
clip may be worked through in chunks if each layer keeps the last frames it saw; a `Stream` holds those. One pass over
the whole clip is one chunk. Parameter names are those of the diffusers layout (and config.json's keys the keywords).

Tensor suffixes: B batch, C channels, T frames (of pixels, latents or in between), H W rows and columns.
Sources: Wan report (arXiv 2503.20314) section 4.1; the released weights' shapes, names and constants.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wantrain import geometry
from wantrain.models.weights import load_strict, part_folder, read_config, read_tensors

# Per-channel mean and standard deviation of Wan-VAE 2.1's latents, which normalise what the transformer sees.
LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


#: Log variance that a posterior starts with: noise of a twentieth, so that what is encoded arrives.
NARROW = -6.0


class Stream:
    """One clip's way through the layers, chunk after chunk: where in the clip we are, and what layers keep of it.

    first, last  the chunk that is being worked on begins, ends the clip
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

    def with_history(self, layer: nn.Module, x: Tensor, length: int) -> Tensor:
        """`x` after the `length` frames that `layer` saw before it, zeros before the clip."""
        before = self._kept.pop(layer, None)
        x = F.pad(x, (0, 0, 0, 0, length, 0)) if before is None else torch.cat([before, x], dim=2)
        self.keep(layer, x, length)
        return x

    def keep(self, layer: nn.Module, x: Tensor, length: int) -> None:
        """Keep the last `length` frames of `x` for `layer`'s next chunk, if there is one."""
        if not self.last:
            # A copy: a view would keep the whole chunk in memory.
            self._kept[layer] = x[:, :, -length:].clone()


class CausalConv3d(nn.Conv3d):
    """3x3x3 convolution that sees two frames back and none ahead; before the clip there are zeros."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=(0, 1, 1))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:  # type: ignore[override]
        if stream.first and x.shape[2] == 1:
            # A first frame by itself: two of its three frames are the zeros before the clip, so the newest tap does
            # it all, in half of the time.
            if not stream.last:
                stream.keep(self, F.pad(x, (0, 0, 0, 0, 1, 0)), 2)
            frame = x[:, :, 0].contiguous(memory_format=torch.channels_last)
            return F.conv2d(frame, self.weight[:, :, 2], self.bias, padding=1).unsqueeze(2)
        x = stream.with_history(self, x, 2)
        if x.device.type == "cpu":
            # With the channels last in memory, convolutions of 8 to 24 channels take a quarter to two fifths less time.
            x = x.contiguous(memory_format=torch.channels_last_3d)
        return super().forward(x)


class ChannelNorm(nn.Module):
    """Each position's channels scaled to root mean square `gamma`; computed in float32 at least."""

    def __init__(self, channels: int, dims: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # Spelled out because the library's vector norm over this axis takes a fifth of a training step on a CPU.
        scale = wide.square().sum(dim=1, keepdim=True).clamp_min(1e-24).rsqrt() * x.shape[1] ** 0.5
        return (wide * scale * self.gamma).to(x.dtype)


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
        y = self.conv1(F.silu(self.norm1(x)), stream)
        y = self.conv2(self.dropout(F.silu(self.norm2(y))), stream)
        return y + self.conv_shortcut(x)


class FrameAttention(nn.Module):
    """Single-head attention over the positions of each frame by itself."""

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
        # The clip's first frame passes by the convolution, and is the history of what follows.
        stream.keep(self, x, 1)
        first = x[:, :, :1]
        return torch.cat([first, self.time_conv(x)], dim=2) if x.shape[2] > 1 else first


class Upsample(nn.Module):
    """Twice the rows and columns, half the channels; with `temporal`, twice the frames after the first."""

    def __init__(self, channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(channels, channels // 2, 3, padding=1))
        self.temporal = temporal
        if temporal:
            self.time_conv = nn.Conv3d(channels, 2 * channels, (3, 1, 1))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if self.temporal:
            x = self._double_frames(x, stream)
        frames = F.interpolate(frames_apart(x), scale_factor=2.0, mode="nearest-exact")
        return frames_together(self.resample(frames), x.shape[0])

    def _double_frames(self, x: Tensor, stream: Stream) -> Tensor:
        """The clip's first frame stays one and is never seen by the convolution; each other becomes two."""
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


class Encoder(nn.Module):
    """Pixels to 2z channels at 1/8 of the size and 1/4 of the frames."""

    def __init__(
        self,
        widths: list[int],
        z_dim: int,
        num_res_blocks: int,
        temporal: tuple[bool, ...],
        dropout: float,
    ) -> None:
        super().__init__()
        self.conv_in = CausalConv3d(3, widths[0])
        self.down_blocks = nn.ModuleList()
        for level, (before, width) in enumerate(zip([widths[0], *widths[:-1]], widths, strict=True)):
            for i in range(num_res_blocks):
                self.down_blocks.append(ResidualBlock(before if i == 0 else width, width, dropout))
            if level < len(widths) - 1:
                self.down_blocks.append(Downsample(width, temporal=temporal[level]))
        self.mid_block = MiddleBlock(widths[-1], dropout)
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * z_dim)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.conv_in(x, stream)
        for block in self.down_blocks:
            x = block(x, stream)
        x = self.mid_block(x, stream)
        return self.conv_out(F.silu(self.norm_out(x)), stream)


class UpBlock(nn.Module):
    """The residual blocks of one decoder level and the upsampling to the next: also in time, only in space, or none."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        temporal: bool | None,
        dropout: float,
    ) -> None:
        super().__init__()
        widths = [in_channels, *[out_channels] * num_blocks]
        self.resnets = nn.ModuleList([ResidualBlock(before, after, dropout) for before, after in pairwise(widths)])
        ups = [] if temporal is None else [Upsample(out_channels, temporal=temporal)]
        self.upsamplers = nn.ModuleList(ups)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        for block in (*self.resnets, *self.upsamplers):
            x = block(x, stream)
        return x


class Decoder(nn.Module):
    """z channels back to pixels."""

    def __init__(
        self,
        widths: list[int],
        z_dim: int,
        num_res_blocks: int,
        temporal: tuple[bool, ...],
        dropout: float,
    ) -> None:
        super().__init__()
        widths = widths[::-1]
        self.conv_in = CausalConv3d(z_dim, widths[0])
        self.mid_block = MiddleBlock(widths[0], dropout)
        self.up_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            # An upsampling halves the channels, so every level but the first starts from half the one before.
            before = widths[0] if level == 0 else widths[level - 1] // 2
            up = temporal[level] if level < len(temporal) else None
            self.up_blocks.append(UpBlock(before, width, num_res_blocks + 1, up, dropout))
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 3)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.mid_block(self.conv_in(x, stream), stream)
        for block in self.up_blocks:
            x = block(x, stream)
        return self.conv_out(F.silu(self.norm_out(x)), stream)


class WanVAE(nn.Module):
    """Videos to latents and back; keywords are config.json's. Not frozen: `load_vae` gives a frozen one.

    base_dim            channels at full resolution; dim_mult multiplies it per level
    z_dim               latent channels
    num_res_blocks      residual blocks per encoder level; a decoder level has one more
    attn_scales         must be empty: attention is in the middle only
    temperal_downsample which of the encoder's downsamplings also halve the frames (the field's spelling)
    dropout             in the residual blocks, in training
    latents_mean, latents_std  per channel; the latents that leave `encode` are normalised by them

    `encode` and `decode` are for using a VAE; `moments` and `reconstruct` are the same networks without
    normalisation and clamping, for training one, and take the whole clip at once unless told otherwise.
    """

    def __init__(
        self,
        *,
        base_dim: int = 96,
        z_dim: int = 16,
        dim_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        attn_scales: Sequence[float] = (),
        temperal_downsample: Sequence[bool] = (False, True, True),
        dropout: float = 0.0,
        latents_mean: Sequence[float] = LATENTS_MEAN,
        latents_std: Sequence[float] = LATENTS_STD,
    ) -> None:
        super().__init__()
        if len(attn_scales):
            raise ValueError(
                f"attn_scales={list(attn_scales)}: Wan's VAE has attention in its middle only; leave it empty"
            )
        if len(temperal_downsample) != len(dim_mult) - 1:
            raise ValueError(f"temperal_downsample needs {len(dim_mult) - 1} entries, one between two levels")
        if not len(latents_mean) == len(latents_std) == z_dim:
            raise ValueError(f"latents_mean and latents_std need z_dim={z_dim} entries each")
        self.base_dim, self.z_dim, self.dim_mult = base_dim, z_dim, tuple(dim_mult)
        self.num_res_blocks, self.dropout = num_res_blocks, dropout
        self.temperal_downsample = tuple(temperal_downsample)
        self.latents_mean, self.latents_std = tuple(latents_mean), tuple(latents_std)
        widths = [base_dim * factor for factor in dim_mult]
        down, up = self.temperal_downsample, self.temperal_downsample[::-1]
        self.encoder = Encoder(widths, z_dim, num_res_blocks, down, dropout)
        self.quant_conv = nn.Conv3d(2 * z_dim, 2 * z_dim, 1)
        self.post_quant_conv = nn.Conv3d(z_dim, z_dim, 1)
        self.decoder = Decoder(widths, z_dim, num_res_blocks, up, dropout)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Start values for training from scratch: an autoencoder of single frames that video training refines.

        Convolutions keep the variance and see only the newest frame, residual blocks begin as the identity,
        frames are dropped and doubled, and the posterior is narrow (docs/log.md says what that is worth).
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.zeros_(module.weight)
                newest = module.weight[:, :, -1] if isinstance(module, nn.Conv3d) else module.weight
                nn.init.kaiming_normal_(newest, nonlinearity="linear")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                nn.init.zeros_(module.conv2.weight)
            elif isinstance(module, Downsample | Upsample) and module.temporal:
                taps = module.time_conv.weight[:, :, -1, 0, 0]
                taps.copy_(torch.eye(taps.shape[1]).repeat(taps.shape[0] // taps.shape[1], 1))
        nn.init.zeros_(self.quant_conv.weight[self.z_dim :])
        assert self.quant_conv.bias is not None
        nn.init.constant_(self.quant_conv.bias[self.z_dim :], NARROW)

    @property
    def temporal_stride(self) -> int:
        """Pixel frames per latent frame, after the first."""
        return 2 ** sum(self.temperal_downsample)

    @property
    def spatial_stride(self) -> int:
        """Pixel rows (and columns) per latent row."""
        return 2 ** (len(self.dim_mult) - 1)

    def encode(self, pixels_BCTHW: Tensor, *, chunk: int | None = 1) -> Tensor:
        """Pixels in [-1, 1] (B, 3, 1+4k, H, W) -> normalised latents (B, z, 1+k, H/8, W/8): the posterior's mean.

        The result is float32 (float64 from float64), whatever the network's dtype. `chunk` is how many latent frames
        are worked on at once after the first: memory grows with it, the result stays. None takes the whole clip.
        ValueError for a length or size that does not divide, naming the nearest that does.
        """
        mu, _ = self.moments(pixels_BCTHW, chunk=chunk)
        mean, std = self._statistics(mu)
        return (mu - mean) / std

    def decode(self, latents_BCTHW: Tensor, *, chunk: int | None = 1) -> Tensor:
        """Normalised latents -> pixels in the network's dtype, clamped to [-1, 1]; `chunk` as in `encode`."""
        mean, std = self._statistics(latents_BCTHW)
        return self.reconstruct(latents_BCTHW * std + mean, chunk=chunk).clamp(-1, 1)

    def moments(self, pixels_BCTHW: Tensor, *, chunk: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log variance (clamped to [-30, 20]) of the posterior over latents, not normalised.

        Shapes, `chunk` and errors as in `encode`; with gradients.
        """
        geometry.check_num_frames(pixels_BCTHW.shape[2], self.temporal_stride)
        geometry.check_size(pixels_BCTHW.shape[3], pixels_BCTHW.shape[4], self.spatial_stride, key="pixels")
        _check_chunk(chunk)
        stream = Stream()
        x = pixels_BCTHW.to(self.quant_conv.weight.dtype)
        length = None if chunk is None else chunk * self.temporal_stride
        x = torch.cat([self.encoder(part, stream) for part in stream.chunks(x, length)], dim=2)
        mu, logvar = self.quant_conv(x).chunk(2, dim=1)
        return mu, logvar.clamp(-30, 20)

    def reconstruct(self, latents_BCTHW: Tensor, *, chunk: int | None = None) -> Tensor:
        """Latents as the posterior has them, not normalised -> pixels, not clamped; with gradients."""
        _check_chunk(chunk)
        stream = Stream()
        x = self.post_quant_conv(latents_BCTHW.to(self.post_quant_conv.weight.dtype))
        return torch.cat([self.decoder(part, stream) for part in stream.chunks(x, chunk)], dim=2)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """latents_mean and latents_std as (C, 1, 1, 1), in float32 at least: bfloat16 would round them."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        both = torch.tensor([self.latents_mean, self.latents_std], dtype=dtype, device=like.device)
        mean, std = both[..., None, None, None]
        return mean, std

    def encoding_state(self) -> dict[str, Tensor]:
        """All that latents depend on: the encoder's weights and the normalisation, not the decoder."""
        weights = {k: v for k, v in self.state_dict().items() if k.startswith(("encoder.", "quant_conv."))}
        mean, std = torch.tensor([self.latents_mean, self.latents_std], dtype=torch.float64)
        return {**weights, "latents_mean": mean, "latents_std": std}

    def config(self) -> dict[str, Any]:
        """What config.json holds in the diffusers layout."""
        return {
            "_class_name": "AutoencoderKLWan",
            "base_dim": self.base_dim,
            "z_dim": self.z_dim,
            "dim_mult": list(self.dim_mult),
            "num_res_blocks": self.num_res_blocks,
            "attn_scales": [],
            "temperal_downsample": list(self.temperal_downsample),
            "dropout": self.dropout,
            "latents_mean": list(self.latents_mean),
            "latents_std": list(self.latents_std),
            "is_residual": False,
            "in_channels": 3,
            "out_channels": 3,
            "patch_size": None,
            "scale_factor_temporal": self.temporal_stride,
            "scale_factor_spatial": self.spatial_stride,
        }


def _check_chunk(chunk: int | None) -> None:
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 latent frame, or None for the whole clip")


def load_vae(path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> WanVAE:
    """A Wan-VAE 2.1 from a pipeline folder in the diffusers layout, or from its vae/ sub-folder; frozen.

    ValueError names what is absent or does not fit, and refuses other VAEs.
    """
    folder = part_folder(path, "vae")
    config = read_config(folder)
    _check_config(config, folder)
    keywords = inspect.signature(WanVAE).parameters
    with torch.device("meta"):
        vae = WanVAE(**{key: value for key, value in config.items() if key in keywords})
    load_strict(vae, read_tensors(folder), folder, device=device, dtype=dtype)
    return vae.eval().requires_grad_(False)


def _check_config(config: dict[str, Any], folder: Path) -> None:
    """Raise ValueError for another VAE than Wan's 2.1, whose weights might even fit but mean something else."""
    name = config.get("_class_name", "AutoencoderKLWan")
    if name != "AutoencoderKLWan":
        raise ValueError(f"{folder} holds a {name}, not a Wan-VAE")
    if config.get("is_residual") or config.get("patch_size") or config.get("decoder_base_dim"):
        raise ValueError(f"{folder} holds Wan-VAE 2.2 (of TI2V-5B), which comes later; use a 4x8x8 Wan-VAE 2.1")
    for key in ("in_channels", "out_channels"):
        if config.get(key, 3) != 3:
            raise ValueError(f"{folder}/config.json: {key}={config[key]}, but Wan-VAE 2.1 reads and writes RGB (3)")


@torch.inference_mode()
def measure_latents(vae: WanVAE, clips: Iterable[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and standard deviation of the latents of `clips` (pixels, (B, 3, T, H, W)), not normalised.

    They become a new VAE's latents_mean and latents_std. ValueError if there are no clips.
    """
    count, total, squares = 0, torch.zeros(vae.z_dim, dtype=torch.float64), torch.zeros(vae.z_dim, dtype=torch.float64)
    for pixels in clips:
        mean, _ = vae.moments(pixels)
        latents_CN = mean.double().transpose(0, 1).flatten(1)
        count += latents_CN.shape[1]
        total += latents_CN.sum(1)
        squares += latents_CN.square().sum(1)
    if count == 0:
        raise ValueError("there are no clips to measure the latents of")
    average = total / count
    spread = (squares / count - average.square()).sqrt()
    return tuple(average.tolist()), tuple(spread.tolist())
