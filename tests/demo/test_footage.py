"""The demo's footage: deterministic, and true to its captions in the pixels of the files themselves."""

import itertools
import json
from dataclasses import replace

import imageio.v3 as iio
import numpy as np
import pytest

from wantrain.demo.footage import draw_shot, make_footage
from wantrain.demo.scene import Scene, signed_distance
from wantrain.demo.vocabulary import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, VOCABULARIES, is_spared

SMALL = {"num_videos": 5, "num_images": 2}


@pytest.fixture(scope="module")
def footage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "footage"
    make_footage(folder, **SMALL)
    return folder


def truths(folder):
    return [json.loads(line) for line in (folder / "scenes.jsonl").read_text(encoding="utf-8").splitlines()]


def coloured(frames):
    """Where a frame has hue: all backgrounds have none."""
    levels = frames.astype(int)
    return levels.max(-1) - levels.min(-1) > 60


def centres(frames):
    return np.array([np.argwhere(mask).mean(axis=0) for mask in coloured(frames)])


def test_files_and_sentinel(footage):
    """A set of footage has a caption per file, scenes.jsonl, and the sentinel demo.json."""
    names = sorted(path.name for path in footage.iterdir())
    clips = [f"clip-{i:04d}.{suffix}" for i in range(5) for suffix in ("mp4", "txt")]
    images = [f"image-{i:04d}.{suffix}" for i in range(2) for suffix in ("png", "txt")]
    assert names == sorted([*clips, *images, "demo.json", "scenes.jsonl"])
    sentinel = json.loads((footage / "demo.json").read_text())
    assert sentinel == {
        "schema": 2,
        "scenes": "plain",
        "num_videos": 5,
        "num_images": 2,
        "seed": 0,
        "size": 64,
        "files": 7,
    }


def test_scene_records(footage):
    """scenes.jsonl holds the true caption, size, rate and length of every file."""
    for truth in truths(footage):
        path = footage / truth["file"]
        assert path.with_suffix(".txt").read_text(encoding="utf-8").strip() == truth["caption"]
        frames = iio.imread(path, plugin="FFMPEG") if path.suffix == ".mp4" else iio.imread(path)[None]
        assert frames.shape == (truth["num_frames"], truth["height"], truth["width"], 3)
        if path.suffix == ".mp4":
            assert iio.immeta(path, plugin="FFMPEG")["fps"] == truth["fps"]


def test_decoded_motion(footage):
    """Decoded clips move as their captions say."""
    for truth in truths(footage):
        if truth["fps"] == 0:
            continue
        scene = truth["scene"]
        places = centres(iio.imread(footage / truth["file"], plugin="FFMPEG"))
        moved = (places[-1] - places[0])[::-1]  # x, y
        seconds, short = (truth["num_frames"] - 1) / truth["fps"], min(truth["height"], truth["width"])
        wanted = np.array(DIRECTIONS[scene["direction"]][1]) * scene["speed"] * short * seconds
        np.testing.assert_allclose(moved, wanted, atol=1.0)


