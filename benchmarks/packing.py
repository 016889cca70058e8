"""Packs beside buckets with remainders, in the same memory: python benchmarks/packing.py [--repeats 2] [--no-timing]

The mix is a published one: resolutions, frames, the share of clips kept and the batch size of each bucket of Open-Sora
1.2's first stage (hpcaitech/Open-Sora, configs/opensora-v1-2/train/stage1.py), frames brought to 4k + 1 and sides to
multiples of 16, so many clips in each bucket as CLIPS times its share. Three sides, each on 8 processes that wait for
one another in every step:

buckets   the published batch sizes; a bucket's last batch of the epoch is smaller; batches are shuffled and dealt out
one clip  one clip of one bucket for each process, as many as the memory of the largest allows: batch_size=8
packs     batch_tokens = the most tokens of a published batch

Reported are useful tokens over the budgets of all passes; useful tokens per operation of the busiest process of each
step, for a LoRA on A14B at these sizes; and useful tokens per CPU second at W-S (6 layers, 384 wide, all weights) with
sides halved, on 8 simulated processes and on one. Every distinct pass of each side is timed. Writes packing.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wantrain import geometry
from wantrain.batch import Batch, PackedBatch
from wantrain.data import BatchSampler, PackSampler
from wantrain.losses import FlowMatching
from wantrain.models import WanTransformer, adapters
from wantrain.models.flops import training_flops
from wantrain.util.files import write_json

#: (height, width) -> {frames: (share of clips, batch size)}
TABLE: dict[tuple[int, int], dict[int, tuple[float, int]]] = {
    (144, 256): {1: (0.5, 48), 33: (1.0, 2), 49: (1.0, 4), 97: (1.0, 2), 193: (1.0, 1)},
    (240, 432): {1: (0.6, 20), 33: (0.5, 2), 49: (0.5, 1), 65: (0.5, 1)},
    (352, 640): {1: (0.5, 8), 33: (0.2, 1)},
    (480, 848): {1: (0.2, 4), 17: (0.3, 1)},
    (720, 1280): {1: (0.1, 2)},
    (1088, 1920): {1: (0.1, 1)},
}
#: Sides in place of these where a CPU computes: about half.
HALVED = {
    (144, 256): (80, 128),
    (240, 432): (128, 208),
    (352, 640): (176, 320),
    (480, 848): (240, 432),
    (720, 1280): (352, 640),
    (1088, 1920): (544, 960),
}
CLIPS, RANKS, TEXT = 200, 8, 64
A14B = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
WS: dict[str, Any] = {
    "num_attention_heads": 3, "attention_head_dim": 128, "text_dim": 4096, "ffn_dim": 1024, "num_layers": 6,
}  # fmt: skip

#: What one process computes in one pass: (bucket, clips of it) of each bucket.
Pass = tuple[tuple[int, int], ...]
#: The passes of all processes in a step.
Step = Sequence[Pass]


class Mix:
    """The buckets of the table, and an epoch of each side. `times` multiplies batch sizes and the budget."""

    def __init__(self, sides: dict[tuple[int, int], tuple[int, int]] | None = None, times: int = 1) -> None:
        rows = [
            (geometry.Bucket(frames, *(sides or {}).get(size, size)), share, times * batch)
            for size, own in TABLE.items()
            for frames, (share, batch) in own.items()
        ]
        self.shapes = [geometry.latent_shape(bucket, 4, 8) for bucket, _, _ in rows]
        self.tokens = [geometry.num_tokens(shape) for shape in self.shapes]
        self.counts = [round(CLIPS * share) for _, share, _ in rows]
        self.batches = [batch for _, _, batch in rows]
        self.budget = max(size * batch for size, batch in zip(self.tokens, self.batches, strict=True))
        self.useful = sum(size * count for size, count in zip(self.tokens, self.counts, strict=True))
        self.buckets = np.repeat(np.arange(len(rows)), self.counts)

    def with_remainders(self) -> list[Step]:
        """Each bucket's clips in its batches, the last one smaller; shuffled and dealt out."""
        batches = [
            ((bucket, min(size, count - first)),)
            for bucket, (count, size) in enumerate(zip(self.counts, self.batches, strict=True))
            for first in range(0, count, size)
        ]
        order = np.random.default_rng(0).permutation(len(batches))
        return [[batches[place] for place in order[at : at + RANKS]] for at in range(0, len(order), RANKS)]

    def one_clip(self) -> list[Step]:
        """One clip for each process, all of one bucket."""
        plan = BatchSampler(self.buckets, batch_size=RANKS, seed=0)
        batches = [plan.batch(step) for step in range(plan.steps_for_epochs(1))]
        return [[((int(self.buckets[sample]), 1),) for sample in batch] for batch in batches]

    def plan(self) -> PackSampler:
        """The order of packs."""
        tokens = dict(enumerate(self.tokens))
        return PackSampler(self.buckets, tokens, budget=self.budget, passes=RANKS, seed=0)

    def packs(self) -> list[Step]:
        """The packs of an epoch."""
        plan = self.plan()
        packs = [[plan.pack(step, 0, rank, RANKS) for rank in range(RANKS)] for step in range(plan.steps_for_epochs(1))]
        return [
            [tuple((int(self.buckets[own[0]]), len(own)) for own, _ in pack.groups) for pack in step] for step in packs
        ]

    def tokens_of(self, steps: Sequence[Step]) -> int:
        """Tokens that all processes compute in these steps."""
        return sum(self.tokens[bucket] * clips for step in steps for own in step for bucket, clips in own)

    def rate(self, steps: Sequence[Step], cost: Callable[[Pass], float], update: float = 0.0) -> float:
        """Useful tokens per cost, where a step costs what its costliest pass does, and an update."""
        return self.tokens_of(steps) / sum(max(map(cost, step)) + update for step in steps)


