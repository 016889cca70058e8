"""Two sides of one computation: held against each other, then timed in turn."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import peers
import result
import torch
from torch import Tensor

from gpu_stages.context import Context, measure, peak_gb

#: Largest difference of outputs and gradients in float32, and in bf16 from what float32 gives: shares of the largest
#: value. In bf16 ours may also be off by so many times what the other side is: that measures what bf16 costs.
CLOSE, CLOSE_BF16, BF16_TIMES = 1e-5, 1e-2, 1.5


@dataclass(frozen=True)
class Side:
    """One side: `run` is what is timed, `leave` frees what it keeps between its turns."""

    run: Callable[[], Any]
    leave: Callable[[], None] = lambda: None


def in_turn(
    context: Context,
    sides: Mapping[str, Side],
    *,
    pairs: int,
    again: int = 0,
    at_most: float | None = None,
    errors: Mapping[str, tuple[float, float]] | None = None,
) -> dict[str, Any]:
    """A case of one side or two: seconds, and on a GPU the peak of memory and what of it a run adds to what lay there.

    pairs    turns of each side, in the order A B B A; one run each, the first after one that does not count
    again    runs at the start of every later turn that do not count, where `leave` has freed what they need
    at_most  the goal for the seconds of the first side over those of the second; small shapes have none
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    peaks: dict[str, list[float]] = {name: [] for name in sides}
    added: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(pairs):
        for name in seconds if number % 2 == 0 else reversed(seconds):
            side, before = sides[name], _allocated(context)
            took = measure(context.device, {"run": side.run}, repeats=1, warmup=again if number else 1)["run"]
            seconds[name].append(took[0])
            if (peak := peak_gb(context.device)) is not None:
                peaks[name].append(peak)
                added[name].append(peak - before)
            side.leave()
    measures = {"seconds": result.measure("s", seconds, at_most=None if context.small else at_most)}
    if all(peaks.values()):
        measures |= {"peak memory": result.measure("GB", peaks), "memory added": result.measure("GB", added)}
    return result.case(measures, errors)


def _allocated(context: Context) -> float:
    return torch.cuda.memory_allocated(context.device) / 1e9 if context.device.type == "cuda" else 0.0


def theirs_missing(context: Context) -> bool:
    """True if diffusers cannot be used here, which is noted."""
    reason = peers.missing()
    if reason is not None:
        context.note(diffusers=f"not here, so ours alone is measured: {reason}")
    return reason is not None


Tensors = Mapping[str, Tensor]


def bf16_error(mine: Tensors, theirs: Tensors, exact: Tensors) -> tuple[float, float]:
    """How far ours is from float32 in bf16, and how far it may be."""
    other = peers.apart(theirs, exact)[0]
    return peers.apart(mine, exact)[0], max(CLOSE_BF16, BF16_TIMES * other)


def in_words(context: Context) -> str:
    """The line of a stage's comparisons: seconds of each side, ratio, verdict, and what was predicted."""
    return "; ".join(itertools.starmap(_case_in_words, context.cases.items()))


def _case_in_words(name: str, case: Mapping[str, Any]) -> str:
    row, predicted = case["measures"]["seconds"], case["predicted"]
    each = [
        f"{side} {sorted(values)[len(values) // 2]:.3g} s{_predicted(predicted.get(side), 's')}"
        for side, values in row["sides"].items()
    ]
    if len(each) == 1:
        return f"{name}: {each[0]}"
    ratio = predicted["ours"] / predicted["diffusers"] if {"ours", "diffusers"} <= predicted.keys() else None
    verdict = "" if row["verdict"] == "no goal" else f", goal {row['verdict']}"
    return f"{name}: {', '.join(each)} = {row['result']['median']:.3f}{_predicted(ratio, '')}{verdict}"


def _predicted(value: float | None, unit: str) -> str:
    return "" if value is None else f" ({value:.3g}{f' {unit}' if unit else ''} predicted)"
