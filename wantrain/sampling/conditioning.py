"""Known pixels for sampling, from files: an image, a last image, the beginning of a video, or all of it but a mask.

Images are brought to size as Wan2.2's authors do. For conditioning channel_concat they are scaled to the size of the
video (bicubic; it may squeeze by a few per cent, since sides are rounded). For clean_frames they are scaled to cover it
(Lanczos) and cropped at the centre. Videos are scaled and cropped as training footage is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from wantrain import geometry
from wantrain.conditioning import ConditioningInput, EncodePixels, check_given, check_type, encode
from wantrain.data.footage.clips import ClipOptions, VideoInfo, Window, cut_windows
from wantrain.data.footage.probe import check_mask, probe, read_mask_windows, read_windows
from wantrain.masks import painted
from wantrain.util.numbers import is_number
from wantrain.video import Frames, to_pixels

#: Aspects up to this ratio apart count as the same: 480x832 and 720x1280 are 1.026 apart.
SAME_ASPECT = 1.05


@dataclass(frozen=True)
class ConditioningFiles:
    """Files of known pixels; None where none is given.

    image, last_image  pictures of the first and of the last frame
    video  with `keep`: its first 4k+1 frames stay and are continued; with `mask`: pixels stay where the mask is black
    mask   a picture, or a video as long and as large as `video`: white is made anew
    """

    image: Path | None = None
    last_image: Path | None = None
    video: Path | None = None
    mask: Path | None = None
    keep: int | None = None

    def __post_init__(self) -> None:
        if self.video is not None and (self.image is not None or self.last_image is not None):
            raise ValueError(f"video={self.video} has its own first frame; leave out image= and last_image=")
        if self.video is None and (self.mask is not None or self.keep is not None):
            key = f"mask={self.mask}" if self.mask is not None else f"keep={self.keep}"
            raise ValueError(f"{key} selects pixels of a video that stay; give video=FILE too")
        if self.video is not None and (self.mask is None) == (self.keep is None):
            raise ValueError(
                f"video={self.video}: give one of mask=FILE (white is made anew) and keep=N (the first N frames are "
                "continued)"
            )

    @property
    def first(self) -> tuple[str, Path] | None:
        """Key and path of the file that sets the aspect."""
        for key in ("image", "last_image", "video"):
            path = getattr(self, key)
            if path is not None:
                return key, path
        return None


@dataclass(frozen=True)
class ConditioningPixels:
    """Pixels (3, F, H, W) in [-1, 1] of a video, and which of them are known, boolean (1, F, H, W)."""

    pixels_CFHW: Tensor
    known_1FHW: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, height and width of the video."""
        return self.known_1FHW.shape[1:]  # type: ignore[return-value]

    @property
    def identity(self) -> str:
        """Sixteen hex digits: a hash of pixels and mask."""
        digest = hashlib.sha256()
        for part in (self.pixels_CFHW, self.known_1FHW):
            digest.update(part.numpy().tobytes())
        return digest.hexdigest()[:16]

    def encode(
        self, encode_pixels: EncodePixels, *, conditioning: str, temporal_stride: int = 4, spatial_stride: int = 8
    ) -> ConditioningInput:
        """The conditioning input (B = 1) for a model of this conditioning type."""
        return encode(
            encode_pixels,
            self.pixels_CFHW[None],
            self.known_1FHW[None],
            conditioning=conditioning,
            temporal_stride=temporal_stride,
            spatial_stride=spatial_stride,
        )


def files_from(settings: Mapping[str, Any]) -> ConditioningFiles:
    """From a config's values of image, last_image, video, mask (paths) and keep (a number)."""
    keys = ("image", "last_image", "video", "mask")
    paths = {key: Path(str(settings[key])) for key in keys if settings[key] is not None}
    keep = settings["keep"]
    if keep is not None and not is_number(keep, whole=True):
        raise ValueError(f"keep={keep} must be a whole number of frames, 4k+1")
    return ConditioningFiles(**paths, keep=keep)


def check_files(files: ConditioningFiles, conditioning: str, *, model: str) -> None:
    """ValueError if `model`, of this conditioning type, cannot take a file, or needs one that is not given."""
    first = files.first
    if first is not None:
        check_type(conditioning)
    if conditioning == "none" and first is not None:
        raise ValueError(
            f"{first[0]}={first[1]}: model={model} takes text alone; choose model=i2v_a14b or model=ti2v_5b"
        )
    if conditioning == "channel_concat" and first is None:
        raise ValueError(f"model={model} needs a conditioning input: give image=FILE, last_image=FILE or video=FILE")
    if conditioning == "clean_frames" and files.last_image is not None:
        raise ValueError(
            f"last_image={files.last_image}: model={model} takes clean first frames (conditioning clean_frames), no "
            "last image; leave it out, or choose a model of conditioning channel_concat (i2v_a14b)"
        )


