"""Frames of the files in video shards: decoded, scaled, cropped; and frames of any size as pixels of a given size."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wantrain import geometry
from wantrain.data.footage.clips import Window
from wantrain.data.footage.decode_process import Damaged
from wantrain.data.footage.probe import ReadOptions, fit_frame, probe, read_mask_windows, read_windows
from wantrain.data.footage.video_shards import VideoSample
from wantrain.video import Frames, to_pixels


def prepare_pixels(frames: Frames, size: tuple[int, int]) -> tuple[Tensor, float]:
    """Frames (F, H, W, 3) uint8 -> pixels (3, F, height, width) in [-1, 1], and the share that is cropped away.

    Every frame is scaled to cover `size` (height, width) and cropped at the centre (see `fit_frame`).
    """
    *_, cropped = geometry.cover(frames.shape[1], frames.shape[2], *size)
    return to_pixels(torch.from_numpy(np.stack([fit_frame(frame, size) for frame in frames]))), cropped


def read_sample(sample: VideoSample, size: tuple[int, int] | None = None) -> Iterator[Frames]:
    """The frames (F, H, W, 3) of each window of a video sample in turn, brought to `size` if one is given.

    ValueError with the reason if decoding fails.
    """
    with _as_file(sample.content, sample.extension) as path:
        windows = [read_window(window) for window in sample.about["windows"]]
        yield from read_windows(path, probe(path), windows, sample.about["fps"], size, ReadOptions.of(sample.about))


def read_window(row: Mapping[str, Any]) -> Window:
    """A window from its row in a video shard; further keys, such as the clip it belongs to, are ignored."""
    return Window(**{field.name: row[field.name] for field in fields(Window) if field.name in row})


def read_clips(request: dict[str, Any]) -> Iterator[Frames]:
    """Runs in a decoder process: the requested windows of one file of a video shard, at the requested size.

    Where masks are asked for (`request["masks"]`), frames have a fourth channel: the brightness of the mask that
    `request["mask"]` describes, or 0 where that is None.
    ValueError with the reason if decoding fails; `Damaged` if the bytes are not those that were sharded.
    """
    windows, size = [read_window(window) for window in request["windows"]], tuple(request["size"])
    with _member(request, request) as path:
        info = probe(path)
        clips = read_windows(path, info, windows, request["fps"], size, ReadOptions.of(request))
        if not request["masks"]:
            yield from clips
            return
        if request["mask"] is None:
            for frames in clips:
                yield np.concatenate([frames, np.zeros_like(frames[..., :1])], axis=-1)
            return
        with _member(request, request["mask"]) as mask:
            masks = read_mask_windows(mask, probe(mask), info, windows, request["fps"], size)
            for frames, painted in zip(clips, masks, strict=True):
                gray = painted.mean(axis=-1, keepdims=True).round().astype(np.uint8)
                yield np.concatenate([frames, np.broadcast_to(gray, (*frames.shape[:3], 1))], axis=-1)


@contextmanager
def _member(request: Mapping[str, Any], member: Mapping[str, Any]) -> Iterator[Path]:
    """A tar member (offset, bytes, extension, sha256) as a file of its own; `Damaged` if its hash differs."""
    with Path(request["tar"]).open("rb") as file:
        file.seek(member["offset"])
        content = file.read(member["bytes"])
    if hashlib.sha256(content).hexdigest() != member["sha256"]:
        raise Damaged(
            f"{Path(request['tar']).resolve()} is damaged ({request['key']} has another hash); restore it, or make the "
            "shards again with shard.py"
        )
    with _as_file(content, member["extension"]) as path:
        yield path


@contextmanager
def _as_file(content: bytes, extension: str) -> Iterator[Path]:
    """Bytes as a temporary file with a name that decoders accept."""
    with tempfile.NamedTemporaryFile(suffix=f".{extension}") as file:
        file.write(content)
        file.flush()
        yield Path(file.name)
