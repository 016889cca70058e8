"""Which frames of a file are shown, and that they are the file's own."""

import numpy as np
import pytest
from PIL import Image

from wantrain.data.captioning.frames import FrameOptions, shown_frames, shown_numbers
from wantrain.data.footage.captions import Annotation
from wantrain.data.footage.clips import VideoInfo
from wantrain.data.footage.decode_workers import DecodeOptions
from wantrain.data.footage.probe import Footage, probe, read_whole
from wantrain.video import write_mp4

OPTIONS = FrameOptions(per_second=2, most=16, pixels=10_000)


def info_of(count, fps=16.0, start=0.0):
    times = start + np.arange(count) / fps
    return VideoInfo(64, 64, times, start + count / fps)


@pytest.mark.parametrize(
    ("count", "options", "numbers", "rate"),
    [
        (1, OPTIONS, [0], 0.0),
        (16, OPTIONS, [4, 12], 2.0),
        (48, OPTIONS, [4, 12, 20, 28, 36, 44], 2.0),
        (50, OPTIONS, [3, 10, 17, 25, 32, 39, 46], 2.24),  # 3.125 s: seven parts
        (160, FrameOptions(2, 4, 1), [20, 60, 100, 140], 0.4),
        (16, FrameOptions(2, 1, 1), [4, 12], 2.0),  # fewer than two show no motion
        (3, FrameOptions(100, 16, 1), [0, 1, 2], 16.0),
    ],
)
def test_shown_numbers(count, options, numbers, rate):
    """The frame in the middle of each of equal parts; by time, wherever the file begins."""
    for start in (0.0, 2.5):
        found, found_rate = shown_numbers(info_of(count, start=start), options)
        assert found == numbers and found_rate == pytest.approx(rate)


def test_frames_of_files(tmp_path):
    """A clip's frames are those that reading the whole file gives, reduced to the pixels that are allowed; a file that
    is none says why, and the next one is read.
    """
    generator = np.random.default_rng(0)
    frames = np.repeat(generator.integers(0, 255, (24, 12, 16, 3), dtype=np.uint8), 8, axis=1).repeat(8, axis=2)
    write_mp4(tmp_path / "a.mp4", frames, 8.0)
    (tmp_path / "b.mp4").write_bytes(b"no video")
    Image.fromarray(frames[0]).save(tmp_path / "c.png")
    files = [Footage(tmp_path / name, name, Annotation()) for name in ("a.mp4", "b.mp4", "c.png")]
    found = {file.name: shown for file, shown in shown_frames(files, FrameOptions(2, 4, 96 * 128), DecodeOptions(1))}
    whole = list(read_whole(tmp_path / "a.mp4", probe(tmp_path / "a.mp4")))
    clip = found["a.mp4"]
    assert clip.rate == pytest.approx(4 / 3) and np.array_equal(
        clip.frames, np.stack([whole[n] for n in (3, 9, 15, 21)])
    )
    assert "cannot be decoded" in found["b.mp4"]
    assert found["c.png"].rate == 0 and np.array_equal(found["c.png"].frames, frames[:1])
    (_, small), *_ = shown_frames(files[:1], FrameOptions(2, 4, 48 * 64), DecodeOptions(1))
    assert small.frames.shape == (4, 48, 64, 3)