def read_pixels(
    files: ConditioningFiles, model: Mapping[str, Any], *, num_frames: int, size: tuple[int, int] | None
) -> ConditioningPixels | None:
    """Known pixels from files, for a video of `num_frames` by `model`, whose conf/model facts are given.

    Without a `size` (height, width) the video takes the aspect of the first file, at about the model's area, as its
    authors choose it. None without files, where the model needs none. ValueError, naming the file and what would fit,
    for a file that the model cannot take, another aspect, a video that is too short, a mask of another length or size,
    and where every pixel is given.
    """
    conditioning, fps = model["conditioning"], model["fps"]
    check_files(files, conditioning, model=model["name"])
    if files.first is None:
        return None
    key, first = files.first
    shape = _probe(key, first)
    aspect = size[1] / size[0] if size else shape.width / shape.height
    if size is None:
        choose = geometry.floored_size if conditioning == "channel_concat" else geometry.fitted_size
        size = choose(shape.height, shape.width, model["area"], model["multiple"])
    given = torch.zeros(1, num_frames, *size, dtype=torch.bool)
    pixels = torch.zeros(3, num_frames, *size)
    for name, path, place in (("image", files.image, 0), ("last_image", files.last_image, -1)):
        if path is not None:
            frame = _read_image(name, path)
            _check_aspect(name, path, frame.shape[:2], aspect)
            pixels[:, place], given[:, place], key = fit_image(frame, size, conditioning), True, name
    if files.video is not None:
        frames, stays = _read_video(files, aspect, files.keep or num_frames, fps, size)
        pixels[:, : len(frames)] = to_pixels(torch.tensor(frames))
        given[:, : len(frames)], key = stays, "video" if files.mask is None else "mask"
    if given.all():
        raise ValueError(
            f"{key}: all {num_frames} frames are known and nothing is left to make; give a larger num_frames, or a "
            "mask with white in it"
        )
    check_given(given[None], conditioning, key=key)
    return ConditioningPixels(pixels, given)


def fit_image(frame: Frames, size: tuple[int, int], conditioning: str) -> Tensor:
    """An image (H, W, 3) uint8 as a frame (3, height, width) in [-1, 1], as Wan's authors prepare it."""
    if conditioning == "channel_concat":
        image_1CHW = to_pixels(torch.tensor(frame[None])).transpose(0, 1)
        return F.interpolate(image_1CHW, size, mode="bicubic", align_corners=False)[0]
    height, width, _ = geometry.cover(frame.shape[0], frame.shape[1], *size)
    scaled = Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    cut = np.asarray(scaled)[top : top + size[0], left : left + size[1]]
    return to_pixels(torch.tensor(cut[None]))[:, 0]


def _read_image(key: str, path: Path) -> Frames:
    info = _probe(key, path)
    if not info.is_image:
        raise ValueError(f"{key}={path} is a video; give a picture, or video=FILE with keep=N")
    return next(read_windows(path, info, [Window(0.0, 1)], 1.0))[0]  # type: ignore[no-any-return]


def _probe(key: str, path: Path) -> VideoInfo:
    """The facts of a file; ValueError names its key."""
    if not path.is_file():
        raise ValueError(f"{key}={path} is not there")
    try:
        return probe(path)
    except ValueError as error:
        raise ValueError(f"{key}={path} {error}") from error


def _read_video(
    files: ConditioningFiles, aspect: float, num_frames: int, fps: float, size: tuple[int, int]
) -> tuple[Frames, Tensor]:
    """The first `num_frames` of a video, and where they stay, boolean (F or 1, height, width)."""
    video = files.video
    assert video is not None
    info = _probe("video", video)
    if info.is_image:
        raise ValueError(f"video={video} is a picture; give image=FILE")
    _check_aspect("video", video, (info.height, info.width), aspect)
    geometry.check_num_frames(num_frames, key="keep")
    longest = cut_windows(info, ClipOptions(4 * 10**6 + 1, fps, clips="first"))[0].num_frames
    if longest < num_frames:
        key = "num_frames" if files.keep is None else "keep"
        raise ValueError(
            f"video={video} has {longest} frames (4k+1) at {fps:g} fps, fewer than {key}={num_frames}; give "
            f"{key}={longest} or less"
        )
    window, stays = Window(float(info.times[0]), num_frames), torch.ones(1, 1, 1, dtype=torch.bool)
    if files.mask is not None:
        stays = _read_mask(files.mask, info, window, fps, size)
    return next(read_windows(video, info, [window], fps, size)), stays


def _read_mask(path: Path, clip: VideoInfo, window: Window, fps: float, size: tuple[int, int]) -> Tensor:
    """Where a mask is black, boolean (F or 1, height, width)."""
    if not path.is_file():
        raise ValueError(f"mask={path} is not there")
    try:
        info = probe(path)
        check_mask(info, clip)
        stays = painted(torch.tensor(next(read_mask_windows(path, info, clip, [window], fps, size))))
    except ValueError as error:
        raise ValueError(f"mask={path} {error}") from error
    if not stays.any():
        raise ValueError(f"mask={path} is white everywhere: nothing of the video would stay")
    return stays


def _check_aspect(key: str, path: Path, of: tuple[int, ...], aspect: float) -> None:
    """ValueError if a picture has another aspect than the video is to have."""
    apart = of[1] / of[0] / aspect
    if not 1 / SAME_ASPECT <= apart <= SAME_ASPECT:
        raise ValueError(
            f"{key}={path} is {of[0]}x{of[1]} (height x width): its aspect is {of[1] / of[0]:.3f}, the video's "
            f"{aspect:.3f}; crop it, or give height= and width= of its aspect (without them the video takes that of "
            "image, last_image or video, whichever comes first)"
        )
