"""Safeguards: always on, each for one way in which a run goes wrong and looks well.

draw      every noise level lies in the expert's window
ranks     at the first step no two samples of a batch share their place or their noise, and after it the gradients
          (DDP) and the weights (where each process has all of them) are the same on every rank
moves     at the first step something that is trained moves; every LoRA's B, or it is said which do not
gradient  non-finite gradients skip the step, on every rank; the samples are written down, `max_skipped_steps` in a
          row end the run
spike     a batch `spike` times as wrong as is usual for its noise levels is said and written down; one that is so
          `refuse` times updates nothing, on any rank

What is written down goes to safeguards.jsonl in the run's folder: each rank's own samples with their noise levels,
whose noise anybody can draw again from (seed, "noise", position). The first two and the third raise ValueError.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wantrain import flow
from wantrain.batch import Batch
from wantrain.losses import Draws, Loss
from wantrain.training.engine.engine import Stepper
from wantrain.training.expert import ExpertTrainer
from wantrain.util import distributed
from wantrain.util.console import say

#: Noise levels of an expert's window are compared within slices of it, once a slice has seen so many samples.
SLICES, SEEN = 10, 20
#: How fast the usual loss of a slice follows the run.
RATE = 0.02


@dataclass
class LossBaseline:
    """The usual loss of each slice of a window, as a running mean of logarithms.

    Everything is computed where the losses are, and without asking for a value, so that nobody waits for a GPU.
    """

    window: flow.NoiseWindow
    means: Tensor = field(default_factory=lambda: torch.zeros(SLICES, dtype=torch.float64))
    counts: Tensor = field(default_factory=lambda: torch.zeros(SLICES, dtype=torch.float64))

    def excess(self, sigmas: Tensor, errors: Tensor) -> Tensor:
        """How many times the usual a batch's losses (B,) are, as a geometric mean; 1 where too little has been seen."""
        self.means, self.counts = self.means.to(errors.device), self.counts.to(errors.device)
        slots = self._slots(sigmas)
        known = (self.counts[slots] >= SEEN) & (errors > 0) & errors.isfinite()
        above = torch.where(known, errors.double().log() - self.means[slots], 0.0)
        return (above.sum() / known.sum().clamp(min=1)).exp()

    def learn(self, sigmas: Tensor, errors: Tensor) -> None:
        """Take a batch's losses as usual."""
        kept = (errors > 0) & errors.isfinite()
        slots = torch.arange(SLICES, device=errors.device)
        places = ((self._slots(sigmas)[:, None] == slots) & kept[:, None]).double()
        more, sums = places.sum(0), torch.where(kept, errors.double().log(), 0.0) @ places
        self.counts += more
        rates = torch.maximum(1 - (1 - RATE) ** more, more / self.counts.clamp(min=1))
        self.means += rates * (sums / more.clamp(min=1) - self.means)

    def _slots(self, sigmas: Tensor) -> Tensor:
        width = (self.window.high - self.window.low) / SLICES
        return ((sigmas.double() - self.window.low) / width).long().clamp(0, SLICES - 1)


