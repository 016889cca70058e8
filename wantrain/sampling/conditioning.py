"""What the user knows of a video before it is made: an image, a last image, a video's beginning, or all but a mask.

Files become pixels and a mask over time and space, and those a `Condition`. Images are brought to size as Wan2.2's
authors do: for a model that is told by further channels scaled to the size of the video (bicubic, which may squeeze by
a few per cent, since sides are rounded), for one that is told by clean frames scaled to cover it (Lanczos) and cropped
at the centre. Videos are scaled and cropped as training footage is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from wantrain import conditioning, geometry
from wantrain.conditioning import Condition, check_way
from wantrain.data.footage.clips import ClipOptions, VideoInfo, Window, cut_windows
from wantrain.data.footage.probe import check_mask, probe, read_mask_windows, read_windows
from wantrain.masks import painted
from wantrain.video import Frames, to_pixels

#: Aspects up to this ratio apart count as the same: 480x832 and 720x1280 are 1.026 apart.
SAME_ASPECT = 1.05


@dataclass(frozen=True)
class Sources:
    """Files that hold what is known; None where there is none.

    image, last_image  pictures of the first and of the last frame
    video  with `keep`: its first 4k+1 frames stay and are continued; with `mask`: what is black in the mask stays
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
            raise ValueError(f"{key} says what of a video stays; give video=FILE too")
        if self.video is not None and (self.mask is None) == (self.keep is None):
            raise ValueError(
                f"video={self.video}: give one of mask=FILE (white is made anew) and keep=N (the first N frames are "
                "continued)"
            )

    @property
    def first(self) -> tuple[str, Path] | None:
        """Key and path of what sets the aspect."""
        for key in ("image", "last_image", "video"):
            path = getattr(self, key)
            if path is not None:
                return key, path
        return None


@dataclass(frozen=True)
class Known:
    """Pixels (3, F, H, W) in [-1, 1] and where they are known, boolean (1, F, H, W)."""

    pixels_CFHW: Tensor
    known_1FHW: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, height and width of the video."""
        return self.known_1FHW.shape[1:]  # type: ignore[return-value]

    @property
    def identity(self) -> str:
        """Sixteen hex digits for what is known and where."""
        digest = hashlib.sha256()
        for part in (self.pixels_CFHW, self.known_1FHW):
            digest.update(part.numpy().tobytes())
        return digest.hexdigest()[:16]

    def encode(
        self, encode_pixels: Callable[[Tensor], Tensor], *, way: str, temporal_stride: int = 4, spatial_stride: int = 8
    ) -> Condition:
        """The record for a model that is told in this way."""
        strides = {"temporal_stride": temporal_stride, "spatial_stride": spatial_stride}
        return conditioning.encode(encode_pixels, self.pixels_CFHW[None], self.known_1FHW[None], way=way, **strides)


def sources_from(given: Mapping[str, object]) -> Sources:
    """From a config's values of image, last_image, video, mask (paths) and keep (a number)."""
    paths = {key: Path(str(given[key])) for key in ("image", "last_image", "video", "mask") if given[key] is not None}
    keep = given["keep"]
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int)):
        raise ValueError(f"keep={keep} must be a whole number of frames, 4k+1")
    return Sources(**paths, keep=keep)


def check_told(sources: Sources, way: str | None, *, model: str) -> None:
    """ValueError if `model` takes none of what is given, or needs something that is not."""
    first = sources.first
    if way is None and first is not None:
        raise ValueError(
            f"{first[0]}={first[1]}: model={model} is told nothing but text; choose model=i2v_a14b or model=ti2v_5b"
        )
    if way == "channels" and first is None:
        raise ValueError(
            f"model={model} makes a video of what is known: give image=FILE, last_image=FILE or video=FILE"
        )
    if way == "frames" and sources.last_image is not None:
        raise ValueError(
            f"last_image={sources.last_image}: model={model} is told by clean first frames and cannot take a last "
            "image; leave it out, or choose a model with further channels (i2v_a14b)"
        )


