"""Counts and divisibility."""

import pytest

from wantrain import geometry
from wantrain.geometry import Bucket


@pytest.mark.parametrize(("frames", "latent"), [(1, 1), (5, 2), (17, 5), (81, 21), (121, 31)])
def test_latent_frames_round_trip(frames, latent):
    assert geometry.latent_frames(frames) == latent
    assert geometry.pixel_frames(latent) == frames


@pytest.mark.parametrize(("frames", "nearest"), [(16, "13 or 17"), (80, "77 or 81"), (2, "1 or 5"), (0, "1")])
def test_bad_num_frames(frames, nearest):
    """Frame counts that are not 4k + 1 are refused with the nearest valid ones."""
    with pytest.raises(ValueError, match=rf"nearest valid is {nearest}"):
        geometry.check_num_frames(frames)


def test_bad_size():
    """Sizes that are not multiples are refused with the nearest valid one."""
    geometry.check_size(480, 832, 16)
    with pytest.raises(ValueError, match=r"490x832 must be multiples of 16.*nearest valid is 496x832"):
        geometry.check_size(490, 832, 16)


@pytest.mark.parametrize(
    ("bucket", "tokens"),
    [(Bucket(81, 480, 832), 32_760), (Bucket(81, 720, 1280), 75_600), (Bucket(1, 1024, 1024), 4_096)],
)
def test_tokens_of_published_settings(bucket, tokens):
    assert geometry.num_tokens(geometry.latent_shape(bucket)) == tokens


def test_sizes_by_area_and_aspect():
    """Sizes of each aspect are multiples within the area; an area below one block is refused."""
    assert geometry.sizes(480 * 832, 16, [832 / 480, 480 / 832]) == [(480, 832), (832, 480)]
    for height, width in geometry.sizes(4096, 16, [1.0, 4 / 3, 0.75, 16 / 9, 9 / 16]):
        assert height % 16 == width % 16 == 0 and height * width <= 4096
    with pytest.raises(ValueError, match=r"area=100 holds not even one 16x16 block"):
        geometry.sizes(100, 16, [1.0])


def test_cover_states_crop():
    """cover scales without distortion and returns the share that is cropped."""
    height, width, cropped = geometry.cover(2160, 3840, 64, 64)
    assert (height, width) == (64, 114) and cropped == pytest.approx(1 - 64 / 114)
    assert geometry.cover(64, 64, 64, 64) == (64, 64, 0.0)
    assert geometry.nearest_size(1024, 576, [(64, 64), (48, 80), (80, 48)]) == (80, 48)


# ------------------------------------------------------------------------------------------------- buckets

ASPECTS = (1.0, 4 / 3, 3 / 4, 16 / 9, 9 / 16)


@pytest.mark.parametrize("num_frames", [1, 5, 17, 49, 81])
@pytest.mark.parametrize("tokens", [100, 2_000, 32_760])
def test_bucket_limits(tokens, num_frames):
    """No bucket exceeds its area or the token budget, and the budget is used up to whole blocks."""
    buckets = geometry.Buckets((256 * 256, 480 * 832), ASPECTS, 16, tokens=tokens)
    given = [size for choices in buckets.sizes(num_frames) for size in choices]
    counts = [geometry.num_tokens(geometry.latent_shape(Bucket(num_frames, *size))) for size in given]
    assert max(counts) <= tokens
    assert all(height * width <= 480 * 832 and height % 16 == width % 16 == 0 for height, width in given)
    # The budget is used, but for what whole blocks leave.
    full = geometry.num_tokens(geometry.latent_shape(Bucket(num_frames, 480, 832)))
    per_frame = min(tokens, full) // geometry.latent_frames(num_frames)
    assert max(counts) >= 0.9 * per_frame * geometry.latent_frames(num_frames) - 3 * geometry.latent_frames(num_frames)


def test_token_budget_too_small():
    """A token budget that is too small for a clip length is refused."""
    with pytest.raises(ValueError, match="81 frames are more than tokens=20 allow"):
        geometry.Buckets((4096,), ASPECTS, 16, tokens=20).choose(81, 64, 64)


def test_upscale_limit():
    """A small picture goes to a smaller area within the upscale limit, or is refused."""
    buckets = geometry.Buckets((1024, 4096), (1.0,), 16, upscale=1.5)
    assert [buckets.choose(1, side, side)[0] for side in (500, 64, 43, 42, 32, 22)] == [64, 64, 64, 32, 32, 32]
    with pytest.raises(ValueError, match=r"21x40 would be enlarged 1\.52 times to fill 32x32.*upscale\.limit=1\.5"):
        buckets.choose(1, 21, 40)
    assert geometry.Buckets((1024, 4096), (1.0,), 16).choose(1, 4, 4) == (64, 64)


@pytest.mark.parametrize("shape", [(2160, 3840), (1024, 576), (480, 640), (500, 500), (333, 777), (97, 31)])
def test_chosen_size_crops_least(shape):
    """The chosen size crops the least of the picture, and the enlargement is computed in advance."""
    buckets = geometry.Buckets((4096,), ASPECTS, 16)
    chosen = buckets.choose(17, *shape)
    crops = {size: geometry.cover(*shape, *size)[2] for size in buckets.sizes(17)[0]}
    assert crops[chosen] <= min(crops.values()) + 0.02
    assert geometry.enlargement(*shape, *chosen) == pytest.approx(max(chosen[0] / shape[0], chosen[1] / shape[1]))


@pytest.mark.parametrize(
    ("choice", "problem"),
    [
        ({"areas": ()}, "area and aspects need at least one value"),
        ({"areas": (100,)}, "area=100 holds not even one 16x16 block"),
        ({"aspects": (1.0, -1.0)}, "must all be above 0"),
        ({"upscale": 0.0}, r"upscale\.limit=0\.0 must be above 0"),
    ],
)
def test_bad_buckets(choice, problem):
    """Settings that allow no bucket are refused."""
    with pytest.raises(ValueError, match=problem):
        geometry.Buckets(**{"areas": (4096,), "aspects": ASPECTS, "multiple": 16, **choice})