@dataclass
class Safeguards:
    """The safeguards of a run. The loop tells them what it does: begin, drew for each micro-step, allow with what was
    read of `facts`, and moved after an update. They read nothing themselves after a run's first step.

    path      safeguards.jsonl
    max_skipped_steps  steps in a row without an update until the run ends
    spike     how many times the usual loss is one; None: nothing is
    refuse    how many times the usual loss is not learned from; None: all is
    """

    path: Path
    max_skipped_steps: int = 3
    spike: float | None = 10.0
    refuse: float | None = 100.0
    in_a_row: int = 0
    proved: set[str] = field(default_factory=set)
    usual: dict[str, LossBaseline] = field(default_factory=dict)

    def begin(self, trainer: ExpertTrainer) -> None:
        """A step of `trainer` begins."""
        self.trainer, self.samples = trainer, list[dict[str, Any]]()
        self.noises: list[int] = []
        self.levels, self.losses = list[Tensor](), list[Tensor]()  # of this process, on the device
        self.everyone: Tensor | None = None  # levels and losses of all ranks, (samples, 2)
        self.excess: Tensor | None = None  # how many times the usual this step's losses are, over all ranks
        self.first = trainer.name not in self.proved
        if self.first:
            self.before = digests(trainer.stepper)

    def drew(self, batch: Batch, draws: Draws, record: Loss) -> None:
        """One micro-step: its samples and what they drew, on the host, and the losses that came of it.

        ValueError for a noise level outside the window.
        """
        rows: list[dict[str, Any]] = [
            {"id": name, "position": position} for name, position in zip(batch.ids, batch.positions, strict=True)
        ]
        if draws.sigma is not None and record.sigma is not None:
            window = self.trainer.loss.window  # type: ignore[attr-defined]
            outside = ~window.contains(draws.sigma)
            if outside.any():
                raise ValueError(
                    f"{self.trainer.name} drew sigma {draws.sigma[outside][0].item():.6f}, outside its window "
                    f"[{window.low:g}, {window.high:g}): it would learn the other expert's noise; look at noise= and "
                    "loss="
                )
            for row, sigma in zip(rows, draws.sigma.tolist(), strict=True):
                row["sigma"] = sigma
            self.levels.append(record.sigma.detach())
        self.losses.append(record.per_sample.detach())
        self.samples += rows
        if self.first:
            self.noises += [_number(generator.get_state().numpy().tobytes()) for generator in draws.generators]

    def judge(self, value: Tensor) -> Tensor:
        """The loss of a step's last micro-step as it may go backward: NaN, which updates nothing, if it is refused."""
        if not self.levels or (self.spike is None and self.refuse is None):
            return value
        mine = torch.stack([torch.cat(self.levels).double(), torch.cat(self.losses).double()], dim=1)
        self.everyone = self.trainer.stepper.gather(mine)
        self.excess = self._usual(self.trainer.name, self.trainer.loss.window).excess(*self.everyone.unbind(1))  # type: ignore[attr-defined]
        if self.refuse is None:
            return value
        return value * torch.where(self.excess > self.refuse, math.nan, 1.0).to(value.dtype)

    def facts(self) -> tuple[Tensor, Tensor]:
        """What `allow` has to know of a step whose gradients are there: how many times the usual its losses are, and
        the losses of this process's samples; on the device.
        """
        losses = torch.cat(self.losses)
        return losses.new_ones(()) if self.excess is None else self.excess, losses

    def allow(self, step: int, norm: float, excess: float, losses: Sequence[float]) -> bool:
        """True if the step that leads to `step` may move the weights: its gradient's `norm` is a number.

        ValueError if it is the first one and the ranks do not belong together, or if too many were refused in a row.
        """
        self._compare_ranks()
        for row, loss in zip(self.samples, losses, strict=True):
            row["loss"] = loss
        if not math.isfinite(norm):
            self._refused(step, norm, excess)
            return False
        self.in_a_row = 0
        if self.everyone is not None:
            self._compare(step, excess)
        return True

    def _compare_ranks(self) -> None:
        """ValueError if the ranks do not belong together; asked in the first step alone."""
        stepper = self.trainer.stepper
        if not self.first or stepper.accelerator.num_processes == 1:
            return
        numbers = [[row["position"] for row in self.samples], self.noises]
        for what, mine in zip(("samples", "noise"), numbers, strict=True):
            everyone = _gathered(stepper, torch.tensor(mine)).flatten().tolist()
            if len(set(everyone)) < len(everyone):
                raise ValueError(
                    f"ranks share their {what}: {len(everyone)} drawn for one batch, {len(set(everyone))} different "
                    "ones; more processes would bring nothing. This is a fault of the program, please report it"
                )
        if stepper.engine == "ddp":
            _equal_over_ranks(stepper, digests(stepper, gradients=True), "gradients")

    def moved(self) -> None:
        """The weights have been updated. ValueError if it was the first time and nothing moved, or ranks differ."""
        if not self.first:
            return
        stepper = self.trainer.stepper
        after = digests(stepper)
        if stepper.engine in {"ddp", "zero1", "zero2"} and stepper.accelerator.num_processes > 1:
            _equal_over_ranks(stepper, after, "weights")
        self._check_moves(after)
        self.proved.add(self.trainer.name)

    def state(self) -> dict[str, Any]:
        """What a resumed run has to know of this one: the usual losses, by expert."""
        return {name: [own.means.tolist(), own.counts.tolist()] for name, own in self.usual.items()}

    def restore(self, state: Mapping[str, Any], trainers: Mapping[str, ExpertTrainer]) -> None:
        """Go on from a `state`."""
        for name, told in state.items():
            own = self._usual(name, trainers[name].loss.window)  # type: ignore[attr-defined]
            own.means, own.counts = (torch.tensor(column, dtype=torch.float64) for column in told)

    def _usual(self, name: str, window: flow.NoiseWindow) -> LossBaseline:
        return self.usual.setdefault(name, LossBaseline(window))

    def _refused(self, step: int, norm: float, excess: float) -> None:
        self.in_a_row += 1
        if self.refuse is not None and excess > self.refuse:
            self._write_down(step, "spike", times_usual=excess)
            why = f"the loss is {excess:.0f} times what is usual for its noise (safeguards.refuse={self.refuse:g})"
            bad = [max(self.samples, key=lambda row: row["loss"])]
        else:
            self._write_down(step, "gradient", grad_norm=norm)
            why, bad = f"the gradient's norm is {norm}", [x for x in self.samples if not math.isfinite(x["loss"])]
        which = f"; first such sample: {bad[0]['id']}" if bad else ""
        told = f"step {step}: {why}, so nothing was updated{which}; see {self.path}"
        if self.in_a_row >= self.max_skipped_steps:
            raise ValueError(
                f"{told}. That is {self.in_a_row} steps in a row "
                f"(safeguards.max_skipped_steps={self.max_skipped_steps}); the last checkpoint "
                "is good. Look at these samples, or lower optimizer.lr or clip"
            )
        say(told)

    def _compare(self, step: int, excess: float) -> None:
        if self.spike is not None and excess > self.spike:
            self._write_down(step, "spike", times_usual=excess)
            worst = max(self.samples, key=lambda row: row["loss"])
            say(
                f"step {step}: the loss is {excess:.0f} times what is usual for its noise, the worst sample "
                f"{worst['id']} ({worst['loss']:.3g} at sigma {worst['sigma']:.3f}); see {self.path}"
            )
        else:
            assert self.everyone is not None
            self.usual[self.trainer.name].learn(*self.everyone.unbind(1))

    def _write_down(self, step: int, wire: str, **more: float) -> None:
        samples = [{key: _plain(value) for key, value in row.items()} for row in self.samples]
        row = {"step": step, "wire": wire, "expert": self.trainer.name, "rank": distributed.rank()}
        row |= {key: _plain(value) for key, value in more.items()} | {"samples": samples}
        with self.path.open("a", encoding="utf-8") as file:  # one write: ranks append beside each other
            file.write(json.dumps(row) + "\n")

    def _check_moves(self, after: Mapping[str, int]) -> None:
        """ValueError if nothing that is trained has moved, of an adapter: no B; says which B have not."""
        stepper, adapted = self.trainer.stepper, any("lora_B" in name for name in after)
        names = [name for name in after if "lora_B" in name or not adapted]
        changed = torch.tensor([float(self.before[name] != after[name]) for name in names], device=stepper.device)
        anywhere = stepper.accelerator.reduce(changed, reduction="sum").tolist()
        still = [name for name, moved in zip(names, anywhere, strict=True) if not moved]
        what = "LoRA's B" if adapted else "trained tensor"
        if len(still) == len(names):
            raise ValueError(
                f"the first step of {self.trainer.name} moved no {what} ({len(names)} of them): the run would learn "
                "nothing; look at optimizer.lr and at what adapter= trains"
            )
        if adapted and still:
            say(f"the first step moved {len(names) - len(still)} of {len(names)} B of the LoRA; not {still[0]}")


def digests(stepper: Stepper, *, gradients: bool = False) -> dict[str, int]:
    """A number for the bits of every trained parameter (or its gradient), as far as this process holds it."""
    found = {name: part.grad if gradients else part for name, part in stepper.local_parts().items()}
    return {name: 0 if part is None else _bits(part) for name, part in found.items()}


def _bits(tensor: Tensor) -> int:
    whole = tensor.detach().contiguous()
    words = whole.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[whole.itemsize])
    return int(words.sum(dtype=torch.int64))


def _number(content: bytes) -> int:
    """63 bits that stand for some bytes."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") >> 1


def _gathered(stepper: Stepper, mine: Tensor) -> Tensor:
    gathered: Tensor = stepper.accelerator.gather(mine.to(stepper.device)[None])
    return gathered


def _equal_over_ranks(stepper: Stepper, mine: Mapping[str, int], what: str) -> None:
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


def _plain(value: Any) -> Any:
    """A number as JSON has it: what is none becomes a word."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
