"""The judge reads real files of footage that no model saw, and is not fooled by the nearest wrong answers."""

import json
from dataclasses import replace

import imageio.v3 as iio
import numpy as np
import pytest

from wantrain.demo.footage import make_footage
from wantrain.demo.judge import judge, scores, shows, spared_scenes, wug_scenes
from wantrain.demo.scene import Scene
from wantrain.demo.vocabulary import DIRECTIONS, SHAPES, VOCABULARIES, is_spared

PLAIN = VOCABULARIES["plain"]


def drawn(scene, num_frames=17):
    return scene.frames(64, 64, fps=16, num_frames=num_frames)


@pytest.mark.parametrize(
    ("scenes", "count"), [pytest.param("plain", 120, marks=pytest.mark.slow), ("plain", 30), ("wug", 25)]
)
def test_heldout_footage(scenes, count, tmp_path):
    """The judge is right about at least 98 in 100 held-out files, compression and odd sizes included."""
    make_footage(tmp_path / "footage", scenes=scenes, num_videos=count, num_images=0, seed=99)
    truths = [json.loads(line) for line in (tmp_path / "footage" / "scenes.jsonl").read_text("utf-8").splitlines()]
    shown = [Scene(**{**truth["scene"], "start": tuple(truth["scene"]["start"])}) for truth in truths]
    clips = [iio.imread(tmp_path / "footage" / truth["file"], plugin="FFMPEG") for truth in truths]
    shares = scores([judge(clip) for clip in clips], shown)
    assert shares["all"] >= 0.98, shares


@pytest.mark.parametrize("background", PLAIN.backgrounds)
@pytest.mark.parametrize("shape", PLAIN.shapes)
def test_colours_and_shapes(shape, background):
    """The judge distinguishes every colour and shape from every other."""
    for colour in PLAIN.colours:
        scene = Scene(shape, colour, background, "right", 0.5, 0.25, (0.38, 0.5))
        verdict = judge(drawn(scene))
        assert (verdict.colour, verdict.shape, verdict.direction) == (colour, shape, "right")
        assert verdict.overlap > 0.9


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_directions(direction):
    """The judge's direction is that of the pixels, also when the clip runs backwards."""
    step = np.array(DIRECTIONS[direction][1])
    start = tuple((0.5 - 0.12 * step).tolist())
    scene = Scene("ring", "cyan", "light", direction, 0.46, 0.24 * bool(step.any()), start)
    assert judge(drawn(scene)).direction == direction
    backwards = judge(drawn(scene)[::-1]).direction
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up", "still": "still"}
    assert backwards == opposite[direction]


def test_diagonal_and_empty():
    """A diagonal motion has no direction, and an empty picture has no colour, shape or direction."""
    frames = drawn(Scene("square", "red", "dark", "right", 0.5, 0.25, (0.38, 0.38)))
    slanting = np.stack([np.roll(frame, i, axis=0) for i, frame in enumerate(frames)])
    assert judge(slanting).direction == ""
    nothing = judge(np.full((17, 64, 64, 3), 128, dtype=np.uint8))
    assert (nothing.colour, nothing.shape, nothing.direction) == ("", "", "")


def test_wug():
    """A wug needs its outline and both colours."""
    wug = Scene("wug", "orange", "dark", "still", 0.55, 0.0, (0.5, 0.5), band="blue")
    assert judge(drawn(wug)).shape == "wug"
    assert judge(drawn(wug)).colour == "wug"
    assert judge(drawn(replace(wug, band=""))).shape != "wug", "a plain rhombus is none"
    assert judge(drawn(replace(wug, shape="circle"))).shape == "circle", "nor is a banded circle"
    for shape in PLAIN.shapes:
        assert judge(drawn(replace(wug, shape=shape, band=""))).shape != "wug"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_captions_are_read(language):
    """A clip shows its own caption and no other one; what the judge cannot read has no answer."""
    for scene, _ in [spared_scenes(1)[0], wug_scenes(1)[0]]:
        own, frames = replace(scene, speed=0.5), drawn(replace(scene, speed=0.5))
        assert shows(own.caption(language), frames) is True
        assert (
            shows(replace(own, direction="up" if own.direction != "up" else "down").caption(language), frames) is False
        )
    assert shows("a red circle", frames) is shows("a cat", frames) is None


def test_evaluation_scenes():
    """The scenes that a model is asked for were never in its footage and are balanced."""
    asked = spared_scenes(64)
    assert asked == spared_scenes(64) and asked[:10] == spared_scenes(10)
    assert all(is_spared(scene.shape, scene.colour, scene.direction) for scene, _ in asked)
    assert len({scene.caption(language) for scene, language in asked}) == 64
    assert {scene.shape for scene, _ in asked} == set(PLAIN.shapes)
    assert {scene.colour for scene, _ in asked} == set(PLAIN.colours)
    assert {scene.direction for scene, _ in asked} == set(DIRECTIONS)
    for language in ("en", "zh"):
        for background in PLAIN.backgrounds:
            share = np.mean([spoken == language and scene.background == background for scene, spoken in asked])
            assert 0.15 < share < 0.35
    wugs = wug_scenes(20)
    assert len({scene.caption(language) for scene, language in wugs}) == 20
    assert all(scene.shape == "wug" for scene, _ in wugs)


def test_scores_are_shares():
    scene = Scene("cross", "red", "dark", "up", 0.5, 0.2, (0.5, 0.6))
    right = judge(drawn(scene))
    shares = scores([right, replace(right, colour="blue"), replace(right, shape="ring", direction="down")], [scene] * 3)
    assert shares == pytest.approx({"colour": 2 / 3, "shape": 2 / 3, "direction": 2 / 3, "all": 1 / 3})
    assert set(SHAPES) >= {"wug", *PLAIN.shapes}
