"""Shards to batches: samples by number, read where they lie; no worker processes, no order of its own.

Which samples come when is plan.py's business. A latent is a slice of a mapped file, so one thread that loads ahead is
faster than the pipes of worker processes (benchmarks/latents.py).
"""

from __future__ import annotations

import json
import struct
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wantrain import geometry, world
from wantrain.batch import Batch, pad_texts
from wantrain.condition import Condition
from wantrain.data.conditions import Conditions
from wantrain.data.index import Index
from wantrain.data.likeness import group_of
from wantrain.data.mapped import tensors_in
from wantrain.data.pixels import read_sample
from wantrain.data.plan import Indices
from wantrain.data.remote import CACHE, open_shards
from wantrain.data.shards import (
    MANIFEST,
    VideoSample,
    file_hash,
    read_manifest,
    read_video_shards,
)
from wantrain.video import Frames


def split_groups(groups: NDArray[np.uint64], share: float, seed: int) -> tuple[Indices, Indices]:
    """(train, held-out) sample numbers: whole groups of files are held out, so that what is alike never straddles.

    A file is a group, unless it looks like others (likeness.py). The round(share * groups) groups with the smallest
    hash of (seed, group) are held out: a fixed choice that adding files changes little. They come in the order of their
    hashes, so that the first few are of all kinds. ValueError if `share` is not in [0, 1) or leaves nothing to train
    on.
    """
    if not 0 <= share < 1:
        raise ValueError(f"data.holdout={share} must be in [0, 1)")
    hashes = _hashes(groups, seed)
    ranked = np.sort(hashes)
    ranked = ranked[np.diff(ranked, prepend=~ranked[:1]) != 0]  # each group once
    count = round(share * len(ranked))
    if 0 < len(ranked) == count:
        raise ValueError(
            f"data.holdout={share} holds out all {len(ranked)} files (those that look alike counted as one); make it "
            "smaller, or add footage"
        )
    held = hashes < ranked[count] if len(ranked) else np.zeros(0, dtype=bool)
    order = np.argsort(hashes[held], kind="stable")
    return np.flatnonzero(~held), np.flatnonzero(held)[order]


