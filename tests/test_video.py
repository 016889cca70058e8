"""Frames to files: what is written is what is seen, everywhere."""

import errno
import os
import resource
import signal

import av
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from wantrain import video
from wantrain.video import contact_sheet, is_whole_mp4, to_frames, to_pixels, write_mp4


def ramp(frames=5, height=32, width=48):
    """Frames that grow brighter, with a gradient across: nothing that 4:2:0 would blur."""
    across = np.linspace(40, 120, width)[None, :, None]
    return np.stack([np.broadcast_to(across + 10 * i, (height, width, 3)) for i in range(frames)]).astype(np.uint8)


def test_pixels_to_levels():
    """Pixels become the nearest of 256 levels."""
    values = torch.tensor([-1.0, -1.2, -0.999, 0.0, 0.5, 1.0, 7.0])
    frames = to_frames(values.expand(3, 1, 2, 7))
    assert frames.shape == (1, 2, 7, 3) and frames.dtype == np.uint8
    assert frames[0, 0, :, 0].tolist() == [0, 0, 0, 128, 191, 255, 255]


def test_levels_round_trip():
    """Every level survives the conversion to pixels and back."""
    levels = torch.arange(256).float()
    assert to_frames((levels / 127.5 - 1).expand(3, 1, 1, 256))[0, 0, :, 0].tolist() == list(range(256))


def test_frames_to_pixels():
    """Frames become the pixels of the formula bit for bit, also in batches and from four channels."""
    frames = torch.arange(256).byte().repeat(2 * 3 * 3 * 4).view(2, 3, 256, 3, 4)
    pixels = to_pixels(frames[..., :3])
    assert pixels.shape == (2, 3, 3, 256, 3) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    for clip, made in zip(frames[..., :3], pixels, strict=True):
        assert torch.equal(made, clip.permute(3, 0, 1, 2).float() / 127.5 - 1)
        assert torch.equal(made, to_pixels(clip))
    np.testing.assert_array_equal(to_frames(pixels[0]), frames[0, ..., :3].numpy())


@pytest.mark.parametrize("fps", [16, 23.976])
def test_mp4_round_trip(fps, tmp_path):
    """An MP4 keeps the frames, their rate and their colours."""
    frames = ramp()
    write_mp4(tmp_path / "new" / "clip.mp4", frames, fps)
    with av.open(str(tmp_path / "new" / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate) == pytest.approx(fps, rel=1e-4)
    read = iio.imread(tmp_path / "new" / "clip.mp4")
    assert read.shape == frames.shape and np.abs(read.astype(int) - frames).max() <= 4


def test_odd_sides_padded(tmp_path):
    """Odd sides are padded, not scaled."""
    frames = ramp(height=31, width=47)
    write_mp4(tmp_path / "odd.mp4", frames, 16)
    read = iio.imread(tmp_path / "odd.mp4")
    assert read.shape == (5, 32, 48, 3)
    assert np.abs(read[:, :31, :47].astype(int) - frames).max() <= 4


@pytest.mark.parametrize("shape", [(0, 8, 8, 3), (4, 8, 8), (4, 8, 8, 4)])
def test_bad_clip_shape(shape, tmp_path):
    """Arrays that are no clip are refused, and no file is written."""
    with pytest.raises(ValueError, match=r"expected frames \(F, H, W, 3\)"):
        write_mp4(tmp_path / "bad.mp4", np.zeros(shape, np.uint8), 16)
    assert not (tmp_path / "bad.mp4").exists()


def test_contact_sheet_frames(tmp_path):
    """A contact sheet shows the first and the last frame of every clip, with its title."""
    grey = {"seventeen": [10 * i for i in range(17)], "one 一只猫 🎬": [200]}
    clips = {
        name: np.stack([np.full((16, 32, 3), level, np.uint8) for level in levels]) for name, levels in grey.items()
    }
    contact_sheet(tmp_path / "sheets" / "sheet.png", clips, columns=5, cell=64)
    with Image.open(tmp_path / "sheets" / "sheet.png") as image:
        sheet = np.asarray(image)
    assert sheet.shape == (2 * (64 + 18), 5 * (128 + 2), 3)
    assert [sheet[18 + 32, 130 * column + 64, 0] for column in range(5)] == [0, 40, 80, 120, 160]
    assert sheet[82 + 18 + 32, 64, 0] == 200 and (sheet[82 + 18 + 32, 200] == 255).all()
    assert (sheet[:18] < 128).any() and (sheet[82:100] < 128).any(), "titles"


@pytest.mark.parametrize("text", ["一只橘色的猫", "青いリング", "빨간 고리", "перо ñ λ", "繁體中文貓"])
def test_titles_in_any_script(text):
    """A title's characters are drawn as themselves: each differs from the box of one that the font lacks."""

    def drawn(character):
        image = Image.new("L", (24, 24))
        ImageDraw.Draw(image).text((2, 0), character, fill=255, font=video._font())
        return image.tobytes()

    box = drawn("\U0001f3ac")
    assert all(drawn(character) != box for character in text if character != " ")
    assert video.fitted(text, 1000) == text


def test_title_width():
    """A long title ends in an ellipsis within its sheet, and none has escapes or more than one line."""
    for text in ("word " * 50, "镜头缓慢推进" * 30, "a\nb\t🎬" * 40):
        cut = video.fitted(text, 300)
        assert video._font().getlength(cut) <= 300 and cut.endswith("…") and "\n" not in cut and "\\" not in cut
        assert video._font().getlength(cut) > 270
    assert video.fitted("long", 1) == "…"


def test_disk_refuses_contact_sheet(tmp_path, monkeypatch):
    """A full disk leaves the sheet of before, no partial file, and an error that names the sheet."""
    sheet = tmp_path / "sheet.png"
    contact_sheet(sheet, {"one": np.zeros((3, 16, 16, 3), np.uint8)})
    before = sheet.read_bytes()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match="No space left") as refused:
        contact_sheet(sheet, {"two": np.full((3, 16, 16, 3), 200, np.uint8)})
    assert refused.value.filename == str(sheet)
    assert sheet.read_bytes() == before and list(tmp_path.iterdir()) == [sheet]


@pytest.mark.parametrize("limit", [2_000, 20_000])
def test_disk_refuses_video(limit, tmp_path):
    """A video that the disk does not take whole is an error that names it, and no file; ffmpeg itself says nothing."""
    noise = np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), dtype=np.uint8)
    write_mp4(tmp_path / "whole.mp4", noise, 16)
    assert is_whole_mp4(tmp_path / "whole.mp4") and (tmp_path / "whole.mp4").stat().st_size > limit
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError) as error:
            write_mp4(tmp_path / "a.mp4", noise, 16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.filename == str(tmp_path / "a.mp4") and error.value.errno == errno.EIO
    assert [path.name for path in tmp_path.iterdir()] == ["whole.mp4"]


def test_whole_mp4(tmp_path):
    """A file cut anywhere, or continued, is not a whole MP4."""
    write_mp4(tmp_path / "a.mp4", ramp(), 16)
    content = (tmp_path / "a.mp4").read_bytes()
    for wrong in (content[:-1], content[: len(content) // 2], content[:6], b"", content + b"x"):
        (tmp_path / "b.mp4").write_bytes(wrong)
        assert not is_whole_mp4(tmp_path / "b.mp4")
    assert not is_whole_mp4(tmp_path / "absent.mp4")
