"""LatentData: latent shards as batches of samples by number, read from mapped files.

The sampler (sampler.py) decides the order. There are no worker processes: a latent is a slice of a mapped file, so one
thread that loads ahead is faster than pipes between processes (benchmarks/latents.py).
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
from wantrain.conditioning import Condition
from wantrain.data.latents.conditioning import Conditions
from wantrain.data.latents.index import Index
from wantrain.data.loading.holdout import one_per_group, split_groups
from wantrain.data.loading.sampler import Indices
from wantrain.data.mmap import tensors_in
from wantrain.data.remote import CACHE, open_shards
from wantrain.data.shards import MANIFEST, file_hash, read_manifest
from wantrain.util.seeds import generator_at


class LatentData:
    """Latent shards as samples for training.

    Attributes beside those of TrainingData:

    train    clip number of each training sample
    heldout  numbers of the held-out clips
    index    index of the latent folder (latents/index.py)

    Of a clip's windows and captions, and of the kinds of `condition` (data/conditions.py), one each is drawn by the
    place in the run.
    """

    sets: None = None
    shares: tuple[float, ...] = (1.0,)

    def __init__(
        self,
        *,
        shards: str | Path,
        cache: str | Path = CACHE,
        cache_gb: float = 100.0,
        holdout: float = 0.05,
        caption_dropout: float = 0.1,
        condition: Mapping[str, Any] | None = None,
        told_by: str | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 <= caption_dropout <= 1:
            raise ValueError(
                f"data.caption_dropout={caption_dropout} must be in [0, 1]: the share of samples with the empty caption"
            )
        self.files = open_shards(shards, cache=cache, cache_gb=cache_gb)
        self.folder, self.caption_dropout, self.seed = self.files.folder, caption_dropout, seed
        self.manifest = read_manifest(self.folder, "latent")
        self.fingerprint = file_hash(self.folder / MANIFEST)
        self.files.check(self.manifest)
        self.index = Index.read(self.folder / self.manifest["files"][0]["name"])
        self.train, self.heldout = split_groups(self.index.group, holdout, seed)
        self.buckets, self.weights = self.index.bucket[self.train], self.index.weight[self.train]
        self.empty_text: Tensor = self._text(self.manifest["empty_text"])
        strides = {key: self.manifest[key] for key in ("temporal_stride", "spatial_stride")}
        self.conditions = Conditions(condition or {}, told_by, key="data.condition", seed=seed, **strides)
        self.conditions.adopt(self.manifest["condition"], self.folder, model=self.manifest["settings"]["model"])

    @property
    def bucket_names(self) -> list[str]:
        """Bucket of each training sample, "FxHxW" in pixels."""
        return [self.manifest["buckets"][bucket] for bucket in self.buckets]

    def load(self, samples: Sequence[int] | Indices, positions: Sequence[int] | Indices) -> Batch:
        """Training samples (numbers into `train`) of one bucket; `positions` seed their random draws."""
        clips, places = [int(self.train[sample]) for sample in samples], [int(place) for place in positions]
        pairs = list(zip(clips, places, strict=True))
        windows = [self._drawn(self.index.windows_of(clip), "window", place) for clip, place in pairs]
        texts = [self._drawn_text(clip, place) for clip, place in pairs]
        return self._batch(clips, windows, texts, places, draws=places)

    def heldout_batches(self, count: int) -> list[Batch]:
        """`count` held-out clips at most, of as many files as there are; one batch per bucket.

        Of each the first window, with its first caption. The positions of their batches are their numbers in the
        index, also below.
        """
        return self._bucketed(one_per_group(self.heldout, self.index.group)[:count])

    def train_batches(self, count: int) -> list[Batch]:
        """At most `count` training clips, chosen like the held-out ones, to be measured beside them."""
        by_group = self.train[np.argsort(self.index.group[self.train], kind="stable")]
        return self._bucketed(one_per_group(by_group, self.index.group)[:count])

    def groups_of(self, clips: Sequence[int]) -> list[int]:
        """The group of near-duplicate files that each clip (by number in the index) was cut from."""
        return [int(self.index.group[clip]) for clip in clips]

    def tags_of(self, clips: Sequence[int]) -> list[tuple[str, ...]]:
        """The tags of each clip (by number in the index)."""
        return [tuple(self.manifest["tags"][tag] for tag in self.index.tags_of(clip)) for clip in clips]

    def _bucketed(self, chosen: Indices) -> list[Batch]:
        batches = []
        for bucket in np.unique(self.index.bucket[chosen]):
            clips = chosen[self.index.bucket[chosen] == bucket].tolist()
            windows = [self.index.windows_of(clip)[0] for clip in clips]
            texts = [self._text(self.index.texts_of(clip)[0]) for clip in clips]
            names = [self.index.name(window) for window in windows]
            batches.append(self._batch(clips, windows, texts, clips, draws=names))
        return batches

    def captions(self) -> list[str]:
        """Up to 200 distinct captions, those of held-out clips first, as prompts for previews."""
        order = [*self.heldout[:100].tolist(), *self.train[:100].tolist()]
        return list(dict.fromkeys(self._caption(self.index.texts_of(clip)[0]) for clip in order))

    def examples(self, count: int) -> list[tuple[str, geometry.Bucket, Condition | None]]:
        """Held-out clips, or training clips where none are: caption, size, what is known of it. For previews."""
        clips = one_per_group(self.heldout if len(self.heldout) else self.train, self.index.group)[:count].tolist()
        found = []
        for clip in clips:
            window, bucket = self.index.windows_of(clip)[0], self._bucket(clip)
            known = self._known(window, self._tensors_of(clip, window), bucket, self.index.name(window))
            found.append((self._caption(self.index.texts_of(clip)[0]), bucket, known))
        return found

    def _batch(
        self,
        clips: Sequence[int],
        windows: Sequence[int],
        texts: list[Tensor],
        positions: Sequence[int],
        *,
        draws: Sequence[int | str],
    ) -> Batch:
        """Windows of clips of one bucket; `draws` is what draws the kind of condition of each."""
        latents_BCTHW, records = torch.empty(0), []
        for number, (clip, window, draw) in enumerate(zip(clips, windows, draws, strict=True)):
            tensors = self._tensors_of(clip, window)
            records.append(self._known(window, tensors, self._bucket(clip), draw))
            if number == 0:
                latents_BCTHW = torch.empty(len(clips), *tensors["latents"].shape)
            latents_BCTHW[number] = tensors[
                "latents"
            ]  # converted from bf16 in place: allocating memory is what costs time
        condition, mask = self.conditions.tell(records)
        names = tuple(self.index.name(window) for window in windows)
        return Batch(latents_BCTHW, pad_texts(texts), names, tuple(positions), mask, condition)

    def _known(
        self, window: int, tensors: Mapping[str, Tensor], bucket: geometry.Bucket, draw: int | str
    ) -> Condition | None:
        """What is known of a window, of the kind that `draw` draws."""
        try:
            kind = self.conditions.choose(draw)
            return self.conditions.read(kind, tensors, num_frames=bucket.num_frames, position=draw)
        except ValueError as error:
            raise ValueError(f"{self.folder}, {self.index.name(window)}: {error}; encode the shards again") from error

    def _bucket(self, clip: int) -> geometry.Bucket:
        return geometry.Bucket(*map(int, self.manifest["buckets"][self.index.bucket[clip]].split("x")))

    def _drawn(self, choices: Sequence[int], purpose: str, position: int) -> int:
        """One of the choices, drawn by position; a single choice needs no draw."""
        if len(choices) == 1:
            return choices[0]
        return choices[int(torch.randint(len(choices), (), generator=generator_at(self.seed, purpose, position)))]

    def _drawn_text(self, clip: int, position: int) -> Tensor:
        """One of the clip's texts, or the empty text with probability `caption_dropout`; drawn by position."""
        generator = generator_at(self.seed, "caption", position)
        if torch.rand((), generator=generator) < self.caption_dropout:
            return self.empty_text
        return self._text(self._drawn(self.index.texts_of(clip), "which caption", position))

    def _tensors(self, tar: str, offset: int, size: int, what: str, key: str) -> dict[str, Tensor]:
        """Read a safetensors member; ValueError if it is damaged, lacks the tensor `key`, or holds NaN or infinity."""
        content = self.files.read(tar, offset, offset + size)
        try:
            tensors = tensors_in(content)
            tensors[key]
        except (ValueError, KeyError, TypeError, struct.error) as error:
            raise ValueError(f"{self.folder}/{tar}, {what}: damaged ({error}); encode the shards again") from error
        for name, tensor in tensors.items():
            if (
                not torch.stack(torch.aminmax(tensor)).isfinite().all()
            ):  # ten times as fast for bf16 as isfinite of each
                raise ValueError(f"{self.folder}/{tar}, {what}: {name} hold NaN or infinity; encode the shards again")
        return tensors

    def _tensors_of(self, clip: int, window: int) -> dict[str, Tensor]:
        """What is stored of one window of a clip: `latents` (C, T, H, W), and those of what is known of it.

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
        return tensors

    def _text(self, text: int) -> Tensor:
        """(L, D) of one text."""
        tar = self.manifest["text_shards"][self.index.text_shard[text]]["name"]
        place = int(self.index.text_offset[text]), int(self.index.text_size[text])
        return self._tensors(tar, *place, f"text {text}", "text")["text"].float()

    def _caption(self, text: int) -> str:
        """The caption of a text, from the .json member that follows its .safetensors member in the tar."""
        tar = self.manifest["text_shards"][self.index.text_shard[text]]["name"]
        end, block = int(self.index.text_offset[text] + self.index.text_size[text]), tarfile.BLOCKSIZE
        header = -(-end // block) * block
        info = tarfile.TarInfo.frombuf(bytes(self.files.read(tar, header, header + block)), "utf-8", "strict")
        return str(json.loads(bytes(self.files.read(tar, header + block, header + block + info.size)))["caption"])
