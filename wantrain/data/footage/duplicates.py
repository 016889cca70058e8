"""What clips look like from afar: the ones in which nothing moves, and pairs that show the same.

Every frame is kept as GRID x GRID colours while its file is read. A clip is known by three of its frames; two clips are
alike if a frame's hash shares a part with the other's, and all three frames differ by a few levels only. So the same
footage in another size or quality is found; cropped by more than a little, mirrored, recoloured or recut it is not.

Files with clips that are alike are one group: validation never holds out one of them while another is trained on.
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
#: Difference, in grey levels, up to which frames are the same picture: of the five real clips of the log, copies of
#: other sizes and qualities differed by 2.5 to 8.7, copies with 4 % cropped away by 6 to 26, other clips by more.
ALIKE = 10.0
#: Largest change of any cell, in grey levels, up to which a clip stands still.
STILL = 2.0
#: The hash has 64 bits: signs of the lowest waves of the picture. Alike pictures share one of its parts.
_WAVES, _PARTS = 8, 4

Thumbnail = NDArray[np.uint8]


def look(frame: Frames) -> Thumbnail:
    """A frame (H, W, 3) as (GRID, GRID, 3) mean colours."""
    side = GRID * _POINTS
    rows, columns = ((np.arange(side) + 0.5) * length / side for length in frame.shape[:2])
    points = frame[rows.astype(int)[:, None], columns.astype(int)[None]]
    return points.reshape(GRID, _POINTS, GRID, _POINTS, 3).mean((1, 3)).round().astype(np.uint8)


def is_still(thumbnails: NDArray[np.uint8]) -> bool:
    """True if nothing is seen to move in frames (F, GRID, GRID, 3); a single frame is no clip that stands still."""
    if len(thumbnails) < 2:
        return False
    changes = np.abs(thumbnails.astype(np.int16) - thumbnails[0]).mean(-1)
    return bool(changes.max() <= STILL)


@dataclass(frozen=True)
class Clip:
    """A clip as it is remembered: which file, by number, its name, and three of its frames (3, GRID, GRID, 3)."""

    file: int
    name: str
    thumbnails: NDArray[np.uint8]


def remember(file: int, name: str, thumbnails: NDArray[np.uint8]) -> Clip:
    """A clip of frames (F, GRID, GRID, 3), by its first, middle and last one."""
    return Clip(file, name, thumbnails[[0, len(thumbnails) // 2, -1]])


class Memory:
    """Clips seen so far; of those that are alike only the first is kept."""

    def __init__(self) -> None:
        self._clips: dict[tuple[int, int, int], list[Clip]] = defaultdict(list)

    def find(self, clip: Clip) -> Clip | None:
        """The clip seen before that this one is like, if there is one; else this one is kept."""
        places = [
            (i, part, bits) for i, picture in enumerate(clip.thumbnails) for part, bits in enumerate(_hash(picture))
        ]
        seen = {id(other): other for place in places for other in self._clips.get(place, ())}
        for other in seen.values():
            if _differ(clip.thumbnails, other.thumbnails) <= ALIKE:
                return other
        for place in places:
            self._clips[place].append(clip)
        return None


def group_of(video: Mapping[str, Any]) -> dict[int, int]:
    """The group of each file that looks like another, by the manifest of their shards: the smallest number in it."""
    found: dict[int, int] = {}

    def first(file: int) -> int:
        while found.setdefault(file, file) != file:
            file = found[file]
        return file

    for pair in video["alike"]:
        low, high = sorted(first(int(key, 16)) for key in pair)
        found[high] = low
    return {file: first(file) for file in found}


def _differ(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """The mean difference of the pair of frames that differ most; of cells, the worst tenth counts alone."""
    cells = np.abs(one.astype(np.int16) - other).mean(-1).reshape(len(one), -1)
    worst = np.sort(cells, axis=1)[:, -cells.shape[1] // 10 :]
    return float(worst.mean(1).max())


def _hash(picture: Thumbnail) -> Sequence[int]:
    """The perceptual hash of a picture, in parts of 64 / _PARTS bits.

    The signs of the lowest waves of its brightness, against their median (Zauner 2010, "Implementation and benchmarking
    of perceptual image hash functions", section 3.2.1).
    """
    waves = (_COSINES @ picture.astype(np.float64).mean(-1) @ _COSINES.T)[:_WAVES, :_WAVES].reshape(-1)
    bits = waves > np.median(waves[1:])
    return [int.from_bytes(part.tobytes()) for part in np.packbits(bits.reshape(_PARTS, -1), axis=1)]


_COSINES = np.array(
    [[math.cos(math.pi * wave * (place + 0.5) / GRID) for place in range(GRID)] for wave in range(GRID)]
)
