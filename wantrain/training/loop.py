"""fit(): the story of a run, top to bottom.

whose turn? -> batch -> loss -> backward -> (at the boundary) clip, step, average -> log -> validate, preview -> save ->
stop?

The loop knows no model, no task and no engine: a Stepper hides the engine, a loss is given the model, and hooks are
asked after every step. Everything random is drawn by the samples' positions in the run, so nothing about randomness
is saved and a resumed run is the unbroken one, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wantrain.batch import Batch
from wantrain.losses import Draws
from wantrain.runs.checkpoint import Checkpoints, read_state
from wantrain.training.alternation import ExpertAlternation
from wantrain.training.engine.main_process import on_main
from wantrain.training.engine.signals import Signals
from wantrain.training.expert import ExpertTrainer
from wantrain.training.micro_batches import micro_batches
from wantrain.training.monitoring.metrics import Metrics
from wantrain.training.monitoring.safeguards import Safeguards
from wantrain.training.monitoring.throughput import Meter
from wantrain.training.protocols import Data, Hook
from wantrain.util.progress import report_progress

#: Optimizer steps between two lines on the console.
LOG_EVERY = 10


@dataclass
class Run:
    """Everything a run consists of; `fit` moves it from the step it has reached to `until`."""

    trainers: Mapping[str, ExpertTrainer]
    alternation: ExpertAlternation
    data: Data
    checkpoints: Checkpoints
    metrics: Metrics
    meter: Meter
    safeguards: Safeguards
    steps: int
    until: int  # where this start of it ends: `steps`, or earlier
    seed: int
    checkpoint_every: int
    state: Mapping[str, Any]  # what a checkpoint says besides its tensors
    hooks: list[Hook] = field(default_factory=list)
    should_stop: Callable[[int], bool] = lambda step: False  # validation's word that the run may end at a step
    score: float | None = None  # validation loss of the step the run is at, if it was measured

    def resume(self, checkpoint: Path | None) -> int:
        """Go on from a checkpoint whose weights the trainers have already; returns its step (0: from the start)."""
        if checkpoint is None:
            self.metrics.cut_back(-1)
            return 0
        state = read_state(checkpoint)
        if state["data"] != self.state["data"]:
            raise ValueError(
                f"{checkpoint} was trained on other shards than data.shards holds now (another manifest); "
                "give those it was trained on, or a new run=NAME"
            )
        for trainer in self.trainers.values():
            trainer.restore_optimizer(checkpoint)
        self.safeguards.restore(state.get("loss_baselines", {}), self.trainers)  # older runs learn it anew
        self.metrics.cut_back(state["step"])
        return int(state["step"])

    def save(self, step: int) -> None:
        """Begin a checkpoint; the log is flushed before, so that it never misses a committed step."""
        report_progress(f"saving step {step}")
        began = time.perf_counter()
        self.metrics.flush(speak=False)
        on_main(self.checkpoints.wait, "writing the checkpoint before")
        snapshots = [trainer.snapshot() for trainer in self.trainers.values()]
        taken = {name: self.alternation.count(name, step) for name in self.trainers}
        samples = {name: own * self.trainers[name].plan.batch_size for name, own in taken.items()}
        state = {
            **self.state,
            "samples": sum(samples.values()),
            "experts": taken,
            "loss_baselines": self.safeguards.state(),
        }

        def write(folder: Path) -> dict[Path, str]:
            return {path: digest for _, write_member in snapshots for path, digest in write_member(folder).items()}

        size = sum(size for size, _ in snapshots)
        on_main(partial(self.checkpoints.save, step, write, state, size=size, score=self.score), f"saving step {step}")
        self.metrics.note("save_seconds", time.perf_counter() - began)

    def ask_hooks(self, step: int) -> bool:
        """Validation and previews, where they are due, with their results logged at `step`; True if any was."""
        self.score = None
        due = [hook for hook in self.hooks if hook.due(step)]
        if not due:
            return False
        report_progress(f"looking at step {step}: {', '.join(type(hook).__name__ for hook in due)}")
        with ExitStack() as watched:
            for trainer in self.trainers.values():
                watched.enter_context(trainer.watched())
            results: dict[str, Any] = {}
            for hook in due:
                results |= hook(step)
        self.metrics.annotate(step, results)
        found = [value for key, value in results.items() if key.endswith("validation_loss")]
        self.score = sum(found) / len(found) if found else None
        return True

    def first_batch(self, count: int = 4) -> Batch:
        """The first samples of the run, at most `count`: something to measure on."""
        samples = next(iter(self.trainers.values())).plan.batch(0)[:count]
        return self.data.load(samples, np.arange(len(samples)))


def fit(run: Run, start: int) -> int | None:
    """Train from step `start` to `run.until`. Returns the signal that ended it early, if one did."""
    metrics, step, stopped = run.metrics, start, None
    if step == 0:
        run.ask_hooks(step)
    for trainer in run.trainers.values():
        trainer.trainable.module.train()
    batches = micro_batches(run.data, run.trainers, run.alternation, start=start, until=run.until, seed=run.seed)
    with Signals() as signals, run.checkpoints:
        done = step >= run.until or run.should_stop(step)
        while not done:
            name, own = run.alternation.at(step)
            told, stopped = take_step(run, run.trainers[name], own, step + 1, batches, signals)
            step += 1
            whose = {"expert": name} if len(run.trainers) > 1 else {}
            metrics.add(step, {**whose, "samples": step * run.trainers[name].plan.batch_size, **told})
            if run.ask_hooks(step):  # they may have taken long
                stepper = run.trainers[name].stepper
                stopped = int(stepper.any_signal(signals.received)) or None
            done = step == run.until or stopped is not None or run.should_stop(step)
            if done or step % LOG_EVERY == 0:
                metrics.annotate(step, run.meter.report(run.trainers.values()))
                metrics.flush()
            if done or step % run.checkpoint_every == 0:
                run.save(step)
        on_main(run.checkpoints.finish, "writing the last checkpoint")
    return stopped


def take_step(
    run: Run, trainer: ExpertTrainer, own: int, step: int, batches: Iterator[tuple[Batch, Draws]], signals: Signals
) -> tuple[dict[str, Any], int | None]:
    """One optimizer step of `trainer`, its own number `own`, which brings the run to `step`.

    Returns what is logged, and the signal that any process has received. The host waits for the device once.
    """
    stepper, meter, safeguards = trainer.stepper, run.meter, run.safeguards
    scale = trainer.schedule(own, trainer.steps)
    stepper.begin(scale)
    safeguards.begin(trainer)
    meter.begin(trainer, watch=step % LOG_EVERY == 0)
    losses, parts = [], []
    for micro_step in range(stepper.accumulate):
        report_progress(f"training step {step}")
        batch, draws = next(batches)
        meter.mark("data")
        with stepper.forward_context():
            record = trainer.loss(stepper.wrapped, batch.to(stepper.device), draws.to(stepper.device))
        meter.mark("forward")
        safeguards.drew(batch, draws, record)
        value = safeguards.judge(record.value) if (last := micro_step == stepper.accumulate - 1) else record.value
        stepper.backward(value, last=last)
        meter.mark("backward")
        meter.saw(batch, record)
        losses.append(record.value.detach())
        parts.append(record.parts)
    norm = stepper.clip_gradients()
    (size,), (signal,), (excess,), own_losses = stepper.read(
        norm, stepper.any_signal(signals.received), *safeguards.facts()
    )
    update = safeguards.allow(step, size, excess, own_losses)
    stepper.step(update=update)
    if update:
        safeguards.moved()
        if trainer.ema is not None:
            trainer.ema.follow(own + 1)
    meter.mark("optimizer")
    told: dict[str, Any] = {key: stepper.mean(torch.stack([part[key] for part in parts]).mean()) for key in parts[0]}
    loss = stepper.mean(torch.stack(losses).mean())
    meter.mark("communication")
    rate = max(group["lr"] for group in stepper.optimizer.param_groups)
    told |= {"loss": loss, "lr": rate, "lr_scale": scale, "grad_norm": norm, **meter.over()}
    return told, int(signal) or None
