"""The vocabulary of the demo's footage: shapes, colours, directions, backgrounds, and what each data set may show."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

#: Shape -> Chinese name.
SHAPES = {
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "star": "五角星",
    "ring": "圆环",
    "cross": "十字",
    "wug": "wug",
}
#: Colour -> (Chinese name, RGB). All have hue, which backgrounds have not.
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
#: The colours of the wug: a rhombus of the first with a band of the second. Its caption names neither.
WUG = ("orange", "blue")
#: Direction -> (Chinese name, unit vector in picture coordinates: x to the right, y down).
DIRECTIONS: dict[str, tuple[str, tuple[int, int]]] = {
    "left": ("向左", (-1, 0)),
    "right": ("向右", (1, 0)),
    "up": ("向上", (0, -1)),
    "down": ("向下", (0, 1)),
    "still": ("", (0, 0)),
}
#: Background -> (Chinese name, grey level at the top, grey level at the bottom).
BACKGROUNDS = {
    "dark": ("深色", 25, 25),
    "light": ("浅色", 235, 235),
    "grey": ("灰色", 128, 128),
    "gradient": ("渐变", 50, 205),
}


@dataclass(frozen=True)
class Vocabulary:
    """What may occur in footage.

    shapes, colours, backgrounds  names from the tables above
    size           smallest and largest extent of a shape, as a share of the picture's shorter side
    seconds        shortest and longest video
    nearly_square  share of files close to 1:1; the others are landscape or portrait
    spread         range of a shape's place across its direction of motion, around the middle, as a share of its room
    travel         shortest distance along its direction of motion, as a share of its room
    banded         share of shapes with a band of another colour
    spares         True if the combinations of `is_spared` never occur, so that a model can be tested on them
    """

    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    backgrounds: tuple[str, ...]
    size: tuple[float, float]
    seconds: tuple[float, float]
    nearly_square: float
    spread: float
    travel: float
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
    travel=0.85,
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
    travel=0.7,
    banded=0.0,
    spares=False,
)
VOCABULARIES = {
    "plain": _PLAIN,
    "everything": _EVERYTHING,
    "banded": replace(_EVERYTHING, banded=0.3, seconds=(1.06, 1.16)),
    "wug": replace(_PLAIN, shapes=("wug",), colours=WUG[:1], size=(0.52, 0.6), spares=False),
}
#: The project's data sets: name -> arguments of `make_footage` per sub-folder. The wugs come with as many plain clips:
#: a model that sees only wugs forgets everything else.
SETS: dict[str, dict[str, dict[str, Any]]] = {
    "demo": {"plain": {"num_videos": 240, "num_images": 16}},
    "wan_tiny": {"plain": {"num_videos": 1600, "num_images": 600, "seed": 1}},
    "vae": {"everything": {"num_videos": 240, "num_images": 16}},
    "vae_decoder": {"banded": {"num_videos": 600, "num_images": 0, "seed": 2}},
    "wan_tiny_i2v": {"plain": {"num_videos": 1200, "num_images": 0, "seed": 4}},
    "wug": {"wug": {"num_videos": 24, "num_images": 0}, "plain": {"num_videos": 24, "num_images": 0, "seed": 3}},
}


def is_spared(shape: str, colour: str, direction: str) -> bool:
    """True if plain footage never shows this combination: one in six. Every pair of the three occurs in other ones."""
    if shape not in _PLAIN.shapes or colour not in _PLAIN.colours:
        return False
    return (_PLAIN.shapes.index(shape) + _PLAIN.colours.index(colour) + list(DIRECTIONS).index(direction)) % 6 == 0
