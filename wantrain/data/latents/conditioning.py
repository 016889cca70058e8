"""The conditions of a set of latents: what encode.py stores beside them, and what each training sample is told.

A model that is told by further channels must be given the latents of the known pixels alone, which only a VAE can
make: they are made with the clip's own and stored beside them, one set for each kind (and variant) that will be
trained. A model that is told by clean frames needs nothing more: the beginning of a clip's latents is the latents of
its beginning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from wantrain import conditioning
from wantrain.conditioning import Condition, EncodePixels
from wantrain.masks import DRAWN, LEADING, PAINTED, Mix
from wantrain.util.seeds import generator_at


class Conditions:
    """What is known of clips, by kind.

    spec     kinds by weight, with their settings (see `Mix.read`); empty where text is all
    told_by  how the model is told: "channels", "frames" or None (conditioning.py)
    key      what `spec` is called where the user wrote it

    ValueError for kinds that such a model cannot be told.
    """

    def __init__(
        self,
        spec: Mapping[str, Any],
        told_by: str | None,
        *,
        key: str = "condition",
        seed: int = 0,
        temporal_stride: int = 4,
        spatial_stride: int = 8,
    ) -> None:
        self.mix, self.told_by, self.key, self.seed = Mix.read(spec, key=key), told_by, key, seed
        self.strides: dict[str, Any] = {"temporal_stride": temporal_stride, "spatial_stride": spatial_stride}
        if told_by is None and spec:
            raise ValueError(
                f"{key}={dict(spec)}: this model is told nothing but text; leave it {{}}, or choose model=i2v_a14b"
            )
        if told_by == "channels" and not spec:
            raise ValueError(f"{key}={{}}: this model makes videos of what is known; give kinds, as in {{image: 1.0}}")
        if told_by == "frames" and (wrong := [name for name in self.mix.names if name not in LEADING]):
            raise ValueError(
                f"{key}.{wrong[0]}: this model is told by clean first frames; it can learn {', '.join(LEADING)}"
            )

    @property
    def stored(self) -> list[tuple[str, int]]:
        """The kinds and variants whose latents are stored beside a clip's own."""
        if self.told_by != "channels":
            return []
        return [(name, variant) for name in self.mix.names for variant in range(self.mix.variants[name])]

    def identity(self) -> dict[str, Any]:
        """What stored latents depend on besides the clip; weights are the training's business."""
        kinds = dict.fromkeys(name for name, _ in self.stored)
        return {name: {"variants": self.mix.variants[name], **self.mix.settings[name]} for name in kinds}

    def check_clip(self, num_frames: int, painted: bool) -> None:
        """ValueError, the reason why a clip is rejected, unless everything that is to be known can be."""
        if self.told_by == "channels" and num_frames == 1:
            raise ValueError("is a single image, and this model makes videos of what is known; leave images out")
        if PAINTED in self.mix.names and not painted:
            raise ValueError("has no mask beside it (masks/NAME.mp4), which the condition `mask` asks for")

    def draw(self, names: Sequence[str], shape: tuple[int, int, int]) -> list[list[Tensor]]:
        """Which pixels are known of the clips of one bucket, with their names in the shards: of each kind and variant
        that is stored and drawn, a mask (1, F, H, W) of each clip, or what broadcasts to it.

        Masks are drawn by name, so that a clip encoded again, or alone, has the same.
        """
        return [
            [self.mix.draw(kind, shape, generator_at("known", kind, variant, name))[None] for name in names]
            for kind, variant in self.stored
            if kind != PAINTED
        ]

    def encode(
        self,
        pixels_BCFHW: Tensor,
        drawn: Sequence[Tensor],
        encode_pixels: EncodePixels,
        painted_B1FHW: Tensor | None = None,
    ) -> list[Condition]:
        """What is known of the clips of one bucket, in every kind and variant that is stored; on the pixels' device.

        `drawn` are the masks that `draw` gives, those of each kind stacked; `painted_B1FHW` is where mask videos are
        black.
        """
        found, masks = list[Condition](), iter(drawn)
        for kind, _ in self.stored:
            known = painted_B1FHW if kind == PAINTED else next(masks)
            assert known is not None, "check_clip has let it through"
            found.append(conditioning.encode(encode_pixels, pixels_BCFHW, known, way="channels", **self.strides))
        return found

    def to_tensors(self, records: Sequence[Condition], number: int) -> dict[str, Tensor]:
        """What is stored of one clip besides its latents, of what `encode` gave."""
        tensors: dict[str, Tensor] = {}
        for (kind, variant), made in zip(self.stored, records, strict=True):
            one = Condition(made.latents_BCTHW[number : number + 1], made.mask_BMTHW[number : number + 1])
            tensors.update(conditioning.to_tensors(_label(kind, variant), one))
        return tensors

    def choose(self, *position: int | str) -> tuple[str, int] | None:
        """The kind and variant for a sample, a function of its place in the run; None where text is all."""
        return self.mix.choose(generator_at(self.seed, "condition", *position)) if self.mix.names else None

    def read(
        self, chosen: tuple[str, int] | None, tensors: Mapping[str, Tensor], *, num_frames: int, position: int | str
    ) -> Condition | None:
        """The record of one sample (B = 1) from what is stored of its clip.

        ValueError if the chosen kind is not stored.
        """
        if chosen is None:
            return None
        kind, variant = chosen
        if self.told_by == "channels":
            if f"condition.{_label(kind, variant)}.latents" not in tensors:
                raise ValueError(f"the latents of {self.key}.{kind} are not there")
            return conditioning.from_tensors(_label(kind, variant), tensors)
        latents, cell = tensors["latents"].float(), self.strides["spatial_stride"]
        shape = (num_frames, cell, cell)
        # A single image is a text-to-video clip of one frame: with it known there would be nothing to learn.
        kind = kind if num_frames > 1 else "nothing"
        known = DRAWN[kind](shape, generator_at(self.seed, "known", position), **self.mix.settings.get(kind, {}))
        mask_BMTHW = conditioning.pack_mask(known.expand(shape)[None, None], **self.strides)
        return Condition(latents[None], mask_BMTHW.expand(-1, -1, *latents.shape[1:]))

    def tell(self, records: Sequence[Condition | None]) -> tuple[Tensor | None, Tensor | None]:
        """(condition_BCTHW, mask_BT) of a `Batch` of samples."""
        there = [record for record in records if record is not None]
        return conditioning.told(conditioning.stack(there), self.told_by) if there else (None, None)

    def adopt(self, stored: Mapping[str, Any], folder: object, *, model: str) -> None:
        """Take up how many variants a folder's latents have of each kind; `stored` is their `identity`.

        ValueError, with the command that fixes it, unless they hold what is to be trained.
        """
        for name in dict.fromkeys(name for name, _ in self.stored):
            found = {key: value for key, value in stored.get(name, {}).items() if key != "variants"}
            wanted = self.mix.settings[name]
            if name not in stored or (wanted and wanted != found):
                what = "is not in" if name not in stored else f"with {dict(wanted)} is not in"
                kinds = ", ".join(f"{kind}: 1" for kind in dict.fromkeys([*stored, *self.mix.names]))
                raise ValueError(
                    f"{self.key}.{name} {what} {folder}, which has {stored or 'no conditions'}; encode again with "
                    f"python encode.py model={model} 'condition={{{kinds}}}', or leave it out"
                )
        kept = {
            name: stored[name]["variants"] if name in stored else count for name, count in self.mix.variants.items()
        }
        self.mix = replace(self.mix, variants=kept)


def _label(kind: str, variant: int) -> str:
    return kind if variant == 0 else f"{kind}-{variant}"
