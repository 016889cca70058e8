"""Procedural footage with true captions, written as real mp4 and png files: the embedded default.

What may occur is a `Vocabulary`: `plain` is what wan-tiny learns; `everything` and `banded` are what its VAE learns to
encode and decode; `wug`, a thing with a made-up name, stands for somebody's own footage. One shape moves over one
background; everything that a caption says is exactly so, and everything that differs between files is in the caption,
size and place apart. Motion is a function of time, not of the frame number, so that a clip resampled to another rate
still shows the truth. Shapes are drawn by their signed distance: an edge is as smooth at 64 pixels as at 640, and a
quarter of a pixel of motion is visible.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from wantrain.util import distributed
from wantrain.util.files import claim_folder, write_json
from wantrain.video import Frames, write_mp4

Floats = NDArray[np.float64]

#: The file whose presence says that the footage is complete, and with which settings it was made.
SENTINEL = "demo.json"

#: What there is: name -> Chinese name (and value). No colour is near a background: those have no hue.
SHAPES = {
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "star": "五角星",
    "ring": "圆环",
    "cross": "十字",
    "wug": "wug",
}
COLOURS: dict[str, tuple[str, tuple[int, int, int]]] = {
    "red": ("红色", (220, 30, 35)),
    "green": ("绿色", (25, 160, 50)),
    "blue": ("蓝色", (30, 70, 225)),
    "yellow": ("黄色", (245, 215, 20)),
    "orange": ("橙色", (245, 130, 10)),
    "purple": ("紫色", (125, 30, 180)),
    "cyan": ("青色", (20, 200, 220)),
    "pink": ("粉色", (250, 130, 190)),
}
#: The made-up thing: a rhombus of the first colour with a band of the second. Its caption names neither.
WUG = ("orange", "blue")
#: Direction -> (Chinese, unit vector in picture coordinates: x to the right, y down).
DIRECTIONS: dict[str, tuple[str, tuple[int, int]]] = {
    "left": ("向左", (-1, 0)),
    "right": ("向右", (1, 0)),
    "up": ("向上", (0, -1)),
    "down": ("向下", (0, 1)),
    "still": ("", (0, 0)),
}
#: Background -> (Chinese, grey level at the top, at the bottom).
BACKGROUNDS = {
    "dark": ("深色", 25, 25),
    "light": ("浅色", 235, 235),
    "grey": ("灰色", 128, 128),
    "gradient": ("渐变", 50, 205),
}

#: Start and speed are chosen so that the shape keeps this distance from the border (a share of the shorter
#: side): the centre crop to a bucket takes less.
MARGIN = 0.07


@dataclass(frozen=True)
class Vocabulary:
    """What may occur in footage.

    seconds   shortest and longest video
    nearly_square   share of files close to 1:1; the others are landscape or portrait
    spread    share of its room across its way that a shape's place varies over, around the middle
    way       shortest way along its direction, as a share of its room there
    banded    share of shapes with a band of another colour
    spares    whether the combinations that `is_spared` names never occur, so that a model can be asked for them
    """

    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    backgrounds: tuple[str, ...]
    size: tuple[float, float]
    seconds: tuple[float, float]
    nearly_square: float
    spread: float
    way: float
    banded: float
    spares: bool


_PLAIN = Vocabulary(
    shapes=("circle", "square", "triangle", "ring", "cross"),
    colours=("red", "green", "blue", "yellow", "purple", "cyan"),
    backgrounds=("dark", "light"),
    size=(0.46, 0.56),
    seconds=(1.06, 1.16),
    nearly_square=0.85,
    spread=0.35,
    way=0.85,
    banded=0.0,
    spares=True,
)
_EVERYTHING = Vocabulary(
    shapes=tuple(name for name in SHAPES if name != "wug"),
    colours=tuple(COLOURS),
    backgrounds=tuple(BACKGROUNDS),
    size=(0.34, 0.5),
    seconds=(1.2, 2.2),
    nearly_square=0.6,
    spread=1.0,
    way=0.7,
    banded=0.0,
    spares=False,
)
VOCABULARIES = {
    "plain": _PLAIN,
    "everything": _EVERYTHING,
    "banded": replace(_EVERYTHING, banded=0.3, seconds=(1.06, 1.16)),
    "wug": replace(_PLAIN, shapes=("wug",), colours=WUG[:1], size=(0.52, 0.6), spares=False),
}
#: The footage this project is made with: name -> what `make_footage` is given, per sub-folder. Beside the wugs stand
#: as many plain clips: a model that sees nothing but wugs forgets everything else.
SETS: dict[str, dict[str, dict[str, Any]]] = {
    "demo": {"plain": {"num_videos": 240, "num_images": 16}},
    "wan_tiny": {"plain": {"num_videos": 1600, "num_images": 600, "seed": 1}},
    "vae": {"everything": {"num_videos": 240, "num_images": 16}},
    "vae_decoder": {"banded": {"num_videos": 600, "num_images": 0, "seed": 2}},
    "wan_tiny_i2v": {"plain": {"num_videos": 1200, "num_images": 0, "seed": 4}},
    "wug": {"wug": {"num_videos": 24, "num_images": 0}, "plain": {"num_videos": 24, "num_images": 0, "seed": 3}},
}


def is_spared(shape: str, colour: str, direction: str) -> bool:
    """Whether plain footage never shows this combination: one in six, every pair of the three among the others."""
    if shape not in _PLAIN.shapes or colour not in _PLAIN.colours:
        return False
    return (_PLAIN.shapes.index(shape) + _PLAIN.colours.index(colour) + list(DIRECTIONS).index(direction)) % 6 == 0


@dataclass(frozen=True)
class Scene:
    """One shape on one background.

    `size` is the shape's extent and `speed` its way per second, both as shares of the picture's shorter side;
    `start` is the centre at time 0 as (x, y) shares of width and height. `band` is the colour of a band across the
    shape, "" for none.
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
        named = self.shape == "wug"  # a name says it all
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
        # Only the box around the shape is computed; pixel (i, j) has its centre at (i + 0.5, j + 0.5).
        rows = slice(max(0, math.floor(centre_y - radius - 1)), max(0, math.ceil(centre_y + radius + 1)))
        columns = slice(max(0, math.floor(centre_x - radius - 1)), max(0, math.ceil(centre_x + radius + 1)))
        y, x = np.mgrid[0:height, 0:width][:, rows, columns] + 0.5
        x, y = (x - centre_x) / radius, (y - centre_y) / radius
        cover = np.clip(0.5 - signed_distance(self.shape, x, y) * radius, 0, 1)[..., None]
        picture = plain.copy()
        picture[rows, columns] += cover * (self._paint(y, radius) - picture[rows, columns])
        return picture.round().astype(np.uint8)

    def _paint(self, y: Floats, radius: float) -> Floats:
        """The shape's own colour at heights `y` of its unit circle: (3,), or (height, width, 3) with a band."""
        body = np.array(COLOURS[self.colour][1], dtype=float)
        if not self.band:
            return body
        share = np.clip(0.5 + (0.25 - np.abs(y)) * radius, 0, 1)[..., None]
        return body + share * (np.array(COLOURS[self.band][1]) - body)


