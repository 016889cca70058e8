"""Latent folders: what is in them is what the encoders gave for the right pixels and captions, and only that.

The encoders here are simple on purpose: a latent is a pixel, a text embedding is the caption's letters.
"""

import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from safetensors.torch import load

from wantrain import geometry
from wantrain.data import (
    Conditions,
    LatentData,
    encode_shards,
    find_footage,
    prepare_pixels,
    read_manifest,
    write_video_shards,
)
from wantrain.data.footage.pixels import read_clips, read_sample
from wantrain.data.footage.reader import Reader
from wantrain.data.footage.survey import Survey
from wantrain.data.footage.video_shards import read_video_shards
from wantrain.data.latents import encoding, portions
from wantrain.data.latents.index import Index
from wantrain.data.shards import describe_file
from wantrain.demo.footage import Scene, draw_shot, make_footage
from wantrain.video import write_mp4

SIZES = geometry.Buckets((4096,), (1.0, 4 / 3, 3 / 4, 16 / 9, 9 / 16), 16)


def encode_pixels(pixels_BCTHW):
    """One pixel of every 4x8x8 block."""
    return pixels_BCTHW[:, :, ::4, ::8, ::8]


def encode_texts(texts):
    """One row per letter, and one for the end: the letter's number in 3 columns."""
    return [torch.tensor([[ord(letter) % 97] * 3 for letter in text] + [[-1] * 3]).float() for text in texts]


def never(_):
    raise AssertionError("nothing is to be encoded")


class Counting:
    """An encoder that remembers what it was asked."""

    def __init__(self, encode):
        self.encode, self.asked = encode, []

    def __call__(self, given):
        self.asked.extend(given)
        return self.encode(given)


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
        "conditions": Conditions({}, None),
        "model": "tiny",
        "vae_fingerprint": "vae-1",
        "text_fingerprint": "text-1",
        "tokenizer_fingerprint": "words-1",
        "rejects_limit": 0.1,
        "shard_bytes": 1 << 20,
        "shard_clips": 4,
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


@pytest.fixture
def mine(latents, tmp_path):
    """A copy to go on with."""
    return Path(shutil.copytree(latents, tmp_path / "latents"))


@pytest.fixture
def footage(videos, tmp_path):
    """A copy of the footage to change."""
    return Path(shutil.copytree(videos.parent / "footage", tmp_path / "footage"))


def read_index(folder):
    return Index.read(folder / read_manifest(folder, "latent")["files"][0]["name"])


def members(folder, kind="latent"):
    """Every member of every tar of a kind, by name."""
    found = {}
    for path in sorted(folder.glob(f"{kind}-*.tar")):
        with tarfile.open(path) as tar:
            found.update({member.name: tar.extractfile(member).read() for member in tar.getmembers()})
    return found


