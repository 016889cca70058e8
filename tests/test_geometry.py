"""Counts and divisibility."""

import pytest

from wantrain import geometry
from wantrain.geometry import Bucket


@pytest.mark.parametrize(("frames", "latent"), [(1, 1), (5, 2), (17, 5), (81, 21), (121, 31)])
def test_latent_frames_and_back(frames, latent):
    assert geometry.latent_frames(frames) == latent
    assert geometry.pixel_frames(latent) == frames


@pytest.mark.parametrize(("frames", "nearest"), [(16, "13 or 17"), (80, "77 or 81"), (2, "1 or 5"), (0, "1")])
def test_frames_that_are_not_4k_plus_1_are_refused_with_the_nearest(frames, nearest):
    with pytest.raises(ValueError, match=rf"nearest valid is {nearest}"):
        geometry.check_num_frames(frames)


def test_sizes_that_do_not_divide_are_refused_with_the_nearest():
    geometry.check_size(480, 832, 16)
    with pytest.raises(ValueError, match=r"490x832 must be multiples of 16.*nearest valid is 496x832"):
        geometry.check_size(490, 832, 16)


@pytest.mark.parametrize(
    ("bucket", "tokens"),
    [(Bucket(81, 480, 832), 32_760), (Bucket(81, 720, 1280), 75_600), (Bucket(1, 1024, 1024), 4_096)],
)
def test_tokens_of_the_published_settings(bucket, tokens):
    assert geometry.num_tokens(geometry.latent_shape(bucket)) == tokens


def test_sizes_fill_the_area_at_each_aspect():
    assert geometry.sizes(480 * 832, 16, [832 / 480, 480 / 832]) == [(480, 832), (832, 480)]
    for height, width in geometry.sizes(4096, 16, [1.0, 4 / 3, 0.75, 16 / 9, 9 / 16]):
        assert height % 16 == width % 16 == 0 and height * width <= 4096
    with pytest.raises(ValueError, match=r"area=100 holds not even one 16x16 block"):
        geometry.sizes(100, 16, [1.0])


def test_cover_never_squeezes_and_states_the_crop():
    height, width, cropped = geometry.cover(2160, 3840, 64, 64)
    assert (height, width) == (64, 114) and cropped == pytest.approx(1 - 64 / 114)
    assert geometry.cover(64, 64, 64, 64) == (64, 64, 0.0)
    assert geometry.nearest_size(1024, 576, [(64, 64), (48, 80), (80, 48)]) == (80, 48)
