"""Damage that decoders conceal, interlaced footage, and the containers and animations that are read without decord."""

import subprocess

import av
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image
from shard_helpers import shard

from wantrain.data import ClipOptions, find_footage
from wantrain.data.footage.clips import Window, cut_windows
from wantrain.data.footage.inspection import Inspection, damaged_spans
from wantrain.data.footage.pixels import read_sample
from wantrain.data.footage.probe import probe, read_whole, read_windows
from wantrain.data.footage.survey import Survey, read_survey
from wantrain.data.footage.video_shards import read_video_shards
from wantrain.data.shards import read_manifest

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
SETTINGS = {"num_frames": 17, "fps": 24, "model": "tiny", "rejects_limit": 0.5}
H264 = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-g", "24", "-bf", "2", "-threads", "1")


def ffmpeg(*arguments):
    subprocess.run([FFMPEG, "-y", "-loglevel", "error", *map(str, arguments)], check=True)


def film(path, *options, seconds=4, size="192x128"):
    ffmpeg("-f", "lavfi", "-i", f"testsrc2=size={size}:rate=24:duration={seconds}", *options, path)
    return path


def overwrite(path, at, count=40):
    """Random bytes in the middle of the first packet that is no keyframe after this share of the packets."""
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size, packet.is_keyframe) for packet in container.demux(video=0) if packet.size]
    place, size = next(
        (place, size) for place, size, is_key in packets[int(len(packets) * at) :] if not is_key and size > 2 * count
    )
    content = bytearray(path.read_bytes())
    place += size // 2
    content[place : place + count] = np.random.default_rng(0).integers(0, 256, count, dtype=np.uint8).tobytes()
    path.write_bytes(content)


def survey_of(path):
    (packed,) = (
        item
        for item in read_survey({"path": str(path), "name": path.name, "member": None, "split": False})
        if item is not None
    )
    return Survey.unpacked(packed.tobytes())


def gray(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="gray") for frame in container.decode(video=0)]).astype(int)


CODECS = {
    "a.mp4": H264,
    "c.avi": ("-c:v", "mpeg4", "-g", "24"),
    "d.mpg": ("-c:v", "mpeg2video", "-g", "24", "-q:v", "4"),
    "e.flv": ("-c:v", "flv1", "-g", "24"),
    "f.3gp": ("-c:v", "mpeg4", "-g", "24"),
}


@pytest.mark.parametrize("name", CODECS)
def test_concealed_damage(tmp_path, name):
    """Every frame that differs from the sound file's lies in a damaged span, and the spans end at a keyframe."""
    path = film(tmp_path / name, *CODECS[name])
    sound = gray(path)
    assert survey_of(path).damaged == []
    overwrite(path, 0.45)
    survey, broken = survey_of(path), gray(path)
    assert len(broken) == len(sound) == len(survey.info.times)
    wrong = survey.info.times[np.abs(broken - sound).max((1, 2)) > 0]
    assert len(wrong) > 0
    assert len(survey.damaged) == 1 and survey.fault
    ((begin, end),) = survey.damaged
    assert begin - 0.002 <= wrong.min() and wrong.max() < end
    assert end - begin <= 27 / 24 and (end - survey.info.start) % 1 == pytest.approx(0, abs=0.01)


def test_damaged_clips_are_rejected(tmp_path):
    """A clip with damaged frames is left out, with their times; the other clips of its file are used."""
    source = tmp_path / "footage"
    source.mkdir()
    overwrite(film(source / "a.mp4", *H264), 0.45)
    film(source / "b.mp4", *H264, size="160x128")
    overwrite(film(source / "short.mp4", *H264, seconds=1), 0.5)
    (source / "notes.pdf").touch()
    found = find_footage(source, caption_default="x")
    manifest = shard(None, tmp_path / "out", found=found, **SETTINGS)
    rows = (tmp_path / "out/rejects.jsonl").read_text().splitlines()
    assert len(rows) == 3 and all("frames that are damaged, between" in row for row in rows)
    assert ["(clip" in row for row in rows] == [True, True, False] and "each of its clips" in rows[2]
    samples = {
        s.about["source"]: len(s.about["windows"])
        for s in read_video_shards(tmp_path / "out", read_manifest(tmp_path / "out", "video"))
    }
    assert samples == {"a.mp4": 4, "b.mp4": 5}
    assert (manifest["files_seen"], manifest["files_used"], manifest["files_rejected"]) == (3, 2, 1)
    assert manifest["stats"]["clips"]["dropped"] == {"damaged": 2}
    assert manifest["beside"] == {"read": {}, "ignored": {"of extension .pdf": 1}}


