"""The device that a command computes on, and why torch cannot use an NVIDIA card that is present.

The card is detected without CUDA, from the files of its driver: torch alone cannot distinguish a machine without a card
from one whose CUDA does not work.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from wantrain.util import distributed
from wantrain.util.console import say

#: A transformer with more parameters is trained on a CPU only with device=cpu: a step takes minutes there.
LARGE = 1_000_000_000
#: The oldest driver that runs programs built for each major version of CUDA on Linux (NVIDIA's CUDA release notes).
OLDEST_DRIVER = {11: (450, 80, 2), 12: (525, 60, 13), 13: (580, 65, 6)}


@dataclass(frozen=True)
class Card:
    """An NVIDIA card that the operating system shows; `driver` is its driver's version, None if no driver is loaded."""

    driver: str | None


def find_card(root: Path = Path("/"), which: Callable[[str], str | None] = shutil.which) -> Card | None:
    """The NVIDIA card of this machine, detected without CUDA; None if there is no sign of one."""
    version = root / "proc/driver/nvidia/version"
    if version.is_file():
        number = re.search(r"\b\d{3,}\.\d+(\.\d+)*\b", version.read_text(encoding="utf-8", errors="replace"))
        return Card(number[0] if number else "of unknown version")
    return Card(None) if (root / "dev/nvidia0").exists() or which("nvidia-smi") is not None else None


def choose(name: str, *, find: Callable[[], Card | None] = find_card) -> torch.device:
    """The device for `auto`, `cpu` or `cuda` (this process's own GPU).

    With `cuda`, ValueError if no GPU can be used. With `auto` the CPU is used then; if there is a card that torch
    cannot use, a message says why.
    """
    if name == "cpu":
        return torch.device("cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        for each in caught:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
        return _own_gpu()
    card = None if is_hidden() else find()
    why = ""
    if card is not None:
        why = explain(card, torch.version.cuda, warning=" ".join(str(each.message) for each in caught))
    if name == "cuda":
        raise ValueError(f"device=cuda, but no GPU is visible{why and f': {why}'}; use device=cpu or device=auto")
    if why:
        say(f"the CPU is used: {why}")
    return torch.device("cpu")


def announce(device: torch.device) -> None:
    """Say what a command computes on, among its first lines."""
    say(describe(device))


def describe(device: torch.device) -> str:
    """The device, its memory and what of it is free, in one line; of a CPU also the threads that this process uses."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        name = f"{torch.cuda.get_device_name(device)} ({device})"
        return f"device: {name}, memory {total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free"
    total, free = host_memory()
    threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
    memory = f"memory {total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free"
    return f"device: {device.type} {platform.machine()}, {threads}, {memory}"


def host_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Bytes of host memory that this process may use, and those of them that are free: the machine's, or less where a
    container's limit (of control groups, both versions) is lower.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
    meminfo = root / "proc/meminfo"
    if meminfo.is_file() and (found := re.search(r"MemAvailable: +(\d+) kB", meminfo.read_text(encoding="utf-8"))):
        free = int(found[1]) << 10
    groups = root / "sys/fs/cgroup"
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        most, now = (_number_in(groups / name) for name in (limit, used))
        if most is not None and now is not None and most < total:
            total, free = most, min(free, max(0, most - now))
    return total, free


def _number_in(file: Path) -> int | None:
    """The number that a file holds; None for another word, or where it cannot be read."""
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _own_gpu() -> torch.device:
    """Make this process's GPU torch's current one; ValueError if a machine has fewer GPUs than processes."""
    if distributed.local_rank() >= torch.cuda.device_count():
        raise ValueError(
            f"process {distributed.local_rank()} of this machine has no GPU of its own: {torch.cuda.device_count()} "
            "are visible; start as many processes as there are GPUs"
        )
    torch.cuda.set_device(distributed.local_rank())
    return torch.device("cuda")


def is_hidden() -> bool:
    """True if the user has hidden all GPUs from CUDA."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"}


def explain(card: Card, built_for: str | None, *, warning: str = "") -> str:
    """Why torch, built for CUDA `built_for` (None: without CUDA), cannot use `card`, and the fix, in one line.

    `warning` is torch's own message.
    """
    version = f"torch {torch.__version__}"
    if card.driver is None:
        return (
            "this machine has an NVIDIA card or its tools, but no NVIDIA driver is loaded (there is no "
            "/proc/driver/nvidia/version); install the driver, or give the container its GPUs (docker run --gpus all)"
        )
    if built_for is None:
        return (
            f"this machine has an NVIDIA card (driver {card.driver}), but {version} is built without CUDA; install a "
            "CUDA build of torch (the installation page of PyTorch has the command for each CUDA version)"
        )
    oldest = OLDEST_DRIVER.get(int(built_for.split(".")[0]))
    if oldest is not None and card.driver[0].isdigit() and _numbers(card.driver) < oldest:
        return (
            f"the NVIDIA driver {card.driver} is too old for {version}, which is built for CUDA {built_for} and needs "
            f"driver {'.'.join(map(str, oldest))} or newer; update the driver, or install torch built for an older CUDA"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = "" if visible is None else f", CUDA_VISIBLE_DEVICES={visible}"
    return (
        f"this machine has an NVIDIA card (driver {card.driver}{seen}), but {version} for CUDA {built_for} cannot use "
        f"it{warning and f' ({warning})'}; compare what nvidia-smi shows"
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def refuse_large(name: str, parameters: int, device: torch.device, option: str) -> None:
    """Raise ValueError if a transformer with more than `LARGE` parameters would train on a CPU without device=cpu.

    `option` is the value of device=.
    """
    if device.type == "cpu" and option != "cpu" and parameters > LARGE:
        raise ValueError(
            f"{name} has {parameters / 1e9:.1f} billion parameters and no GPU can be used: on a CPU a training step "
            "takes minutes to hours. Give device=cpu to do it anyway, or dry_run=true to see the plan"
        )
