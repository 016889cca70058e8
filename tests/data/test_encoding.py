"""Latent shards: what is in them is what the encoders gave for the right pixels and captions, and only that.

The encoders here are simple on purpose: a latent is a pixel, a text embedding is the caption's letters.
"""

import hashlib
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load

from wantrain import geometry
from wantrain.data import (
    encode_shards,
    encoding,
    find_footage,
    make_footage,
    prepare_pixels,
    read_manifest,
    write_video_shards,
)
from wantrain.data.demo import Scene
from wantrain.data.encoding import read_sample
from wantrain.data.footage import probe
from wantrain.data.likeness import GRID
from wantrain.data.shards import Index, read_video_shards
from wantrain.video import write_mp4

SIZES = geometry.Buckets((4096,), (1.0, 4 / 3, 3 / 4, 16 / 9, 9 / 16), 16)


def encode_pixels(pixels_BCTHW):
    """One pixel of every 4x8x8 block."""
    return pixels_BCTHW[:, :, ::4, ::8, ::8]


def encode_texts(texts):
    """One row per letter, and one for the end: the letter's number in 3 columns."""
    return [torch.tensor([[ord(letter) % 97] * 3 for letter in text] + [[-1] * 3]).float() for text in texts]


def shard(source, out, **changes):
    settings = {
        "model": "tiny",
        "num_frames": 17,
        "fps": 16,
        "clips": "all",
        "rejects_limit": 0.1,
        "shard_bytes": 1 << 20,
    }
    return write_video_shards(*find_footage(source), out, **{**settings, **changes})


def encode(shards, out, **changes):
    settings = {
        "encode_pixels": encode_pixels,
        "encode_texts": encode_texts,
        "sizes": SIZES,
        "temporal_stride": 4,
        "spatial_stride": 8,
        "model": "tiny",
        "vae_fingerprint": "vae-1",
        "text_fingerprint": "text-1",
        "rejects_limit": 0.1,
        "shard_bytes": 20_000,
    }
    return encode_shards(shards, out, **{**settings, **changes})


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoding")
    make_footage(folder / "footage", num_videos=7, num_images=2)
    shard(folder / "footage", folder / "videos")
    return folder / "videos"


@pytest.fixture(scope="module")
def latents(videos):
    encode(videos, videos.parent / "latents")
    return videos.parent / "latents"


def members(folder):
    """Every member of every tar, by name."""
    found = {}
    for path in sorted(folder.glob("latent-*.tar")):
        with tarfile.open(path) as tar:
            found.update({member.name: tar.extractfile(member).read() for member in tar.getmembers()})
    return found


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_latents_are_those_of_the_right_pixels_and_captions(videos, latents):
    found, wanted = members(latents), set()
    for sample in read_video_shards(videos, read_manifest(videos, "video")):
        for number, frames in enumerate(read_sample(sample)):
            key = f"{sample.key}-{number:04d}"
            wanted |= {f"{key}.safetensors", f"{key}.json"}
            size = SIZES.choose(len(frames), sample.about["height"], sample.about["width"])
            pixels, cropped = prepare_pixels(frames, size)
            tensors = load(found[f"{key}.safetensors"])
            assert set(tensors) == {"latents", "text"}
            torch.testing.assert_close(tensors["latents"], encode_pixels(pixels[None])[0].bfloat16(), rtol=0, atol=0)
            torch.testing.assert_close(
                tensors["text"], encode_texts([sample.about["caption"]])[0].bfloat16(), rtol=0, atol=0
            )
            about = json.loads(found[f"{key}.json"])
            assert about["bucket"] == f"{len(frames)}x{size[0]}x{size[1]}"
            assert about["cropped"] == pytest.approx(cropped, abs=1e-4)
            assert (about["caption"], about["source"]) == (sample.about["caption"], sample.about["source"])
            assert about["start"] == sample.about["windows"][number]["start"]
    assert set(found) == wanted


def test_small_clips_are_encoded_together_by_bucket_and_written_in_their_order(videos, latents, tmp_path, monkeypatch):
    shapes = []

    def watched(pixels):
        shapes.append(tuple(pixels.shape))
        return encode_pixels(pixels)

    encode(videos, tmp_path / "together", encode_pixels=watched)
    assert any(shape[0] > 1 for shape in shapes) and sum(shape[0] for shape in shapes) == len(members(latents)) // 2
    monkeypatch.setattr(encoding, "PIXELS_TOGETHER", 1)
    shapes.clear()
    encode(videos, tmp_path / "alone", encode_pixels=watched)
    assert all(shape[0] == 1 for shape in shapes)
    assert members(tmp_path / "alone") == members(tmp_path / "together") == members(latents)
    assert list(members(tmp_path / "alone")) == list(members(latents))


