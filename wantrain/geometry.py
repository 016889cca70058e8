"""Frames, pixels, latents, tokens: all counts and divisibility rules.

Nothing here uses tensors. Names: `num_frames` counts pixel frames, `latent_frames` the VAE's; a size is
(height, width) in pixels; `multiple` is what both must divide by (VAE stride x patch: 16 for the 4x8x8 VAE).
Source: Wan2.2's published strides; see docs/glossary.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: The transformer's patch over (latent frame, latent row, latent column); the same in every Wan model.
PATCH = (1, 2, 2)


@dataclass(frozen=True, order=True)
class Bucket:
    """A shape that clips are resized and cut to, so that they can share a batch: frames, height and width in pixels."""

    num_frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"


def is_valid_num_frames(num_frames: int, stride: int = 4) -> bool:
    """True if the causal VAE keeps every frame: one first frame, then whole groups of `stride`."""
    return num_frames >= 1 and num_frames % stride == 1 % stride


def floor_num_frames(num_frames: int, stride: int = 4) -> int:
    """The largest valid number of frames up to `num_frames` (0 if there is none)."""
    return (num_frames - 1) // stride * stride + 1 if num_frames >= 1 else 0


def check_num_frames(num_frames: int, stride: int = 4, *, key: str = "num_frames") -> None:
    """Raise ValueError unless `num_frames` is 1 + stride*k, naming the nearest values that are."""
    if is_valid_num_frames(num_frames, stride):
        return
    below = max(1, floor_num_frames(num_frames, stride))
    nearest = f"{below}" if num_frames < 1 else f"{below} or {below + stride}"
    raise ValueError(
        f"{key}={num_frames} is not {stride}k+1: the VAE would silently drop frames; the nearest valid is {nearest}"
    )


def check_size(height: int, width: int, multiple: int, *, key: str = "size") -> None:
    """Raise ValueError unless both sides are positive multiples of `multiple`, naming the nearest size that is."""
    if height > 0 and width > 0 and height % multiple == 0 and width % multiple == 0:
        return
    nearest = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
    raise ValueError(
        f"{key}: height x width {height}x{width} must be multiples of {multiple} "
        f"(VAE stride times patch); the nearest valid is {nearest[0]}x{nearest[1]}"
    )


def latent_frames(num_frames: int, stride: int = 4) -> int:
    """Latent frames of a clip: the first frame alone, then one per `stride` frames."""
    check_num_frames(num_frames, stride)
    return (num_frames - 1) // stride + 1


def pixel_frames(latent_frames: int, stride: int = 4) -> int:
    """Pixel frames that `latent_frames` decode to; the inverse of `latent_frames`."""
    return (latent_frames - 1) * stride + 1


def num_tokens(latent_shape: Sequence[int], patch: Sequence[int] = PATCH) -> int:
    """Tokens of one sample with latents (T, height, width)."""
    return math.prod(side // part for side, part in zip(latent_shape, patch, strict=True))


def latent_shape(bucket: Bucket, temporal_stride: int = 4, spatial_stride: int = 8) -> tuple[int, int, int]:
    """(latent frames, latent rows, latent columns) of a bucket."""
    frames = latent_frames(bucket.num_frames, temporal_stride)
    return frames, bucket.height // spatial_stride, bucket.width // spatial_stride


def sizes(area: int, multiple: int, aspects: Iterable[float]) -> list[tuple[int, int]]:
    """The largest (height, width) within `area` pixels for each aspect (width / height), duplicates once.

    Sides are multiples of `multiple`. Of the roundings that fit (height first, width first) the closest in aspect is
    taken, and of equals the largest. ValueError if even one block is larger than the area.
    """
    if area < multiple * multiple:
        raise ValueError(f"area={area} holds not even one {multiple}x{multiple} block; give at least {multiple**2}")
    chosen: list[tuple[int, int]] = []
    for aspect in aspects:
        ideal_height, ideal_width = math.sqrt(area / aspect), math.sqrt(area * aspect)
        candidates = set()
        for steps in (0, 1):
            height = max(multiple, (int(ideal_height / multiple + 1e-9) + steps) * multiple)
            candidates.add((height, area // height // multiple * multiple))
            width = max(multiple, (int(ideal_width / multiple + 1e-9) + steps) * multiple)
            candidates.add((area // width // multiple * multiple, width))
        fitting = [(h, w) for h, w in candidates if h > 0 and w > 0]
        best = min(fitting, key=lambda hw: (abs(math.log(hw[1] / hw[0] / aspect)), -hw[0] * hw[1], hw))
        if best not in chosen:
            chosen.append(best)
    return chosen


def floored_size(height: int, width: int, area: int, multiple: int) -> tuple[int, int]:
    """A picture's own aspect at about `area` pixels, each side rounded down, as in Wan2.2's image-to-video."""
    sides = (math.sqrt(area * height / width), math.sqrt(area * width / height))
    rows, columns = (max(1, int(side // multiple)) * multiple for side in sides)
    return rows, columns


def fitted_size(height: int, width: int, area: int, multiple: int) -> tuple[int, int]:
    """The size within `area` nearest to a picture's aspect: the width is rounded down and the height fills the area, or
    the other way round. Source: Wan2.2's TI2V-5B with an image.
    """
    ideal_width = math.sqrt(area * width / height)
    columns = max(1, int(ideal_width // multiple)) * multiple
    rows = max(1, int(area / ideal_width // multiple)) * multiple
    choices = [
        (max(1, int(area / columns // multiple)) * multiple, columns),
        (rows, max(1, int(area / rows // multiple)) * multiple),
    ]
    apart = [max(width * h / (height * w), height * w / (width * h)) for h, w in choices]
    return choices[0] if apart[0] < apart[1] else choices[1]


def nearest_size(height: int, width: int, choices: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The choice whose log aspect is nearest to that of height x width, so that the crop is smallest."""
    aspect = math.log(width / height)
    return min(choices, key=lambda hw: (abs(math.log(hw[1] / hw[0]) - aspect), -hw[0] * hw[1]))


