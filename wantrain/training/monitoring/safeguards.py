"""Safeguards: always on, each for one way in which a run can go wrong without an error.

draw      every noise level lies in the expert's window
ranks     in the first step no two samples of a batch share their position or their noise, and processes that share
          tokens have the same ones; after it the gradients (DDP) and the weights (where each process has all of them)
          are the same on every rank
moves     the first step moves something that is trained; for a LoRA the log names a B that has not moved
gradient  non-finite gradients skip the step, on every rank, and are recorded; `max_skipped_steps` in a row end the run
spike     a batch with a loss `spike` times the usual one for its noise levels is reported and recorded; at `refuse`
          times the step is skipped, on every rank
unlearning  a preference run that gets worse at the winners themselves is reported, and ended (unlearning.py)

Records go to safeguards.jsonl in the run's folder: each rank's own samples with their noise levels; the noise itself is
a function of (seed, "noise", position). The first three raise ValueError.

Whether a step moves the weights is decided on the device, in that step. Where the optimizer can take that from there,
the host hears of it one step later, so that it never waits for the device; where it cannot, the host reads it at once.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wantrain.batch import AnyBatch, PackedBatch
from wantrain.losses import Draws, Loss
from wantrain.models.adapters import is_zero_at_start
from wantrain.training.engine.engine import Stepper
from wantrain.training.expert import ExpertTrainer
from wantrain.training.monitoring.loss_baseline import LossBaseline
from wantrain.training.monitoring.unlearning import Unlearning
from wantrain.util import distributed
from wantrain.util.console import say
from wantrain.util.copy_stream import Readback


@dataclass
class Safeguards:
    """The safeguards of a run; `step` goes around each of its steps.

    path               safeguards.jsonl
    max_skipped_steps  skipped steps in a row that end the run
    spike              how many times the usual loss is reported; None: none is
    refuse             how many times the usual loss skips the step; None: none does
    unlearning         watches the winners of a preference run
    """

    path: Path
    max_skipped_steps: int = 3
    spike: float | None = 10.0
    refuse: float | None = 100.0
    unlearning: Unlearning = field(default_factory=Unlearning)
    skipped: int = 0
    proved: set[str] = field(default_factory=set)  # experts whose first step was right
    baselines: dict[str, LossBaseline] = field(default_factory=dict)
    unheard: StepGuard | None = None  # of the last step, if the host has not heard of it

    def __enter__(self) -> Safeguards:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(Exception) if kind is not None else nullcontext():  # after an error that one goes on
            self.hear()

    @contextmanager
    def step(self, trainer: ExpertTrainer, step: int) -> Iterator[StepGuard]:
        """Around the optimizer step of `trainer` that brings the run to `step`."""
        guard = StepGuard(self, trainer, step)
        yield guard
        guard.check_update()

    def hear(self) -> int | None:
        """Hear of the last step, if that has not happened: before a line of the log, and before a checkpoint.

        Returns the signal that any rank had received then. ValueError as StepGuard.hear.
        """
        guard, self.unheard = self.unheard, None
        return None if guard is None else guard.hear()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the usual losses and what watches the winners, by expert."""
        usual = {name: [own.means.tolist(), own.counts.tolist()] for name, own in self.baselines.items()}
        return {"loss_baselines": usual, "unlearning": self.unlearning.state()}

    def restore(self, state: Mapping[str, Any], trainers: Mapping[str, ExpertTrainer]) -> None:
        """Go on from a `state`, among what else a checkpoint holds; what an older one lacks is learned anew."""
        self.unlearning.restore(state.get("unlearning", {}))
        for name, columns in state.get("loss_baselines", {}).items():
            baseline = self.baseline(trainers[name])
            baseline.means, baseline.counts = (torch.tensor(column, dtype=torch.float64) for column in columns)

    def baseline(self, trainer: ExpertTrainer) -> LossBaseline:
        """The usual losses of an expert, whose loss has noise levels."""
        assert trainer.loss.window is not None
        return self.baselines.setdefault(trainer.name, LossBaseline(trainer.loss.window))

    def record(self, row: Mapping[str, Any]) -> None:
        """Append a line to safeguards.jsonl; one write, so that ranks append beside each other. A log never ends a run:
        what the disk refuses is on the console alone.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            say(f"warning: {self.path} cannot be written ({error}); free disk space. It would say {json.dumps(row)}")


class Verdict(NamedTuple):
    """What becomes of a step: whether the weights move, as Stepper.step takes it; and the signal that any rank has
    received (None: none), in this step, or in the one before where this one is not heard of yet.
    """

    update: bool | Tensor
    signal: int | None


class StepGuard:
    """The safeguards of one step: `observe` each micro-step, backward what `checked` gives, then ask for the `verdict`.

    What the host needs of the device is one readback, which `hear` waits for.
    """

    def __init__(self, safeguards: Safeguards, trainer: ExpertTrainer, step: int) -> None:
        self.safeguards, self.trainer, self.stepper, self.step = safeguards, trainer, trainer.stepper, step
        self.samples: list[dict[str, Any]] = []  # of this rank: id, position, noise level
        self.noises: list[int] = []
        self.sigmas: list[Tensor] = []
        self.losses: list[Tensor] = []  # of this rank, on the device
        self.most = 0  # samples of any rank in this step, where ranks have different numbers of them
        self.over_base: list[Tensor] = []  # likewise: logarithms of the losses over the base's, where there are any
        self.everyone: Tensor | None = None  # noise levels and losses of all ranks, (samples, 2)
        self.excess: Tensor | None = None  # how many times the usual this step's losses are, over all ranks
        self.readback: Readback | None = None
        self.times_usual = math.nan
        self.updated = False
        self.first = trainer.name not in safeguards.proved
        self.before = digests(self.stepper) if self.first else {}

    def observe(self, batch: AnyBatch, draws: Draws, loss: Loss) -> None:
        """One micro-step: its samples, what they drew (on the host), and their losses (on the device).

        ValueError for a noise level outside the window.
        """
        rows: list[dict[str, Any]] = [
            {"id": name, "position": position} for name, position in zip(batch.ids, batch.positions, strict=True)
        ]
        if draws.sigma is not None and loss.sigma is not None:
            self._check_window(draws.sigma)
            for row, sigma in zip(rows, draws.sigma.tolist(), strict=True):
                row["sigma"] = sigma
            self.sigmas.append(loss.sigma.detach())
        self.losses.append(loss.per_sample.detach())
        if loss.over_base is not None:
            self.over_base.append(loss.over_base.log())
        self.samples += rows
        if isinstance(batch, PackedBatch):
            self.most = batch.most
        if self.first:
            self.noises += [_number(generator.get_state().numpy().tobytes()) for generator in draws.generators]

    def checked(self, value: Tensor) -> Tensor:
        """The loss of the step's last micro-step as it goes backward: NaN, which skips the step, if it is refused."""
        limits = self.safeguards
        if not self.sigmas or (limits.spike is None and limits.refuse is None):
            return value
        mine = torch.stack([torch.cat(self.sigmas).double(), torch.cat(self.losses).double()], dim=1)
        if (missing := self.most - len(mine)) > 0:  # ranks gather equally many rows; a loss of NaN counts nowhere
            mine = torch.cat([mine, torch.stack([mine[0, 0], mine.new_full((), math.nan)]).expand(missing, 2)])
        self.everyone = self.stepper.data_ranks.once(self.stepper.gather(mine))
        self.excess = limits.baseline(self.trainer).excess(*self.everyone.unbind(1))
        if limits.refuse is None:
            return value
        return value * torch.where(self.excess > limits.refuse, math.nan, 1.0).to(value.dtype)

    def verdict(self, norm: Tensor, signal: Tensor) -> Verdict:
        """Whether the step may move the weights: its gradient's `norm` is finite.

        The host hears now of a first step and of one whose optimizer must know, else of the step before.
        """
        losses = torch.cat(self.losses)
        excess = losses.new_ones(()) if self.excess is None else self.excess
        over_base = [self.stepper.mean(torch.cat(self.over_base).mean())] if self.over_base else []
        update = norm.isfinite()
        if self.everyone is not None:
            spike = self.safeguards.spike
            usual = update if spike is None else update & (excess <= spike)
            sigmas, errors = self.everyone.unbind(1)
            self.safeguards.baseline(self.trainer).learn(sigmas, errors, usual)
        self.readback = Readback(norm, signal, excess, losses, *over_base)
        before = self.safeguards.hear()
        if self.stepper.selects_updates and not self.first:
            self.safeguards.unheard = self
            return Verdict(update, before)
        received = self.hear()
        return Verdict(self.updated, received or before)

    def hear(self) -> int | None:
        """Read what the step came to, and record and report what is unusual. Returns the signal that any rank had
        received.

        ValueError if it is the first step and the ranks do not belong together, or if too many in a row were skipped.
        """
        assert self.readback is not None, "after the verdict"
        (size,), (received,), (self.times_usual,), losses, *watched = self.readback.values()
        if self.first and self.stepper.processes > 1:
            self._check_ranks()
        for row, loss in zip(self.samples, losses, strict=True):
            row["loss"] = loss
        self.updated = math.isfinite(size)
        if self.updated:
            self.safeguards.skipped = 0
            self._check_spike()
            for (log_ratio,) in watched:
                if found := self.safeguards.unlearning.see(self.trainer.name, self.step, log_ratio):
                    self._record("unlearning", **found)
        else:
            self._skip(size, self.times_usual)
        return int(received) or None

    @property
    def values(self) -> dict[str, Any]:
        """What the log says of the step's losses: how many times the usual they are for their noise, and the clips of
        this process as [id, sigma, loss]. Functions, for when the step has been heard of.
        """
        return ({} if self.excess is None else {"times_usual": lambda: self.times_usual}) | {"clips": self._clips}

    def _clips(self) -> list[list[Any]]:
        return [[row["id"], *(_number_or_none(row.get(key)) for key in ("sigma", "loss"))] for row in self.samples]

    def check_update(self) -> None:
        """After the step: ValueError if it was the first one and moved nothing, or if ranks moved differently."""
        if not (self.first and self.updated):
            return
        after = digests(self.stepper)
        if self.stepper.replicated_weights:
            _check_equal(self.stepper, after, "weights")
        self._check_moves(after)
        self.safeguards.proved.add(self.trainer.name)

    def _check_window(self, sigma: Tensor) -> None:
        window = self.trainer.loss.window
        assert window is not None
        outside = ~window.contains(sigma)
        if outside.any():
            raise ValueError(
                f"{self.trainer.name} drew sigma {sigma[outside][0].item():.6f}, outside its window "
                f"[{window.low:g}, {window.high:g}): it would learn the other expert's noise; check noise= and loss="
            )

    def _check_ranks(self) -> None:
        """ValueError if two samples of the batch are the same, if processes that share tokens have different ones, or
        if gradients differ between ranks (DDP).
        """
        shared_by = self.stepper.data_ranks.shared_by
        numbers = [[row["position"] for row in self.samples], self.noises]
        for what, mine in zip(("samples", "noise"), numbers, strict=True):
            padded = torch.tensor(mine + [-1] * (self.most - len(mine)))
            rows = _gathered(self.stepper, padded).unflatten(0, (-1, shared_by))
            if (rows != rows[:, :1]).any():
                raise ValueError(
                    f"the {shared_by} processes that share the tokens of a clip differ in their {what}: each would "
                    "compute a part of another clip. This is a fault of the program, please report it"
                )
            everyone = [each for each in rows[:, 0].flatten().tolist() if each >= 0]
            if len(set(everyone)) < len(everyone):
                raise ValueError(
                    f"ranks share their {what}: {len(everyone)} drawn for one batch, {len(set(everyone))} different "
                    "ones; more processes would bring nothing. This is a fault of the program, please report it"
                )
        if self.stepper.replicated_gradients:
            _check_equal(self.stepper, digests(self.stepper, gradients=True), "gradients")

    def _skip(self, norm: float, excess: float) -> None:
        """Record and report a skipped step; ValueError if there were too many in a row."""
        limits = self.safeguards
        limits.skipped += 1
        if limits.refuse is not None and excess > limits.refuse:
            self._record("spike", times_usual=excess)
            why = f"the loss is {excess:.0f} times the usual one for its noise (safeguards.refuse={limits.refuse:g})"
            bad = [max(self.samples, key=lambda row: row["loss"])]
        else:
            self._record("gradient", grad_norm=norm)
            why, bad = f"the gradient's norm is {norm}", [x for x in self.samples if not math.isfinite(x["loss"])]
            if self.stepper.updates_in_backward and not bad:
                why += "; parameters whose gradient is finite were updated, the others as by a gradient of zero"
        which = f"; first such sample: {bad[0]['id']}" if bad else ""
        message = f"step {self.step} skipped: {why}{which}; see {limits.path}"
        if limits.skipped >= limits.max_skipped_steps:
            raise ValueError(
                f"{message}. That is {limits.skipped} steps in a row "
                f"(safeguards.max_skipped_steps={limits.max_skipped_steps}); the last checkpoint is good. Check these "
                "samples, or lower optimizer.lr or clip"
            )
        say(message)

    def _check_spike(self) -> None:
        """Record and report an unusual loss."""
        spike, excess = self.safeguards.spike, self.times_usual
        if self.excess is None or spike is None or excess <= spike:
            return
        self._record("spike", times_usual=excess)
        worst = max(self.samples, key=lambda row: row["loss"])
        say(
            f"step {self.step}: the loss is {excess:.0f} times the usual one for its noise, the worst sample "
            f"{worst['id']} ({worst['loss']:.3g} at sigma {worst['sigma']:.3f}); see {self.safeguards.path}"
        )

    def _record(self, safeguard: str, **values: float) -> None:
        samples = [{key: _plain(value) for key, value in row.items()} for row in self.samples]
        row = {"step": self.step, "safeguard": safeguard, "expert": self.trainer.name, "rank": distributed.rank()}
        self.safeguards.record(row | {key: _plain(value) for key, value in values.items()} | {"samples": samples})

    def _check_moves(self, after: Mapping[str, int]) -> None:
        """ValueError if nothing that is trained has moved (of a LoRA: no B, of a LoKr: no w2); reports what has not."""
        starting = [name for name in after if is_zero_at_start(name)]
        names = starting or list(after)
        changed = torch.tensor([float(self.before[name] != after[name]) for name in names], device=self.stepper.device)
        anywhere = self.stepper.sum(changed).tolist()
        still = [name for name, moved in zip(names, anywhere, strict=True) if not moved]
        own = ("LoKr", "w2") if starting and ".lokr_" in starting[0] else ("LoRA", "B")
        what = f"{own[0]}'s {own[1]}" if starting else "trained tensor"
        if len(still) == len(names):
            raise ValueError(
                f"the first step of {self.trainer.name} moved no {what} ({len(names)} of them): the run would learn "
                "nothing; check optimizer.lr and what adapter= trains"
            )
        if starting and still:
            moved = len(names) - len(still)
            say(f"the first step moved {moved} of {len(names)} {own[1]} of the {own[0]}; not {still[0]}")


