"""How long a checkpoint stops the training: python benchmarks/checkpoint.py [--folder DIR] [--gib 1] [--rounds 7]

One state (weights and Adam's two moments, float32) is saved in five ways, turn by turn, in an order that rotates, the
disk settled before each: `clone` (every tensor cloned into new memory: what no background save can do without, unless
it has memory already), `copy` (into memory that is there: the floor), `background` (what a run does: `Copier` into
the last one's memory and `Checkpoints.save`; the write behind it is timed apart), `plain` (safetensors' save_file and
fsync, no more) and `at once` (`Checkpoints.save` without a thread: fsync, hash, rename, purge). Reported are seconds
per GiB and their ratios. Beside it: how much slower the training thread is while a write is under way, once for large
products and once for operations so small that Python itself is what takes the time. Writes checkpoint.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from wantrain.models.formats.weights import read_file, write_file
from wantrain.runs.checkpoint import Checkpoints, Copier
from wantrain.util.files import sync_file

WAYS = ("clone", "copy", "background", "plain", "at once")


def state_of(gib: float) -> dict[str, Tensor]:
    """Tensors like those of a transformer in training: a few large, many small, each with two moments."""
    shapes = [(1024, 4096), (4096, 1024), (1024, 1024), *[(1024,)] * 8]
    wanted, state, block = int(gib * 2**30), dict[str, Tensor](), 0
    while sum(tensor.nbytes for tensor in state.values()) < wanted:
        for number, shape in enumerate(shapes):
            for part in ("weight", "exp_avg", "exp_avg_sq"):
                state[f"blocks.{block}.{number}/{part}"] = torch.randn(shape)
        block += 1
    return state


class Bench:
    """The ways to save one state in one folder, each a function that returns the seconds the training waits."""

    def __init__(self, folder: Path, state: dict[str, Tensor]) -> None:
        self.folder, self.state, self.step = folder, state, 0
        self.size = sum(tensor.nbytes for tensor in state.values())
        self.copier = Copier()
        self.copies()
        self.behind: list[float] = []
        self.stores = {way: Checkpoints(folder / way, keep=1, background=way == "background") for way in WAYS}
        for store in self.stores.values():
            store.prepare()

    def copies(self) -> dict[str, Tensor]:
        """The state as a run copies it for a save, into the memory of the save before."""
        self.copier.begin()
        return {name: self.copier(tensor) for name, tensor in self.state.items()}

    def clone(self) -> float:
        started = time.perf_counter()
        clones = {name: tensor.clone() for name, tensor in self.state.items()}
        seconds = time.perf_counter() - started
        assert len(clones) == len(self.state)
        return seconds

    def copy(self) -> float:
        started = time.perf_counter()
        self.copies()
        return time.perf_counter() - started

    def background(self) -> float:
        started = time.perf_counter()
        self.begin()
        seconds = time.perf_counter() - started
        self.stores["background"].wait()
        self.behind.append(time.perf_counter() - started - seconds)
        return seconds

    def begin(self) -> None:
        """A background save, as a run makes it; the one before it has been written."""
        self._save("background", self.copies())

    def plain(self) -> float:
        path = self.folder / "plain.safetensors"
        started = time.perf_counter()
        save_file(self.state, path)
        sync_file(path)
        return time.perf_counter() - started

    def at_once(self) -> float:
        started = time.perf_counter()
        self._save("at once", self.state)
        return time.perf_counter() - started

    def _save(self, way: str, tensors: dict[str, Tensor]) -> None:
        def write(folder: Path) -> dict[Path, str]:
            path = folder / "state.safetensors"
            return {path: write_file(path, tensors)}

        self.step += 1
        self.stores[way].save(self.step, write, {}, size=self.size)

    def check(self) -> None:
        """What was saved in the background is the state, every value."""
        newest = self.stores["background"].newest()
        assert newest is not None
        stored, _ = read_file(newest / "state.safetensors")
        assert stored.keys() == self.state.keys()
        assert all(torch.equal(stored[name], tensor) for name, tensor in self.state.items())


def stalls(bench: Bench, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round; the first round warms up and does not count."""
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds + 1):
        turn = number % len(WAYS)
        for way in (*WAYS[turn:], *WAYS[:turn]):
            bench.state[next(iter(bench.state))].add_(1)  # no two saves hold the same
            os.sync()
            seconds = getattr(bench, way.replace(" ", "_"))()
            if number:
                times[way].append(seconds)
    bench.background()
    bench.check()
    return times