@dataclass(frozen=True)
class Buckets:
    """The sizes that clips are resized to: each of `aspects` (width / height) at each of `areas` (pixels of one frame).

    tokens   most tokens of one clip, so that long clips get smaller sizes; None: no limit
    upscale  largest enlargement of a picture; a smaller one gets a smaller area
    """

    areas: tuple[int, ...]
    aspects: tuple[float, ...]
    multiple: int
    tokens: int | None = None
    upscale: float = math.inf
    temporal_stride: int = 4

    def __post_init__(self) -> None:
        """ValueError if there is no area or no aspect, or a number is out of range."""
        if not self.areas or not self.aspects:
            raise ValueError("area and aspects need at least one value each")
        if any(aspect <= 0 for aspect in self.aspects):
            raise ValueError(f"aspects={list(self.aspects)} must all be above 0")
        if not self.upscale > 0:
            raise ValueError(f"upscale.limit={self.upscale} must be above 0; 1 allows no enlarging")
        for area in self.areas:
            sizes(area, self.multiple, self.aspects)

    def to_dict(self) -> dict[str, object]:
        """For a manifest: plain values."""
        limit = self.upscale if math.isfinite(self.upscale) else None
        return {**vars(self), "areas": list(self.areas), "aspects": list(self.aspects), "upscale": limit}

    def area(self, area: int, num_frames: int) -> int:
        """The largest area up to `area` within the tokens of a clip of `num_frames`; a token is `multiple`^2 pixels."""
        if self.tokens is None:
            return area
        per_frame = self.tokens // latent_frames(num_frames, self.temporal_stride)
        if per_frame < 1:
            raise ValueError(f"{num_frames} frames are more than tokens={self.tokens} allow at any size; raise tokens=")
        return min(area, per_frame * self.multiple**2)

    def sizes(self, num_frames: int) -> list[list[tuple[int, int]]]:
        """The (height, width) choices of a clip of `num_frames` frames, for each area, the largest first."""
        areas = sorted({self.area(area, num_frames) for area in self.areas}, reverse=True)
        return [sizes(area, self.multiple, self.aspects) for area in areas]

    def choose(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """The (height, width) for a clip: of the largest area that needs no enlargement beyond the limit, the size
        nearest in aspect. ValueError with the numbers if even the smallest area enlarges it too much.
        """
        for choices in self.sizes(num_frames):
            size = nearest_size(height, width, choices)
            if (scale := enlargement(height, width, *size)) <= self.upscale:
                return size
        raise ValueError(
            f"{height}x{width} would be enlarged {scale:.2f} times to fill {size[0]}x{size[1]}, the smallest that "
            f"area= gives; upscale.limit={self.upscale:g}"
        )


def enlargement(height: int, width: int, target_height: int, target_width: int) -> float:
    """The factor by which a picture is scaled to cover the target; below 1 it shrinks."""
    return max(target_height / height, target_width / width)


def cover(height: int, width: int, target_height: int, target_width: int) -> tuple[int, int, float]:
    """Size of a picture scaled to cover the target with its aspect kept, and the share that a centre crop removes.

    Returns (resized height, resized width, share of the resized picture that is cropped away, in [0, 1)).
    """
    scale = enlargement(height, width, target_height, target_width)
    resized = max(target_height, round(height * scale)), max(target_width, round(width * scale))
    remaining = target_height * target_width / (resized[0] * resized[1])
    return resized[0], resized[1], 1.0 - remaining
