"""Shards to batches: samples by number, read where they lie; no worker processes, no order of its own.

Which samples come when is plan.py's business. A latent is a slice of a mapped file, so one thread that loads ahead is
faster than the pipe of a worker process (measured: 1,500 clips a second against 120).
"""

from __future__ import annotations

import hashlib
import mmap
import queue
import tarfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, load_file
from torch import Tensor

from wantrain import geometry, world
from wantrain.batch import Batch, pad_texts
from wantrain.data.encoding import read_about, read_sample
from wantrain.data.plan import Indices
from wantrain.data.shards import (
    EMPTY_TEXT,
    MANIFEST,
    Index,
    VideoSample,
    check_shards,
    file_hash,
    read_manifest,
    read_video_shards,
)
from wantrain.video import Frames

#: Shards up to this many bytes are hashed when they are opened; larger sets are checked by size (a minute per 60 GB).
HASH_LIMIT = 2 << 30


def split_sources(sources: NDArray[np.uint64], share: float, seed: int) -> tuple[Indices, Indices]:
    """(train, held-out) sample numbers: whole files are held out, so that clips of one file never straddle.

    The round(share * files) files with the smallest hash of (seed, file) are held out: a fixed choice that adding
    files changes little. They come in the order of their hashes, so that the first few are of all kinds. ValueError
    if `share` is not in [0, 1) or leaves nothing to train on.
    """
    if not 0 <= share < 1:
        raise ValueError(f"data.holdout={share} must be in [0, 1)")
    unique = np.unique(sources)
    ranked = sorted(unique.tolist(), key=lambda source: hashlib.sha256(f"{seed}:{source}".encode()).digest())
    places = {source: place for place, source in enumerate(ranked[: round(share * len(unique))])}
    place = np.array([places.get(source, -1) for source in sources.tolist()])
    held = np.flatnonzero(place >= 0)
    if len(held) == len(sources):
        raise ValueError(f"data.holdout={share} holds out all {len(unique)} files; make it smaller, or add footage")
    return np.flatnonzero(place < 0), held[np.argsort(place[held], kind="stable")]


def one_per_file(samples: Indices, sources: NDArray[np.uint64]) -> Indices:
    """Samples in another order: of each file the first one, then of each the second, and so on. `sources` by sample."""
    order = np.argsort(sources[samples], kind="stable")
    _, counts = np.unique(sources[samples], return_counts=True)
    turn = np.empty(len(samples), dtype=np.int64)
    turn[order] = np.concatenate([np.arange(count) for count in counts]) if len(counts) else []
    return samples[np.argsort(turn, kind="stable")]


