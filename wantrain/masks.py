"""Masks of known pixels, by type: the first frame, both ends, the beginning, all but boxes, strokes or a border.

A mask type is a function (shape, generator, its settings) -> mask, a boolean tensor that broadcasts to the clip's
(F, H, W); True where a pixel is known. A `MaskMix` draws mask types by weight. Randomness comes from the given
generator alone, so a mask is a function of a position. No model is known here: conditioning.py makes model inputs.

Regions are drawn in pixels, sides and widths as shares of the frame's. Sources of the types: Wan2.2's tasks, and the
usual training masks of inpainting models (moving boxes, free-form strokes, borders).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wantrain import geometry
from wantrain.util.numbers import is_number

#: (frames, height, width) of a clip in pixels.
Shape = tuple[int, int, int]
#: The smallest and the largest value that a setting is drawn from, ends included.
Range = tuple[float, float]


def nothing(shape: Shape, generator: torch.Generator) -> Tensor:
    """No known pixels: text alone, for text-to-video and for guidance."""
    return _frames(shape, 0)


def image(shape: Shape, generator: torch.Generator) -> Tensor:
    """The first frame: image-to-video."""
    return _frames(shape, 1)


def first_last(shape: Shape, generator: torch.Generator) -> Tensor:
    """The first and the last frame."""
    mask = _frames(shape, 1)
    mask[-1] = True
    return mask


def continuation(shape: Shape, generator: torch.Generator, *, frames: Range = (5, 9)) -> Tensor:
    """The first 4k+1 frames, a number drawn from the range; of a clip too short for it, all but the last four."""
    shortest, longest = _ordered("continuation", "frames", frames, low=1)
    if geometry.floor_num_frames(int(longest)) < shortest:
        raise ValueError(f"mask_types.continuation.frames={list(frames)} holds no length 4k+1; give e.g. [5, 9]")
    fitting = [n for n in range(1, max(2, shape[0]), 4) if n <= longest]
    lengths = [n for n in fitting if n >= shortest] or fitting[-1:]
    return _frames(shape, lengths[_whole(0, len(lengths) - 1, generator)])


def boxes(
    shape: Shape, generator: torch.Generator, *, count: Range = (1, 3), side: Range = (0.2, 0.6), lasting: float = 0.5
) -> Tensor:
    """All but some boxes, each moving straight from one place to another.

    `count` of them; `side` is a side's share of the frame's. With probability `lasting` a box is there from the first
    frame to the last, else for a part of the time. Where its path begins and ends, up to half of it is off the frame.
    """
    num_frames, height, width = shape
    low, high = _ordered("boxes", "count", count, low=1)
    shares = _ordered("boxes", "side", side, high=1)
    time = torch.linspace(0, 1, num_frames)
    hidden = torch.zeros(shape, dtype=torch.bool)
    for _ in range(_whole(low, high, generator)):
        part = torch.ones(num_frames, 1, 1, dtype=torch.bool)
        for axis, length in ((1, height), (2, width)):
            size = max(1.0, _between(shares, generator) * length)
            start, end = (_between((-size / 2, length - size / 2), generator) for _ in range(2))
            left = (start + (end - start) * time)[:, None]
            place = torch.arange(length) + 0.5
            inside = (place >= left) & (place < left + size)
            part = part & inside.unsqueeze(3 - axis)
        hidden |= part & _while(num_frames, lasting, generator)
    return ~hidden


def brushes(
    shape: Shape,
    generator: torch.Generator,
    *,
    count: Range = (1, 4),
    width: Range = (0.05, 0.2),
    lasting: float = 0.5,
) -> Tensor:
    """All but some free strokes: bent lines with round ends, `width` a share of the shorter side; as in `boxes`."""
    num_frames, height, columns = shape
    low, high = _ordered("brushes", "count", count, low=1)
    shares = _ordered("brushes", "width", width, high=1)
    rows_H1, columns_1W = torch.arange(height)[:, None] + 0.5, torch.arange(columns)[None] + 0.5
    hidden = torch.zeros(shape, dtype=torch.bool)
    for _ in range(_whole(low, high, generator)):
        radius = max(0.5, _between(shares, generator) * min(height, columns) / 2)
        points = torch.rand(_whole(2, 6, generator), 2, generator=generator) * torch.tensor([height, columns])
        stroke = torch.zeros(height, columns, dtype=torch.bool)
        for (y0, x0), (y1, x1) in zip(points[:-1].tolist(), points[1:].tolist(), strict=True):
            dy, dx = y1 - y0, x1 - x0
            along = ((rows_H1 - y0) * dy + (columns_1W - x0) * dx) / max(dy * dy + dx * dx, 1e-6)
            along = along.clamp(0, 1)
            stroke |= (rows_H1 - y0 - along * dy) ** 2 + (columns_1W - x0 - along * dx) ** 2 <= radius**2
        hidden |= stroke & _while(num_frames, lasting, generator)
    return ~hidden


def borders(shape: Shape, generator: torch.Generator, *, side: Range = (0.1, 0.35)) -> Tensor:
    """All but a border, the same in all frames, of `side` (a share) on one to four sides."""
    height, width = shape[1:]
    shares = _ordered("borders", "side", side, high=0.49)
    there = torch.rand(4, generator=generator) < 0.5
    there[_whole(0, 3, generator)] = True
    mask = torch.ones(shape, dtype=torch.bool)
    for number, length in enumerate((height, height, width, width)):
        cut = max(1, round(_between(shares, generator) * length))
        if there[number]:
            axis, start = 1 + number // 2, 0 if number % 2 == 0 else length - cut
            mask.narrow(axis, start, cut).fill_(False)
    return mask


#: The mask types that are drawn, by their names in configs.
DRAWN: Mapping[str, Callable[..., Tensor]] = {
    "nothing": nothing,
    "image": image,
    "first_last": first_last,
    "continuation": continuation,
    "boxes": boxes,
    "brushes": brushes,
    "borders": borders,
}
#: The mask type that is read: a mask video beside the footage (masks/NAME.mp4), white where pixels are to be made.
PAINTED = "mask"
#: The mask types of whole latent frames from the first on: those that conditioning by clean frames can take.
LEADING = ("nothing", "image", "continuation")
#: Brightness, of 255, up to which a pixel of a mask is black, and as far below 255 white: video compression leaves it.
NEAR = 8


def painted(frames: Tensor) -> Tensor:
    """Where the frames (..., F, H, W, C) uint8 of a mask video are black, which means known: boolean (..., F, H, W).

    Black is a mean over the channels below 127.5, in whole numbers: exact on every device.
    """
    return 2 * frames.sum(dim=-1, dtype=torch.int16) < 255 * frames.shape[-1]


def white_share(frames: Tensor, *, temporal_stride: int = 4, spatial_stride: int = 8) -> Tensor:
    """How white the frames (B, F, H, W, C) uint8 of a mask video are in each latent cell: (B, T, H/s, W/s) in [0, 1].

    The mean over the pixels of the cell: of the first frame for the first latent frame, then of `temporal_stride`
    frames for each. ValueError for a length or size that the VAE cannot take.
    """
    num_frames, height, width = frames.shape[1:4]
    geometry.check_num_frames(num_frames, temporal_stride)
    geometry.check_size(height, width, spatial_stride, key="mask")
    white = ((frames.float().mean(dim=-1) - NEAR) / (255 - 2 * NEAR)).clamp(0, 1)
    cells = F.avg_pool2d(white, spatial_stride)
    later = cells[:, 1:].unflatten(1, (-1, temporal_stride)).mean(dim=2) if num_frames > 1 else cells[:, 1:]
    return torch.cat([cells[:, :1], later], dim=1)


@dataclass(frozen=True)
class MaskMix:
    """Mask types by weight, with their settings.

    weights   need not sum to one
    settings  that differ from a mask type's defaults
    variants  masks of a type for each clip, where masks are drawn before training because their latents are encoded
    """

    weights: Mapping[str, float]
    settings: Mapping[str, Mapping[str, Any]]
    variants: Mapping[str, int]

    @staticmethod
    def read(spec: Mapping[str, Any], *, key: str = "mask_types") -> MaskMix:
        """From a config's mapping: `image: 0.7` is a weight, `boxes: {weight: 0.3, side: [0.1, 0.4]}` has settings.

        ValueError names every entry that is unknown or out of range.
        """
        weights, settings, variants, problems = {}, {}, {}, []
        for name, entry in spec.items():
            more = dict(entry) if isinstance(entry, Mapping) else {"weight": entry}
            weight, count = more.pop("weight", 1.0), more.pop("variants", 1)
            if name not in {*DRAWN, PAINTED}:
                problems.append(f"{key}.{name} is unknown; choose from {', '.join((*DRAWN, PAINTED))}")
                continue
            if not (is_number(weight) and 0 <= weight < math.inf):
                problems.append(f"{key}.{name}={weight} must be a weight: a number, 0 or above")
                continue
            if not (is_number(count, whole=True) and count >= 1):
                problems.append(f"{key}.{name}.variants={count} must be a whole number, 1 or above")
                continue
            takes = list(inspect.signature(DRAWN[name]).parameters)[2:] if name in DRAWN else []
            if wrong := sorted(set(more) - set(takes)):
                has = f"; it has {', '.join(takes)}" if takes else "; it has no settings"
                problems.append(f"{key}.{name}.{wrong[0]} is unknown{has}")
                continue
            weights[name], settings[name], variants[name] = float(weight), more, count
        if not problems and spec and sum(weights.values()) == 0:
            problems.append(f"{key}: all weights are 0; give one of {', '.join(weights)} more")
        if problems:
            raise ValueError("; ".join(problems))
        mix = MaskMix(weights, settings, variants)
        for name in set(weights) & set(DRAWN):
            mix.draw(name, (81, 16, 16), torch.Generator().manual_seed(0))  # refuses a bad range at once
        return mix

    @property
    def names(self) -> tuple[str, ...]:
        """The mask types, in the config's order."""
        return tuple(self.weights)

    def choose(self, generator: torch.Generator) -> tuple[str, int]:
        """A mask type, by weight, and one of its variants."""
        shares = torch.tensor(list(self.weights.values()), dtype=torch.float64).cumsum(0)
        place = torch.rand((), dtype=torch.float64, generator=generator) * shares[-1]
        name = self.names[int(torch.searchsorted(shares, place, right=True))]
        return name, _whole(0, self.variants[name] - 1, generator)

    def draw(self, name: str, shape: Shape, generator: torch.Generator) -> Tensor:
        """A mask of type `name` for a clip of `shape`: boolean, broadcasts to it. Not for `mask`, which is read."""
        return DRAWN[name](shape, generator, **self.settings[name])


