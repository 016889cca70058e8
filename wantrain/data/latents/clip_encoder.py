"""Encodes work units of clips on a device: decoding, encoding and writing overlap.

The device receives frames as uint8: a quarter of the bytes of pixels in [-1, 1], which it computes itself. From the
same frames, sent once, it also encodes the conditioning inputs (conditioning.py).

Tensor suffixes: B clips of one bucket, C channels, F frames, H W rows and columns, T latent frames, M mask channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from safetensors.torch import save
from torch import Tensor

from wantrain import geometry
from wantrain.conditioning import ConditioningInput, EncodePixels
from wantrain.data.footage.decode_workers import Decoded
from wantrain.data.latents.conditioning import ConditioningInputs
from wantrain.data.latents.loss_masks import STORED
from wantrain.data.latents.pipeline import Pipeline
from wantrain.data.latents.portions import Group, Portion, entries, parts, stage
from wantrain.data.latents.store import LatentFolder, UnitWriter
from wantrain.data.latents.transfer import Arriving, Transfer
from wantrain.data.latents.work_units import ClipRow, WorkUnit
from wantrain.masks import painted, white_share
from wantrain.video import to_pixels

#: A portion, and the tensors of each of its groups while they are copied to the device, or back.
Moving = tuple[Portion, list[Arriving]]


class ClipEncoder:
    """Encodes clips with `encode_pixels`, pixels in [-1, 1] -> latents on `device`, and writes them into `folder`.

    together  clips of one bucket are encoded together up to this many pixels
    on_clip   is called after each clip that was not there before, with its number of frames (0: it was rejected)
    loss_mask  store the masks beside clips too

    ValueError for latents that no VAE may give.
    """

    def __init__(
        self,
        folder: LatentFolder,
        encode_pixels: EncodePixels,
        inputs: ConditioningInputs,
        device: torch.device,
        together: int,
        on_clip: Callable[[int], None],
        *,
        loss_mask: bool = False,
    ) -> None:
        self.folder, self.encode_pixels, self.inputs = folder, encode_pixels, inputs
        self.device, self.together, self.on_clip = device, together, on_clip
        self.loss_mask = loss_mask

    def pipeline(
        self,
        units: Sequence[tuple[WorkUnit, Sequence[ClipRow]]],
        decoded: Iterator[Decoded],
        close_decoded: Callable[[], None],
    ) -> Pipeline[Portion, Moving, Moving]:
        """The pipeline that makes these work units, each given with its missing rows, whose frames `decoded` yields."""
        self.transfer = Transfer(self.device)
        return Pipeline(
            self._portions(units, decoded),
            upload=self._upload,
            work=self._encode,
            store=self._store,
            close_source=close_decoded,
        )

    def _portions(
        self, units: Sequence[tuple[WorkUnit, Sequence[ClipRow]]], decoded: Iterator[Decoded]
    ) -> Iterator[Callable[[], Portion]]:
        """For each portion of the work units, in order, the function that prepares it."""
        for unit, rows in units:
            missing = {row.identity for row in rows}
            for part, last in parts(unit, entries(unit, missing, decoded, self.folder.rejected), self.together):
                yield partial(stage, unit, part, last, self.together, self.inputs, self.transfer)

    def _upload(self, portion: Portion) -> Moving:
        """Start to copy a portion to the device."""
        return portion, [self.transfer.upload([group.frames_BFHWC, *group.masks]) for group in portion.groups]

    def _encode(self, uploaded: Moving) -> Moving:
        """The latents of a portion and of its conditioning inputs, on their way back from the device."""
        portion, arriving = uploaded
        return portion, [self._encode_group(*arrive()) for arrive in arriving]

    def _encode_group(self, frames_BFHWC: Tensor, *masks: Tensor) -> Arriving:
        """Latents in bf16 as they are stored; with `loss_mask` the masks in fp16, which holds whole numbers of pixels
        exactly; then latents (bf16) and mask (uint8) of each conditioning input.
        """
        pixels = to_pixels(frames_BFHWC[..., :3])
        masked = frames_BFHWC.shape[-1] > 3
        painted_B1FHW = painted(frames_BFHWC[..., 3:])[:, None] if masked else None
        records = self.inputs.encode(pixels, masks, self.encode_pixels, painted_B1FHW)
        made = [self.encode_pixels(pixels).to(torch.bfloat16)]
        if self.loss_mask:
            made.append(white_share(frames_BFHWC[..., 3:], **self.inputs.strides).half())
        for record in records:
            made += [record.latents_BCTHW.to(torch.bfloat16), record.mask_BMTHW.to(torch.uint8)]
        return self.transfer.download(made)

    def _store(self, encoded: Iterator[Moving]) -> None:
        """Write work units of latents, in order: newly encoded rows, and copies of earlier ones."""
        for portion, arriving in encoded:
            with self.folder.writer(portion.unit) as writer:
                self._write(portion, arriving, writer)
                while not portion.last:
                    portion, arriving = next(encoded)
                    self._write(portion, arriving, writer)
                writer.finish()

    def _write(self, portion: Portion, arriving: list[Arriving], writer: UnitWriter) -> None:
        """Write a portion's rows, in order."""
        made: dict[str, bytes] = {}
        for group, arrive in zip(portion.groups, arriving, strict=True):
            made.update(self._contents(group, arrive(), writer))
        for entry in portion.entries:
            if entry.reason is not None:
                writer.reject(entry.row, entry.reason)
            else:
                writer.write(entry.row, made[entry.row.key] if entry.new else self.folder.read(entry.row))
            if entry.new:
                self.on_clip(0 if entry.reason is not None else entry.row.bucket.num_frames)

    def _contents(self, group: Group, tensors: list[Tensor], writer: UnitWriter) -> Iterator[tuple[str, bytes]]:
        """(key, .safetensors member) of each clip of a group."""
        latents_BCTHW, *pairs = tensors
        masks = pairs.pop(0) if self.loss_mask else None
        records = [ConditioningInput(*pair) for pair in zip(pairs[::2], pairs[1::2], strict=True)]
        for number, (row, latents) in enumerate(zip(group.rows, latents_BCTHW, strict=True)):
            self._check(row, latents)
            writer.width = len(latents)
            beside = self.inputs.to_tensors(records, number)
            if masks is not None and row.entry.mask is not None:
                beside[STORED] = masks[number].contiguous()
            yield row.key, save({"latents": latents.contiguous(), **beside})

    def _check(self, row: ClipRow, latents: Tensor) -> None:
        """Raise ValueError if a row's latents have the wrong shape or are not finite."""
        shape = geometry.latent_shape(row.bucket, **self.inputs.strides)
        if tuple(latents.shape[1:]) != shape or not torch.isfinite(latents).all():
            raise ValueError(
                f"{row.name}: the VAE returned NaN or infinity, or the shape {tuple(latents.shape)} instead of "
                f"(channels, {', '.join(map(str, shape))}); check weights= and parts.vae, or try vae_precision=fp32"
            )
