"""WanVAE: Wan's causal video autoencoder 2.1 (4x8x8, 16 channels), streamed or in one pass by the same code.

A clip is 1 + 4k frames: the first frame alone, then groups of four. Every convolution in time looks back only, so a
clip may be worked through in chunks if each layer keeps the last frames it saw; a `Stream` holds those. One pass over
the whole clip is one chunk. Parameter names are those of the diffusers layout (and config.json's keys the keywords).

Tensor suffixes: B batch, C channels, T frames (of pixels, latents or in between), H W rows and columns.
Sources: Wan report (arXiv 2503.20314) section 4.1; the released weights' shapes, names and constants.
"""

from __future__ import annotations

from collections.abc import Iterator
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


class Stream:
    """The frames that layers keep between the chunks of one clip, by layer."""

    def __init__(self) -> None:
        self.kept: dict[nn.Module, Tensor] = {}

    def before(self, layer: nn.Module) -> Tensor | None:
        """What `layer` kept from the chunks before; None in the first chunk it sees."""
        return self.kept.get(layer)

    def keep(self, layer: nn.Module, frames: Tensor) -> None:
        """Remember these frames for `layer`'s next chunk."""
        self.kept[layer] = frames


class CausalConv3d(nn.Conv3d):
    """3x3x3 convolution that sees two frames back and none ahead; before the clip there are zeros."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=(0, 1, 1))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:  # type: ignore[override]
        return super().forward(with_history(self, x, stream, 2))


def with_history(layer: nn.Module, x: Tensor, stream: Stream, length: int) -> Tensor:
    """`x` with the `length` frames before it in front (zeros before the clip); keeps its own last ones."""
    before = stream.before(layer)
    if before is None:
        before = x.new_zeros(x.shape[0], x.shape[1], length, *x.shape[3:])
    x = torch.cat([before, x], dim=2)
    stream.keep(layer, x[:, :, -length:])
    return x


class ChannelNorm(nn.Module):
    """Each position's channels scaled to root mean square `gamma`; in float32."""

    def __init__(self, channels: int, dims: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        # Spelled out because the library's vector norm over this axis takes a fifth of a training step on a CPU.
        scale = wide.square().sum(dim=1, keepdim=True).clamp_min(1e-24).rsqrt() * x.shape[1] ** 0.5
        return (wide * scale * self.gamma.float()).to(x.dtype)


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice; added to the input (through a 1x1x1 convolution if the width changes)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = ChannelNorm(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)), stream)
        y = self.conv2(F.silu(self.norm2(y)), stream)
        return y + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


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
        if temporal:
            self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = frames_together(self.resample(frames_apart(x)), x.shape[0])
        if not hasattr(self, "time_conv"):
            return x
        before = stream.before(self)
        stream.keep(self, x[:, :, -1:])
        if before is not None:
            return self.time_conv(torch.cat([before, x], dim=2))
        # The clip's first frame passes by the convolution, and is the history of what follows.
        first = x[:, :, :1]
        return torch.cat([first, self.time_conv(x)], dim=2) if x.shape[2] > 1 else first


