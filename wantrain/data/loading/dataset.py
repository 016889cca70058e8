"""Latent shards as batches: samples by number, sliced from mapped files, without worker processes.

The order of samples is sampler.py's. A latent is a slice of a mapped file, so one thread that loads ahead is faster
than the pipes of worker processes (benchmarks/latents.py).
"""

from __future__ import annotations

import json
import struct
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wantrain import geometry
from wantrain.batch import Batch, pad_texts
from wantrain.conditioning import ConditioningInput, ModelInputs
from wantrain.data.latents.conditioning import ConditioningInputs
from wantrain.data.latents.index import Index
from wantrain.data.latents.loss_masks import BLACK, STORED, WHITE, MaskCounts, lacking
from wantrain.data.loading.dropout import CaptionDropout, Points
from wantrain.data.loading.holdout import one_per_group, split_groups
from wantrain.data.loading.streams import Indices
from wantrain.data.loading.views import ClipView, view_of
from wantrain.data.mmap import tensors_in
from wantrain.data.remote import CACHE, LocalShards, Traffic, open_shards
from wantrain.data.shards import MANIFEST, file_hash, read_manifest
from wantrain.util.seeds import generator_at


class LatentData:
    """Latent shards as clips by number.

    train, heldout   numbers of the training and of the held-out clips
    buckets          bucket number of each training clip, in the order of `train`
    bucket_names     its name, "FxHxW" in pixels
    weights          how often each is drawn relative to others, float32: 1 unless its footage sets it

    One of a clip's windows, one of its captions and one of the `mask_types` (data/latents/conditioning.py) are drawn by
    the place in the run. `conditioning` is the model's conditioning type, `batch_size` the run's: a schedule of
    `caption_dropout` (loading/dropout.py) counts steps by it.
    """

    sets: None = None
    shares: tuple[float, ...] = (1.0,)
    schedule: tuple[()] = ()

    def __init__(
        self,
        *,
        shards: str | Path,
        cache: str | Path = CACHE,
        cache_gb: float = 100.0,
        holdout: float = 0.05,
        caption_dropout: float | Points = 0.1,
        batch_size: int | None = 1,
        mask_types: Mapping[str, Any] | None = None,
        conditioning: str = "none",
        seed: int = 0,
    ) -> None:
        self.caption_dropout = CaptionDropout.read(caption_dropout, batch_size=batch_size)
        self.files = open_shards(shards, cache=cache, cache_gb=cache_gb)
        self.folder, self.seed = self.files.folder, seed
        self.manifest = read_manifest(self.folder, "latent")
        self.fingerprint = file_hash(self.folder / MANIFEST)
        self.files.check(self.manifest)
        self.index = Index.read(self.folder / self.manifest["files"][0]["name"])
        self.train, self.heldout = split_groups(self.index.group, holdout, seed)
        self.buckets, self.weights = self.index.bucket[self.train], self.index.weight[self.train]
        self.empty_text: Tensor = self._text(self.manifest["empty_text"])
        strides = {key: self.manifest[key] for key in ("temporal_stride", "spatial_stride")}
        self.inputs = ConditioningInputs(mask_types or {}, conditioning, key="data.mask_types", seed=seed, **strides)
        self.inputs.adopt(self.manifest["mask_types"], self.folder, model=self.manifest["settings"]["model"])

    @property
    def bucket_names(self) -> list[str]:
        """The bucket of each training clip."""
        return [self.manifest["buckets"][bucket] for bucket in self.buckets]

    def load(self, samples: Sequence[int] | Indices, positions: Sequence[int] | Indices) -> Batch:
        """Training clips (numbers into `train`) of one bucket; their positions draw windows, captions and masks."""
        clips, places = [int(self.train[sample]) for sample in samples], [int(place) for place in positions]
        pairs = list(zip(clips, places, strict=True))
        windows = [self._drawn(self.index.windows_of(clip), "window", place) for clip, place in pairs]
        texts = [self._drawn_text(clip, place) for clip, place in pairs]
        return self._batch(clips, windows, texts, draws=places, positions=places)

    def foresee(self, samples: Sequence[int] | Indices, positions: Sequence[int] | Indices) -> bool:
        """`load` will ask for these next: their shards are fetched ahead. True if it helps to know of more."""
        return self._foresee([int(self.train[sample]) for sample in samples], [int(place) for place in positions])

    def _foresee(self, clips: Sequence[int], places: Sequence[int]) -> bool:
        """The shards of these clips and of their texts, at these places of the run."""
        if isinstance(self.files, LocalShards):
            return False
        tars = dict[str, None]()
        for clip, place in zip(clips, places, strict=True):
            window = self._drawn(self.index.windows_of(clip), "window", place)
            tars[self.manifest["shards"][self.index.shard[window]]["name"]] = None
            if (text := self._which_text(clip, place)) is not None:
                tars[self.manifest["text_shards"][self.index.text_shard[text]]["name"]] = None
        return self.files.foresee(tars)

    def traffic(self) -> list[Traffic]:
        """What was fetched, where the shards are at an address."""
        found = self.files.traffic()
        return [] if found is None else [found]

    def heldout_batches(self, count: int) -> list[Batch]:
        """`count` held-out clips at most, of as many files as there are; one batch per bucket.

        Of each the first window, with its first caption. They have no positions: their names draw their masks.
        """
        return self._bucketed(one_per_group(self.heldout, self.index.group)[:count])

    def train_batches(self, count: int) -> list[Batch]:
        """As many training clips, chosen in the same manner; files in the order of their hashes."""
        clips = np.array(list(dict.fromkeys(self.train.tolist())), dtype=np.int64)  # a winner may be in several pairs
        by_group = clips[np.argsort(self.index.group[clips], kind="stable")]
        return self._bucketed(one_per_group(by_group, self.index.group)[:count])

    def groups_of(self, clips: Sequence[int]) -> list[int]:
        """The group of similar files (duplicates.py) that each clip (`Batch.clips`) was cut from, as a number."""
        return [int(self.index.group[clip]) for clip in clips]

    def tags_of(self, clips: Sequence[int]) -> list[tuple[str, ...]]:
        """The tags of each clip (`Batch.clips`), if its footage came with any."""
        return [tuple(self.manifest["tags"][tag] for tag in self.index.tags_of(clip)) for clip in clips]

    def mask_counts(self) -> list[MaskCounts]:
        """Of how many windows a mask is stored, and of which it is black or white throughout."""
        flags = self.index.mask
        blank = [[self.index.name(window) for window in lacking(flags, colour)] for colour in (WHITE, BLACK)]
        return [MaskCounts("", len(flags), int((flags > 0).sum()), *blank)]

    def view(self, name: str) -> ClipView | None:
        """A clip of a batch (`Batch.ids`) to look at; None if there is none of that name, or if it lies elsewhere: a
        page is no reason to fetch a shard.
        """
        if not isinstance(self.files, LocalShards):
            return None
        window = self.index.window(name)
        if window is None:
            return None
        clip = self.index.clip_of(window)
        caption = self._caption(self.index.texts_of(clip)[0])
        return view_of(self._tensors_of(clip, window)["latents"].float(), caption, str(self._bucket(clip)))

    def _bucketed(self, chosen: Indices) -> list[Batch]:
        batches = []
        for bucket in np.unique(self.index.bucket[chosen]):
            clips = chosen[self.index.bucket[chosen] == bucket].tolist()
            windows = [self.index.windows_of(clip)[0] for clip in clips]
            texts = [self._text(self.index.texts_of(clip)[0]) for clip in clips]
            names = [self.index.name(window) for window in windows]
            batches.append(self._batch(clips, windows, texts, draws=names))
        return batches

    def captions(self) -> list[str]:
        """Up to 200 distinct captions, those of held-out clips first: prompts for previews."""
        order = [*self.heldout[:100].tolist(), *self.train[:100].tolist()]
        return list(dict.fromkeys(self._caption(self.index.texts_of(clip)[0]) for clip in order))

    def examples(self, count: int) -> list[tuple[str, geometry.Bucket, ModelInputs]]:
        """For previews: caption, size and conditioning of held-out clips (of training clips if none are held out)."""
        clips = one_per_group(self.heldout if len(self.heldout) else self.train, self.index.group)[:count].tolist()
        examples = []
        for clip in clips:
            window, bucket = self.index.windows_of(clip)[0], self._bucket(clip)
            record = self._input(window, self._tensors_of(clip, window), bucket, self.index.name(window))
            caption = self._caption(self.index.texts_of(clip)[0])
            examples.append((caption, bucket, self.inputs.model_inputs([record])))
        return examples

    def _batch(
        self,
        clips: Sequence[int],
        windows: Sequence[int],
        texts: list[Tensor],
        *,
        draws: Sequence[int | str],
        positions: Sequence[int] = (),
    ) -> Batch:
        """Windows of clips of one bucket; the mask type of each is drawn by its entry of `draws`."""
        latents_BCTHW, records, masks = torch.empty(0), [], list[Tensor | None]()
        for number, (clip, window, draw) in enumerate(zip(clips, windows, draws, strict=True)):
            tensors = self._tensors_of(clip, window)
            records.append(self._input(window, tensors, self._bucket(clip), draw))
            masks.append(tensors.get(STORED))
            if number == 0:
                latents_BCTHW = torch.empty(len(clips), *tensors["latents"].shape)
            latents_BCTHW[number] = tensors["latents"]  # from bf16 to its place in one go: new memory is what costs
        made = self.inputs.model_inputs(records)
        mask_BTHW, masked_B = _stacked(masks, latents_BCTHW)
        weights = torch.from_numpy(self.index.loss_weight[list(clips)])
        return Batch(
            latents_BCTHW,
            pad_texts(texts),
            ids=tuple(self.index.name(window) for window in windows),
            positions=tuple(positions),
            conditioning=made.conditioning,
            noised_BT=made.noised_BT,
            clips=tuple(clips),
            mask_BTHW=mask_BTHW,
            masked_B=masked_B,
            weight_B=weights if bool((weights != 1).any()) else None,
        )

    def _input(
        self, window: int, tensors: Mapping[str, Tensor], bucket: geometry.Bucket, draw: int | str
    ) -> ConditioningInput | None:
        """The conditioning input of a window, of the mask type that `draw` draws."""
        try:
            mask_type = self.inputs.choose(draw)
            return self.inputs.read(mask_type, tensors, num_frames=bucket.num_frames, position=draw)
        except ValueError as error:
            raise ValueError(f"{self.folder}, {self.index.name(window)}: {error}; encode the shards again") from error

    def _bucket(self, clip: int) -> geometry.Bucket:
        return geometry.Bucket(*map(int, self.manifest["buckets"][self.index.bucket[clip]].split("x")))

    def _drawn(self, choices: Sequence[int], purpose: str, position: int) -> int:
        """One of the choices; nothing is drawn where there is one."""
        if len(choices) == 1:
            return choices[0]
        return choices[int(torch.randint(len(choices), (), generator=generator_at(self.seed, purpose, position)))]

    def _which_text(self, clip: int, position: int) -> int | None:
        """One of the clip's texts; None for the empty one."""
        generator = generator_at(self.seed, "caption", position)
        if torch.rand((), generator=generator) < self.caption_dropout.at(position):
            return None
        return self._drawn(self.index.texts_of(clip), "which caption", position)

    def _drawn_text(self, clip: int, position: int) -> Tensor:
        text = self._which_text(clip, position)
        return self.empty_text if text is None else self._text(text)

    def _tensors(self, tar: str, offset: int, size: int, what: str, key: str) -> dict[str, Tensor]:
        """A safetensors member, `key` among its tensors; ValueError if it is damaged, or holds NaN or infinity."""
        content = self.files.read(tar, offset, offset + size)
        try:
            tensors = tensors_in(content)
            tensors[key]
        except (ValueError, KeyError, TypeError, struct.error) as error:
            raise ValueError(f"{self.folder}/{tar}, {what}: damaged ({error}); encode the shards again") from error
        for name, tensor in tensors.items():
            if not torch.stack(torch.aminmax(tensor)).isfinite().all():  # of bf16 ten times as fast as asking each
                raise ValueError(f"{self.folder}/{tar}, {what}: {name} hold NaN or infinity; encode the shards again")
        return tensors

    def _tensors_of(self, clip: int, window: int) -> dict[str, Tensor]:
        """What is stored of one window of a clip: `latents` (C, T, H, W), and its conditioning inputs.

        ValueError if they are not what was promised.
        """
        tar, name = self.manifest["shards"][self.index.shard[window]]["name"], self.index.name(window)
        place = int(self.index.offset[window]), int(self.index.size[window])
        tensors = self._tensors(tar, *place, name, "latents")
        strides = self.manifest["temporal_stride"], self.manifest["spatial_stride"]
        shape = (self.manifest["latent_channels"], *geometry.latent_shape(self._bucket(clip), *strides))
        if tensors["latents"].shape != shape:
            raise ValueError(
                f"{self.folder}/{tar}, {name}: latents {tuple(tensors['latents'].shape)} (expected {shape}); encode "
                "the shards again"
            )
        if STORED in tensors and tensors[STORED].shape != shape[1:]:
            raise ValueError(
                f"{self.folder}/{tar}, {name}: mask {tuple(tensors[STORED].shape)} (expected {shape[1:]}); encode the "
                "shards again"
            )
        return tensors

    def _text(self, text: int) -> Tensor:
        """(L, D) of one text."""
        tar = self.manifest["text_shards"][self.index.text_shard[text]]["name"]
        place = int(self.index.text_offset[text]), int(self.index.text_size[text])
        return self._tensors(tar, *place, f"text {text}", "text")["text"].float()

    def _caption(self, text: int) -> str:
        """The caption of a text."""
        tar = self.manifest["text_shards"][self.index.text_shard[text]]["name"]
        return str(self._about(tar, int(self.index.text_offset[text] + self.index.text_size[text]))["caption"])

    def _file_of(self, clip: int) -> str:
        """The name of the file that a clip was cut from, relative to its footage."""
        window = self.index.windows_of(clip)[0]
        tar = self.manifest["shards"][self.index.shard[window]]["name"]
        return str(self._about(tar, int(self.index.offset[window] + self.index.size[window]))["source"])

    def _about(self, tar: str, end: int) -> dict[str, Any]:
        """The .json member that follows a .safetensors member, which ends at byte `end` of its tar."""
        block = tarfile.BLOCKSIZE
        header = -(-end // block) * block
        info = tarfile.TarInfo.frombuf(bytes(self.files.read(tar, header, header + block)), "utf-8", "strict")
        about: dict[str, Any] = json.loads(bytes(self.files.read(tar, header + block, header + block + info.size)))
        return about


def _stacked(masks: Sequence[Tensor | None], latents_BCTHW: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The masks of samples (B, T, H, W), 0 for those without one, and who has one (B,); None where nobody has."""
    if all(mask is None for mask in masks):
        return None, None
    stacked = latents_BCTHW.new_zeros(len(masks), *latents_BCTHW.shape[2:])
    for own, mask in zip(stacked, masks, strict=True):
        if mask is not None:
            own.copy_(mask)
    return stacked, torch.tensor([float(mask is not None) for mask in masks])
