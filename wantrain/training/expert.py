"""The trainer of one expert: the module, with all that is its own. A pair run has two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from wantrain.batch import Batch
from wantrain.data import phase_at
from wantrain.data.loading.phases import Order
from wantrain.losses import LossFunction
from wantrain.models.adapters import has_adapter
from wantrain.models.formats.weights import PART, read_files, write_files
from wantrain.runs.folder import EMA
from wantrain.training.engine.ema import Ema
from wantrain.training.engine.engine import Stepper
from wantrain.training.engine.joint_save import Tensors
from wantrain.training.engine.optim import Schedule, named_trainable
from wantrain.training.engine.slices import Slicer
from wantrain.training.protocols import Samples
from wantrain.training.trainable import TrainableModule
from wantrain.util import distributed
from wantrain.util.console import say

#: Name of the file with the optimizer's state, or of its files.
OPTIMIZER = "optimizer"


@dataclass
class ExpertTrainer:
    """One expert in training.

    name    high_noise, low_noise, dense, or vae
    steps   optimizer steps that are its own in the whole run
    folder  its place in a checkpoint: "" where it is alone there, else its name
    """

    name: str
    trainable: TrainableModule
    stepper: Stepper
    loss: LossFunction
    schedule: Schedule
    plan: Order
    steps: int
    ema: Ema | None = None
    folder: str = ""

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """While active, the module is in evaluation mode, with the averaged weights if an average is kept."""
        module = self.trainable.module
        module.eval()
        with nullcontext() if self.ema is None else self.ema.applied():
            yield
            self.stepper.part()
        module.train()

    @contextmanager
    def live_weights(self) -> Iterator[None]:
        """Inside `evaluating`, where an average is kept: the weights in training again."""
        assert self.ema is not None
        with self.ema.applied():  # it exchanges the two, so that a second time undoes the first
            yield

    def first_batch(self, data: Samples, count: int = 4) -> Batch:
        """Its first samples, at most `count`: something to measure on."""
        samples = self.plan.first(count)
        batch = data.load(samples, np.arange(len(samples)))
        assert isinstance(batch, Batch), "an expert is measured on latents"
        return batch

    def begin(self, own: int) -> dict[str, Any]:
        """Whose step its own number `own` is, for the log: of a pair, and of a phase; says a line where one begins."""
        phase, expert = phase_at(self.plan, own), {"expert": self.name} if self.folder else {}
        if phase.entry is None:
            return expert
        if own == phase.start:
            whose = f" of {self.name}" if self.folder else ""
            samples = f"{phase.sampler.samples_per_step:.6g} samples in each step"
            say(f"data.schedule: step {own}{whose} begins phase {phase.number}, {phase.entry}; {samples}")
        return {**expert, "phase": phase.number}

    def snapshot(self) -> tuple[int, Callable[[Path], dict[Path, str]]]:
        """The whole state of this moment, on the CPU: its size in bytes, and what writes it into a checkpoint's folder
        and gives the sha256 of each file of tensors.

        All processes take part; only the main one may write. The snapshot before must have been written by now.
        """
        self.stepper.copier.begin()
        weights = [self.trainable.snapshot(self.stepper.whole)]
        if self.ema is not None:
            with self.ema.applied():
                weights.append(self.trainable.snapshot(self.stepper.whole))
        optimizer = self.stepper.optimizer_state()

        def write(checkpoint: Path) -> dict[Path, str]:
            own, hashes = checkpoint / self.folder, dict[Path, str]()
            for kept, place in zip(weights, (own, own / EMA), strict=False):
                place.mkdir(parents=True, exist_ok=True)
                hashes |= kept.write(place)
            return {**hashes, **write_files(own, OPTIMIZER, optimizer)}

        return sum(kept.size for kept in weights) + sum(tensor.nbytes for tensor in optimizer.values()), write

    @property
    def saves_jointly(self) -> bool:
        """True if its checkpoints are written by all processes. An adapter is small and is gathered."""
        return self.stepper.keeps_parts and not has_adapter(self.trainable.module)

    def parts(self, *, copy: bool) -> list[Tensors]:
        """The whole state of this moment as this process holds it, for a joint save. Without `copy` nothing may change
        until it is written. All processes take part.
        """
        slicer, place = Slicer(self.stepper, distributed.rank()), Path(self.folder)
        config, tensors = self.trainable.layout()
        how = {"config": config, "metadata": self.trainable.metadata}
        found = [Tensors(str(place / self.trainable.part), PART, slicer.weights(tensors), **how)]
        if self.ema is not None:
            average = {
                id(parameter): self.ema.average[name]
                for name, parameter in named_trainable(self.trainable.module).items()
            }
            averaged = slicer.weights(tensors, average)
            found.append(Tensors(str(place / EMA / self.trainable.part), PART, averaged, **how))
        found.append(Tensors(self.folder, OPTIMIZER, slicer.optimizer()))
        if not copy:
            return found
        self.stepper.copier.begin()
        return [each.copied(self.stepper.copier) for each in found]

    def restore_optimizer(self, checkpoint: Path) -> None:
        """Give the optimizer the state that a checkpoint holds, written under any engine and number of processes."""
        folder = checkpoint / self.folder
        self.stepper.restore_optimizer_state(read_files(folder, OPTIMIZER), folder / f"{OPTIMIZER}.safetensors")


def read_average(trainable: TrainableModule, checkpoint: Path) -> dict[str, Tensor] | None:
    """The averaged weights in a checkpoint (a trainer's own folder), by parameter name; None if there are none.

    Leaves the module with the checkpoint's weights.
    """
    average = trainable.stored(checkpoint / EMA) if (checkpoint / EMA).is_dir() else None
    trainable.read(checkpoint)
    return average
