"""Ranks and threads: which process of a launch this is, from the environment, and its share of the cores."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore

from wantrain.util.restarts import Transient

#: How long the launcher's store may take to answer.
STORE_TIMEOUT = timedelta(seconds=5)
#: How long a collective of `process_group` may take: between two lie the loading of weights and the writing of a video.
GROUP_TIMEOUT = timedelta(hours=2)


def rank() -> int:
    """Rank of this process, from the environment that a launcher sets (0 without one)."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes of the launch (1 without a launcher)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Rank of this process on its machine (0 without a launcher)."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Number of the launch's processes on this machine (1 without a launcher)."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


def is_main() -> bool:
    """True on rank 0, which writes files and prints messages."""
    return rank() == 0


@dataclass(frozen=True)
class DataRanks:
    """Which processes get samples of their own: `shared_by` neighbours get the same ones (sequence_parallel=)."""

    shared_by: int = 1

    @property
    def rank(self) -> int:
        """Number of this process's samples among those of a micro-step."""
        return rank() // self.shared_by

    @property
    def count(self) -> int:
        """How many parts of a micro-step there are."""
        return world_size() // self.shared_by

    def once(self, gathered: Tensor) -> Tensor:
        """Of rows gathered from all processes, those of one process of each data rank."""
        if self.shared_by == 1:
            return gathered
        return gathered.unflatten(0, (world_size(), -1))[:: self.shared_by].flatten(0, 1)


@dataclass(frozen=True)
class Part:
    """part=K/N of a command: part `number` (from 1) of `count` starts that know nothing of each other.

    A whole launch makes one part.
    """

    number: int = 1
    count: int = 1

    @classmethod
    def read(cls, text: str | None) -> Part:
        """From K/N; None: the whole. ValueError for what is neither."""
        if text is None:
            return cls()
        found = re.fullmatch(r"(\d+)/(\d+)", str(text))
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(
                f"part={text} must be K/N, the K-th of N starts with K from 1 to N: part=2/8. Of a SLURM array of 1-8: "
                "part=$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
            )
        return cls(int(found[1]), int(found[2]))

    def share(self, shared_by: int = 1) -> slice:
        """Of a list, the items of this process, or of the `shared_by` neighbours that make each item together."""
        ranks = DataRanks(shared_by)
        return slice((self.number - 1) * ranks.count + ranks.rank, None, self.count * ranks.count)

    def __str__(self) -> str:
        return f"part {self.number} of {self.count}"


def check_shared(shared_by: int, processes: int) -> None:
    """ValueError if so many `processes` are no whole number of groups that share a clip (sequence_parallel=)."""
    if processes % shared_by:
        below = processes // shared_by * shared_by
        nearest = f"{below} or {below + shared_by}" if below else f"{shared_by}"
        raise ValueError(
            f"sequence_parallel={shared_by} processes share a clip, and {processes} were started; start {nearest}, or "
            "give sequence_parallel=1"
        )


def single_process(command: str) -> None:
    """Raise ValueError if a launcher started several processes of a command that runs as one."""
    if world_size() > 1:
        raise ValueError(f"{command} runs as one process, but {world_size()} were started; use python {command}")


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """The processes of the launch as torch's first group, for a command without an engine.

    ValueError if they do not find each other.
    """
    with meeting():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=GROUP_TIMEOUT)
    yield
    dist.destroy_process_group()  # not after an error: it may wait for processes that wait for this one


@contextmanager
def meeting() -> Iterator[None]:
    """Make torch's error of processes that do not find each other a Transient."""
    try:
        yield
    except dist.DistNetworkError as error:
        raise Transient(
            f"the processes do not find each other at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} "
            f"({' '.join(str(error).split())}); if another program has this port, launch with --main_process_port 0, "
            "which takes a free one"
        ) from error


def says_first(message: str) -> bool:
    """False if another process of the launch has said this before: of several that meet one error, one prints it.

    They agree by the store that torchrun and `accelerate launch` keep for their processes, or that of the launchers
    themselves (launch/node.sh). Where there is none, or it does not answer, the answer is True.
    """
    launchers = os.environ.get("WANTRAIN_STORE", "")
    if world_size() == 1 or not (launchers or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"):
        return True
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if launchers:
        start = port  # each start has another, and launchers count their own restarts
        host, _, port = launchers.rpartition(":")
    try:
        store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=STORE_TIMEOUT)
        return store.add(f"wantrain/said/{start}/{zlib.crc32(message.encode())}", 1) == 1
    except RuntimeError:  # torch's own errors of networks and stores
        return True


def cores() -> int:
    """This process's share of the machine's cores, at least 1."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, available // local_world_size())


def set_threads() -> None:
    """Set torch's threads to this process's share of the cores; WANTRAIN_THREADS overrides.

    By default `accelerate launch` sets OMP_NUM_THREADS=1 and `python` uses all cores. Losses would then differ in the
    last digits between the two, and the launched run would be half as fast.
    """
    torch.set_num_threads(int(os.environ.get("WANTRAIN_THREADS", cores())))


def environment_without_launcher() -> dict[str, str]:
    """The environment without a launcher's variables, for a child process that runs by itself."""
    launcher = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "OMP_NUM_THREADS",
    )
    return {key: value for key, value in os.environ.items() if key not in launcher and "ACCELERATE" not in key}
