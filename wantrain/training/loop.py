"""fit(): a run, step by step.

whose turn? -> batch -> loss -> backward -> (at the boundary) clip, step, average -> log -> evaluate -> save -> stop?

The loop knows no model, no task and no engine: a Stepper hides the engine, the loss takes the model, and hooks are
called after every step. All randomness is a function of a sample's position in the run, so no random state is saved and
a resumed run is the unbroken one, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from wantrain.runs.checkpoint import Checkpoints, Write
from wantrain.runs.pages.live import RunPage
from wantrain.training.alternation import ExpertAlternation
from wantrain.training.engine.joint_save import JointSaver
from wantrain.training.engine.main_process import on_main
from wantrain.training.engine.signals import Signals
from wantrain.training.expert import ExpertTrainer
from wantrain.training.micro_batches import MicroBatch, micro_batches
from wantrain.training.monitoring.metrics import Metrics
from wantrain.training.monitoring.safeguards import Safeguards
from wantrain.training.monitoring.throughput import Throughput
from wantrain.training.protocols import Hook, Samples
from wantrain.util.progress import report_progress

#: Optimizer steps between two lines on the console.
LOG_EVERY = 10


@dataclass(frozen=True)
class Run:
    """Everything a run consists of; `fit` moves it from the step it has reached to `until`.

    hooks        validation and previews
    should_stop  (step) -> whether validation asks the run to end there
    steps        of the whole run; `until` is where this start of it ends: there, or earlier
    facts        what a checkpoint records besides its tensors
    saver        writes checkpoints of which each process holds a part; None: the main process has the whole
    """

    trainers: Mapping[str, ExpertTrainer]
    alternation: ExpertAlternation
    data: Samples
    checkpoints: Checkpoints
    metrics: Metrics
    throughput: Throughput
    safeguards: Safeguards
    page: RunPage
    hooks: Sequence[Hook]
    should_stop: Callable[[int], bool]
    steps: int
    until: int
    seed: int
    checkpoint_every: int
    facts: Mapping[str, Any]
    saver: JointSaver | None = None

    def save(self, step: int, score: float | None) -> None:
        """Begin a checkpoint; the log is flushed before, so that it never misses a committed step.

        `score` is the validation loss at this step, if it was measured.
        """
        report_progress(f"saving step {step}")
        began = time.perf_counter()
        self.metrics.flush(speak=False)
        on_main(self.checkpoints.wait, "writing the checkpoint before")
        write, size, ended = self._state()
        counts = {"samples": self.samples(step), "experts": self.count(step)}
        state = {**self.facts, **counts, **self.safeguards.state()}
        save = partial(self.checkpoints.save, step, write, state, size=size, score=score, ended=ended)
        on_main(save, f"saving step {step}")
        self.metrics.note("save_seconds", time.perf_counter() - began)

    def count(self, step: int) -> dict[str, int]:
        """The steps that each expert has made when the run is at `step`."""
        return {name: self.alternation.count(name, step) for name in self.trainers}

    def samples(self, step: int) -> int:
        """The samples that all experts have used then."""
        return sum(self.trainers[name].plan.samples_before(own) for name, own in self.count(step).items())

    def _state(self) -> tuple[Write, int, Callable[[], None]]:
        """Of the state of this moment: what writes its tensors, their bytes, and what to call when that is over."""
        if self.saver is not None:
            self.saver.wait()
            copy = self.checkpoints.background
            save = self.saver.begin([part for trainer in self.trainers.values() for part in trainer.parts(copy=copy)])
            return save.write, save.size, save.ended
        snapshots = [trainer.snapshot() for trainer in self.trainers.values()]

        def write(folder: Path) -> dict[Path, str]:
            return {path: digest for _, write_expert in snapshots for path, digest in write_expert(folder).items()}

        return write, sum(size for size, _ in snapshots), lambda: None

    def evaluate(self, step: int) -> dict[str, Any]:
        """The results of the hooks that are due at `step`, which are logged; empty if none is."""
        due = [hook for hook in self.hooks if hook.due(step)]
        if not due:
            return {}
        report_progress(f"evaluating step {step}: {', '.join(type(hook).__name__ for hook in due)}")
        results: dict[str, Any] = {}
        with ExitStack() as evaluating:
            for trainer in self.trainers.values():
                evaluating.enter_context(trainer.evaluating())
            for hook in due:
                results |= self.metrics.costs.timed(hook, step)
        self.metrics.annotate(step, results)
        return results


def fit(run: Run, start: int) -> int | None:
    """Train from step `start` to `run.until`. Returns the signal that ended it early, if one did."""
    step, signal = start, None
    if step == 0:
        run.evaluate(step)
        run.page.refresh(now=True)
    for trainer in run.trainers.values():
        trainer.trainable.module.train()
    batches = micro_batches(run.data, run.trainers, run.alternation, start=start, until=run.until, seed=run.seed)
    with Signals() as signals, run.page, run.checkpoints, run.safeguards:
        done = step >= run.until or run.should_stop(step)
        while not done:
            name, own = run.alternation.at(step)
            trainer = run.trainers[name]
            whose = trainer.begin(own)
            values, signal = take_step(run, trainer, own, step + 1, batches, signals)
            step += 1
            run.metrics.add(step, {**whose, "samples": run.samples(step), **values})
            results = run.evaluate(step)
            if results:  # it may have taken long
                signal = int(trainer.stepper.any_signal(signals.received)) or None
            done = step == run.until or signal is not None or run.should_stop(step)
            logs, saves = step % LOG_EVERY == 0, step % run.checkpoint_every == 0
            if done or logs or saves:  # all is known of the steps so far before it is written
                signal = run.safeguards.hear() or signal
                done = done or signal is not None
            if done or logs:
                run.metrics.annotate(step, run.throughput.report(run.trainers.values()))
                run.metrics.flush()
                run.page.refresh()
            if done or saves:
                run.save(step, validation_loss(results))
        on_main(run.checkpoints.finish, "writing the last checkpoint")
        if run.saver is not None:
            run.saver.wait()
    return signal


def take_step(
    run: Run, trainer: ExpertTrainer, own: int, step: int, batches: Iterator[MicroBatch], signals: Signals
) -> tuple[dict[str, Any], int | None]:
    """One optimizer step of `trainer`, its own number `own`, which brings the run to `step`: what is logged of it, and
    the signal that any process has received (see Verdict).
    """
    stepper, losses = trainer.stepper, []
    scale = trainer.schedule(own, trainer.steps)
    stepper.begin(scale, own)
    watch = step % LOG_EVERY == 0
    with run.safeguards.step(trainer, step) as guard, run.throughput.step(trainer, step, watch=watch) as span:
        for last in stepper.micro_steps():
            with span("data"):
                micro = next(batches)
            with span("forward"), stepper.forward_context():
                loss = trainer.loss(stepper.wrapped, *micro.here)
            guard.observe(micro.batch, micro.draws, loss)
            with span("backward"):
                stepper.backward(guard.checked(loss.value) if last else loss.value, last=last)
            span.count(micro.batch, loss)
            losses.append(loss)
        with span("optimizer"):
            norm = stepper.clip_gradients()
            verdict = guard.verdict(norm, stepper.any_signal(signals.received))
            stepper.step(update=verdict.update)
            if trainer.ema is not None:
                trainer.ema.follow(own + 1, update=verdict.update)
        with span("communication"):
            means = {"loss": stepper.mean(torch.stack([loss.value.detach() for loss in losses]).mean())}
            for key in losses[0].parts:
                means[key] = stepper.mean_of_present(torch.stack([loss.parts[key] for loss in losses]))
    rate = max(group["lr"] * group.get("d", 1.0) for group in stepper.optimizer.param_groups)  # d: Prodigy's estimate
    return {**means, "lr": rate, "lr_scale": scale, "grad_norm": norm, **guard.values, **span.values}, verdict.signal


def validation_loss(results: Mapping[str, Any]) -> float | None:
    """The mean validation loss of the experts, if it was measured."""
    found = [value for key, value in results.items() if key.endswith("validation_loss")]
    return sum(found) / len(found) if found else None
