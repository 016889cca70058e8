"""fit(): the story of a run, top to bottom.

batch -> loss -> backward -> (at the boundary) clip, step -> log -> validate, preview -> save -> stop?

The loop knows no model, no task and no engine: a Stepper hides the engine, a loss is given the model, and hooks are
asked after every step. Everything random is drawn by the samples' positions in the run, so nothing about randomness
is saved and a resumed run is the unbroken one, bit for bit.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from wantrain import world
from wantrain.batch import Batch
from wantrain.data import Plan, prefetch, share
from wantrain.losses import Loss
from wantrain.training.checkpoint import OPTIMIZER, Checkpoints, read_state, restore_optimizer, save_optimizer
from wantrain.training.metrics import Metrics
from wantrain.training.optim import Schedule, named_trainable
from wantrain.training.parallel import Stepper
from wantrain.training.trainee import Trainee

#: Optimizer steps between two lines on the console.
LOG_EVERY = 10


class Data(Protocol):
    """What the loop asks of a data set: samples by number, for places in the run."""

    def load(self, samples: NDArray[Any], positions: NDArray[Any]) -> Batch: ...

    def heldout_batches(self, count: int) -> list[Batch]: ...

    def captions(self) -> list[str]: ...


#: Asked after every step (and at step 0) with the step; what it returns is logged with that step.
Hook = Callable[[int], Mapping[str, Any]]


class Signals(AbstractContextManager["Signals"]):
    """SIGTERM, SIGINT and SIGUSR1 ask for a stop; the loop leaves through its usual save."""

    watched = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> Signals:
        self.before = {number: signal.signal(number, self._note) for number in self.watched}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


@dataclass
class Run:
    """Everything a run consists of; `fit` moves it from the step it has reached to `steps`."""

    trainee: Trainee
    stepper: Stepper
    loss: Callable[..., Loss]
    data: Data
    plan: Plan
    schedule: Schedule
    checkpoints: Checkpoints
    metrics: Metrics
    steps: int
    seed: int
    checkpoint_every: int
    state: Mapping[str, Any]  # what a checkpoint says besides its tensors
    hooks: list[Hook] = field(default_factory=list)

    def resume(self) -> int:
        """Continue from the newest good checkpoint; returns the step it was written at (0: from the start)."""
        if world.is_main():
            self.checkpoints.prepare()
        self.stepper.accelerator.wait_for_everyone()
        newest = self.checkpoints.newest()
        if newest is None:
            self.metrics.cut_back(-1)
            return 0
        if read_state(newest)["data"] != self.state["data"]:
            raise ValueError(
                f"{newest} was trained on other shards than data.shards holds now (another manifest); "
                "give those it was trained on, or a new run=NAME"
            )
        self.trainee.read(newest)
        restore_optimizer(newest / OPTIMIZER, self.stepper.optimizer, self._names())
        step = int(newest.name.removeprefix("step_"))
        self.metrics.cut_back(step)
        return step

    def save(self, step: int) -> None:
        """Write a checkpoint; the log is flushed before, so that it never misses a committed step."""
        self.metrics.flush(speak=False)
        if world.is_main():

            def write(folder: Path) -> None:
                self.trainee.write(folder)
                save_optimizer(folder / OPTIMIZER, self.stepper.optimizer, self._names())

            self.checkpoints.save(step, write, {**self.state, "samples": step * self.plan.batch_size})
        self.stepper.accelerator.wait_for_everyone()

    def ask_hooks(self, step: int) -> None:
        """Validation and previews, in evaluation mode, with their results logged at `step`."""
        self.trainee.module.eval()
        for hook in self.hooks:
            self.metrics.annotate(step, hook(step))
        self.trainee.module.train()

    def batches(self, start: int) -> Iterator[Batch]:
        """This process's micro-batches from optimizer step `start` on, loaded one thread ahead."""
        accumulate, size = self.stepper.accumulate, self.plan.batch_size
        split = (accumulate, world.rank(), world.world_size())

        def requests() -> Iterator[Callable[[], Batch]]:
            """What to load, in order."""
            for step in range(start, self.steps):
                samples = self.plan.batch(step)
                places = range(step * size, (step + 1) * size)
                for micro_step in range(accumulate):
                    mine = share(samples, micro_step, *split)
                    positions = share(places, micro_step, *split)
                    yield partial(self.data.load, mine, positions)

        return prefetch(requests())

    def first_batch(self, count: int = 4) -> Batch:
        """The first samples of the run, at most `count`: something to measure on."""
        samples = self.plan.batch(0)[:count]
        return self.data.load(samples, np.arange(len(samples)))

    def _names(self) -> dict[torch.Tensor, str]:
        return {parameter: name for name, parameter in named_trainable(self.trainee.module).items()}


def fit(run: Run, start: int) -> int | None:
    """Train from step `start` to `run.steps`. Returns the signal that ended it early, if one did."""
    stepper, metrics = run.stepper, run.metrics
    step, stopped = start, None
    if step == 0:
        run.ask_hooks(step)
    run.trainee.module.train()
    batches = run.batches(start)
    with Signals() as signals:
        while step < run.steps and stopped is None:
            losses, parts = [], []
            for micro_step in range(stepper.accumulate):
                batch = next(batches).to(stepper.device)
                generators = [world.generator(run.seed, "noise", position) for position in batch.positions]
                with stepper.forward_context():
                    record = run.loss(stepper.wrapped, batch, generators)
                stepper.backward(record.value, last=micro_step == stepper.accumulate - 1)
                losses.append(record.value.detach())
                parts.append(record.parts)

            learning_rate = run.schedule(step, run.steps)
            norm = stepper.update(learning_rate)
            step += 1

            loss = stepper.mean(torch.stack(losses).mean())
            samples = step * run.plan.batch_size
            told = {name: stepper.mean(torch.stack([part[name] for part in parts]).mean()) for name in parts[0]}
            metrics.add(step, {"loss": loss, "samples": samples, "lr_scale": learning_rate, "grad_norm": norm, **told})
            run.ask_hooks(step)
            stopped = stepper.agree(signals.received)  # read once: no step ends the run without its checkpoint
            done = step == run.steps or stopped is not None
            if done or step % LOG_EVERY == 0:
                metrics.flush()
            if done or step % run.checkpoint_every == 0:
                run.save(step)
    return stopped
