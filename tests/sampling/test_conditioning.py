"""Files of known pixels for sampling: how they are prepared, what stays, and one clear error for each bad one."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wantrain.conditioning import model_inputs
from wantrain.geometry import fitted_size, floored_size
from wantrain.sampling.conditioning import ConditioningFiles, check_files, fit_image, read_pixels
from wantrain.video import write_mp4

#: Half of what wan-tiny is given: 32x64 pixels at the aspect of the pictures below.
MODEL = {"name": "some", "area": 2048, "multiple": 16, "fps": 16, "conditioning": "channel_concat"}
FRAMES = {**MODEL, "conditioning": "clean_frames"}
ASKED = {"num_frames": 9, "size": None}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A picture and videos of 64x128, whose frame f is the gray level 20 + 10*f; masks, white on the left half."""
    folder = tmp_path_factory.mktemp("known")
    gray = np.stack([np.full((64, 128, 3), 20 + 10 * frame, np.uint8) for frame in range(13)])
    left = np.zeros((13, 64, 128, 3), np.uint8)
    left[:, :, :64] = 255
    Image.fromarray(gray[3]).save(folder / "picture.png")
    Image.fromarray(gray[9]).save(folder / "last.png")
    Image.fromarray(gray[0, :, :64]).save(folder / "square.png")
    Image.fromarray(left[0]).save(folder / "mask.png")
    Image.fromarray(left[0, :32]).save(folder / "small.png")
    Image.fromarray(255 - 0 * left[0]).save(folder / "white.png")
    Image.fromarray(0 * left[0]).save(folder / "black.png")
    for name, frames in (("video", gray), ("mask", left), ("short", left[:9])):
        write_mp4(folder / f"{name}.mp4", frames, 16, quality=0)
    return folder


def level(pixels):
    """Gray levels of the frames, by their mean."""
    return ((pixels.mean(dim=(0, 2, 3)) + 1) * 127.5).tolist()


def test_images_and_ends(files):
    known = read_pixels(ConditioningFiles(image=files / "picture.png", last_image=files / "last.png"), MODEL, **ASKED)
    assert known.pixels_CFHW.shape == (3, 9, 32, 64), "the aspect of the picture at the model's area"
    assert known.known_1FHW.flatten(2).all(2)[0].nonzero().flatten().tolist() == [0, 8]
    assert level(known.pixels_CFHW)[::8] == pytest.approx([50, 110], abs=0.6)
    only = read_pixels(ConditioningFiles(last_image=files / "last.png"), MODEL, **ASKED)
    assert only.known_1FHW.flatten(2).any(2)[0].nonzero().flatten().tolist() == [8]
    sized = read_pixels(ConditioningFiles(image=files / "picture.png"), MODEL, **{**ASKED, "size": (64, 128)})
    assert sized.pixels_CFHW.shape == (3, 9, 64, 128)


def test_continuation_and_regions(files):
    known = read_pixels(ConditioningFiles(video=files / "video.mp4", keep=5), MODEL, **ASKED)
    assert known.known_1FHW.flatten(2).all(2)[0].tolist() == [True] * 5 + [False] * 4
    assert level(known.pixels_CFHW[:, :5]) == pytest.approx([20, 30, 40, 50, 60], abs=2)
    for mask in ("mask.png", "mask.mp4"):
        known = read_pixels(ConditioningFiles(video=files / "video.mp4", mask=files / mask), MODEL, **ASKED)
        assert known.known_1FHW[..., 32:].all() and not known.known_1FHW[..., :31].any(), "black stays"
        assert level(known.pixels_CFHW)[8] == pytest.approx(100, abs=2)
    seen = []
    record = known.encode(lambda x: seen.append(x) or torch.zeros(1, 16, 3, 4, 8), conditioning="channel_concat")
    assert not seen[0][..., :31].any() and seen[0][..., 33:].all(), "unknown pixels do not reach the VAE"
    assert model_inputs(record, "channel_concat").conditioning["concat_BCTHW"].shape == (1, 20, 3, 4, 8)


