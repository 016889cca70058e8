"""Conditioning inputs of a set of latents: which encode.py stores beside them, and which each training sample gets.

For channel_concat a model needs latents of the known pixels alone, which only a VAE can make. They are encoded with the
clip and stored beside it, one set for each mask type (and variant) that will be trained. For clean_frames nothing more
is stored: the first latents of a clip are the latents of its beginning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from wantrain.conditioning import (
    STORED_LATENTS,
    ConditioningInput,
    EncodePixels,
    ModelInputs,
    check_type,
    encode,
    from_tensors,
    model_inputs,
    pack_mask,
    stack,
    to_tensors,
)
from wantrain.masks import DRAWN, LEADING, PAINTED, MaskMix
from wantrain.util.seeds import generator_at

#: Purposes that masks are drawn for. They seed every draw: another word would give other masks.
_MASK, _MASK_TYPE = "known", "condition"


class ConditioningInputs:
    """Conditioning inputs of clips, by mask type.

    mask_types    mask types by weight, with their settings (see `MaskMix.read`); empty where text is the only input
    conditioning  the model's conditioning type (wantrain/conditioning.py)
    key           the config key of `mask_types`, for errors

    ValueError for mask types that this conditioning type cannot take. A type of one's own (with a data class that makes
    its tensors) has none.
    """

    def __init__(
        self,
        mask_types: Mapping[str, Any],
        conditioning: str,
        *,
        key: str = "mask_types",
        seed: int = 0,
        temporal_stride: int = 4,
        spatial_stride: int = 8,
    ) -> None:
        if mask_types:
            check_type(conditioning)
        self.mix, self.conditioning, self.key, self.seed = MaskMix.read(mask_types, key=key), conditioning, key, seed
        self.strides: dict[str, Any] = {"temporal_stride": temporal_stride, "spatial_stride": spatial_stride}
        if conditioning == "none" and mask_types:
            raise ValueError(
                f"{key}={dict(mask_types)}: this model takes no conditioning besides its text; leave it {{}}, or "
                "choose model=i2v_a14b"
            )
        if conditioning == "channel_concat" and not mask_types:
            raise ValueError(f"{key}={{}}: this model needs a conditioning input; give e.g. {{image: 1.0}}")
        if conditioning == "clean_frames" and (wrong := [name for name in self.mix.names if name not in LEADING]):
            raise ValueError(
                f"{key}.{wrong[0]}: this model takes clean first frames (conditioning clean_frames); it can learn "
                f"{', '.join(LEADING)}"
            )

    @property
    def stored(self) -> list[tuple[str, int]]:
        """The mask types and variants whose latents are stored beside a clip's own."""
        if self.conditioning != "channel_concat":
            return []
        return [(name, variant) for name in self.mix.names for variant in range(self.mix.variants[name])]

    def identity(self) -> dict[str, Any]:
        """What stored latents depend on besides the clip. Weights matter in training alone."""
        names = dict.fromkeys(name for name, _ in self.stored)
        return {name: {"variants": self.mix.variants[name], **self.mix.settings[name]} for name in names}

    def check_clip(self, num_frames: int, painted: bool) -> None:
        """ValueError, the reason why a clip is rejected, unless it can have every mask type."""
        if self.conditioning == "channel_concat" and num_frames == 1:
            raise ValueError("is a single image, and this model makes videos from known pixels; leave images out")
        if PAINTED in self.mix.names and not painted:
            raise ValueError("has no mask beside it (masks/NAME.mp4), which the mask type `mask` needs")

    def draw(self, names: Sequence[str], shape: tuple[int, int, int]) -> list[list[Tensor]]:
        """Masks for the clips of one bucket, given by their names in the shards: for each mask type and variant that is
        stored and drawn, a mask (1, F, H, W) of each clip, or what broadcasts to it.

        Masks are drawn by name, so that a clip encoded again, or alone, has the same.
        """
        return [
            [self.mix.draw(name, shape, generator_at(_MASK, name, variant, clip))[None] for clip in names]
            for name, variant in self.stored
            if name != PAINTED
        ]

    def encode(
        self,
        pixels_BCFHW: Tensor,
        drawn: Sequence[Tensor],
        encode_pixels: EncodePixels,
        painted_B1FHW: Tensor | None = None,
    ) -> list[ConditioningInput]:
        """The inputs of the clips of one bucket, for every stored mask type and variant; on the pixels' device.

        `drawn` are the masks that `draw` gives, those of each mask type stacked; `painted_B1FHW` is where mask videos
        are black.
        """
        records, masks = list[ConditioningInput](), iter(drawn)
        for name, _ in self.stored:
            given = painted_B1FHW if name == PAINTED else next(masks)
            assert given is not None, "check_clip has let it through"
            records.append(encode(encode_pixels, pixels_BCFHW, given, conditioning="channel_concat", **self.strides))
        return records

    def to_tensors(self, records: Sequence[ConditioningInput], number: int) -> dict[str, Tensor]:
        """What is stored of one clip besides its latents, of what `encode` gave."""
        tensors: dict[str, Tensor] = {}
        for (name, variant), record in zip(self.stored, records, strict=True):
            one = ConditioningInput(record.latents_BCTHW[number : number + 1], record.mask_BMTHW[number : number + 1])
            tensors.update(to_tensors(_label(name, variant), one))
        return tensors

    def choose(self, *position: int | str) -> tuple[str, int] | None:
        """The mask type and variant of a sample, drawn by its place in the run; None where text is the only input."""
        return self.mix.choose(generator_at(self.seed, _MASK_TYPE, *position)) if self.mix.names else None

    def read(
        self, chosen: tuple[str, int] | None, tensors: Mapping[str, Tensor], *, num_frames: int, position: int | str
    ) -> ConditioningInput | None:
        """The input of one sample (B = 1) from the stored tensors of its clip.

        ValueError if the chosen mask type is not stored.
        """
        if chosen is None:
            return None
        name, variant = chosen
        if self.conditioning == "channel_concat":
            if STORED_LATENTS.format(_label(name, variant)) not in tensors:
                raise ValueError(f"the latents of {self.key}.{name} are not there")
            return from_tensors(_label(name, variant), tensors)
        latents, cell = tensors["latents"].float(), self.strides["spatial_stride"]
        shape = (num_frames, cell, cell)
        # A single image is a text-to-video clip of one frame: with it known there would be nothing to learn.
        name = name if num_frames > 1 else "nothing"
        given = DRAWN[name](shape, generator_at(self.seed, _MASK, position), **self.mix.settings.get(name, {}))
        mask_BMTHW = pack_mask(given.expand(shape)[None, None], **self.strides)
        return ConditioningInput(latents[None], mask_BMTHW.expand(-1, -1, *latents.shape[1:]))

    def model_inputs(self, records: Sequence[ConditioningInput | None]) -> ModelInputs:
        """What the model is given of samples, stacked."""
        present = [record for record in records if record is not None]
        return model_inputs(stack(present) if present else None, self.conditioning)

    def adopt(self, stored: Mapping[str, Any], folder: object, *, model: str) -> None:
        """Take the numbers of variants from a folder of latents; `stored` is the `identity` in its manifest.

        ValueError, with the command that fixes it, unless the folder holds every mask type to be trained.
        """
        for name in dict.fromkeys(name for name, _ in self.stored):
            settings = {key: value for key, value in stored.get(name, {}).items() if key != "variants"}
            wanted = self.mix.settings[name]
            if name not in stored or (wanted and wanted != settings):
                problem = "is not in" if name not in stored else f"with {dict(wanted)} is not in"
                every = ", ".join(f"{each}: 1" for each in dict.fromkeys([*stored, *self.mix.names]))
                raise ValueError(
                    f"{self.key}.{name} {problem} {folder}, which has {stored or 'no conditioning inputs'}; encode "
                    f"again with python encode.py model={model} 'mask_types={{{every}}}', or leave it out"
                )
        variants = {
            name: stored[name]["variants"] if name in stored else count for name, count in self.mix.variants.items()
        }
        self.mix = replace(self.mix, variants=variants)


def _label(name: str, variant: int) -> str:
    """A mask type and variant in the names of stored tensors."""
    return name if variant == 0 else f"{name}-{variant}"
