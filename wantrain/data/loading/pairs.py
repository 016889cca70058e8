"""Preference pairs over latent shards: a table names two clips of one prompt and size, the better one first."""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wantrain.batch import Batch
from wantrain.data.footage.captions import read_text
from wantrain.data.loading.dataset import LatentData
from wantrain.data.loading.dropout import Points
from wantrain.data.loading.holdout import split_groups
from wantrain.data.loading.sampler import Indices
from wantrain.data.remote import CACHE
from wantrain.data.shards import file_hash

#: Columns of the table; others are not read.
COLUMNS = ("winner", "loser")
#: Problems of a table that one message lists.
SHOWN = 5


class Row(NamedTuple):
    """A row of the table: its line, and the names of two clips."""

    line: int
    winner: str
    loser: str


class PairData(LatentData):
    """LatentData whose samples are pairs of its clips: a `Batch` holds the winners, its `losers` the losers.

    pairs   a .csv with the columns winner and loser. A clip is named by the file that it was cut from, relative to its
            footage, or, where a file has several, by its name in the shards (`Batch.ids`)
    train, losers  clip numbers of each training pair's winner and loser
    heldout        clip numbers of the winners of held-out pairs, which validation measures

    A pair's prompt is its winner's caption; the loser's is not used. Pairs that share a file, or files that look alike,
    are held out together, so that no clip of a held-out pair is trained on.
    """

    def __init__(
        self,
        *,
        pairs: str | Path | None,
        shards: str | Path,
        cache: str | Path = CACHE,
        cache_gb: float = 100.0,
        holdout: float = 0.05,
        caption_dropout: float | Points = 0.1,
        batch_size: int | None = 1,
        mask_types: Mapping[str, Any] | None = None,
        conditioning: str = "none",
        seed: int = 0,
    ) -> None:
        if pairs is None:
            raise ValueError("data=pairs needs a table of pairs; give data.pairs=FILE, with the columns winner,loser")
        super().__init__(
            shards=shards,
            cache=cache,
            cache_gb=cache_gb,
            holdout=0.0,
            caption_dropout=caption_dropout,
            batch_size=batch_size,
            mask_types=mask_types,
            conditioning=conditioning,
            seed=seed,
        )
        self.table = Path(pairs).expanduser()
        winners, losers = self._find(read_rows(self.table)).T
        self.fingerprint = hashlib.sha256(f"{self.fingerprint} {file_hash(self.table)}".encode()).hexdigest()
        train, held = split_groups(connected(self.index.group[winners], self.index.group[losers]), holdout, seed)
        self.train, self.losers = winners[train], losers[train]
        self.heldout = np.array(list(dict.fromkeys(winners[held].tolist())), dtype=np.int64)
        self.buckets, self.weights = self.index.bucket[self.train], self.index.weight[self.train]

    def load(self, samples: Sequence[int] | Indices, positions: Sequence[int] | Indices) -> Batch:
        """Training pairs of one bucket. Winner and loser draw window and mask by the same position."""
        batch = super().load(samples, positions)
        clips, places = [int(self.losers[sample]) for sample in samples], [int(place) for place in positions]
        windows = [
            self._drawn(self.index.windows_of(clip), "window", place) for clip, place in zip(clips, places, strict=True)
        ]
        losers = self._batch(clips, windows, list(batch.text_BLD), draws=places, positions=places)
        return replace(batch, losers=losers)

    def foresee(self, samples: Sequence[int] | Indices, positions: Sequence[int] | Indices) -> bool:
        """`load` will ask for these next: the shards of winners and losers are fetched ahead."""
        clips = [int(own[sample]) for own in (self.train, self.losers) for sample in samples]
        return self._foresee(clips, [int(place) for place in positions] * 2)

    def _find(self, rows: Sequence[Row]) -> NDArray[np.int64]:
        """The clip numbers of each pair, (P, 2). ValueError lists the rows that are no pair of clips."""
        found, seen, problems = list[tuple[int, int]](), dict[frozenset[int], int](), list[str]()
        for row in rows:
            try:
                pair = self._clip(row.winner), self._clip(row.loser)
                self._check(pair, row, seen)
            except ValueError as error:
                problems.append(f"line {row.line}: {error}")
                continue
            seen[frozenset(pair)] = row.line
            found.append(pair)
        if problems:
            more = f" (and {len(problems) - SHOWN} more)" if len(problems) > SHOWN else ""
            raise ValueError(f"data.pairs={self.table}: {'; '.join(problems[:SHOWN])}{more}")
        return np.array(found, dtype=np.int64)

    def _check(self, pair: tuple[int, int], row: Row, seen: Mapping[frozenset[int], int]) -> None:
        """ValueError unless the two clips can be compared, and were not before."""
        winner, loser = pair
        if winner == loser:
            raise ValueError(f"{row.winner} is winner and loser; name two clips, or remove the line")
        if frozenset(pair) in seen:
            raise ValueError(
                f"line {seen[frozenset(pair)]} compares {row.winner} and {row.loser} already; remove one of them"
            )
        sizes = [str(self._bucket(clip)) for clip in pair]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{row.winner} is {sizes[0]}, {row.loser} is {sizes[1]}, and the two share their noise; make both in "
                "one size, or remove the line"
            )

    def _clip(self, name: str) -> int:
        """The number of the clip that a name of the table means."""
        window = self.index.window(name)
        if window is not None:
            return self.index.clip_of(window)
        clips = self._by_file.get(name, [])
        if len(clips) > 1:
            names = ", ".join(self.index.name(self.index.windows_of(clip)[0]) for clip in clips[:3])
            raise ValueError(f"{name} has {len(clips)} clips; name one of them: {names}...")
        if not clips:
            near = difflib.get_close_matches(name, self._by_file, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"{name} is none of the {len(self._by_file)} files of {self.folder}, where rejects and copies of other "
                f"files are left out{hint}"
            )
        return clips[0]

    @cached_property
    def _by_file(self) -> dict[str, list[int]]:
        """The clips of each file, by its name."""
        found: dict[str, list[int]] = {}
        for clip in range(len(self.index)):
            found.setdefault(self._file_of(clip), []).append(clip)
        return found


def read_rows(table: Path) -> list[Row]:
    """The rows of a table of pairs; ValueError if it is absent, has other columns or no row."""
    if not table.is_file():
        raise ValueError(f"data.pairs={table} is not there; give a .csv with the columns {','.join(COLUMNS)}")
    reader = csv.DictReader(io.StringIO(read_text(table), newline=""))
    absent = [key for key in COLUMNS if key not in (reader.fieldnames or ())]
    if absent:
        raise ValueError(f"data.pairs={table} has no column {' and '.join(absent)}; its first line must name both")
    rows = [Row(reader.line_num, *((row[key] or "").strip() for key in COLUMNS)) for row in reader]
    if empty := next((row for row in rows if not (row.winner and row.loser)), None):
        raise ValueError(f"data.pairs={table} line {empty.line} names only one clip; give a winner and a loser")
    if not rows:
        raise ValueError(f"data.pairs={table} holds no pair; write one per line")
    return rows


def connected(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Of pairs of groups: the same number for pairs that share a group, directly or through others."""
    parents: dict[int, int] = {}

    def root(group: int) -> int:
        while parents.setdefault(group, group) != group:
            parents[group] = group = parents[parents[group]]
        return group

    pairs = list(zip(one.tolist(), other.tolist(), strict=True))
    for left, right in pairs:
        low, high = sorted((root(left), root(right)))
        parents[high] = low
    return np.array([root(left) for left, _ in pairs], dtype=np.uint64)
