"""Static clips and near-duplicate clips, found by thumbnails.

A thumbnail is a frame averaged to GRID x GRID colours. A clip is represented by the thumbnails of its first, middle and
last frame. Two clips are near-duplicates if a perceptual hash of a frame shares a part with the other clip's, and all
three thumbnails differ by a few grey levels at most. This finds the same footage in another size or quality. It does
not find footage that is cropped by more than a little, mirrored, recoloured or recut.

Files with near-duplicate clips form one group: no group is split between training and validation.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wantrain.video import Frames

GRID = 16
#: Points of a frame that each cell averages, in each direction.
_POINTS = 8
#: Difference, in grey levels, up to which thumbnails show the same picture. Measured on five real clips: copies of
#: other sizes and qualities differed by 2.5 to 8.7, copies with 4 % cropped away by 6 to 26, other clips by more.
ALIKE = 10.0
#: Largest change of any cell, in grey levels, up to which a clip is static.
STILL = 2.0
#: The hash has 64 bits: signs of the lowest spatial frequencies. Similar pictures share at least one of its parts.
_WAVES, _PARTS = 8, 4

Thumbnail = NDArray[np.uint8]


def thumbnail(frame: Frames) -> Thumbnail:
    """Mean colours (GRID, GRID, 3) of a frame (H, W, 3)."""
    side = GRID * _POINTS
    rows, columns = ((np.arange(side) + 0.5) * length / side for length in frame.shape[:2])
    points = frame[rows.astype(int)[:, None], columns.astype(int)[None]]
    return points.reshape(GRID, _POINTS, GRID, _POINTS, 3).mean((1, 3)).round().astype(np.uint8)


def is_still(thumbnails: NDArray[np.uint8]) -> bool:
    """True if nothing moves in the thumbnails (F, GRID, GRID, 3); a single frame does not count as static."""
    if len(thumbnails) < 2:
        return False
    changes = np.abs(thumbnails.astype(np.int16) - thumbnails[0]).mean(-1)
    return bool(changes.max() <= STILL)


@dataclass(frozen=True)
class Clip:
    """A clip in the search: the number of its file, its name, and three of its thumbnails (3, GRID, GRID, 3)."""

    file: int
    name: str
    thumbnails: NDArray[np.uint8]


def summarise(file: int, name: str, thumbnails: NDArray[np.uint8]) -> Clip:
    """A clip by its first, middle and last thumbnail, of (F, GRID, GRID, 3)."""
    return Clip(file, name, thumbnails[[0, len(thumbnails) // 2, -1]])


class SeenClips:
    """Clips seen so far, by their hashes; of near-duplicates only the first is stored."""

    def __init__(self) -> None:
        self._clips: dict[tuple[int, int, int], list[Clip]] = defaultdict(list)

    def find(self, clip: Clip) -> Clip | None:
        """The earlier clip that this one is a near-duplicate of; without one, None, and this clip is stored."""
        places = [
            (i, part, bits) for i, picture in enumerate(clip.thumbnails) for part, bits in enumerate(_hash(picture))
        ]
        candidates = {id(other): other for place in places for other in self._clips.get(place, ())}
        for other in candidates.values():
            if _difference(clip.thumbnails, other.thumbnails) <= ALIKE:
                return other
        for place in places:
            self._clips[place].append(clip)
        return None


def group_of(video: Mapping[str, Any]) -> dict[int, int]:
    """The group of each file with near-duplicates, from a manifest of video shards: the smallest file number in it."""
    parent: dict[int, int] = {}

    def first(file: int) -> int:
        while parent.setdefault(file, file) != file:
            file = parent[file]
        return file

    for pair in video["alike"]:
        low, high = sorted(first(int(key, 16)) for key in pair)
        parent[high] = low
    return {file: first(file) for file in parent}


def _difference(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """The largest difference of a pair of thumbnails, in grey levels: the mean over its worst tenth of cells."""
    cells = np.abs(one.astype(np.int16) - other).mean(-1).reshape(len(one), -1)
    worst = np.sort(cells, axis=1)[:, -cells.shape[1] // 10 :]
    return float(worst.mean(1).max())


def _hash(picture: Thumbnail) -> Sequence[int]:
    """The perceptual hash of a thumbnail, in parts of 64 / _PARTS bits.

    The signs of the lowest DCT coefficients of its brightness, relative to their median (Zauner 2010, "Implementation
    and benchmarking of perceptual image hash functions", section 3.2.1).
    """
    waves = (_COSINES @ picture.astype(np.float64).mean(-1) @ _COSINES.T)[:_WAVES, :_WAVES].reshape(-1)
    bits = waves > np.median(waves[1:])
    return [int.from_bytes(part.tobytes()) for part in np.packbits(bits.reshape(_PARTS, -1), axis=1)]


_COSINES = np.array(
    [[math.cos(math.pi * wave * (place + 0.5) / GRID) for place in range(GRID)] for wave in range(GRID)]
)