def operations(mix: Mix) -> Callable[[Pass], float]:
    """Operations of a pass: A14B with a LoRA beside all linear layers, texts of full length."""
    with torch.device("meta"):
        module = WanTransformer(**A14B)
    adapters.inject(module, adapters.AdapterSettings(rank=32, alpha=32, targets="attention+ffn"), seed=0)
    flops = [training_flops(module, tokens=size, text_rows=512).executed for size in mix.tokens]
    return lambda own: float(sum(flops[bucket] * clips for bucket, clips in own))


class Timer:
    """CPU seconds of a pass at W-S, forward and backward, the least of `repeats`; and of an update."""

    def __init__(self, mix: Mix, repeats: int) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.mix, self.repeats, self.module, self.loss = mix, repeats, WanTransformer(**WS), FlowMatching()
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4, fused=True)
        self.seconds = functools.cache(self._seconds)

    def update(self) -> float:
        """Of one update; gradients must be there."""
        return min(self._timed(self.optimizer.step) for _ in range(3))

    def _seconds(self, own: Pass) -> float:
        parts = tuple(
            Batch(torch.randn(clips, 16, *self.mix.shapes[bucket]), torch.randn(clips, TEXT, 4096), ("",) * clips)
            for bucket, clips in own
        )
        batch = parts[0] if len(parts) == 1 else PackedBatch(parts, 1.0, 0)
        draws = self.loss.prepare(batch, [torch.Generator().manual_seed(n) for n in range(len(batch))])
        return min(
            self._timed(lambda: self.loss(self.module, batch, draws).value.backward()) for _ in range(self.repeats)
        )

    @staticmethod
    def _timed(work: Callable[[], object]) -> float:
        before = time.process_time()
        work()
        return time.process_time() - before


def timed(repeats: int) -> dict[str, Any]:
    """The measured part, with sides halved."""
    mix = Mix(HALVED)
    timer, sides = (
        Timer(mix, repeats),
        {"buckets": mix.with_remainders(), "one_clip": mix.one_clip(), "packs": mix.packs()},
    )
    timer.seconds(sides["one_clip"][0][0])
    update = timer.update()
    found = {}
    for name, steps in sides.items():
        alone = [[own] for step in steps for own in step]
        found[name] = {
            "passes_timed": len({own for step in steps for own in step}),
            "tokens_per_second_on_8": round(mix.rate(steps, timer.seconds, update), 1),
            "tokens_per_second_on_1": round(mix.rate(alone, timer.seconds, update), 1),
        }
        print(name, found[name], flush=True)
    ratios = {
        f"packs_over_{other}_{on}": round(
            found["packs"][f"tokens_per_second_{on}"] / found[other][f"tokens_per_second_{on}"], 3
        )
        for other in ("buckets", "one_clip")
        for on in ("on_8", "on_1")
    }
    return {"budget": mix.budget, "update_seconds": round(update, 4), **found, **ratios}


def counted(times: int) -> dict[str, Any]:
    """The counted part, at the real sizes."""
    mix = Mix(times=times)
    sides, cost = {"buckets": mix.with_remainders(), "packs": mix.packs()}, operations(mix)
    if times == 1:
        sides["one_clip"] = mix.one_clip()
    rates = {name: mix.rate(steps, cost) for name, steps in sides.items()}
    costs = np.array([[cost(own) for own in step] for step in sides["packs"]])
    return {
        "budget": mix.budget,
        "useful_over_processed": {
            name: round(mix.tokens_of(steps) / (mix.budget * RANKS * len(steps)), 4) for name, steps in sides.items()
        },
        "packs_over": {name: round(rates["packs"] / rate, 3) for name, rate in rates.items() if name != "packs"},
        "operations_busiest_over_mean": round(float((costs.max(axis=1) / costs.mean(axis=1)).mean()), 3),
    }


def main() -> None:
    """Count, measure, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--no-timing", action="store_true")
    args = parser.parse_args()
    result: dict[str, Any] = {"counted": {f"memory x{times}": counted(times) for times in (1, 2)}}
    print(json.dumps(result, indent=2), flush=True)
    if args.no_timing:
        return
    result["timed"] = timed(args.repeats)
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"numpy": np.__version__, "torch": torch.__version__},
        "machine": f"{platform.machine()}, 1 thread",
        "command": f"python benchmarks/packing.py --repeats {args.repeats}",
    }
    write_json(Path(__file__).with_suffix(".json"), {**about, **result})
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
