"""Footage: a file with its annotation, what a probe finds in it, and its frames, chosen by timestamp.

A file that cannot be used raises ValueError with the reason, which becomes a Reject.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from wantrain import geometry
from wantrain.data.footage.captions import Annotation
from wantrain.data.footage.clips import EPSILON, VideoInfo, Window, frames_on_screen
from wantrain.data.footage.forward import ForwardReader, peek_forward
from wantrain.data.footage.pictures import PictureReader, picture_frames, picture_info
from wantrain.data.footage.reader import Reader, SeekPoint, peek
from wantrain.data.rejects import IMAGES, STREAMS
from wantrain.util.files import file_hash
from wantrain.video import Frames

#: Name of the folder beside footage that holds mask videos.
MASKS = "masks"
#: Bytes of frames that one read pass holds; a file with more is read in several passes.
READ_PASS_BYTES = 2 << 30


@dataclass(frozen=True)
class Footage:
    """One file of footage and its annotation.

    path        the file, or the tar that holds it
    name        its path below the source folder with forward slashes, or its name in the tar
    annotation  captions, weights, tags
    member      (offset, size) of its bytes, if it lies in a tar
    """

    path: Path
    name: str
    annotation: Annotation
    member: tuple[int, int] | None = None

    @property
    def caption(self) -> str:
        """The first caption; empty if there is none."""
        return next(iter(self.annotation.captions), "")

    @property
    def extension(self) -> str:
        """The file name's extension in lower case, without the dot."""
        return Path(self.name).suffix.lower().removeprefix(".")

    @property
    def mask(self) -> Path | None:
        """The mask of this file, if there is one: masks/NAME, or masks/STEM.mp4 or masks/STEM.png beside it."""
        names = [self.path.name, f"{self.path.stem}.mp4", f"{self.path.stem}.png"]
        paths = [self.path.parent / MASKS / name for name in names] if self.member is None else []
        return next((path for path in paths if path.is_file()), None)

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.path.stat().st_size if self.member is None else self.member[1]

    def read(self) -> bytes:
        """The bytes of the file."""
        offset, size = self.member or (0, -1)
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def digest(self) -> str:
        """sha256 of the bytes, in hex."""
        return file_hash(self.path) if self.member is None else hashlib.sha256(self.read()).hexdigest()

    @contextmanager
    def on_disk(self) -> Iterator[Path]:
        """A path with these bytes and a name that decoders accept, valid inside the `with`."""
        if self.member is None and _is_utf8(self.path):
            yield self.path
            return
        if self.member is None:
            with tempfile.TemporaryDirectory() as folder:
                link = Path(folder, f"file.{self.extension}")
                link.symlink_to(self.path.resolve())
                yield link
            return
        with tempfile.NamedTemporaryFile(suffix=f".{self.extension}") as file:
            file.write(self.read())
            file.flush()
            yield Path(file.name)


def _is_utf8(path: Path) -> bool:
    """False for a path that is not UTF-8, which decord cannot open."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class ReadOptions:
    """What a survey found about reading a file's frames.

    seek_points  save decoding the frames before them
    deinterlace  make interlaced frames progressive; seek points are not used then
    damaged      pass over damaged frames that decord fails on; seek points are not used then
    """

    seek_points: Sequence[SeekPoint] = ()
    deinterlace: bool = False
    damaged: bool = False

    @staticmethod
    def of(about: Mapping[str, Any]) -> ReadOptions:
        """From a row of a video shard; shards made before 2026-11-24 have no seek points."""
        points = [SeekPoint(*row) for row in about.get("seek_points", ())]
        return ReadOptions(points, about.get("deinterlace", False), about.get("damaged", False))

    def record(self) -> dict[str, Any]:
        """The keys that `of` reads."""
        flags = {"deinterlace": self.deinterlace, "damaged": self.damaged}
        points = [[point.number, point.seen] for point in self.seek_points]
        return {**{name: True for name, is_set in flags.items() if is_set}, "seek_points": points}


def probe(path: Path) -> VideoInfo:
    """Decode the first frame and read the timestamps of a file. ValueError with the reason if that fails."""
    if is_picture(path):
        with _decoding(path):
            return picture_info(path)
    if path.stat().st_size == 0:
        raise ValueError("the file is empty")
    with _decoding(path):
        first, spans = peek_forward(path) if is_stream(path) else peek(path)
        height, width = first.shape[:2]
    if not (np.abs(spans) < 1e8).all():
        raise ValueError(
            f"has frames without a timestamp, as old AVI files do; convert it: ffmpeg -i {path.name} {path.stem}.mp4"
        )
    # Frames before time zero precede an edit list: players do not show them, and the reader skips them.
    shown = spans[spans[:, 0] > -EPSILON]
    if len(shown) == 0:
        raise ValueError("has no frame that is displayed")
    times = np.sort(shown[:, 0])
    return VideoInfo(height, width, times, max(float(shown[:, 1].max()), float(times[-1])))


def is_picture(path: Path) -> bool:
    """True for the extension of an image, still or animated, which Pillow reads."""
    return path.suffix.lower() in IMAGES


def is_stream(path: Path) -> bool:
    """True for the extension of a container that decord fails on."""
    return path.suffix.lower() in STREAMS


def read_whole(path: Path, info: VideoInfo) -> Iterator[Frames]:
    """Every displayed frame (H, W, 3) of a file, in order. ValueError with the reason if one cannot be decoded.

    A file with such a frame is rejected as a whole: how many frames decord gives before it reports one varies between
    runs.
    """
    with _decoding(path):
        if is_picture(path):
            yield from picture_frames(path)
            return
        reader = _reader(path, info)
        for number in range(len(info.times)):
            yield reader.frame(number)


def read_numbered(
    path: Path, info: VideoInfo, numbers: Sequence[int], size: tuple[int, int] | None = None
) -> Iterator[Frames]:
    """The displayed frames (H, W, 3) with these ascending numbers, one by one, brought to `size` if one is given.

    ValueError with the reason if decoding fails.
    """
    with _decoding(path):
        reader = _reader(path, info)
        for number in numbers:
            yield fit_frame(reader.frame(number), size)


def read_windows(
    path: Path,
    info: VideoInfo,
    windows: list[Window],
    fps: float,
    size: tuple[int, int] | None = None,
    options: ReadOptions = ReadOptions(),
) -> Iterator[Frames]:
    """The frames (F, H, W, 3) uint8 of each window in turn, brought to `size` (height, width) if one is given.

    Windows must be in order of time. ValueError with the reason if decoding fails.
    """
    if is_picture(path) and info.is_image:
        with _decoding(path):
            frame = fit_frame(next(picture_frames(path)), size)[None]
        for _ in windows:
            yield frame
        return
    height, width = size or (info.height, info.width)
    longest = max(window.num_frames for window in windows)
    per_pass = max(1, READ_PASS_BYTES // (height * width * 3 * longest))
    assert windows == sorted(windows, key=lambda window: window.start), "windows must be in order of time"
    for first in range(0, len(windows), per_pass):
        chosen = [frames_on_screen(info, window, fps).tolist() for window in windows[first : first + per_pass]]
        with _decoding(path):
            # No reader stays open while a clip is used: it would decode ahead without limit.
            clips = _read_frames(_reader(path, info, options), chosen, size)
        yield from clips


class _FrameReader(Protocol):
    """Reads frames of a file by number, in ascending order."""

    def frame(self, number: int) -> Frames:
        """The frame (H, W, 3) with this number."""


def _reader(path: Path, info: VideoInfo, options: ReadOptions = ReadOptions()) -> _FrameReader:
    """The reader of a file."""
    if is_picture(path):
        return PictureReader(path)
    if options.damaged:
        return ForwardReader(path, info.times, deinterlace=options.deinterlace)
    if options.deinterlace or is_stream(path):
        return ForwardReader(path, deinterlace=options.deinterlace)
    return Reader(path, len(info.times), options.seek_points)


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Turn an error of a decoder into a ValueError with the reason."""
    try:
        yield
    except Exception as error:  # every decoder failure has a class of its own
        words = "read as an image, damaged or not one" if is_picture(path) else "decoded, damaged or not a video"
        raise ValueError(f"cannot be {words} ({_reason(error, path)})") from error


