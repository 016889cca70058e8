"""Procedural footage with true captions, written as real files: what everything runs on when nothing else is given.

One shape of one colour moves in one direction (or rests) over a plain background. Captions in English or Chinese say
exactly that, so whether a model obeys them can be read off its videos.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wantrain import world
from wantrain.video import Frames, write_mp4

MARK = "demo.json"

COLOURS: dict[str, tuple[tuple[int, int, int], str]] = {
    "red": ((224, 40, 40), "红色"),
    "green": ((40, 176, 60), "绿色"),
    "blue": ((48, 84, 232), "蓝色"),
    "yellow": ((240, 216, 40), "黄色"),
    "purple": ((150, 50, 200), "紫色"),
    "cyan": ((40, 208, 216), "青色"),
    "orange": ((244, 140, 28), "橙色"),
    "white": ((244, 244, 244), "白色"),
}
SHAPES = {"circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星形", "ring": "圆环", "cross": "十字"}
#: Unit of motion: x to the right, y down.
DIRECTIONS: dict[str, tuple[tuple[int, int], str]] = {
    "left": ((-1, 0), "向左"),
    "right": ((1, 0), "向右"),
    "up": ((0, -1), "向上"),
    "down": ((0, 1), "向下"),
    "still": ((0, 0), "静止"),
}
BACKGROUNDS: dict[str, tuple[tuple[int, int, int], str]] = {
    "dark": ((24, 26, 34), "深色"),
    "gray": ((112, 114, 118), "灰色"),
    "brown": ((92, 60, 38), "棕色"),
}


@dataclass(frozen=True)
class Scene:
    """What a clip shows; lengths are shares of the frame's shorter side, speed is such shares per second."""

    shape: str
    colour: str
    direction: str
    background: str
    radius: float = 0.24
    speed: float = 0.4
    offset: float = 0.0  # of the path from the centre, across the motion

    def caption(self, language: str = "en", *, image: bool = False) -> str:
        """The true caption, in English ("en") or Chinese ("zh")."""
        if language == "zh":
            colour, shape = COLOURS[self.colour][1], SHAPES[self.shape]
            ground, way = BACKGROUNDS[self.background][1], DIRECTIONS[self.direction][1]
            if image:
                return f"一张图片：{ground}背景上的一个{colour}{shape}。"
            does = "静止不动" if self.direction == "still" else f"{way}移动"
            return f"一个{colour}{shape}在{ground}背景上{does}。"
        what, ground = f"a {self.colour} {self.shape}", f"on a {self.background} background"
        if self.colour == "orange":
            what = f"an orange {self.shape}"
        if image:
            return f"A picture of {what} {ground}."
        does = "resting" if self.direction == "still" else f"moving {self.direction}"
        return f"{what[0].upper()}{what[1:]} {does} {ground}."


def random_scene(generator: np.random.Generator) -> Scene:
    """A scene with every attribute drawn independently."""
    return Scene(
        shape=str(generator.choice(list(SHAPES))),
        colour=str(generator.choice(list(COLOURS))),
        direction=str(generator.choice(list(DIRECTIONS))),
        background=str(generator.choice(list(BACKGROUNDS))),
        radius=float(generator.uniform(0.2, 0.27)),
        speed=float(generator.uniform(0.35, 0.45)),
        offset=float(generator.uniform(-0.12, 0.12)),
    )


def render(scene: Scene, times: Sequence[float], height: int, width: int) -> Frames:
    """Frames (F, H, W, 3) of the scene at `times` seconds, four times supersampled.

    Over the first second the shape crosses the middle of the frame; it stops before it would leave the frame.
    """
    side, fine = min(height, width), 4
    x, y = np.meshgrid(np.arange(width * fine) + 0.5, np.arange(height * fine) + 0.5)
    (dx, dy), ground = DIRECTIONS[scene.direction][0], BACKGROUNDS[scene.background][0]
    # In pixels of the fine grid. The reach is how far the centre may go along the motion.
    radius, unit = scene.radius * side * fine, side * fine
    reach = (abs(dx) * width + abs(dy) * height) * fine / 2 - radius
    frames = []
    for time in times:
        along = min(max((time - 0.5) * scene.speed * unit, -reach), reach) if dx or dy else 0.0
        centre_x = width * fine / 2 + dx * along + (abs(dy) or not dx) * scene.offset * unit
        centre_y = height * fine / 2 + dy * along + abs(dx) * scene.offset * unit
        inside = _MASKS[scene.shape]((x - centre_x) / radius, (y - centre_y) / radius)
        share = inside.reshape(height, fine, width, fine).mean(axis=(1, 3))[..., None]
        picture = share * np.array(COLOURS[scene.colour][0]) + (1 - share) * np.array(ground)
        frames.append(picture.round().astype(np.uint8))
    return np.stack(frames)