def test_clean_frames_encode_known_frames(files):
    beginning = ConditioningFiles(video=files / "video.mp4", keep=5)
    known = read_pixels(beginning, FRAMES, **ASKED)
    seen = []

    def encode(pixels):
        seen.append(pixels.shape[2])
        return torch.ones(1, 16, (pixels.shape[2] + 3) // 4, 4, 8)

    record = known.encode(encode, conditioning="clean_frames")
    assert seen == [5] and record.latents_BCTHW[0, 0, :, 0, 0].tolist() == [1, 1, 0]
    assert model_inputs(record, "clean_frames").noised_BT.tolist() == [[0, 0, 1]]
    region = ConditioningFiles(video=files / "video.mp4", mask=files / "mask.png")
    with pytest.raises(ValueError, match=r"mask: this model takes clean first frames .*no region"):
        read_pixels(region, FRAMES, **ASKED)


def test_output_sizes():
    """The output sizes equal the authors'.

    I2V-A14B: both sides floored to 16 at about the area; TI2V-5B: multiples of 32 within it, nearest in aspect.
    """
    assert floored_size(720, 1280, 480 * 832, 16) == (464, 832)
    assert floored_size(832, 480, 480 * 832, 16) == (832, 480)
    assert floored_size(1000, 1000, 720 * 1280, 16) == (960, 960)
    assert fitted_size(720, 1280, 704 * 1280, 32) == (704, 1248), "nearer to 16:9 than 704x1280"
    assert fitted_size(1280, 720, 704 * 1280, 32) == (1248, 704)
    assert fitted_size(704, 1280, 704 * 1280, 32) == (704, 1280)
    assert fitted_size(1000, 1000, 704 * 1280, 32) == (928, 960), "a tie goes to the height rounded first"
    for height, width in ((333, 1000), (1000, 700), (480, 832)):
        rows, columns = fitted_size(height, width, 704 * 1280, 32)
        assert rows % 32 == columns % 32 == 0 and 0.9 * 704 * 1280 < rows * columns <= 704 * 1280


def test_image_fit():
    """Pictures are scaled to the size for channel_concat, and scaled and cropped for clean_frames."""
    ramp = np.broadcast_to(np.linspace(0, 255, 100).round().astype(np.uint8)[None, :, None], (50, 100, 3))
    squeezed, cropped = (fit_image(ramp, (32, 32), name) for name in ("channel_concat", "clean_frames"))
    assert squeezed.shape == cropped.shape == (3, 32, 32)
    assert squeezed[0, 0, 0] < -0.95 and squeezed[0, 0, -1] > 0.95, "the whole width is there"
    assert -0.55 < cropped[0, 0, 0] < -0.4 and 0.4 < cropped[0, 0, -1] < 0.55, "the middle half is there"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image": "absent.png"}, "image=.*absent.png is not there"),
        ({"image": "video.mp4"}, "image=.*video.mp4 is a video; give a picture"),
        ({"video": "picture.png", "keep": 5}, "is a picture; give image=FILE"),
        ({"image": "picture.png", "last_image": "square.png"}, r"last_image=.*square.png is 64x64 .*aspect is 1.000, the video's 2.000"),
        ({"video": "video.mp4"}, "give one of mask=FILE .* and keep=N"),
        ({"video": "video.mp4", "keep": 5, "mask": "mask.png"}, "give one of mask=FILE .* and keep=N"),
        ({"video": "video.mp4", "image": "picture.png"}, "has its own first frame; leave out image="),
        ({"image": "picture.png", "keep": 5}, "keep=5 selects pixels of a video that stay; give video=FILE"),
        ({"image": "picture.png", "mask": "mask.png"}, "mask=.*mask.png selects pixels of a video that stay"),
        ({"video": "video.mp4", "keep": 6}, "keep=6 is not 4k.1: .*nearest valid is 5 or 9"),
        ({"video": "video.mp4", "keep": 9}, "video: all 9 frames are known and nothing is left to make"),
        ({"video": "video.mp4", "keep": 17}, r"has 13 frames \(4k\+1\) at 16 fps, fewer than keep=17; give keep=13"),
        ({"video": "video.mp4", "mask": "small.png"}, r"mask=.*small.png is 32x128 .*, its video 64x128; a mask must have the size"),
        ({"video": "video.mp4", "mask": "short.mp4"}, r"mask=.*short.mp4 has 9 frames, its video 13; give a mask with as many frames"),
        ({"video": "video.mp4", "mask": "white.png"}, "white.png is white everywhere: nothing of the video would stay"),
        ({"video": "video.mp4", "mask": "black.png"}, "mask: all 9 frames are known"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_files(files, given, message):
    """Each wrong conditioning file is one clear error."""
    paths = {key: value if key == "keep" else files / value for key, value in given.items()}
    with pytest.raises(ValueError, match=message):
        read_pixels(ConditioningFiles(**paths), MODEL, **ASKED)


def test_size_or_length_mismatch(files):
    """Files of another aspect, another size or fewer frames than the video are refused."""
    with pytest.raises(
        ValueError, match=r"square.png is 64x64 .* the video's 2.000; crop it, or give height= and width="
    ):
        read_pixels(ConditioningFiles(image=files / "square.png"), MODEL, **{**ASKED, "size": (32, 64)})
    with pytest.raises(ValueError, match=r"video=.* is 64x128"):
        read_pixels(ConditioningFiles(video=files / "video.mp4", keep=5), MODEL, **{**ASKED, "size": (64, 64)})
    long = {**ASKED, "num_frames": 21}
    with pytest.raises(ValueError, match="fewer than num_frames=21; give num_frames=13 or less"):
        read_pixels(ConditioningFiles(video=files / "video.mp4", mask=files / "mask.png"), MODEL, **long)


def test_check_files(files):
    image, both = (
        ConditioningFiles(image=files / "picture.png"),
        ConditioningFiles(image=files / "picture.png", last_image=files / "last.png"),
    )
    for conditioning, given in (
        ("channel_concat", image),
        ("channel_concat", both),
        ("clean_frames", image),
        ("clean_frames", ConditioningFiles()),
        ("none", ConditioningFiles()),
    ):
        check_files(given, conditioning, model="some")
    with pytest.raises(ValueError, match=r"image=.*: model=tiny takes text alone; choose model=i2v_a14b"):
        check_files(image, "none", model="tiny")
    with pytest.raises(ValueError, match="model=i2v_a14b needs a conditioning input: give image=FILE"):
        check_files(ConditioningFiles(), "channel_concat", model="i2v_a14b")
    with pytest.raises(ValueError, match=r"last_image=.*: model=ti2v_5b takes clean first frames"):
        check_files(both, "clean_frames", model="ti2v_5b")


def test_real_clip_with_mask():
    """81 frames of 480x832 and a mask video of as many: the shared dog, whose middle is to be made anew."""
    if "WANTRAIN_FOOTAGE" not in os.environ:
        pytest.skip("WANTRAIN_FOOTAGE names no folder of real footage")
    folder = Path(os.environ["WANTRAIN_FOOTAGE"])
    model = {**MODEL, "area": 64 * 112}
    known = read_pixels(
        ConditioningFiles(video=folder / "dog.mp4", mask=folder / "masks" / "dog.mp4"), model, num_frames=81, size=None
    )
    assert known.shape == (81, 64, 96)
    hidden = (~known.known_1FHW).float().mean(dim=(0, 2, 3))
    assert (hidden > 0.6).all() and (hidden < 0.8).all(), "the box in the middle of every frame"
    assert known.known_1FHW[..., :4].all() and not known.known_1FHW[0, :, 32, 48].any()
    assert 0.1 < known.pixels_CFHW[:, ::10].std() < 1
