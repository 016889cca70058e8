"""TrainingData: everything that training uses of a data set. LatentData, MixedData and PixelData satisfy it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from wantrain.batch import AnyBatch
from wantrain.conditioning import ModelInputs
from wantrain.data.latents.loss_masks import MaskCounts
from wantrain.data.loading.schedule import Entry
from wantrain.data.loading.streams import Indices
from wantrain.data.loading.views import ClipView
from wantrain.data.remote import Traffic
from wantrain.geometry import Bucket

AnyBatch_co = TypeVar("AnyBatch_co", bound=AnyBatch, covariant=True)


class TrainingData(Protocol[AnyBatch_co]):
    """Samples by number, grouped into buckets of one shape, and batches to validate on.

    Samples are numbered from 0 to N - 1; `load` and the order of training (BatchSampler) use these numbers. Validation
    batches hold clips, whose numbers `groups_of` and `tags_of` take.
    """

    @property
    def fingerprint(self) -> str:
        """A hash that changes with the data; a run that resumes compares it."""

    @property
    def folder(self) -> Path:
        """The local folder of the manifest."""

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The manifest; of several sets, the fields that all have in common."""

    @property
    def buckets(self) -> NDArray[np.integer]:
        """(N,) bucket number of each sample."""

    @property
    def bucket_names(self) -> list[str]:
        """Bucket of each sample, "FxHxW" in pixels."""

    @property
    def weights(self) -> NDArray[np.float32] | None:
        """(N,) sampling weight of each sample; None: all equal."""

    @property
    def sets(self) -> NDArray[np.integer] | None:
        """(N,) set number of each sample; None: one set."""

    @property
    def shares(self) -> Sequence[float]:
        """Share of each set, in any unit."""

    @property
    def schedule(self) -> Sequence[Entry]:
        """The sets' weights by step; empty: `shares` at every step."""

    def load(self, samples: Sequence[int] | Indices, positions: Sequence[int] | Indices) -> AnyBatch_co:
        """Samples of one bucket, by number; `positions` are their places in the run, which seed their randomness."""

    def foresee(self, samples: Sequence[int] | Indices, positions: Sequence[int] | Indices) -> bool:
        """`load` will ask for these next, by this process; True if it helps to know of more."""

    def traffic(self) -> Sequence[Traffic]:
        """What was fetched from addresses so far."""

    def heldout_batches(self, count: int) -> Sequence[AnyBatch_co]:
        """At most `count` held-out clips, one batch per bucket."""

    def train_batches(self, count: int) -> Sequence[AnyBatch_co]:
        """At most `count` training clips, chosen like the held-out ones, one batch per bucket."""

    def captions(self) -> list[str]:
        """Distinct captions, as prompts for previews; those of held-out clips first."""

    def examples(self, count: int) -> list[tuple[str, Bucket, ModelInputs]]:
        """At most `count` clips for previews: caption, size, conditioning."""

    def groups_of(self, clips: Sequence[int]) -> list[int]:
        """The group of near-duplicate files that each clip was cut from."""

    def tags_of(self, clips: Sequence[int]) -> list[tuple[str, ...]]:
        """The tags of each clip."""

    def mask_counts(self) -> Sequence[MaskCounts]:
        """The masks beside the clips of each set, which may weigh the loss; empty for data that cannot have any."""

    def view(self, name: str) -> ClipView | None:
        """A clip of a batch, by its id, to look at; None if it cannot be shown."""
