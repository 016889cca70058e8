"""The torture corpus: every odd file ends as the frames that ffmpeg itself shows at the same times, or as a reject.

The whole of shard.py runs over it at once: the run goes on, exits well, and its stats has a place for each file.
"""

import json
import os
import re
import subprocess
import threading
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from shard_helpers import shard

from wantrain.data import find_footage, read_manifest
from wantrain.data.footage import reader
from wantrain.data.footage.clips import EPSILON
from wantrain.data.footage.duplicates import thumbnail
from wantrain.data.footage.pixels import read_sample
from wantrain.data.footage.probe import probe, read_whole
from wantrain.data.footage.reader import Reader
from wantrain.data.footage.video_shards import read_video_shards

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
FPS = 16
X264 = ("-c:v", "libx264", "-preset", "ultrafast", "-bf", "2", "-g", "12", "-pix_fmt", "yuv420p")
X265 = ("-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "log-level=error:keyint=12:pools=1")
VP9 = ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-b:v", "1M")
AV1 = ("-c:v", "libsvtav1", "-preset", "12", "-svtav1-params", "lp=1")
HDR = ("-vf", "setparams=color_trc=smpte2084:color_primaries=bt2020:colorspace=bt2020nc")
BT709 = ("-vf", "scale=out_color_matrix=bt709,setparams=color_trc=bt709:color_primaries=bt709:colorspace=bt709")


def ffmpeg(*arguments):
    subprocess.run([FFMPEG, "-y", "-loglevel", "error", *map(str, arguments)], check=True, capture_output=True)


def picture(size="112x80", rate=24, seconds=1.5):
    """What every file shows: a test card that moves, with numbers in it."""
    return ("-f", "lavfi", "-i", f"testsrc2=s={size}:r={rate}:d={seconds}")


#: Files that are to be used, by what makes them.
GOOD = {
    "h264.mp4": (*picture(), *X264),
    "h264_10.mkv": (*picture(), *X264[:-1], "yuv420p10le"),
    "h264_444_odd.mp4": (*picture("97x71"), *X264[:-1], "yuv444p"),
    "hevc.mp4": (*picture(), *X265, "-pix_fmt", "yuv420p"),
    "hevc_10.mov": (*picture(), *X265, "-pix_fmt", "yuv420p10le"),
    "vp9.webm": (*picture(), *VP9, "-pix_fmt", "yuv420p"),
    "vp9_10.webm": (*picture(), *VP9, "-pix_fmt", "yuv420p10le"),
    "av1.mp4": (*picture(), *AV1, "-pix_fmt", "yuv420p"),
    "av1_10.webm": (*picture(), *AV1, "-pix_fmt", "yuv420p10le"),
    "prores.mov": (*picture(), "-c:v", "prores_ks", "-pix_fmt", "yuv422p10le"),
    "animated.gif": (*picture(rate=10),),
    "one_frame.mp4": (*picture(), "-frames:v", "1", *X264),
    "five_frames.mp4": (*picture(rate=16), "-frames:v", "5", *X264),
    "fast.mp4": (*picture(rate=60), *X264),
    "ntsc.mp4": (*picture(rate="24000/1001"), *X264),
    "variable.mp4": (*picture(rate=30), "-vf", "setpts='if(lt(N,20),N/30,20/30+(N-20)/10)/TB'", "-fps_mode", "vfr", *X264),
    "gap.mkv": (*picture(seconds=3), "-vf", "select='not(between(n,20,50))'", "-fps_mode", "passthrough", *X264),
    "with_sound.mp4": (*picture(), "-f", "lavfi", "-i", "sine=d=1.5", *X264, "-c:a", "aac"),
    "late_sound.mp4": (*picture(), "-itsoffset", "0.7", "-f", "lavfi", "-i", "sine=d=1", *X264, "-c:a", "aac"),
    "two_videos.mkv": (*picture("160x96"), *picture("64x48"), "-map", "0", "-map", "1", *X264),
    "bt709.mp4": (*picture(), *BT709, *X264),
    "full_range.mp4": (*picture(), *X264[:-1], "yuvj420p"),
    "open_gop.mp4": (*picture(), *X264, "-x264-params", "open-gop=1:keyint=12:min-keyint=12"),
}  # fmt: skip

#: Files made of another one, without writing its pictures anew.
COPIES = {
    "cut.mp4": ("-ss", "0.54", "-i", "h264.mp4", "-c", "copy"),
    "cut_hevc.mp4": ("-ss", "0.54", "-i", "hevc.mp4", "-c", "copy"),
    "rotated.mp4": ("-display_rotation", "90", "-i", "h264.mp4", "-c", "copy"),
    "upside_down.mp4": ("-display_rotation", "180", "-i", "h264.mp4", "-c", "copy"),
    "late_start.mkv": ("-i", "h264.mp4", "-c", "copy", "-output_ts_offset", "3.5"),
    "fragmented.mp4": ("-i", "h264.mp4", "-c", "copy", "-movflags", "frag_keyframe+empty_moov"),
}

#: Files that cannot be used, with the reason.
BAD = {
    "hdr.mp4": ((*picture(), *X265, "-pix_fmt", "yuv420p10le", *HDR), r"is HDR \(smpte2084\)"),
    "wide_pixels.mp4": ((*picture(), "-vf", "setsar=2", *X264), r"pixels are not square \(2:1\)"),
    "sound_only.mp4": (("-f", "lavfi", "-i", "sine=d=1", "-c:a", "aac"), "cannot be decoded"),
    "three_frames.mp4": ((*picture(rate=16), "-frames:v", "3", *X264), "less than 5 frames"),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """All files, those that are damaged or no files among them, and the reason expected of each that is not used."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, made in GOOD.items():
        ffmpeg(*made, folder / name)
    for name, made in COPIES.items():
        ffmpeg(*(folder / part if part in GOOD else part for part in made), folder / name)
    reasons = {name: reason for name, (_, reason) in BAD.items()}
    for name, (made, _) in BAD.items():
        ffmpeg(*made, folder / name)
    plain = (folder / "h264.mp4").read_bytes()
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("a text, not a video\n" * 50)
    (folder / "zeros.mkv").write_bytes(bytes(5000))
    (folder / "no_index.mp4").write_bytes(plain[: len(plain) // 2])
    (folder / "folder.mp4").mkdir()
    (folder / "broken_link.mp4").symlink_to(folder / "nowhere.mp4")
    (folder / "link.mp4").symlink_to(folder / "h264.mp4")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "new\nline.mp4").write_bytes((folder / "hevc.mp4").read_bytes() + bytes(8))
    Path(os.fsdecode(os.fsencode(folder) + b"/latin\xff.mp4")).write_bytes((folder / "av1.mp4").read_bytes() + bytes(8))
    # A header that claims 8K: the width and height of the track, which a player takes for how large to show it.
    lying = re.sub(rb"(avc1.{24})\x00\x70\x00\x50", lambda m: m[1] + b"\x1e\x00\x10\xe0", plain, flags=re.DOTALL)
    assert lying != plain
    (folder / "claims_8k.mp4").write_bytes(lying)
    reasons |= {
        "empty.mp4": "is empty",
        "text.mp4": "cannot be decoded",
        "zeros.mkv": "cannot be decoded",
        "no_index.mp4": "cannot be decoded",
        "folder.mp4": "is not a file",
        "broken_link.mp4": "is not a file",
        "pipe.mp4": "is not a file",
        "link.mp4": "same bytes as h264.mp4",
    }
    return folder, reasons


def shard_all(folder, out, **changes):
    settings = {"model": "tiny", "num_frames": 17, "fps": FPS, "rejects_limit": 0.9, "shard_bytes": 1 << 20}
    found = find_footage(folder, caption_default="x")
    ended, manifest = threading.Event(), {}

    def run():
        manifest.update(shard(None, out, found=found, **{**settings, **changes}))
        ended.set()

    threading.Thread(target=run, daemon=True).start()
    assert ended.wait(120), "a file hangs the run"
    return manifest


def ffmpeg_shows(path):
    """(times from the first frame on, frames) by ffmpeg's own decoder, which honours edit lists and rotation."""
    ended = subprocess.run(
        [FFMPEG, "-nostdin", "-hide_banner", "-i", f"file:{path}", "-vf", "format=rgb24,showinfo", "-fps_mode",
         "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], capture_output=True, check=False,
    )  # fmt: skip
    said = re.findall(r"n: *\d+ pts: *\S+ pts_time:(\S+) .*? s:(\d+)x(\d+)", ended.stderr.decode("utf-8", "replace"))
    times = np.array([float(time) for time, *_ in said])
    width, height = int(said[0][1]), int(said[0][2])
    frames = np.frombuffer(ended.stdout, np.uint8).reshape(-1, height, width, 3)
    assert len(frames) == len(times)
    return times - times[0], frames


def check_frames(sample, path):
    """Its clips are what ffmpeg shows at their times; the largest mean error of a frame, in grey levels."""
    times, frames = ffmpeg_shows(path)
    assert (sample.about["height"], sample.about["width"]) == frames.shape[1:3]
    begin = sample.about["windows"][0]["start"]
    worst = 0.0
    for window, clip in zip(sample.about["windows"], read_sample(sample), strict=True):
        wanted = window["start"] - begin + np.arange(window["num_frames"]) / FPS
        # A frame may begin exactly where the tolerance ends (24000/1001 against 16 a second): either side is right.
        sides = [np.searchsorted(times, wanted + EPSILON + side, side="right") - 1 for side in (-1e-5, 1e-5)]
        off = [np.abs(clip.astype(int) - frames[np.clip(side, 0, None)]).mean((1, 2, 3)) for side in sides]
        errors = np.minimum(*off)
        worst = max(worst, float(errors.max()))
    assert worst < 2, f"{path.name}: {worst:.2f} grey levels"
    return worst


def check_ledger(manifest):
    for name, account in manifest["stats"].items():
        scale = 1_000_000 if name == "seconds" else 1
        parts = [account["used"], *account["dropped"].values()]
        assert round(account["given"] * scale) == sum(round(part * scale) for part in parts), name


def rejects_of(folder):
    rows = map(json.loads, (folder / "rejects.jsonl").read_text(encoding="utf-8").splitlines())
    return {row["name"]: row["reason"] for row in rows}


def test_exact_frames_or_reason(corpus, tmp_path):
    folder, reasons = corpus
    manifest = shard_all(folder, tmp_path / "out")
    rejects = rejects_of(tmp_path / "out")
    samples = {
        s.about["source"]: s for s in read_video_shards(tmp_path / "out", read_manifest(tmp_path / "out", "video"))
    }
    assert rejects.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert re.search(reason, rejects[name]), f"{name}: {rejects[name]}"
    assert samples.keys() == {*GOOD, *COPIES, "new\nline.mp4", "latin\\xff.mp4", "claims_8k.mp4"}
    for name, sample in samples.items():
        path = Path(os.fsdecode(os.fsencode(folder) + b"/latin\xff.mp4")) if name == "latin\\xff.mp4" else folder / name
        check_frames(sample, path)
        spans = [(row["num_frames"] - 1) % 4 for row in sample.about["windows"]]
        assert set(spans) == {0}
    assert len(samples["one_frame.mp4"].about["windows"]) == 1
    assert samples["one_frame.mp4"].about["windows"][0]["num_frames"] == 1
    # 1.5 seconds at 16 frames a second hold one clip of 17 frames; cut to 0.96 one of 13.
    assert [row["num_frames"] for row in samples["h264.mp4"].about["windows"]] == [17]
    assert [row["num_frames"] for row in samples["cut.mp4"].about["windows"]] == [13]
    check_ledger(manifest)
    assert manifest["files_seen"] == len(samples) + len(rejects)


def test_every_seek_point_exact(corpus, monkeypatch):
    """Marks are tried at every third frame here; where no seek is right there are none."""
    monkeypatch.setattr(reader, "APART", 3)
    monkeypatch.setattr(reader, "NEAR", 1)
    folder, _ = corpus
    seekable = {}
    for name in (*GOOD, *COPIES, "claims_8k.mp4"):
        found = probe(folder / name)
        whole = list(read_whole(folder / name, found))
        tried = Reader(folder / name, len(whole)).tried_seek_points(np.stack([thumbnail(frame) for frame in whole]))
        seekable[name] = [seek_point for seek_point in tried if seek_point is not None]
        for seek_point in seekable[name]:
            onwards = Reader(folder / name, len(whole), [seek_point])
            for number in range(seek_point.number, len(whole)):
                np.testing.assert_array_equal(onwards.frame(number), whole[number], err_msg=f"{name} {seek_point}")
            assert onwards.seek_points == [seek_point], f"{name}: {seek_point} was not found again"
    assert seekable["cut.mp4"] == seekable["cut_hevc.mp4"] == []
    for name in ("h264.mp4", "h264_10.mkv", "prores.mov", "ntsc.mp4", "variable.mp4", "rotated.mp4", "fragmented.mp4"):
        assert seekable[name], f"{name} has no seek_points: it would be read from its start each time"


def test_rejects_limit(corpus, tmp_path):
    """Sharding stops when more files are bad (here 11) than rejects.limit allows, and leaves no manifest."""
    folder, _ = corpus
    found = find_footage(folder, caption_default="x")
    settings = {"model": "tiny", "num_frames": 17, "fps": FPS, "shard_bytes": 1 << 20}
    with pytest.raises(ValueError, match=r"11 of \d+ files are bad, more than rejects\.limit=0\.1"):
        shard(None, tmp_path / "out", found=found, rejects_limit=0.1, **settings)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("name", ["h264.mp4", pytest.param("hevc.mp4", marks=pytest.mark.slow), "vp9.webm",
                                  pytest.param("fragmented.mp4", marks=pytest.mark.slow),
                                  pytest.param("av1_10.webm", marks=pytest.mark.slow)])  # fmt: skip
def test_truncated_files(corpus, tmp_path, name):
    """A truncated file is rejected, or its frames are exact up to the cut.

    Ten random places; of an mp4 the index stands in front, so that it looks whole.
    """
    folder, _ = corpus
    whole = folder / name
    if name in {"h264.mp4", "hevc.mp4"}:
        whole = tmp_path / name
        ffmpeg("-i", folder / name, "-c", "copy", "-movflags", "faststart", whole)
    content = whole.read_bytes()
    source = tmp_path / "source"
    source.mkdir()
    for place in np.random.default_rng(0).integers(1, len(content), 10).tolist():
        (source / f"{place:06d}{whole.suffix}").write_bytes(content[:place])
    (source / "whole.mp4").write_bytes((folder / "h264.mp4").read_bytes())
    manifest = shard_all(source, tmp_path / "out", rejects_limit=1.0)
    rejects = rejects_of(tmp_path / "out")
    for sample in read_video_shards(tmp_path / "out", read_manifest(tmp_path / "out", "video")):
        check_frames(sample, source / sample.about["source"])
    assert manifest["files_used"] + manifest["files_rejected"] == 11
    rejects = {name: reason for name, reason in rejects.items() if "damaged, between" not in reason}
    assert all("cannot be decoded" in reason or "less than 5 frames" in reason for reason in rejects.values())
    check_ledger(manifest)


@pytest.mark.slow
def test_random_damage(corpus, tmp_path):
    """400 files, 20 of them cut, with flipped bits or a page of zeros: the run ends, and the others are as without."""
    folder, _ = corpus
    generator = np.random.default_rng(1)
    source = tmp_path / "source"
    source.mkdir()
    makes = [*GOOD]
    damaged = set(generator.choice(400, 20, replace=False).tolist())
    for number in range(400):
        made = makes[number % len(makes)]
        # A box that readers skip makes every file another one.
        tail = (16).to_bytes(4, "big") + b"free" + number.to_bytes(8, "big") if made.endswith(("mp4", "mov")) else b""
        content = bytearray((folder / made).read_bytes() + tail)
        if number in damaged:
            place = int(generator.integers(len(content) // 8, len(content)))
            kind = number % 3
            if kind == 0:
                del content[place:]
            elif kind == 1:
                for bit in generator.integers(0, len(content) * 8, 40).tolist():
                    content[bit // 8] ^= 1 << bit % 8
            else:
                content[place : place + 4096] = bytes(len(content[place : place + 4096]))
        (source / f"{number:03d}_{made}").write_bytes(content)
    manifest = shard_all(source, tmp_path / "out", rejects_limit=0.1)
    check_ledger(manifest)
    samples = [s.about["source"] for s in read_video_shards(tmp_path / "out", read_manifest(tmp_path / "out", "video"))]
    assert samples == sorted(samples)
    bad = {name for name, reason in rejects_of(tmp_path / "out").items() if "same bytes" not in reason}
    assert {int(name[:3]) for name in bad} <= damaged
    files = [name for name in rejects_of(tmp_path / "out") if "(clip" not in name]
    assert len(samples) + len(files) == 400
