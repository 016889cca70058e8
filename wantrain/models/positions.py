"""Embeddings of positions: sinusoids of the timestep, rotary angles of the tokens.

Sources: Wan report (arXiv 2503.20314) section 4.2; Wan2.2's released constants.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROPE_THETA = 10000.0
ROPE_LENGTH = 1024  # positions per axis that Wan's tables hold: a hard limit of the published models


def sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """Timestep in [0, 1000] (any shape) -> (..., dim) float32: cosines, then sines, of t * 10000^(-i / (dim/2)).

    Angles in float64 as in the official code: at t near 1000 float32 angles are already 6e-5 off.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
    angles = timestep.double()[..., None] * torch.pow(10000.0, -exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def rope_angles(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> Tensor:
    """Rotation angles (T*H*W, head_dim/2) float64 of each token: time, row and column share the head's pairs.

    Of head_dim = 128 the rows and columns get 42 dimensions each and time the other 44; each axis has its own
    frequencies 10000^(-2j / its dimensions), positions count from 0.
    """
    side = 2 * (head_dim // 6)
    dims = (head_dim - 2 * side, side, side)
    parts = []
    for axis, (length, dim) in enumerate(zip(grid, dims, strict=True)):
        steps = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
        angle = torch.arange(length, dtype=torch.float64, device=device)[:, None] * ROPE_THETA**-steps
        shape = [1, 1, 1, dim // 2]
        shape[axis] = length
        parts.append(angle.view(shape).expand(*grid, dim // 2))
    return torch.cat(parts, dim=-1).flatten(0, 2)
