"""Clips of different sizes as one sequence: what they share, and attention within each clip.

Linear layers, norms and the feed-forward network do not know to which clip a token belongs. A clip's own are its rotary
angles, its rows of modulation, its text, and the tokens that its tokens attend to. Attention runs once for each group
of clips of one size, so that every kernel serves, no mask is made, and its cost is that of the clips alone.

Tensor suffixes as in transformer.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wantrain.models.attention import Attend


@dataclass(frozen=True)
class Packing:
    """Where clips lie in one sequence, one after another.

    groups  (clips, tokens of each clip) of each group of clips of one size
    rows    tokens of each row of modulation: those of a clip, or of a frame where frames have timesteps of their own
    """

    groups: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]

    @classmethod
    def of(cls, grids: Sequence[tuple[int, int, int]], timesteps: Sequence[Tensor]) -> Packing:
        """By the patches of a clip (frames, rows, columns) and the timesteps, (clips,) or (clips, frames), of each
        group.
        """
        groups, rows = [], list[int]()
        for (frames, height, width), timestep in zip(grids, timesteps, strict=True):
            clips, tokens = len(timestep), frames * height * width
            groups.append((clips, tokens))
            rows += [tokens] * clips if timestep.ndim == 1 else [height * width] * (clips * frames)
        return cls(tuple(groups), tuple(rows))

    def split(self, x_LD: Tensor) -> list[Tensor]:
        """The tokens of each group, (clips, tokens, ...)."""
        parts = x_LD.split([clips * tokens for clips, tokens in self.groups])
        return [part.unflatten(0, group) for part, group in zip(parts, self.groups, strict=True)]

    def attend(self, attend: Attend, q_1LNK: Tensor, k: Tensor, v: Tensor, bias_S: Tensor | None) -> Tensor:
        """Attention (1, L, N, K) of each clip to its own tokens, k and v (1, L, N, K), or to its text, k and v
        (clips, S, N, K).
        """
        clips = [clips for clips, _ in self.groups]
        keys, values = (x.split(clips) if len(x) == sum(clips) else self.split(x[0]) for x in (k, v))
        each = zip(self.split(q_1LNK[0]), keys, values, strict=True)
        results = [attend(q, own_k, own_v, bias_S) for q, own_k, own_v in each]
        return torch.cat([result.flatten(0, 1) for result in results])[None]
