"""Which files are held out of training: whole groups that look alike, chosen by hash."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wantrain.data.loading.sampler import Indices
from wantrain.util.seeds import seed_at


def split_groups(groups: NDArray[np.uint64], share: float, seed: int) -> tuple[Indices, Indices]:
    """(train, held-out) sample numbers: whole groups of files are held out, so that what is alike never straddles.

    A file is a group, unless it looks like others (duplicates.py). The round(share * groups) groups with the smallest
    hash of (seed, group) are held out: a fixed choice that adding files changes little. They come in the order of their
    hashes, so that the first few are of all kinds. ValueError if `share` is not in [0, 1) or leaves nothing to train
    on.
    """
    if not 0 <= share < 1:
        raise ValueError(f"data.holdout={share} must be in [0, 1)")
    hashes = _hashes(groups, seed)
    ranked = np.sort(hashes)
    ranked = ranked[np.diff(ranked, prepend=~ranked[:1]) != 0]  # each group once
    count = round(share * len(ranked))
    if 0 < len(ranked) == count:
        raise ValueError(
            f"data.holdout={share} holds out all {len(ranked)} files (those that look alike counted as one); make it "
            "smaller, or add footage"
        )
    held = hashes < ranked[count] if len(ranked) else np.zeros(0, dtype=bool)
    order = np.argsort(hashes[held], kind="stable")
    return np.flatnonzero(~held), np.flatnonzero(held)[order]


def _hashes(groups: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """A 64-bit hash of (seed, group) for each; another group never has the same."""
    mixed = groups + np.uint64(seed_at(seed, "holdout"))
    # The finalizer of SplitMix64 (Steele, Lea and Flood, 2014): a million take 20 ms.
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def one_per_group(samples: Indices, groups: NDArray[np.uint64]) -> Indices:
    """Samples in another order: of each group the first one, then of each the second, and so on. `groups` by sample."""
    order = np.argsort(groups[samples], kind="stable")
    _, counts = np.unique(groups[samples], return_counts=True)
    turn = np.empty(len(samples), dtype=np.int64)
    turn[order] = np.concatenate([np.arange(count) for count in counts]) if len(counts) else []
    return samples[np.argsort(turn, kind="stable")]
