"""What the mask of a clip weighs in the loss.

Tensor suffixes: B samples, T latent frames, H W rows and columns of latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wantrain.batch import Batch

#: What is done with masks: nothing; white counts most; white counts least.
MODES = ("none", "focus", "ignore")


@dataclass(frozen=True)
class MaskWeights:
    """Weights of the latent cells of samples, from the masks beside their clips.

    mode       none: masks weigh nothing; focus: what is white counts 1 and the rest `rest`; ignore: the other way round
    rest       weight of the rest, in [0, 1)
    normalize  a sample's loss is the mean by weight, whatever the area that counts; else the sum by weight over all
               cells, so that a small region weighs little

    A grey cell lies between. A sample without a mask counts whole.
    """

    mode: str = "none"
    rest: float = 0.0
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"loss.mask={self.mode} is unknown; choose one of {', '.join(MODES)}")
        if not 0 <= self.rest < 1:
            raise ValueError(
                f"loss.mask_rest={self.rest} must be at least 0 and below 1: the weight of the rest, where the region "
                "has 1"
            )

    @property
    def blank(self) -> str | None:
        """The colour of a mask that leaves nothing to learn from; None where every mask leaves something."""
        return None if self.mode == "none" or self.rest else "black" if self.mode == "focus" else "white"

    def region(self, batch: Batch) -> Tensor | None:
        """The share of each cell that lies in the region that counts 1, (B, T, H, W); 0 for samples without a mask.

        None where no sample has a mask.
        """
        if self.mode == "none" or batch.mask_BTHW is None or batch.masked_B is None:
            return None
        white = batch.mask_BTHW if self.mode == "focus" else 1 - batch.mask_BTHW
        return white * batch.masked_B[:, None, None, None]

    def weights(self, batch: Batch) -> Tensor | None:
        """The weight of each cell, (B, T, H, W) float32, 0 in frames that are given clean; None: all weigh the same."""
        region_BTHW = self.region(batch)
        if region_BTHW is None:
            return None
        assert batch.masked_B is not None
        masked = batch.masked_B[:, None, None, None]
        weight = 1 - masked * (1 - self.rest) * (1 - region_BTHW)
        if batch.noised_BT is not None:
            weight = weight * batch.noised_BT[:, :, None, None]
        return weight

    def checked(self, batch: Batch) -> Tensor | None:
        """`weights` of a batch on the host. ValueError, naming the clip, if nothing is left of one.

        Where frames are given clean, by what was drawn, such a sample has no part in the loss: another draw has others.
        """
        weight_BTHW = self.weights(batch)
        empty = [] if weight_BTHW is None else (weight_BTHW.flatten(1).sum(dim=1) == 0).tolist()
        if any(empty) and batch.noised_BT is None:
            raise ValueError(
                f"loss.mask={self.mode} leaves no pixel of {batch.ids[empty.index(True)]}: its mask has nothing "
                f"{'white' if self.mode == 'focus' else 'black'}; give loss.mask_rest a number above 0, or change it"
            )
        return weight_BTHW

    @property
    def about(self) -> str:
        """For people: what counts; empty where masks weigh nothing."""
        return "" if self.mode == "none" else f"loss.mask={self.mode}, the rest at {self.rest:g}"


def weighted_mean(error_BCTHW: Tensor, weight_BTHW: Tensor) -> Tensor:
    """Mean of each sample's errors by weight, (B,); 0 where all weights are."""
    dims = (1, 2, 3)
    total = weight_BTHW.sum(dim=dims)
    return (error_BCTHW.mean(dim=1) * weight_BTHW).sum(dim=dims) / total.clamp(min=torch.finfo(total.dtype).tiny)


def area(weight_BTHW: Tensor, batch: Batch) -> Tensor:
    """The mean weight of the cells that are noised, (B,)."""
    if batch.noised_BT is None:
        return weight_BTHW.mean(dim=(1, 2, 3))
    return weight_BTHW.mean(dim=(2, 3)).sum(dim=1) / batch.noised_BT.sum(dim=1)


def region_means(distances: Sequence[Tensor], batches: Sequence[Batch], masks: MaskWeights) -> dict[str, Tensor]:
    """For the log: the mean error in the region that counts, and in the rest, of the samples that have a mask.

    `distances` are the errors of the elements of each batch, (B, C, T, H, W). NaN where there is nothing of a region.
    """
    sums = distances[0].new_zeros(2, 2)  # (region, rest) x (error, cells)
    for distance_BCTHW, batch in zip(distances, batches, strict=True):
        region_BTHW = masks.region(batch)
        if region_BTHW is None or batch.masked_B is None:
            continue
        learned = batch.masked_B[:, None, None, None].expand_as(region_BTHW)
        if batch.noised_BT is not None:
            learned = learned * batch.noised_BT[:, :, None, None]
        error_BTHW = distance_BCTHW.detach().mean(dim=1)
        parts = torch.stack([region_BTHW * learned, (1 - region_BTHW) * learned])
        sums = sums + torch.stack([(parts * error_BTHW).flatten(1).sum(1), parts.flatten(1).sum(1)], dim=1)
    counted, rest = (sums[:, 0] / sums[:, 1]).unbind()
    return {"loss_counted": counted, "loss_rest": rest}