def slowdown(bench: Bench, work: Callable[[], object], rounds: int) -> dict[str, list[float]]:
    """How many times longer `work` takes while a checkpoint is being written, by the clock and by the training
    thread's own processor seconds: the second leaves out that the writer, or somebody else, needed the same core."""
    ratios: dict[str, list[float]] = {"clock": [], "processor": []}

    def seconds_each(goes_on: Callable[[], bool]) -> tuple[float, float]:
        count, clock, processor = 0, time.perf_counter(), time.thread_time()
        while goes_on():
            work()
            count += 1
        return (time.perf_counter() - clock) / count, (time.thread_time() - processor) / count

    for _ in range(rounds):
        os.sync()
        until = time.perf_counter() + 1
        quiet = seconds_each(lambda until=until: time.perf_counter() < until)  # type: ignore[misc]
        bench.begin()
        written = bench.folder / "background" / f"step_{bench.step:06d}"
        busy = seconds_each(lambda written=written: not written.exists())  # type: ignore[misc]
        bench.stores["background"].wait()
        for name, with_write, without in zip(ratios, busy, quiet, strict=True):
            ratios[name].append(round(with_write / without, 3))
    return {name: sorted(found) for name, found in ratios.items()}


def repeated(times: int, work: Callable[[], object]) -> Callable[[], None]:
    """`work`, several times: long enough that looking for the end of the write costs nothing beside it."""

    def several() -> None:
        for _ in range(times):
            work()

    return several


def measure(folder: Path, gib: float, rounds: int) -> dict[str, Any]:
    """All figures; lists are in order of size."""
    bench = Bench(folder, state_of(gib))
    size = bench.size / 2**30
    times = stalls(bench, rounds)
    median = {way: statistics.median(seconds) for way, seconds in times.items()}
    square, few = torch.randn(512, 512), torch.randn(16)
    return {
        "gib": round(size, 3),
        "seconds_per_gib": {way: [round(value / size, 3) for value in sorted(times[way])] for way in WAYS}
        | {"behind": [round(value / size, 3) for value in sorted(bench.behind)]},
        "median": {way: round(value / size, 3) for way, value in median.items()},
        "ratio": {f"background / {way}": round(median["background"] / median[way], 3) for way in WAYS[:2] + WAYS[3:]},
        "slower_while_written": {
            "products of 512 x 512": slowdown(bench, repeated(5, lambda: square @ square), rounds),
            "sums of 16 numbers": slowdown(bench, repeated(2000, lambda: few + few), rounds),
        },
    }


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="a folder on the disk to measure (5 times --gib)")
    parser.add_argument("--gib", type=float, default=1.0, help="size of the state")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of the training; the writer has one of its own")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    scratch = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        results = measure(scratch, options.gib, options.rounds)
    finally:
        shutil.rmtree(scratch)
    about: dict[str, Any] = {"torch": torch.__version__, "safetensors": safetensors.__version__}
    about |= {"machine": platform.machine()}
    about |= {"cores": os.cpu_count(), "threads": options.threads, "rounds": options.rounds}
    about |= {"load": round(os.getloadavg()[0], 2), "date": time.strftime("%Y-%m-%d")}
    text = json.dumps({"about": about, **results}, indent=2)
    print(text)
    Path(__file__).with_suffix(".json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
