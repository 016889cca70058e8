"""What a model is told of a clip besides its text: one record, made by one function from known pixels and a mask.

Image-to-video knows frame 0, first-last-frame both ends, continuation the first frames, inpainting any region at any
time, text-to-video nothing: for this file they are one task. Unknown pixels are mid-gray and really encoded, so their
latents are not zero. A model is told in one of two ways (`told_by:` of its conf/model file):

    channels  further input channels beside every noisy frame: mask, then latents (Wan2.2 I2V-A14B: 16 + 4 + 16)
    frames    latent frames that are known entirely stand clean in the input, at timestep 0 (Wan2.2 TI2V-5B)

Tensor suffixes: B batch, C channels, F pixel frames, T latent frames, H W rows and columns of pixels or latents,
M = 4 mask channels, one for each pixel frame of a latent frame.
Sources: Wan2.2's released inference code and weights' shapes (I2V: 36 input channels; TI2V: timesteps per token).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from wantrain import geometry

#: The two ways in which a model can be told.
WAYS = ("channels", "frames")
#: Pixels in [-1, 1] -> normalised latents: a VAE's `encode`.
EncodePixels = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Condition:
    """What is known of some clips.

    latents_BCTHW  latents of the clips with their unknown pixels mid-gray
    mask_BMTHW     1 where a pixel frame is known, 0 elsewhere, in latent rows and columns; float32
    """

    latents_BCTHW: Tensor
    mask_BMTHW: Tensor

    @property
    def channels_BCTHW(self) -> Tensor:
        """Mask and latents as further input channels, in Wan's order."""
        return torch.cat([self.mask_BMTHW.expand(-1, -1, *self.latents_BCTHW.shape[2:]), self.latents_BCTHW], dim=1)

    @property
    def noised_BT(self) -> Tensor:
        """1 for latent frames that take noise, 0 for those known entirely, float32."""
        return 1 - self.mask_BMTHW.amin(dim=(1, 3, 4))


def encode(
    encode_pixels: EncodePixels,
    pixels_BCFHW: Tensor,
    known_B1FHW: Tensor,
    *,
    way: str = "channels",
    temporal_stride: int = 4,
    spatial_stride: int = 8,
) -> Condition:
    """The record of clips (B, 3, F, H, W) in [-1, 1] whose pixels are known where the mask (broadcasting) is true.

    For a model that is told by clean frames only the known beginning is encoded, which is all that it is shown; the
    latents after it are left at zero. ValueError for a length or size that the VAE cannot take.
    """
    known = known_B1FHW.to(pixels_BCFHW.device, torch.bool)
    full = known.expand(len(pixels_BCFHW), 1, *pixels_BCFHW.shape[2:])
    mask = pack_mask(full, temporal_stride=temporal_stride, spatial_stride=spatial_stride)
    pixels = only_known(pixels_BCFHW, known)
    if way == "frames":
        wanted = max(1, int((mask.amin(dim=(0, 1, 3, 4)) > 0).sum()))
        latents = encode_pixels(pixels[:, :, : geometry.pixel_frames(wanted, temporal_stride)]).float()
        latents = F.pad(latents, (0, 0, 0, 0, 0, mask.shape[2] - wanted))
    else:
        latents = encode_pixels(pixels).float()
    return Condition(latents, mask.to(latents.device))


def only_known(pixels_BCFHW: Tensor, known_B1FHW: Tensor) -> Tensor:
    """The pixels where they are known, mid-gray (0 in [-1, 1]) elsewhere."""
    return torch.where(known_B1FHW, pixels_BCFHW, torch.zeros((), device=pixels_BCFHW.device))


def pack_mask(known_B1FHW: Tensor, *, temporal_stride: int = 4, spatial_stride: int = 8) -> Tensor:
    """A mask over pixels (B, 1, F, H, W) as Wan's over latents (B, M, T, H/s, W/s), float32.

    The first frame counts as all M = `temporal_stride` frames of the first latent frame; each later latent frame has
    its own M. A latent cell is known where all its pixels are: an unknown pixel would be taken for a gray one.
    """
    num_frames, height, width = known_B1FHW.shape[2:]
    geometry.check_num_frames(num_frames, temporal_stride)
    geometry.check_size(height, width, spatial_stride, key="mask")
    unknown_BFHW = (~known_B1FHW.bool())[:, 0].float()
    known_BFHW = 1 - F.max_pool2d(unknown_BFHW, spatial_stride)
    padded = torch.cat([known_BFHW[:, :1].expand(-1, temporal_stride - 1, -1, -1), known_BFHW], dim=1)
    return padded.unflatten(1, (-1, temporal_stride)).transpose(1, 2).contiguous()


def check_way(known_B1FHW: Tensor, way: str, *, key: str, temporal_stride: int = 4) -> None:
    """ValueError, naming the input `key`, unless a model that is told in this way can be told all that is known.

    Clean frames can only be whole latent frames, encoded from the first on: a later frame's latent depends on
    everything before it, which is what the model is to make.
    """
    if way == "channels":
        return
    frames_F = known_B1FHW.flatten(3).all(dim=3).all(dim=0).flatten()
    some_F = known_B1FHW.flatten(3).any(dim=3).any(dim=0).flatten()
    length = int(frames_F.long().cumprod(0).sum())
    if bool((frames_F != some_F).any()) or int(some_F.sum()) != length:
        raise ValueError(
            f"{key}: this model is told by clean first frames and cannot take a last image or a region; give the first "
            "image or frames alone, or choose a model that is told by channels (i2v_a14b)"
        )
    if length:
        geometry.check_num_frames(length, temporal_stride, key=f"{key}: known frames")


def told(condition: Condition | None, way: str | None) -> tuple[Tensor | None, Tensor | None]:
    """(condition_BCTHW, mask_BT) of a `Batch` for a model that is told in this way: one of the two, or neither."""
    if condition is None:
        return None, None
    if way == "channels":
        return condition.channels_BCTHW, None
    if way == "frames":
        return None, condition.noised_BT
    raise ValueError("this model takes no condition: text is all that it is told (model.told_by: null)")


def to_tensors(name: str, condition: Condition) -> dict[str, Tensor]:
    """One clip's record (B = 1) as tensors of a shard: latents bf16, mask uint8 (1x1 where it is of whole frames)."""
    mask_MTHW = condition.mask_BMTHW[0].to(torch.uint8)
    if bool((mask_MTHW == mask_MTHW[..., :1, :1]).all()):
        mask_MTHW = mask_MTHW[..., :1, :1]
    latents = condition.latents_BCTHW[0].to(torch.bfloat16)
    return {
        f"condition.{name}.latents": latents.cpu().contiguous(),
        f"condition.{name}.mask": mask_MTHW.cpu().contiguous(),
    }


def from_tensors(name: str, tensors: Mapping[str, Tensor]) -> Condition:
    """The record (B = 1) that `to_tensors` stored; KeyError if it did not."""
    latents = tensors[f"condition.{name}.latents"].float()[None]
    mask = tensors[f"condition.{name}.mask"].float()[None]
    return Condition(latents, mask.expand(-1, -1, *latents.shape[2:]))


def stack(conditions: list[Condition]) -> Condition:
    """Several records as one."""
    return Condition(
        torch.cat([each.latents_BCTHW for each in conditions]), torch.cat([each.mask_BMTHW for each in conditions])
    )
