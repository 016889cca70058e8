"""The planned run: the product's planner for a recipe on all cards, without weights, data or a network."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from scale_parts.assumptions import Assumptions
from wantrain import config, geometry
from wantrain.models.formats.weights import SHARD_BYTES
from wantrain.training.planning.estimate import checkpoint_bytes
from wantrain.training.planning.forecast import Forecast
from wantrain.training.planning.outline import Clips
from wantrain.training.planning.planner import Planner
from wantrain.training.planning.search import Case, fits
from wantrain.util.cards import Card, find_card

#: All weights of the high-noise expert.
WORDS = ("model=t2v_a14b", "expert=high_noise", "recipe=full_14b_8x80gb")
ENGINE, STRIDES = "fsdp2", (4, 8)


@dataclass(frozen=True)
class Step:
    """One optimizer step as the planner sees it.

    clips, tokens  of one card
    compute   seconds of a card's own work (a roofline)
    exchange  seconds in which the engine gathers weights and sums gradients, if nothing computes meanwhile
    memory    bytes on the card;  host  pinned bytes beside it
    """

    bucket: str
    clips: int
    tokens: int
    compute: float
    exchange: float
    memory: float
    host: float
    fits: bool

    @property
    def least(self) -> float:
        """Seconds where all exchange happens beside computation."""
        return max(self.compute, self.exchange)

    @property
    def most(self) -> float:
        """Seconds where none does."""
        return self.compute + self.exchange


class Cluster:
    """A run on so many cards: by default on all of them the one of WORDS."""

    def __init__(self, taken: Assumptions, words: Sequence[str] = WORDS, *, cards: int | None = None) -> None:
        self.taken, self.words, self.cards = taken, words, cards or taken.processes
        self.card: Card = find_card(taken.card)
        self.forecast = self._forecast()
        self.planner = self._planner(self.forecast)

    @property
    def checkpoint(self) -> dict[str, float]:
        """Bytes of a checkpoint by part."""
        parts = checkpoint_bytes(self.forecast.modules, self.forecast.kept)
        return {name: float(size) for name, size in parts.items()}

    def _forecast(self, *words: str) -> Forecast:
        with processes(self.cards):
            return config.forecast(config.compose("train", [*self.words, f"batch_size={self.cards}", *words]))

    @staticmethod
    def _planner(forecast: Forecast) -> Planner:
        planner = forecast.planner(ENGINE)
        assert planner is not None
        return planner

    def step(self, bucket: str, clips: int) -> Step:
        """A step in which each card has so many clips of a bucket, in one pass."""
        case = only(self.planner.cases(clips_of([bucket], clips), bucket))
        return self._step(case, bucket, clips)

    def steps(self, buckets: Sequence[str], clips: int) -> dict[str, Step]:
        """The same for each bucket of a mix; the smallest and the largest are traced, others lie between."""
        cases = self.planner.all_cases(clips_of(buckets, clips))
        return {bucket: self._step(only(case), bucket, clips) for bucket, case in cases.items()}

    def pack(self, largest: str) -> tuple[Planner, Case]:
        """The planner of packs of `pass_tokens`, and its case."""
        planner = self._planner(self._forecast("batch_size=null", f"batch_tokens={self.taken.pass_tokens}"))
        return planner, only(planner.cases(Clips(Counter([largest]), STRIDES, None), largest))

    def exchange(self, case: Case) -> float:
        """Seconds of FSDP2's exchange in a step of one pass: a gather for the forward and one for the backward, in
        bfloat16 but for what stays float32, and sums of gradients in float32. Each card receives all of it.
        """
        sizes = case.sizes
        gathered = 2.0 * (sizes.trained - sizes.fp32) + 4.0 * sizes.fp32
        return (2 * gathered + 4.0 * sizes.trained) / self.taken.exchange

    def _step(self, case: Case, bucket: str, clips: int) -> Step:
        memory = case.plan(self.planner.asked)
        return Step(
            bucket,
            clips,
            clips * tokens_of(bucket),
            case.seconds(self.planner.asked, self.card),
            self.exchange(case),
            memory.device,
            memory.host,
            fits(memory, self.card),
        )

    def clips_of_pass(self, bucket: str) -> int:
        """How many clips of a bucket a card takes in one pass."""
        return max(1, self.taken.pass_tokens // tokens_of(bucket))


def clips_of(buckets: Sequence[str], clips: int) -> Clips:
    """Clips of these buckets, so many in a pass."""
    return Clips(Counter(buckets), STRIDES, None, dict.fromkeys(buckets, clips))


def seconds_of(planner: Planner, case: Case, card: Card, work: Any) -> float:
    """Seconds of a pass with this work; its memory traffic is that of the full pack."""
    return replace(case, work=work).seconds(planner.asked, card)


def largest_file(parts: Mapping[str, float]) -> float:
    """Bytes of the largest file of a checkpoint."""
    return min(float(SHARD_BYTES), max(parts.values()))


def tokens_of(bucket: str) -> int:
    """Tokens of one clip of a bucket."""
    return geometry.num_tokens(geometry.latent_shape(geometry.Bucket(*map(int, bucket.split("x"))), *STRIDES))


def only(cases: Mapping[str, Case]) -> Case:
    """The case of the one expert."""
    (case,) = cases.values()
    return case


@contextmanager
def processes(count: int) -> Iterator[None]:
    """Settings are composed as if so many processes were started."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(count)
    try:
        yield
    finally:
        if before is None:
            del os.environ["WORLD_SIZE"]
        else:
            os.environ["WORLD_SIZE"] = before
