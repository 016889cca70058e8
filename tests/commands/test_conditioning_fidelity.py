"""The recipe's model is faithful to what it is told: an hour of training, then benchmarks/told.py measures."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def measuring():
    """benchmarks/told.py as a module."""
    spec = importlib.util.spec_from_file_location("told", ROOT / "benchmarks" / "told.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_measure_tells_the_clip_itself_from_one_that_forgot_it():
    """PSNR of known pixels is of these alone, and of no others."""
    told = measuring()
    shots = [told.draw_shot(number, seed=1000, size=64) for number in range(3)]
    clips = [told.to_frames(clip) for clip in told.pixels_of(shots)]
    known = [mask[0].numpy() for mask in told.masks_of(told.Mix.read({"image": 1.0}), "image", range(3))]
    assert all(mask[0].all() and not mask[1:].any() for mask in known)
    forgot = [clip.copy() for clip in clips]
    for clip in forgot:
        clip[0] //= 2
    off = [clip.copy() for clip in clips]
    for clip in off:
        clip[1:] //= 2
        clip[0] ^= 1  # a level more or less everywhere: 48.13 dB
    assert told.mean_psnr(forgot, clips, known) < 15
    assert told.mean_psnr(off, clips, known) == pytest.approx(48.13, abs=0.01)
    assert told.mean_psnr(off, clips, [~mask for mask in known]) < 15


def test_far_from_holes_is_a_latent_or_more_away():
    told = measuring()
    known = np.ones((2, 32, 40), dtype=bool)
    known[0, 10, 20] = False
    far = told.far_from_holes(known)
    wanted = np.ones((2, 32, 40), dtype=bool)
    wanted[0, 2:19, 12:29] = False
    assert (far == wanted).all()


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
def test_the_recipe_makes_a_model_that_keeps_what_it_is_told_and_goes_on_from_it(environment, tmp_path):
    for command in (
        ("train.py", "recipe=wan_tiny_i2v"),
        ("export.py", "run=wan_tiny_i2v", "model=tiny_i2v", "out=pipeline"),
    ):
        subprocess.run([sys.executable, ROOT / command[0], *command[1:]], cwd=tmp_path, env=environment, check=True)
    told = measuring()
    sampler, settings = told.open_sampler(tmp_path / "pipeline")
    image, boxes = (told.measure(kind, sampler, settings) for kind in ("image", "boxes"))
    assert image["lost"] < 1 and boxes["lost"] < 1, (image, boxes)
    for found in (image, boxes):
        assert min(found["colour"], found["shape"], found["direction"]) >= 0.9, found
        assert found["hole"] > found["hole_gray"] + 10, found
