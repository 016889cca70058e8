"""Validation as a measurement: fixed clips, noises and noise levels, held against the base clip by clip.

Beside the loss stands the best linear predictor v = a(sigma) * x_sigma, fitted to these very clips and noises: a
model that is not below it has learned nothing but to copy noise. What a change is worth is bootstrap.py's to say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from wantrain.batch import AnyBatch
from wantrain.losses import ClipValidation
from wantrain.models import adapters
from wantrain.training.engine.engine import Stepper
from wantrain.training.expert import ExpertTrainer
from wantrain.training.protocols import due
from wantrain.training.validation.bootstrap import FEWEST_FILES, Change, change, contrast
from wantrain.training.validation.history import EvalHistory, EvalRecord, fingerprint
from wantrain.training.validation.measure import Clips, Evaluator, over_ranks
from wantrain.util.console import say

#: Tags that are reported apart, the most frequent first.
MOST_TAGS = 32


@dataclass
class Validator:
    """Hook: the mean velocity error over held-out clips and noise levels, every `every` steps and at the ends.

    Read are the weights that are shown (the average where one is kept), the live ones beside them, and once the base: a
    model with its adapter off, or as it was at step 0. `train` are as many training clips, for the gap. Where there are
    several validators, `prefix` tells their results apart.
    """

    kind: ClassVar[str] = "validation"
    trainer: ExpertTrainer
    evaluator: Evaluator
    heldout: Clips
    train: Clips
    history: EvalHistory
    every: int
    steps: int
    prefix: str = ""
    linear: Tensor | None = None
    early_stopping: EarlyStopping | None = None

    def due(self, step: int) -> bool:
        """True at the steps of `every` and at the last one."""
        return due(step, every=self.every, last=self.steps)

    def __call__(self, step: int) -> dict[str, Any]:
        if self.linear is None:
            self.linear = self.evaluator.linear(self.heldout.batches)
        early_stopping = self._early_stopping_at(step)
        shown, live = self._read(step)
        base = self._base(step, shown)
        early_stopping.see(shown)
        moved, moved_train = (shown.heldout - base.heldout).mean(dim=1), (shown.train - base.train).mean(dim=1)
        since = change(moved, self.heldout.files)
        gap = contrast(moved, self.heldout.files, moved_train, self.train.files)
        found = (
            self._results(shown, live, base) | _keys("validation_change", since) | _keys("validation_gap_change", gap)
        )
        found |= {"validation_verdict": since.verdict, "validation_stale": early_stopping.stale}
        self._say(shown, base, since, gap)
        return {f"{self.prefix}{key}": value for key, value in found.items()}

    def stale(self, step: int) -> int:
        """Validations in a row, up to `step`, that were not distinguishably better than the best before them."""
        return self._early_stopping_at(step + 1).stale

    @property
    def eval_key(self) -> str:
        """Fingerprint of what is measured: records of the same eval_key compare."""
        about = [self.evaluator.about] if self.evaluator.about else []
        return fingerprint(
            self.heldout.ids, self.train.ids, self.evaluator.sigmas.tolist(), self.evaluator.seed, *about
        )

    @property
    def _shown(self) -> str:
        """Which weights hooks see."""
        return "live" if self.trainer.ema is None else "ema"

    def _early_stopping_at(self, step: int) -> EarlyStopping:
        """The early stopping that the records before `step` lead to; at the first call later ones are dropped."""
        if self.early_stopping is None:
            self.history.cut_back(self.trainer.name, step)
            self.early_stopping = EarlyStopping(self.heldout.files)
            for record in self.history.of(self.trainer.name, self._shown, self.eval_key):
                self.early_stopping.see(record)
        return self.early_stopping

    def _read(self, step: int) -> tuple[EvalRecord, EvalRecord | None]:
        """Records of the shown weights, and of the live ones where those are others."""
        shown = self._reading(step, self._shown)
        if self.trainer.ema is None:
            return shown, None
        if not self.trainer.ema.moved:
            return shown, self._same(shown, "live")
        with self.trainer.live_weights():
            return shown, self._reading(step, "live")

    def _base(self, step: int, shown: EvalRecord) -> EvalRecord:
        """What later records are compared with: the base, measured once and kept, or else the first record."""
        module = self.trainer.stepper.module
        if not adapters.has_adapter(module):
            return self.history.of(self.trainer.name, self._shown, self.eval_key)[0]
        stored = self.history.of(self.trainer.name, "base", self.eval_key)
        if stored:
            return stored[0]
        if not self._changes_anything():
            return self._same(shown, "base")
        with adapters.switched_off(module):
            return self._reading(step, "base")

    def _changes_anything(self) -> bool:
        """False if the adapter adds nothing to its base: all B of a LoRA, or w2 of a LoKr, are zero, in all processes.

        A DoRA has lengths too, which are never zero: it is measured.
        """
        stepper = self.trainer.stepper
        parts = [part for name, part in stepper.local_parts().items() if adapters.adds_by_itself(name)]
        found = torch.stack([part.any().to(stepper.device) for part in parts]).any()
        return bool(stepper.gather(found.float()[None]).any())

    def _same(self, record: EvalRecord, weights: str) -> EvalRecord:
        """The same errors for other weights that give the same answers: they are not measured again."""
        same = replace(record, weights=weights)
        self.history.add(same)
        return same

    def _reading(self, step: int, weights: str) -> EvalRecord:
        errors = self.evaluator.errors([*self.heldout.batches, *self.train.batches])
        heldout, train = errors.split([len(self.heldout), len(self.train)])
        record = EvalRecord(step, self.trainer.name, weights, self.eval_key, heldout, train)
        self.history.add(record)
        return record

    def _results(self, shown: EvalRecord, live: EvalRecord | None, base: EvalRecord) -> dict[str, Any]:
        """What is logged; see docs/numerics.md for the keys."""
        assert self.linear is not None
        moved = shown.heldout - base.heldout
        found: dict[str, Any] = {
            "validation_loss": shown.heldout.mean().item(),
            "validation_by_sigma": self._by_sigma(shown.heldout),
            "validation_linear": self.linear.mean().item(),
            "validation_linear_by_sigma": self._by_sigma(self.linear[None]),
            "validation_change_by_sigma": self._by_sigma(moved),
            "validation_train_loss": shown.train.mean().item(),
            "validation_gap": (shown.heldout.mean() - shown.train.mean()).item(),
        }
        if live is not None:
            found |= {
                "validation_live_loss": live.heldout.mean().item(),
                "validation_live_by_sigma": self._by_sigma(live.heldout),
                **_keys(
                    "validation_live_change", change((live.heldout - base.heldout).mean(dim=1), self.heldout.files)
                ),
            }
        if tags := self._by_tag(shown.heldout.mean(dim=1), moved.mean(dim=1)):
            found["validation_by_tag"] = tags
        return found

    def _by_sigma(self, errors: Tensor) -> dict[str, float | None]:
        """Mean over clips at each level, by the level."""
        means = errors.mean(dim=0).tolist()
        return {
            f"{sigma:.4f}": _number(mean) for sigma, mean in zip(self.evaluator.sigmas.tolist(), means, strict=True)
        }

    def _by_tag(self, losses: Tensor, moved: Tensor) -> dict[str, dict[str, Any]]:
        """Loss and change of the held-out clips with a tag."""
        wearing: dict[str, list[int]] = {}
        for number, tags in enumerate(self.heldout.tags):
            for tag in dict.fromkeys(tags):
                wearing.setdefault(tag, []).append(number)
        most = sorted(wearing, key=lambda tag: (-len(wearing[tag]), tag))[:MOST_TAGS]
        return {tag: self._of_some(wearing[tag], losses, moved) for tag in most}

    def _of_some(self, clips: Sequence[int], losses: Tensor, moved: Tensor) -> dict[str, Any]:
        since = change(moved[clips], [self.heldout.files[clip] for clip in clips])
        return {"clips": len(clips), "loss": _number(losses[clips].mean().item()), **_keys("change", since)}

    def _say(self, shown: EvalRecord, base: EvalRecord, since: Change, gap: Change) -> None:
        """One line for people: the loss, if it is better, worse or neither, and if training clips gain more."""
        assert self.linear is not None
        line = f"step {shown.step}: {self.prefix}validation loss {shown.heldout.mean():.4f}"
        line += f" (best linear predictor {self.linear.mean():.4f})"
        if shown is not base and shown.step:
            origin = "the base" if base.weights == "base" or base.step == 0 else f"step {base.step}"
            line += f": {since.verdict} {'than' if since.distinct else 'from'} {origin} ({since})"
        if gap.distinct and gap.mean > 0:
            line += f"; it does better on what it trains on, by {gap.mean:.4f} more than at first"
        say(line)


@dataclass
class EarlyStopping:
    """How many records in a row were not distinguishably better than the best one before them."""

    files: Sequence[int]
    best: EvalRecord | None = None
    stale: int = 0

    def see(self, record: EvalRecord) -> None:
        """The next one."""
        if self.best is None or self._is_better(record, self.best):
            self.best, self.stale = record, 0
        else:
            self.stale += 1

    def _is_better(self, record: EvalRecord, best: EvalRecord) -> bool:
        since = change((record.heldout - best.heldout).mean(dim=1), self.files)
        return since.distinct and since.mean < 0


def should_stop(validators: Sequence[Validator], most_stale: int | None, step: int) -> bool:
    """True if a run may end at `step`: each validator's last `most_stale` validations found nothing better."""
    if most_stale is None or not all(validator.stale(step) >= most_stale for validator in validators):
        return False
    say(
        f"step {step}: {most_stale} validations in a row were not distinguishably better than the best before them, so "
        f"the run ends here (validation.early_stopping_patience={most_stale})"
    )
    return True


