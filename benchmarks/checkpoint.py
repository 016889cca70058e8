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
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import result
import torch
from safetensors.torch import save_file
from torch import Tensor

from wantrain.models.formats.weights import read_file, write_file
from wantrain.runs.checkpoint import Checkpoints, Copier
from wantrain.util.files import sync_file

WAYS = ("clone", "copy", "background", "plain", "at once")
#: Goals for the seconds of a background save over those of another way.
GOALS = {"clone": 1.3, "plain": 0.4}


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
            ratios[name].append(with_write / without)
    return ratios


def repeated(times: int, work: Callable[[], object]) -> Callable[[], None]:
    """`work`, several times: long enough that looking for the end of the write costs nothing beside it."""

    def several() -> None:
        for _ in range(times):
            work()

    return several


def compare(folder: Path, gib: float, rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The cases, and the seconds of the write behind a background save."""
    bench = Bench(folder, state_of(gib))
    size = bench.size / 2**30
    times = {way: [value / size for value in own] for way, own in stalls(bench, rounds).items()}
    square, few = torch.randn(512, 512), torch.randn(16)
    waits = {
        f"beside {way}": result.measure(
            "s per GiB", {"background": times["background"], way: times[way]}, at_most=GOALS.get(way)
        )
        for way in WAYS
        if way != "background"
    }
    cases = {"the training waits": result.case(waits)}
    for name, work in (
        ("products of 512 x 512", repeated(5, lambda: square @ square)),
        ("sums of 16 numbers", repeated(2000, lambda: few + few)),
    ):
        slower = slowdown(bench, work, rounds)
        cases[f"{name} while it is written"] = result.case(
            {f"by the {clock}": result.measure("times the seconds", {"training": own}) for clock, own in slower.items()}
        )
    return cases, {"seconds per GiB of the write behind": [value / size for value in bench.behind]}


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
        cases, more = compare(scratch, options.gib, options.rounds)
    finally:
        shutil.rmtree(scratch)
    found = result.record(
        __file__,
        protocol="one process, ways in turn in an order that rotates, the disk settled before each",
        shapes={"GiB": options.gib, "state": "weights and two moments, float32"},
        cases=cases,
        libraries=("torch", "safetensors"),
        threads=options.threads,
        more=more,
    )
    print("\n".join(result.shown(found)))
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
