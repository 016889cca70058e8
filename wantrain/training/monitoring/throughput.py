"""Throughput: where a step's time goes, how fast training is, and what it learns at which noise levels.

Each part of a step is a span. On a GPU a span is two events in its stream, read when the log is written, so that
measuring never waits for the device. Rates are of all processes together. MFU counts the operations that training needs
(models/flops.py), never those that are recomputed, over the device's peak in dense bfloat16.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from wantrain import flow
from wantrain.batch import AnyBatch, PackedBatch
from wantrain.losses import Loss
from wantrain.models import WanTransformer
from wantrain.models.compiling import BlockCompiler
from wantrain.models.flops import training_flops
from wantrain.training.engine.engine import Stepper
from wantrain.training.expert import ExpertTrainer
from wantrain.training.monitoring.pace import Pace
from wantrain.training.monitoring.supply import Supply
from wantrain.util.cards import CARDS, card_model
from wantrain.util.progress import report_progress

#: Bins of an expert's window for which the log has a mean loss each.
BINS = 8
#: Elements of trained tensors whose update is measured, at most: a copy of them is made for one step in ten.
WATCHED = 1 << 26

#: A moment: seconds on the host's clock, or an event of a CUDA stream.
Moment = float | torch.cuda.Event


@dataclass
class LossByNoise:
    """Sums of the losses in each bin of a window since the last report, on the device."""

    window: flow.NoiseWindow
    sums: Tensor

    def add(self, sigma: Tensor, errors: Tensor) -> None:
        """Add samples' losses (B,) at their noise levels; non-finite ones do not count."""
        finite = errors.isfinite()
        both = torch.stack([torch.where(finite, errors, 0.0).double(), finite.double()], dim=1)
        bins = self.window.bin_of(sigma, BINS)[:, None] == torch.arange(BINS, device=sigma.device)
        self.sums += bins.double().T @ both

    def report(self, stepper: Stepper) -> dict[str, float]:
        """The mean loss of each bin that had samples, over all processes, by the bin's middle; then start anew."""
        total = stepper.sum(self.sums).tolist()
        self.sums.zero_()
        edges = self.window.bin_edges(BINS)
        middles = ((edges[:-1] + edges[1:]) / 2).tolist()
        return {f"{middle:.4f}": s / n for middle, (s, n) in zip(middles, total, strict=True) if n}


@dataclass
class Stepped:
    """Steps since the last report, by the host's clock: their seconds, and those in which they waited for a batch."""

    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0