def test_manifest_and_index_agree_with_the_tars(videos, latents):
    manifest, index, found = read_manifest(latents, "latent"), Index.read(latents), members(latents)
    assert manifest["clips"] == len(index) == len(found) // 2 == read_manifest(videos, "video")["clips"]
    assert len(manifest["shards"]) > 1
    assert manifest["settings"]["shards"] == hashlib.sha256((videos / "manifest.json").read_bytes()).hexdigest()
    assert (manifest["vae_fingerprint"], manifest["text_encoder_fingerprint"]) == ("vae-1", "text-1")
    assert (manifest["latent_channels"], manifest["text_dim"]) == (3, 3)
    assert (manifest["temporal_stride"], manifest["spatial_stride"]) == (4, 8)
    for row in [*manifest["shards"], *manifest["files"]]:
        content = (latents / row["name"]).read_bytes()
        assert (row["bytes"], row["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    for sample in range(len(index)):
        name, offset = index.name(sample), int(index.offset[sample])
        tar = (latents / manifest["shards"][index.shard[sample]]["name"]).read_bytes()
        assert tar[offset : offset + int(index.size[sample])] == found[f"{name}.safetensors"]
        assert f"{int(index.source[sample]):016x}" == name[:16]
        about = json.loads(found[f"{name}.json"])
        assert manifest["buckets"][index.bucket[sample]] == about["bucket"]
    with safe_open(latents / "empty_text.safetensors", framework="pt") as file:
        assert file.get_tensor("text").tolist() == [[-1, -1, -1]]


def test_the_same_shards_give_the_same_bytes(videos, latents, tmp_path):
    encode(videos, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(latents)


def test_each_caption_is_encoded_once(videos, tmp_path):
    asked = []

    def counting(texts):
        asked.extend(texts)
        return encode_texts(texts)

    encode(videos, tmp_path / "out", encode_texts=counting)
    captions = {sample.about["caption"] for sample in read_video_shards(videos, read_manifest(videos, "video"))}
    assert sorted(asked) == sorted({*captions, ""})


# ------------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("shape", [(48, 48), (120, 90), (90, 120), (300, 64), (64, 300), (33, 57), (64, 64)])
@pytest.mark.parametrize("size", [(64, 64), (48, 80), (80, 48)])
def test_pixels_cover_the_size_and_keep_their_levels(shape, size):
    frames = np.full((5, *shape, 3), (0, 128, 255), dtype=np.uint8)
    pixels, cropped = prepare_pixels(frames, size)
    assert pixels.shape == (3, 5, *size)
    assert pixels.dtype == torch.float32
    for channel, level in enumerate((-1.0, 128 / 127.5 - 1, 1.0)):
        torch.testing.assert_close(pixels[channel], torch.full_like(pixels[channel], level), rtol=0, atol=1e-5)
    scale = max(size[0] / shape[0], size[1] / shape[1])
    assert cropped == pytest.approx(1 - size[0] * size[1] / (shape[0] * shape[1] * scale**2), abs=0.02)


@pytest.mark.parametrize(("height", "width"), [(200, 130), (130, 200), (160, 160), (96, 180)])
def test_pixels_are_not_squeezed_and_the_centre_stays(height, width):
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


def test_large_pictures_are_made_small_without_aliasing():
    """A fine chequerboard becomes grey; picking pixels would leave it black and white."""
    board = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
    pixels, _ = prepare_pixels(np.repeat(board[None, :, :, None], 3, axis=3), (64, 64))
    assert pixels[:, :, 4:-4, 4:-4].abs().max() < 0.02


def test_frames_of_the_right_size_pass_unchanged():
    frames = np.random.default_rng(0).integers(0, 256, (3, 64, 80, 3)).astype(np.uint8)
    pixels, cropped = prepare_pixels(frames, (64, 80))
    assert cropped == 0
    np.testing.assert_array_equal(((pixels + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy(), frames)


# ------------------------------------------------------------------------------------------------- trouble


@pytest.fixture
def damaged(videos, tmp_path, monkeypatch):
    """Shards with a file that cannot be decoded to its end, which shard.py would have refused."""
    footage = Path(shutil.copytree(videos.parent / "footage", tmp_path / "footage"))
    frames = np.random.default_rng(0).integers(0, 256, (72, 64, 64, 3)).astype(np.uint8)
    write_mp4(tmp_path / "whole.mp4", frames, 16)
    content = bytearray((tmp_path / "whole.mp4").read_bytes())
    middle = len(content) * 6 // 10
    content[middle : middle + 20_000] = bytes(20_000)
    (footage / "damaged.mp4").write_bytes(content)
    (footage / "damaged.txt").write_text("noise")
    with pytest.raises(ValueError, match=r"1 of 10 files are bad.*damaged\.mp4: cannot be decoded"):
        shard(footage, tmp_path / "videos", rejects_limit=0)

    def unread(_, file):
        found = probe(file.path)
        return found, np.zeros((len(found.times), GRID, GRID, 3), np.uint8), []

    monkeypatch.setattr("wantrain.data.cutting._Cutter._read", unread)
    shard(footage, tmp_path / "videos")
    return tmp_path / "videos"


def test_a_clip_that_cannot_be_decoded_is_rejected_and_the_rest_goes_on(damaged, videos, tmp_path):
    whole = read_manifest(videos, "video")["clips"]
    manifest = encode(damaged, tmp_path / "out", rejects_limit=0.5)
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert manifest["clips"] + manifest["clips_rejected"] == whole + 4
    assert [row["name"] for row in rejects] == [f"damaged.mp4 (clip {number})" for number in range(4)]
    assert "cannot be decoded" in rejects[0]["reason"]
    with pytest.raises(ValueError, match=r"4 of \d+ clips are bad, more than rejects\.limit=0\.05"):
        encode(damaged, tmp_path / "other", rejects_limit=0.05)
    assert not (tmp_path / "other" / "manifest.json").exists()


def test_every_clip_has_its_place_in_the_ledger(damaged, videos, tmp_path):
    """Used and how much of it is cropped, undecodable, or too small for every bucket."""
    write_mp4(tmp_path / "footage" / "tiny.mp4", np.zeros((40, 32, 32, 3), np.uint8), 16)
    (tmp_path / "footage" / "tiny.txt").write_text("small")
    shard(tmp_path / "footage", tmp_path / "more")
    seen = read_manifest(tmp_path / "more", "video")["clips"]
    sizes = geometry.Buckets((4096,), (1.0, 16 / 9), 16, upscale=1.5)
    manifest = encode(tmp_path / "more", tmp_path / "out", rejects_limit=0.5, sizes=sizes)
    clips, seconds, cropped = manifest["ledger"]["clips"], manifest["ledger"]["seconds"], manifest["cropped"]
    assert clips == {
        "given": seen,
        "used": manifest["clips"],
        "dropped": {"unreadable": 4, "too small": 2},
    }
    assert seen == manifest["clips"] + 6
    parts = [seconds["used"], *seconds["dropped"].values()]
    assert round(seconds["given"] * 1e6) == sum(round(part * 1e6) for part in parts)
    assert seconds["dropped"]["too small"] == pytest.approx(2 * 17 / 16)
    abouts = [json.loads(content) for name, content in members(tmp_path / "out").items() if name.endswith("json")]
    shares = [about["cropped"] for about in abouts if about["cropped"] > 0]
    assert cropped["clips"] == len(shares)
    assert cropped["largest"] == max(shares)
    assert cropped["mean"] == pytest.approx(np.mean(shares), abs=1e-4)
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert "32x32 would be enlarged 2.00 times" in {row["name"]: row["reason"] for row in rejects}["tiny.mp4 (clip 0)"]


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (lambda pixels: encode_pixels(pixels) * float("nan"), "gave NaN"),
        (lambda pixels: encode_pixels(pixels)[:, :, :, 1:], "the shape"),
        (lambda pixels: encode_pixels(pixels)[:, :, :-1], "the shape"),
    ],
)
def test_bad_latents_stop_the_work_with_the_clip_named(videos, tmp_path, broken, problem):
    with pytest.raises(ValueError, match=rf"clip-0000\.mp4 \(clip 0\).*{problem}"):
        encode(videos, tmp_path / "out", encode_pixels=broken)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rejects.jsonl"]


def test_bad_texts_stop_the_work(videos, tmp_path):
    def broken(texts):
        return [text / 0 for text in encode_texts(texts)]

    with pytest.raises(ValueError, match="text encoder gave NaN"):
        encode(videos, tmp_path / "out", encode_texts=broken)


def test_an_error_of_the_encoder_is_no_reject(videos, tmp_path):
    def broken(_):
        raise ValueError("out of something")

    with pytest.raises(ValueError, match=r"^out of something$"):
        encode(videos, tmp_path / "out", encode_pixels=broken)


def test_finished_latents_are_left_alone_and_others_refused(videos, latents, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in latents.iterdir()}

    def never(_):
        raise AssertionError("nothing is to be encoded")

    assert encode(videos, latents, encode_pixels=never) == read_manifest(latents, "latent")
    assert before == {path: path.stat().st_mtime_ns for path in latents.iterdir()}
    assert "is finished already" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"made otherwise \(vae_fingerprint: vae-1 -> vae-2\)"):
        encode(videos, latents, vae_fingerprint="vae-2")
    with pytest.raises(ValueError, match=r"made otherwise \(sizes: "):
        encode(videos, latents, sizes=geometry.Buckets((4096,), (1.0,), 16))
    shard(videos.parent / "footage", tmp_path / "nine", num_frames=9)
    with pytest.raises(ValueError, match=r"made otherwise \(shards: other video shards\)"):
        encode(tmp_path / "nine", latents)
    with pytest.raises(ValueError, match="were cut for model=tiny"):
        encode(videos, tmp_path / "out", model="large")
    with pytest.raises(ValueError, match="video shards are needed"):
        encode(latents, tmp_path / "out")


def test_a_damaged_video_shard_stops_the_work(videos, tmp_path):
    mine = Path(shutil.copytree(videos, tmp_path / "videos"))
    shard_file = mine / "video-000000.tar"
    shard_file.write_bytes(shard_file.read_bytes()[: shard_file.stat().st_size // 1024 * 512])
    with pytest.raises(ValueError, match=r"video-000000\.tar is damaged"):
        encode(mine, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
