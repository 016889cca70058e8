"""Measures what a clip of procedural footage shows: colour, shape and direction of motion, from its pixels.

Plain image analysis without a learned part, so that it can judge a model. The shape is the region with hue, since
backgrounds are grey. Its colour is its most frequent hue; its form, the known outline with the largest overlap at equal
centre and area; its direction, that of its centre. The judge knows the demo's vocabulary, not the model or the prompt.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from wantrain.demo.scene import Scene, signed_distance
from wantrain.demo.vocabulary import COLOURS, DIRECTIONS, SHAPES, VOCABULARIES, WUG, is_spared
from wantrain.video import Frames

Floats = NDArray[np.float64]

#: Chroma (largest minus smallest channel, of 255) below which a clip shows no shape.
LEAST_CHROMA = 40.0
#: Distance that the centre travels in a clip, as a share of the shorter side, below which the shape stands still.
LEAST_TRAVEL = 0.08
#: The grid on which outlines are compared: half its side in radii of the disc of equal area, and its points per side.
SPAN, POINTS = 2.2, 56


@dataclass(frozen=True)
class Verdict:
    """What a clip shows; "" where it cannot be determined. `overlap` is the outline's overlap (IoU) with `shape`."""

    colour: str
    shape: str
    direction: str
    overlap: float

    def agrees(self, scene: Scene) -> dict[str, bool]:
        """Which of colour, shape and direction match `scene`; a wug's colours are part of its shape."""
        return {
            "colour": self.colour == ("wug" if scene.shape == "wug" else scene.colour),
            "shape": self.shape == scene.shape,
            "direction": self.direction == scene.direction,
        }


def judge(frames: Frames) -> Verdict:
    """Judge uint8 frames (F, H, W, 3) of one shape of the plain vocabulary, or a wug, over a grey background."""
    levels = frames.astype(float)
    chroma = levels.max(-1) - levels.min(-1)
    # The shape covers at least a thirtieth of the picture, so the 98 % quantile is its chroma.
    peak = float(np.quantile(chroma, 0.98))
    if peak < LEAST_CHROMA:
        return Verdict("", "", "", 0.0)
    cover = np.clip(chroma / peak, 0, 1)
    inside = cover > 0.5
    shares = _colour_shares(levels[cover > 0.75])
    two_tone = all(shares[name] > 0.2 for name in WUG)
    colour = "wug" if two_tone else max(VOCABULARIES["plain"].colours, key=shares.__getitem__)
    centres, outlines = [], []
    for mask, soft in zip(inside, cover, strict=True):
        if mask.any():
            centre = np.argwhere(mask).mean(axis=0) + 0.5
            centres.append(centre)
            outlines.append(_normalised(soft, centre, float(np.sqrt(mask.sum() / np.pi))))
    shape, overlap = _best_shape(np.mean(outlines, axis=0) > 0.5, two_tone)
    return Verdict(colour, shape, _direction(np.array(centres), min(frames.shape[1:3])), overlap)


def shows(caption: str, frames: Frames) -> bool | None:
    """Whether a clip shows colour, shape and direction of a caption; None for a caption that is not of the plain
    vocabulary or of a wug, which the judge cannot read.
    """
    scene = _scenes().get(caption)
    return None if scene is None else all(judge(frames).agrees(scene).values())


@cache
def _scenes() -> dict[str, Scene]:
    """What the judge can read: a scene for each caption, English and Chinese."""
    words = VOCABULARIES["plain"]
    things = [(shape, colour, "") for shape in words.shapes for colour in words.colours] + [("wug", *WUG)]
    scenes = [
        Scene(shape, colour, background, direction, size=0.45, speed=0.0, start=(0.5, 0.5), band=band)
        for shape, colour, band in things
        for background in words.backgrounds
        for direction in DIRECTIONS
    ]
    return {scene.caption(language): scene for scene in scenes for language in ("en", "zh")}


