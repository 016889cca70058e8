"""Frames to files: H.264 mp4 that every player opens, and contact sheets. Frames are uint8 (F, H, W, 3), RGB."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Frames = NDArray[np.uint8]


def to_frames(pixels_CTHW: Tensor) -> Frames:
    """Pixels in [-1, 1], (3, F, H, W) -> uint8 frames (F, H, W, 3), rounded to nearest."""
    levels = ((pixels_CTHW.float().clamp(-1, 1) + 1) * 127.5).round()
    return levels.byte().permute(1, 2, 3, 0).cpu().numpy()


def write_mp4(path: str | Path, frames: Frames, fps: float, *, quality: int = 18) -> None:
    """Write H.264, yuv420p, with the index in front (plays while it loads). `quality` is x264's crf, 0 is lossless.

    Odd sides are extended by their last row or column, since yuv420p has none.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) == 0:
        raise ValueError(f"{path}: expected frames (F, H, W, 3), got {frames.shape}")
    odd_rows, odd_columns = frames.shape[1] % 2, frames.shape[2] % 2
    if odd_rows or odd_columns:
        frames = np.pad(frames, ((0, 0), (0, odd_rows), (0, odd_columns), (0, 0)), mode="edge")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(
        path,
        frames,
        plugin="FFMPEG",
        fps=fps,
        codec="libx264",
        pixelformat="yuv420p",
        macro_block_size=1,
        output_params=["-crf", str(quality), "-movflags", "+faststart"],
    )


def contact_sheet(path: str | Path, clips: Mapping[str, Frames], *, columns: int = 8, cell: int = 128) -> None:
    """Write a PNG with one titled strip per clip: up to `columns` frames, evenly spaced, first and last included."""
    font = ImageFont.load_default(size=13)
    title = 18
    rows = [(name, _strip(frames, columns, cell)) for name, frames in clips.items()]
    width = max(strip.width for _, strip in rows)
    sheet = Image.new("RGB", (width, sum(strip.height + title for _, strip in rows)), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for name, strip in rows:
        # The default font has no glyphs beyond Latin; what it cannot draw is shown as its escape, not as a box.
        label = name.encode("latin-1", "backslashreplace").decode("latin-1")
        draw.text((3, top + 1), label[: width // 6], fill="black", font=font)
        sheet.paste(strip, (0, top + title))
        top += strip.height + title
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _strip(frames: Frames, columns: int, cell: int) -> Image.Image:
    """Some frames of one clip side by side, each `cell` pixels high."""
    count = min(columns, len(frames))
    picks: Sequence[int] = np.linspace(0, len(frames) - 1, count).round().astype(int).tolist()
    width = max(1, round(frames.shape[2] * cell / frames.shape[1]))
    strip = Image.new("RGB", (count * (width + 2), cell), "white")
    for place, pick in enumerate(picks):
        picture = Image.fromarray(frames[pick]).resize((width, cell), Image.Resampling.NEAREST)
        strip.paste(picture, (place * (width + 2), 0))
    return strip