def read_known(
    sources: Sources, model: Mapping[str, Any], *, num_frames: int, size: tuple[int, int] | None
) -> Known | None:
    """Pixels and mask from files, for a video of `num_frames` by `model`, whose conf/model facts are given.

    Without a `size` (height, width) the video takes the aspect of what is known, at about the model's area, as its
    authors choose it. None if nothing is given, and nothing need be. ValueError, naming the file and what would fit,
    for what the model cannot be told, another aspect, a video that is too short, a mask of another length or size,
    and where nothing would be left to make.
    """
    way, fps = model["told_by"], model["fps"]
    check_told(sources, way, model=model["name"])
    if sources.first is None or way is None:
        return None
    key, first = sources.first
    shape = _probe(key, first)
    aspect = size[1] / size[0] if size else shape.width / shape.height
    if size is None:
        choose = geometry.floored_size if way == "channels" else geometry.fitted_size
        size = choose(shape.height, shape.width, model["area"], model["multiple"])
    known = torch.zeros(1, num_frames, *size, dtype=torch.bool)
    pixels = torch.zeros(3, num_frames, *size)
    for name, path, place in (("image", sources.image, 0), ("last_image", sources.last_image, -1)):
        if path is not None:
            frame = _read_image(name, path)
            _check_aspect(name, path, frame.shape[:2], aspect)
            pixels[:, place], known[:, place], key = fit_image(frame, size, way), True, name
    if sources.video is not None:
        frames, stays = _read_video(sources, aspect, sources.keep or num_frames, fps, size)
        pixels[:, : len(frames)] = to_pixels(torch.tensor(frames))
        known[:, : len(frames)], key = stays, "video" if sources.mask is None else "mask"
    if known.all():
        raise ValueError(
            f"{key}: all {num_frames} frames are known and nothing is left to make; give a larger num_frames, or a "
            "mask with white in it"
        )
    check_way(known[None], way, key=key)
    return Known(pixels, known)


def fit_image(frame: Frames, size: tuple[int, int], way: str) -> Tensor:
    """An image (H, W, 3) uint8 as a frame (3, height, width) in [-1, 1], prepared as the authors do for this way."""
    if way == "channels":
        image_1CHW = to_pixels(torch.tensor(frame[None])).transpose(0, 1)
        return F.interpolate(image_1CHW, size, mode="bicubic", align_corners=False)[0]
    height, width, _ = geometry.cover(frame.shape[0], frame.shape[1], *size)
    scaled = Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    cut = np.asarray(scaled)[top : top + size[0], left : left + size[1]]
    return to_pixels(torch.tensor(cut[None]))[:, 0]


def _read_image(key: str, path: Path) -> Frames:
    found = _probe(key, path)
    if not found.is_image:
        raise ValueError(f"{key}={path} is a video; give a picture, or video=FILE with keep=N")
    return next(read_windows(path, found, [Window(0.0, 1)], 1.0))[0]  # type: ignore[no-any-return]


def _probe(key: str, path: Path) -> VideoInfo:
    """What is in a file; ValueError names the key it was given under."""
    if not path.is_file():
        raise ValueError(f"{key}={path} is not there")
    try:
        return probe(path)
    except ValueError as error:
        raise ValueError(f"{key}={path} {error}") from error


def _read_video(
    sources: Sources, aspect: float, num_frames: int, fps: float, size: tuple[int, int]
) -> tuple[Frames, Tensor]:
    """The first `num_frames` of a video, and where they stay, boolean (F or 1, height, width)."""
    video = sources.video
    assert video is not None
    found = _probe("video", video)
    if found.is_image:
        raise ValueError(f"video={video} is a picture; give image=FILE")
    _check_aspect("video", video, (found.height, found.width), aspect)
    geometry.check_num_frames(num_frames, key="keep")
    longest = cut_windows(found, ClipOptions(4 * 10**6 + 1, fps, clips="first"))[0].num_frames
    if longest < num_frames:
        key = "num_frames" if sources.keep is None else "keep"
        raise ValueError(
            f"video={video} has {longest} frames (4k+1) at {fps:g} fps, fewer than {key}={num_frames}; give "
            f"{key}={longest} or less"
        )
    window, stays = Window(float(found.times[0]), num_frames), torch.ones(1, 1, 1, dtype=torch.bool)
    if sources.mask is not None:
        stays = _read_mask(sources.mask, found, window, fps, size)
    return next(read_windows(video, found, [window], fps, size)), stays


def _read_mask(path: Path, clip: VideoInfo, window: Window, fps: float, size: tuple[int, int]) -> Tensor:
    """Where a mask is black, boolean (F or 1, height, width)."""
    if not path.is_file():
        raise ValueError(f"mask={path} is not there")
    try:
        found = probe(path)
        check_mask(found, clip)
        stays = painted(torch.tensor(next(read_mask_windows(path, found, clip, [window], fps, size))))
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