def signed_distance(shape: str, x: Floats, y: Floats) -> Floats:
    """Distance to the outline of a shape that fits the unit circle, negative inside; of the shape of `x`."""
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


@dataclass(frozen=True)
class Shot:
    """One file of the demo footage: the truth about it. A still image has fps 0 and one frame."""

    name: str
    scene: Scene
    language: str
    height: int
    width: int
    fps: int
    num_frames: int

    @property
    def caption(self) -> str:
        """The caption that is written beside the file."""
        return self.scene.caption(self.language, still_image=self.fps == 0)

    def frames(self) -> Frames:
        """The shot as drawn, before any compression: uint8 (num_frames, height, width, 3)."""
        return self.scene.frames(self.height, self.width, fps=max(1, self.fps), num_frames=self.num_frames)


def draw_shot(number: int, *, seed: int, size: int, scenes: str = "plain", image: bool = False) -> Shot:
    """The `number`-th video (or image) of a seed and a vocabulary: a fixed function, whatever else is made."""
    words = VOCABULARIES[scenes]
    random = np.random.default_rng([seed, int(image), number])
    short = 2 * int(random.integers(size // 2, size + 1))
    # Most are nearly square, the others landscape or portrait, none exactly a bucket's shape.
    others = (1 - words.nearly_square) * np.array([0.3, 0.3, 0.2, 0.2])
    aspect = random.choice([1.0, 4 / 3, 3 / 4, 16 / 9, 9 / 16], p=[words.nearly_square, *others])
    aspect *= random.uniform(0.95, 1.05)
    height, width = (short, short * aspect) if aspect >= 1 else (short / aspect, short)
    height, width = (2 * round(side / 2) for side in (height, width))
    fps = 0 if image else int(random.choice([12, 16, 24, 30]))
    num_frames = 1 if image else math.ceil(fps * random.uniform(*words.seconds))
    seconds = num_frames / fps if fps else 1.0
    scene = _draw_scene(random, words, height, width, seconds, still=image)
    language = "zh" if random.random() < 0.5 else "en"
    name = f"{'image' if image else 'clip'}-{number:04d}"
    return Shot(name, scene, language, height, width, fps, num_frames)


def _draw_scene(
    random: np.random.Generator, words: Vocabulary, height: int, width: int, seconds: float, still: bool
) -> Scene:
    """A scene whose shape stays wholly inside the picture, margin kept, for all of its `seconds`."""
    while True:
        shape, colour, background = (
            table[random.integers(len(table))] for table in (words.shapes, words.colours, words.backgrounds)
        )
        # A list of str, not a NumPy array: np.str_ would travel into JSON and captions.
        direction = "still" if still else list(DIRECTIONS)[random.choice(5, p=[0.22, 0.22, 0.22, 0.22, 0.12])]
        if still or not (words.spares and is_spared(shape, colour, direction)):
            break
    band = WUG[1] if shape == "wug" else ""
    if random.random() < words.banded:
        band = random.choice([other for other in words.colours if other != colour]).item()
    size, short = random.uniform(*words.size), min(height, width)
    # The centre's room along x and y, as a share of width and height.
    room = [1 - (size + 2 * MARGIN) * short / side for side in (width, height)]
    low = [(1 - free) / 2 for free in room]
    start = [0.5 + (random.uniform(0, 1) - 0.5) * words.spread * free for free in room]
    speed = 0.0
    if direction != "still":
        axis = 0 if direction in {"left", "right"} else 1
        way = room[axis] * random.uniform(words.way, 1.0)
        forward = DIRECTIONS[direction][1][axis] > 0
        slack = (room[axis] - way) * random.uniform(0, 1)
        start[axis] = low[axis] + slack if forward else low[axis] + room[axis] - slack
        speed = way * (width, height)[axis] / short / seconds
    centre = (float(start[0]), float(start[1]))
    return Scene(shape, colour, background, direction, float(size), float(speed), centre, band)


def make_footage(
    folder: str | Path,
    *,
    scenes: str = "plain",
    num_videos: int = 240,
    num_images: int = 16,
    seed: int = 0,
    size: int = 64,
) -> None:
    """Write the demo's footage: NAME.mp4 or NAME.png, NAME.txt, scenes.jsonl (the truth), and demo.json last.

    `scenes` names a vocabulary. A video's shorter side is between `size` and twice that, in pixels. A folder that is
    complete with these settings is left as it is; ValueError for one that holds something else.
    """
    folder = Path(folder)
    if scenes not in VOCABULARIES:
        raise ValueError(f"scenes={scenes!r} is unknown; choose one of {', '.join(VOCABULARIES)}")
    settings = {
        "schema": 2,
        "scenes": scenes,
        "num_videos": num_videos,
        "num_images": num_images,
        "seed": seed,
        "size": size,
    }
    if (folder / SENTINEL).is_file():
        _check_same(folder, settings)
        return
    claim_folder(folder, sentinel=SENTINEL, key="folder")
    # Made beside and moved as a whole: what carries the final name is complete, whenever a run is killed.
    beside = folder.resolve().with_name(f".{folder.resolve().name}.making")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    shots = [draw_shot(i, seed=seed, size=size, scenes=scenes) for i in range(num_videos)]
    shots += [draw_shot(i, seed=seed, size=size, scenes=scenes, image=True) for i in range(num_images)]
    for shot in tqdm(shots, desc="demo footage", unit="file", disable=not distributed.is_main()):
        _write_shot(beside, shot)
    lines = [json.dumps(_truth(shot), ensure_ascii=False) for shot in shots]
    (beside / "scenes.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(beside / SENTINEL, {**settings, "files": len(shots)})
    beside.replace(folder.resolve())


def _write_shot(folder: Path, shot: Shot) -> None:
    """The picture or video, and its caption beside it."""
    if shot.fps == 0:
        Image.fromarray(shot.frames()[0]).save(folder / f"{shot.name}.png")
    else:
        write_mp4(folder / f"{shot.name}.mp4", shot.frames(), shot.fps, quality=8)
    (folder / f"{shot.name}.txt").write_text(shot.caption + "\n", encoding="utf-8")


def _truth(shot: Shot) -> dict[str, Any]:
    """A line of scenes.jsonl: everything that a judge of generated or decoded clips may want to know."""
    file = f"{shot.name}.{'png' if shot.fps == 0 else 'mp4'}"
    return {"file": file, "caption": shot.caption, **{k: v for k, v in asdict(shot).items() if k != "name"}}


def _check_same(folder: Path, settings: dict[str, Any]) -> None:
    """Raise ValueError if the finished footage in `folder` was made with other settings, naming them."""
    there = json.loads((folder / SENTINEL).read_text(encoding="utf-8"))
    differing = [f"{key}={there.get(key)}" for key, value in settings.items() if there.get(key) != value]
    if differing:
        wanted = ", ".join(f"{key}={value}" for key, value in settings.items() if there.get(key) != value)
        raise ValueError(
            f"{folder} holds demo footage made with {', '.join(differing)}, not {wanted}; "
            "give another folder, or remove this one"
        )