def contents(folder):
    """Hashes of all files, but for notes that are nobody's result."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def rewrite(folder, change):
    """Video shards with each sample's `about` changed, as another shard.py might have written it."""
    manifest = read_manifest(folder, "video")
    for number, row in enumerate(manifest["shards"]):
        path = folder / row["name"]
        with tarfile.open(path) as tar:
            found = [(member, tar.extractfile(member).read()) for member in tar.getmembers()]
        with tarfile.open(path, "w") as tar:
            for member, content in found:
                if member.name.endswith(".json"):
                    content = json.dumps(change(json.loads(content))).encode()
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        manifest["shards"][number] = {**row, **describe_file(path)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_latents_and_texts_are_those_of_the_right_pixels_and_captions(videos, latents):
    found, texts, wanted = members(latents), members(latents, "text"), set()
    said = {
        json.loads(about)["caption"]: name.removesuffix(".json")
        for name, about in texts.items()
        if name.endswith(".json")
    }
    for sample in read_video_shards(videos, read_manifest(videos, "video")):
        for number, frames in enumerate(read_sample(sample)):
            key = f"{sample.key}-{number:04d}"
            wanted |= {f"{key}.safetensors", f"{key}.json"}
            size = SIZES.choose(len(frames), sample.about["height"], sample.about["width"])
            pixels, cropped = prepare_pixels(frames, size)
            tensors = load(found[f"{key}.safetensors"])
            assert set(tensors) == {"latents"}
            torch.testing.assert_close(tensors["latents"], encode_pixels(pixels[None])[0].bfloat16(), rtol=0, atol=0)
            about = json.loads(found[f"{key}.json"])
            assert about["bucket"] == f"{len(frames)}x{size[0]}x{size[1]}"
            assert about["cropped"] == pytest.approx(cropped, abs=1e-4)
            assert about["source"] == sample.about["source"]
            window = sample.about["windows"][number]
            assert {key: about[key] for key in window} == window
        text = load(texts[f"{said[sample.about['caption']]}.safetensors"])
        assert set(text) == {"text"}
        torch.testing.assert_close(text["text"], encode_texts([sample.about["caption"]])[0].bfloat16(), rtol=0, atol=0)
    assert set(found) == wanted
    captions = {sample.about["caption"] for sample in read_video_shards(videos, read_manifest(videos, "video"))}
    assert set(said) == captions | {""} and len(texts) == 2 * len(said)


def test_small_clips_are_encoded_together_by_bucket_and_written_in_their_order(videos, tmp_path, monkeypatch):
    shapes = []

    def watched(pixels):
        shapes.append(tuple(pixels.shape))
        return encode_pixels(pixels)

    clips = read_manifest(videos, "video")["clips"]
    encode(videos, tmp_path / "together", encode_pixels=watched, shard_clips=64)
    assert any(shape[0] > 1 for shape in shapes) and sum(shape[0] for shape in shapes) == clips
    monkeypatch.setattr(portions, "PIXELS_TOGETHER", 1)
    shapes.clear()
    encode(videos, tmp_path / "alone", encode_pixels=watched, shard_clips=64)
    assert all(shape[0] == 1 for shape in shapes)
    assert contents(tmp_path / "alone") == contents(tmp_path / "together")


def test_manifest_and_index_agree_with_the_tars(videos, latents):
    manifest, index, found = read_manifest(latents, "latent"), read_index(latents), members(latents)
    texts = members(latents, "text")
    assert manifest["clips"] == len(index) == len(found) // 2 == read_manifest(videos, "video")["clips"]
    assert manifest["windows"] == len(index) and manifest["texts"] == len(texts) // 2
    assert len(manifest["shards"]) > 2 and len(manifest["text_shards"]) > 1
    assert manifest["settings"]["shards"] == hashlib.sha256((videos / "manifest.json").read_bytes()).hexdigest()
    assert (manifest["vae_fingerprint"], manifest["text_encoder_fingerprint"]) == ("vae-1", "text-1")
    assert (manifest["latent_channels"], manifest["text_dim"]) == (3, 3)
    assert (manifest["temporal_stride"], manifest["spatial_stride"]) == (4, 8)
    files = [*manifest["shards"], *manifest["text_shards"], *manifest["files"]]
    assert sorted([row["name"] for row in files] + ["manifest.json", "rejects.jsonl"]) == sorted(contents(latents))
    for row in files:
        content = (latents / row["name"]).read_bytes()
        assert (row["bytes"], row["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    captions = {
        sample.key: sample.about["caption"] for sample in read_video_shards(videos, read_manifest(videos, "video"))
    }
    for clip in range(len(index)):
        (window,), (text,) = index.windows_of(clip), index.texts_of(clip)
        name, offset = index.name(window), int(index.offset[window])
        tar = (latents / manifest["shards"][index.shard[window]]["name"]).read_bytes()
        assert tar[offset : offset + int(index.size[window])] == found[f"{name}.safetensors"]
        assert f"{int(index.source[clip]):016x}" == name[:16]
        about = json.loads(found[f"{name}.json"])
        assert manifest["buckets"][index.bucket[clip]] == about["bucket"]
        assert index.identity[window].tobytes().hex() == about["identity"]
        tar = (latents / manifest["text_shards"][index.text_shard[text]]["name"]).read_bytes()
        offset = int(index.text_offset[text])
        stored = load(tar[offset : offset + int(index.text_size[text])])["text"]
        assert torch.equal(stored, encode_texts([captions[name[:16]]])[0].bfloat16())
    assert index.weight.tolist() == [1.0] * len(index)


def test_others_can_read_the_tars(latents):
    for kind, key in (("latent", "latents"), ("text", "text")):
        names = [str(path) for path in sorted(latents.glob(f"{kind}-*.tar"))]
        theirs = list(webdataset.WebDataset(names, shardshuffle=False))
        assert len(theirs) == len(members(latents, kind)) // 2
        assert all(set(load(sample["safetensors"])) == {key} and json.loads(sample["json"]) for sample in theirs)


# --------------------------------------------------------------------------------------------- only what changed


def test_the_same_shards_give_the_same_bytes_with_any_number_of_workers(videos, latents, tmp_path):
    for workers in (1, 3):
        encode(videos, tmp_path / str(workers), workers=workers)
        assert contents(tmp_path / str(workers)) == contents(latents)


def test_clips_of_files_that_look_alike_are_one_group(videos, latents, tmp_path):
    index = read_index(latents)
    assert (index.group == index.source).all()
    shards = Path(shutil.copytree(videos, tmp_path / "videos"))
    manifest = read_manifest(shards, "video")
    one, other, *_ = sorted({f"{source:016x}" for source in index.source})
    (shards / "manifest.json").write_text(json.dumps({**manifest, "alike": [[other, one]]}))
    encode(shards, tmp_path / "alike", encode_pixels=encode_pixels)
    index = read_index(tmp_path / "alike")
    assert (index.group == np.where(index.source == int(other, 16), int(one, 16), index.source)).all()


def test_each_caption_is_encoded_once_and_together(videos, tmp_path):
    calls = []

    def counting(texts):
        calls.append(texts)
        return encode_texts(texts)

    encode(videos, tmp_path / "out", encode_texts=counting, shard_clips=64)
    captions = {sample.about["caption"] for sample in read_video_shards(videos, read_manifest(videos, "video"))}
    assert sorted(text for texts in calls for text in texts) == sorted({*captions, ""})
    assert len(calls) == -(-(len(captions) + 1) // encoding.TEXTS_TOGETHER)


def test_nothing_changed_nothing_done(videos, latents, capsys):
    before = {path: path.stat().st_mtime_ns for path in latents.iterdir()}
    assert encode(videos, latents, encode_pixels=never, encode_texts=never) == read_manifest(latents, "latent")
    assert before == {path: path.stat().st_mtime_ns for path in latents.iterdir()}
    assert "is finished already" in capsys.readouterr().out


def test_a_changed_caption_costs_one_text_and_no_latent(footage, mine, tmp_path):
    (footage / "clip-0002.txt").write_text("a caption that nobody has written yet")
    shard(footage, tmp_path / "videos")
    texts, before = Counting(encode_texts), contents(mine)
    encode(tmp_path / "videos", mine, encode_pixels=never, encode_texts=texts)
    assert texts.asked == ["a caption that nobody has written yet"]
    latents_now = {name: digest for name, digest in contents(mine).items() if name.startswith("latent-")}
    assert latents_now == {name: digest for name, digest in before.items() if name.startswith("latent-")}
    assert sum(name.startswith("text-") and name not in before for name in contents(mine)) <= 2
    encode(tmp_path / "videos", tmp_path / "fresh")
    assert contents(mine) == contents(tmp_path / "fresh"), "history leaves no trace"


def test_clips_that_come_and_go_cost_what_is_new(footage, mine, tmp_path):
    (footage / "clip-0001.mp4").unlink()
    frames = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3)).astype(np.uint8)
    write_mp4(footage / "clip-0003a.mp4", frames, 16)
    (footage / "clip-0003a.txt").write_text("noise")
    shard(footage, tmp_path / "videos")
    pixels, texts = Counting(encode_pixels), Counting(encode_texts)
    manifest = encode(tmp_path / "videos", mine, encode_pixels=pixels, encode_texts=texts)
    assert (len(pixels.asked), texts.asked) == (1, ["noise"])
    sources = {json.loads(about)["source"] for name, about in members(mine).items() if name.endswith(".json")}
    assert "clip-0001.mp4" not in sources and "clip-0003a.mp4" in sources
    assert manifest["clips"] == read_manifest(tmp_path / "videos", "video")["clips"]
    encode(tmp_path / "videos", tmp_path / "fresh")
    assert contents(mine) == contents(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("change", "latents_again", "texts_again"),
    [
        ({"vae_fingerprint": "vae-2"}, True, False),
        ({"sizes": geometry.Buckets((2304,), (1.0,), 16)}, True, False),
        ({"text_fingerprint": "text-2"}, False, True),
        ({"tokenizer_fingerprint": "words-2"}, False, True),
        ({"shard_clips": 8}, False, False),
    ],
)
def test_what_depends_on_a_change_is_done_again(videos, mine, tmp_path, change, latents_again, texts_again):
    before, pixels, texts = read_manifest(mine, "latent"), Counting(encode_pixels), Counting(encode_texts)
    encode(videos, mine, encode_pixels=pixels, encode_texts=texts, **change)
    assert len(pixels.asked) == latents_again * before["clips"]
    assert len(texts.asked) == texts_again * before["texts"]
    encode(videos, tmp_path / "fresh", **change)
    assert contents(mine) == contents(tmp_path / "fresh")


def test_what_is_lost_or_damaged_is_made_again(videos, latents, mine):
    first, second, *_ = read_manifest(mine, "latent")["shards"]
    (mine / first["name"]).unlink()
    (mine / second["name"]).write_bytes((mine / second["name"]).read_bytes()[:-512])
    pixels = Counting(encode_pixels)
    encode(videos, mine, encode_pixels=pixels, encode_texts=never)
    assert len(pixels.asked) == first["samples"] + second["samples"]
    assert contents(mine) == contents(latents)


def test_rows_are_never_taken_over_from_a_damaged_tar(footage, latents, mine, tmp_path):
    """A flipped bit of an earlier tar is not copied into a new one and hashed anew."""
    index, manifest = read_index(mine), read_manifest(mine, "latent")
    whole = bytearray((mine / manifest["shards"][0]["name"]).read_bytes())
    whole[int(index.offset[0] + index.size[0]) - 1] ^= 1
    (mine / manifest["shards"][0]["name"]).write_bytes(whole)
    shard(footage, tmp_path / "videos")
    encode(tmp_path / "videos", mine, encode_texts=never, shard_clips=7)
    encode(tmp_path / "videos", tmp_path / "fresh", shard_clips=7)
    assert contents(mine) == contents(tmp_path / "fresh")


def test_shards_that_were_cut_for_a_model_of_the_same_rate_and_length_are_taken(videos, tmp_path):
    """t2v_a14b's and i2v_a14b's are one cut."""
    cut = read_manifest(videos, "video")["settings"]
    made = encode(videos, tmp_path / "out", model="alike", fps=cut["fps"], num_frames=cut["num_frames"])
    assert made["settings"]["model"] == "alike"


def test_other_folders_are_refused(videos, latents, mine, footage, tmp_path):
    cut = read_manifest(videos, "video")["settings"]
    for fps, num_frames in [(None, None), (24, cut["num_frames"]), (cut["fps"], cut["num_frames"] - 4)]:
        with pytest.raises(
            ValueError, match=r"were cut for model=tiny \(16 fps, up to \d+ frames\), not for model=large"
        ):
            encode(videos, tmp_path / "out", model="large", fps=fps, num_frames=num_frames)
    with pytest.raises(ValueError, match="video shards are needed"):
        encode(latents, tmp_path / "out")
    with pytest.raises(ValueError, match="holds shards of another kind"):
        encode(videos, videos)
    make_footage(tmp_path / "other", num_videos=2, num_images=0, seed=5)
    shard(tmp_path / "other", tmp_path / "others")
    with pytest.raises(ValueError, match="holds latents of other footage, without a file in common"):
        encode(tmp_path / "others", mine)
    assert contents(mine) == contents(latents)
    manifest = read_manifest(mine, "latent")
    (mine / "manifest.json").write_text(json.dumps({**manifest, "schema": 1}))
    with pytest.raises(
        ValueError, match=r"latents of schema 1, this version writes 2; remove it, or give another out="
    ):
        encode(videos, mine)
    with pytest.raises(ValueError, match=r"has schema 1, this version reads 2; remove .*again: python encode\.py"):
        LatentData(shards=mine)


def test_several_captions_windows_and_weights_belong_to_one_clip(videos, tmp_path):
    shards = Path(shutil.copytree(videos, tmp_path / "videos"))

    def change(about):
        about["captions"] = [about["caption"], f"again: {about['caption']}", "what all share"]
        about["weight"] = 2.5 if about["source"] == "clip-0000.mp4" else 1
        if len(about["windows"]) == 1 and about["windows"][0]["num_frames"] == 17:
            about["windows"] = [{"start": start, "num_frames": 9, "clip": 0} for start in (0.0, 0.25, 0.5)]
        return about

    rewrite(shards, change)
    manifest, folder = encode(shards, tmp_path / "out", shard_clips=64), tmp_path / "out"
    index, found = read_index(folder), members(folder)
    grouped = [clip for clip in range(len(index)) if len(index.windows_of(clip)) == 3]
    assert grouped and manifest["windows"] == manifest["clips"] + 2 * len(grouped)
    for clip in range(len(index)):
        names = [index.name(window) for window in index.windows_of(clip)]
        abouts = [json.loads(found[f"{name}.json"]) for name in names]
        assert {about["bucket"] for about in abouts} == {manifest["buckets"][index.bucket[clip]]}
        assert {name[:16] for name in names} == {f"{int(index.source[clip]):016x}"}
        assert len(index.texts_of(clip)) == 3
        assert index.weight[clip] == (2.5 if abouts[0]["source"] == "clip-0000.mp4" else 1)
    shared = [index.texts_of(clip)[2] for clip in range(len(index))]
    assert len(set(shared)) == 1, "a caption that many clips have is one text"


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

    # Only the first frame is looked at.
    monkeypatch.setattr(
        "wantrain.data.footage.survey.read_whole",
        lambda path, found: [np.zeros((8, 8, 3), np.uint8)] * len(found.times),
    )
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
    # What has been encoded is kept: with another limit the same command has nothing left to do.
    encode(damaged, tmp_path / "other", rejects_limit=0.5, encode_pixels=never, encode_texts=never)
    assert contents(tmp_path / "other") == contents(tmp_path / "out")


def test_marks_reach_who_reads_and_change_nothing(tmp_path, monkeypatch):
    """A scene that begins is a keyframe: clips after it are read from there, and are what they are without marks."""
    scenes = [draw_shot(number, seed=5, size=64).scene for number in (0, 1)]
    frames = np.concatenate([scene.frames(64, 64, fps=16, num_frames=60) for scene in scenes])
    (tmp_path / "footage").mkdir()
    write_mp4(tmp_path / "footage" / "cut.mp4", frames, fps=16)
    (tmp_path / "footage" / "cut.txt").write_text("two things")
    shard(tmp_path / "footage", tmp_path / "with")
    (sample,) = read_video_shards(tmp_path / "with", read_manifest(tmp_path / "with", "video"))
    assert [number for number, _ in sample.about["seek_points"]] == [60]
    whole = list(read_sample(sample))

    def read_the_end(request):
        assert request["seek_points"] == sample.about["seek_points"]
        windows, seeks, real = request["windows"], [], Reader._seek
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Reader, "_seek", lambda self, number: (seeks.append(number), real(self, number))[1])
            (last,) = read_clips({**request, "windows": windows[-1:]})
        assert seeks == [60] and np.array_equal(last, whole[-1])
        yield from read_clips(request)

    encode(tmp_path / "with", tmp_path / "latents", read=read_the_end, rejects_limit=0.0)
    monkeypatch.setattr(Survey, "seek_points", [])
    shard(tmp_path / "footage", tmp_path / "without")
    encode(tmp_path / "without", tmp_path / "same")
    assert members(tmp_path / "same") == members(tmp_path / "latents") != {}


