"""What the loop asks of what it is given: data by number, and hooks that evaluate the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from numpy.typing import NDArray

from wantrain.batch import AnyBatch


class Samples(Protocol):
    """What the loop asks of a data set: samples by number, for positions in the run."""

    def load(self, samples: NDArray[Any], positions: NDArray[Any]) -> AnyBatch: ...

    def foresee(self, samples: NDArray[Any], positions: NDArray[Any]) -> bool:
        """These will be loaded next; True if it helps to know of more."""


def due(step: int, *, every: int, last: int) -> bool:
    """True at step 0, at every `every`-th optimizer step, and at step `last`."""
    return step % every == 0 or step == last


class Hook(Protocol):
    """Called after the steps at which it is due, step 0 included; what it returns is logged with that step.

    kind   validation or preview: under which name its cost is logged
    every  optimizer steps between two calls
    """

    kind: ClassVar[str]
    every: int

    def due(self, step: int) -> bool: ...

    def __call__(self, step: int) -> Mapping[str, Any]: ...
