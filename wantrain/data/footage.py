"""Footage on disk: find it with its captions, probe what is really in it, choose frames by timestamp.

decord is the reader, always asked by timestamp: headers lie about frame counts, and frames before an edit list have
negative timestamps that no player shows. Three things about it were measured against PyAV and shape this file:
- It is only ever read forwards from the first frame. Where it seeks (also in `get_batch` and `skip_frames`) it lands
  on other frames than asked for after an edit list and in open groups of pictures, which x265 makes by default. Read
  forwards it gives exactly the displayed frames.
- It decodes ahead without limit while its reader is idle, so a reader is never kept open while something else is done.
- With more than one thread it fails on healthy VP9 files.
A file that cannot be used is a Reject with its reason, never silence.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import decord
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps

from wantrain import geometry
from wantrain.video import Frames

VIDEOS = frozenset((".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif"))
IMAGES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp"))

#: Timestamps are compared with this tolerance (seconds): Matroska and WebM round them to whole milliseconds, and
#: decord gives them in float32 (half a millisecond of error after two hours).
EPSILON = 1e-3

#: Frames read in one go, in bytes; a longer file is opened again for the rest and read forwards to it.
SITTING_BYTES = 2 << 30


@dataclass(frozen=True)
class Footage:
    """One file and its caption; `name` is its path below the source folder, with forward slashes."""

    path: Path
    name: str
    caption: str


@dataclass(frozen=True)
class Reject:
    """A file, or a clip of one, that is not used, and why. Only `bad` ones count towards rejects.limit."""

    name: str
    reason: str
    bad: bool = True


@dataclass(frozen=True)
class Probe:
    """What a file shows: height and width after rotation, and when (seconds) each displayed frame begins.

    `times` ascend; `end` is when the last frame ends. An image has one frame.
    """

    height: int
    width: int
    times: NDArray[np.float64]
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
    files = _find_files(source)
    if not files:
        raise ValueError(f"source={source} holds no videos or images ({' '.join(sorted(VIDEOS | IMAGES))})")
    footage, rejects, without = [], [], []
    for path in files:
        name = _name(path, source)
        own = listed.get(path) or _caption_beside(path)
        caption = own or " ".join(caption_default.split())
        if not path.is_file():
            rejects.append(Reject(name, "is not a file (a folder, a pipe or a broken link)"))
        elif not own and _is_mask(path):
            rejects.append(Reject(name, f"is the mask of {path.name}, not footage", bad=False))
        elif caption or caption_missing == "empty":
            footage.append(Footage(path, name, _with_prefix(caption_prefix, caption)))
        elif caption_missing == "skip":
            rejects.append(Reject(name, "no caption", bad=False))
        else:
            without.append(name)
    if without:
        raise ValueError(
            f"{len(without)} of {len(files)} files have no caption (first: {without[0]}); write it into "
            f"{Path(without[0]).with_suffix('.txt')} or metadata.jsonl, or give caption.default=TEXT, "
            "caption.missing=skip or caption.missing=empty"
        )
    return footage, rejects


def _find_files(source: Path) -> list[Path]:
    """Everything below `source` that is named like a video or image, sorted; hidden files and folders are not."""
    found: list[Path] = []
    for folder, folders, names in os.walk(source):
        folders[:] = [name for name in folders if not name.startswith(".")]
        # A folder with such a name is listed too, to be rejected by name instead of passed over.
        paths = [Path(folder, name) for name in [*names, *folders] if not name.startswith(".")]
        found.extend(path for path in paths if path.suffix.lower() in VIDEOS | IMAGES)
    return sorted(found)


def _name(path: Path, source: Path) -> str:
    """The path below `source` with forward slashes; bytes that are not UTF-8 are written as escapes."""
    return os.fsencode(path.relative_to(source).as_posix()).decode("utf-8", "backslashreplace")


def _is_mask(path: Path) -> bool:
    """True for masks/NAME where NAME lies beside masks/: a mask of that footage, by the field's convention."""
    return path.parent.name == "masks" and (path.parent.parent / path.name).is_file()


def _with_prefix(prefix: str, caption: str) -> str:
    """Prefix and caption, with a space between them where the prefix ends like a word of a spaced script."""
    if prefix and caption and prefix[-1].isascii() and not prefix[-1].isspace():
        prefix += " "
    return (prefix + caption).strip()


def _read_metadata(source: Path) -> dict[Path, str]:
    """Captions by file from metadata.jsonl, if it is there. ValueError names the line that is wrong."""
    table, captions = source / "metadata.jsonl", {}
    if not table.is_file():
        return {}
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for an end of line.
    for number, line in enumerate(_read_text(table).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name = row["path"] if "path" in row else row["file_name"]
            below = os.path.relpath(name, source) if Path(name).is_absolute() else os.path.normpath(name)
            caption = row["caption"] if "caption" in row else row["text"]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f'{table} line {number} is not {{"path": ..., "caption": ...}} ({type(error).__name__}: {error})'
            ) from error
        path = source / below
        if not path.is_file():
            raise ValueError(f"{table} line {number} names {name}, which is not in {source}")
        if path.suffix.lower() not in VIDEOS | IMAGES or Path(below).parts[0] == "..":
            raise ValueError(f"{table} line {number} names {name}, which is no video or image below {source}")
        if path in captions:
            raise ValueError(f"{table} line {number} names {name} for the second time; remove one of the lines")
        captions[path] = " ".join(str(caption or "").split())
    return captions


def _caption_beside(path: Path) -> str:
    """The text of NAME.txt as one line; empty where there is none."""
    text = path.with_suffix(".txt")
    return " ".join(_read_text(text).split()) if text.is_file() else ""