def test_rejects_are_remembered_until_they_are_to_be_tried_again(videos, latents, tmp_path):
    def failing(request):
        if request["key"] == first:
            raise ValueError("not today")
        yield from read_clips(request)

    first, out = read_index(latents).name(0)[:16], tmp_path / "out"
    manifest = encode(videos, out, read=failing, rejects_limit=0.5)
    assert manifest["clips_rejected"] >= 1
    before = contents(out)
    assert encode(videos, out, encode_pixels=never, rejects_limit=0.5) == manifest
    # Something else changes: what was rejected stays so, though it could be read now.
    encode(videos, out, encode_pixels=never, text_fingerprint="text-2", rejects_limit=0.5)
    encode(videos, out, encode_pixels=never, rejects_limit=0.5)
    assert contents(out) == before
    pixels = Counting(encode_pixels)
    encode(videos, out, encode_pixels=pixels, encode_texts=never, retry=True)
    assert len(pixels.asked) == manifest["clips_rejected"] and contents(out) == contents(latents)


def test_every_clip_has_its_place_in_the_ledger(damaged, videos, tmp_path):
    """Used and how much of it is cropped, undecodable, or too small for every bucket."""
    write_mp4(tmp_path / "footage" / "tiny.mp4", np.zeros((40, 32, 32, 3), np.uint8), 16)
    (tmp_path / "footage" / "tiny.txt").write_text("small")
    shard(tmp_path / "footage", tmp_path / "more")
    seen = read_manifest(tmp_path / "more", "video")["clips"]
    sizes = geometry.Buckets((4096,), (1.0, 16 / 9), 16, upscale=1.5)
    manifest = encode(tmp_path / "more", tmp_path / "out", rejects_limit=0.5, sizes=sizes)
    clips, seconds, cropped = manifest["stats"]["clips"], manifest["stats"]["seconds"], manifest["cropped"]
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
    with pytest.raises(ValueError, match=rf"clip-\d+\.mp4 \(clip 0\).*{problem}"):
        encode(videos, tmp_path / "out", encode_pixels=broken)
    assert [path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(("text-", "."))] == [
        "rejects.jsonl"
    ]
    assert not list((tmp_path / "out").glob(".*.tmp"))


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


def test_a_damaged_video_shard_stops_the_work(videos, tmp_path):
    mine = Path(shutil.copytree(videos, tmp_path / "videos"))
    shard_file = mine / read_manifest(mine, "video")["shards"][0]["name"]
    shard_file.write_bytes(shard_file.read_bytes()[: shard_file.stat().st_size // 1024 * 512])
    with pytest.raises(ValueError, match=rf"{shard_file.name} is damaged"):
        encode(mine, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
