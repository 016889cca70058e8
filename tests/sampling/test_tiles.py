"""Decoding tile by tile: exact where a decoder looks at single places, near where it is Wan's."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from wantrain.data.footage.pixels import prepare_pixels
from wantrain.demo.footage import make_footage
from wantrain.models import load_vae
from wantrain.sampling.tiles import Tiled, ramp, starts
from wantrain.video import read_mp4


def local(latents):
    """A decoder of stride 4 that looks at each latent pixel alone."""
    rgb = latents[:, :3].repeat_interleave(4, dim=2)[:, :, 3:]
    return F.interpolate(rgb.flatten(0, 1), scale_factor=4).unflatten(0, rgb.shape[:2])


@pytest.mark.parametrize(("height", "width", "tile"), [(9, 16, 4), (8, 8, 5), (16, 5, 8), (7, 30, 6), (3, 64, 2)])
def test_tiles_equal_whole_decoding(height, width, tile):
    """For a decoder of single positions the tiles together equal the whole decoding."""
    latents = torch.randn(2, 16, 3, height, width, generator=torch.Generator().manual_seed(0))
    sizes = set()

    def decode(part):
        sizes.add(max(part.shape[3:]))
        return local(part)

    tiled = Tiled(decode, tile)(latents)
    assert torch.allclose(tiled, local(latents), atol=1e-6) and sizes == {tile}


def test_tile_positions():
    """The tiles cover every position, and no tile exceeds the picture."""
    for length in range(1, 60):
        for tile in range(1, 20):
            begins = starts(length, tile)
            assert begins[0] == 0 and begins == sorted(set(begins))
            covered = {place for start in begins for place in range(start, start + tile)}
            assert set(range(length)) <= covered and (length <= tile or max(covered) == length - 1)


def test_tile_weights():
    """Tile weights rise from the neighbour's side and are 1 at the border."""
    first, middle = ramp(8, 20, 0, 8, 2), ramp(8, 20, 6, 8, 2)
    assert (first[:12] == 1).all() and (first[12:].diff() < 0).all() and (first > 0).all()
    assert torch.equal(middle, middle.flip(0)) and middle.max() == 1


def test_single_tile(tiny):
    """A single tile equals the decoder bit for bit."""
    vae = load_vae(tiny.base)
    latents = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Tiled(vae.decode, 6)(latents), vae.decode(latents))


def test_wan_vae_in_tiles(tmp_path):
    """wan-tiny's VAE in tiles is near the whole decoding and shows no seams.

    The figures are those of docs/numerics.md, on its own footage.
    """
    vae = load_vae("assets/wan-tiny")
    make_footage(tmp_path, num_videos=1, num_images=0, size=128)
    (file,) = tmp_path.glob("*.mp4")
    pixels, _ = prepare_pixels(read_mp4(file)[:5], (64, 128))
    with torch.inference_mode():
        latents = vae.encode(pixels[None])
        whole, tiled = vae.decode(latents), Tiled(vae.decode, 8)(latents)
    apart = 127.5 * (whole - tiled).abs()
    assert apart.mean() < 2 and np.quantile(apart.numpy(), 0.99) < 25, (apart.mean(), np.quantile(apart.numpy(), 0.99))
    # A seam would be a step between neighbouring columns that the whole picture has not.
    steps = (127.5 * tiled.diff(dim=4)).abs().mean(dim=(0, 1, 2, 3))
    wanted = (127.5 * whole.diff(dim=4)).abs().mean(dim=(0, 1, 2, 3))
    assert (steps - wanted).max() < 3, (steps - wanted).max()