def describe(heldout: Clips, train: Clips, cost: str) -> str:
    """What validation measures, and what it costs."""
    files = len(set(heldout.files))
    line = f"validation: {len(heldout)} held-out clips of {files} files and {len(train)} training clips; {cost}"
    if files < FEWEST_FILES:
        line += (
            f"; with fewer than {FEWEST_FILES} files no change can be distinguished from chance: raise data.holdout or "
            "validation.clips"
        )
    return line


def _keys(name: str, found: Change) -> dict[str, float | None]:
    """A change as flat keys of a log."""
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high, f"{name}_p": found.p}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass
class ClipValidator:
    """Hook: the score of held-out clips, for a loss without noise levels (a VAE's PSNR)."""

    kind: ClassVar[str] = "validation"
    stepper: Stepper
    validation: ClipValidation
    clips: Sequence[AnyBatch]
    every: int
    steps: int

    def due(self, step: int) -> bool:
        """True at every `every`-th step and the last one, if there are clips."""
        return bool(self.clips) and due(step, every=self.every, last=self.steps)

    def __call__(self, step: int) -> dict[str, Any]:
        with torch.no_grad(), self.stepper.forward_context():
            errors = over_ranks(self.clips, self._error, self.stepper)
        score = self.validation.score(errors).item()
        say(f"step {step}: validation {self.validation.name.upper()} {score:.2f} {self.validation.unit}")
        return {f"validation_{self.validation.name}": score}

    def _error(self, clip: AnyBatch) -> Tensor:
        """The error of one clip, a scalar."""
        return self.validation.error(self.stepper.module, clip.to(self.stepper.device))[0]