Plane = NDArray[np.float64]


def _polygon(corners: Sequence[tuple[float, float]]) -> Callable[[Plane, Plane], NDArray[np.bool_]]:
    """Inside test by the even-odd rule for a polygon given in units of the radius."""

    def inside(x: Plane, y: Plane) -> NDArray[np.bool_]:
        odd = np.zeros(x.shape, dtype=bool)
        for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
            if y0 == y1:
                continue
            crosses = (y0 > y) != (y1 > y)
            odd ^= crosses & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
        return odd

    return inside


def _around(angles: Sequence[float], radii: Sequence[float]) -> list[tuple[float, float]]:
    """Corners at angles (degrees, clockwise from the top) and radii."""
    return [
        (r * math.sin(math.radians(a)), -r * math.cos(math.radians(a)))
        for a, r in zip(angles, radii, strict=True)
    ]


_MASKS: dict[str, Callable[[Plane, Plane], NDArray[np.bool_]]] = {
    "circle": lambda x, y: x**2 + y**2 < 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.85,
    "triangle": _polygon(_around([0, 120, 240], [1.1] * 3)),
    "star": _polygon(_around([36 * i for i in range(10)], [1.15, 0.45] * 5)),
    "ring": lambda x, y: (x**2 + y**2 < 1) & (x**2 + y**2 > 0.3),
    "cross": lambda x, y: (np.maximum(abs(x), abs(y)) < 1) & (np.minimum(abs(x), abs(y)) < 0.34),
}


def make_footage(
    folder: Path, *, num_videos: int = 240, num_images: int = 16, seed: int = 0, size: int = 64
) -> bool:
    """Write the footage: NAME.mp4 (or .png) and NAME.txt, the truth in scenes.jsonl; False if it is there already.

    Sizes, aspects, frame rates and lengths vary; three captions in ten are Chinese. Every file depends on `seed`
    and its own number alone. ValueError if the folder holds anything else.
    """
    wanted = {"num_videos": num_videos, "num_images": num_images, "seed": seed, "size": size}
    mark = folder / MARK
    if mark.is_file() and json.loads(mark.read_text()) == wanted:
        return False
    world.claim_folder(folder, mark="scenes.jsonl", key="footage")
    with (folder / "scenes.jsonl").open("w", encoding="utf-8") as truths:
        for number in range(num_videos + num_images):
            generator = np.random.default_rng([seed, number])
            scene, image = random_scene(generator), number >= num_videos
            height, width = _frame_size(generator, size)
            language = "zh" if generator.random() < 0.3 else "en"
            caption = scene.caption(language, image=image)
            name = f"{'image' if image else 'clip'}_{number:04d}"
            if image:
                picture = render(scene, [float(generator.uniform(0.2, 0.8))], height, width)[0]
                Image.fromarray(picture).save(folder / f"{name}.png")
            else:
                fps = float(generator.choice([12, 16, 24, 30]))
                seconds = float(generator.uniform(1.2, 1.9))
                times = np.arange(round(seconds * fps)) / fps
                write_mp4(folder / f"{name}.mp4", render(scene, times.tolist(), height, width), fps, quality=8)
            (folder / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")
            truths.write(json.dumps({"name": name, **asdict(scene)}) + "\n")
    world.write_json(mark, wanted)
    return True


def _frame_size(generator: np.random.Generator, size: int) -> tuple[int, int]:
    """Mostly square and as large as asked or up to twice; one in five landscape, one in ten portrait. Even sides."""
    side = round(size * float(generator.choice([1.0, 1.25, 2.0])) / 2) * 2
    kind = generator.random()
    if kind < 0.7:
        return side, side
    longer = round(side * 5 / 3 / 2) * 2
    return (side, longer) if kind < 0.9 else (longer, side)