def spared_scenes(count: int) -> list[tuple[Scene, str]]:
    """`count` scenes, each with a language, that plain footage never shows: prompts for testing a trained model.

    Takes every spared combination in turn, and cycles through backgrounds and languages; prompts leave size and place
    open. Always the same scenes.
    """
    words = VOCABULARIES["plain"]
    spared = [
        (shape, colour, direction)
        for direction in DIRECTIONS
        for shape in words.shapes
        for colour in words.colours
        if is_spared(shape, colour, direction)
    ]
    return [_test_scene(*spared[i % len(spared)], turn=i % len(spared) + i // len(spared)) for i in range(count)]


def wug_scenes(count: int) -> list[tuple[Scene, str]]:
    """`count` scenes of a wug, each with a language; cycles through directions, backgrounds and languages."""
    directions, size = list(DIRECTIONS), len(DIRECTIONS)
    return [_test_scene("wug", WUG[0], directions[i % size], turn=i % size + i // size) for i in range(count)]


def _test_scene(shape: str, colour: str, direction: str, *, turn: int) -> tuple[Scene, str]:
    """A scene and a language; `turn` chooses background and language."""
    backgrounds = VOCABULARIES["plain"].backgrounds
    background = backgrounds[turn // 2 % len(backgrounds)]
    band = WUG[1] if shape == "wug" else ""
    scene = Scene(shape, colour, background, direction, size=0.45, speed=0.0, start=(0.5, 0.5), band=band)
    return scene, "en" if turn % 2 == 0 else "zh"


def scores(verdicts: Sequence[Verdict], scenes: Sequence[Scene]) -> dict[str, float]:
    """The share of clips whose colour, shape, direction, and all three match their scene."""
    agreements = [verdict.agrees(scene) for verdict, scene in zip(verdicts, scenes, strict=True)]
    shares = {what: float(np.mean([each[what] for each in agreements])) for what in ("colour", "shape", "direction")}
    return {**shares, "all": float(np.mean([all(each.values()) for each in agreements]))}


def _colour_shares(pixels: Floats) -> dict[str, float]:
    """The share of pixels (n, 3) whose hue is nearest to that of each colour."""
    names = sorted({*VOCABULARIES["plain"].colours, *WUG})
    hues = np.array([_hue(np.array(COLOURS[name][1], dtype=float)) for name in names])
    far = np.abs(_hue(pixels)[:, None] - hues)
    counts = np.bincount(np.minimum(far, 1 - far).argmin(axis=1), minlength=len(names))
    return dict(zip(names, (counts / max(1, counts.sum())).tolist(), strict=True))


def _hue(rgb: Floats) -> Floats:
    """Hue in [0, 1) of colours (..., 3)."""
    return np.vectorize(lambda r, g, b: colorsys.rgb_to_hsv(r, g, b)[0])(rgb[..., 0], rgb[..., 1], rgb[..., 2])


def _normalised(soft: Floats, centre: Floats, radius: float) -> Floats:
    """Resample the cover (H, W) around `centre` (row, column), in units of `radius`: (POINTS, POINTS)."""
    height, width = soft.shape
    steps = np.linspace(-SPAN, SPAN, POINTS) * radius
    rows, columns = (centre[0] + steps) / height * 2 - 1, (centre[1] + steps) / width * 2 - 1
    grid = np.stack(np.broadcast_arrays(columns[None, :], rows[:, None]), axis=-1)
    picture = torch.from_numpy(soft)[None, None]
    return F.grid_sample(picture, torch.from_numpy(grid)[None], align_corners=False)[0, 0].numpy()


@cache
def _templates() -> dict[str, NDArray[np.bool_]]:
    """Each shape's outline on the comparison grid, with its centroid in the middle and the area of the unit disc."""
    fine = np.linspace(-1.2, 1.2, 400)
    y, x = np.meshgrid(fine, fine, indexing="ij")
    steps = np.linspace(-SPAN, SPAN, POINTS)
    outlines = {}
    for shape in SHAPES:
        inside = signed_distance(shape, x, y) < 0
        middle_y, middle_x = y[inside].mean(), x[inside].mean()
        radius = np.sqrt(inside.mean() * 2.4**2 / np.pi)
        v, u = np.meshgrid(middle_y + steps * radius, middle_x + steps * radius, indexing="ij")
        outlines[shape] = signed_distance(shape, u, v) < 0
    return outlines


def _best_shape(outline: NDArray[np.bool_], two_tone: bool) -> tuple[str, float]:
    """The shape whose outline has the largest IoU with `outline`, and that IoU; only two-tone shapes can be wugs."""
    names = [*VOCABULARIES["plain"].shapes, *(["wug"] if two_tone else [])]
    overlaps = {
        name: float((outline & _templates()[name]).sum() / (outline | _templates()[name]).sum()) for name in names
    }
    best = max(overlaps, key=overlaps.__getitem__)
    return best, overlaps[best]


def _direction(centres: Floats, short: int) -> str:
    """The direction of motion of the centres (frames, 2), row and column; "" for a diagonal one."""
    if len(centres) < 2:
        return "still"
    time = np.linspace(-0.5, 0.5, len(centres))
    down, right = (time @ (centres - centres.mean(axis=0))) / (time @ time) / short
    if max(abs(down), abs(right)) < LEAST_TRAVEL:
        return "still"
    if min(abs(down), abs(right)) > 0.6 * max(abs(down), abs(right)):
        return ""
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "down" if down > 0 else "up"
