"""Which memory settings a run needs on a card: of all that fit, the ones that cost the least time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from wantrain.training.planning.plan import Choice, MemoryPlan, Sizes, Update, frozen_on_host, plan
from wantrain.training.planning.roofline import Work, seconds
from wantrain.training.planning.trace import BlockCosts
from wantrain.util.cards import Card

#: Share of a card's memory that a plan may fill: predictions are off by a few per cent.
FILL = 0.97
#: Times that differ by no more than this share are equal.
SAME = 0.02
#: The settings that the search changes and that change no result, with their keys.
EXACT = {"recompute": "recompute", "activations": "activations", "swap": "swap.blocks"}
#: Those that round something.
ROUNDING = {"inputs": "activations_dtype", "base": "base.dtype"}
#: All settings that the search changes; another update of the weights changes results too.
SEARCHED = (*EXACT, *ROUNDING, "update")


@dataclass(frozen=True)
class Case:
    """One expert's step in one bucket, as far as memory and time depend on it.

    costs   of a micro-batch, by policy of recomputation
    others  the other experts of the run, which hold weights and optimizer state meanwhile
    waits   True if the frozen weights of the expert that is not training wait on the host
    """

    sizes: Sizes
    costs: Mapping[str, BlockCosts]
    work: Work
    micro_steps: int = 1
    others: tuple[Sizes, ...] = ()
    waits: bool = False

    def plan(self, choice: Choice) -> MemoryPlan:
        """The memory of its step under the settings, with what the other experts hold."""
        memory = plan(self.sizes, self.costs, choice)
        for other in self.others:
            held = plan(other, self.costs, choice)
            on_host = frozen_on_host(other, choice, whole=self.waits)
            weights = other.trained * other.weight if self.waits else held.weights
            if self.waits:  # both experts have their place on the host
                on_host += frozen_on_host(self.sizes, choice, whole=True) - frozen_on_host(self.sizes, choice)
            memory = replace(
                memory,
                weights=memory.weights + weights,
                optimizer=memory.optimizer + held.optimizer,
                average=memory.average + held.average,
                host=memory.host + on_host,
            )
        return memory

    def seconds(self, choice: Choice, card: Card) -> float:
        """Seconds of an optimizer step; 0 where the card's speed is not known."""
        if not card.peak:
            return 0.0
        return seconds(self.work, self.sizes, self.costs, choice, card, micro_steps=self.micro_steps)


@dataclass(frozen=True)
class Advice:
    """Settings that fit, with their memory and time, and how they differ from what was asked for."""

    choice: Choice
    memory: MemoryPlan
    seconds: float
    overrides: tuple[str, ...]


def fits(memory: MemoryPlan, card: Card) -> bool:
    """True if the plan leaves the card a little room."""
    return memory.device <= FILL * card.memory


def cheapest(
    cases: Sequence[Case],
    asked: Choice,
    card: Card,
    *,
    fixed: Iterable[str] = (),
    adapter: bool,
    updates: Sequence[Update] = (),
) -> Advice | None:
    """The settings that fit `card` in every case at the least time, and among those that take equally long the ones
    nearest to `asked`; None if none fit.

    fixed    fields of Choice that the user has set, which stay
    adapter  True if the base is frozen, so that it can be quantised and swapped
    updates  other ways to update the trained weights
    """
    every = _all(cases, asked, card, fixed, adapter=adapter, updates=updates)
    fitting = [each for each in every if fits(each.memory, card)]
    if not fitting:
        return None
    fastest = min(advice.seconds for advice in fitting)
    # Times within the estimate's error are equal; then exact results, few changes and little host memory count.
    equal = [advice for advice in fitting if advice.seconds <= (1 + SAME) * fastest]
    return min(equal, key=lambda each: (changes_results(each.choice, asked), len(each.overrides), each.memory.host))


def smallest(
    cases: Sequence[Case], asked: Choice, card: Card, *, adapter: bool, updates: Sequence[Update] = ()
) -> Advice:
    """The settings that take the least of a card; of those the fastest."""
    every = _all(cases, asked, card, (), adapter=adapter, updates=updates)
    return min(every, key=lambda each: (each.memory.device, each.seconds))


def changes_results(choice: Choice, asked: Choice) -> bool:
    """True if a run under `choice` gives other losses than under `asked`, beyond rounding of single sums."""
    return any(getattr(choice, name) != getattr(asked, name) for name in (*ROUNDING, "update"))


def _all(
    cases: Sequence[Case],
    asked: Choice,
    card: Card,
    fixed: Iterable[str],
    *,
    adapter: bool,
    updates: Sequence[Update],
) -> Iterator[Advice]:
    """Every combination of settings that train.py takes, with its memory and time."""
    blocks = cases[0].sizes.blocks
    options: dict[str, Sequence[Any]] = {
        "recompute": ["none", *_wholes(blocks), *(name for name in ("attention", "block") if name in cases[0].costs)],
        "activations": ["gpu", "cpu"],
        "swap": [0, *_parts(blocks)] if adapter and asked.engine in {"single", "ddp"} else [0],
        "inputs": ["fp32", "bf16"],
        "base": [None, "fp8", "nf4"] if adapter else [None],
        "update": [None, *updates],
    }
    for name in fixed:
        options[name] = [getattr(asked, name)]
    for values in itertools.product(*options.values()):
        choice = replace(asked, **dict(zip(options, values, strict=True)))
        if possible(choice, blocks):
            memory = max((case.plan(choice) for case in cases), key=lambda each: each.device)
            time = max(case.seconds(choice, card) for case in cases)
            yield Advice(choice, memory, time, _overrides(choice, asked))


def _overrides(choice: Choice, asked: Choice) -> tuple[str, ...]:
    """What differs, as words of a command line."""
    keys = {**EXACT, **ROUNDING}
    changed = [name for name in keys if getattr(choice, name) != getattr(asked, name)]
    words = [f"{keys[name]}={_typed(getattr(choice, name))}" for name in changed]
    return (*words, *(choice.update.overrides if choice.update is not None else ()))


def possible(choice: Choice, blocks: int) -> bool:
    """True if train.py takes the settings together: inputs wait, and blocks are swapped, only where blocks are
    recomputed; a product stands beside a base in few bytes.
    """
    recomputed = blocks - choice.policies(blocks).get("none", 0)
    waits = choice.activations == "cpu" or choice.inputs != "fp32"
    if choice.low_rank and choice.base is None:
        return False
    return (recomputed > 0 or not waits) and (choice.swap == 0 or 3 <= choice.swap <= recomputed)


def _wholes(blocks: int) -> list[int]:
    """Numbers of blocks that keep everything, which the search tries."""
    return sorted({round(blocks * share) for share in (0.75, 0.5, 0.25, 0.15, 0.1, 0.05)} - {0, blocks})


def _parts(blocks: int) -> list[int]:
    """Numbers of blocks on the host, which the search tries."""
    return sorted({max(3, round(blocks * tenths / 10)) for tenths in range(1, 11)} & set(range(3, blocks + 1)))


def _typed(value: Any) -> str:
    return "null" if value is None else str(value)
