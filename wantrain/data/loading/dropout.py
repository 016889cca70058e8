"""How often a caption is dropped, by step: one share, or points with straight lines between."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wantrain.util.numbers import is_number

#: [step, share] points of a schedule.
Points = Sequence[Sequence[float]]


@dataclass(frozen=True)
class CaptionDropout:
    """The share of samples with the empty caption.

    points      (step, share): straight lines between, level before the first and after the last
    batch_size  samples of a step, by which a sample's place in the run gives its step
    """

    points: tuple[tuple[float, float], ...]
    batch_size: int = 1

    @staticmethod
    def read(value: float | Points, *, batch_size: int | None = 1) -> CaptionDropout:
        """From a config: a share, or [step, share] points with rising steps. ValueError for what is neither."""
        points: list[Any] = list(value) if isinstance(value, list | tuple) else [[0, value]]
        if not points or not all(
            isinstance(point, list | tuple) and len(point) == 2 and all(map(is_number, point)) for point in points
        ):
            raise ValueError(
                f"data.caption_dropout={value} must be a share in [0, 1], or [step, share] points: [[0, 0.3], [9, 0]]"
            )
        steps, shares = zip(*points, strict=True)
        if not all(0 <= share <= 1 for share in shares):
            raise ValueError(
                f"data.caption_dropout={value} must be in [0, 1]: the share of samples with the empty caption"
            )
        if steps[0] < 0 or any(later <= earlier for earlier, later in itertools.pairwise(steps)):
            raise ValueError(f"data.caption_dropout={value}: steps must rise from point to point, from 0 or later")
        if batch_size is None and len(points) > 1:
            raise ValueError(
                f"data.caption_dropout={value} counts steps by batch_size, and batch_tokens= gives none; give one share"
            )
        return CaptionDropout(tuple((float(step), float(share)) for step, share in points), batch_size or 1)

    def at(self, place: int) -> float:
        """The share for the sample at this place in the run, which is an expert's own."""
        step = place // self.batch_size
        after = bisect.bisect_right([start for start, _ in self.points], step)
        if after in (0, len(self.points)):
            return self.points[min(after, len(self.points) - 1)][1]
        (start, low), (end, high) = self.points[after - 1 : after + 1]
        return low + (high - low) * (step - start) / (end - start)
