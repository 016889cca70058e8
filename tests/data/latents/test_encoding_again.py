"""A second run of encode.py on a folder: it encodes only what is new, and ends with the bytes of a fresh run."""

import json

import numpy as np
import pytest
from shard_helpers import Counting, contents, encode, encode_pixels, encode_texts, members, never, read_index, shard

from wantrain import geometry
from wantrain.data import LatentData, read_manifest
from wantrain.demo.footage import make_footage
from wantrain.video import write_mp4


def test_unchanged(videos, latents, capsys):
    before = {path: path.stat().st_mtime_ns for path in latents.iterdir()}
    assert encode(videos, latents, encode_pixels=never, encode_texts=never) == read_manifest(latents, "latent")
    assert before == {path: path.stat().st_mtime_ns for path in latents.iterdir()}
    assert "is finished already" in capsys.readouterr().out


def test_changed_caption(footage, mine, tmp_path):
    (footage / "clip-0002.txt").write_text("a caption that nobody has written yet")
    shard(footage, tmp_path / "videos")
    texts, before = Counting(encode_texts), contents(mine)
    encode(tmp_path / "videos", mine, encode_pixels=never, encode_texts=texts)
    assert texts.inputs == ["a caption that nobody has written yet"]
    latents_now = {name: digest for name, digest in contents(mine).items() if name.startswith("latent-")}
    assert latents_now == {name: digest for name, digest in before.items() if name.startswith("latent-")}
    assert sum(name.startswith("text-") and name not in before for name in contents(mine)) <= 2
    encode(tmp_path / "videos", tmp_path / "fresh")
    assert contents(mine) == contents(tmp_path / "fresh"), "history leaves no trace"


def test_added_and_removed_clips(footage, mine, tmp_path):
    (footage / "clip-0001.mp4").unlink()
    frames = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3)).astype(np.uint8)
    write_mp4(footage / "clip-0003a.mp4", frames, 16)
    (footage / "clip-0003a.txt").write_text("noise")
    shard(footage, tmp_path / "videos")
    pixels, texts = Counting(encode_pixels), Counting(encode_texts)
    manifest = encode(tmp_path / "videos", mine, encode_pixels=pixels, encode_texts=texts)
    assert (len(pixels.inputs), texts.inputs) == (1, ["noise"])
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
def test_changed_settings(videos, mine, tmp_path, change, latents_again, texts_again):
    before, pixels, texts = read_manifest(mine, "latent"), Counting(encode_pixels), Counting(encode_texts)
    encode(videos, mine, encode_pixels=pixels, encode_texts=texts, **change)
    assert len(pixels.inputs) == latents_again * before["clips"]
    assert len(texts.inputs) == texts_again * before["texts"]
    encode(videos, tmp_path / "fresh", **change)
    assert contents(mine) == contents(tmp_path / "fresh")


def test_lost_tars(videos, latents, mine):
    first, second, *_ = read_manifest(mine, "latent")["shards"]
    (mine / first["name"]).unlink()
    (mine / second["name"]).write_bytes((mine / second["name"]).read_bytes()[:-512])
    pixels = Counting(encode_pixels)
    encode(videos, mine, encode_pixels=pixels, encode_texts=never)
    assert len(pixels.inputs) == first["samples"] + second["samples"]
    assert contents(mine) == contents(latents)


def test_damaged_tar_not_copied(footage, latents, mine, tmp_path):
    """A flipped bit of an earlier tar is not copied into a new one and hashed anew."""
    index, manifest = read_index(mine), read_manifest(mine, "latent")
    whole = bytearray((mine / manifest["shards"][0]["name"]).read_bytes())
    whole[int(index.offset[0] + index.size[0]) - 1] ^= 1
    (mine / manifest["shards"][0]["name"]).write_bytes(whole)
    shard(footage, tmp_path / "videos")
    encode(tmp_path / "videos", mine, encode_texts=never, shard_clips=7)
    encode(tmp_path / "videos", tmp_path / "fresh", shard_clips=7)
    assert contents(mine) == contents(tmp_path / "fresh")


def test_shards_of_similar_model(videos, tmp_path):
    """t2v_a14b's and i2v_a14b's are one cut."""
    cut = read_manifest(videos, "video")["settings"]
    made = encode(videos, tmp_path / "out", model="alike", fps=cut["fps"], num_frames=cut["num_frames"])
    assert made["settings"]["model"] == "alike"


def test_other_folders_refused(videos, latents, mine, footage, tmp_path):
    cut = read_manifest(videos, "video")["settings"]
    for fps, num_frames in [(None, None), (24, cut["num_frames"]), (cut["fps"], cut["num_frames"] - 4)]:
        with pytest.raises(
            ValueError, match=r"were cut for model=tiny \(16 fps, up to \d+ frames\), not for model=large"
        ):
            encode(videos, tmp_path / "out", model="large", fps=fps, num_frames=num_frames)
    with pytest.raises(ValueError, match="video shards are needed"):
        encode(latents, tmp_path / "out")
    with pytest.raises(ValueError, match="holds video shards, not latent shards"):
        encode(videos, videos)
    make_footage(tmp_path / "other", num_videos=2, num_images=0, seed=5)
    shard(tmp_path / "other", tmp_path / "others")
    with pytest.raises(ValueError, match="holds latents of other footage, without a file in common"):
        encode(tmp_path / "others", mine)
    assert contents(mine) == contents(latents)
    manifest = read_manifest(mine, "latent")
    (mine / "manifest.json").write_text(json.dumps({**manifest, "schema": 1}))
    with pytest.raises(
        ValueError, match=r"latents of schema 1, this version writes 2; run the same command with another out="
    ):
        encode(videos, mine)
    with pytest.raises(
        ValueError, match=r"has schema 1, this version reads 2; make it again in another folder: python encode\.py"
    ):
        LatentData(shards=mine)
