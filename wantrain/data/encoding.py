"""Video shards to latent shards, given functions from pixels to latents and from texts to embeddings."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save, save_file
from torch import Tensor
from tqdm import tqdm

from wantrain import geometry, world
from wantrain.data.footage import Reject, Window, probe, read_windows
from wantrain.data.shards import (
    EMPTY_TEXT,
    MANIFEST,
    SCHEMA,
    Index,
    ShardWriter,
    VideoSample,
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


def prepare_pixels(frames: Frames, size: tuple[int, int]) -> tuple[Tensor, float]:
    """Frames (F, H, W, 3) uint8 -> pixels (3, F, height, width) in [-1, 1], and the share cropped away.

    Resized (antialiased) to cover the target without squeezing, then cropped at the centre.
    """
    height, width, cropped = geometry.cover(*frames.shape[1:3], *size)
    pixels_FCHW = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    if (height, width) != tuple(frames.shape[1:3]):
        pixels_FCHW = F.interpolate(pixels_FCHW, (height, width), mode="bicubic", antialias=True)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    pixels_FCHW = pixels_FCHW[:, :, top : top + size[0], left : left + size[1]]
    return (pixels_FCHW / 127.5 - 1).clamp(-1, 1).transpose(0, 1).contiguous(), cropped


def read_sample(sample: VideoSample) -> list[Frames]:
    """The frames of every window of a video sample. ValueError with the reason if it cannot be decoded."""
    with tempfile.NamedTemporaryFile(suffix=f".{sample.extension}") as file:
        file.write(sample.content)
        file.flush()
        path = Path(file.name)
        windows = [Window(**window) for window in sample.about["windows"]]
        return list(read_windows(path, probe(path), windows, sample.about["fps"]))


def encode_shards(
    shards: Path,
    out: Path,
    *,
    encode_pixels: EncodePixels,
    encode_texts: EncodeTexts,
    sizes: list[tuple[int, int]],
    temporal_stride: int,
    spatial_stride: int,
    model: str,
    vae_fingerprint: str,
    text_fingerprint: str,
    rejects_limit: float,
    shard_bytes: int,
) -> dict[str, Any]:
    """Encode every clip once and every distinct caption once; returns the manifest.

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
        "sizes": [list(size) for size in sizes],
    }
    done = finished(out, "latent", settings)
    if done is not None:
        return done
    encoder = _Encoder(encode_pixels, encode_texts, sizes)
    with ShardWriter(out, "latent", shard_bytes) as writer:
        with tqdm(total=video["clips"], desc="encode", unit="clip", disable=not world.is_main()) as bar:
            for sample in read_video_shards(shards, video):
                encoder.encode(sample, writer)
                bar.update(len(sample.about["windows"]))
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
        "shards": writer.shards,
    }
    world.write_json(out / MANIFEST, manifest)
    world.say(f"{out}: {video['clips']} clips seen = {len(encoder.rows)} encoded + {len(encoder.rejects)} rejected")
    return manifest


class _Encoder:
    """One encoding run: what has been written, what was rejected, and texts that are already encoded."""

    def __init__(self, encode_pixels: EncodePixels, encode_texts: EncodeTexts, sizes: list[tuple[int, int]]) -> None:
        self.encode_pixels, self.encode_texts, self.sizes = encode_pixels, encode_texts, sizes
        self.rows: list[dict[str, Any]] = []
        self.rejects: list[Reject] = []
        self.texts: dict[str, Tensor] = {}
        self.channels = 0

    def text(self, caption: str) -> Tensor:
        """(L, D) bf16 of a caption, encoded the first time it is met."""
        if caption not in self.texts:
            self.texts[caption] = self.encode_texts([caption])[0].to(torch.bfloat16).cpu().contiguous()
        return self.texts[caption]

    def encode(self, sample: VideoSample, writer: ShardWriter) -> None:
        """Encode all windows of one file."""
        about = sample.about
        try:
            clips = read_sample(sample)
        except ValueError as error:
            numbers = range(len(about["windows"]))
            self.rejects.extend(Reject(f"{about['source']} (clip {number})", str(error)) for number in numbers)
            return
        size = geometry.nearest_size(about["height"], about["width"], self.sizes)
        for number, frames in enumerate(clips):
            pixels, cropped = prepare_pixels(frames, size)
            latents = self.encode_pixels(pixels[None])[0]
            self.channels = len(latents)
            bucket = str(geometry.Bucket(len(frames), *size))
            tensors = {"latents": latents.to(torch.bfloat16).cpu().contiguous(), "text": self.text(about["caption"])}
            told: Mapping[str, Any] = {
                "caption": about["caption"],
                "source": about["source"],
                "start": about["windows"][number]["start"],
                "bucket": bucket,
                "cropped": round(cropped, 4),
            }
            key = f"{sample.key}-{number:04d}"
            places = writer.write(key, {"safetensors": save(tensors), "json": to_json(told)})
            self.rows.append({"key": key, "bucket": bucket, "place": places["safetensors"]})

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


def read_about(content: bytes) -> dict[str, Any]:
    """The .json member of a latent sample."""
    about = json.loads(content)
    assert isinstance(about, dict)
    return about
