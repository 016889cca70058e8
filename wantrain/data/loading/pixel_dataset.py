"""PixelData: video shards as decoded frames in memory, for training a small VAE."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wantrain import geometry
from wantrain.batch import PixelBatch
from wantrain.conditioning import ModelInputs
from wantrain.data.footage.duplicates import group_of
from wantrain.data.footage.pixels import read_sample
from wantrain.data.footage.video_shards import VideoSample, read_video_shards
from wantrain.data.latents.loss_masks import MaskCounts
from wantrain.data.loading.holdout import split_groups
from wantrain.data.loading.streams import Indices
from wantrain.data.remote import Traffic
from wantrain.data.shards import MANIFEST, file_hash, read_manifest
from wantrain.util.seeds import generator_at
from wantrain.video import Frames, to_pixels


class PixelData:
    """Video shards as decoded frames in memory, for training a small VAE.

    A sample is `num_frames` frames (fewer of a shorter clip), from a start frame drawn by the sample's position.

    shards      folder of video shards
    num_frames  frames of a sample, 4k+1
    area        pixels of one frame
    multiple    what height and width must divide by
    holdout     share of the files kept for validation
    max_gb      limit of the decoded clips, in 10^9 bytes

    ValueError if the decoded clips would take more than `max_gb`.
    """

    weights: None = None
    sets: None = None
    shares: tuple[float, ...] = (1.0,)
    schedule: tuple[()] = ()

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
        if "://" in str(shards):
            raise ValueError(
                f"data.shards={shards} is an address, and expert=vae reads video shards from a folder; copy them to "
                "this machine and give their path"
            )
        self.folder, self.seed = Path(shards).expanduser(), seed
        self.manifest = read_manifest(self.folder, "video")
        self.fingerprint = file_hash(self.folder / MANIFEST)
        sizes = geometry.sizes(area, multiple, [1.0, 4 / 3, 3 / 4, 16 / 9, 9 / 16])
        if (need := self.manifest["clips"] * self.manifest["settings"]["num_frames"] * area * 3 / 1e9) > max_gb:
            raise ValueError(
                f"{self.folder}: decoded clips take {need:.1f} GB, more than data.max_gb={max_gb}; raise it, or use "
                "fewer clips"
            )
        self.clips: list[Tensor] = []  # frames (F, H, W, 3), uint8
        self.names: list[str] = []
        lengths: list[str] = []
        self._groups, group_of_file = list[int](), group_of(self.manifest)
        self._tags: list[tuple[str, ...]] = []
        for sample in read_video_shards(self.folder, self.manifest):
            size = geometry.nearest_size(sample.about["height"], sample.about["width"], sizes)
            for number, frames in enumerate(self._decode(sample, size)):
                self.clips.append(torch.from_numpy(frames.copy()))
                self.names.append(f"{sample.key}-{number:04d}")
                lengths.append(str(geometry.Bucket(min(len(frames), num_frames), *size)))
                self._groups.append(group_of_file.get(int(sample.key, 16), int(sample.key, 16)))
                self._tags.append(tuple(sample.about.get("tags", ())))
        self._lengths, self._bucket_list = lengths, list(dict.fromkeys(lengths))
        self.train, self.heldout = split_groups(np.array(self._groups, dtype=np.uint64), holdout, seed)
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

    def load(self, samples: Sequence[int] | Indices, positions: Sequence[int] | Indices) -> PixelBatch:
        """Training samples (numbers into `train`) of one bucket, for positions in the run."""
        numbers = [int(self.train[sample]) for sample in samples]
        starts = [self._start(number, int(place)) for number, place in zip(numbers, positions, strict=True)]
        return self._batch(numbers, starts, [int(place) for place in positions])

    def captions(self) -> list[str]:
        """Empty: pixels have no prompts."""
        return []

    def examples(self, count: int) -> list[tuple[str, geometry.Bucket, ModelInputs]]:
        """Empty: a VAE has no previews."""
        return []

    def groups_of(self, clips: Sequence[int]) -> list[int]:
        """The group of near-duplicate files that each clip was cut from."""
        return [self._groups[clip] for clip in clips]

    def tags_of(self, clips: Sequence[int]) -> list[tuple[str, ...]]:
        """The tags of each clip."""
        return [self._tags[clip] for clip in clips]

    def foresee(self, samples: Sequence[int] | Indices, positions: Sequence[int] | Indices) -> bool:
        """False: all clips are in memory."""
        return False

    def traffic(self) -> list[Traffic]:
        """Nothing is fetched."""
        return []

    def heldout_batches(self, count: int) -> list[PixelBatch]:
        """The first `count` held-out clips, from their first frame on, one batch per bucket."""
        return self._bucketed(self.heldout[:count].tolist())

    def train_batches(self, count: int) -> list[PixelBatch]:
        """The first `count` training clips, from their first frame on, one batch per bucket."""
        return self._bucketed(self.train[:count].tolist())

    def mask_counts(self) -> list[MaskCounts]:
        """Empty: masks weigh latents."""
        return []

    def view(self, name: str) -> None:
        """None: clips of pixels are not shown."""

    def _bucketed(self, chosen: list[int]) -> list[PixelBatch]:
        buckets = dict.fromkeys(self._lengths[sample] for sample in chosen)
        groups = [[sample for sample in chosen if self._lengths[sample] == bucket] for bucket in buckets]
        return [self._batch(group, [0] * len(group)) for group in groups]

    def _start(self, number: int, position: int) -> int:
        spare = len(self.clips[number]) - int(self._lengths[number].split("x")[0])
        return int(torch.randint(spare + 1, (), generator=generator_at(self.seed, "crop", position)))

    def _batch(self, numbers: list[int], starts: list[int], positions: Sequence[int] = ()) -> PixelBatch:
        length = int(self._lengths[numbers[0]].split("x")[0])
        frames = [self.clips[n][start : start + length] for n, start in zip(numbers, starts, strict=True)]
        names = tuple(self.names[number] for number in numbers)
        return PixelBatch(to_pixels(torch.stack(frames)), names, tuple(positions))
