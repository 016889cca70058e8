"""Ranks and threads: which process this is, as the launcher's environment says, and its share of the cores."""

from __future__ import annotations

import os

import torch


def rank() -> int:
    """This process among all, from the environment a launcher sets (0 without one)."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes the launcher started (1 without one)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process among those on its machine (0 without a launcher)."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """How many processes the launcher started on this machine (1 without one)."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


def is_main() -> bool:
    """True in the one process that writes and speaks."""
    return rank() == 0


def single_process(command: str) -> None:
    """Raise ValueError if a launcher started several processes of a command that works as one."""
    if world_size() > 1:
        raise ValueError(f"{command} runs as one process, but {world_size()} were started; use python {command}")


def cores() -> int:
    """This process's share of the cores of its machine."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, available // local_world_size())


def set_threads() -> None:
    """Give each process its share of the cores.

    A bare `accelerate launch` sets OMP_NUM_THREADS=1 and `python` uses all cores: losses would then differ between
    the two in the last digits and the first be half as fast. WANTRAIN_THREADS overrides.
    """
    torch.set_num_threads(int(os.environ.get("WANTRAIN_THREADS", cores())))


def alone() -> dict[str, str]:
    """The environment for a child that is to run by itself, not as one of the launcher's processes."""
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
