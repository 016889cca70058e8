"""Frames as pixels of a given size: covered without squeezing, cropped at the centre, antialiased."""

import numpy as np
import pytest
import torch
from shard_helpers import SIZES

from wantrain.data.footage.pixels import prepare_pixels
from wantrain.demo.scene import Scene


@pytest.mark.parametrize("shape", [(48, 48), (120, 90), (90, 120), (300, 64), (64, 300), (33, 57), (64, 64)])
@pytest.mark.parametrize("size", [(64, 64), (48, 80), (80, 48)])
def test_cover_and_levels(shape, size):
    frames = np.full((5, *shape, 3), (0, 128, 255), dtype=np.uint8)
    pixels, cropped = prepare_pixels(frames, size)
    assert pixels.shape == (3, 5, *size)
    assert pixels.dtype == torch.float32
    for channel, level in enumerate((-1.0, 128 / 127.5 - 1, 1.0)):
        torch.testing.assert_close(pixels[channel], torch.full_like(pixels[channel], level), rtol=0, atol=1e-5)
    scale = max(size[0] / shape[0], size[1] / shape[1])
    assert cropped == pytest.approx(1 - size[0] * size[1] / (shape[0] * shape[1] * scale**2), abs=0.02)


@pytest.mark.parametrize(("height", "width"), [(200, 130), (130, 200), (160, 160), (96, 180)])
def test_aspect_and_centre(height, width):
    """A circle in the middle stays a circle in the middle."""
    scene = Scene("circle", "red", "dark", "still", 0.5, 0.0, (0.5, 0.5))
    for size in SIZES.sizes(1)[0]:
        pixels, _ = prepare_pixels(scene.frames(height, width, fps=16, num_frames=1), size)
        # Red rises from 25 to 220 across the edge; the cover of each pixel is its share of that.
        cover = ((pixels[0, 0] + 1) * 127.5 - 25).clamp(min=0) / 195
        rows, columns = cover.sum(0).max().item(), cover.sum(1).max().item()  # heights and widths of the circle
        scale = max(size[0] / height, size[1] / width)
        assert rows == pytest.approx(columns, abs=1.0)
        assert rows == pytest.approx(min(0.5 * min(height, width) * scale, size[0]), abs=1.0)
        y, x = (cover.sum(axis) @ torch.arange(length).float() for axis, length in ((1, size[0]), (0, size[1])))
        assert y / cover.sum() == pytest.approx((size[0] - 1) / 2, abs=0.6)
        assert x / cover.sum() == pytest.approx((size[1] - 1) / 2, abs=0.6)


def test_antialiasing():
    """A fine chequerboard becomes grey; picking pixels would leave it black and white."""
    board = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
    pixels, _ = prepare_pixels(np.repeat(board[None, :, :, None], 3, axis=3), (64, 64))
    assert pixels[:, :, 4:-4, 4:-4].abs().max() < 0.02


def test_same_size_unchanged():
    frames = np.random.default_rng(0).integers(0, 256, (3, 64, 80, 3)).astype(np.uint8)
    pixels, cropped = prepare_pixels(frames, (64, 80))
    assert cropped == 0
    np.testing.assert_array_equal(((pixels + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy(), frames)
