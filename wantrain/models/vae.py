"""WanVAE: Wan's causal video autoencoders 2.1 (4x8x8, 16 channels) and 2.2 (4x16x16, 48 channels, of TI2V-5B).

A clip is 1 + 4k frames: the first frame alone, then groups of four. Every convolution in time looks back only, so a
clip can be processed in chunks if each layer keeps the last frames of the chunk before (vae_layers.py). 2.2 works on
squares of 2x2 pixels, and its levels have shortcuts past their resampling. Parameter names are those of the diffusers
layout.

Tensor suffixes: B batch, C channels, T frames (of pixels, latents or in between), H W rows and columns.
Sources: Wan report (arXiv 2503.20314) section 4.1; the released weights' shapes, names and constants.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from wantrain import geometry
from wantrain.models.vae_layers import Downsample, ResidualBlock, Stream, Upsample, patchify, unpatchify
from wantrain.models.vae_networks import Decoder, Encoder, Levels

#: Published mean and standard deviation of each latent channel, by z_dim (16: Wan-VAE 2.1, 48: 2.2). The transformer's
#: latents are normalised by them.
LATENTS: dict[int, tuple[tuple[float, ...], tuple[float, ...]]] = {
    16: (
        (
            -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
        ),
        (
            2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
            3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
        ),
    ),
    48: (
        (
            -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
            -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
            -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
            -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
            -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
            0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
        ),
        (
            0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
            0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
            0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
            0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
            0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
            0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
        ),
    ),
}  # fmt: skip

#: What a VAE consists of, and the modules of each.
Half = Literal["encoder", "decoder"]
HALVES: dict[Half, tuple[str, str]] = {"encoder": ("encoder", "quant_conv"), "decoder": ("post_quant_conv", "decoder")}

#: Log variance that a posterior starts with: noise of a twentieth, so that the decoder gets a usable signal.
NARROW = -6.0


@dataclass(eq=False, repr=False, kw_only=True)
class WanVAE(nn.Module):
    """Videos to latents and back. Keywords are config.json's. Not frozen (`load_vae` freezes it).

    base_dim            channels of the encoder at full resolution; dim_mult multiplies it per level
    decoder_base_dim    the same of the decoder; None: base_dim
    z_dim               latent channels
    num_res_blocks      residual blocks per encoder level; a decoder level has one more
    attn_scales         must be empty: attention is in the middle only
    temperal_downsample which of the encoder's downsamplings also halve the frames (the field's spelling)
    dropout             in the residual blocks, in training
    latents_mean, latents_std  per channel: `encode` normalises latents by them; empty: the published ones of Wan-VAE
                        2.1 (z_dim 16) or 2.2 (z_dim 48)
    is_residual         2.2: parameter-free shortcuts past each level's resampling
    patch_size          2.2: the network sees squares of so many pixels a side as one; None: single pixels

    The defaults are Wan-VAE 2.1; 2.2 is base_dim=160, decoder_base_dim=256, z_dim=48, is_residual=True, patch_size=2.
    ValueError for keywords that fit neither or not each other.

    `encode` and `decode` are for using a VAE. `moments` and `reconstruct` are the same networks without normalisation
    and clamping, for training one; by default they take the whole clip at once.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: Sequence[int] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: Sequence[float] = ()
    temperal_downsample: Sequence[bool] = (False, True, True)
    dropout: float = 0.0
    latents_mean: Sequence[float] = ()
    latents_std: Sequence[float] = ()
    is_residual: bool = False
    patch_size: int | None = None

    # No repeated blocks: a level keeps frames for the next chunk, so it cannot be recomputed by itself.
    zero_at_start: ClassVar[tuple[str, ...]] = ("bias", "conv2.weight")

    def __post_init__(self) -> None:
        super().__init__()
        if len(self.attn_scales):
            raise ValueError(
                f"attn_scales={list(self.attn_scales)}: Wan's VAE has attention in its middle only; leave it empty"
            )
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(f"temperal_downsample needs {len(self.dim_mult) - 1} entries, one between two levels")
        self.dim_mult, self.temperal_downsample = tuple(self.dim_mult), tuple(self.temperal_downsample)
        self.latents_mean, self.latents_std = _latents(self.z_dim, self.latents_mean, self.latents_std)
        self._side = self.patch_size or 1
        self.encoder = Encoder(self._levels(self.base_dim), self.z_dim)
        self.quant_conv = nn.Conv3d(2 * self.z_dim, 2 * self.z_dim, 1)
        self.post_quant_conv = nn.Conv3d(self.z_dim, self.z_dim, 1)
        self.decoder = Decoder(self._levels(self.decoder_base_dim or self.base_dim), self.z_dim)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Start values for training from scratch: an autoencoder of single frames that video training refines.

        Convolutions keep the variance and see only the newest frame, residual blocks start as the identity, frames are
        dropped and doubled, and the posterior is narrow (docs/log.md has the measurement). The shortcuts of 2.2 add
        variance, which the norms of the next layers remove.
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

    def keep_only(self, half: Half) -> None:
        """Drop the other half's modules and weights: a VAE that only encodes, or only decodes, from now on."""
        for other in HALVES.keys() - {half}:
            for name in HALVES[other]:
                delattr(self, name)

    def _levels(self, base: int) -> Levels:
        """The levels of an encoder or decoder that has `base` channels at full resolution."""
        return Levels(
            channels=self.pixel_channels,
            widths=tuple(base * factor for factor in self.dim_mult),
            base=base,
            num_res_blocks=self.num_res_blocks,
            temporal=tuple(self.temperal_downsample),
            dropout=self.dropout,
            residual=self.is_residual,
        )

    @property
    def temporal_stride(self) -> int:
        """Pixel frames per latent frame, after the first."""
        return 2 ** sum(self.temperal_downsample)

    @property
    def spatial_stride(self) -> int:
        """Pixel rows (and columns) per latent row."""
        return 2 ** (len(self.dim_mult) - 1) * self._side

    @property
    def pixel_channels(self) -> int:
        """Channels of the network's input: red, green and blue of each pixel in a patch."""
        return 3 * self._side**2

    def encode(self, pixels_BCTHW: Tensor, *, chunk: int | None = 1) -> Tensor:
        """Pixels in [-1, 1] (B, 3, 1+4k, H, W) -> normalised latents (B, z, 1+k, H/s, W/s): the posterior's mean.

        s is `spatial_stride`: 8 in Wan-VAE 2.1, 16 in 2.2. The result is float32 (float64 from float64), whatever the
        network's dtype. `chunk` is the number of latent frames processed at once, after the first; it changes memory,
        not the result. None takes the whole clip. ValueError for a length or size that does not divide, naming
        the nearest that does.
        """
        mu, _ = self.moments(pixels_BCTHW, chunk=chunk)
        mean, std = self._statistics(mu)
        return (mu - mean) / std

    def decode(self, latents_BCTHW: Tensor, *, chunk: int | None = 1) -> Tensor:
        """Normalised latents -> pixels in the network's dtype, clamped to [-1, 1]; `chunk` as in `encode`."""
        mean, std = self._statistics(latents_BCTHW)
        return self.reconstruct(latents_BCTHW * std + mean, chunk=chunk).clamp_(-1, 1)

    def moments(self, pixels_BCTHW: Tensor, *, chunk: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log variance (clamped to [-30, 20]) of the posterior over latents, not normalised.

        Shapes, `chunk` and errors as in `encode`; with gradients.
        """
        geometry.check_num_frames(pixels_BCTHW.shape[2], self.temporal_stride)
        geometry.check_size(pixels_BCTHW.shape[3], pixels_BCTHW.shape[4], self.spatial_stride, key="pixels")
        _check_chunk(chunk)
        stream = Stream()
        dtype, length = self.quant_conv.weight.dtype, None if chunk is None else chunk * self.temporal_stride
        parts = stream.chunks(pixels_BCTHW, length)
        x = torch.cat([self.encoder(patchify(part.to(dtype), self._side), stream) for part in parts], dim=2)
        mu, logvar = self.quant_conv(x).chunk(2, dim=1)
        return mu, logvar.clamp(-30, 20)

    def reconstruct(self, latents_BCTHW: Tensor, *, chunk: int | None = None) -> Tensor:
        """Latents that are not normalised -> pixels, not clamped; with gradients."""
        _check_chunk(chunk)
        stream = Stream()
        x = self.post_quant_conv(latents_BCTHW.to(self.post_quant_conv.weight.dtype))
        parts = (unpatchify(self.decoder(part, stream), self._side) for part in stream.chunks(x, chunk))
        if torch.is_grad_enabled():
            return torch.cat(list(parts), dim=2)
        # Each chunk goes to its place at once: a list of them would hold the whole video twice.
        at, pixels = 0, None
        for part in parts:
            if pixels is None:
                frames = (x.shape[2] - 1) * self.temporal_stride + 1
                pixels = part.new_empty((*part.shape[:2], frames, *part.shape[3:]))
            pixels[:, :, at : at + part.shape[2]] = part
            at += part.shape[2]
        assert pixels is not None
        return pixels

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """latents_mean and latents_std as (C, 1, 1, 1), in float32 at least: bfloat16 would round them."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        both = torch.tensor([self.latents_mean, self.latents_std], dtype=dtype, device=like.device)
        mean, std = both[..., None, None, None]
        return mean, std

    def encoding_state(self) -> dict[str, Tensor]:
        """What latents depend on: the encoder's weights and the normalisation, not the decoder."""
        weights = {k: v for k, v in self.state_dict().items() if k.startswith(("encoder.", "quant_conv."))}
        mean, std = torch.tensor([self.latents_mean, self.latents_std], dtype=torch.float64)
        return {**weights, "latents_mean": mean, "latents_std": std}

    def config(self) -> dict[str, Any]:
        """What config.json holds in the diffusers layout."""
        return {
            "_class_name": "AutoencoderKLWan",
            "base_dim": self.base_dim,
            "decoder_base_dim": self.decoder_base_dim,
            "z_dim": self.z_dim,
            "dim_mult": list(self.dim_mult),
            "num_res_blocks": self.num_res_blocks,
            "attn_scales": [],
            "temperal_downsample": list(self.temperal_downsample),
            "dropout": self.dropout,
            "latents_mean": list(self.latents_mean),
            "latents_std": list(self.latents_std),
            "is_residual": self.is_residual,
            "in_channels": self.pixel_channels,
            "out_channels": self.pixel_channels,
            "patch_size": self.patch_size,
            "scale_factor_temporal": self.temporal_stride,
            "scale_factor_spatial": self.spatial_stride,
        }


def _latents(
    z_dim: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The latents' mean and standard deviation as given, or as published for `z_dim`."""
    if not mean and not std:
        if z_dim not in LATENTS:
            raise ValueError(
                f"z_dim={z_dim}: latents_mean and latents_std are published for {' and '.join(map(str, LATENTS))} "
                f"channels only; give {z_dim} entries each (zeros and ones, until the latents are measured)"
            )
        return LATENTS[z_dim]
    if not mean or not std or not len(mean) == len(std) == z_dim:
        raise ValueError(f"latents_mean and latents_std need z_dim={z_dim} entries each")
    return tuple(mean), tuple(std)


def _check_chunk(chunk: int | None) -> None:
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 latent frame, or None for the whole clip")


def vae_keywords(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """WanVAE's keywords from the config.json of `folder`.

    ValueError for another VAE than Wan's and for unknown entries, which may change what the weights mean.
    """
    name = config.get("_class_name", "AutoencoderKLWan")
    if name != "AutoencoderKLWan":
        raise ValueError(f"{folder} holds a {name}, not a Wan-VAE")
    keywords = inspect.signature(WanVAE).parameters
    side = config.get("patch_size") or 1
    # in_channels and out_channels follow from patch_size. clip_output is in 2.2's config; no class reads it.
    fixed = {"in_channels": 3 * side**2, "out_channels": 3 * side**2, "clip_output": False}
    derived = {"scale_factor_temporal", "scale_factor_spatial"}
    for key, value in config.items():
        if key in fixed and value != fixed[key]:
            raise ValueError(
                f"{folder}/config.json: {key}={value} is not supported; with patch_size={config.get('patch_size')} "
                f"a Wan-VAE has {key}={fixed[key]}"
            )
        if key not in keywords and key not in fixed and key not in derived and not key.startswith("_"):
            raise ValueError(f"{folder}/config.json: {key}={value} is unknown, and so is what it changes; refused")
    return {key: value for key, value in config.items() if key in keywords}


@torch.inference_mode()
def measure_latents(vae: WanVAE, clips: Iterable[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and standard deviation of the latents of `clips` (pixels, (B, 3, T, H, W)), not normalised: a
    trained VAE's latents_mean and latents_std. ValueError if there are no clips.
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
