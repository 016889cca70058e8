"""Pictures, with Pillow: stills, and animated WebP, PNG and AVIF, which are clips."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from wantrain.data.footage.clips import VideoInfo
from wantrain.video import Frames

#: Formats whose further frames are an animation, not pages or other sizes of a picture.
ANIMATED = frozenset(("WEBP", "PNG", "AVIF", "GIF"))
#: Seconds that a frame without a duration is shown, as browsers do.
DEFAULT_SECONDS = 0.1


def picture_info(path: Path) -> VideoInfo:
    """Size and frame times of a picture; a still has one frame. Raises whatever Pillow raises."""
    first, seconds = None, []
    for frame, duration in _timed(path):
        first = frame if first is None else first
        seconds.append(duration)
    assert first is not None
    times = np.concatenate([[0.0], np.cumsum(seconds)])
    end = float(times[-1]) if len(seconds) > 1 else 0.0
    return VideoInfo(first.shape[0], first.shape[1], times[:-1], end)


def picture_frames(path: Path) -> Iterator[Frames]:
    """Every frame (H, W, 3) of a picture, rotated by its EXIF tag, transparency over white."""
    for frame, _ in _timed(path):
        yield frame


class PictureReader:
    """Reads frames of a picture by number, in ascending order."""

    def __init__(self, path: Path) -> None:
        self._frames = enumerate(picture_frames(path))

    def frame(self, number: int) -> Frames:
        """The frame (H, W, 3) with this number."""
        return next(frame for place, frame in self._frames if place == number)


def _timed(path: Path) -> Iterator[tuple[Frames, float]]:
    """Each frame and its duration in seconds."""
    with Image.open(path) as image:
        count = int(getattr(image, "n_frames", 1))
        if count > 1 and image.format == "TIFF":
            raise ValueError(f"it holds {count} pages; save each as a picture of its own")
        if count == 1 or image.format not in ANIMATED:
            yield _pixels(image), 0.0
            return
        # A PNG may begin with a still for viewers that show no animation.
        for number in range(int(getattr(image, "default_image", False)), count):
            image.seek(number)
            image.load()
            yield _pixels(image), float(image.info.get("duration") or 0) / 1000 or DEFAULT_SECONDS


def _pixels(opened: Image.Image) -> Frames:
    """The current frame of an opened picture as RGB."""
    image = ImageOps.exif_transpose(opened)
    if image.mode in {"I", "F"} or image.mode.startswith("I;"):  # PIL would clip them to white
        raise ValueError("more than 8 bits of grey; save it with 8 bits")
    if image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))
