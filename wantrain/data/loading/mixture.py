"""Several sets of latents behind the face of one: what MixedData answers, LatentData would.

Which set a sample comes from is plan.py's business; here are the sets' numbers put after each other, their buckets
under common names, and what must be equal in all of them compared.
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

#: What the manifests of all sets must agree on: who made the latents and texts, and their geometry.
COMMON = (
    "vae_fingerprint",
    "text_encoder_fingerprint",
    "latent_channels",
    "temporal_stride",
    "spatial_stride",
    "text_dim",
)


class MixedData:
    """Sets of latent shards, each with a share of the samples. Same methods as LatentData.

    sets     given by name: `shards`, `weight` (1 unless given; a set's share is its weight over their sum), and
             whatever else of LatentData's settings is to differ for it; kept as the set of each training sample
    shares   of the sets
    buckets  of each training sample: a number into the names of the buckets of all sets
    weights  how often each comes beside others of its set

    Clips whose file another set trains on are no held-out clips: they are left out of validation, and that is said.
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
        told = check_sets(sets)
        self.parts = {name: _open(name, own, {**common, "seed": seed}) for name, own in told.items()}
        self.shares = tuple(float(own.get("weight", 1)) for own in told.values())
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
        told_apart = sorted((name, part.fingerprint) for name, part in self.parts.items())
        self.fingerprint = hashlib.sha256(json.dumps(told_apart).encode()).hexdigest()
        self._say()

    @property
    def bucket_names(self) -> list[str]:
        """The bucket of each training sample."""
        return [self._names[bucket] for bucket in self.buckets]

    def load(self, samples: Sequence[int] | Indices, positions: Sequence[int] | Indices) -> Batch:
        """Training samples of one bucket, of any sets, for places in the run; ids begin with the set's name."""
        wanted, places = np.asarray(samples), np.asarray(positions)
        owners, batches, order = self.sets[wanted], [], []
        for number, (name, part) in enumerate(self.parts.items()):
            own = np.flatnonzero(owners == number)
            if len(own):
                batches.append(_named(part.load(wanted[own] - self._first[number], places[own]), name))
                order.append(own)
        return _joined(batches, np.argsort(np.concatenate(order)))

    def heldout_batches(self, count: int) -> list[Batch]:
        """Held-out clips of each set that has any, one batch per bucket: `count` in all, at least one of a set.

        The positions of their batches number the clips of all indexes, one after another, also below.
        """
        return self._numbered(count, lambda part, own: part.heldout_batches(own))

    def train_batches(self, count: int) -> list[Batch]:
        """Training clips chosen alike."""
        return self._numbered(count, lambda part, own: part.train_batches(own))

    def examples(self, count: int) -> list[tuple[str, Bucket, Condition | None]]:
        """The sets' examples, taking turns."""
        turns = itertools.zip_longest(*(part.examples(count) for part in self.parts.values()))
        return [example for turn in turns for example in turn if example is not None][:count]

    def groups_of(self, clips: Sequence[int]) -> list[int]:
        """The group of files that look alike that each clip was cut from, as a number."""
        return [part.groups_of([own])[0] for _, part, own in map(self._owner, clips)]

    def tags_of(self, clips: Sequence[int]) -> list[tuple[str, ...]]:
        """The tags of each clip, the name of its set first: so a set's validation is told apart."""
        return [(name, *part.tags_of([own])[0]) for name, part, own in map(self._owner, clips)]

    def captions(self) -> list[str]:
        """Distinct captions, the sets' taking turns: prompts for previews."""
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
        """A clip's set, and its number in there."""
        for name, part in self.parts.items():
            if clip < len(part.index):
                return name, part, clip
            clip -= len(part.index)
        raise IndexError(clip)

    def _drop_trained(self) -> None:
        """Take held-out clips of which another set trains on the same file out of validation."""
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
    """The sets as they are told, if they can be; ValueError names the one that cannot, before any is opened."""
    if not isinstance(sets, Mapping) or not sets:
        raise ValueError("data=mixed needs sets: data.sets={cats: {shards: DIR, weight: 0.7}, dogs: {shards: DIR}}")
    known = {"weight", *inspect.signature(LatentData).parameters}
    for name, own in sets.items():
        if not isinstance(own, Mapping) or not own.get("shards"):
            raise ValueError(f"data.sets.{name}={own} has no shards; give data.sets.{name}={{shards: DIR}}")
        if wrong := sorted(set(own) - known):
            raise ValueError(f"data.sets.{name}.{wrong[0]} is no setting of a set; it takes {', '.join(sorted(known))}")
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
    """What all manifests say alike. ValueError names two sets that do not go together, and the fix."""
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
    # The files of one set's encoders are as good as another's, since their values are the same.
    files = [part.manifest["encoders"] for part in parts.values() if "encoders" in part.manifest][:1]
    common = {key: one.manifest[key] for key in COMMON if key in one.manifest}
    return common | ({"encoders": files[0]} if files else {})


def _named(batch: Batch, name: str) -> Batch:
    return replace(batch, ids=tuple(f"{name}/{own}" for own in batch.ids))


def _joined(batches: list[Batch], order: Indices) -> Batch:
    """Batches of one shape as one, its samples taken in `order`."""
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