def _read_frames(reader: _FrameReader, chosen: list[list[int]], size: tuple[int, int] | None) -> list[Frames]:
    """Read several clips, each given by ascending frame numbers that begin no earlier than the previous clip ends."""
    current, clips, fitted = -1, [], np.empty(0, dtype=np.uint8)
    for numbers in chosen:
        clip: Frames | None = None
        for place, number in enumerate(numbers):
            if current < number:
                fitted, current = fit_frame(reader.frame(number), size), number
            if clip is None:  # one block, not a list of frames: allocating memory costs as much as decoding
                clip = np.empty((len(numbers), *fitted.shape), dtype=np.uint8)
            clip[place] = fitted
        assert clip is not None, "a window has frames"
        clips.append(clip)
    return clips


def check_mask(info: VideoInfo, clip: VideoInfo) -> None:
    """Raise ValueError, as a reason that follows the mask's name, unless a mask has its video's size and length.

    A single picture is a mask for all frames.
    """
    if (info.height, info.width) != (clip.height, clip.width):
        raise ValueError(
            f"is {info.height}x{info.width} (height x width), its video {clip.height}x{clip.width}; a mask must have "
            "the size of its video"
        )
    if not info.is_image and len(info.times) != len(clip.times):
        raise ValueError(
            f"has {len(info.times)} frames, its video {len(clip.times)}; give a mask with as many frames, or one "
            "picture for all"
        )


def read_mask_windows(
    path: Path,
    info: VideoInfo,
    clip: VideoInfo,
    windows: list[Window],
    fps: float,
    size: tuple[int, int] | None = None,
) -> Iterator[Frames]:
    """The frames (F, H, W, 3) of a video's mask in each window of the video; one frame (1, H, W, 3) for a picture."""
    # Frames are matched by number: a mask need not have the timestamps of its video.
    return read_windows(path, info if info.is_image else clip, windows, fps, size)


def fit_frame(frame: Frames, size: tuple[int, int] | None) -> Frames:
    """Scale a frame (H, W, 3) to cover `size` (height, width), antialiased and with its aspect, and crop the centre.

    `size=None` returns the frame unchanged.
    """
    if size is None or frame.shape[:2] == size:
        return frame
    height, width, _ = geometry.cover(frame.shape[0], frame.shape[1], *size)
    # torch scales bytes as Pillow does (within 2 of 255) and ten times as fast; slower scaling lets 4K frames pile up
    # behind the decoder.
    frame_BCHW = torch.from_numpy(frame.copy()).permute(2, 0, 1)[None]
    scaled_BCHW = F.interpolate(frame_BCHW, (height, width), mode="bicubic", antialias=True)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return scaled_BCHW[0, :, top : top + size[0], left : left + size[1]].permute(1, 2, 0).contiguous().numpy()


def _reason(error: Exception, path: Path) -> str:
    """The first line of an error, without the times, source lines and file names that libraries add."""
    text = str(error).replace(str(path), "the file")
    text = re.sub(r"\[\d\d:\d\d:\d\d\] (\S+?:\d+: )?", "", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
