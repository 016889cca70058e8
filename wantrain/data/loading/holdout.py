"""The holdout: which files are kept for validation, chosen by hash, in whole groups of near-duplicates."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wantrain.data.loading.streams import Indices
from wantrain.util.seeds import seed_at


def split_groups(groups: NDArray[np.uint64], share: float, seed: int) -> tuple[Indices, Indices]:
    """(train, held-out) sample numbers. Near-duplicates are never split: whole groups of files are held out.

    A file is a group of its own, unless it has near-duplicates (duplicates.py). The round(share * groups) groups with
    the smallest hash of (seed, group) are held out, so adding files changes few of them. They are ordered by hash, so
    the first few are a random choice. ValueError if `share` is not in [0, 1) or leaves nothing to train on.
    """
    if not 0 <= share < 1:
        raise ValueError(f"data.holdout={share} must be in [0, 1): the share of files kept for validation")
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
    """A 64-bit hash of (seed, group) for each group; distinct groups have distinct hashes."""
    mixed = groups + np.uint64(seed_at(seed, "holdout"))
    # The finalizer of SplitMix64 (Steele, Lea and Flood, 2014): 20 ms for a million.
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def one_per_group(samples: Indices, groups: NDArray[np.uint64]) -> Indices:
    """Reorder samples: the first of each group, then the second of each, and so on. `groups` is indexed by sample."""
    order = np.argsort(groups[samples], kind="stable")
    _, counts = np.unique(groups[samples], return_counts=True)
    place = np.empty(len(samples), dtype=np.int64)  # of each sample in its group
    place[order] = np.concatenate([np.arange(count) for count in counts]) if len(counts) else []
    return samples[np.argsort(place, kind="stable")]
