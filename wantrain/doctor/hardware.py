"""Checks of the machine: card, kernels of attention, memory, shared memory, disks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from wantrain.doctor.finding import GIB, Finding, Options
from wantrain.models import attention
from wantrain.util import devices
from wantrain.util.files import check_writable

#: GiB below which nothing can be trained, and below which large models are short of it.
LEAST_DISK, LARGE_DISK = 1.0, 75.0
LEAST_MEMORY, LARGE_MEMORY = 2.0, 48.0
#: GiB of shared memory that processes on one machine exchange data through (NCCL).
LEAST_SHARED = 1.0
#: Share of a card's memory that is free on an idle machine.
IDLE = 0.9


def check_card(options: Options) -> Iterator[Finding]:
    """The NVIDIA cards: memory, capability, driver; or why there is none to use."""
    card = devices.find_card()
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(number)
            free, total = torch.cuda.mem_get_info(number)
            driver = f", driver {card.driver}" if card is not None and card.driver else ""
            found = (
                f"{about.name} (cuda:{number}), compute capability {about.major}.{about.minor}, {total / GIB:.1f} GiB, "
                f"{free / GIB:.1f} free{driver}, CUDA {torch.version.cuda}"
            )
            fix = "" if free > IDLE * total else "another process holds memory of it: see nvidia-smi"
            yield Finding("card", found, fix)
    elif options.device == "cuda" or (card is not None and options.device == "auto" and not devices.is_hidden()):
        why = "no NVIDIA card" if card is None else devices.explain(card, torch.version.cuda)
        yield Finding("card", why, "give device=cpu, which trains the tiny models", broken=True)
    else:
        hidden = "hidden from CUDA" if card is not None else "no NVIDIA card"
        found = f"{hidden}; the CPU trains the tiny models"
        yield Finding("card", found, "the published models need a card")


def check_attention(options: Options) -> Iterator[Finding]:
    """The kernels of attention for bf16, the one that attention=auto takes, and why others are missing."""
    cuda = options.device != "cpu" and torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16
    machine = attention.Machine.of(device, dtype)
    try:
        chosen = attention.choose("auto", device, dtype, width=128).name
    except ValueError as error:
        yield Finding("attention", str(error), "install torch again, in a build for this card", broken=True)
        return
    missing = {name: why for name in attention.NAMES[1:] if (why := machine.why_not(name)) is not None}
    others = f"; missing: {'; '.join(f'{name}: {why}' for name, why in missing.items())}" if missing and cuda else ""
    yield Finding("attention", f"{chosen}, of {', '.join(machine.available())} on {device.type}{others}")


def check_memory(options: Options) -> Iterator[Finding]:
    """Host memory, or a container's limit of it."""
    total, free = (each / GIB for each in devices.host_memory())
    found = f"{total:.1f} GiB, {free:.1f} free"
    if free < LEAST_MEMORY:
        yield Finding("memory", found, f"free {LEAST_MEMORY:g} GiB, or raise the container's limit", broken=True)
    elif total < LARGE_MEMORY and torch.cuda.is_available():
        yield Finding("memory", found, "recipes for small cards keep 8 to 57 GB on the host (docs/recipes.md)")
    else:
        yield Finding("memory", found)


def check_shared_memory(options: Options) -> Iterator[Finding]:
    """Shared memory, of which a container gets 64 MB by default."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        yield Finding("shared memory", "no /dev/shm", "several processes on one machine need it")
        return
    total = shutil.disk_usage(folder).total / GIB
    small = "start the container with --shm-size=8g or --ipc=host, for several processes on one machine"
    yield Finding("shared memory", f"{total:.1f} GiB", small if total < LEAST_SHARED else "")


def check_disk(options: Options) -> Iterator[Finding]:
    """Room where runs are written, and where downloads of the hub are kept."""
    try:
        check_writable(options.runs, key="runs")
    except ValueError as error:
        yield Finding("disk", str(error), "give runs=FOLDER", broken=True)
    else:
        free = _free(options.runs)
        low = free < LEAST_DISK
        fix = "free disk space, or give runs=FOLDER on another disk" if low else ""
        yield Finding("disk", f"{free:.1f} GiB free for {options.runs}/", fix, broken=low)
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", "~/.cache/huggingface"), "hub"))
    cache = cache.expanduser()
    free = _free(cache)
    large = (
        "the published pair takes 2 x 29 GB in bf16, and its text encoder 11; set HF_HOME to a folder on a larger disk"
    )
    yield Finding("disk", f"{free:.1f} GiB free for downloads in {cache}", large if free < LARGE_DISK else "")


def _free(folder: Path) -> float:
    """GiB free at a folder, or at the nearest one above it that there is."""
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    return shutil.disk_usage(existing).free / GIB
