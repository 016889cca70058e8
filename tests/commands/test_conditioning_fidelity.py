"""The recipe's model is faithful to its conditioning input: an hour of training, then benchmarks/conditioning.py."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def measuring():
    """benchmarks/conditioning.py as a module."""
    spec = importlib.util.spec_from_file_location("fidelity", ROOT / "benchmarks" / "conditioning.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_psnr_of_known_pixels():
    """PSNR of known pixels is of these alone, and of no others."""
    fidelity = measuring()
    shots = [fidelity.draw_shot(number, seed=1000, size=64) for number in range(3)]
    clips = [fidelity.to_frames(clip) for clip in fidelity.pixels_of(shots)]
    known = [mask[0].numpy() for mask in fidelity.masks_of(fidelity.MaskMix.read({"image": 1.0}), "image", range(3))]
    assert all(mask[0].all() and not mask[1:].any() for mask in known)
    forgot = [clip.copy() for clip in clips]
    for clip in forgot:
        clip[0] //= 2
    off = [clip.copy() for clip in clips]
    for clip in off:
        clip[1:] //= 2
        clip[0] ^= 1  # a level more or less everywhere: 48.13 dB
    assert fidelity.mean_psnr(forgot, clips, known) < 15
    assert fidelity.mean_psnr(off, clips, known) == pytest.approx(48.13, abs=0.01)
    assert fidelity.mean_psnr(off, clips, [~mask for mask in known]) < 15


def test_far_from_holes():
    fidelity = measuring()
    known = np.ones((2, 32, 40), dtype=bool)
    known[0, 10, 20] = False
    far = fidelity.far_from_holes(known)
    wanted = np.ones((2, 32, 40), dtype=bool)
    wanted[0, 2:19, 12:29] = False
    assert (far == wanted).all()


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
def test_i2v_recipe_keeps_known_pixels(environment, tmp_path):
    for command in (
        ("train.py", "recipe=wan_tiny_i2v"),
        ("export.py", "run=wan_tiny_i2v", "model=tiny_i2v", "out=pipeline"),
    ):
        subprocess.run([sys.executable, ROOT / command[0], *command[1:]], cwd=tmp_path, env=environment, check=True)
    fidelity = measuring()
    sampler, settings = fidelity.open_sampler(tmp_path / "pipeline")
    image, boxes = (fidelity.measure(name, sampler, settings) for name in ("image", "boxes"))
    assert image["lost"] < 1 and boxes["lost"] < 1, (image, boxes)
    for found in (image, boxes):
        assert min(found["colour"], found["shape"], found["direction"]) >= 0.9, found
        assert found["hole"] > found["hole_gray"] + 10, found