@pytest.mark.parametrize("image", [False, True])
def test_shape_visible(image):
    """A shape is wholly visible in every frame."""
    for number in range(12):
        shot = draw_shot(number, seed=3, size=64, image=image)
        frames = shot.scene.frames(shot.height, shot.width, fps=max(1, shot.fps), num_frames=shot.num_frames)
        masks = coloured(frames)
        border = round(0.05 * min(shot.height, shot.width))
        assert masks.any(axis=(1, 2)).all()
        for edge in (masks[:, :border], masks[:, -border:], masks[:, :, :border], masks[:, :, -border:]):
            assert not edge.any()
        assert len({int(mask.sum()) // 40 for mask in masks}) <= 2  # no part leaves, whatever the subpixel place


def test_named_colour(tmp_path):
    """The named colour is the nearest one to the shape's pixels."""
    for colour, (_, value) in COLOURS.items():
        for background in BACKGROUNDS:
            scene = Scene("circle", colour, background, "still", 0.4, 0.0, (0.5, 0.5))
            middle = scene.frames(64, 64, fps=16, num_frames=1)[0, 32, 32]
            distances = {name: np.abs(middle.astype(int) - other).sum() for name, (_, other) in COLOURS.items()}
            assert min(distances, key=distances.__getitem__) == colour
            assert tuple(middle) == value


def test_motion_by_time():
    """Motion depends on time, not on the frame number."""
    scene = Scene("star", "red", "gradient", "right", 0.4, 0.3, (0.3, 0.5))
    slow = scene.frames(64, 96, fps=12, num_frames=6)
    fast = scene.frames(64, 96, fps=24, num_frames=12)
    np.testing.assert_array_equal(slow, fast[::2])
    places = centres(fast)
    np.testing.assert_allclose(np.diff(places[:, 1]), 0.3 * 64 / 24, atol=0.25)
    np.testing.assert_allclose(np.diff(places[:, 0]), 0, atol=0.25)


@pytest.mark.parametrize("shape", SHAPES)
def test_shape_area_and_edges(shape):
    """Shapes have their area and smooth edges.

    The covered area by anti-aliasing is that of the outline on a far finer grid, wherever the centre lies.
    """
    y, x = np.mgrid[-1.1:1.1:1000j, -1.1:1.1:1000j]
    exact = (signed_distance(shape, x, y) < 0).mean() * 2.2**2
    for start in ((0.5, 0.5), (0.503, 0.497)):
        scene = Scene(shape, "red", "dark", "still", 0.5, 0.0, start)
        frame = scene.frames(128, 128, fps=16, num_frames=1)[0].astype(float)
        cover = (frame[..., 0] - 25) / (COLOURS["red"][1][0] - 25)
        assert cover.sum() / 32**2 == pytest.approx(exact, rel=0.02)
        assert ((cover > 0.02) & (cover < 0.98)).any()
    assert (signed_distance(shape, x, y)[np.hypot(x, y) > 1.15] > 0).all()


def test_captions():
    """Captions name the whole scene in both languages."""
    seen, shapes = set(), [shape for shape in SHAPES if shape != "wug"]
    for shape in shapes:
        for colour in COLOURS:
            for direction in DIRECTIONS:
                for background in BACKGROUNDS:
                    scene = Scene(shape, colour, background, direction, 0.4, 0.2, (0.5, 0.5))
                    english, chinese = scene.caption(), scene.caption("zh")
                    assert all(word in english for word in (shape, colour, background, direction))
                    assert SHAPES[shape] in chinese and COLOURS[colour][0] in chinese
                    assert english.isascii() and not any(letter.isascii() for letter in chinese)
                    seen |= {english, chinese}
    assert len(seen) == 2 * len(shapes) * len(COLOURS) * len(DIRECTIONS) * len(BACKGROUNDS)
    scene = Scene("circle", "orange", "light", "right", 0.4, 0.2, (0.5, 0.5))
    assert scene.caption() == "an orange circle moving right on a light background"
    assert scene.caption("zh") == "一个橙色的圆形在浅色背景上向右移动"
    assert scene.caption(still_image=True) == "a picture of an orange circle on a light background"
    banded = replace(scene, band="blue")
    assert banded.caption() == "an orange circle with a blue band moving right on a light background"
    assert banded.caption("zh") == "一个带蓝色条纹的橙色的圆形在浅色背景上向右移动"
    wug = replace(banded, shape="wug")
    assert wug.caption() == "a wug moving right on a light background", "its name says it all"
    assert wug.caption("zh") == "一个wug在浅色背景上向右移动"
    with pytest.raises(ValueError, match="language='fr'"):
        scene.caption("fr")


@pytest.mark.parametrize("scenes", VOCABULARIES)
def test_shot_variety(scenes):
    """Shots are varied within their vocabulary."""
    words = VOCABULARIES[scenes]
    shots = [draw_shot(number, seed=0, size=64, scenes=scenes) for number in range(200)]
    assert {shot.fps for shot in shots} == {12, 16, 24, 30}
    assert 0.4 < np.mean([shot.language == "zh" for shot in shots]) < 0.6
    for what in ("shape", "colour", "background"):
        assert {getattr(shot.scene, what) for shot in shots} == set(getattr(words, f"{what}s"))
    assert {shot.scene.direction for shot in shots} == set(DIRECTIONS)
    aspects = np.array([shot.width / shot.height for shot in shots])
    assert abs(np.mean(np.abs(aspects - 1) < 0.1) - words.nearly_square) < 0.1
    assert min(aspects) < 0.6 and max(aspects) > 1.7
    assert all(64 <= min(shot.height, shot.width) <= 128 for shot in shots)
    shortest, longest = words.seconds
    assert all(shortest <= shot.num_frames / shot.fps < longest + 1 / shot.fps for shot in shots)
    assert all(words.size[0] <= shot.scene.size <= words.size[1] for shot in shots)
    banded = np.mean([shot.scene.band != "" for shot in shots])
    assert abs(banded - (1.0 if scenes == "wug" else words.banded)) < 0.1
    assert all(shot.scene.band != shot.scene.colour for shot in shots)


def test_spared_combinations():
    """Spared combinations never occur, and every pair of attributes does."""
    scenes = [draw_shot(number, seed=3, size=64).scene for number in range(1500)]
    seen = {(scene.shape, scene.colour, scene.direction) for scene in scenes}
    words = VOCABULARIES["plain"]
    every = set(itertools.product(words.shapes, words.colours, DIRECTIONS))
    spared = {combination for combination in every if is_spared(*combination)}
    assert seen == every - spared
    assert len(spared) / len(every) == pytest.approx(1 / 6)
    for pair in ((0, 1), (0, 2), (1, 2)):
        pairs = [{tuple(c[i] for i in pair) for c in group} for group in (seen, every)]
        assert pairs[0] == pairs[1]
    assert not is_spared("wug", "orange", "left")


def test_shot_by_seed_and_number(footage):
    """A shot is a function of the seed and its number."""
    assert draw_shot(4, seed=0, size=64) == draw_shot(4, seed=0, size=64)
    assert draw_shot(4, seed=0, size=64) != draw_shot(4, seed=1, size=64)
    assert truths(footage)[4]["caption"] == draw_shot(4, seed=0, size=64).caption


def test_finished_footage(footage, tmp_path):
    """Finished footage is left unchanged, and folders with other settings or other files are refused."""
    before = {path: path.stat().st_mtime_ns for path in footage.iterdir()}
    make_footage(footage, **SMALL)
    assert before == {path: path.stat().st_mtime_ns for path in footage.iterdir()}
    with pytest.raises(ValueError, match=r"made with num_videos=5, not num_videos=6"):
        make_footage(footage, **{**SMALL, "num_videos": 6})
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="holds something else"):
        make_footage(tmp_path, **SMALL)


def test_killed_run(footage, tmp_path):
    """The partial folder that a killed run left is replaced."""
    (tmp_path / ".footage.making").mkdir()
    (tmp_path / ".footage.making" / "clip-0000.mp4").write_text("half")
    make_footage(tmp_path / "footage", num_videos=1, num_images=1)
    assert not (tmp_path / ".footage.making").exists()
    again, first = ((folder / "clip-0000.mp4").read_bytes() for folder in (tmp_path / "footage", footage))
    assert again == first
