"""Several folders of latents as one data set, with LatentData's methods.

The sets are numbered one after another, their buckets get common names, and the facts that they must share are
compared. sampler.py chooses the set of each sample.
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
from numpy.typing import NDArray

from wantrain.batch import Batch, joined
from wantrain.conditioning import ModelInputs
from wantrain.data.latents.loss_masks import MaskCounts
from wantrain.data.loading.dataset import LatentData
from wantrain.data.loading.dropout import Points
from wantrain.data.loading.schedule import read_schedule
from wantrain.data.loading.streams import Indices
from wantrain.data.loading.views import ClipView
from wantrain.data.remote import CACHE, LocalShards, Traffic
from wantrain.geometry import Bucket
from wantrain.util.console import say
from wantrain.util.numbers import is_number
from wantrain.util.renamed import new_key

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

    sets     by name: `shards`, `weight` (1 by default; a set's share is its weight over their sum), and settings of
             LatentData that differ for it. As an attribute: the set of each training sample
    shares   of the sets
    buckets  of each training sample: a number into the names of the buckets of all sets
    weights  how often each training sample is drawn relative to others of its set
    schedule  the sets' weights by step (schedule.py), in place of those in `sets`; as an attribute: its entries

    A held-out clip whose file another set trains on is left out of validation, with a message.
    """

    def __init__(
        self,
        *,
        sets: Mapping[str, Mapping[str, Any]] | None,
        schedule: Sequence[Mapping[str, Any]] | None = None,
        cache: str | Path = CACHE,
        cache_gb: float = 100.0,
        holdout: float = 0.05,
        caption_dropout: float | Points = 0.1,
        batch_size: int | None = 1,
        mask_types: Mapping[str, Any] | None = None,
        conditioning: str = "none",
        seed: int = 0,
    ) -> None:
        common: dict[str, Any] = {
            "cache": cache,
            "cache_gb": cache_gb,
            "holdout": holdout,
            "caption_dropout": caption_dropout,
            "batch_size": batch_size,
            "mask_types": mask_types,
            "conditioning": conditioning,
            "seed": seed,
        }
        settings = check_sets(sets)
        self.schedule = () if schedule is None else read_schedule(schedule, settings)
        self.parts = {name: _open(name, own, common) for name, own in settings.items()}
        self.shares = tuple(float(own.get("weight", 1)) for own in settings.values())
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
        self._first_clip = np.cumsum([0, *(len(part.index) for part in self.parts.values())])
        self.train = np.arange(self._first[-1])
        self._drop_trained()
        self.heldout = np.arange(sum(len(part.heldout) for part in self.parts.values()))
        fingerprints = sorted((name, part.fingerprint) for name, part in self.parts.items())
        self.fingerprint = hashlib.sha256(json.dumps(fingerprints).encode()).hexdigest()
        self._say()

    @property
    def bucket_names(self) -> list[str]:
        """The bucket of each training sample."""
        return [self._names[bucket] for bucket in self.buckets]

    def load(self, samples: Sequence[int] | Indices, positions: Sequence[int] | Indices) -> Batch:
        """Training samples of one bucket, of any sets, for positions in the run; ids begin with the set's name."""
        wanted, places = np.asarray(samples), np.asarray(positions)
        owners, batches, order = self.sets[wanted], [], []
        for number, part in enumerate(self.parts.values()):
            own = np.flatnonzero(owners == number)
            if len(own):
                batches.append(self._shared(number, part.load(wanted[own] - self._first[number], places[own])))
                order.append(own)
        if len(batches) == 1:
            return batches[0]  # in order already
        return joined(batches).take(np.argsort(np.concatenate(order)).tolist())

    def foresee(self, samples: Sequence[int] | Indices, positions: Sequence[int] | Indices) -> bool:
        """`load` will ask for these next: shards at addresses are fetched ahead. True if it helps to know of more."""
        drawn, places = np.asarray(samples), np.asarray(positions)
        remote, more = False, True
        for number, part in enumerate(self.parts.values()):
            if not isinstance(part.files, LocalShards):
                own = self.sets[drawn] == number
                remote = True
                more = part.foresee(drawn[own] - self._first[number], places[own]) and more
        return remote and more

    def traffic(self) -> list[Traffic]:
        """What was fetched for each set whose shards are at an address."""
        return [traffic for part in self.parts.values() for traffic in part.traffic()]

    def heldout_batches(self, count: int) -> list[Batch]:
        """Held-out clips of each set that has any, one batch per bucket: `count` in all, at least one of a set.

        `Batch.clips` number the clips of all sets, one set after another.
        """
        return self._of_each(count, lambda part, own: part.heldout_batches(own))

    def train_batches(self, count: int) -> list[Batch]:
        """As many training clips, chosen in the same manner."""
        return self._of_each(count, lambda part, own: part.train_batches(own))

    def examples(self, count: int) -> list[tuple[str, Bucket, ModelInputs]]:
        """The sets' examples, one of each set in turn."""
        turns = itertools.zip_longest(*(part.examples(count) for part in self.parts.values()))
        return [example for turn in turns for example in turn if example is not None][:count]

    def groups_of(self, clips: Sequence[int]) -> list[int]:
        """The group of similar files (duplicates.py) that each clip was cut from, as a number."""
        return [part.groups_of([own])[0] for _, part, own in map(self._owner, clips)]

    def tags_of(self, clips: Sequence[int]) -> list[tuple[str, ...]]:
        """The tags of each clip, the name of its set first, so that each set has its own validation loss."""
        return [(name, *part.tags_of([own])[0]) for name, part, own in map(self._owner, clips)]

    def captions(self) -> list[str]:
        """Distinct captions, one of each set in turn: prompts for previews."""
        turns = itertools.zip_longest(*(part.captions() for part in self.parts.values()))
        return list(dict.fromkeys(caption for turn in turns for caption in turn if caption is not None))

    def mask_counts(self) -> list[MaskCounts]:
        """The masks of each set."""
        return [replace(count, name=name) for name, part in self.parts.items() for count in part.mask_counts()]

    def view(self, name: str) -> ClipView | None:
        """A clip of a batch (`Batch.ids`) to look at; None if there is none of that name."""
        set_name, _, own = name.partition("/")
        return self.parts[set_name].view(own) if set_name in self.parts else None

    def _of_each(self, count: int, batches: Callable[[LatentData, int], list[Batch]]) -> list[Batch]:
        """Batches of every set, `count` clips in all."""
        own = max(1, count // len(self.parts)) if count else 0
        return [
            self._shared(number, batch)
            for number, part in enumerate(self.parts.values())
            for batch in batches(part, own)
        ]

    def _shared(self, number: int, batch: Batch) -> Batch:
        """A batch of one set, its ids and clips as they are among all sets."""
        name, first = list(self.parts)[number], int(self._first_clip[number])
        return replace(
            batch,
            ids=tuple(f"{name}/{own}" for own in batch.ids),
            clips=tuple(first + clip for clip in batch.clips),
            sets=(name,) * len(batch),
        )

    def _owner(self, clip: int) -> tuple[str, LatentData, int]:
        """A clip's set, and its number in there."""
        number = int(np.searchsorted(self._first_clip, clip, side="right")) - 1
        name, part = list(self.parts.items())[number]
        return name, part, clip - int(self._first_clip[number])

    def _drop_trained(self) -> None:
        """Leave out of validation the held-out clips whose file another set trains on."""
        for name, part in self.parts.items():
            trained = [other.index.source[other.train] for key, other in self.parts.items() if key != name]
            leaked = np.isin(part.index.source[part.heldout], np.concatenate([np.empty(0, np.uint64), *trained]))
            if leaked.any():
                say(f"data.sets.{name}: {leaked.sum()} held-out clips are trained on in another set: not validated")
                part.heldout = part.heldout[~leaked]

    def _say(self) -> None:
        if self.schedule:
            for name, part in self.parts.items():
                say(f"data.sets.{name}: {len(part.train)} clips")
            return
        whole, epoch = sum(self.shares), self.weights.sum()
        for share, (name, part) in zip(self.shares, self.parts.items(), strict=True):
            passes = share / whole * epoch / part.weights.sum()
            say(
                f"data.sets.{name}: {len(part.train)} clips, {share / whole:.1%} of the samples, {passes:.3g} passes "
                "an epoch"
            )


def check_sets(sets: Mapping[str, Mapping[str, Any]] | None) -> dict[str, dict[str, Any]]:
    """The settings of each set; ValueError names a wrong one, before any set is opened."""
    if not isinstance(sets, Mapping) or not sets:
        raise ValueError("data=mixed needs sets: data.sets={cats: {shards: DIR, weight: 0.7}, dogs: {shards: DIR}}")
    takes = {"weight", *inspect.signature(LatentData).parameters} - {"batch_size"}
    for name, own in sets.items():
        if not isinstance(own, Mapping) or not own.get("shards"):
            raise ValueError(f"data.sets.{name}={own} has no shards; give data.sets.{name}={{shards: DIR}}")
        if old := [key for key in own if new_key(f"data.sets.{name}.{key}") != f"data.sets.{name}.{key}"]:
            raise ValueError(f"data.sets.{name}.{old[0]} is now {new_key(f'data.sets.{name}.{old[0]}')}")
        if wrong := sorted(set(own) - takes):
            raise ValueError(
                f"data.sets.{name}.{wrong[0]} is not a setting of a set; choose from {', '.join(sorted(takes))}"
            )
        weight = own.get("weight", 1)
        if not (is_number(weight) and 0 < weight < float("inf")):
            raise ValueError(f"data.sets.{name}.weight={weight} must be a number above 0")
    return {str(name): dict(own) for name, own in sets.items()}


def _open(name: str, own: Mapping[str, Any], common: Mapping[str, Any]) -> LatentData:
    try:
        return LatentData(**{**common, **{key: value for key, value in own.items() if key != "weight"}})
    except ValueError as error:
        raise ValueError(f"data.sets.{name}: {error}") from error


def _common_facts(parts: Mapping[str, LatentData]) -> dict[str, Any]:
    """The facts that all manifests share. ValueError names two sets that differ, and the fix."""
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
