"""Masks that weigh the loss, as they lie beside latents: a tensor of each window, and what the index says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wantrain.data.mmap import tensors_in

#: Name of the stored tensor: the share of each latent cell that is white, (T, H, W) float16. Files hold it: it never
#: changes.
STORED = "loss_mask"
#: What the index says of a window, as a sum: it has a mask, something of it is white, something is black.
MASKED, WHITE, BLACK = 1, 2, 4


@dataclass(frozen=True)
class MaskCounts:
    """Masks of one data set.

    name      of the set; "" where there is one
    windows   how many windows of clips it has
    masked    how many of them have a mask
    all_black, all_white  names of those whose mask has nothing white, and nothing black
    """

    name: str
    windows: int
    masked: int
    all_black: Sequence[str] = ()
    all_white: Sequence[str] = ()


def describe(content: bytes) -> int:
    """What the index says of a window, from its .safetensors member; 0 without a mask."""
    if f'"{STORED}"'.encode() not in content[: 8 + int.from_bytes(content[:8], "little")]:  # the header
        return 0
    mask = tensors_in(memoryview(bytearray(content)))[STORED]
    return MASKED + WHITE * bool((mask > 0).any()) + BLACK * bool((mask < 1).any())


def lacking(flags: NDArray[np.uint8], colour: int) -> NDArray[np.intp]:
    """The windows that have a mask without anything of a colour (WHITE or BLACK)."""
    return np.flatnonzero((flags & MASKED > 0) & (flags & colour == 0))