class Upsample(nn.Module):
    """Twice the rows and columns, half the channels; with `temporal`, twice the frames after the first."""

    def __init__(self, channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(channels, channels // 2, 3, padding=1))
        if temporal:
            self.time_conv = nn.Conv3d(channels, 2 * channels, (3, 1, 1))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if hasattr(self, "time_conv"):
            x = self._double_frames(x, stream)
        frames = frames_apart(x)
        frames = F.interpolate(frames.float(), scale_factor=2.0, mode="nearest-exact").to(x.dtype)
        return frames_together(self.resample(frames), x.shape[0])

    def _double_frames(self, x: Tensor, stream: Stream) -> Tensor:
        """The clip's first frame stays one and is never seen by the convolution; each other becomes two."""
        if stream.before(self) is None:
            stream.keep(self, x[:, :, :1])
            first, rest = x[:, :, :1], x[:, :, 1:]
        else:
            first, rest = x[:, :, :0], x
        if rest.shape[2] == 0:
            return first
        pairs = self.time_conv(with_history(self.time_conv, rest, stream, 2))
        # (B, 2C, T, H, W): the first C channels are the even frames, the second C the odd ones.
        doubled = pairs.unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        return torch.cat([first, doubled], dim=2)


class MiddleBlock(nn.Module):
    """Residual, attention, residual at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels) for _ in range(2)])
        self.attentions = nn.ModuleList([FrameAttention(channels)])

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.resnets[0](x, stream)
        return self.resnets[1](self.attentions[0](x, stream), stream)


class Encoder(nn.Module):
    """Pixels to 2z channels at 1/8 of the size and 1/4 of the frames."""

    def __init__(self, widths: list[int], z_dim: int, num_res_blocks: int, temporal: tuple[bool, ...]) -> None:
        super().__init__()
        self.conv_in = CausalConv3d(3, widths[0])
        self.down_blocks = nn.ModuleList()
        for level, (before, width) in enumerate(zip([widths[0], *widths[:-1]], widths, strict=True)):
            for i in range(num_res_blocks):
                self.down_blocks.append(ResidualBlock(before if i == 0 else width, width))
            if level < len(widths) - 1:
                self.down_blocks.append(Downsample(width, temporal=temporal[level]))
        self.mid_block = MiddleBlock(widths[-1])
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * z_dim)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.conv_in(x, stream)
        for block in self.down_blocks:
            x = block(x, stream)
        x = self.mid_block(x, stream)
        return self.conv_out(F.silu(self.norm_out(x)), stream)


class UpBlock(nn.Module):
    """The residual blocks of one decoder level, and the upsampling to the next."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, up: str) -> None:
        super().__init__()
        widths = [in_channels, *[out_channels] * num_blocks]
        self.resnets = nn.ModuleList([ResidualBlock(before, after) for before, after in pairwise(widths)])
        if up:
            self.upsamplers = nn.ModuleList([Upsample(out_channels, temporal=up == "3d")])

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        for block in self.resnets:
            x = block(x, stream)
        return self.upsamplers[0](x, stream) if hasattr(self, "upsamplers") else x


class Decoder(nn.Module):
    """z channels back to pixels."""

    def __init__(self, widths: list[int], z_dim: int, num_res_blocks: int, temporal: tuple[bool, ...]) -> None:
        super().__init__()
        widths = widths[::-1]
        self.conv_in = CausalConv3d(z_dim, widths[0])
        self.mid_block = MiddleBlock(widths[0])
        self.up_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            # An upsampling halves the channels, so every level but the first starts from half the one before.
            before = widths[0] if level == 0 else widths[level - 1] // 2
            up = "" if level == len(widths) - 1 else ("3d" if temporal[level] else "2d")
            self.up_blocks.append(UpBlock(before, width, num_res_blocks + 1, up))
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 3)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.mid_block(self.conv_in(x, stream), stream)
        for block in self.up_blocks:
            x = block(x, stream)
        return self.conv_out(F.silu(self.norm_out(x)), stream)


class WanVAE(nn.Module):
    """Videos to latents and back; keywords are config.json's.

    base_dim            channels at full resolution; dim_mult multiplies it per level
    z_dim               latent channels
    temperal_downsample which of the encoder's downsamplings also halve the frames (the field's spelling)
    latents_mean, latents_std  per channel; the latents that leave `encode` are normalised by them
    """

    def __init__(
        self,
        *,
        base_dim: int = 96,
        z_dim: int = 16,
        dim_mult: tuple[int, ...] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        temperal_downsample: tuple[bool, ...] = (False, True, True),
        latents_mean: tuple[float, ...] = LATENTS_MEAN,
        latents_std: tuple[float, ...] = LATENTS_STD,
    ) -> None:
        super().__init__()
        if len(temperal_downsample) != len(dim_mult) - 1:
            raise ValueError(f"temperal_downsample needs {len(dim_mult) - 1} entries, one between two levels")
        if not len(latents_mean) == len(latents_std) == z_dim:
            raise ValueError(f"latents_mean and latents_std need z_dim={z_dim} entries each")
        self.base_dim, self.z_dim, self.dim_mult = base_dim, z_dim, tuple(dim_mult)
        self.num_res_blocks, self.temperal_downsample = num_res_blocks, tuple(temperal_downsample)
        self.latents_mean, self.latents_std = tuple(latents_mean), tuple(latents_std)
        self.temporal_stride = 2 ** sum(self.temperal_downsample)
        self.spatial_stride = 2 ** (len(dim_mult) - 1)
        widths = [base_dim * factor for factor in dim_mult]
        self.encoder = Encoder(widths, z_dim, num_res_blocks, self.temperal_downsample)
        self.quant_conv = nn.Conv3d(2 * z_dim, 2 * z_dim, 1)
        self.post_quant_conv = nn.Conv3d(z_dim, z_dim, 1)
        self.decoder = Decoder(widths, z_dim, num_res_blocks, self.temperal_downsample[::-1])
        self.initialize()

    def initialize(self) -> None:
        """Start values for training from scratch: variance kept, and residual blocks that begin as the identity.

        A tiny VAE is at 18 dB after 60 steps with them, at 14 dB with PyTorch's own (docs/log.md).
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                nn.init.zeros_(module.conv2.weight)

    def encode(self, pixels_BCTHW: Tensor, *, chunk: int | None = 1) -> Tensor:
        """Pixels in [-1, 1] (B, 3, 1+4k, H, W) -> normalised latents (B, z, 1+k, H/8, W/8): the posterior's mean.

        `chunk` is how many latent frames are worked on at once (memory); None takes the whole clip. The result is
        the same. ValueError for a length or size that does not divide, naming the nearest that does.
        """
        mean, _ = self.moments(pixels_BCTHW, chunk=chunk)
        return (mean - self._per_channel(self.latents_mean, mean)) / self._per_channel(self.latents_std, mean)

    def decode(self, latents_BCTHW: Tensor, *, chunk: int | None = 1) -> Tensor:
        """Normalised latents -> pixels, clamped to [-1, 1]; `chunk` as in `encode`."""
        std = self._per_channel(self.latents_std, latents_BCTHW)
        mean = self._per_channel(self.latents_mean, latents_BCTHW)
        return self.reconstruct(latents_BCTHW * std + mean, chunk=chunk).clamp(-1, 1)

    def moments(self, pixels_BCTHW: Tensor, *, chunk: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the posterior, not normalised."""
        geometry.check_num_frames(pixels_BCTHW.shape[2], self.temporal_stride)
        geometry.check_size(pixels_BCTHW.shape[3], pixels_BCTHW.shape[4], self.spatial_stride, key="pixels")
        stride = self.temporal_stride
        length = None if chunk is None else chunk * stride
        stream = Stream()
        x = pixels_BCTHW.to(self.quant_conv.weight.dtype)
        parts = [self.encoder(part, stream) for part in chunks(x, length)]
        mean, logvar = self.quant_conv(torch.cat(parts, dim=2)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def reconstruct(self, latents_BCTHW: Tensor, *, chunk: int | None = None) -> Tensor:
        """Latents as the posterior has them (not normalised) -> pixels, not clamped, with gradients."""
        stream = Stream()
        x = self.post_quant_conv(latents_BCTHW.to(self.post_quant_conv.weight.dtype))
        return torch.cat([self.decoder(part, stream) for part in chunks(x, chunk)], dim=2)

    def _per_channel(self, values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1, 1)

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
            "dropout": 0.0,
            "latents_mean": list(self.latents_mean),
            "latents_std": list(self.latents_std),
            "is_residual": False,
            "in_channels": 3,
            "out_channels": 3,
            "patch_size": None,
            "scale_factor_temporal": self.temporal_stride,
            "scale_factor_spatial": self.spatial_stride,
        }


def chunks(x_BCTHW: Tensor, length: int | None) -> Iterator[Tensor]:
    """The first frame, then `length` frames at a time; everything at once for None."""
    if length is None:
        yield x_BCTHW
        return
    yield x_BCTHW[:, :, :1]
    for start in range(1, x_BCTHW.shape[2], length):
        yield x_BCTHW[:, :, start : start + length]


_SIZES = (
    "base_dim",
    "z_dim",
    "dim_mult",
    "num_res_blocks",
    "temperal_downsample",
    "latents_mean",
    "latents_std",
)


def load_vae(path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> WanVAE:
    """A Wan-VAE 2.1 from a pipeline folder in the diffusers layout, or from its vae/ sub-folder; frozen.

    ValueError names what is absent or does not fit, and refuses other VAEs.
    """
    folder = part_folder(path, "vae")
    config = read_config(folder)
    if config.get("_class_name", "AutoencoderKLWan") != "AutoencoderKLWan":
        raise ValueError(f"{folder} holds a {config['_class_name']}, not a Wan-VAE")
    if config.get("is_residual") or config.get("patch_size"):
        raise ValueError(f"{folder} holds Wan-VAE 2.2 (of TI2V-5B), which is not built yet; use a 4x8x8 Wan-VAE 2.1")
    if config.get("attn_scales"):
        raise ValueError(f"{folder}/config.json: attn_scales={config['attn_scales']} is not supported; Wan has none")
    with torch.device("meta"):
        vae = WanVAE(**{key: config[key] for key in _SIZES if key in config})
    load_strict(vae, read_tensors(folder), folder, device=device, dtype=dtype)
    return vae.eval().requires_grad_(False)