def _frames(shape: Shape, count: int) -> Tensor:
    """(F, 1, 1): the first `count` frames are known."""
    return (torch.arange(shape[0]) < count)[:, None, None]


def _while(num_frames: int, lasting: float, generator: torch.Generator) -> Tensor:
    """(F, 1, 1): the frames of a region: all with probability `lasting`, else from one drawn frame to another."""
    if not (is_number(lasting) and 0 <= lasting <= 1):
        raise ValueError(f"mask_types: lasting={lasting} must be a probability, between 0 and 1")
    if torch.rand((), generator=generator) < lasting:
        return torch.ones(num_frames, 1, 1, dtype=torch.bool)
    first, last = sorted(_whole(0, num_frames - 1, generator) for _ in range(2))
    time = torch.arange(num_frames)
    return ((time >= first) & (time <= last))[:, None, None]


def _whole(low: float, high: float, generator: torch.Generator) -> int:
    """A whole number, ends included."""
    return int(torch.randint(int(low), int(high) + 1, (), generator=generator))


def _between(ends: Range, generator: torch.Generator) -> float:
    return ends[0] + (ends[1] - ends[0]) * float(torch.rand((), generator=generator))


def _ordered(name: str, key: str, ends: Range, *, low: float = 0.0, high: float = math.inf) -> Range:
    """The two ends of a range; ValueError unless low <= first <= second <= high."""
    pair = list(ends) if isinstance(ends, list | tuple) else [ends, ends]
    if len(pair) != 2 or not all(map(is_number, pair)) or not low <= pair[0] <= pair[1] <= high:
        most = "" if high == math.inf else f" and {high:g}"
        raise ValueError(f"mask_types.{name}.{key}={pair} must be [smallest, largest], not below {low:g}{most}")
    return pair[0], pair[1]
