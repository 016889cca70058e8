"""Sharding: every file, clip and second is counted; static clips and near-duplicates are found."""

import json
import shutil
import sys
import types
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image
from shard_helpers import shard

from wantrain.data import find_footage, read_manifest
from wantrain.data.footage.duplicates import SeenClips, group_of, is_still, summarise, thumbnail
from wantrain.data.footage.headers import Header, parse, read_header, refuse
from wantrain.data.footage.pixels import read_sample
from wantrain.data.footage.video_shards import read_video_shards
from wantrain.data.loading.pixel_dataset import PixelData
from wantrain.demo.footage import make_footage
from wantrain.video import write_mp4

SETTINGS = {"model": "tiny", "num_frames": 17, "fps": 16, "rejects_limit": 1.0, "shard_bytes": 1 << 20}


def cut(source, out, **changes):
    manifest = shard(None, out, found=find_footage(source, caption_default="x"), **{**SETTINGS, **changes})
    check_ledger(manifest)
    return manifest


def check_ledger(manifest):
    """What came in is what was used and what was dropped, to the microsecond; and it is what is in the shards."""
    for name, account in manifest["stats"].items():
        scale = 1_000_000 if name == "seconds" else 1
        parts = [account["used"], *account["dropped"].values()]
        assert round(account["given"] * scale) == sum(round(part * scale) for part in parts), name
        assert min(parts) >= 0
    files, clips = manifest["stats"]["files"], manifest["stats"]["clips"]
    assert (files["given"], files["used"]) == (manifest["files_seen"], manifest["files_used"])
    assert sum(files["dropped"].values()) == manifest["files_rejected"]
    assert clips["used"] == manifest["clips"]


def samples(folder):
    return {sample.about["source"]: sample for sample in read_video_shards(folder, read_manifest(folder, "video"))}


