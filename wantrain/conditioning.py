"""Conditioning on pixels: what a model is given of a clip besides its text, from pixels and a mask of known ones.

Image-to-video knows frame 0, first-last-frame both ends, continuation the first frames, inpainting any region at any
time, text-to-video nothing. Here these are one task. Unknown pixels are mid-gray and really encoded, so their latents
are not zero. The conditioning type (`conditioning:` of a conf/model file) says how a model takes it:

    channel_concat  further input channels beside every noisy frame: mask, then latents (Wan2.2 I2V-A14B: 16 + 4 + 16)
    clean_frames    wholly known latent frames stand clean in the input, at timestep 0 (Wan2.2 TI2V-5B)
    none            not at all: text is the only input

The records on the way: pixels and mask -> ConditioningInput (latents and mask, as stored) -> ModelInputs (tensors by
the model's keywords, as in a Batch).

Tensor suffixes: B batch, C channels, F pixel frames, T latent frames, H W rows and columns of pixels or latents,
M = 4 mask channels, one for each pixel frame of a latent frame.
Sources: Wan2.2's released inference code and weights' shapes (I2V: 36 input channels; TI2V: timesteps per token).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from wantrain import geometry

#: The conditioning types on known pixels. A model may have one of its own, whose tensors its data class makes.
TYPES = ("channel_concat", "clean_frames", "none")
#: Those under which each latent frame has a timestep of its own.
PER_FRAME = ("clean_frames",)
#: The keyword under which a transformer takes further input channels.
CONCAT = "concat_BCTHW"
#: Names of a record's tensors in a shard. Files hold them: they never change.
STORED_LATENTS, STORED_MASK = "condition.{}.latents", "condition.{}.mask"
#: Pixels in [-1, 1] -> normalised latents: a VAE's `encode`.
EncodePixels = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ConditioningInput:
    """Known pixels of some clips, encoded.

    latents_BCTHW  latents of the clips with their unknown pixels mid-gray
    mask_BMTHW     1 where a pixel frame is known, 0 elsewhere, in latent rows and columns; float32
    """

    latents_BCTHW: Tensor
    mask_BMTHW: Tensor

    @property
    def concat_BCTHW(self) -> Tensor:
        """Mask and latents as further input channels, in Wan's order."""
        return torch.cat([self.mask_BMTHW.expand(-1, -1, *self.latents_BCTHW.shape[2:]), self.latents_BCTHW], dim=1)

    @property
    def noised_BT(self) -> Tensor:
        """1 for latent frames that take noise, 0 for those known entirely, float32."""
        return 1 - self.mask_BMTHW.amin(dim=(1, 3, 4))


@dataclass(frozen=True)
class ModelInputs:
    """What conditioning gives a model, in a Batch and in sampling.

    conditioning   tensors by the keyword under which the model's forward takes them
    noised_BT      1 for latent frames that are noised, 0 for those given clean; None: all are noised
    latents_BCTHW  the clean latents, read where `noised_BT` is 0; None where `noised_BT` is
    """

    conditioning: Mapping[str, Tensor] = field(default_factory=dict)
    noised_BT: Tensor | None = None
    latents_BCTHW: Tensor | None = None


def check_type(conditioning: str, *, key: str = "model.conditioning") -> None:
    """ValueError for another conditioning type than those on known pixels."""
    if conditioning not in TYPES:
        raise ValueError(f"{key}={conditioning} is unknown; choose one of {', '.join(TYPES)}")


def encode(
    encode_pixels: EncodePixels,
    pixels_BCFHW: Tensor,
    given_B1FHW: Tensor,
    *,
    conditioning: str = "channel_concat",
    temporal_stride: int = 4,
    spatial_stride: int = 8,
) -> ConditioningInput:
    """The record of clips (B, 3, F, H, W) in [-1, 1] whose pixels are known where the mask (broadcasting) is true.

    For `clean_frames` only the known beginning is encoded, which is all that the model sees; the latents after it are
    zero. ValueError for a length or size that the VAE cannot take.
    """
    given = given_B1FHW.to(pixels_BCFHW.device, torch.bool)
    full = given.expand(len(pixels_BCFHW), 1, *pixels_BCFHW.shape[2:])
    mask = pack_mask(full, temporal_stride=temporal_stride, spatial_stride=spatial_stride)
    pixels = gray_unknown(pixels_BCFHW, given)
    if conditioning == "clean_frames":
        wanted = max(1, int((mask.amin(dim=(0, 1, 3, 4)) > 0).sum()))
        latents = encode_pixels(pixels[:, :, : geometry.pixel_frames(wanted, temporal_stride)]).float()
        latents = F.pad(latents, (0, 0, 0, 0, 0, mask.shape[2] - wanted))
    else:
        latents = encode_pixels(pixels).float()
    return ConditioningInput(latents, mask.to(latents.device))