def digests(stepper: Stepper, *, gradients: bool = False) -> dict[str, int]:
    """A checksum of every trained parameter (or its gradient), of the part that this process holds."""
    found = {name: part.grad if gradients else part for name, part in stepper.local_parts().items()}
    return {name: 0 if part is None else _bits(part) for name, part in found.items()}


def _bits(tensor: Tensor) -> int:
    whole = tensor.detach().contiguous()
    words = whole.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[whole.itemsize])
    return int(words.sum(dtype=torch.int64))


def _number(content: bytes) -> int:
    """A hash of 63 bits."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") >> 1


def _gathered(stepper: Stepper, mine: Tensor) -> Tensor:
    return stepper.gather(mine.to(stepper.device)[None])


def _check_equal(stepper: Stepper, mine: Mapping[str, int], what: str) -> None:
    """ValueError that names the first parameter whose bits are not the same on every rank."""
    rows = _gathered(stepper, torch.tensor(list(mine.values())))
    differing = (rows != rows[0]).any(dim=0).tolist()
    names = [name for name, differs in zip(mine, differing, strict=True) if differs]
    if names:
        raise ValueError(
            f"after the first step's reduction the {what} of {len(names)} of {len(mine)} parameters differ between "
            f"ranks (first: {names[0]}): each would train a model of its own. This is a fault of the program or of the "
            "communication between GPUs; please report it"
        )


def _number_or_none(value: float | None) -> float | None:
    """What JSON has as a number, with six significant digits; None for anything else."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def _plain(value: Any) -> Any:
    """A value as JSON has it: a non-finite number as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