@dataclass
class Throughput:
    """What a run's log says of speed and of losses by noise level: `step` around each step, `report` at its lines.

    fps  frames per second of the videos; the stride is the VAE's
    compiler  counts compiled graphs, with compile=blocks
    supply    counts waits for shards from an address
    """

    fps: float
    temporal_stride: int = 4
    compiler: BlockCompiler | None = None
    supply: Supply | None = None
    stepped: Stepped = field(default_factory=Stepped)
    losses: dict[str, LossByNoise] = field(default_factory=dict)
    flops: dict[tuple[Any, ...], int] = field(default_factory=dict)
    pace: Pace = field(default_factory=Pace)

    @contextmanager
    def step(self, trainer: ExpertTrainer, number: int, *, watch: bool) -> Iterator[StepMeter]:
        """Around one optimizer step, `number` of the run; `watch` measures how far it moves the weights."""
        self.device = trainer.stepper.device
        meter = StepMeter(self, trainer, number, watched(trainer.stepper) if watch else {})
        began = time.perf_counter()
        yield meter
        meter.end()
        self.pace.add(meter.times)
        self.stepped.steps += 1
        self.stepped.seconds += time.perf_counter() - began

    def report(self, trainers: Iterable[ExpertTrainer]) -> dict[str, Any]:
        """At a line of the log: losses by noise level since the last one, which process the others wait for, the peak
        of memory, and graphs compiled.
        """
        trainers = list(trainers)
        several = len(self.losses) > 1
        values: dict[str, Any] = dict(self.pace.report(trainers[0].stepper))
        for trainer in trainers:
            if trainer.name in self.losses:
                prefix = f"{trainer.name}/" if several else ""
                values[f"{prefix}loss_by_sigma"] = self.losses[trainer.name].report(trainer.stepper)
        values["host_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        if self.device.type == "cuda":
            values["device_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        if self.supply is not None:
            values |= self.supply.report(self.stepped.steps, self.stepped.seconds, self.stepped.waited)
        self.stepped = Stepped()
        if self.compiler is not None:
            values |= {"compiled_graphs": self.compiler.graphs, "compile_seconds": self.compiler.seconds}
        return values

    def add_losses(self, trainer: ExpertTrainer, loss: Loss) -> None:
        """One micro-step's losses, by their noise levels if they have any."""
        window = trainer.loss.window
        if loss.sigma is None or window is None:
            return
        if trainer.name not in self.losses:
            zeros = torch.zeros(BINS, 2, dtype=torch.float64, device=trainer.stepper.device)
            self.losses[trainer.name] = LossByNoise(window, zeros)
        self.losses[trainer.name].add(loss.sigma, loss.per_sample)

    def flops_of(self, trainer: ExpertTrainer, tokens: int, text_rows: int) -> int:
        """Operations of one sample; 0 for what is no transformer."""
        module = trainer.trainable.module
        if not isinstance(module, WanTransformer):
            return 0
        key = (trainer.name, tokens, text_rows)
        if key not in self.flops:
            rows = min(text_rows + 1, module.text_length)
            flops, loss = training_flops(module, tokens=tokens, text_rows=rows), trainer.loss
            self.flops[key] = loss.rows * flops.model + loss.base_rows * flops.forward
        return self.flops[key]


class StepMeter:
    """One step: `with meter("forward"):` around each of its parts, `count` for each micro-step, then `values`."""

    def __init__(
        self, throughput: Throughput, trainer: ExpertTrainer, number: int, before: Mapping[str, Tensor]
    ) -> None:
        self.throughput, self.trainer, self.number, self.before = throughput, trainer, number, before
        self.amounts = dict.fromkeys(("tokens", "video_seconds", "flops"), 0.0)
        self.packed = False
        self.spans: list[tuple[str, Moment, Moment]] = []
        self.begin = self._now()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """The time of one part of the step, which is progress."""
        report_progress(f"training step {self.number}, {part}")
        begin, on_host = self._now(), time.perf_counter()
        yield
        self.spans.append((part, begin, self._now()))
        if part == "data":
            self.throughput.stepped.waited += time.perf_counter() - on_host

    def count(self, batch: AnyBatch, loss: Loss) -> None:
        """Count one micro-step's samples."""
        self.packed = isinstance(batch, PackedBatch)
        for part in batch.parts:
            frames = part.num_frames(self.throughput.temporal_stride)
            self.amounts["tokens"] += part.num_tokens
            self.amounts["video_seconds"] += len(part) * frames / self.throughput.fps
            flops = self.throughput.flops_of(self.trainer, part.num_tokens // len(part), part.text_rows)
            self.amounts["flops"] += len(part) * flops
        self.throughput.add_losses(self.trainer, loss)

    def end(self) -> None:
        """The step is over."""
        self.times = Times(tuple(self.spans), self.begin, self._now())
        self.moved = self._moved() if self.before else {}

    @property
    def values(self) -> dict[str, Any]:
        """Amounts over all processes, the times (read when they are written), and the size of a watched update."""
        stepper = self.trainer.stepper
        ranks = stepper.data_ranks.count
        amounts: dict[str, Any] = {key: value * ranks for key, value in self.amounts.items()}
        if self.packed and ranks > 1:  # the packs of processes differ
            filled = (torch.full((), value, dtype=torch.float64, device=stepper.device) for value in amounts.values())
            total = stepper.sum(torch.stack([*filled]) / ranks)
            amounts = dict(zip(amounts, total.unbind(), strict=True))
        return {**amounts, "times": self.times, **self.moved}

    def _now(self) -> Moment:
        return moment(self.trainer.stepper.device)

    def _moved(self) -> dict[str, Tensor]:
        """Norm of the update, and its ratio to that of the weights, over what is watched."""
        stepper = self.trainer.stepper
        parts = stepper.local_parts()
        sums = torch.zeros(2, dtype=torch.float64, device=stepper.device)
        for name, old in self.before.items():
            new = parts[name].detach()
            squares = [(new - old).double().square().sum(), old.double().square().sum()]
            sums += torch.stack(squares).to(stepper.device)
        if stepper.sharded:
            sums = stepper.sum(sums)
        update, weights = sums.sqrt().unbind()
        return {"update_norm": update, "update_ratio": update / weights.clamp(min=1e-30)}


def moment(device: torch.device) -> Moment:
    """Now, in the device's work."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def watched(stepper: Stepper) -> dict[str, Tensor]:
    """Copies of trained tensors as this process holds them, up to WATCHED elements spread over the whole model."""
    parts = stepper.local_parts()
    total = sum(part.numel() for part in parts.values())
    stride = max(1, -(-total // WATCHED))
    return {name: part.detach().clone() for name, part in list(parts.items())[::stride]}


@dataclass(frozen=True)
class Times:
    """The spans of one step, to be read once the device has passed them."""

    spans: tuple[tuple[str, Moment, Moment], ...]
    begin: Moment
    end: Moment

    def seconds(self) -> dict[str, float]:
        """Seconds of each part, those of the same name together; `rest` is what no part has."""
        parts: dict[str, float] = {}
        for name, begin, end in self.spans:
            parts[name] = parts.get(name, 0.0) + _seconds(begin, end)
        return {**parts, "rest": max(0.0, _seconds(self.begin, self.end) - sum(parts.values()))}


def _seconds(begin: Moment, end: Moment) -> float:
    if isinstance(begin, float):
        assert isinstance(end, float)
        return end - begin
    assert not isinstance(end, float)
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def peak_of(device: torch.device) -> float | None:
    """The peak of a device in operations per second; None where it is not listed: a neighbour's number would make MFU
    wrong by a factor of 3.
    """
    card = CARDS.get(card_model(torch.cuda.get_device_name(device))) if device.type == "cuda" else None
    return None if card is None else card.peak
