"""Randomness by position: `generator_at(seed, "noise", 1234)` is one stream on every rank, before and after a resume.

So no random state is ever saved.
"""

from __future__ import annotations

import hashlib
import json

import torch


def seed_at(*position: int | str) -> int:
    """A 63-bit seed that is a fixed function of where we are: (seed, purpose, counts...)."""
    digest = hashlib.blake2b(json.dumps(position).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator_at(*position: int | str) -> torch.Generator:
    """A CPU generator for one position, e.g. (seed, "noise", sample position); equal on every device and world."""
    return torch.Generator().manual_seed(seed_at(*position))
