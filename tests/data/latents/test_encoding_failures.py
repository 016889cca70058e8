"""Encoding with damaged clips, broken encoders and damaged shards: rejects, statistics, errors."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from shard_helpers import Counting, contents, encode, encode_pixels, encode_texts, members, never, read_index, shard

from wantrain import geometry
from wantrain.data import read_manifest
from wantrain.data.footage.pixels import read_clips, read_sample
from wantrain.data.footage.probe import ReadOptions
from wantrain.data.footage.reader import Reader
from wantrain.data.footage.survey import Survey
from wantrain.data.footage.video_shards import read_video_shards
from wantrain.demo.footage import draw_shot
from wantrain.video import write_mp4


@pytest.fixture
def damaged(videos, tmp_path, monkeypatch):
    """Shards with a file that cannot be decoded to its end, of which shard.py would have left out the clips."""
    footage = Path(shutil.copytree(videos.parent / "footage", tmp_path / "footage"))
    frames = np.random.default_rng(0).integers(0, 256, (72, 64, 64, 3)).astype(np.uint8)
    write_mp4(tmp_path / "whole.mp4", frames, 16)
    content = bytearray((tmp_path / "whole.mp4").read_bytes())
    middle = len(content) * 6 // 10
    content[middle : middle + 20_000] = bytes(20_000)
    (footage / "damaged.mp4").write_bytes(content)
    (footage / "damaged.txt").write_text("noise")
    # A survey that sees no frame.
    black = np.zeros((8, 8, 3), np.uint8)
    monkeypatch.setattr("wantrain.data.footage.survey.read_whole", lambda path, found: iter([black] * len(found.times)))
    monkeypatch.setattr("wantrain.data.footage.survey.Inspection.frames", lambda self: iter([black] * len(frames)))
    shard(footage, tmp_path / "videos")
    return tmp_path / "videos"


def test_undecodable_clip_rejected(damaged, videos, tmp_path):
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


def test_seek_points_change_nothing(tmp_path, monkeypatch):
    """A scene that begins is a keyframe: clips after it are read from there, and are the same without seek points."""
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
    monkeypatch.setattr(Survey, "read_options", ReadOptions())
    shard(tmp_path / "footage", tmp_path / "without")
    encode(tmp_path / "without", tmp_path / "same")
    assert members(tmp_path / "same") == members(tmp_path / "latents") != {}


def test_rejects_remembered(videos, latents, tmp_path):
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
    assert len(pixels.inputs) == manifest["clips_rejected"] and contents(out) == contents(latents)


def test_every_clip_counted(damaged, videos, tmp_path):
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
        (lambda pixels: encode_pixels(pixels) * float("nan"), "returned NaN"),
        (lambda pixels: encode_pixels(pixels)[:, :, :, 1:], "the shape"),
        (lambda pixels: encode_pixels(pixels)[:, :, :-1], "the shape"),
    ],
)
def test_bad_latents(videos, tmp_path, broken, problem):
    with pytest.raises(ValueError, match=rf"clip-\d+\.mp4 \(clip 0\).*{problem}"):
        encode(videos, tmp_path / "out", encode_pixels=broken)
    assert [path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(("text-", "."))] == [
        "rejects.jsonl"
    ]
    assert not list((tmp_path / "out").glob(".*.tmp"))


def test_bad_texts(videos, tmp_path):
    def broken(texts):
        return [text / 0 for text in encode_texts(texts)]

    with pytest.raises(ValueError, match="text encoder gave NaN"):
        encode(videos, tmp_path / "out", encode_texts=broken)


def test_encoder_error_raised(videos, tmp_path):
    def broken(_):
        raise ValueError("out of something")

    with pytest.raises(ValueError, match=r"^out of something$"):
        encode(videos, tmp_path / "out", encode_pixels=broken)


def test_damaged_video_shard(videos, tmp_path):
    mine = Path(shutil.copytree(videos, tmp_path / "videos"))
    shard_file = mine / read_manifest(mine, "video")["shards"][0]["name"]
    shard_file.write_bytes(shard_file.read_bytes()[: shard_file.stat().st_size // 1024 * 512])
    with pytest.raises(ValueError, match=rf"{shard_file.name} is damaged"):
        encode(mine, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