def moving(seconds, seed=0, rate=16, size=64):
    """A view that wanders over a large picture of blots."""
    generator = np.random.default_rng(seed)
    blots = generator.integers(0, 256, (16, 16, 3)).astype(np.uint8)
    world = np.asarray(Image.fromarray(blots).resize((4 * size, 4 * size), Image.Resampling.BICUBIC))
    count = round(seconds * rate)
    way = (np.linspace(0, 2.5 * size, count)).astype(int)
    return np.stack([world[step // 2 : step // 2 + size, step : step + size] for step in way])


@pytest.fixture(scope="module")
def footage(tmp_path_factory):
    """Clips of known lengths, of each kind."""
    folder = tmp_path_factory.mktemp("cutting") / "footage"
    write_mp4(folder / "long.mp4", moving(4, seed=1), 16)  # 64 frames: three clips of 17 and 13 frames left
    write_mp4(folder / "short.mp4", moving(0.75, seed=2), 16)  # 12 frames: one clip of 9, 3 left
    write_mp4(folder / "instant.mp4", moving(0.125, seed=3), 16)  # 2 frames: too short
    write_mp4(folder / "still.mp4", moving(1.5, seed=4)[[0] * 24], 16)  # 24 frames: one clip, 7 left
    write_mp4(folder / "again.mp4", moving(4, seed=1, size=128)[:40], 16, quality=30)  # long.mp4, twice as large
    Image.fromarray(moving(1, seed=5)[0]).save(folder / "picture.png")
    shutil.copy(folder / "long.mp4", folder / "twin.mp4")
    (folder / "text.mp4").write_text("no video " * 9)
    (folder / "empty.mp4").touch()
    (folder / "folder.mp4").mkdir()
    return folder


def test_stats(footage, tmp_path, capsys):
    """The stats count every file, clip and second as used or as dropped for a reason."""
    manifest = cut(footage, tmp_path / "out")
    files, clips, seconds = (manifest["stats"][name] for name in ("files", "clips", "seconds"))
    assert files == {
        "given": 10,
        "used": 5,
        "dropped": {"unreadable": 2, "copy": 1, "not a file": 1, "too short": 1},
    }
    # long 3, short 1, still 1, again 2, picture 1.
    assert clips == {"given": 8, "used": 8, "dropped": {}}
    # again.mp4 40 frames, long 64 and once more as its twin, short 12, still 24, instant 2.
    assert seconds["given"] == pytest.approx((40 + 64 + 64 + 12 + 24 + 2) / 16)
    assert seconds["used"] == pytest.approx((34 + 51 + 9 + 17) / 16)
    assert seconds["dropped"] == {
        "copy": pytest.approx(4),
        "rest, shorter than a clip": pytest.approx((6 + 13 + 3 + 7) / 16),
        "too short": pytest.approx(2 / 16),
    }
    said = capsys.readouterr().out
    assert "10 files seen = 5 used + 5 rejected; 8 clips" in said
    assert "files: 10 = 5 used + 2 unreadable + 1 copy" in said
    assert "seconds: 12.875 = 6.9375 used + 4 copy" in said


@pytest.mark.parametrize("choice", ["first", "middle", "random"])
def test_stats_one_clip_per_file(footage, tmp_path, choice):
    """With one clip per file, the stats count the seconds outside that clip as dropped."""
    stats = cut(footage, tmp_path / "out", clips=choice)["stats"]
    assert stats["clips"]["used"] == 5
    assert stats["seconds"]["used"] == pytest.approx((17 * 3 + 9) / 16)
    assert stats["seconds"]["dropped"][f"not in the {choice} clip"] == pytest.approx((23 + 47 + 3 + 7) / 16)


@pytest.mark.parametrize(
    "choices",
    [
        {"fps": None},
        {"stride": 2},
        {"stretch": True},
        {"lengths": [1, 5, 13]},
        {"fps": 7.3},
        {"fps": 24, "static": "drop", "duplicates": "drop"},
        {"fps": None, "static": "drop", "clips": "random", "seed": 3},
    ],
    ids=str,
)
def test_stats_add_up(footage, tmp_path, choices):
    """The stats add up to the footage given, whatever options are chosen."""
    manifest = cut(footage, tmp_path / "out", **choices)
    assert manifest["clips"] == sum(len(sample.about["windows"]) for sample in samples(tmp_path / "out").values())
    for sample in samples(tmp_path / "out").values():
        assert [len(clip) for clip in read_sample(sample)] == [row["num_frames"] for row in sample.about["windows"]]


def test_static_clips(footage, tmp_path, capsys):
    """Static clips are reported, and dropped only with static=drop."""
    manifest = cut(footage, tmp_path / "kept")
    assert manifest["findings"]["static"] == {"clips": 1, "first": ["still.mp4 (clip 0)"]}
    assert "still.mp4" in samples(tmp_path / "kept")
    assert "1 clips stand still (first: still.mp4 (clip 0)); static=drop" in capsys.readouterr().out
    manifest = cut(footage, tmp_path / "dropped", static="drop")
    assert "still.mp4" not in samples(tmp_path / "dropped")
    assert manifest["stats"]["clips"]["dropped"] == {"static": 1}
    assert manifest["stats"]["seconds"]["dropped"]["static"] == pytest.approx(17 / 16)
    rejects = map(json.loads, (tmp_path / "dropped" / "rejects.jsonl").read_text().splitlines())
    assert "none of its clips is used" in {row["name"]: row["reason"] for row in rejects}["still.mp4"]


def test_near_duplicates(footage, tmp_path, capsys):
    """Near-duplicates are reported, and dropped only with duplicates=drop.

    again.mp4 is long.mp4 in twice the size, written anew at a low quality.
    """
    found = cut(footage, tmp_path / "kept")["findings"]["duplicates"]
    assert found["clips"] == 2
    assert sorted(found["first"]) == [
        ["long.mp4 (clip 0)", "again.mp4 (clip 0)"],
        ["long.mp4 (clip 1)", "again.mp4 (clip 1)"],
    ]
    assert "2 clips look like one of another file (first: long.mp4" in capsys.readouterr().out
    manifest = cut(footage, tmp_path / "dropped", duplicates="drop")
    assert manifest["stats"]["clips"]["dropped"] == {"duplicate": 2}
    assert [row["start"] for row in samples(tmp_path / "dropped")["long.mp4"].about["windows"]] == [34 / 16]


def test_near_duplicates_holdout(footage, tmp_path):
    """Near-duplicates, here again.mp4 and long.mp4, are held out together or not at all, whatever the seed."""
    out = tmp_path / "videos"
    manifest = cut(footage, out)
    keys = {name: sample.key for name, sample in samples(out).items()}
    assert manifest["alike"] == [[keys["long.mp4"], keys["again.mp4"]]]
    together = 0
    for seed in range(8):
        data = PixelData(shards=out, num_frames=9, area=1024, multiple=16, holdout=0.4, seed=seed)
        held = {data.names[number].split("-")[0] for number in data.heldout}
        assert (keys["long.mp4"] in held) == (keys["again.mp4"] in held)
        together += keys["long.mp4"] in held
    assert 0 < together < 8


def test_near_duplicate_groups():
    """A group holds all files that are alike, also those that are alike only through other files."""
    pairs = [(5, 3), (9, 8), (3, 7), (8, 1), (1, 2)]
    manifest = {"alike": [[f"{one:016x}", f"{other:016x}"] for one, other in pairs]}
    assert group_of(manifest) == {3: 3, 5: 3, 7: 3, 1: 1, 2: 1, 8: 1, 9: 1}
    assert group_of({"alike": []}) == {}


def test_distinct_clips(tmp_path):
    """Two hundred wandering views of pictures of blots: none is static, none is a near-duplicate."""
    generator = np.random.default_rng(0)
    thumbnails = [np.stack([thumbnail(frame) for frame in moving(1, seed=seed, rate=5)]) for seed in range(200)]
    seen = SeenClips()
    assert not any(is_still(clip) for clip in thumbnails)
    assert [seen.find(summarise(n, f"{n}", clip)) for n, clip in enumerate(thumbnails)] == [None] * 200
    for n, clip in enumerate(thumbnails):
        noisy = np.clip(clip + generator.normal(0, 1, clip.shape).round(), 0, 255).astype(np.uint8)
        assert seen.find(summarise(200 + n, "", noisy)).file == n


def test_annotations(tmp_path):
    """The captions, weight and tags of a file are in its shard."""
    make_footage(tmp_path / "footage", num_videos=1, num_images=1)
    (tmp_path / "footage" / "metadata.jsonl").write_text(
        json.dumps({"path": "clip-0000.mp4", "captions": ["one", "two"], "weight": 2, "tags": ["a", "b"]})
    )
    cut(tmp_path / "footage", tmp_path / "out", fps=None)
    video, image = samples(tmp_path / "out").values()
    assert {key: video.about[key] for key in ("caption", "captions", "weight", "tags", "time")} == {
        "caption": "one", "captions": ["one", "two"], "weight": 2.0, "tags": ["a", "b"], "time": "native",
    }  # fmt: skip
    assert image.about["captions"] == [image.about["caption"]]
    assert (image.about["weight"], image.about["tags"]) == (1.0, [])
    # Without that line the file's own words and weight come back.
    (tmp_path / "footage" / "metadata.jsonl").unlink()
    cut(tmp_path / "footage", tmp_path / "out", fps=None)
    video, _ = samples(tmp_path / "out").values()
    assert (len(video.about["captions"]), video.about["weight"], video.about["tags"]) == (1, 1.0, [])


# -------------------------------------------------------------------------------------------------- scenes


@pytest.fixture
def detector(monkeypatch):
    """PySceneDetect's surface, as far as it is used: a cut is where a frame differs much from the one before."""
    library = types.ModuleType("scenedetect")

    class FrameTimecode:
        def __init__(self, number, fps):
            self.frame_num = number

    class AdaptiveDetector:
        def __init__(self):
            self.before = None

        def process_frame(self, timecode, frame):
            before, self.before = self.before, frame.astype(int)
            cut = before is not None and np.abs(self.before - before).mean() > 30
            return [timecode] if cut else []

        def post_process(self, timecode):
            return []

    library.FrameTimecode, library.AdaptiveDetector = FrameTimecode, AdaptiveDetector
    monkeypatch.setitem(sys.modules, "scenedetect", library)


@pytest.fixture
def three_scenes(tmp_path):
    """Scenes of 40, 25 and 22 frames."""
    parts = [moving(4, seed=seed)[:count] for seed, count in [(1, 40), (2, 25), (3, 22)]]
    write_mp4(tmp_path / "footage" / "film.mp4", np.concatenate(parts), 16)
    return tmp_path / "footage"


def starts_at_scenes(source, out):
    manifest = cut(source, out, scenes="split")
    (sample,) = samples(out).values()
    assert [round(row["start"] * 16) for row in sample.about["windows"]] == [0, 17, 40, 65]
    assert manifest["stats"]["seconds"]["dropped"] == {"rest, shorter than a clip": pytest.approx((6 + 8 + 5) / 16)}


def test_clips_within_scenes(three_scenes, detector, tmp_path):
    """With scenes=split, no clip crosses a cut between two scenes."""
    starts_at_scenes(three_scenes, tmp_path / "out")
    (sample,) = samples(tmp_path / "out").values()
    for clip in read_sample(sample):
        assert np.abs(np.diff(clip.astype(int), axis=0)).mean((1, 2, 3)).max() < 30
    whole = cut(three_scenes, tmp_path / "whole")
    assert whole["clips"] == 5


def test_pyscenedetect_scenes(three_scenes, tmp_path):
    """With scenes=split, no clip crosses a cut that the real PySceneDetect finds."""
    pytest.importorskip("scenedetect", reason="pip install 'wantrain[scenes]'")
    starts_at_scenes(three_scenes, tmp_path / "out")


def test_missing_scenes_extra(three_scenes, tmp_path, monkeypatch):
    """scenes=split without PySceneDetect raises an error that names the missing extra."""
    monkeypatch.setitem(sys.modules, "scenedetect", None)
    with pytest.raises(ValueError, match=r"scenes=split needs PySceneDetect.*pip install 'wantrain\[scenes\]'"):
        cut(three_scenes, tmp_path / "out", scenes="split")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------- headers


@pytest.mark.parametrize(
    ("said", "header"),
    [
        ("  Stream #0:0[0x1](und): Video: hevc (Main 10), yuv420p10le(tv, bt2020nc/bt2020/smpte2084), 160x96 [SAR 1:1 DAR 5:3]", Header("smpte2084")),
        ("  Stream #0:1: Video: vp9, yuv420p10le(tv, bt2020nc/bt2020/arib-std-b67), 160x96, 24 fps", Header("arib-std-b67")),
        ("  Stream #0:0: Video: h264, yuv420p(tv, bt709), 720x576 [SAR 16:15 DAR 4:3], 25 fps", Header("", (16, 15))),
        ("  Stream #0:0: Video: mjpeg, 10x10 [SAR 2:1 DAR 2:1] (attached pic)\n  Stream #0:1: Video: h264, 10x10", Header()),
        ("  Stream #0:0: Video: h264, 10x10 [SAR 0:1 DAR 0:1]", Header()),
        ("what.mp4: Invalid data found when processing input", Header()),
    ],
)  # fmt: skip
def test_header_parse(said, header):
    """The transfer function and the pixel aspect ratio are parsed from ffmpeg's output."""
    assert parse(said) == header


def test_unsupported_headers():
    """HDR and pixels that are not square are refused with an ffmpeg command that converts the file."""
    refuse(Header(), "a.mp4")
    refuse(Header("", (101, 100)), "a.mp4")
    with pytest.raises(ValueError, match=r"is HDR \(smpte2084\).*ffmpeg -i a\.mp4 -vf zscale.* a_sdr\.mp4"):
        refuse(Header("smpte2084"), "a.mp4")
    with pytest.raises(ValueError, match=r"not square \(16:15\).*ffmpeg -i a\.mp4 .*a_square\.mp4"):
        refuse(Header("", (16, 15)), "a.mp4")
    assert read_header(Path("absent.mp4")) == Header()


# ---------------------------------------------------------------------------------------------- by command


def test_remote_tars(call, tmp_path):
    """A set of tars at a URL becomes video shards.

    Also our own video shards: cut again, otherwise, with their captions, weights and tags.
    """
    make_footage(tmp_path / "footage", num_videos=2, num_images=1)
    call("shard.py", "source=footage", "out=first")
    (tar,) = (tmp_path / "first").glob("*.tar")
    memory = fsspec.filesystem("memory")
    memory.pipe("/set/videos-000.tar", tar.read_bytes())
    said = call(
        "shard.py", "source=memory://set/videos-{000..000}.tar", "out=second", "fps=native", "clips=middle"
    ).stdout
    assert "3 files seen = 3 used + 0 rejected; 3 clips" in said
    assert [path.name for path in (tmp_path / "second").iterdir() if path.name.startswith(".")] == [".surveys"]
    first, second = samples(tmp_path / "first"), samples(tmp_path / "second")
    by_key = {sample.key: sample.about for sample in second.values()}
    for sample in first.values():
        about = by_key[sample.key]
        assert about["captions"] == sample.about["captions"]
        assert about["time"] == "native"
        assert len(about["windows"]) == 1


@pytest.mark.parametrize(
    ("command", "arguments", "problem"),
    [
        ("shard.py", ["clips=last"], "clips=last is unknown; choose one of all, first, middle, random"),
        ("shard.py", ["fps=fast"], "fps=fast must be a number above 0, or one of native, resample"),
        ("shard.py", ["fps=0"], "fps=0 must be above 0"),
        ("shard.py", ["stretch=1"], "stretch=1 must be true or false"),
        ("shard.py", ["stride=0"], "stride=0 must be above 0"),
        ("shard.py", ["lengths=[6]"], "lengths=6 is not 4k+1"),
        ("shard.py", ["static=keep"], "static=keep is unknown; choose one of report, drop"),
        ("encode.py", ["area=[100]"], "area=100 holds not even one 16x16 block"),
        ("encode.py", ["area=[4096,many]"], "must be a whole number above 0, or a list of such numbers"),
        ("encode.py", ["tokens=0"], "tokens=0 must be above 0"),
        ("encode.py", ["upscale.limit=0"], "error: upscale.limit=0 must be above 0; 1 allows no enlarging"),
    ],
)
def test_invalid_options(call, tmp_path, command, arguments, problem):
    """shard.py and encode.py refuse invalid options before any work and create no folder."""
    where = {"shard.py": ["source=."], "encode.py": ["shards=."]}[command]
    ended = call(command, *where, "out=out", *arguments, check=False)
    assert problem in ended.stderr
    assert not (tmp_path / "out").exists()
