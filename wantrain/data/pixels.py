"""From files of video shards to frames and pixels: read, scaled, cropped, in [-1, 1]."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wantrain import geometry
from wantrain.data.decoding import Damaged
from wantrain.data.footage import fit_frame, probe, read_windows
from wantrain.data.shards import VideoSample
from wantrain.data.windows import Window
from wantrain.video import Frames


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
        windows = [read_window(window) for window in sample.about["windows"]]
        yield from read_windows(path, probe(path), windows, sample.about["fps"], size)


def read_window(told: Mapping[str, Any]) -> Window:
    """A window as a video shard tells it; what it says besides (which clip it belongs to) is not the reader's."""
    return Window(**{field.name: told[field.name] for field in fields(Window) if field.name in told})


def read_clips(request: dict[str, Any]) -> Iterator[Frames]:
    """What a decoder process does: the wanted windows of one file of a video shard (`request`), at their size.

    ValueError with the reason where decoding fails; `Damaged` if the bytes are not those that were sharded.
    """
    with Path(request["tar"]).open("rb") as file:
        file.seek(request["offset"])
        content = file.read(request["bytes"])
    if hashlib.sha256(content).hexdigest() != request["sha256"]:
        raise Damaged(
            f"{request['tar']} is damaged ({request['key']} has another hash); restore it, or make the shards again "
            "with shard.py"
        )
    about = {"windows": request["windows"], "fps": request["fps"]}
    yield from read_sample(VideoSample(request["key"], request["extension"], content, about), tuple(request["size"]))
