"""The planner: memory and time of every bucket and engine, and settings that fit a card, before anything is loaded."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from wantrain import geometry
from wantrain.conditioning import PER_FRAME
from wantrain.models import WanTransformer
from wantrain.models.adapters import ADAPTERS
from wantrain.models.attention import NOT_KEPT
from wantrain.training.batching import Batching
from wantrain.training.engine.adaptive import adaptive_name, keeps_average
from wantrain.training.engine.optim import MakeOptimizer
from wantrain.training.engine.updates import UpdateOptions
from wantrain.training.planning.memory import EIGHT_BIT, UpdateBytes, state_bytes
from wantrain.training.planning.outline import Clips
from wantrain.training.planning.plan import ENGINES, GB, Choice, MemoryPlan, Sizes, Update
from wantrain.training.planning.roofline import Work
from wantrain.training.planning.search import EXACT, SEARCHED, Advice, Case, changes_results, cheapest, fits, smallest
from wantrain.training.planning.trace import POLICIES, Sample, Shape, TracedCosts, between
from wantrain.util.cards import Card

#: Cards of a usual node: what several cards would hold is said for so many, if one process was started.
NODE = 8


@dataclass(frozen=True)
class Planner:
    """Plans for the experts of a run, by what each trains.

    modules   without values, as in the run, but with the base in its plain dtype
    settings  the whole config as plain data
    engine, processes  how the run is spread
    rows      samples that the network computes for each of a batch; what the base computes beside is not in the times
    copies    groups of processes that hold the same parts under FSDP2
    """

    modules: Mapping[str, WanTransformer]
    optimizers: Mapping[str, MakeOptimizer]
    settings: Mapping[str, Any]
    batching: Batching
    engine: str
    processes: int
    rows: int = 1
    copies: int = 1

    @cached_property
    def asked(self) -> Choice:
        """The settings as they are."""
        shared_by, heads = self.batching.sequence_parallel, next(iter(self.modules.values())).num_attention_heads
        return Choice(
            engine=self.engine,
            processes=self.processes,
            precision=self.settings["precision"],
            recompute=self.settings["recompute"],
            activations=self.settings["activations"],
            inputs=self.settings["activations_dtype"],
            base=self.settings["base"]["dtype"],
            low_rank=self.settings["base"]["low_rank"] or 0,
            swap=self.settings["swap"]["blocks"],
            sequence=shared_by,
            groups=shared_by // math.gcd(shared_by, heads),
            copies=self.copies,
        )

    @property
    def adapter(self) -> bool:
        """True if the base is frozen whole."""
        return self.settings["adapter"]["name"] in ADAPTERS

    def cases(self, clips: Clips, bucket: str) -> dict[str, Case]:
        """The step of each expert in one bucket. Experts that train alike are traced once."""
        found: dict[str, Case] = {}
        for name, module in self.modules.items():
            twin = next((other for other in found if _alike(self.modules[other], module)), None)
            found[name] = self._case(name, module, clips, bucket) if twin is None else found[twin]
        waits = self.settings["experts"]["offload"] == "cpu"
        return {
            name: replace(case, waits=waits, others=tuple(found[other].sizes for other in found if other != name))
            for name, case in found.items()
        }

    def all_cases(self, clips: Clips) -> dict[str, dict[str, Case]]:
        """The cases of every bucket, the smallest first. The smallest and the largest are traced, which takes seconds
        each; those between are interpolated. Of packs there is one: all are of about the same number of tokens.
        """
        if self.batching.tokens is not None:
            return {bucket: self.cases(clips, bucket) for bucket in (self.largest(clips),)}
        tokens = {bucket: geometry.num_tokens(clips.latent_shape(bucket)) for bucket in clips.counts}
        load = {bucket: count * self._samples(clips, bucket) for bucket, count in tokens.items()}
        order = sorted(load, key=lambda bucket: load[bucket])
        ends = {bucket: self.cases(clips, bucket) for bucket in {order[0], order[-1]}}
        small, large = ends[order[0]], ends[order[-1]]
        for bucket in order[1:-1]:
            share = (load[bucket] - load[order[0]]) / max(1, load[order[-1]] - load[order[0]])
            ends[bucket] = {
                name: replace(
                    small[name],
                    costs={
                        each: between(small[name].costs[each], large[name].costs[each], share)
                        for each in self._policies
                    },
                    work=Work.of(self.modules[name], tokens=tokens[bucket], samples=self._samples(clips, bucket)),
                )
                for name in self.modules
            }
        return {bucket: ends[bucket] for bucket in order}

    def _samples(self, clips: Clips, bucket: str) -> int:
        """Samples of one forward."""
        return clips.micro.get(bucket, self.batching.micro) * self.rows

    @property
    def _policies(self) -> list[str]:
        """The policies of recomputation that the kernel of attention allows."""
        kept = self.settings["attention"] not in NOT_KEPT
        return [policy for policy in POLICIES if policy != "attention" or kept]

    def _case(self, name: str, module: WanTransformer, clips: Clips, bucket: str) -> Case:
        shapes = self._shapes(clips, bucket)
        sample = Sample(
            shapes if self.batching.tokens else shapes[0],
            self.settings["model"]["conditioning"] in PER_FRAME,
            self.settings["precision"],
        )
        work = Work.of_groups(module, [(samples, geometry.num_tokens(shape)) for samples, *shape in shapes])
        update = UpdateBytes.of(self.optimizers[name], UpdateOptions.of(self.settings))
        sizes = Sizes.of(module, update=update, average=keeps_average(self.settings))
        return Case(sizes, TracedCosts(module, sample, self._policies), work, self.batching.accumulate)

    def _shapes(self, clips: Clips, bucket: str) -> tuple[Shape, ...]:
        """What a backward pass computes, (samples, latent frames, rows, columns): of one bucket, or a full pack of as
        many of its clips as fit and an image of the tokens that are left.
        """
        shape, budget = clips.latent_shape(bucket), self.batching.tokens
        if budget is None:
            return ((self._samples(clips, bucket), *shape),)
        fitting, left = divmod(budget, geometry.num_tokens(shape))
        rest = (1, 1, geometry.PATCH[1], geometry.PATCH[2] * left)
        return (*([(fitting, *shape)] if fitting else []), *([rest] if left else []))

    def label(self, bucket: str) -> str:
        """What a step of the largest bucket is called: its size, or that of a pack."""
        return bucket if self.batching.tokens is None else f"pack of {self.batching.tokens} tokens"

    def describe(self, clips: Clips, card: Card | None, steps: int | None) -> str:
        """Lines for `dry_run=true`: memory of each bucket, of each engine, time, and settings that fit `card`."""
        largest, by_bucket = self.largest(clips), self.all_cases(clips)
        lines = [
            f"memory              {self.label(bucket)}{f' ({name})' if len(cases) > 1 else ''}: {case.plan(self.asked)}"
            for bucket, cases in by_bucket.items()
            for name, case in cases.items()
        ]
        worst = by_bucket[largest]
        lines += self._engines(worst, largest)
        if card is not None:
            lines += self.on_card(worst, largest, card, steps)
        return "\n".join(lines)

    def _engines(self, worst: Mapping[str, Case], bucket: str) -> list[str]:
        """The largest bucket's memory under every engine, on as many processes as were started, or eight."""
        processes = self.processes if self.processes > 1 else NODE
        sizes = []
        for engine in ENGINES:
            alone: dict[str, Any] = (
                {"processes": 1, "sequence": 1, "groups": 1} if engine == "single" else {"processes": processes}
            )
            choice = replace(self.asked, engine=engine, **alone)
            sizes.append(f"{engine} {max(case.plan(choice).device for case in worst.values()) / GB:.4g}")
        return [f"engines             {self.label(bucket)}, GB on each of {processes} cards: {', '.join(sizes)}"]

    def on_card(self, worst: Mapping[str, Case], bucket: str, card: Card, steps: int | None) -> list[str]:
        """Whether the largest bucket fits the card and what a step takes; else settings that fit."""
        cases = list(worst.values())
        memory = max((case.plan(self.asked) for case in cases), key=lambda each: each.device)
        taken = f"{memory.device / GB:.4g} of {card.memory / GB:.4g} GB"
        if fits(memory, card):
            return [f"{card.name:<19} {self.label(bucket)} takes {taken}{self._time(cases, self.asked, card, steps)}"]
        advice = self.advise(cases, card)
        if advice is None:
            least = smallest(cases, self.asked, card, adapter=self.adapter, updates=self.updates)
            return [
                f"{card.name:<19} {self.label(bucket)} takes {taken}: too much. The least is "
                f"{least.memory.device / GB:.4g} GB, with {' '.join(least.overrides) or 'these settings'}: take "
                "smaller clips, or more cards"
            ]
        lines = [f"{card.name:<19} {self.label(bucket)} takes {taken}: too much. The fastest settings that fit:"]
        found = [advice]
        if changes_results(advice.choice, self.asked):
            exact = self.advise(cases, card, fixed=set(SEARCHED) - set(EXACT))
            found += [] if exact is None else [exact]
        for each in found:
            same = "" if changes_results(each.choice, self.asked) else " (leaves results as they are)"
            lines += [
                f"{'':<19} {' '.join(each.overrides)}{same}",
                f"{'':<21} {each.memory}{self._time(cases, each.choice, card, steps)}",
            ]
        return lines

    def choose(self, clips: Clips, card: Card, free: Iterable[str]) -> Choice | None:
        """The fastest settings with which the largest bucket fits the card, of which only those named in `free` (fields
        of Choice) may differ from what they are; None if none fit.
        """
        cases = list(self.cases(clips, self.largest(clips)).values())
        advice = self.advise(cases, card, fixed=set(SEARCHED) - set(free))
        return None if advice is None else advice.choice

    def plan(self, clips: Clips, bucket: str) -> list[MemoryPlan]:
        """The memory of each expert's step in a bucket, with the settings as they are."""
        return [case.plan(self.asked) for case in self.cases(clips, bucket).values()]

    def advice(self, clips: Clips, card: Card) -> str:
        """What the largest bucket takes, and which settings fit the card: for a run that is out of memory."""
        bucket = self.largest(clips)
        first, *found = (" ".join(line.split()) for line in self.on_card(self.cases(clips, bucket), bucket, card, None))
        return " ".join([first, "; or ".join(found[::2])]).strip()

    @staticmethod
    def largest(clips: Clips) -> str:
        """The bucket of the most tokens in a backward pass."""
        return max(
            clips.counts,
            key=lambda bucket: geometry.num_tokens(clips.latent_shape(bucket)) * clips.micro.get(bucket, 1),
        )

    def advise(self, cases: Sequence[Case], card: Card, fixed: Iterable[str] = ()) -> Advice | None:
        """The fastest settings that fit the card in all cases; None if none do."""
        return cheapest(cases, self.asked, card, fixed=fixed, adapter=self.adapter, updates=self.updates)

    @cached_property
    def updates(self) -> list[Update]:
        """Ways to update all weights, or parts of the model, that take less memory than the run's own."""
        own = UpdateOptions.of(self.settings)
        if self.settings["adapter"]["name"] not in {"none", "partial"} or self.engine not in {"single", "ddp"}:
            return []
        if adaptive_name(self.settings["optimizer"]["_target_"]):  # not one parameter at a time, nor in 8 bits
            return []
        make = next(iter(self.optimizers.values()))
        dtypes = {own.dtype, "bf16"} if self.settings["precision"] == "bf16" else {own.dtype}
        at_once = {own.in_backward, self.engine == "single" and self.batching.accumulate == 1}
        found = []
        for dtype, in_backward, (name, other) in itertools.product(
            dtypes, at_once, [("", make), *EIGHT_BIT.items()] if state_bytes(make) > 4 else [("", make)]
        ):
            options = replace(own, dtype=dtype, in_backward=in_backward)
            words = [f"trained.dtype={dtype}"] if dtype != own.dtype else []
            words += [f"optimizer={name}"] if name else []
            if in_backward and not own.in_backward:
                words += ["update_in_backward=true", "clip_by=parameter"]
            if words:
                found.append(Update(tuple(words), UpdateBytes.of(other, options)))
        return found

    def _time(self, cases: Sequence[Case], choice: Choice, card: Card, steps: int | None) -> str:
        """Time of a step and of the run, in the largest bucket; empty where the card's speed is not known."""
        step = sum(case.seconds(choice, card) for case in cases) / len(cases)
        if not step:
            return ""
        if steps is None:
            return f"; about {step:.3g} s per step (estimated)"
        hours = step * steps / 3600
        cost = f" = {hours * self.processes:.3g} GPU-hours" if self.processes > 1 else ""
        return f"; about {step:.3g} s per step, {hours:.3g} h for {steps} steps{cost} (estimated)"


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """True if two modules have the same parameters, as far as memory and time go."""

    def facts(module: nn.Module) -> list[tuple[Any, ...]]:
        return [(tuple(p.shape), p.dtype, p.requires_grad) for p in module.parameters()]

    return facts(one) == facts(other)