def _hashes(groups: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """A 64-bit hash of (seed, group) for each; another group never has the same."""
    mixed = groups + np.uint64(world.seed_at(seed, "holdout"))
    # The finalizer of SplitMix64 (Steele, Lea and Flood, 2014): a million take 20 ms.
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def one_per_group(samples: Indices, groups: NDArray[np.uint64]) -> Indices:
    """Samples in another order: of each group the first one, then of each the second, and so on. `groups` by sample."""
    order = np.argsort(groups[samples], kind="stable")
    _, counts = np.unique(groups[samples], return_counts=True)
    turn = np.empty(len(samples), dtype=np.int64)
    turn[order] = np.concatenate([np.arange(count) for count in counts]) if len(counts) else []
    return samples[np.argsort(turn, kind="stable")]


class LatentData:
    """Latent shards as clips by number.

    train, heldout   numbers of the training and of the held-out clips
    buckets          bucket number of each training clip, in the order of `train`
    bucket_names     its name, "FxHxW" in pixels
    weights          how often each is drawn beside others, float32: 1 unless its footage says otherwise

    Of a clip's windows and captions, and of the kinds of `condition` (data/conditions.py), one each is drawn by the
    place in the run.
    """

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
            raise ValueError(f"data.caption_dropout={caption_dropout} must be in [0, 1]")
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
        """The bucket of each training clip."""
        return [self.manifest["buckets"][bucket] for bucket in self.buckets]

    def load(self, samples: Sequence[int] | Indices, positions: Sequence[int] | Indices) -> Batch:
        """Training clips (numbers into `train`) of one bucket, for places in the run, which draw what is drawn."""
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
        """`count` training clips chosen alike, to be measured beside them; files in the order of their hashes."""
        by_group = self.train[np.argsort(self.index.group[self.train], kind="stable")]
        return self._bucketed(one_per_group(by_group, self.index.group)[:count])

    def groups_of(self, clips: Sequence[int]) -> list[int]:
        """The group of files that look alike that each clip (a number in the index) was cut from, as a number."""
        return [int(self.index.group[clip]) for clip in clips]

    def tags_of(self, clips: Sequence[int]) -> list[tuple[str, ...]]:
        """The tags of each clip (a number in the index), if its footage came with any."""
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
        """Up to 200 distinct captions, those of held-out clips first: prompts for previews."""
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
            latents_BCTHW[number] = tensors["latents"]  # from bf16 to its place in one go: new memory is what costs
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
        """One of the choices; nothing is drawn where there is one."""
        if len(choices) == 1:
            return choices[0]
        return choices[int(torch.randint(len(choices), (), generator=world.generator(self.seed, purpose, position)))]

    def _drawn_text(self, clip: int, position: int) -> Tensor:
        """One of the clip's texts, or the empty one."""
        generator = world.generator(self.seed, "caption", position)
        if torch.rand((), generator=generator) < self.caption_dropout:
            return self.empty_text
        return self._text(self._drawn(self.index.texts_of(clip), "which caption", position))

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
        """What a text says: its .json member, which follows the .safetensors member in its tar."""
        tar = self.manifest["text_shards"][self.index.text_shard[text]]["name"]
        end, block = int(self.index.text_offset[text] + self.index.text_size[text]), tarfile.BLOCKSIZE
        header = -(-end // block) * block
        info = tarfile.TarInfo.frombuf(bytes(self.files.read(tar, header, header + block)), "utf-8", "strict")
        return str(json.loads(bytes(self.files.read(tar, header + block, header + block + info.size)))["caption"])


class PixelData:
    """Video shards as decoded pixels in memory: what a small VAE is trained on. Same methods as LatentData.

    A sample is `num_frames` frames (fewer of a shorter clip), from a place in the clip drawn by the sample's
    position. ValueError if the decoded clips would take more than `max_gb`.
    """

    def __init__(
        self,
        *,
        shards: str | Path,
        num_frames: int,
        area: int,
        multiple: int,
        holdout: float = 0.05,
        seed: int = 0,
        max_gb: float = 4.0,
    ) -> None:
        self.folder, self.seed = Path(shards).expanduser(), seed
        self.manifest = read_manifest(self.folder, "video")
        self.fingerprint = file_hash(self.folder / MANIFEST)
        sizes = geometry.sizes(area, multiple, [1.0, 4 / 3, 3 / 4, 16 / 9, 9 / 16])
        if (need := self.manifest["clips"] * self.manifest["settings"]["num_frames"] * area * 3 / 1e9) > max_gb:
            raise ValueError(f"{self.folder}: decoded clips take {need:.1f} GB, data.max_gb={max_gb}; use fewer clips")
        self.clips: list[Tensor] = []
        self.names: list[str] = []
        lengths: list[str] = []
        groups, group_of_file = list[int](), group_of(self.manifest)
        for sample in read_video_shards(self.folder, self.manifest):
            size = geometry.nearest_size(sample.about["height"], sample.about["width"], sizes)
            for number, frames in enumerate(self._decode(sample, size)):
                self.clips.append(torch.from_numpy(frames.copy()).permute(3, 0, 1, 2).contiguous())
                self.names.append(f"{sample.key}-{number:04d}")
                lengths.append(str(geometry.Bucket(min(len(frames), num_frames), *size)))
                groups.append(group_of_file.get(int(sample.key, 16), int(sample.key, 16)))
        self._lengths, self._bucket_list = lengths, list(dict.fromkeys(lengths))
        self.train, self.heldout = split_groups(np.array(groups, dtype=np.uint64), holdout, seed)
        self.buckets = np.array([self._bucket_list.index(lengths[sample]) for sample in self.train])

    @staticmethod
    def _decode(sample: VideoSample, size: tuple[int, int]) -> Iterator[Frames]:
        """The clips of a file; ValueError names it if it is damaged."""
        try:
            yield from read_sample(sample, size)
        except ValueError as error:
            raise ValueError(f"{sample.about['source']} {error}; remove it and shard the footage again") from error

    @property
    def bucket_names(self) -> list[str]:
        """The bucket of each training sample."""
        return [self._lengths[sample] for sample in self.train]

    def load(self, samples: Sequence[int] | Indices, positions: Sequence[int] | Indices) -> Batch:
        """Training samples (numbers into `train`) of one bucket, for places in the run."""
        numbers = [int(self.train[sample]) for sample in samples]
        starts = [self._start(number, int(place)) for number, place in zip(numbers, positions, strict=True)]
        return self._batch(numbers, starts, [int(place) for place in positions])

    def captions(self) -> list[str]:
        """None: pixels are not prompted."""
        return []

    def heldout_batches(self, count: int) -> list[Batch]:
        """The first `count` held-out samples from their first frame on, one batch per bucket."""
        chosen = self.heldout[:count].tolist()
        buckets = dict.fromkeys(self._lengths[sample] for sample in chosen)
        groups = [[sample for sample in chosen if self._lengths[sample] == bucket] for bucket in buckets]
        return [self._batch(group, [0] * len(group), group) for group in groups]

    def _start(self, number: int, position: int) -> int:
        spare = self.clips[number].shape[1] - int(self._lengths[number].split("x")[0])
        return int(torch.randint(spare + 1, (), generator=world.generator(self.seed, "crop", position)))

    def _batch(self, numbers: list[int], starts: list[int], positions: list[int]) -> Batch:
        length = int(self._lengths[numbers[0]].split("x")[0])
        cut = [self.clips[n][:, start : start + length] for n, start in zip(numbers, starts, strict=True)]
        pixels = torch.stack(cut).float() / 127.5 - 1
        names = tuple(self.names[number] for number in numbers)
        return Batch(pixels, pixels.new_zeros(len(numbers), 1, 1), names, tuple(positions))
