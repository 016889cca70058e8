"""How the samples of an optimizer step are shared out over backward passes and processes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Batching:
    """`micro` samples per backward pass, `accumulate` backward passes per step, in each of `processes`."""

    micro: int
    accumulate: int
    processes: int

    @classmethod
    def of(cls, batch_size: int, *, accumulate: int | None, micro_batch: int | None, processes: int) -> Batching:
        """The batching of `batch_size` samples per step over all processes.

        accumulate   as given; None: as many passes as bring one to at most `micro_batch` samples
        micro_batch  None: a process takes its part of the step in one pass

        ValueError if the samples cannot be shared out evenly, naming the nearest numbers that can.
        """
        own = batch_size // processes
        if accumulate is None and batch_size % processes == 0:
            most = micro_batch or own
            accumulate = next(passes for passes in range(1, own + 1) if own % passes == 0 and own // passes <= most)
        parts = (accumulate or 1) * processes
        if batch_size % parts:
            below = max(1, batch_size // parts) * parts
            what = "processes" if accumulate is None else "accumulate x processes"
            numbers = f"{processes}" if accumulate is None else f"{accumulate} x {processes}"
            raise ValueError(
                f"batch_size={batch_size} must divide by {what} = {numbers}; the nearest are {below} and "
                f"{below + parts}"
            )
        return cls(batch_size // parts, parts // processes, processes)

    @property
    def batch_size(self) -> int:
        """Samples per optimizer step."""
        return self.micro * self.accumulate * self.processes

    def __str__(self) -> str:
        several = "" if self.processes == 1 else "es"
        return f"{self.micro} per backward x {self.accumulate} accumulation x {self.processes} process{several}"