class LatentData:
    """Latent shards as samples by number.

    train, heldout   numbers of the training and of the held-out samples
    buckets          bucket number of each training sample, in the order of `train`
    bucket_names     its name, "FxHxW" in pixels
    """

    def __init__(
        self, *, shards: str | Path, holdout: float = 0.05, caption_dropout: float = 0.1, seed: int = 0
    ) -> None:
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"data.caption_dropout={caption_dropout} must be in [0, 1]")
        self.folder, self.caption_dropout, self.seed = Path(shards).expanduser(), caption_dropout, seed
        self.manifest = read_manifest(self.folder, "latent")
        self.fingerprint = file_hash(self.folder / MANIFEST)
        total = sum(shard["bytes"] for shard in self.manifest["shards"])
        check_shards(self.folder, self.manifest, hashes=total <= HASH_LIMIT)
        self.index = Index.read(self.folder)
        self.train, self.heldout = split_sources(self.index.source, holdout, seed)
        self.buckets = self.index.bucket[self.train]
        self.empty_text: Tensor = load_file(self.folder / EMPTY_TEXT)["text"].float()
        self._maps: dict[int, mmap.mmap] = {}

    @property
    def bucket_names(self) -> list[str]:
        """The bucket of each training sample."""
        return [self.manifest["buckets"][bucket] for bucket in self.buckets]

    def load(self, samples: Sequence[int] | Indices, positions: Sequence[int] | Indices) -> Batch:
        """Training samples (numbers into `train`) of one bucket, for places in the run; captions dropped by place."""
        tensors = [self._read(int(self.train[sample])) for sample in samples]
        texts = [
            self.empty_text if self._dropped(int(position)) else text
            for (_, text), position in zip(tensors, positions, strict=True)
        ]
        names = tuple(self.index.name(int(self.train[sample])) for sample in samples)
        return self._batch([latents for latents, _ in tensors], texts, names, [int(p) for p in positions])

    def heldout_batches(self, count: int) -> list[Batch]:
        """`count` held-out samples at most, of as many files as there are; one batch per bucket, captions as they are.

        The positions of their batches are their numbers in the index, also below.
        """
        return self._bucketed(one_per_file(self.heldout, self.index.source)[:count])

    def train_batches(self, count: int) -> list[Batch]:
        """`count` training samples chosen alike, to be measured beside them; files in the order of their hashes."""
        by_file = self.train[np.argsort(self.index.source[self.train], kind="stable")]
        return self._bucketed(one_per_file(by_file, self.index.source)[:count])

    def files(self, samples: Sequence[int]) -> list[int]:
        """The file that each sample (a number in the index) was cut from, as a number."""
        return [int(self.index.source[sample]) for sample in samples]

    def tags(self, samples: Sequence[int]) -> list[tuple[str, ...]]:
        """The tags of each sample (a number in the index), if its footage came with any."""
        return [tuple(self._about(sample).get("tags") or ()) for sample in samples]

    def _bucketed(self, chosen: Indices) -> list[Batch]:
        batches = []
        for bucket in np.unique(self.index.bucket[chosen]):
            samples = chosen[self.index.bucket[chosen] == bucket].tolist()
            latents, texts = zip(*(self._read(sample) for sample in samples), strict=True)
            names = tuple(self.index.name(sample) for sample in samples)
            batches.append(self._batch(list(latents), list(texts), names, samples))
        return batches

    def captions(self) -> list[str]:
        """Up to 200 distinct captions, those of held-out clips first: prompts for previews."""
        order = [*self.heldout[:100].tolist(), *self.train[:100].tolist()]
        return list(dict.fromkeys(self._about(sample)["caption"] for sample in order))

    def _batch(self, latents: list[Tensor], texts: list[Tensor], names: tuple[str, ...], positions: list[int]) -> Batch:
        return Batch(torch.stack(latents), pad_texts(texts), names, tuple(positions))

    def _dropped(self, position: int) -> bool:
        generator = world.generator(self.seed, "caption", position)
        return bool(torch.rand((), generator=generator) < self.caption_dropout)

    def _map(self, shard: int) -> mmap.mmap:
        if shard not in self._maps:
            with (self.folder / self.manifest["shards"][shard]["name"]).open("rb") as file:
                self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[shard]

    def _read(self, sample: int) -> tuple[Tensor, Tensor]:
        """(latents (C, T, H, W), text (L, D)) float32 of one sample; ValueError if they are not what was promised."""
        offset, size = int(self.index.offset[sample]), int(self.index.size[sample])
        where = f"{self.manifest['shards'][self.index.shard[sample]]['name']}, {self.index.name(sample)}"
        try:
            tensors = load(self._map(int(self.index.shard[sample]))[offset : offset + size])
        except Exception as error:  # safetensors raises its own class for every kind of damage
            raise ValueError(f"{self.folder}/{where}: damaged ({error}); encode the shards again") from error
        bucket = geometry.Bucket(*map(int, self.manifest["buckets"][self.index.bucket[sample]].split("x")))
        strides = self.manifest["temporal_stride"], self.manifest["spatial_stride"]
        shape = (self.manifest["latent_channels"], *geometry.latent_shape(bucket, *strides))
        latents, text = tensors["latents"].float(), tensors["text"].float()
        if latents.shape != shape or not torch.isfinite(latents).all() or not torch.isfinite(text).all():
            raise ValueError(
                f"{self.folder}/{where}: latents {tuple(latents.shape)} (expected {shape}) or text hold NaN or "
                "infinity, or have another shape; encode the shards again"
            )
        return latents, text

    def _about(self, sample: int) -> dict[str, Any]:
        """The .json member, which follows the .safetensors member in its tar."""
        content, block = self._map(int(self.index.shard[sample])), tarfile.BLOCKSIZE
        end = int(self.index.offset[sample] + self.index.size[sample])
        header = -(-end // block) * block
        info = tarfile.TarInfo.frombuf(content[header : header + block], "utf-8", "strict")
        return read_about(content[header + block : header + block + info.size])


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
        sources: list[int] = []
        for sample in read_video_shards(self.folder, self.manifest):
            size = geometry.nearest_size(sample.about["height"], sample.about["width"], sizes)
            for number, frames in enumerate(self._decode(sample, size)):
                self.clips.append(torch.from_numpy(frames.copy()).permute(3, 0, 1, 2).contiguous())
                self.names.append(f"{sample.key}-{number:04d}")
                lengths.append(str(geometry.Bucket(min(len(frames), num_frames), *size)))
                sources.append(int(sample.key, 16))
        self._lengths, self._bucket_list = lengths, list(dict.fromkeys(lengths))
        self.train, self.heldout = split_sources(np.array(sources, dtype=np.uint64), holdout, seed)
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


def prefetch(requests: Iterator[Callable[[], Batch]], depth: int = 2) -> Prefetch:
    """Answer requests in order, one thread ahead of the consumer by up to `depth`; its errors are raised here."""
    return Prefetch(requests, depth)


class Prefetch(Iterator[Batch]):
    """Batches in order from one thread that loads ahead. `close` ends the thread; so do the last reference and exit.

    The thread is waited for, because one that is inside torch while the interpreter is taken down aborts the process
    with another exit code.
    """

    def __init__(self, requests: Iterator[Callable[[], Batch]], depth: int) -> None:
        self._ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)
        stopped = threading.Event()
        # The thread must not hold `self`, or it would never be the last reference that goes.
        thread = threading.Thread(target=_answer, args=(requests, self._ready, stopped), name="prefetch", daemon=True)
        self._thread = thread
        self.close = weakref.finalize(self, _end, thread, stopped)
        thread.start()

    def __next__(self) -> Batch:
        if not self.close.alive:
            raise StopIteration
        item = self._next_item()
        if item is not None and not isinstance(item, BaseException):
            return item
        self.close()
        raise StopIteration if item is None else item

    def _next_item(self) -> Batch | BaseException | None:
        """What comes next; ValueError if the thread is gone without a word, for then nothing ever would."""
        while True:
            try:
                return self._ready.get(timeout=1.0)
            except queue.Empty:
                if not self._thread.is_alive() and self._ready.empty():
                    raise ValueError(
                        "the thread that loads data is gone, and has left no batch; the last checkpoint is good: the "
                        "same command goes on from it"
                    ) from None


def _answer(
    requests: Iterator[Callable[[], Batch]],
    ready: queue.Queue[Batch | BaseException | None],
    stopped: threading.Event,
) -> None:
    """The thread of a Prefetch: answers in order, then an error or None."""

    def put(item: Batch | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                break
            except queue.Full:
                continue

    try:
        for request in requests:
            put(request())
            if stopped.is_set():
                return
        put(None)
    except BaseException as error:  # handed to the consumer, who raises it
        put(error)


def _end(thread: threading.Thread, stopped: threading.Event) -> None:
    stopped.set()
    if thread is not threading.current_thread():
        thread.join()
