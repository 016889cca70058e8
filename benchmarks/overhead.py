"""What all that is on by default costs: python benchmarks/overhead.py [--pairs 10] [--steps 3]

The same transformer (W-S: 6 layers, 384 wide, 14.8 M parameters, float32) learns from the same batches (one sample of
2,048 tokens and 512 rows of text) in two ways, turn by turn: `bare`, a plain accelerate loop (forward, backward, clip,
AdamW), and `wantrain`, the project's own loop with its log, meter, safeguards, watchdog and prefetching, but without
checkpoints and validation, which are choices. Reported are CPU seconds of the process per step. Before anything is
timed both must have come to the same loss, or the timing is void. Writes overhead.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import result
import torch
from accelerate import Accelerator

from wantrain import flow
from wantrain.batch import Batch
from wantrain.data import BatchSampler
from wantrain.losses import FlowMatching
from wantrain.models import WanTransformer
from wantrain.training.alternation import ExpertAlternation
from wantrain.training.engine.engine import StepOptions, Stepper
from wantrain.training.engine.optim import Schedule
from wantrain.training.expert import ExpertTrainer
from wantrain.training.loop import Run, fit
from wantrain.training.monitoring.metrics import Metrics
from wantrain.training.monitoring.safeguards import Safeguards
from wantrain.training.monitoring.throughput import Throughput
from wantrain.training.monitoring.watchdog import Watchdog
from wantrain.training.trainable import TrainableModule
from wantrain.util.files import write_json
from wantrain.util.seeds import generator_at

WS: dict[str, Any] = {
    "num_attention_heads": 3, "attention_head_dim": 128, "text_dim": 4096, "ffn_dim": 1024, "num_layers": 6,
}  # fmt: skip
RATE, CLIP, SEED = 1e-4, 1.0, 0


class Samples:
    """One latent and one text, whatever is asked for: what the loop takes for a data set."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(1)
        self.latents = torch.randn(1, 16, 8, 32, 32, generator=random)
        self.text = 0.1 * torch.randn(1, 512, 4096, generator=random)

    def foresee(self, samples: Any, positions: Any) -> bool:
        return False

    def load(self, samples: Any, positions: Any) -> Batch:
        count = len(positions)
        names = tuple(f"clip-{sample}" for sample in samples)
        return Batch(self.latents[:count], self.text[:count], names, tuple(int(place) for place in positions))

    def heldout_batches(self, count: int) -> list[Batch]:
        return []

    def captions(self) -> list[str]:
        return []


class NoCheckpoints(nullcontext[None]):
    """A store that keeps nothing."""

    def wait(self) -> None: ...

    def finish(self) -> None: ...

    def save(self, *_: Any, **__: Any) -> None: ...


class NoPage(nullcontext[None]):
    """A page that is not written."""

    def refresh(self, *, now: bool = False) -> None: ...


def model() -> WanTransformer:
    torch.manual_seed(0)
    built = WanTransformer(**WS)
    torch.nn.init.normal_(built.head.head.weight, std=0.02)  # zero would leave the blocks without a gradient
    return built


class Bare:
    """The loop that anybody writes."""

    def __init__(self, data: Samples) -> None:
        self.data, self.accelerator, self.step = data, Accelerator(), 0
        module = model()
        optimizer = torch.optim.AdamW(module.parameters(), lr=RATE, fused=True)
        self.module, self.optimizer = self.accelerator.prepare(module, optimizer)
        self.distribution = FlowMatching(density="uniform", shift=3.0)

    def run(self, steps: int) -> float:
        loss = torch.zeros(())
        for _ in range(steps):
            batch = self.data.load([0], [self.step])
            generator = generator_at(SEED, "noise", self.step)
            sigma = self.distribution.draw(batch, [generator])
            noise = torch.randn(batch.latents_BCTHW.shape[1:], generator=generator)[None]
            noisy = flow.path(batch.latents_BCTHW, noise, sigma)
            predicted = self.module(noisy, 1000 * sigma, batch.text_BLD)
            loss = (predicted - (noise - batch.latents_BCTHW)).square().mean()
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.module.parameters(), CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
        return loss.item()


class Ours:
    """The project's loop."""

    def __init__(self, data: Samples, folder: Path, steps: int) -> None:
        module = model()
        optimizer = torch.optim.AdamW(module.parameters(), lr=RATE, fused=True)
        for group in optimizer.param_groups:
            group["peak_lr"] = RATE
        stepper = Stepper(Accelerator(), module, optimizer, StepOptions(1, CLIP, "fp32"))
        trainer = ExpertTrainer(
            name="dense",
            trainable=TrainableModule(module, "transformer"),
            stepper=stepper,
            loss=FlowMatching(density="uniform", shift=3.0),
            schedule=Schedule("constant"),
            plan=BatchSampler(np.zeros(64, dtype=np.int64), batch_size=1, seed=SEED),
            steps=steps,
        )
        self.run_ = Run(
            trainers={"dense": trainer},
            alternation=ExpertAlternation({"dense": 1.0}),
            data=data,
            checkpoints=NoCheckpoints(),  # type: ignore[arg-type]
            metrics=Metrics(folder / "metrics.jsonl", steps=steps),
            throughput=Throughput(16),
            safeguards=Safeguards(folder / "safeguards.jsonl"),
            page=NoPage(),  # type: ignore[arg-type]
            steps=steps,
            until=0,
            hooks=[],
            should_stop=lambda step: False,
            seed=SEED,
            checkpoint_every=10**9,
            facts={},
        )
        self.folder = folder

    def run(self, steps: int) -> float:
        start = self.run_.until
        self.run_ = replace(self.run_, until=start + steps)
        with Watchdog(3600.0):
            fit(self.run_, start)
        rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return float(rows[-1]["loss"])


def timed(loop: Bare | Ours, steps: int) -> float:
    """CPU seconds of this process, all its threads, per step."""
    began = time.process_time()
    loop.run(steps)
    return (time.process_time() - began) / steps


def main() -> None:
    """Hold the two loops against each other, then time them in turn."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--pairs", type=int, default=10)
    asked.add_argument("--steps", type=int, default=3)
    given = asked.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        data, total = Samples(), 2 + given.pairs * given.steps
        bare, ours = Bare(data), Ours(data, Path(folder), total)
        losses = bare.run(2), ours.run(2)
        taken: dict[str, list[float]] = {"wantrain": [], "bare": []}
        for number in range(given.pairs):
            order: list[tuple[str, Bare | Ours]] = [("wantrain", ours), ("bare", bare)]
            for side, loop in reversed(order) if number % 2 else order:
                taken[side].append(timed(loop, given.steps))
    errors = {"loss after 2 steps": (abs(losses[0] - losses[1]) / losses[0], 1e-5)}
    found = result.record(
        __file__,
        protocol="both loops in one process, in turn, each pair in the other order",
        shapes={"transformer": WS, "latents": [1, 16, 8, 32, 32], "text": [1, 512, 4096], "steps": given.steps},
        cases={"step": result.case({"CPU seconds per step": result.measure("CPU s", taken)}, errors)},
        libraries=("torch", "accelerate"),
        threads=torch.get_num_threads(),
    )
    print("\n".join(result.shown(found)))
    write_json(Path(__file__).with_suffix(".json"), found)


if __name__ == "__main__":
    main()
