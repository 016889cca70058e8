"""Sampling with known pixels, through the commands as a user runs them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from wantrain.models import Base, WanTransformer
from wantrain.models.formats.loading import load_vae
from wantrain.models.formats.pipeline import About, write_pipeline
from wantrain.sampling.conditioning import fit_image
from wantrain.video import read_mp4, write_mp4

MICRO = ("model.transformer.num_layers=2", "model.transformer.ffn_dim=64")
SAMPLE = ("prompt=a red circle", "num_frames=9", "model.area=2048", "steps=2", *MICRO)


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    """Pipeline folders of a scrambled micro model for each conditioning type."""
    folder = tmp_path_factory.mktemp("models")
    for name, channels, boundary, experts in (
        ("tiny_i2v", 36, 0.875, ("high_noise", "low_noise")),
        ("tiny_ti2v", 16, None, ("dense",)),
    ):
        torch.manual_seed(0)
        size = {"num_attention_heads": 4, "attention_head_dim": 32, "text_dim": 64, "ffn_dim": 64, "num_layers": 2}
        model = WanTransformer(**size, in_channels=channels)
        torch.nn.init.normal_(model.head.head.weight, std=0.05)
        about = About(name, boundary, 3.0, dict.fromkeys(experts, 2.0))
        write_pipeline(folder / name, [(expert, model) for expert in experts], base=Base(tiny.base), about=about)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    frames = np.zeros((13, 32, 64, 3), np.uint8)
    for place, frame in enumerate(frames):
        frame[8:24, place : place + 16] = (200, 80, 40)
    Image.fromarray(frames[0]).save(folder / "picture.png")
    Image.fromarray(frames[12]).save(folder / "last.png")
    mask = np.zeros((13, 32, 64, 3), np.uint8)
    mask[:, :, 32:] = 255
    write_mp4(folder / "video.mp4", frames, 16, quality=0)
    write_mp4(folder / "mask.mp4", mask, 16, quality=0)
    return folder


def test_sample_identity_by_task(call, models, files, tmp_path):
    """Each set of conditioning files gives a video of its own; the same files find theirs again."""
    uses = {
        "image": [f"image={files / 'picture.png'}"],
        "ends": [f"image={files / 'picture.png'}", f"last_image={files / 'last.png'}"],
        "go on": [f"video={files / 'video.mp4'}", "keep=5"],
        "region": [f"video={files / 'video.mp4'}", f"mask={files / 'mask.mp4'}"],
    }
    for use in uses.values():
        call("sample.py", "model=tiny_i2v", f"weights={models / 'tiny_i2v'}", *SAMPLE, *use)
    made = sorted((tmp_path / "samples").glob("*.mp4"))
    assert len(made) == 4, "known pixels are part of a sample's identity"
    clips = [read_mp4(file) for file in made]
    assert {clip.shape for clip in clips} == {(9, 32, 64, 3)}, "the aspect of the files"
    assert len({clip.tobytes() for clip in clips}) == 4
    again = call("sample.py", "model=tiny_i2v", f"weights={models / 'tiny_i2v'}", *SAMPLE, *uses["ends"])
    assert "1 of 1 videos are there already" in again.stdout
    hashes = {json.loads(file.with_suffix(".json").read_text())["settings"]["known"] for file in made}
    assert len(hashes) == 4


def test_clean_first_frame(call, models, files, tmp_path):
    """The first frame of the video equals the picture after the VAE; without a picture the model needs no file."""
    call("sample.py", "model=tiny_ti2v", f"weights={models / 'tiny_ti2v'}", *SAMPLE, f"image={files / 'picture.png'}")
    (made,) = (tmp_path / "samples").glob("*.mp4")
    vae = load_vae(models / "tiny_ti2v").eval()
    picture = np.asarray(Image.open(files / "picture.png"))
    with torch.no_grad():
        rebuilt = vae.decode(vae.encode(fit_image(picture, (32, 64), "clean_frames")[None, :, None]))[0, :, 0]
    expected = ((rebuilt + 1) * 127.5).permute(1, 2, 0).numpy()
    assert np.abs(read_mp4(made)[0] - expected).mean() < 3, "the codec's loss alone"
    call("sample.py", "model=tiny_ti2v", f"weights={models / 'tiny_ti2v'}", *SAMPLE, "height=32", "width=64")
    assert len(list((tmp_path / "samples").glob("*.mp4"))) == 2, "no file is needed"


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        ("tiny_i2v", [], "model=tiny_i2v needs a conditioning input: give image=FILE"),
        ("tiny_ti2v", ["image=picture.png", "last_image=last.png"], "no last image; leave it out"),
        ("tiny_ti2v", ["video=video.mp4", "mask=mask.mp4"], "no last image and no region"),
        ("tiny_dense", ["image=picture.png"], "model=tiny_dense takes text alone"),
        ("tiny_i2v", ["video=video.mp4", "keep=5.5"], "keep=5.5 must be a whole number"),
        ("tiny_i2v", ["image=picture.png", "height=64", "width=64"], "its aspect is 2.000, the video's 1.000; crop it"),
    ],
    ids=str,
)
def test_bad_conditioning_files(call, models, files, model, given, message):
    """A wrong conditioning file, or none where one is needed, gives one line of error."""
    paths = [each.replace("=", f"={files}/", 1) if each.endswith(("png", "mp4")) else each for each in given]
    ended = call("sample.py", f"model={model}", f"weights={models / 'tiny_ti2v'}", *SAMPLE, *paths, check=False)
    assert message in ended.error