def gray_unknown(pixels_BCFHW: Tensor, given_B1FHW: Tensor) -> Tensor:
    """The pixels, with mid-gray (0 in [-1, 1]) in the place of unknown ones."""
    return torch.where(given_B1FHW, pixels_BCFHW, torch.zeros((), device=pixels_BCFHW.device))


def pack_mask(given_B1FHW: Tensor, *, temporal_stride: int = 4, spatial_stride: int = 8) -> Tensor:
    """A mask over pixels (B, 1, F, H, W) as Wan's over latents (B, M, T, H/s, W/s), float32.

    The first frame counts as all M = `temporal_stride` frames of the first latent frame; each later latent frame has
    its own M. A latent cell is known where all its pixels are: an unknown pixel would be taken for a gray one.
    """
    num_frames, height, width = given_B1FHW.shape[2:]
    geometry.check_num_frames(num_frames, temporal_stride)
    geometry.check_size(height, width, spatial_stride, key="mask")
    unknown_BFHW = (~given_B1FHW.bool())[:, 0].float()
    known_BFHW = 1 - F.max_pool2d(unknown_BFHW, spatial_stride)
    padded = torch.cat([known_BFHW[:, :1].expand(-1, temporal_stride - 1, -1, -1), known_BFHW], dim=1)
    return padded.unflatten(1, (-1, temporal_stride)).transpose(1, 2).contiguous()


def check_given(given_B1FHW: Tensor, conditioning: str, *, key: str, temporal_stride: int = 4) -> None:
    """ValueError, naming the input `key`, unless a model of this conditioning type can be given these known pixels.

    Clean frames are whole latent frames from the first on: the latent of a later frame depends on every frame before
    it, which the model has yet to make.
    """
    if conditioning == "channel_concat":
        return
    frames_F = given_B1FHW.flatten(3).all(dim=3).all(dim=0).flatten()
    some_F = given_B1FHW.flatten(3).any(dim=3).any(dim=0).flatten()
    length = int(frames_F.long().cumprod(0).sum())
    if bool((frames_F != some_F).any()) or int(some_F.sum()) != length:
        raise ValueError(
            f"{key}: this model takes clean first frames (conditioning clean_frames), no last image and no region; "
            "give the first image or frames alone, or choose a model of conditioning channel_concat (i2v_a14b)"
        )
    if length:
        geometry.check_num_frames(length, temporal_stride, key=f"{key}: known frames")


def model_inputs(record: ConditioningInput | None, conditioning: str) -> ModelInputs:
    """What a model of this conditioning type is given of clips; nothing without a record.

    ValueError for a record where the model's only input is text.
    """
    if record is None:
        return ModelInputs()
    if conditioning == "channel_concat":
        return ModelInputs({CONCAT: record.concat_BCTHW})
    if conditioning == "clean_frames":
        return ModelInputs(noised_BT=record.noised_BT, latents_BCTHW=record.latents_BCTHW)
    raise ValueError("this model takes no conditioning besides its text (model.conditioning: none)")


def to_tensors(name: str, record: ConditioningInput) -> dict[str, Tensor]:
    """One clip's record (B = 1) as tensors of a shard: latents bf16, mask uint8 (1x1 where it is of whole frames)."""
    mask_MTHW = record.mask_BMTHW[0].to(torch.uint8)
    if bool((mask_MTHW == mask_MTHW[..., :1, :1]).all()):
        mask_MTHW = mask_MTHW[..., :1, :1]
    latents = record.latents_BCTHW[0].to(torch.bfloat16)
    return {
        STORED_LATENTS.format(name): latents.cpu().contiguous(),
        STORED_MASK.format(name): mask_MTHW.cpu().contiguous(),
    }


def from_tensors(name: str, tensors: Mapping[str, Tensor]) -> ConditioningInput:
    """The record (B = 1) that `to_tensors` stored; KeyError if it did not."""
    latents = tensors[STORED_LATENTS.format(name)].float()[None]
    mask = tensors[STORED_MASK.format(name)].float()[None]
    return ConditioningInput(latents, mask.expand(-1, -1, *latents.shape[2:]))


def stack(records: list[ConditioningInput]) -> ConditioningInput:
    """Several records as one."""
    return ConditioningInput(
        torch.cat([each.latents_BCTHW for each in records]), torch.cat([each.mask_BMTHW for each in records])
    )
