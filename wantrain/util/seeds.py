"""Randomness by position: `generator_at(seed, "noise", 1234)` is the same stream on every rank and after every resume.

So no random state needs to be saved.
"""

from __future__ import annotations

import hashlib
import json

import torch


def seed_at(*position: int | str) -> int:
    """A 63-bit seed, a fixed function of the position: (seed, purpose, counts...)."""
    digest = hashlib.blake2b(json.dumps(position).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator_at(*position: int | str) -> torch.Generator:
    """A CPU generator for a position, e.g. (seed, "noise", sample position); the same on every rank and device."""
    return torch.Generator().manual_seed(seed_at(*position))