def break_lengths(path, at):
    """Make the length of the first packet's picture that is no keyframe, after this share of the packets, impossible."""
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.is_keyframe) for packet in container.demux(video=0) if packet.size]
    place = next(place for place, is_key in packets[int(len(packets) * at) :] if not is_key)
    content = bytearray(path.read_bytes())
    content[place : place + 4] = b"\xff" * 4
    path.write_bytes(content)


UNREADABLE = {
    "a.mp4": H264,
    "b.mp4": ("-c:v", "libx265", "-pix_fmt", "yuv420p", "-x265-params", "keyint=24:log-level=none"),
    "c.mkv": H264,
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_frames_that_cannot_be_decoded(tmp_path, name):
    """Where decord fails on a frame, or the container loses some, the clips that hold none of them are read exactly."""
    path = film(tmp_path / name, *UNREADABLE[name])
    whole, info = list(read_whole(path, probe(path))), probe(path)
    break_lengths(path, 0.45)
    survey = survey_of(path)
    begin, end = np.min(survey.damaged), np.max(survey.damaged)
    assert info.times[36] < begin < end <= 2.0 + info.start + 1e-6
    assert survey.read_options.damaged == (name != "c.mkv")
    windows = [Window(info.start, 17), Window(info.start + 2.5, 17)]
    for window, clip in zip(
        windows, read_windows(path, probe(path), windows, 24, options=survey.read_options), strict=True
    ):
        first = round((window.start - info.start) * 24)
        np.testing.assert_array_equal(clip, np.stack(whole[first : first + 17]))
    assert len(survey.thumbnails) == len(survey.info.times)


def test_missing_frame_is_an_error(tmp_path):
    """A frame that cannot be decoded is not replaced by its neighbour."""
    path = film(tmp_path / "a.mp4", *H264)
    break_lengths(path, 0.45)
    survey = survey_of(path)
    window = Window(survey.damaged[0][0] - 0.2, 17)
    with pytest.raises(ValueError, match=r"frame 4. is missing"):
        list(read_windows(path, survey.info, [window], 24, options=survey.read_options))


def test_damaged_spans():
    """A fault lasts to the next keyframe, in frames shown before a keyframe to that keyframe."""
    closed = [(0.0, True), (3.0, False), (1.0, False), (2.0, False), (4.0, True), (5.0, False)]
    assert damaged_spans(closed, {1}) == [(1.0, 4.0)]
    assert damaged_spans(closed, {3}) == [(2.0, 4.0)]
    assert damaged_spans(closed, {5, 1}) == [(1.0, 4.0), (5.0, float("inf"))]
    assert damaged_spans(closed, {0, 4}) == [(0.0, float("inf"))]
    opened = [(2.0, True), (0.0, False), (1.0, False), (3.0, False), (4.0, True)]
    assert damaged_spans(opened, {1}) == [(0.0, 2.0)]
    assert damaged_spans(opened, set()) == damaged_spans([], {0}) == []


INTERLACED = {
    "a.mp4": ("-vf", "interlace", *H264, "-flags", "+ilme+ildct"),
    "b.mpg": ("-vf", "interlace", "-c:v", "mpeg2video", "-flags", "+ilme+ildct", "-q:v", "2"),
}


@pytest.mark.parametrize("name", INTERLACED)
def test_interlaced(tmp_path, name):
    """Interlaced footage is refused with the command that mends it, or deinterlaced by choice."""
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / name
    ffmpeg("-f", "lavfi", "-i", "testsrc2=size=192x128:rate=48:duration=2", *INTERLACED[name], path)
    film(tmp_path / "in/plain.mp4", *H264, seconds=1)
    found = find_footage(tmp_path / "in", caption_default="x")
    refused = shard(None, tmp_path / "out", found=found, **SETTINGS)
    assert refused["files_used"] == 1
    reason = (tmp_path / "out/rejects.jsonl").read_text()
    stem = path.stem
    assert (
        f"ffmpeg -i {name} -vf bwdif=mode=send_frame -c:a copy {stem}_progressive.mp4, or give interlaced=deinterlace"
        in reason
    )
    manifest = shard(None, tmp_path / "all", found=found, interlaced="deinterlace", **SETTINGS)
    assert (manifest["files_used"], manifest["settings"]["interlaced"]) == (2, "deinterlace")
    mended = tmp_path / "mended.mkv"
    ffmpeg("-i", path, "-vf", "bwdif=mode=send_frame:deint=interlaced", "-c:v", "ffv1", mended)
    wanted = list(read_whole(mended, probe(mended)))
    for sample in read_video_shards(tmp_path / "all", read_manifest(tmp_path / "all", "video")):
        if sample.about["source"] == name:
            (first, *_) = read_sample(sample)
            difference = np.abs(first.astype(int) - np.stack(wanted[:17]))
            assert sample.about["deinterlace"] is True and difference.mean() < 1
        else:
            assert "deinterlace" not in sample.about


@pytest.mark.parametrize(
    "name", ["a.ts", "b.mts", "c.m2ts", "d.mpg", "e.mpeg", "f.wmv", "g.flv", "h.3gp", "i.y4m", "j.ogv"]
)
def test_containers(tmp_path, name):
    """Each container is read: as many frames as it was made of, the same whether read whole or in clips."""
    options = {
        "d": ("-q:v", "4"),
        "e": ("-q:v", "4"),
        "i": (),
        "f": (),
        "h": ("-c:v", "mpeg4"),
        "j": ("-c:v", "libtheora"),
    }
    path = film(tmp_path / name, *options.get(name[0], H264), seconds=2)
    survey, info = survey_of(path), probe(path)
    assert (len(info.times), info.height, info.width, survey.damaged) == (48, 128, 192, [])
    assert info.seconds == pytest.approx(2, abs=0.02)
    whole = list(read_whole(path, info))
    windows = cut_windows(info, ClipOptions(17, None))
    clips = list(read_windows(path, info, windows, info.rate))
    np.testing.assert_array_equal(np.concatenate(clips), np.stack(whole[: 17 * len(windows)]))


def test_field_inputs_of_the_same_kind(tmp_path):
    """A WMV of version 1, and a JPEG named .jfif, .jpe, and a TIFF of one page, are footage."""
    film(tmp_path / "b.wmv", "-c:v", "wmv1", seconds=1)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3)).astype(np.uint8))
    for name in ("j.jfif", "j.jpe", "j.tif", "j.TIFF", "j.avif"):
        picture.save(tmp_path / name, format={"jfif": "JPEG", "jpe": "JPEG"}.get(name[2:]))
    found = find_footage(tmp_path, caption_default="x")
    manifest = shard(None, tmp_path.parent / "out_field", found=found, duplicates="report", **SETTINGS)
    assert (manifest["files_used"], manifest["clips"]) == (
        4,
        4,
    )  # .tif and .TIFF have the same bytes, .jfif and .jpe too


