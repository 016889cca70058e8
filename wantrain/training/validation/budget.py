"""How much a validation measures, and how often: as the user said, else so that it takes a bounded share of training.

Cost is counted in forwards of one sample. A step of training is several for each of its samples (forward, backward and
what is computed again, by models/flops.py), a validation one for each clip and noise level, and both are of the same
data. So the share does not depend on how long a forward takes: every process, machine and start of a run chooses alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from wantrain.models.formats.weights import read_json
from wantrain.training.engine.main_process import on_main
from wantrain.training.validation.bootstrap import FEWEST_FILES
from wantrain.util.files import write_json


@dataclass(frozen=True)
class Extent:
    """What validations measure.

    every   optimizer steps between two
    clips   held-out clips at most, and as many of training
    points  noise levels of each
    """

    every: int = 100
    clips: int = 16
    points: int = 8


#: What is measured where it costs little enough.
BEST = Extent()
#: What is given up where validations would else be too rare, in this order; fewer files could show nothing.
LESS: tuple[dict[str, int], ...] = ({}, {"points": 4}, {"points": 4, "clips": max(8, FEWEST_FILES)})


@dataclass(frozen=True)
class Budget:
    """What validations may cost beside training.

    share       of the cost of training, at most
    samples     of each process in an optimizer step
    per_sample  forwards that training on one sample costs
    passes      times that a validation reads its clips: once for each expert, twice where it keeps an average
    processes   that share the clips
    heldout, train  clips that there are
    steps       optimizer steps of the run
    """

    share: float
    samples: float
    per_sample: float
    passes: int
    processes: int
    heldout: int
    train: int
    steps: int

    def choose(self, fixed: Mapping[str, int]) -> Extent:
        """What is fixed (by its name in Extent), and the rest so that the share holds.

        Validations are made rarer first; where less than two intervals would be left of the run, they measure fewer
        points, then fewer clips, and at last are as rare as it takes.
        """
        for less in LESS:
            extent = replace(BEST, **{**less, **fixed})
            if "every" not in fixed:
                extent = self._rarer(extent)
            if self._will_do(extent, rare=extent.every > BEST.every and "every" not in fixed):
                break
        return extent

    def _rarer(self, extent: Extent) -> Extent:
        """With the least multiple of the best interval at which the share holds."""
        times = self.share_of(replace(extent, every=BEST.every)) / self.share
        return replace(extent, every=BEST.every * max(1, math.ceil(times - 1e-9)))

    def _will_do(self, extent: Extent, *, rare: bool) -> bool:
        return self.share_of(extent) <= self.share * (1 + 1e-9) and not (rare and 2 * extent.every > self.steps)

    def share_of(self, extent: Extent) -> float:
        """Cost of a validation beside that of the training until the next one."""
        return self.forwards(extent) / (extent.every * self.samples * self.per_sample)

    def forwards(self, extent: Extent) -> int:
        """Forwards of a validation that each process makes."""
        return self.passes * math.ceil(self.clips(extent) / self.processes) * extent.points

    def clips(self, extent: Extent) -> int:
        """Clips that a validation measures, held-out and training ones."""
        return min(extent.clips, self.heldout) + min(extent.clips, self.train)

    def describe(self, extent: Extent, seconds: float | None) -> str:
        """The arithmetic of an extent; `seconds` are those of one forward, if they were measured."""
        each, clips = self.forwards(extent), self.clips(extent)
        line = f"{clips} clips x {extent.points} noise levels"
        line += f" x {self.passes} evaluations" if self.passes > 1 else ""
        line += f" = {clips * extent.points * self.passes} forwards"
        line += f", {each} on each of {self.processes} processes," if self.processes > 1 else ""
        line += f" of {seconds:.2g} s ({_duration(seconds * each)})" if seconds is not None else ""
        if extent.every < self.steps:
            return f"{line}, every {extent.every} steps: {_percent(self.share_of(extent))} of training"
        whole = replace(extent, every=self.steps)
        return f"{line}, at step 0 and the last, {self.steps}: {_percent(2 * self.share_of(whole))} of training"


def _percent(share: float) -> str:
    return f"{100 * share:.{1 if share < 0.1 else 0}f} %"


def _duration(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds / 60:.1f} min"


@dataclass(frozen=True)
class ChosenExtent:
    """What was chosen for a run, in its folder: records compare only while the same is measured.

    share  for which it is chosen; for another one it is chosen anew
    """

    path: Path
    share: float

    def recall(self, given: Mapping[str, int | None]) -> dict[str, int]:
        """What is given, and what an earlier start chose where that is None, the same in every process."""
        keys = list(asdict(BEST))
        if None not in given.values():
            return {key: value for key in keys if (value := given[key]) is not None}
        earlier = on_main(self._earlier, f"reading {self.path.name}")
        return {key: value for key in keys if (value := given[key] or earlier.get(key, 0))}

    def note(self, given: Mapping[str, int | None], extent: Extent) -> None:
        """Note what was chosen."""
        chosen = {key: value for key, value in asdict(extent).items() if given[key] is None}

        def write() -> None:
            write_json(self.path, {"share": self.share, "chosen": {**self._earlier(), **chosen}})

        on_main(write, f"writing {self.path.name}")

    def _earlier(self) -> dict[str, int]:
        stored = read_json(self.path) if self.path.is_file() else {}
        return dict(stored["chosen"]) if stored.get("share") == self.share else {}
