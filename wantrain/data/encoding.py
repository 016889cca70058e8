"""Video shards to latent shards, given functions from pixels to latents and from texts to embeddings."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save, save_file
from torch import Tensor
from tqdm import tqdm

from wantrain import geometry, world
from wantrain.data.footage import Reject, Window, fit_frame, probe, read_windows
from wantrain.data.ledger import Ledger
from wantrain.data.shards import (
    EMPTY_TEXT,
    INDEX,
    MANIFEST,
    SCHEMA,
    Index,
    ShardWriter,
    VideoSample,
    describe_file,
    file_hash,
    finished,
    pack_ids,
    read_manifest,
    read_video_shards,
    to_json,
    write_rejects,
)
from wantrain.video import Frames

EncodePixels = Callable[[Tensor], Tensor]
EncodeTexts = Callable[[list[str]], list[Tensor]]

#: Encoded captions kept in memory: clips of one file share theirs, and a few thousand tokens x 4096 are a gigabyte.
TEXTS_KEPT = 1000
#: Clips are encoded together up to this many pixels: large ones one by one, small ones in batches, since a
#: convolution over one small clip is six times slower per clip on a CPU.
PIXELS_TOGETHER = 1 << 20


def prepare_pixels(frames: Frames, size: tuple[int, int]) -> tuple[Tensor, float]:
    """Frames (F, H, W, 3) uint8 -> pixels (3, F, height, width) in [-1, 1], and the share cropped away.

    Every frame is scaled to cover the target without squeezing, and cropped at the centre (see `fit_frame`).
    """
    *_, cropped = geometry.cover(frames.shape[1], frames.shape[2], *size)
    return to_pixels(np.stack([fit_frame(frame, size) for frame in frames])), cropped


def to_pixels(frames: Frames) -> Tensor:
    """Frames (F, H, W, 3) uint8 -> pixels (3, F, H, W) float32 in [-1, 1]."""
    pixels_CFHW = torch.from_numpy(frames.copy()).permute(3, 0, 1, 2).float()
    return (pixels_CFHW / 127.5 - 1).contiguous()


def read_sample(sample: VideoSample, size: tuple[int, int] | None = None) -> Iterator[Frames]:
    """The frames of every window of a video sample in turn, brought to `size` if one is given.

    ValueError with the reason where decoding fails.
    """
    with tempfile.NamedTemporaryFile(suffix=f".{sample.extension}") as file:
        file.write(sample.content)
        file.flush()
        path = Path(file.name)
        windows = [Window(**window) for window in sample.about["windows"]]
        yield from read_windows(path, probe(path), windows, sample.about["fps"], size)


def encode_shards(
    shards: Path,
    out: Path,
    *,
    encode_pixels: EncodePixels,
    encode_texts: EncodeTexts,
    sizes: geometry.Buckets,
    temporal_stride: int,
    spatial_stride: int,
    model: str,
    vae_fingerprint: str,
    text_fingerprint: str,
    rejects_limit: float,
    shard_bytes: int,
) -> dict[str, Any]:
    """Encode every clip, and a caption that comes again soon only once; returns the manifest.

    `encode_pixels(pixels_BCTHW in [-1, 1]) -> latents`; `encode_texts(list of str) -> list of (L, D)`. Latents and
    texts are stored in bf16, texts without padding. A clip that cannot be decoded goes to rejects.jsonl. ValueError
    if more than `rejects_limit` are, if the shards were made for another model, or if `out` holds something else.
    """
    video = read_manifest(shards, "video")
    if video["settings"]["model"] != model:
        raise ValueError(
            f"shards={shards} were cut for model={video['settings']['model']} (its frame rate and length), "
            f"not for model={model}; run shard.py with model={model}"
        )
    settings = {
        "model": model,
        "shards": file_hash(shards / MANIFEST),
        "vae_fingerprint": vae_fingerprint,
        "text_encoder_fingerprint": text_fingerprint,
        "sizes": sizes.told(),
    }
    done = finished(out, "latent", settings)
    if done is not None:
        return done
    encoder = _Encoder(encode_pixels, encode_texts, sizes, (temporal_stride, spatial_stride))
    with ShardWriter(out, "latent", shard_bytes) as writer:
        with tqdm(total=video["clips"], desc="encode", unit="clip", disable=not world.is_main()) as bar:
            for sample in read_video_shards(shards, video):
                encoder.add(sample)
                bar.update(len(sample.about["windows"]))
                encoder.write(writer)
            encoder.write(writer, rest=True)
        empty = encoder.text("")
        save_file({"text": empty}, out / EMPTY_TEXT)
    write_rejects(out, encoder.rejects, video["clips"], rejects_limit, "clip")
    buckets = list(dict.fromkeys(row["bucket"] for row in encoder.rows))
    encoder.index(buckets).write(out)
    manifest = {
        "schema": SCHEMA,
        "kind": "latent",
        "settings": settings,
        "vae_fingerprint": vae_fingerprint,
        "text_encoder_fingerprint": text_fingerprint,
        "temporal_stride": temporal_stride,
        "spatial_stride": spatial_stride,
        "latent_channels": encoder.channels,
        "text_dim": int(empty.shape[-1]),
        "buckets": buckets,
        "clips": len(encoder.rows),
        "clips_rejected": len(encoder.rejects),
        "ledger": encoder.ledger.told(),
        "cropped": encoder.ledger.told_crops(),
        "shards": writer.shards,
        "files": [describe_file(out / INDEX), describe_file(out / EMPTY_TEXT)],
    }
    world.write_json(out / MANIFEST, manifest)
    world.say(f"{out}: {video['clips']} clips seen = {len(encoder.rows)} encoded + {len(encoder.rejects)} rejected")
    for line in encoder.ledger.summary():
        world.say(f"  {line}")
    return manifest


@dataclass(frozen=True)
class _Clip:
    """One window of a file, read and waiting to be encoded."""

    key: str
    about: dict[str, Any]
    number: int
    frames: Frames

    @property
    def bucket(self) -> geometry.Bucket:
        """Its length and size."""
        return geometry.Bucket(*self.frames.shape[:3])

    @property
    def pixels(self) -> int:
        """Pixels of all its frames."""
        return int(np.prod(self.frames.shape[:3]))


class _Encoder:
    """One encoding run: what has been written, what was rejected, and texts that are already encoded."""

    def __init__(
        self,
        encode_pixels: EncodePixels,
        encode_texts: EncodeTexts,
        sizes: geometry.Buckets,
        strides: tuple[int, int],
    ) -> None:
        self.encode_pixels, self.encode_texts = encode_pixels, encode_texts
        self.sizes, self.strides = sizes, strides
        self.rows: list[dict[str, Any]] = []
        self.rejects: list[Reject] = []
        self.waiting: list[_Clip] = []
        self.texts: dict[str, Tensor] = {}
        self.channels = 0
        self.ledger = Ledger()

    def text(self, caption: str) -> Tensor:
        """(L, D) bf16 of a caption, from memory if it is one of the last TEXTS_KEPT."""
        if caption not in self.texts:
            if len(self.texts) >= TEXTS_KEPT:
                del self.texts[next(iter(self.texts))]
            text = self.encode_texts([caption])[0].to(torch.bfloat16).cpu().contiguous()
            if not torch.isfinite(text).all():
                raise ValueError(f"the text encoder gave NaN or infinity for {caption!r}; try precision=fp32")
            self.texts[caption] = text
        return self.texts[caption]

    def add(self, sample: VideoSample) -> None:
        """Read all windows of one file; from the first that cannot be decoded on, they are rejects."""
        about = sample.about
        count, longest = len(about["windows"]), max(window["num_frames"] for window in about["windows"])
        try:
            size = self.sizes.choose(longest, about["height"], about["width"])
        except ValueError as error:
            self._reject(about, range(count), Reject("", str(error), bad=False, kind="too small"))
            return
        clips = read_sample(sample, size)
        for number in range(count):
            try:
                frames = next(clips)
            except ValueError as error:
                self._reject(about, range(number, count), Reject("", str(error)))
                return
            self.waiting.append(_Clip(sample.key, about, number, frames))

    def _reject(self, about: dict[str, Any], numbers: Iterable[int], why: Reject) -> None:
        """Some windows of a file are not used."""
        for number in numbers:
            self.rejects.append(replace(why, name=f"{about['source']} (clip {number})"))
            self.ledger.drop_clip(why.kind, _seconds(about, number))

    def write(self, writer: ShardWriter, *, rest: bool = False) -> None:
        """Encode and write the clips that wait, in their order, once they are enough for a batch (or the `rest`)."""
        if not self.waiting or not (rest or sum(clip.pixels for clip in self.waiting) >= PIXELS_TOGETHER):
            return
        latents = self._latents()
        for clip, latent in zip(self.waiting, latents, strict=True):
            self._write_clip(clip, latent, writer)
        self.waiting.clear()

    def _latents(self) -> list[Tensor]:
        """The latents of the waiting clips, those of one bucket encoded together: (C, T, H, W) bf16 each."""
        latents: dict[int, Tensor] = {}
        for bucket in dict.fromkeys(clip.bucket for clip in self.waiting):
            members = [i for i, clip in enumerate(self.waiting) if clip.bucket == bucket]
            together = max(1, PIXELS_TOGETHER // (bucket.num_frames * bucket.height * bucket.width))
            for some in (members[start : start + together] for start in range(0, len(members), together)):
                pixels = torch.stack([to_pixels(self.waiting[i].frames) for i in some])
                latents.update(zip(some, self.encode_pixels(pixels).to(torch.bfloat16).cpu(), strict=True))
        return [latents[i].contiguous() for i in range(len(self.waiting))]

    def _write_clip(self, clip: _Clip, latents: Tensor, writer: ShardWriter) -> None:
        """Write one window's latents, text and origin."""
        about, bucket = clip.about, clip.bucket
        *_, cropped = geometry.cover(about["height"], about["width"], bucket.height, bucket.width)
        shape = geometry.latent_shape(bucket, *self.strides)
        if tuple(latents.shape[1:]) != shape or not torch.isfinite(latents).all():
            raise ValueError(
                f"{about['source']} (clip {clip.number}): the VAE gave NaN, infinity or the shape "
                f"{tuple(latents.shape)}, wanted were {shape} per channel"
            )
        self.channels = len(latents)
        self.ledger.use_clip(_seconds(about, clip.number), cropped)
        told = {
            "caption": about["caption"],
            "source": about["source"],
            "start": about["windows"][clip.number]["start"],
            "bucket": str(bucket),
            "cropped": round(cropped, 4),
        }
        tensors = {"latents": latents, "text": self.text(about["caption"])}
        key = f"{clip.key}-{clip.number:04d}"
        places = writer.write(key, {"safetensors": save(tensors), "json": to_json(told)})
        self.rows.append({"key": key, "bucket": str(bucket), "place": places["safetensors"]})

    def index(self, buckets: list[str]) -> Index:
        """The columns of what has been written."""
        shard, offset, size = (np.array([row["place"][i] for row in self.rows]) for i in range(3))
        return Index(
            shard=shard.astype(np.int32),
            offset=offset.astype(np.int64),
            size=size.astype(np.int64),
            bucket=np.array([buckets.index(row["bucket"]) for row in self.rows], dtype=np.int32),
            source=np.array([int(row["key"][:16], 16) for row in self.rows], dtype=np.uint64),
            ids=pack_ids([row["key"] for row in self.rows]),
        )


def _seconds(about: dict[str, Any], number: int) -> float:
    """How long a window is, at the rate that it was cut at; an image takes no time."""
    window = Window(**about["windows"][number])
    return 0.0 if window.num_frames == 1 else window.num_frames * window.stride / float(about["fps"])


def read_about(content: bytes) -> dict[str, Any]:
    """The .json member of a latent sample."""
    about = json.loads(content)
    assert isinstance(about, dict)
    return about
