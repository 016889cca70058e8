"""How the samples of an optimizer step are shared out over backward passes and processes, and their order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wantrain.data import BatchSampler, BucketStreams, PackSampler, PhasedSampler, TrainingData
from wantrain.data.loading.packs import tokens_of
from wantrain.data.loading.phases import Order
from wantrain.util.distributed import check_shared


@dataclass(frozen=True)
class Batching:
    """`micro` samples per backward pass, `accumulate` backward passes per step, in each of `processes`.

    tokens  the most tokens of a backward pass, where as many samples go into one as that allows; `micro` is 0 then
    sequence_parallel  so many neighbours among the processes have the same samples, and share their tokens
    """

    micro: int
    accumulate: int
    processes: int
    tokens: int | None = None
    sequence_parallel: int = 1

    @classmethod
    def of(
        cls,
        batch_size: int,
        *,
        accumulate: int | None,
        micro_batch: int | None,
        processes: int,
        sequence_parallel: int = 1,
    ) -> Batching:
        """The batching of `batch_size` samples per step over all processes.

        accumulate   as given; None: as many passes as bring one to at most `micro_batch` samples
        micro_batch  None: a process takes its part of the step in one pass

        ValueError if the samples, or the processes, cannot be shared out evenly, naming the nearest numbers that can.
        """
        check_shared(sequence_parallel, processes)
        ranks = processes // sequence_parallel
        own = batch_size // ranks
        if accumulate is None and batch_size % ranks == 0:
            most = micro_batch or own
            accumulate = next(passes for passes in range(1, own + 1) if own % passes == 0 and own // passes <= most)
        parts = (accumulate or 1) * ranks
        if batch_size % parts:
            below = max(1, batch_size // parts) * parts
            what, numbers = "processes", f"{processes}"
            if accumulate is not None:
                what, numbers = f"accumulate x {what}", f"{accumulate} x {numbers}"
            if sequence_parallel > 1:
                what, numbers = f"{what} / sequence_parallel", f"{numbers} / {sequence_parallel}"
            raise ValueError(
                f"batch_size={batch_size} must divide by {what} = {numbers}; the nearest are {below} and "
                f"{below + parts}"
            )
        return cls(batch_size // parts, parts // ranks, processes, sequence_parallel=sequence_parallel)

    @classmethod
    def of_settings(cls, settings: Mapping[Any, Any], processes: int) -> Batching:
        """The batching of train.py's settings; ValueError if they give none.

        A dry run in one process is of as many as share a clip.
        """
        if settings["dry_run"] and processes == 1:
            processes = settings["sequence_parallel"]
        size, tokens, accumulate = (settings[key] for key in ("batch_size", "batch_tokens", "accumulate"))
        if tokens is not None:
            return cls(0, accumulate or 1, processes, tokens)
        if size is None:
            raise ValueError("batch_size=null and batch_tokens=null: a step has no size; give one of them")
        micro = settings["model"]["train"]["micro_batch"]
        spread = {"processes": processes, "sequence_parallel": settings["sequence_parallel"]}
        return cls.of(size, accumulate=accumulate, micro_batch=micro, **spread)

    @property
    def batch_size(self) -> int:
        """Samples per optimizer step, where that is the same in each."""
        assert self.tokens is None, "packs have different numbers of samples"
        return self.micro * self.accumulate * self.processes // self.sequence_parallel

    def resized(self, batch_size: int | None) -> Batching:
        """With so many samples per step in as many passes; None: as it is. ValueError if they cannot be shared out."""
        if batch_size is None:
            return self
        spread = {"processes": self.processes, "sequence_parallel": self.sequence_parallel}
        return self.of(batch_size, accumulate=self.accumulate, micro_batch=None, **spread)

    def order(self, data: TrainingData[Any], seed: int) -> Order:
        """The order of a run on these data; ValueError if they cannot be trained on so."""
        passes = self.accumulate * self.processes
        if data.schedule:
            return self._phases(data, seed, passes)
        if self.tokens is None:
            return BatchSampler.of(data, batch_size=self.batch_size, seed=seed)
        return PackSampler.of(data, budget=self.tokens, passes=passes, seed=seed)

    def _phases(self, data: TrainingData[Any], seed: int, passes: int) -> PhasedSampler:
        """The order of data with a schedule."""
        equal = [1.0] * len(data.shares)
        streams = BucketStreams(data.buckets, seed=seed, weights=data.weights, sets=data.sets, shares=equal)
        if (budget := self.tokens) is not None:
            tokens = tokens_of(data)
            return PhasedSampler.of(
                data.schedule,
                streams,
                lambda own, _: PackSampler(own, tokens, budget=budget, passes=passes, seed=seed),
            )
        return PhasedSampler.of(
            data.schedule,
            streams,
            lambda own, entry: BatchSampler(own, batch_size=self.resized(entry.batch_size).batch_size, seed=seed),
        )

    def __str__(self) -> str:
        several = "" if self.processes == 1 else "es"
        each = f"{self.micro}" if self.tokens is None else f"packs of up to {self.tokens} tokens, 1"
        share = f" / {self.sequence_parallel} that share each clip" if self.sequence_parallel > 1 else ""
        return f"{each} per backward x {self.accumulate} accumulation x {self.processes} process{several}{share}"