def _read_text(path: Path) -> str:
    """A UTF-8 file, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error


def _open(path: Path) -> decord.VideoReader:
    # fault_tol: where a frame cannot be decoded, decord would give its neighbour instead; this makes it raise.
    return decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1, fault_tol=1e-9)


def probe(path: Path, *, whole: bool = False) -> Probe:
    """Look into a file and decode its first frame, or all of them if `whole`. ValueError with the reason if it fails.

    A damaged file is refused as a whole: how many frames decord gives before it reports damage is a race.
    """
    if path.suffix.lower() in IMAGES:
        height, width = _read_image(path).shape[:2]
        return Probe(height, width, np.zeros(1), 0.0)
    if path.stat().st_size == 0:
        raise ValueError("the file is empty")
    try:
        reader = _open(path)
        spans = np.asarray(reader.get_frame_timestamp(range(len(reader))), dtype=np.float64).reshape(-1, 2)
        height, width = _next_frame(reader).shape[:2]
        for _ in range(int((spans[:, 0] > -EPSILON).sum()) - 1 if whole else 0):
            reader.next()
    except Exception as error:  # every decoder failure has a class of its own
        raise ValueError(f"cannot be decoded, damaged or not a video ({_reason(error, path)})") from error
    if not (np.abs(spans) < 1e8).all():
        raise ValueError(
            f"has frames without a timestamp, as old AVI files do; write it anew: ffmpeg -i {path.name} {path.stem}.mp4"
        )
    # Shown are the frames from time zero on: those before an edit list no player shows, nor does decord's decoder.
    shown = spans[spans[:, 0] > -EPSILON]
    if len(shown) == 0:
        raise ValueError("has no frame that is displayed")
    times = np.sort(shown[:, 0])
    return Probe(height, width, times, max(float(shown[:, 1].max()), float(times[-1])))


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
    """Which displayed frames (from 0) a window shows: at each wanted time, the last frame that has begun."""
    wanted = window.start + np.arange(window.num_frames) / fps
    places = np.searchsorted(found.times, wanted + EPSILON, side="right") - 1
    return np.clip(places, 0, None)


def read_windows(
    path: Path, found: Probe, windows: list[Window], fps: float, size: tuple[int, int] | None = None
) -> Iterator[Frames]:
    """The frames (F, H, W, 3) uint8 of each window in turn, brought to `size` (height, width) if one is given.

    Windows follow each other in time. ValueError with the reason if decoding fails.
    """
    if path.suffix.lower() in IMAGES:
        for _ in windows:
            yield fit_frame(_read_image(path), size)[None]
        return
    height, width = size or (found.height, found.width)
    longest = max(window.num_frames for window in windows)
    sitting = max(1, SITTING_BYTES // (height * width * 3 * longest))
    assert windows == sorted(windows, key=lambda window: window.start), "windows must be in order of time"
    for first in range(0, len(windows), sitting):
        chosen = [frames_on_screen(found, window, fps).tolist() for window in windows[first : first + sitting]]
        try:
            clips = _read_frames(path, chosen, size)
        except Exception as error:  # every decoder failure has a class of its own
            raise ValueError(f"cannot be decoded, damaged or not a video ({_reason(error, path)})") from error
        yield from clips


def _read_frames(path: Path, chosen: list[list[int]], size: tuple[int, int] | None) -> list[Frames]:
    """Several clips at once, each given by the numbers of its frames, none before the last one of the clip before."""
    reader, current, clips = _open(path), -1, []
    for numbers in chosen:
        frames: list[Frames] = []
        for number in numbers:
            if current < number:
                for _ in range(current + 1, number):
                    reader.next()
                fitted, current = fit_frame(_next_frame(reader), size), number
            frames.append(fitted)
        clips.append(np.stack(frames))
    return clips


def fit_frame(frame: Frames, size: tuple[int, int] | None) -> Frames:
    """A frame (H, W, 3) scaled (antialiased, never squeezed) to cover `size` (height, width) and cropped at the centre.

    None leaves it as it is.
    """
    if size is None or frame.shape[:2] == size:
        return frame
    height, width, _ = geometry.cover(frame.shape[0], frame.shape[1], *size)
    # torch scales bytes as Pillow does (equal to 2 in 255), ten times as fast: reading must keep up with the decoder,
    # or 4K frames pile up behind it.
    frame_BCHW = torch.from_numpy(frame.copy()).permute(2, 0, 1)[None]
    scaled_BCHW = F.interpolate(frame_BCHW, (height, width), mode="bicubic", antialias=True)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return scaled_BCHW[0, :, top : top + size[0], left : left + size[1]].permute(1, 2, 0).contiguous().numpy()


def _next_frame(reader: decord.VideoReader) -> Frames:
    """The next displayed frame, (H, W, 3).

    decord2 takes the padding of its rows for a fourth channel where it happens to be as wide as one (widths 16, 24,
    32, 48, 96, 144): such a frame holds RGB in the first 3*W bytes of every row.
    """
    frame: Frames = reader.next().asnumpy()
    height, width, channels = frame.shape
    if channels == 3:
        return frame
    return frame.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)


def _read_image(path: Path) -> Frames:
    """An image as it is meant to be seen: turned by its EXIF tag, transparency over white."""
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode in {"I", "F"} or image.mode.startswith("I;"):  # PIL would clip them to white
                raise ValueError("more than 8 bits of grey; save it with 8")
            if image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # PIL raises many classes for damaged files
        raise ValueError(f"cannot be read as an image, damaged or not one ({_reason(error, path)})") from error


def _reason(error: Exception, path: Path) -> str:
    """The first line of an error, without the clock times, source lines and file names that libraries put in."""
    text = str(error).replace(str(path), "the file")
    text = re.sub(r"\[\d\d:\d\d:\d\d\] (\S+?:\d+: )?", "", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
