"""The meter: where a run's time goes, how fast that is, and what it learns at which noise.

Time is split at marks between a step's parts. On a GPU a mark is an event in its stream, read when the log is written,
so that measuring stops nothing; the time between two steps' marks is the wait for data. Rates are of all processes
together. MFU is the operations that training needs (models/flops.py), never those that are computed twice, over what
the device could do in dense bfloat16.
"""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from wantrain import flow, geometry
from wantrain.batch import Batch
from wantrain.losses import Loss
from wantrain.models import WanTransformer
from wantrain.models.flops import training_flops
from wantrain.training.engine.engine import Stepper
from wantrain.training.expert import ExpertTrainer

#: Dense bfloat16 operations per second with float32 sums, by model of card (see `card_model`); from the makers' data
#: sheets. A card that is not listed has no known peak: a neighbour's number would make MFU wrong by a factor of 3.
PEAKS = {
    "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H200 NVL": 835e12,
    "H100": 989e12, "H100 NVL": 835e12, "H100 PCIE": 756e12,
    "A100": 312e12, "A100 PCIE": 312e12, "A40": 149.7e12, "A10": 125e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12,
    "RTX 6000 ADA": 364e12, "RTX A6000": 155e12,
    "RTX 5090": 209e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
#: Words of a device's name that leave its speed as it is: maker, brand, memory and socket.
NEUTRAL = re.compile(r"NVIDIA|TESLA|GEFORCE|GENERATION|SXM\d?|HBM\d\w?|\d+GB")
#: Slices of an expert's window for which the loss is told, each by its own noise levels.
SLICES = 8
#: Elements of trained tensors whose change is measured, at most: a copy of them is made for one step in ten.
WATCHED = 1 << 26

Mark = float | torch.cuda.Event


@dataclass
class ByNoise:
    """Sums of the losses of each slice of a window since the last report; on the device."""

    window: flow.NoiseWindow
    sums: Tensor

    def add(self, sigma: Tensor, errors: Tensor) -> None:
        """Samples' losses, (B,), at their noise levels; those that are no numbers do not count."""
        width = (self.window.high - self.window.low) / SLICES
        slots = ((sigma - self.window.low) / width).long().clamp(0, SLICES - 1)
        kept = errors.isfinite()
        both = torch.stack([torch.where(kept, errors, 0.0).double(), kept.double()], dim=1)
        places = slots[:, None] == torch.arange(SLICES, device=slots.device)
        self.sums += places.double().T @ both

    def report(self, stepper: Stepper) -> dict[str, float]:
        """The mean loss of each slice that had samples, over all processes, by the slice's middle; then from zero."""
        width = (self.window.high - self.window.low) / SLICES
        total = stepper.accelerator.reduce(self.sums.clone(), reduction="sum").tolist()
        self.sums.zero_()
        middles = (self.window.low + width * (slot + 0.5) for slot in range(SLICES))
        return {f"{middle:.4f}": s / n for middle, (s, n) in zip(middles, total, strict=True) if n}


@dataclass
class Meter:
    """What the loop tells: begin, mark after each part, saw for each micro-step, over; and report at the log's lines.

    fps  frames per second of the videos; strides are the VAE's
    """

    fps: float
    temporal_stride: int = 4
    patch: tuple[int, int, int] = geometry.PATCH
    noises: dict[str, ByNoise] = field(default_factory=dict)
    marks: list[tuple[str, Mark]] = field(default_factory=list)
    amounts: dict[str, float] = field(default_factory=dict)
    flops: dict[tuple[Any, ...], int] = field(default_factory=dict)
    before: dict[str, Tensor] | None = None

    def begin(self, trainer: ExpertTrainer, *, watch: bool) -> None:
        """A step begins; `watch` its update's size."""
        self.trainer, self.device = trainer, trainer.stepper.device
        self.amounts = dict.fromkeys(("tokens", "video_seconds", "flops"), 0.0)
        self.marks = [("begin", self._now())]
        self.before = {name: part.detach().clone() for name, part in self._watched().items()} if watch else None

    def mark(self, part: str) -> None:
        """`part` of the step is over."""
        self.marks.append((part, self._now()))

    def saw(self, batch: Batch, record: Loss) -> None:
        """One micro-step's samples."""
        frames, height, width = batch.latents_BCTHW.shape[2:]
        tokens = frames * (height // self.patch[1]) * (width // self.patch[2])
        self.amounts["tokens"] += len(batch) * tokens
        self.amounts["video_seconds"] += len(batch) * ((frames - 1) * self.temporal_stride + 1) / self.fps
        self.amounts["flops"] += len(batch) * self._flops(tokens, batch.text_BLD.shape[1])
        if record.sigma is not None:
            window = self.trainer.loss.window  # type: ignore[attr-defined]
            if self.trainer.name not in self.noises:
                zeros = torch.zeros(SLICES, 2, dtype=torch.float64, device=self.device)
                self.noises[self.trainer.name] = ByNoise(window, zeros)
            self.noises[self.trainer.name].add(record.sigma, record.per_sample)

    def over(self) -> dict[str, Any]:
        """What is known of the step: its amounts over all processes, and its times (read when they are written)."""
        self.mark("rest")
        processes = self.trainer.stepper.accelerator.num_processes
        told: dict[str, Any] = {key: value * processes for key, value in self.amounts.items()}
        told["times"] = Times(tuple(self.marks))
        if self.before is not None:
            told |= self._change(self.before)
        return told

    def report(self, trainers: Iterable[ExpertTrainer]) -> dict[str, Any]:
        """At a line of the log: losses by noise since the last one, and the most memory that was taken."""
        several = len(self.noises) > 1
        told: dict[str, Any] = {}
        for trainer in trainers:
            if trainer.name in self.noises:
                prefix = f"{trainer.name}/" if several else ""
                told[f"{prefix}loss_by_sigma"] = self.noises[trainer.name].report(trainer.stepper)
        told["host_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        if self.device.type == "cuda":
            told["device_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        return told

    def _now(self) -> Mark:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _flops(self, tokens: int, text_rows: int) -> int:
        """Operations of one sample; 0 for what is no transformer."""
        module = self.trainer.trainable.module
        if not isinstance(module, WanTransformer):
            return 0
        key = (self.trainer.name, tokens, text_rows)
        if key not in self.flops:
            rows = min(text_rows + 1, module.text_length)
            self.flops[key] = training_flops(module, tokens=tokens, text_rows=rows).model
        return self.flops[key]

    def _watched(self) -> dict[str, Tensor]:
        """Trained tensors, as this process holds them, up to WATCHED elements: spread over the whole model."""
        parts = self.trainer.stepper.local_parts()
        total = sum(part.numel() for part in parts.values())
        stride = max(1, -(-total // WATCHED))
        return dict(list(parts.items())[::stride])

    def _change(self, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Norm of the update and of the weights, over what is watched."""
        stepper, parts = self.trainer.stepper, self.trainer.stepper.local_parts()
        sums = torch.zeros(2, dtype=torch.float64, device=stepper.device)
        for name, old in before.items():
            new = parts[name].detach()
            squares = [(new - old).double().square().sum(), old.double().square().sum()]
            sums += torch.stack(squares).to(stepper.device)
        if stepper.sharded:
            sums = stepper.accelerator.reduce(sums, reduction="sum")
        update, weights = sums.sqrt().unbind()
        return {"update_norm": update, "update_ratio": update / weights.clamp(min=1e-30)}


@dataclass(frozen=True)
class Times:
    """The marks of one step, to be read once the device has passed them."""

    marks: tuple[tuple[str, Mark], ...]

    def seconds(self) -> dict[str, float]:
        """Seconds of each part, those of the same name together."""
        parts: dict[str, float] = {}
        for (_, start), (name, end) in zip(self.marks, self.marks[1:], strict=False):
            if isinstance(start, float):
                assert isinstance(end, float)
                took = end - start
            else:
                assert not isinstance(end, float)
                end.synchronize()
                took = start.elapsed_time(end) / 1000
            parts[name] = parts.get(name, 0.0) + took
        return parts


def peak_of(device: torch.device) -> float | None:
    """Operations per second that a device could do; None where nobody has said."""
    return PEAKS.get(card_model(torch.cuda.get_device_name(device))) if device.type == "cuda" else None


def card_model(name: str) -> str:
    """A device's name without the words that leave its speed as it is: "NVIDIA A100-SXM4-80GB" is an "A100".

    What is left must be a key of PEAKS as a whole: an "L40" is no "L4", and a "RTX 4090 LAPTOP GPU" or a "MIG" slice of
    a card is not the card.
    """
    words = re.split(r"[\s-]+", name.upper())
    return " ".join(word for word in words if not NEUTRAL.fullmatch(word))
