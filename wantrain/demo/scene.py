"""A scene of the demo's footage: one shape that moves over one background; its caption and its frames.

Motion is a function of time, not of the frame number, so a clip resampled to another rate still shows the truth. Shapes
are drawn by their signed distance: an edge is as smooth at 64 pixels as at 640, and motion by a quarter of a pixel is
visible.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wantrain.demo.vocabulary import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES
from wantrain.video import Frames

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scene:
    """One shape on one background.

    size   extent of the shape, as a share of the picture's shorter side
    speed  distance per second, as a share of the picture's shorter side
    start  centre at time 0, (x, y) as shares of width and height
    band   colour of a band across the shape; "" for none
    """

    shape: str
    colour: str
    background: str
    direction: str
    size: float
    speed: float
    start: tuple[float, float]
    band: str = ""

    def caption(self, language: str = "en", *, still_image: bool = False) -> str:
        """What the scene shows, in English ("en") or Chinese ("zh"). ValueError for another language."""
        shape, background = SHAPES[self.shape], BACKGROUNDS[self.background][0]
        named = self.shape == "wug"  # its name implies its colours
        colour = "" if named else f"{COLOURS[self.colour][0]}的"
        if self.band and not named:
            colour = f"带{COLOURS[self.band][0]}条纹的{colour}"
        if language == "en":
            thing = self.shape if named else f"{self.colour} {self.shape}"
            thing = f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"
            if self.band and not named:
                thing = f"{thing} with a {self.band} band"
            if still_image:
                return f"a picture of {thing} on a {self.background} background"
            motion = "standing still" if self.direction == "still" else f"moving {self.direction}"
            return f"{thing} {motion} on a {self.background} background"
        if language != "zh":
            raise ValueError(f"language={language!r} is unknown; choose en or zh")
        if still_image:
            return f"一张图片：{background}背景上{colour}{shape}"
        if self.direction == "still":
            return f"一个{colour}{shape}静止在{background}背景上"
        return f"一个{colour}{shape}在{background}背景上{DIRECTIONS[self.direction][0]}移动"

    def frames(self, height: int, width: int, *, fps: float, num_frames: int) -> Frames:
        """Draw the frames at times 0, 1/fps, ...: uint8 (num_frames, height, width, 3)."""
        _, top, bottom = BACKGROUNDS[self.background]
        plain = np.broadcast_to(np.linspace(top, bottom, height)[:, None, None], (height, width, 3))
        return np.stack([self._draw(plain, i / fps) for i in range(num_frames)])

    def _draw(self, plain: Floats, time: float) -> Frames:
        """The picture at one time (seconds): the shape over the background, uint8 (height, width, 3)."""
        height, width = plain.shape[:2]
        short, (step_x, step_y) = min(height, width), DIRECTIONS[self.direction][1]
        centre_x = self.start[0] * width + step_x * self.speed * short * time
        centre_y = self.start[1] * height + step_y * self.speed * short * time
        radius = self.size * short / 2
        # Only the box around the shape is drawn; pixel (i, j) has its centre at (i + 0.5, j + 0.5).
        rows = slice(max(0, math.floor(centre_y - radius - 1)), max(0, math.ceil(centre_y + radius + 1)))
        columns = slice(max(0, math.floor(centre_x - radius - 1)), max(0, math.ceil(centre_x + radius + 1)))
        y, x = np.mgrid[0:height, 0:width][:, rows, columns] + 0.5
        x, y = (x - centre_x) / radius, (y - centre_y) / radius
        cover = np.clip(0.5 - signed_distance(self.shape, x, y) * radius, 0, 1)[..., None]
        picture = plain.copy()
        picture[rows, columns] += cover * (self._paint(y, radius) - picture[rows, columns])
        return picture.round().astype(np.uint8)

    def _paint(self, y: Floats, radius: float) -> Floats:
        """The shape's colour at heights `y` of its unit circle: (3,), or (height, width, 3) with a band."""
        body = np.array(COLOURS[self.colour][1], dtype=float)
        if not self.band:
            return body
        share = np.clip(0.5 + (0.25 - np.abs(y)) * radius, 0, 1)[..., None]
        return body + share * (np.array(COLOURS[self.band][1]) - body)


def signed_distance(shape: str, x: Floats, y: Floats) -> Floats:
    """Distance to the outline of a shape in the unit circle, negative inside; an array like `x`."""
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.75) - 0.25
    corners = _corners(shape)
    nearest, inside = np.full(x.shape, np.inf), np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        along = ((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / ((bx - ax) ** 2 + (by - ay) ** 2)
        t = np.clip(along, 0, 1)
        nearest = np.minimum(nearest, np.hypot(x - ax - t * (bx - ax), y - ay - t * (by - ay)))
        # Even-odd rule: a ray to the right changes sides at every edge it crosses.
        crosses = (ay > y) != (by > y)
        if by != ay:
            inside ^= crosses & (x < ax + (y - ay) * (bx - ax) / (by - ay))
    return np.where(inside, -nearest, nearest)


def _corners(shape: str) -> Floats:
    """The corners (n, 2) of a polygon in the unit circle, as (x, y) with y down, in order."""
    if shape == "cross":
        a, b = 0.32, 0.94
        quarter = np.array([(a, -b), (a, -a), (b, -a)])
        turn = np.array([(0.0, 1.0), (-1.0, 0.0)])  # a quarter turn of row vectors
        return np.concatenate([quarter @ np.linalg.matrix_power(turn, i) for i in range(4)])
    if shape == "square":
        return np.array([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]) * 0.8
    if shape == "wug":
        return np.array([(0.0, -1.0), (0.95, 0.0), (0.0, 1.0), (-0.95, 0.0)])
    if shape not in {"triangle", "star"}:
        raise ValueError(f"shape={shape!r} is unknown; choose one of {', '.join(SHAPES)}")
    count = 3 if shape == "triangle" else 10
    angles = np.arange(count) * 2 * np.pi / count - np.pi / 2
    radii = np.where(np.arange(count) % 2 == 0, 1.0, 0.42) if shape == "star" else np.ones(count)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
