"""Order and balance: the product's samplers for all clips and all processes."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import numpy as np
from numpy.typing import NDArray
from packing import TABLE as PUBLISHED

from scale_parts.assumptions import Assumptions
from scale_parts.cluster import Cluster, Step, seconds_of, tokens_of
from wantrain import geometry
from wantrain.data import BatchSampler, PackSampler, share
from wantrain.data.loading.streams import TABLE
from wantrain.training.batching import Batching
from wantrain.training.planning.roofline import Work

#: The buckets of the mix and the share of clips in each (benchmarks/packing.py has the source).
MIX = {
    str(geometry.Bucket(frames, *size)): part for size, row in PUBLISHED.items() for frames, (part, _) in row.items()
}


def bucket_numbers(clips: int) -> NDArray[np.uint8]:
    """The bucket of each clip, a number into MIX: as many as the mix says, one kind after the other."""
    ends = np.cumsum([0.0, *MIX.values()]) / sum(MIX.values()) * clips
    counts = np.diff(np.round(ends)).astype(np.int64).tolist()
    return np.repeat(np.arange(len(MIX), dtype=np.uint8), counts)


def whole_order(taken: Assumptions) -> dict[str, Any]:
    """The order of all clips: what it takes to open, and that steps anywhere in an epoch share no sample."""
    buckets = bucket_numbers(taken.clips)
    tracemalloc.start()
    began = time.perf_counter()
    plan = BatchSampler(buckets, batch_size=taken.processes, seed=taken.seed)
    opened = time.perf_counter() - began
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    steps = plan.steps_for_epochs(1)
    # Towards the end of an epoch buckets begin their next pass, each at another step.
    last = steps - TABLE if steps > 2 * TABLE else steps // 2
    seen = np.linspace(0, last - 1, min(taken.steps_seen, last)).astype(np.int64)
    began = time.perf_counter()
    batches = [plan.batch(int(step)) for step in seen]
    each = (time.perf_counter() - began) / len(seen)
    samples = np.concatenate(batches)
    alike = all(len(np.unique(buckets[batch])) == 1 for batch in batches)
    counts = np.bincount([buckets[batch[0]] for batch in batches], minlength=len(MIX))
    return {
        "steps_per_epoch": steps,
        "steps_seen": len(seen),
        "samples_seen": len(samples),
        "distinct": len(np.unique(samples)),
        "one_bucket_in_each_step": alike,
        "same_on_half_the_processes": all(_same_on_half(taken, batch) for batch in batches[:8]),
        "shares": {bucket: int(count) / len(seen) for bucket, count in zip(MIX, counts, strict=True)},
        "bytes_per_clip": {"kept": round(kept / taken.clips, 2), "peak": round(peak / taken.clips, 2)},
        "measured": {"seconds_to_open": round(opened, 1), "ms_per_step": round(1000 * each, 2)},
    }  # fmt: skip


def _same_on_half(taken: Assumptions, batch: NDArray[np.int64]) -> bool:
    """True if half as many processes train on the same samples in this step, in two passes each."""
    half = Batching.of(taken.processes, accumulate=None, micro_batch=1, processes=taken.processes // 2)
    parts = [
        share(batch, micro, half.accumulate, rank, half.processes)
        for micro in range(half.accumulate)
        for rank in range(half.processes)
    ]
    whole = [share(batch, 0, 1, rank, taken.processes) for rank in range(taken.processes)]
    return bool(np.array_equal(np.concatenate(parts), np.concatenate(whole)))


def balance(taken: Assumptions, cluster: Cluster, shares: dict[str, float]) -> dict[str, Any]:
    """Tokens and seconds of a step over the mix, for three ways to make one: a clip of one bucket for each card, as
    many clips of one bucket as the largest allows, and packs.
    """
    several = min(cluster.clips_of_pass(bucket) for bucket in MIX)
    sides = {
        "one clip for each card": cluster.steps(list(MIX), 1),
        f"{several} clips for each card": cluster.steps(list(MIX), several),
    }
    found = {name: _of_buckets(steps, shares) for name, steps in sides.items()}
    found["packs"] = _of_packs(taken, cluster)
    return {"sides": found, "steps": {bucket: vars(step) for bucket, step in sides["one clip for each card"].items()}}


def _of_buckets(steps: dict[str, Step], shares: dict[str, float]) -> dict[str, float]:
    """Where each step is of one bucket: all cards compute the same."""
    mean = {what: sum(part * getattr(steps[bucket], what) for bucket, part in shares.items()) for what in
            ("tokens", "compute", "least", "most")}  # fmt: skip
    tokens = [step.tokens for step in steps.values()]
    return {
        "busiest": 1.0,
        "fewest": min(tokens),
        "most": max(tokens),
        "mean": mean["tokens"],
        "rate_least": mean["tokens"] / mean["most"],
        "rate_most": mean["tokens"] / mean["least"],
    }


def _of_packs(taken: Assumptions, cluster: Cluster) -> dict[str, float]:
    """Packs of `pass_tokens`: the busiest card of each step beside the mean, by seconds of the roofline."""
    buckets, names = bucket_numbers(taken.pack_clips), list(MIX)
    sizes = {number: tokens_of(bucket) for number, bucket in enumerate(names)}
    tracemalloc.start()
    plan = PackSampler(buckets, sizes, budget=taken.pass_tokens, passes=taken.processes, seed=taken.seed)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    planner, case = cluster.pack(max(names, key=tokens_of))
    (module,) = planner.modules.values()
    works = np.array([astuple(Work.of(module, tokens=sizes[number], samples=1)) for number in sizes])
    exchange = cluster.exchange(case)
    tokens, compute = [], []
    for step in range(min(taken.pack_steps, plan.steps_for_epochs(1))):
        for rank in range(taken.processes):
            pack = plan.pack(step, 0, rank, taken.processes)
            counts = {int(buckets[own[0]]): len(own) for own, _ in pack.groups}
            tokens.append(sum(sizes[number] * count for number, count in counts.items()))
            work = Work(*sum(count * works[number] for number, count in counts.items()))  # type: ignore[misc]
            compute.append(seconds_of(planner, case, cluster.card, work))
    by_step = np.array(compute).reshape(-1, taken.processes)
    busiest, useful = by_step.max(axis=1), float(np.mean(tokens))
    return {
        "busiest": float((busiest / by_step.mean(axis=1)).mean()),
        "fewest": int(min(tokens)),
        "most": int(max(tokens)),
        "mean": useful,
        "rate_least": useful / float((busiest + exchange).mean()),
        "rate_most": useful / float(np.maximum(busiest, exchange).mean()),
        "fill": plan.fill,
        "peak_bytes_per_clip": round(peak / taken.pack_clips, 1),
    }


def clips_seen(buckets: NDArray[Any], *, processes: int, seed: int) -> NDArray[np.int64]:
    """How often each clip comes in an epoch, over all processes and steps."""
    plan = BatchSampler(buckets, batch_size=processes, seed=seed)
    counts = np.zeros(len(buckets), dtype=np.int64)
    for step in range(plan.steps_for_epochs(1)):
        batch = plan.batch(step)
        for rank in range(processes):
            counts[share(batch, 0, 1, rank, processes)] += 1
    return counts


def node_reads(plan: BatchSampler, taken: Assumptions, steps: Sequence[int]) -> NDArray[np.int64]:
    """The clips that the first node's processes read in these steps, in their order."""
    return np.concatenate(
        [share(plan.batch(step), 0, 1, rank, taken.processes) for step in steps for rank in range(taken.node)]
    )
