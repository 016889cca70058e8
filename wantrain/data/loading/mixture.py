"""MixedData: several sets of latent shards as one data set.

The sets' samples are numbered one set after another, and their buckets get common numbers. Facts that must be equal in
all sets are compared. The sampler (sampler.py) decides which set a sample comes from.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wantrain.batch import Batch, pad_texts
from wantrain.conditioning import Condition
from wantrain.data.loading.dataset import LatentData
from wantrain.data.loading.sampler import Indices
from wantrain.data.remote import CACHE
from wantrain.geometry import Bucket
from wantrain.util.console import say

#: Manifest fields that must be equal in all sets: encoders and geometry.
COMMON = (
    "vae_fingerprint",
    "text_encoder_fingerprint",
    "latent_channels",
    "temporal_stride",
    "spatial_stride",
    "text_dim",
)


class MixedData:
    """Sets of latent shards, each with a share of the samples.

    sets  by name: `shards`, `weight` (default 1; a set's share is its weight over the sum), and any other setting of
          LatentData that differs for this set; the other arguments are the defaults for all sets

    Attributes beside those of TrainingData:

    parts    the LatentData of each set, by name
    train    numbers of the training samples
    heldout  numbers of the held-out clips

    Held-out clips of files that another set trains on are left out of validation, with a message.
    """

    def __init__(
        self,
        *,
        sets: Mapping[str, Mapping[str, Any]] | None,
        cache: str | Path = CACHE,
        cache_gb: float = 100.0,
        holdout: float = 0.05,
        caption_dropout: float = 0.1,
        condition: Mapping[str, Any] | None = None,
        told_by: str | None = None,
        seed: int = 0,
    ) -> None:
        common: dict[str, Any] = {
            "cache": cache,
            "cache_gb": cache_gb,
            "holdout": holdout,
            "caption_dropout": caption_dropout,
        }
        common |= {"condition": condition, "told_by": told_by}
        checked = check_sets(sets)
        self.parts = {name: _open(name, own, {**common, "seed": seed}) for name, own in checked.items()}
        self.shares = tuple(float(own.get("weight", 1)) for own in checked.values())
        self.manifest = _common_facts(self.parts)
        self.folder = next(iter(self.parts.values())).folder
        names = sorted({name for part in self.parts.values() for name in part.bucket_names})
        number = {name: place for place, name in enumerate(names)}
        self._names = names
        sizes = [len(part.train) for part in self.parts.values()]
        self.sets = np.repeat(np.arange(len(sizes), dtype=np.int16), sizes)
        self.buckets: NDArray[np.integer] = np.array(
            [number[name] for part in self.parts.values() for name in part.bucket_names], dtype=np.int32
        )
        self.weights: NDArray[np.float32] = np.concatenate([part.weights for part in self.parts.values()])
        self._first = np.cumsum([0, *sizes])
        self.train = np.arange(self._first[-1])
        self._drop_trained()
        self.heldout = np.arange(sum(len(part.heldout) for part in self.parts.values()))
        fingerprints = sorted((name, part.fingerprint) for name, part in self.parts.items())
        self.fingerprint = hashlib.sha256(json.dumps(fingerprints).encode()).hexdigest()
        self._say()

    @property
    def bucket_names(self) -> list[str]:
        """Bucket of each training sample, "FxHxW" in pixels."""
        return [self._names[bucket] for bucket in self.buckets]

    def load(self, samples: Sequence[int] | Indices, positions: Sequence[int] | Indices) -> Batch:
        """Training samples of one bucket, of any sets; `positions` seed their draws. Ids begin with the set's name."""
        numbers, places = np.asarray(samples), np.asarray(positions)
        owners, batches, order = self.sets[numbers], [], []
        for number, (name, part) in enumerate(self.parts.items()):
            own = np.flatnonzero(owners == number)
            if len(own):
                batches.append(_named(part.load(numbers[own] - self._first[number], places[own]), name))
                order.append(own)
        return _joined(batches, np.argsort(np.concatenate(order)))

    def heldout_batches(self, count: int) -> list[Batch]:
        """Held-out clips of each set that has any, one batch per bucket: `count` in all, at least one of a set.

        The positions of their batches number the clips of all indexes, one after another, also below.
        """
        return self._numbered(count, lambda part, own: part.heldout_batches(own))

    def train_batches(self, count: int) -> list[Batch]:
        """Training clips, chosen like the held-out ones."""
        return self._numbered(count, lambda part, own: part.train_batches(own))

    def examples(self, count: int) -> list[tuple[str, Bucket, Condition | None]]:
        """Examples of the sets in turn."""
        turns = itertools.zip_longest(*(part.examples(count) for part in self.parts.values()))
        return [example for turn in turns for example in turn if example is not None][:count]

    def groups_of(self, clips: Sequence[int]) -> list[int]:
        """The group of near-duplicate files that each clip was cut from."""
        return [part.groups_of([own])[0] for _, part, own in map(self._owner, clips)]

    def tags_of(self, clips: Sequence[int]) -> list[tuple[str, ...]]:
        """The tags of each clip, with the name of its set first, so that validation reports each set."""
        return [(name, *part.tags_of([own])[0]) for name, part, own in map(self._owner, clips)]

    def captions(self) -> list[str]:
        """Distinct captions of the sets in turn, as prompts for previews."""
        turns = itertools.zip_longest(*(part.captions() for part in self.parts.values()))
        return list(dict.fromkeys(caption for turn in turns for caption in turn if caption is not None))

    def _numbered(self, count: int, batches: Callable[[LatentData, int], list[Batch]]) -> list[Batch]:
        own, found, first = max(1, count // len(self.parts)) if count else 0, [], 0
        for name, part in self.parts.items():
            for batch in batches(part, own):
                places = tuple(first + place for place in batch.positions)
                found.append(replace(_named(batch, name), positions=places))
            first += len(part.index)
        return found

    def _owner(self, clip: int) -> tuple[str, LatentData, int]:
        """(name, data, own number) of the set that a clip belongs to."""
        for name, part in self.parts.items():
            if clip < len(part.index):
                return name, part, clip
            clip -= len(part.index)
        raise IndexError(clip)

    def _drop_trained(self) -> None:
        """Remove held-out clips of files that another set trains on."""
        for name, part in self.parts.items():
            trained = [other.index.source[other.train] for key, other in self.parts.items() if key != name]
            leaked = np.isin(part.index.source[part.heldout], np.concatenate([np.empty(0, np.uint64), *trained]))
            if leaked.any():
                say(f"data.sets.{name}: {leaked.sum()} held-out clips are trained on in another set: not validated")
                part.heldout = part.heldout[~leaked]

    def _say(self) -> None:
        whole, epoch = sum(self.shares), self.weights.sum()
        for share, (name, part) in zip(self.shares, self.parts.items(), strict=True):
            passes = share / whole * epoch / part.weights.sum()
            say(
                f"data.sets.{name}: {len(part.train)} clips, {share / whole:.1%} of the samples, {passes:.3g} passes "
                "an epoch"
            )


def check_sets(sets: Mapping[str, Mapping[str, Any]] | None) -> dict[str, dict[str, Any]]:
    """The settings of each set by name, checked before any is opened; ValueError names the wrong key and the fix."""
    if not isinstance(sets, Mapping) or not sets:
        raise ValueError("data=mixed needs sets: data.sets={cats: {shards: DIR, weight: 0.7}, dogs: {shards: DIR}}")
    allowed = {"weight", *inspect.signature(LatentData).parameters}
    for name, own in sets.items():
        if not isinstance(own, Mapping) or not own.get("shards"):
            raise ValueError(f"data.sets.{name}={own} has no shards; give data.sets.{name}={{shards: DIR}}")
        if wrong := sorted(set(own) - allowed):
            raise ValueError(
                f"data.sets.{name}.{wrong[0]} is not a setting of a set; choose from {', '.join(sorted(allowed))}"
            )
        weight = own.get("weight", 1)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise ValueError(f"data.sets.{name}.weight={weight} must be a number above 0")
    return {str(name): dict(own) for name, own in sets.items()}


def _open(name: str, own: Mapping[str, Any], common: Mapping[str, Any]) -> LatentData:
    try:
        return LatentData(**{**common, **{key: value for key, value in own.items() if key != "weight"}})
    except ValueError as error:
        raise ValueError(f"data.sets.{name}: {error}") from error


def _common_facts(parts: Mapping[str, LatentData]) -> dict[str, Any]:
    """The manifest fields that all sets share. ValueError names two sets that differ, the field, and the fix."""
    (first, one), *others = parts.items()
    for name, other in others:
        for key in COMMON:
            ours, theirs = one.manifest.get(key), other.manifest.get(key)
            if ours != theirs:
                raise ValueError(
                    f"data.sets: {first} and {name} were not encoded alike ({key} {ours} and {theirs}), so one model "
                    f"cannot learn from both; encode {name} again with the weights= and parts.*= that {first} was "
                    "encoded with: python encode.py"
                )
    # Any set's encoder files will do: the fingerprints, which are equal, are hashes of their weights.
    files = [part.manifest["encoders"] for part in parts.values() if "encoders" in part.manifest][:1]
    common = {key: one.manifest[key] for key in COMMON if key in one.manifest}
    return common | ({"encoders": files[0]} if files else {})


def _named(batch: Batch, name: str) -> Batch:
    return replace(batch, ids=tuple(f"{name}/{own}" for own in batch.ids))


def _joined(batches: list[Batch], order: Indices) -> Batch:
    """Concatenate batches of one shape, with the samples in `order`."""
    if len(batches) == 1:
        return batches[0]  # in order already
    ids = [name for batch in batches for name in batch.ids]
    positions = [position for batch in batches for position in batch.positions]
    texts = [text for batch in batches for text in batch.text_BLD]
    return Batch(
        torch.cat([batch.latents_BCTHW for batch in batches])[order],
        pad_texts([texts[place] for place in order]),
        tuple(ids[place] for place in order),
        tuple(positions[place] for place in order),
        _together([batch.mask_BT for batch in batches], order),
        _together([batch.condition_BCTHW for batch in batches], order),
    )


def _together(parts: Sequence[Tensor | None], order: Indices) -> Tensor | None:
    """Parts of several batches as one, in `order`; all have it, or none, since they have one model."""
    there = [part for part in parts if part is not None]
    return torch.cat(there)[order] if there else None
