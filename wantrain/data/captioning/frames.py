"""The frames of a file that a captioner is shown: evenly spaced over its length, reduced to a number of pixels."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load, save

from wantrain.data.footage.captions import Annotation
from wantrain.data.footage.clips import VideoInfo
from wantrain.data.footage.decode_workers import DecodeOptions, Decoders, Job
from wantrain.data.footage.probe import Footage, probe, read_numbered
from wantrain.data.footage.survey import MOST_WORKERS
from wantrain.util import distributed
from wantrain.video import Frames


@dataclass(frozen=True)
class FrameOptions:
    """Which frames of a file are shown.

    per_second  frames a second
    most        most frames of a file: of a longer one fewer a second
    pixels      most pixels of one frame: larger ones are reduced
    """

    per_second: float
    most: int
    pixels: int


class Shown(NamedTuple):
    """Frames (F, H, W, 3) uint8 of a file, `rate` of them a second; rate 0 is a picture."""

    frames: Frames
    rate: float


def shown_numbers(info: VideoInfo, options: FrameOptions) -> tuple[list[int], float]:
    """The numbers of the frames that are shown of a file, and their rate; ([0], 0.0) for a picture.

    The file is cut into equal parts, and what a player shows in the middle of each part is taken: at least two frames,
    and none twice.
    """
    if info.is_image or info.seconds <= 0:
        return [0], 0.0
    count = min(max(2, math.ceil(info.seconds * options.per_second - 1e-6)), max(2, options.most), len(info.times))
    moments = info.start + (np.arange(count) + 0.5) * info.seconds / count
    places = np.searchsorted(info.times, moments, side="right") - 1
    numbers = sorted(set(np.clip(places, 0, len(info.times) - 1).tolist()))
    return numbers, len(numbers) / info.seconds


def read_shown(request: dict[str, Any]) -> Iterator[Frames | None]:
    """Runs in a decoder process: the shown frames of a file and their rate, as bytes, with a None before each frame.

    ValueError with the reason if the file cannot be used.
    """
    options = FrameOptions(**request["options"])
    with Footage(Path(request["path"]), request["name"], Annotation()).on_disk() as path:
        info = probe(path)
        numbers, rate = shown_numbers(info, options)
        factor = min(1.0, math.sqrt(options.pixels / (info.height * info.width)))
        size = (max(1, round(info.height * factor)), max(1, round(info.width * factor)))
        frames = []
        for frame in read_numbered(path, info, numbers, size):
            frames.append(frame)
            yield None
    content = save({"frames": np.stack(frames), "rate": np.array([rate], dtype=np.float64)})
    yield np.frombuffer(content, dtype=np.uint8)


def shown_frames(
    files: Iterable[Footage], options: FrameOptions, decode: DecodeOptions
) -> Generator[tuple[Footage, Shown | str]]:
    """Each file with its frames, or with the reason why it cannot be read; decoded ahead in processes that can be
    killed.
    """
    files = list(files)
    if not files:
        return
    about = asdict(options)
    jobs = [Job({"path": str(file.path), "name": file.name, "options": about, "windows": [{}]}) for file in files]
    workers = min(decode.workers or min(distributed.cores(), MOST_WORKERS), len(jobs))
    with (
        Decoders(read_shown, workers=workers, timeout=decode.timeout) as decoders,
        closing(decoders.decode(jobs)) as decoded,
    ):
        for file, item in zip(files, decoded, strict=True):
            if item.frames is None:
                yield file, item.reason
                continue
            tensors = load(item.frames.tobytes())
            yield file, Shown(tensors["frames"], float(tensors["rate"][0]))
