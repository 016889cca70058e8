"""The order of a run in phases (`data.schedule`): each has a sampler of its own.

All draw from the same streams (streams.py): a set goes on where the phase before left it. What a phase has drawn is
counted, not stored, so that a run resumes by seeking here too.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from wantrain.data.loading.packs import PackSampler
from wantrain.data.loading.sampler import BatchSampler
from wantrain.data.loading.schedule import Entry
from wantrain.data.loading.streams import BucketStreams, Indices


@dataclass(frozen=True)
class Phase:
    """The steps from `start` on that have one sampler, which counts them from 0.

    before  samples of all steps before it
    entry   what the schedule says of it; None in a run without one
    number  of this phase, from 0
    """

    start: int
    before: int
    sampler: BatchSampler | PackSampler
    entry: Entry | None = None
    number: int = 0


class PhasedSampler:
    """The order of a run in phases, the first from step 0 on."""

    def __init__(self, phases: Sequence[Phase]) -> None:
        self.phases = tuple(phases)

    @classmethod
    def of(
        cls,
        entries: Sequence[Entry],
        streams: BucketStreams,
        make: Callable[[BucketStreams, Entry], BatchSampler | PackSampler],
    ) -> PhasedSampler:
        """The order by a schedule. `streams` are those of all sets; `make` makes the sampler of an entry."""
        phases: list[Phase] = []
        before, drawn = 0, [0] * len(streams.numbers)
        for entry in entries:
            if phases:
                last = phases[-1]
                steps = entry.start - last.start
                before, drawn = before + last.sampler.samples_before(steps), last.sampler.drawn(steps)
            streams = streams.going_on(list(entry.weights.values()), drawn)
            phases.append(Phase(entry.start, before, make(streams, entry), entry, len(phases)))
        return cls(phases)

    @property
    def samples_per_step(self) -> float:
        """Samples of a step in the last phase, in the mean."""
        return self.phases[-1].sampler.samples_per_step

    def at(self, step: int) -> Phase:
        """The phase of a step."""
        return self.phases[bisect.bisect_right([phase.start for phase in self.phases], step) - 1]

    def first(self, count: int) -> Indices:
        """Its first samples, at most `count`, of one bucket."""
        return self.phases[0].sampler.first(count)

    def samples_before(self, step: int) -> int:
        """Samples of all steps before `step`."""
        phase = self.at(step)
        return phase.before + phase.sampler.samples_before(step - phase.start)

    def steps_for_epochs(self, epochs: float) -> int:
        """ValueError: the phases have epochs of their own."""
        raise ValueError(
            f"epochs={epochs:g} are passes over one mix of sets, and data.schedule has several; give steps="
        )


#: The order of a run.
Order = BatchSampler | PackSampler | PhasedSampler


def phases_of(order: Order) -> tuple[Phase, ...]:
    """The phases of a run; one without a schedule has one."""
    return order.phases if isinstance(order, PhasedSampler) else (Phase(0, 0, order),)


def phase_at(order: Order, step: int) -> Phase:
    """The phase of a step."""
    return order.at(step) if isinstance(order, PhasedSampler) else Phase(0, 0, order)
