"""Footage on disk: find it with its captions, probe what is really in it, choose frames by timestamp.

decord is the reader, always asked by timestamp: headers lie about frame counts, and frames before an edit list have
negative timestamps that no player shows. A file that cannot be used is a Reject with its reason, never silence.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import decord
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from wantrain import geometry
from wantrain.video import Frames

VIDEOS = frozenset((".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif"))
IMAGES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp"))

#: Timestamps are compared with this tolerance (seconds): containers round them to their own time base.
EPSILON = 1e-4


@dataclass(frozen=True)
class Footage:
    """One file and its caption; `name` is its path below the source folder, with forward slashes."""

    path: Path
    name: str
    caption: str


@dataclass(frozen=True)
class Reject:
    """A file, or a clip of one, that is not used, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Probe:
    """What a file shows: height and width after rotation, and when (seconds) each displayed frame begins.

    `frames` are those frames' numbers for the decoder; `end` is when the last one ends. An image has one frame.
    """

    height: int
    width: int
    times: NDArray[np.float64]
    frames: NDArray[np.int64]
    end: float

    @property
    def is_image(self) -> bool:
        return len(self.times) == 1


@dataclass(frozen=True)
class Window:
    """A clip of a file: `num_frames` frames at the model's rate from `start` seconds on."""

    start: float
    num_frames: int


def find_footage(
    source: Path, *, caption_missing: str = "error", caption_prefix: str = "", caption_default: str = ""
) -> tuple[list[Footage], list[Reject]]:
    """All videos and images below `source`, sorted, with captions; and those rejected for lack of one.

    A caption comes from `metadata.jsonl` in `source` ({"path" or "file_name", "caption" or "text"} per line) or from
    NAME.txt beside the file, else `caption_default`, else `caption_missing` decides: "error", "skip" or "empty".
    ValueError if there is nothing, or a caption is missing under "error", or metadata names a file that is absent.
    """
    if not source.is_dir():
        raise ValueError(f"source={source} is not a folder")
    listed = _read_metadata(source)
    files = [
        path
        for path in sorted(source.rglob("*"))
        if path.suffix.lower() in VIDEOS | IMAGES
        and not any(part.startswith(".") for part in path.relative_to(source).parts)
    ]
    if not files:
        raise ValueError(f"source={source} holds no videos or images ({' '.join(sorted(VIDEOS | IMAGES))})")
    footage, rejects, without = [], [], []
    for path in files:
        name = path.relative_to(source).as_posix()
        caption = listed.get(name) or _caption_beside(path) or caption_default
        if caption or caption_missing == "empty":
            footage.append(Footage(path, name, (caption_prefix + caption).strip()))
        elif caption_missing == "skip":
            rejects.append(Reject(name, "no caption"))
        else:
            without.append(name)
    if without:
        raise ValueError(
            f"{len(without)} of {len(files)} files have no caption (first: {without[0]}); write it into "
            f"{Path(without[0]).with_suffix('.txt')} or metadata.jsonl, or give caption.default=TEXT, "
            "caption.missing=skip or caption.missing=empty"
        )
    return footage, rejects


def _read_metadata(source: Path) -> dict[str, str]:
    """Captions by file name from metadata.jsonl, if it is there."""
    path, captions = source / "metadata.jsonl", {}
    if not path.is_file():
        return {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name = row.get("path") or row["file_name"]
            caption = row["caption"] if "caption" in row else row["text"]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f'{path} line {number} is not {{"path": ..., "caption": ...}} ({type(error).__name__}: {error})'
            ) from error
        if not (source / name).is_file():
            raise ValueError(f"{path} line {number} names {name}, which is not in {source}")
        captions[Path(name).as_posix()] = str(caption)
    return captions


def _caption_beside(path: Path) -> str:
    text = path.with_suffix(".txt")
    try:
        return text.read_text(encoding="utf-8").strip() if text.is_file() else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{text} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error


def _open(path: Path) -> decord.VideoReader:
    return decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)


def probe(path: Path) -> Probe:
    """Look into a file and decode one frame of it. ValueError with the reason if that fails."""
    if path.suffix.lower() in IMAGES:
        height, width = _read_image(path).shape[:2]
        return Probe(height, width, np.zeros(1), np.zeros(1, dtype=np.int64), 0.0)
    if path.stat().st_size == 0:
        raise ValueError("the file is empty")
    try:
        reader = _open(path)
        spans = np.asarray(reader.get_frame_timestamp(range(len(reader))), dtype=np.float64).reshape(-1, 2)
        # Shown are the frames from time zero on: those before an edit list decode, but no player shows them.
        shown = np.flatnonzero(spans[:, 0] > -EPSILON)
        if len(shown) == 0:
            raise ValueError("it has no frame that is displayed")
        order = shown[np.argsort(spans[shown, 0], kind="stable")]
        height, width = reader[int(order[0])].shape[:2]
    except Exception as error:  # every decoder failure has a class of its own
        raise ValueError(f"cannot be decoded: {_first_line(error)}") from error
    times = spans[order, 0]
    return Probe(height, width, times, order.astype(np.int64), max(float(spans[order[-1], 1]), float(times[-1])))


def cut_windows(found: Probe, *, num_frames: int, fps: float, clips: str = "all") -> list[Window]:
    """The clips of a file: each the largest 4k+1 frames, up to `num_frames`, that its time holds at `fps`.

    "all" cuts one after another, "first" and "middle" take one. ValueError if a video is shorter than 5 frames.
    """
    if found.is_image:
        return [Window(0.0, 1)]
    start = float(found.times[0])
    # Frame k is wanted at start + k/fps, and must begin before the video ends.
    available = int(np.floor((found.end - start) * fps - EPSILON * fps)) + 1
    length = geometry.floor_num_frames(min(available, num_frames))
    if length < min(5, num_frames):
        raise ValueError(f"it lasts {found.end - start:.2f} s, less than 5 frames at {fps:g} fps")
    if clips == "first":
        return [Window(start, length)]
    if clips == "middle":
        return [Window(start + (available - length) // 2 / fps, length)]
    count = max(1, available // length)
    return [Window(start + i * length / fps, length) for i in range(count)]


def frames_on_screen(found: Probe, window: Window, fps: float) -> NDArray[np.int64]:
    """Which decoder frames a window shows: at each wanted time, the last frame that has begun."""
    wanted = window.start + np.arange(window.num_frames) / fps
    places = np.searchsorted(found.times, wanted + EPSILON, side="right") - 1
    return found.frames[np.clip(places, 0, None)]


def read_windows(path: Path, found: Probe, windows: list[Window], fps: float) -> Iterator[Frames]:
    """The frames (F, H, W, 3) uint8 of each window in turn. ValueError with the reason if decoding fails."""
    if found.is_image:
        for _ in windows:
            yield _read_image(path)[None]
        return
    try:
        reader = _open(path)
        for window in windows:
            numbers = frames_on_screen(found, window, fps)
            unique, inverse = np.unique(numbers, return_inverse=True)
            yield reader.get_batch(unique.tolist()).asnumpy()[inverse]
    except Exception as error:  # every decoder failure has a class of its own
        raise ValueError(f"cannot be decoded: {_first_line(error)}") from error


def _read_image(path: Path) -> Frames:
    """An image as it is meant to be seen: turned by its EXIF tag, transparency over white."""
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # PIL raises many classes for damaged files
        raise ValueError(f"cannot be read as an image: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
