"""Footage: what is found, what is rejected and why, and that a clip shows exactly what a player shows at its times.

Videos are made here with ffmpeg; each frame carries its number as bars of light and dark. The reference is PyAV,
which reads every frame and hides those that an edit list hides.
"""

import itertools
import os
import subprocess
import weakref
from pathlib import Path

import av
import decord
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from wantrain.data import find_footage
from wantrain.data.footage.clips import EPSILON, ClipOptions, VideoInfo, Window, cut_windows, frames_on_screen
from wantrain.data.footage.duplicates import thumbnail
from wantrain.data.footage.probe import ReadOptions, probe, read_whole, read_windows
from wantrain.data.footage.reader import Reader, SeekPoint

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
H264 = ("-pix_fmt", "yuv420p", "-bf", "3", "-g", "30")
SHARED = os.environ.get("WANTRAIN_FOOTAGE")
BITS = 7


def ffmpeg(*arguments, stdin=None):
    subprocess.run([FFMPEG, "-y", "-loglevel", "error", *map(str, arguments)], check=True, input=stdin)


def numbered(count, height=48, width=112):
    """Frames that carry their number as BITS vertical bars, over noise so that they are not trivial to compress."""
    frames = np.random.default_rng(0).integers(60, 120, (count, height, width, 3)).astype(np.uint8)
    bar = width // BITS
    for number in range(count):
        for bit in range(BITS):
            frames[number, height // 3 :, bit * bar : (bit + 1) * bar] = 225 if number >> bit & 1 else 15
    return frames


def number_in(frame):
    row, bar = frame[frame.shape[0] * 2 // 3], frame.shape[1] // BITS
    return sum(1 << bit for bit in range(BITS) if row[bit * bar + bar // 2].mean() > 120)


def encode(path, frames, fps, *options):
    height, width = frames.shape[1:3]
    raw = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", fps, "-i", "-")
    ffmpeg(*raw, *options, path, stdin=frames.tobytes())


def displayed(path):
    """(time, frame) of every frame a player shows, by PyAV; times from the first one on."""
    with av.open(str(path)) as container:
        frames = [(float(frame.time), frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return np.array([time for time, _ in frames]) - frames[0][0], [frame for _, frame in frames]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Odd and ordinary files by name; 100 frames at 24 fps unless they are cut."""
    folder, frames = tmp_path_factory.mktemp("videos"), numbered(100)
    encode(folder / "plain.mp4", frames, 24, *H264)
    encode(folder / "eight.mp4", frames[:24], 8, *H264)
    encode(folder / "thirty.mp4", frames, 30, *H264)
    encode(folder / "open_gop.mp4", frames, 24, *H264, "-x264-params", "open-gop=1:keyint=30:min-keyint=30")
    encode(folder / "vp9.webm", frames, 24, "-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", 8, "-b:v", "2M")
    encode(folder / "hevc.mp4", frames, 24, "-c:v", "libx265", "-pix_fmt", "yuv420p",
           "-x265-params", "keyint=30:log-level=error", "-preset", "ultrafast", "-bf", 3)  # fmt: skip
    encode(folder / "moving.gif", frames[:50], 25)
    plain = folder / "plain.mp4"
    for name in ("plain", "open_gop", "hevc"):
        ffmpeg("-ss", 1.04, "-i", folder / f"{name}.mp4", "-c", "copy", folder / f"cut_{name}.mp4")
    ffmpeg("-ss", 0.5, "-t", 2, "-i", plain, "-c", "copy", folder / "cut_both_ends.mov")
    ffmpeg("-i", plain, "-c", "copy", "-output_ts_offset", 3.5, folder / "late.mkv")
    slowing = "setpts='if(lt(N,60),N/30,2+(N-60)/10)/TB'"
    ffmpeg("-i", plain, "-vf", slowing, "-fps_mode", "vfr", *H264, folder / "variable.mp4")
    ffmpeg("-i", plain, "-vf", "select='not(between(n,30,60))'", "-fps_mode", "passthrough", *H264, folder / "gap.mp4")
    return folder


@pytest.mark.parametrize("num_frames", [17, 5])
@pytest.mark.parametrize(
    "name",
    ["plain.mp4", "eight.mp4", "thirty.mp4", "open_gop.mp4", "hevc.mp4", "vp9.webm", "moving.gif", "cut_plain.mp4",
     "cut_open_gop.mp4", "cut_hevc.mp4", "cut_both_ends.mov", "late.mkv", "variable.mp4", "gap.mp4"],
)  # fmt: skip
def test_clip_matches_pyav(videos, name, num_frames):
    path = videos / name
    times, frames = displayed(path)
    found = probe(path)
    assert (found.height, found.width) == frames[0].shape[:2]
    np.testing.assert_allclose(found.times - found.times[0], times, atol=2e-3)
    windows = cut_windows(found, ClipOptions(num_frames, 16))
    assert windows
    for window, clip in zip(windows, read_windows(path, found, windows, 16), strict=True):
        wanted = window.start - found.times[0] + np.arange(window.num_frames) / 16
        on_screen = [max(0, int(np.searchsorted(times, time + EPSILON, side="right")) - 1) for time in wanted]
        assert clip.dtype == np.uint8
        np.testing.assert_array_equal(clip, np.stack([frames[i] for i in on_screen]))


@pytest.mark.parametrize(
    "name",
    ["plain.mp4", "open_gop.mp4", "hevc.mp4", "vp9.webm", "moving.gif", "cut_plain.mp4", "cut_open_gop.mp4",
     "cut_hevc.mp4", "late.mkv", "variable.mp4"],
)  # fmt: skip
def test_clip_matches_whole_file(videos, name):
    """What lies before a clip is skipped where that is right, also across keyframes and between two clips."""
    path = videos / name
    found = probe(path)
    whole = list(read_whole(path, found))
    assert len(whole) == len(found.times)
    last = len(whole) - 5
    for first, second in [(1, last), (17, 29), (24, 30), (29, 34), (30, 36), (last - 7, last)]:
        windows = [Window(float(found.times[number]), 5, native=True) for number in (first, second)]
        for number, clip in zip((first, second), read_windows(path, found, windows, 16), strict=True):
            np.testing.assert_array_equal(clip, np.stack(whole[number : number + 5]))


def seeks(monkeypatch, *, wrong_by=0, fail=None):
    """Notes where decord is asked to seek; it may land on another frame, or fail."""
    asked, real = [], decord.VideoReader.seek_accurate

    def spy(self, number):
        asked.append(number)
        if fail is not None:
            raise fail("no")
        return real(self, number - wrong_by)

    monkeypatch.setattr(decord.VideoReader, "seek_accurate", spy)
    return asked


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """A file of 120 frames with a keyframe every 20, its frames, and its seek_points."""
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    encode(path, numbered(120), 24, "-pix_fmt", "yuv420p", "-bf", "3", "-g", "20", "-sc_threshold", "0")
    frames = list(read_whole(path, probe(path)))
    seek_points = list(Reader(path, 120).tried_seek_points(np.stack([thumbnail(frame) for frame in frames])))
    assert [seek_point.number for seek_point in seek_points] == [60]  # 48 or more from the start, and from one another
    return path, frames, seek_points


def test_seek_point_skips_decoding(long, monkeypatch):
    path, frames, seek_points = long
    asked, skipped, real = seeks(monkeypatch), [], decord.VideoReader.skip_frames
    monkeypatch.setattr(decord.VideoReader, "skip_frames", lambda self, n: (skipped.append(n), real(self, n))[1])
    for first, expected, passed in [(0, [], 0), (59, [], 59), (60, [60], 0), (75, [60], 14), (110, [60], 49)]:
        window = Window(float(probe(path).times[first]), 5, native=True)
        (clip,) = read_windows(path, probe(path), [window], 24, options=ReadOptions(seek_points))
        np.testing.assert_array_equal(clip, np.stack(frames[first : first + 5]))
        assert asked == expected and sum(skipped) <= passed
        asked.clear()
        skipped.clear()


@pytest.mark.parametrize(
    "lie",
    [
        {"wrong_by": 1},
        {"wrong_by": 20},
        {"fail": decord.DECORDError},
        {"fail": decord.DECORDLimitReachedError},  # frames that cannot be decoded; no kind of the one before
        {"fail": RuntimeError},  # decord's own word for a seek that fails
    ],
    ids=str,
)
def test_wrong_seek_reads_forwards(long, monkeypatch, lie):
    path, frames, seek_points = long
    asked, found = seeks(monkeypatch, **lie), probe(path)
    windows = [Window(float(found.times[first]), 5, native=True) for first in (3, 70, 100)]
    for first, clip in zip(
        (3, 70, 100), read_windows(path, found, windows, 24, options=ReadOptions(seek_points)), strict=True
    ):
        np.testing.assert_array_equal(clip, np.stack(frames[first : first + 5]))
    assert asked == [60]  # and never again
    thumbnails = np.stack([thumbnail(frame) for frame in frames])
    assert list(Reader(path, 120).tried_seek_points(thumbnails)) == [None]


def test_foreign_seek_points(long):
    path, frames, _ = long
    for seek_point in (
        SeekPoint(60, "0" * 16),
        SeekPoint(61, "0" * 16),
        SeekPoint(119, "0" * 16),
        SeekPoint(5000, "0" * 16),
    ):
        reader = Reader(path, 120, [seek_point])
        np.testing.assert_array_equal(reader.frame(119), frames[119])


def test_ambiguous_frame(tmp_path):
    """A frame that equals others is no seek point, because a seek to it cannot be verified."""
    frames = np.repeat(numbered(1), 120, axis=0)
    encode(tmp_path / "still.mp4", frames, 24, "-pix_fmt", "yuv420p", "-g", "20", "-crf", "30")
    shown = list(read_whole(tmp_path / "still.mp4", probe(tmp_path / "still.mp4")))
    alike = np.stack([thumbnail(shown[0])] * 120)
    assert list(Reader(tmp_path / "still.mp4", 120).tried_seek_points(alike)) == []


def test_constant_rate(videos):
    for name, fps in [("plain.mp4", 24), ("eight.mp4", 8), ("thirty.mp4", 30)]:
        found = probe(videos / name)
        windows = cut_windows(found, ClipOptions(9, 16))
        clips = list(read_windows(videos / name, found, windows, 16))
        shown = [number_in(frame) for clip in clips for frame in clip]
        assert shown == [i * fps // 16 for i in range(len(shown))]


def test_edit_list(videos):
    """Frames before the start of an edit list are not used.

    The file holds frames 0 to 99, players begin at 25; decord counts them all and seeks to wrong ones.
    """
    for name in ("plain", "open_gop", "hevc"):
        path = videos / f"cut_{name}.mp4"
        found = probe(path)
        assert len(found.times) == 75
        assert found.times[0] == 0
        (clip,) = read_windows(path, found, [Window(1.0, 9)], 24)
        assert [number_in(frame) for frame in clip] == list(range(49, 58))


def test_rotated_video(videos):
    """A video that its header rotates is decoded upright."""
    path = videos / "rotated.mp4"
    ffmpeg("-display_rotation", 90, "-i", videos / "plain.mp4", "-c", "copy", path)
    found = probe(path)
    assert (found.height, found.width) == (112, 48)
    (clip,) = read_windows(path, found, [Window(0, 5)], 24)
    (straight,) = read_windows(videos / "plain.mp4", probe(videos / "plain.mp4"), [Window(0, 5)], 24)
    np.testing.assert_array_equal(clip, np.rot90(straight, axes=(1, 2)))


@pytest.mark.parametrize("width", [16, 24, 32, 48, 96, 144, 18, 50, 100])
def test_padded_widths(tmp_path, width):
    """Frames are exact for widths whose rows decord pads."""
    frames = np.random.default_rng(width).integers(0, 255, (5, 4, width // 2, 3)).astype(np.uint8)
    encode(tmp_path / "a.mp4", frames.repeat(8, 1).repeat(2, 2), 16, "-pix_fmt", "yuv420p", "-crf", 5)
    found = probe(tmp_path / "a.mp4")
    (clip,) = read_windows(tmp_path / "a.mp4", found, [Window(0, 5)], 16)
    np.testing.assert_array_equal(clip, np.stack(displayed(tmp_path / "a.mp4")[1]))


def write_damaged(videos, path):
    """A file that is damaged, or no video, in the way its name says."""
    plain = (videos / "plain.mp4").read_bytes()
    if path.stem in {"cut_short", "overwritten"}:
        ffmpeg("-i", videos / "plain.mp4", "-c", "copy", "-movflags", "faststart", path)
        whole = bytearray(path.read_bytes())
        if path.stem == "cut_short":
            del whole[len(whole) * 6 // 10 :]
        else:
            whole[len(whole) // 2 : len(whole) // 2 + 3000] = bytes(3000)
        path.write_bytes(whole)
    elif path.stem == "sound":
        ffmpeg("-f", "lavfi", "-i", "sine", "-t", 1, path)
    elif path.stem == "no_times":
        ffmpeg("-i", videos / "plain.mp4", "-c", "copy", path)
    elif path.suffix == ".png":
        Image.new("RGB", (64, 64)).save(path)
        path.write_bytes(path.read_bytes()[:60])
    else:
        path.write_bytes({"empty": b"", "text": b"hello " * 99, "no_index": plain[: len(plain) // 2]}[path.stem])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty.mp4", "is empty"),
        ("text.mp4", "cannot be decoded"),
        ("no_index.mp4", "cannot be decoded"),
        ("cut_short.mp4", "cannot be decoded"),
        ("overwritten.mp4", "cannot be decoded"),
        ("sound.mp4", "cannot be decoded"),
        ("no_times.avi", "without a timestamp"),
        ("half.png", "cannot be read as an image"),
        ("text.jpg", "cannot be read as an image"),
    ],
)
def test_damaged_files(videos, tmp_path, name, reason):
    path = tmp_path / name
    write_damaged(videos, path)
    with pytest.raises(ValueError, match=reason) as caught:
        list(read_whole(path, probe(path)))
    # Reasons go into files that are the same for the same footage: no clock times, no paths of this machine.
    assert str(tmp_path) not in str(caught.value)
    assert "/project/" not in str(caught.value)


def probed(times, end):
    return VideoInfo(64, 64, np.asarray(times, dtype=np.float64), end)


@pytest.mark.parametrize("num_frames", [1, 5, 17, 81])
@pytest.mark.parametrize("fps", [8, 16, 24])
@pytest.mark.parametrize(("rate", "count"), [(24, 6), (24, 24), (30, 77), (12, 300), (23.976, 171), (16, 17), (16, 81)])
def test_windows_fill_the_file(rate, count, fps, num_frames):
    found = probed(np.arange(count) / rate, count / rate)
    held = len([k for k in range(10000) if k / fps < found.end - EPSILON])  # frames that the file's time holds
    if held < min(5, num_frames):
        with pytest.raises(ValueError, match="less than 5 frames"):
            cut_windows(found, ClipOptions(num_frames, fps))
        return
    windows = cut_windows(found, ClipOptions(num_frames, fps))
    lengths = {window.num_frames for window in windows}
    assert len(lengths) == 1
    (length,) = lengths
    assert length == min(num_frames, (held - 1) // 4 * 4 + 1)
    assert len(windows) == max(1, held // length)
    for before, after in itertools.pairwise(windows):
        assert after.start - before.start == pytest.approx(length / fps)
    assert windows[-1].start + (length - 1) / fps < found.end
    (first,) = cut_windows(found, ClipOptions(num_frames, fps, clips="first"))
    assert first == windows[0]
    (middle,) = cut_windows(found, ClipOptions(num_frames, fps, clips="middle"))
    margins = middle.start, found.end - middle.start - length / fps
    assert abs(margins[0] - margins[1]) <= 2 / fps + 1e-6


def test_one_frame_video(tmp_path):
    """A video of one frame is an image."""
    encode(tmp_path / "one.mp4", numbered(1), 24, *H264)
    found = probe(tmp_path / "one.mp4")
    assert found.is_image
    windows = cut_windows(found, ClipOptions(17, 16))
    assert windows == [Window(0.0, 1)]
    (clip,) = read_windows(tmp_path / "one.mp4", found, windows, 16)
    assert clip.shape == (1, 48, 112, 3)


def test_several_read_passes(videos, monkeypatch):
    """The read pass bounds memory; the frames do not depend on it."""
    for name in ("cut_hevc.mp4", "eight.mp4"):
        found = probe(videos / name)
        windows = cut_windows(found, ClipOptions(5, 16))
        assert len(windows) > 4
        whole = list(read_windows(videos / name, found, windows, 16))
        monkeypatch.setattr("wantrain.data.footage.probe.READ_PASS_BYTES", 2 * whole[0].nbytes)
        for clip, same in zip(read_windows(videos / name, found, windows, 16), whole, strict=True):
            np.testing.assert_array_equal(clip, same)
        monkeypatch.undo()


def test_no_open_reader(videos, monkeypatch):
    """decord decodes ahead without limit while nobody reads: gigabytes behind the back of a slow encoder."""
    opened = []
    real = decord.VideoReader

    def spy(*arguments, **options):
        reader = real(*arguments, **options)
        opened.append(weakref.ref(reader))
        return reader

    monkeypatch.setattr("wantrain.data.footage.reader.decord.VideoReader", spy)
    found = probe(videos / "plain.mp4")
    for _ in read_windows(videos / "plain.mp4", found, cut_windows(found, ClipOptions(17, 16)), 16):
        assert [reader for reader in opened if reader() is not None] == []
    assert len(opened) == 2


def test_frames_on_screen():
    found = probed([0.0, 0.1, 0.5, 0.6], 1.0)
    shown = frames_on_screen(found, Window(0.0, 9), 10)
    assert shown.tolist() == [0, 1, 1, 1, 1, 2, 3, 3, 3]
    # A container that rounds to milliseconds may begin a frame a little after the wanted time.
    assert frames_on_screen(probed([0, 0.042, 0.083], 0.125), Window(0.0, 3), 24).tolist() == [0, 1, 2]


@pytest.mark.skipif(SHARED is None, reason="set WANTRAIN_FOOTAGE to a folder with the shared real footage")
def test_shared_footage():
    """The shared real footage is found and decoded, and its mask is no footage."""
    footage, rejects, _ = find_footage(Path(SHARED))
    assert [file.name for file in footage] == [
        "dog.mp4",
        "hiker.mp4",
        "motorcycle.mp4",
        "skeleton.mp4",
        "warehouse.mp4",
    ]
    assert [reject.name for reject in rejects] == ["masks/dog.mp4"]
    sizes = {}
    for file in footage:
        found = probe(file.path)
        sizes[file.name] = found.height, found.width
        windows = cut_windows(found, ClipOptions(9, 16, clips="first"))
        (clip,) = read_windows(file.path, found, windows, 16)
        assert clip.shape == (9, found.height, found.width, 3)
        assert clip[:, ::8, ::8].std() > 1
    assert sizes["motorcycle.mp4"] == (2160, 3840)
    assert sizes["skeleton.mp4"] == (1024, 576)
    assert sizes["warehouse.mp4"] == (270, 480)