def test_pages_of_a_tiff(tmp_path):
    """A TIFF of several pages is no clip, and its other pages are not passed over."""
    pages = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match="holds 2 pages"):
        probe(tmp_path / "a.tif")


@pytest.mark.parametrize("name", ["a.webp", "a.png", "a.avif"])
def test_animations(tmp_path, name):
    """An animated picture is a clip whose frames last as long as the file says."""
    frames = [Image.fromarray(np.full((32, 48, 3), 12 * i, np.uint8)) for i in range(20)]
    lossless = {"lossless": True} if name.endswith("webp") else {}
    frames[0].save(
        tmp_path / name, save_all=True, append_images=frames[1:], duration=[50] * 10 + [100] * 10, **lossless
    )
    survey = survey_of(tmp_path / name)
    assert (len(survey.info.times), survey.info.end) == (20, pytest.approx(1.5))
    (clip,) = read_windows(tmp_path / name, survey.info, [Window(0.4, 9)], 10)
    shown = clip[:, 16, 24].mean(-1) / 12
    np.testing.assert_allclose(shown, [8, 10, 11, 12, 13, 14, 15, 16, 17], atol=0.4)


def test_healthy_files_with_hidden_frames(tmp_path):
    """Frames that an edit list hides, or that lean on a keyframe which was cut away, are no damage that is shown."""
    for name, options in {"closed": (), "open": ("-x264-params", "open-gop=1:keyint=24:min-keyint=24")}.items():
        whole = film(tmp_path / f"{name}.mp4", *H264, *options)
        cut = tmp_path / f"cut_{name}.mp4"
        ffmpeg("-ss", 1.3, "-i", whole, "-c", "copy", cut)
        inspection = Inspection(cut)
        assert len(list(inspection.frames())) == len(probe(cut).times)
        assert all(end <= 1e-6 for _, end in inspection.damaged)
