"""Frames to pixels and back, H.264 mp4 files, filmstrips, and the measures motion and flicker.

Frames are uint8 (F, H, W, 3), RGB.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from wantrain.util.files import write_atomically

Frames = NDArray[np.uint8]

#: The font of contact sheets; its licence lies beside it.
FONT = Path(__file__).parent / "font" / "NotoSansCJKsc-subset.otf"


def to_pixels(frames: Tensor) -> Tensor:
    """Frames (..., F, H, W, 3) uint8 -> pixels (..., 3, F, H, W) float32 in [-1, 1], on the frames' device.

    Bits are equal on every device. Channels are first in memory: cast and reorder are one copy.
    """
    levels = frames.movedim(-1, -4).to(torch.float32, memory_format=torch.contiguous_format)
    # By a tensor: CUDA multiplies by the reciprocal of a Python number, which rounds differently from a CPU's division.
    return levels.div_(torch.full((), 127.5, device=frames.device)).sub_(1)


def to_frames(pixels_CTHW: Tensor) -> Frames:
    """Pixels in [-1, 1], (3, F, H, W) -> uint8 frames (F, H, W, 3), rounded to nearest."""
    levels = ((pixels_CTHW.float().clamp(-1, 1) + 1) * 127.5).round()
    return levels.byte().permute(1, 2, 3, 0).cpu().numpy()


def write_mp4(path: str | Path, frames: Frames, fps: float, *, quality: int = 18) -> None:
    """Write H.264, yuv420p, with the index in front (plays while it loads). `quality` is x264's crf, 0 is lossless.

    Odd sides are padded with their last row or column, since yuv420p needs even ones. The file appears when complete.
    OSError, and no file, where the disk does not take it all: the encoder itself says nothing then.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) == 0:
        raise ValueError(f"{path}: expected frames (F, H, W, 3), got {frames.shape}")
    odd_rows, odd_columns = frames.shape[1] % 2, frames.shape[2] % 2
    if odd_rows or odd_columns:
        frames = np.pad(frames, ((0, 0), (0, odd_rows), (0, odd_columns), (0, 0)), mode="edge")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp.mp4")
    try:
        with suppress(OSError):  # a broken pipe, with ffmpeg's command and no number; often there is not even that
            iio.imwrite(
                beside,
                frames,
                plugin="FFMPEG",
                fps=fps,
                codec="libx264",
                pixelformat="yuv420p",
                macro_block_size=1,
                ffmpeg_log_level="quiet",
                output_params=["-crf", str(quality), "-movflags", "+faststart"],
            )
        if not is_whole_mp4(beside):
            full = shutil.disk_usage(path.parent).free < frames.nbytes
            number = errno.ENOSPC if full else errno.EIO
            raise OSError(number, os.strerror(number), str(path))
        beside.replace(path)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def is_whole_mp4(path: Path) -> bool:
    """True if the boxes of an MP4 file (ISO/IEC 14496-12) fill it exactly, with an index and frames among them."""
    if not path.exists():
        return False
    size, place, kinds = path.stat().st_size, 0, set()
    with path.open("rb") as file:
        while place < size:
            file.seek(place)
            head = file.read(16)
            length = int.from_bytes(head[:4], "big")
            if length == 1:  # the 64-bit size follows the kind
                length = int.from_bytes(head[8:16], "big")
            if length < 8:
                return False
            kinds.add(head[4:8])
            place += length
    return place == size and {b"moov", b"mdat"} <= kinds


def read_mp4(path: str | Path) -> Frames:
    """The frames of a video that `write_mp4` wrote."""
    return iio.imread(path, plugin="FFMPEG")


def motion(frames: Frames) -> float:
    """How much a clip moves: the mean change of a pixel's brightness from one frame to the next, in grey levels."""
    steps = np.diff(_brightness(frames), axis=0)
    return float(np.abs(steps).mean()) if len(steps) else 0.0


def flicker(frames: Frames) -> float:
    """How much a clip flickers: the mean part of a change in brightness that the next frame reverses, in grey levels.

    A moving object changes a pixel and leaves it frames later; flicker reverses at once.
    """
    steps = np.diff(_brightness(frames), axis=0)
    before, after = steps[:-1], steps[1:]
    reversed_part = np.where(before * after < 0, np.minimum(np.abs(before), np.abs(after)), 0.0)
    return float(reversed_part.mean()) if len(reversed_part) else 0.0


def _brightness(frames: Frames) -> NDArray[np.float32]:
    """Luma (F, H, W) of BT.601, 0 to 255."""
    return np.tensordot(frames.astype(np.float32), np.array([0.299, 0.587, 0.114], dtype=np.float32), axes=1)


def contact_sheet(path: str | Path, clips: Mapping[str, Frames], *, columns: int = 8, cell: int = 128) -> None:
    """Write a PNG with a titled strip per clip: up to `columns` frames, evenly spaced, including first and last."""
    title = 18
    rows = [(name, filmstrip(frames, columns=columns, cell=cell)) for name, frames in clips.items()]
    width = max(strip.width for _, strip in rows)
    sheet = Image.new("RGB", (width, sum(strip.height + title for _, strip in rows)), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for name, strip in rows:
        draw.text((3, top - 2), fitted(name, width - 6), fill="black", font=_font())
        sheet.paste(strip, (0, top + title))
        top += strip.height + title
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def fitted(text: str, width: int) -> str:
    """A text, cut with an ellipsis where it is wider than `width` pixels in the font of contact sheets."""
    line = " ".join(text.split())
    if _font().getlength(line) <= width:
        return line
    fits = (cut for cut in range(len(line), 0, -1) if _font().getlength(f"{line[:cut].rstrip()}…") <= width)
    return f"{line[: next(fits, 0)].rstrip()}…"


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    """The font of contact sheets: Latin, Greek, Cyrillic, Chinese, Japanese, Korean; others are boxes."""
    return ImageFont.truetype(FONT, 13)


def filmstrip(frames: Frames, *, columns: int = 8, cell: int = 128) -> Image.Image:
    """Up to `columns` frames of one clip side by side, evenly spaced, each `cell` pixels high."""
    count = min(columns, len(frames))
    picks: Sequence[int] = np.linspace(0, len(frames) - 1, count).round().astype(int).tolist()
    width = max(1, round(frames.shape[2] * cell / frames.shape[1]))
    # Enlarged without blur, reduced without moire.
    resampling = Image.Resampling.NEAREST if cell >= frames.shape[1] else Image.Resampling.BOX
    strip = Image.new("RGB", (count * (width + 2), cell), "white")
    for place, pick in enumerate(picks):
        strip.paste(Image.fromarray(frames[pick]).resize((width, cell), resampling), (place * (width + 2), 0))
    return strip


def jpeg(image: Image.Image, *, quality: int = 75) -> bytes:
    """A picture as the bytes of a JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
