"""Flow shifts that grow with the size of a sample: callables num_tokens -> shift.

More tokens show the same content more often, so the same noise hides less of it. Sources: SD3 (arXiv 2403.03206);
Flux's public sampling code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from wantrain import geometry


class ShiftByTokens(Protocol):
    """A shift for every number of tokens; `reference_tokens` is the size it was made for."""

    @property
    def reference_tokens(self) -> int: ...

    def __call__(self, num_tokens: int) -> float: ...


@dataclass(frozen=True)
class RootShift:
    """SD3's rule: base * sqrt(tokens / those of the model's own clips).

    base        shift at the model's own size
    num_frames, area, multiple  that size: pixel frames, pixels of a frame, pixels along a token's side
    """

    base: float
    num_frames: int
    area: int
    multiple: int

    @property
    def reference_tokens(self) -> int:
        return geometry.latent_frames(self.num_frames) * self.area // self.multiple**2

    def __call__(self, num_tokens: int) -> float:
        return self.base * math.sqrt(num_tokens / self.reference_tokens)


@dataclass(frozen=True)
class FluxShift:
    """Flux's rule: the shift's logarithm is a straight line in the number of tokens, through two points.

    low_tokens, low_log    fewest tokens it was made for, and ln(shift) there
    high_tokens, high_log  most tokens it was made for, and ln(shift) there
    """

    low_tokens: int = 256
    low_log: float = 0.5
    high_tokens: int = 4096
    high_log: float = 1.15

    def __post_init__(self) -> None:
        if not self.low_tokens < self.high_tokens:
            raise ValueError(f"noise.shift: low_tokens={self.low_tokens} must be below high_tokens={self.high_tokens}")

    @property
    def reference_tokens(self) -> int:
        return self.high_tokens

    def __call__(self, num_tokens: int) -> float:
        along = (num_tokens - self.low_tokens) / (self.high_tokens - self.low_tokens)
        return math.exp(self.low_log + along * (self.high_log - self.low_log))
