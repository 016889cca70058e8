"""Tripwires: always on, each for one way in which a run goes wrong and looks well.

draw      every noise level lies in the expert's window
ranks     at the first step no two samples of a batch share their place or their noise, and after it the gradients
          (DDP) and the weights (where each process has all of them) are the same on every rank
moves     at the first step something that is trained moves; every LoRA's B, or it is said which do not
gradient  one that is no number updates nothing, on any rank; its samples are written down, `patience` such steps in a
          row end the run
spike     a batch `spike` times as wrong as is usual for its noise levels is said and written down

What is written down goes to tripped.jsonl in the run's folder: each rank's own samples with their noise levels, whose
noise anybody can draw again from (seed, "noise", position). The first two and the third raise ValueError.
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

from wantrain import flow, world
from wantrain.batch import Batch
from wantrain.losses import Loss
from wantrain.training.member import Member
from wantrain.training.stepper import Stepper

#: Noise levels of an expert's window are compared within slices of it, once a slice has seen so many samples.
SLICES, SEEN = 10, 20
#: How fast the usual loss of a slice follows the run.
RATE = 0.02


@dataclass
class Usual:
    """The usual loss of each slice of a window, as a running mean of logarithms. A resumed run learns it anew."""

    window: flow.NoiseWindow
    means: list[float] = field(default_factory=lambda: [0.0] * SLICES)
    counts: list[int] = field(default_factory=lambda: [0] * SLICES)

    def excess(self, sigmas: Sequence[float], errors: Sequence[float]) -> float:
        """How many times the usual a batch's losses are, as a geometric mean; 1 where too little has been seen."""
        known = [(slot, error) for slot, error in self._slots(sigmas, errors) if self.counts[slot] >= SEEN]
        if not known:
            return 1.0
        return math.exp(sum(math.log(error) - self.means[slot] for slot, error in known) / len(known))

    def learn(self, sigmas: Sequence[float], errors: Sequence[float]) -> None:
        """Take a batch's losses as usual."""
        for slot, error in self._slots(sigmas, errors):
            self.counts[slot] += 1
            rate = max(RATE, 1 / self.counts[slot])
            self.means[slot] += rate * (math.log(error) - self.means[slot])

    def _slots(self, sigmas: Sequence[float], errors: Sequence[float]) -> list[tuple[int, float]]:
        width = (self.window.high - self.window.low) / SLICES
        places = (min(SLICES - 1, int((sigma - self.window.low) / width)) for sigma in sigmas)
        return [(slot, error) for slot, error in zip(places, errors, strict=True) if error > 0]


