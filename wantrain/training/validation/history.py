"""validation.jsonl: every validation error, clip by clip, which later validations are compared with.

Records compare only where the same was measured: their eval_key is a fingerprint of clips, noise levels and seed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wantrain.training.engine.main_process import on_main
from wantrain.util import distributed
from wantrain.util.console import say
from wantrain.util.files import write_atomically
from wantrain.util.renamed import EVAL_RECORD, upgraded_fields


@dataclass(frozen=True)
class EvalRecord:
    """Errors at one step: each (N clips, P noise levels), float64.

    expert    name of the expert
    weights   live, ema or base
    eval_key  fingerprint of what was measured, and at which noise
    """

    step: int
    expert: str
    weights: str
    eval_key: str
    heldout: Tensor
    train: Tensor


class EvalHistory:
    """All records of a run, in its file and in memory. The main process alone reads and writes the file, and at the
    start sends its content to the others: if one saw another file, it would validate at other steps.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.all = path, on_main(partial(_read, path), f"reading {path.name}")

    def of(self, expert: str, weights: str, eval_key: str) -> list[EvalRecord]:
        """The records of one expert that compare with each other, in the order of their steps."""
        return [one for one in self.all if (one.expert, one.weights, one.eval_key) == (expert, weights, eval_key)]

    def add(self, record: EvalRecord) -> None:
        """Append a record."""
        self.all.append(record)
        self._write("a", [record])

    def cut_back(self, expert: str, step: int) -> None:
        """Drop what an expert's validation read at `step` or later, in an earlier life of the run."""
        kept = [one for one in self.all if one.expert != expert or one.step < step]
        if len(kept) < len(self.all):
            self.all = kept
            self._write("w", kept)

    def _write(self, mode: str, records: Sequence[EvalRecord]) -> None:
        """A record that the disk refuses stays in memory: a log never ends a run."""
        if not distributed.is_main():
            return
        text = "".join(json.dumps(_plain(record)) + "\n" for record in records)
        try:
            if mode == "w":
                write_atomically(self.path, text)
                return
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            say(f"warning: {self.path} cannot be written ({error}); free disk space")


def fingerprint(*parts: object) -> str:
    """A short hash of what a record depends on besides the weights."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _plain(record: EvalRecord) -> Mapping[str, Any]:
    return {key: value.tolist() if isinstance(value, Tensor) else value for key, value in vars(record).items()}


def _read(path: Path) -> list[EvalRecord]:
    """What a file holds; a line that a kill has cut counts for nothing."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with suppress(ValueError):
            row = upgraded_fields(json.loads(line), EVAL_RECORD)
            row |= {key: torch.tensor(row[key], dtype=torch.float64) for key in ("heldout", "train")}
            found.append(EvalRecord(**row))
    return found
