"""Procedural footage with true captions, written as real mp4 and png files.

A `Vocabulary` limits what may occur: wan-tiny learns `plain`; its VAE learns to encode and decode `everything` and
`banded`; `wug`, a thing with a made-up name, stands for a user's own footage. The caption says everything that differs
between files, except size and place.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from wantrain.demo.scene import Scene
from wantrain.demo.vocabulary import DIRECTIONS, VOCABULARIES, WUG, Vocabulary, is_spared
from wantrain.util import distributed
from wantrain.util.files import claim_folder, write_json
from wantrain.video import Frames, write_mp4

#: The file that marks complete footage and holds its settings.
SENTINEL = "demo.json"
#: Distance that shapes keep from the border, as a share of the shorter side; the centre crop to a bucket takes less.
MARGIN = 0.07


@dataclass(frozen=True)
class Shot:
    """One file of the demo's footage and the truth about it. A still image has fps 0 and one frame."""

    name: str
    scene: Scene
    language: str
    height: int
    width: int
    fps: int
    num_frames: int

    @property
    def caption(self) -> str:
        """The caption written beside the file."""
        return self.scene.caption(self.language, still_image=self.fps == 0)

    def frames(self) -> Frames:
        """The frames before compression: uint8 (num_frames, height, width, 3)."""
        return self.scene.frames(self.height, self.width, fps=max(1, self.fps), num_frames=self.num_frames)


def draw_shot(number: int, *, seed: int, size: int, scenes: str = "plain", image: bool = False) -> Shot:
    """The `number`-th video (or image) of a seed and a vocabulary, independent of all others."""
    words = VOCABULARIES[scenes]
    random = np.random.default_rng([seed, int(image), number])
    short = 2 * int(random.integers(size // 2, size + 1))
    # Most are nearly square, the others landscape or portrait; none has exactly a bucket's shape.
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
    """A scene whose shape stays inside the picture, with a margin, for all of its `seconds`."""
    while True:
        shape, colour, background = (
            table[random.integers(len(table))] for table in (words.shapes, words.colours, words.backgrounds)
        )
        # A list of str, not a NumPy array, whose np.str_ would end up in JSON and captions.
        direction = "still" if still else list(DIRECTIONS)[random.choice(5, p=[0.22, 0.22, 0.22, 0.22, 0.12])]
        if still or not (words.spares and is_spared(shape, colour, direction)):
            break
    band = WUG[1] if shape == "wug" else ""
    if random.random() < words.banded:
        band = random.choice([other for other in words.colours if other != colour]).item()
    size, short = random.uniform(*words.size), min(height, width)
    # The range of the centre along x and y, as a share of width and height.
    space = [1 - (size + 2 * MARGIN) * short / side for side in (width, height)]
    low = [(1 - free) / 2 for free in space]
    start = [0.5 + (random.uniform(0, 1) - 0.5) * words.spread * free for free in space]
    speed = 0.0
    if direction != "still":
        axis = 0 if direction in {"left", "right"} else 1
        travel = space[axis] * random.uniform(words.travel, 1.0)
        forward = DIRECTIONS[direction][1][axis] > 0
        slack = (space[axis] - travel) * random.uniform(0, 1)
        start[axis] = low[axis] + slack if forward else low[axis] + space[axis] - slack
        speed = travel * (width, height)[axis] / short / seconds
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

    `scenes` names a vocabulary. A video's shorter side is between `size` and twice that, in pixels. A complete folder
    with these settings is left as it is; ValueError for one that holds something else.
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
    # Made under a temporary name and renamed: a folder with the final name is complete, even after a kill.
    partial = folder.resolve().with_name(f".{folder.resolve().name}.making")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    shots = [draw_shot(i, seed=seed, size=size, scenes=scenes) for i in range(num_videos)]
    shots += [draw_shot(i, seed=seed, size=size, scenes=scenes, image=True) for i in range(num_images)]
    for shot in tqdm(shots, desc="demo footage", unit="file", disable=not distributed.is_main()):
        _write_shot(partial, shot)
    lines = [json.dumps(_truth(shot), ensure_ascii=False) for shot in shots]
    (partial / "scenes.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(partial / SENTINEL, {**settings, "files": len(shots)})
    partial.replace(folder.resolve())


def _write_shot(folder: Path, shot: Shot) -> None:
    """Write the image or video, and its caption beside it."""
    if shot.fps == 0:
        Image.fromarray(shot.frames()[0]).save(folder / f"{shot.name}.png")
    else:
        write_mp4(folder / f"{shot.name}.mp4", shot.frames(), shot.fps, quality=8)
    (folder / f"{shot.name}.txt").write_text(shot.caption + "\n", encoding="utf-8")


def _truth(shot: Shot) -> dict[str, Any]:
    """A row of scenes.jsonl: all facts of a shot, for judging generated or decoded clips."""
    file = f"{shot.name}.{'png' if shot.fps == 0 else 'mp4'}"
    return {"file": file, "caption": shot.caption, **{k: v for k, v in asdict(shot).items() if k != "name"}}


def _check_same(folder: Path, settings: dict[str, Any]) -> None:
    """Raise ValueError if the finished footage in `folder` was made with other settings, naming them."""
    stored = json.loads((folder / SENTINEL).read_text(encoding="utf-8"))
    differing = [f"{key}={stored.get(key)}" for key, value in settings.items() if stored.get(key) != value]
    if differing:
        wanted = ", ".join(f"{key}={value}" for key, value in settings.items() if stored.get(key) != value)
        raise ValueError(
            f"{folder} holds demo footage made with {', '.join(differing)}, not {wanted}; "
            "give another folder, or remove this one"
        )