@dataclass
class Tripwires:
    """The wires of a run. The loop tells them what it does: begin, drew for each micro-step, before_update, updated.

    path      tripped.jsonl
    patience  steps in a row without an update until the run ends
    spike     how many times the usual loss is one; None: nothing is
    """

    path: Path
    patience: int = 3
    spike: float | None = 10.0
    in_a_row: int = 0
    proved: set[str] = field(default_factory=set)
    usual: dict[str, Usual] = field(default_factory=dict)

    def begin(self, member: Member) -> None:
        """A step of `member` begins."""
        self.member, self.samples = member, list[dict[str, Any]]()
        self.noises: list[int] = []
        self.first = member.name not in self.proved
        if self.first:
            self.before = digests(member.stepper)

    def drew(self, batch: Batch, record: Loss, generators: Sequence[torch.Generator]) -> None:
        """One micro-step: what its samples are and which noise they drew. ValueError for one outside the window."""
        rows: list[dict[str, Any]] = [
            {"id": name, "position": position} for name, position in zip(batch.ids, batch.positions, strict=True)
        ]
        if record.sigma is not None:
            window = self.member.loss.window  # type: ignore[attr-defined]
            outside = ~window.contains(record.sigma)
            if outside.any():
                raise ValueError(
                    f"{self.member.name} drew sigma {record.sigma[outside][0].item():.6f}, outside its window "
                    f"[{window.low:g}, {window.high:g}): it would learn the other expert's noise; look at noise= and "
                    "loss="
                )
            for row, sigma in zip(rows, record.sigma.tolist(), strict=True):
                row["sigma"] = sigma
        for row, error in zip(rows, record.per_sample, strict=True):
            row["loss"] = error  # on the device until the step is over
        self.samples += rows
        if self.first:
            self.noises += [_number(generator.get_state().numpy().tobytes()) for generator in generators]

    def before_update(self) -> None:
        """All gradients are there. ValueError if it is the first time and the ranks do not belong together."""
        stepper = self.member.stepper
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

    def updated(self, step: int, norm: Tensor) -> bool:
        """The step that leads to `step` is over; True if it moved the weights. ValueError if the run must end."""
        stepper = self.member.stepper
        finite = bool(torch.isfinite(norm))
        for row in self.samples:
            row["loss"] = float(row["loss"])
        if not finite:
            self._no_update(step, float(norm))
            return False
        self.in_a_row = 0
        self._compare(step)
        if self.first:
            after = digests(stepper)
            if stepper.engine in {"ddp", "zero1", "zero2"} and stepper.accelerator.num_processes > 1:
                _equal_over_ranks(stepper, after, "weights")
            self._check_moves(after)
            self.proved.add(self.member.name)
        return True

    def _no_update(self, step: int, norm: float) -> None:
        self.in_a_row += 1
        self._write_down(step, "gradient", grad_norm=norm)
        bad = [row for row in self.samples if not math.isfinite(row["loss"])]
        which = f"; first such sample: {bad[0]['id']}" if bad else ""
        told = f"step {step}: the gradient's norm is {norm}, so nothing was updated{which}; see {self.path}"
        if self.in_a_row >= self.patience:
            raise ValueError(
                f"{told}. That is {self.in_a_row} steps in a row (tripwires.patience={self.patience}); the last "
                "checkpoint is good. Look at these samples, or lower optimizer.lr or clip"
            )
        world.say(told)

    def _compare(self, step: int) -> None:
        rows = [row for row in self.samples if "sigma" in row]
        if not rows or self.spike is None:
            return
        sigmas, errors = [row["sigma"] for row in rows], [row["loss"] for row in rows]
        usual = self.usual.setdefault(self.member.name, Usual(self.member.loss.window))  # type: ignore[attr-defined]
        excess = usual.excess(sigmas, errors)
        if excess > self.spike:
            self._write_down(step, "spike", times_usual=excess)
            worst = max(rows, key=lambda row: row["loss"])
            world.say(
                f"step {step}: the loss is {excess:.0f} times what is usual for its noise, the worst sample "
                f"{worst['id']} ({worst['loss']:.3g} at sigma {worst['sigma']:.3f}); see {self.path}"
            )
        else:
            usual.learn(sigmas, errors)

    def _write_down(self, step: int, wire: str, **more: float) -> None:
        samples = [{key: _plain(value) for key, value in row.items()} for row in self.samples]
        row = {"step": step, "wire": wire, "expert": self.member.name, "rank": world.rank()}
        row |= {key: _plain(value) for key, value in more.items()} | {"samples": samples}
        with self.path.open("a", encoding="utf-8") as file:  # one write: ranks append beside each other
            file.write(json.dumps(row) + "\n")

    def _check_moves(self, after: Mapping[str, int]) -> None:
        """ValueError if nothing that is trained has moved, of an adapter: no B; says which B have not."""
        stepper, adapted = self.member.stepper, any("lora_B" in name for name in after)
        names = [name for name in after if "lora_B" in name or not adapted]
        changed = torch.tensor([float(self.before[name] != after[name]) for name in names], device=stepper.device)
        anywhere = stepper.accelerator.reduce(changed, reduction="sum").tolist()
        still = [name for name, moved in zip(names, anywhere, strict=True) if not moved]
        what = "LoRA's B" if adapted else "trained tensor"
        if len(still) == len(names):
            raise ValueError(
                f"the first step of {self.member.name} moved no {what} ({len(names)} of them): the run would learn "
                "nothing; look at optimizer.lr and at what adapter= trains"
            )
        if adapted and still:
            world.say(f"the first step moved {len(names) - len(still)} of {len(names)} B of the LoRA; not {still[0]}")


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
