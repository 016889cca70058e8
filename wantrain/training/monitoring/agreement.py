"""What the processes of a run must have in common, compared once at the start and once when the data are open.

Each process puts a small record into the store of the process group, and the main one compares them. No collective is
needed: processes that run different code might hang in one, and one that is missing is named here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from wantrain.runs.checkpoint import versions
from wantrain.runs.folder import flat
from wantrain.training.engine.accelerator import first_store
from wantrain.training.engine.main_process import on_main
from wantrain.training.engine.placement import device_name
from wantrain.util import distributed
from wantrain.util.console import say
from wantrain.util.files import made_by, missing_files
from wantrain.util.restarts import Transient

#: Where in the store the records stand.
KEY = "wantrain/agreement/"
#: Seconds that the main process waits for the record of another one.
ABSENT = 300.0
#: Seconds between two reads of the store, at most.
LOOK = 0.25
#: Seconds by which clocks may differ before it is said.
SKEW = 5.0
#: Hosts that are named with their processes, at most.
NAMED = 6
#: Settings that may differ: where the same data lie on each machine. Their content is compared.
LOCAL = re.compile(r"data\.(sets\.[^.]+\.)?(shards|pairs|cache|cache_gb)")


@dataclass(frozen=True)
class ProcessFacts:
    """What one process says of itself.

    host      name of its machine
    versions  of wantrain (with its commit) and of the libraries, by name
    device    what it computes on, with its memory
    card      what tells its card from all others; empty on a CPU
    free      bytes free on the disk of the run's folder
    clock     seconds, by the machine's clock
    settings  those that differ from the main process's, by key, as text
    """

    rank: int
    host: str
    versions: Mapping[str, str]
    device: str
    card: str
    free: int
    clock: float
    settings: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, device: torch.device, folder: Path, settings: Mapping[str, str]) -> ProcessFacts:
        """Those of this process; `folder` is the run's, which need not be there."""
        name, card = device_name(device), ""
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            name, card = f"{name} ({properties.total_memory / 1e9:.0f} GB)", str(getattr(properties, "uuid", ""))
        place = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        return cls(
            rank=distributed.rank(),
            host=os.uname().nodename,
            versions={**versions(), "wantrain": made_by().removeprefix("wantrain ")},
            device=name,
            card=card,
            free=shutil.disk_usage(place).free,
            clock=time.time(),
            settings=settings,
        )


def check_start(settings: Mapping[str, Any], folder: Path, device: torch.device, *, checkpoint: int) -> None:
    """Compare the processes before anything is loaded. All must call it.

    settings    the whole config, as plain data
    folder      of the run
    checkpoint  bytes that one of its checkpoints takes; 0 if that is not known

    ValueError, in the main process, for what must be the same and is not: each difference once, with its processes. The
    others then end without a word. What may differ is a warning.
    """
    own = {key: repr(value) for key, value in flat(json.loads(json.dumps(settings, default=str))).items()}
    began = time.time()
    if distributed.world_size() == 1:
        _judge([ProcessFacts.of(device, folder, {})], began, checkpoint)
        return
    store = first_store()
    if distributed.is_main():
        store.set(f"{KEY}settings", json.dumps(own))
    mine = ProcessFacts.of(device, folder, differing_settings(json.loads(store.get(f"{KEY}settings")), own))

    def judge(records: Sequence[Mapping[str, Any]]) -> None:
        _judge([ProcessFacts(**record) for record in records], began, checkpoint, own)

    _compare("start", asdict(mine), judge, "comparing the processes")


def check_data(fingerprint: str) -> None:
    """Compare what the processes train on, by the hash of its manifest. All must call it.

    ValueError as `check_start`.
    """
    if distributed.world_size() > 1:
        record = {"host": os.uname().nodename, "data": fingerprint}
        _compare("data", record, _judge_data, "comparing the data")


def check_files(files: Mapping[Path, int]) -> None:
    """Wait until every process sees files that the main one has written or read, by their sizes in bytes. All must call
    it, with the same files; ValueError as `check_start`, if one does not see them after `files.SHOWN` seconds.

    A disk that machines share over a network may show another machine's files late.
    """
    if distributed.world_size() > 1:
        absent = [] if distributed.is_main() else [str(path) for path in missing_files(files)]
        _compare("files", {"host": os.uname().nodename, "absent": absent}, _judge_files, "waiting for the run's files")


def host_of(rank: int) -> str:
    """The name of a process's machine, once the processes have been compared."""
    if distributed.world_size() == 1:
        return os.uname().nodename
    host: str = json.loads(first_store().get(f"{KEY}start/{rank}"))["host"]
    return host


def differing_settings(main: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """A process's own settings that differ from the main process's and may not, both as text by key."""
    keys = sorted(key for key in main.keys() | own.keys() if not LOCAL.fullmatch(key))
    return {key: own.get(key, "not set") for key in keys if main.get(key) != own.get(key)}


def differences(
    records: Sequence[ProcessFacts], main: Mapping[str, str], times: tuple[float, float], checkpoint: int
) -> tuple[list[str], list[str]]:
    """What must be the same in all processes and is not, and what is worth a warning.

    main   the settings of the main process, as text by key
    times  the main process's clock before any of the records was made, and after all were
    """
    hosts = [each.host for each in records]
    errors: list[str] = []
    warnings: list[str] = []
    for name in sorted({name for each in records for name in each.versions}):
        found = [each.versions.get(name, "none") for each in records]
        if len(set(found)) > 1:
            must = name == "wantrain" or (name == "torch" and len({_release(each) for each in found}) > 1)
            (errors if must else warnings).append(f"{name} {spread(found, hosts)}")
    for key in sorted({key for each in records for key in each.settings}, key=lambda key: (key.count("."), key)):
        errors.append(f"{key}: {spread([each.settings.get(key, main.get(key, 'not set')) for each in records], hosts)}")
    cards = Counter(each.card for each in records if each.card)
    for card, count in cards.items():
        if count > 1:
            sharing = [each.rank for each in records if each.card == card]
            errors.append(f"one card for several processes: {places(sharing, hosts)}")
    if len({each.device for each in records}) > 1:
        warnings.append(f"devices: {spread([each.device for each in records], hosts)}; the slowest sets the pace")
    early, late = times
    skews = [max(early - each.clock, each.clock - late, 0.0) for each in records]
    if max(skews) > SKEW:
        wrong = [rank for rank, skew in enumerate(skews) if skew > SKEW]
        warnings.append(
            f"clocks: {max(skews):.0f} s or more away from the main process's on {places(wrong, hosts)}; times in logs "
            "do not compare"
        )
    little = [rank for rank, each in enumerate(records) if each.free < checkpoint]
    if little:
        free = min(each.free for each in records)
        warnings.append(
            f"little free disk: {free / 1e9:.3g} GB for the run's folder on {places(little, hosts)}, and a checkpoint "
            f"takes {checkpoint / 1e9:.3g} GB"
        )
    return errors, warnings


def spread(values: Sequence[str], hosts: Sequence[str]) -> str:
    """Which processes have which of several values, the commonest by their count: "2.13.0 on 6 processes, 2.12.1 on
    node7:2,3". Both are in the order of ranks.
    """
    (first, count), *others = Counter(values).most_common()
    said = [f"{first} on {count} {'process' if count == 1 else 'processes'}"]
    said += [
        f"{value} on {places([rank for rank, each in enumerate(values) if each == value], hosts)}"
        for value, _ in others
    ]
    return ", ".join(said)


def places(ranks: Sequence[int], hosts: Sequence[str] | Mapping[int, str]) -> str:
    """Processes by machine and number, "node7:2,3 node8:8-15"; `hosts` are those of the ranks."""
    by_host: dict[str, list[int]] = {}
    for rank in ranks:
        by_host.setdefault(hosts[rank], []).append(rank)
    named = list(by_host.items())[:NAMED]
    words = [f"{host}:{_ranges(own)}" for host, own in named]
    left = len(ranks) - sum(len(own) for _, own in named)
    return " ".join(words) + (f" and {left} more" if left else "")


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, with runs of three or more as "first-last"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)


def _judge(
    records: Sequence[ProcessFacts], began: float, checkpoint: int, main: Mapping[str, str] | None = None
) -> None:
    """Say the warnings; ValueError for what must be the same and is not."""
    errors, warnings = differences(records, main or {}, (began, time.time()), checkpoint)
    if errors:
        raise ValueError(
            f"the {len(records)} processes of this run do not belong together: {'; '.join(errors)}. Start all of them "
            "with the same code, environment and command"
        )
    for each in warnings:
        say(f"warning: {each}")


def _judge_data(records: Sequence[Mapping[str, Any]]) -> None:
    found, hosts = [each["data"][:12] for each in records], [each["host"] for each in records]
    if len(set(found)) > 1:
        raise ValueError(
            f"data.shards= holds other data on some machines: manifest {spread(found, hosts)}; copy the shards there "
            "again, or give a folder that all machines share"
        )


def _judge_files(records: Sequence[Mapping[str, Any]]) -> None:
    blind = [rank for rank, each in enumerate(records) if each["absent"]]
    if blind:
        hosts, absent = [each["host"] for each in records], records[blind[0]]["absent"]
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        raise ValueError(
            f"{absent[0]}{more}, which the main process on {hosts[0]} has, is not to be seen on "
            f"{places(blind, hosts)}; give runs= a folder on a disk that all machines share"
        )


def _compare(what: str, mine: Mapping[str, Any], judge: Callable[[list[dict[str, Any]]], None], doing: str) -> None:
    """In the main process `judge` the records of all processes, in the order of ranks; the others wait for it."""
    store = first_store()
    store.set(f"{KEY}{what}/{distributed.rank()}", json.dumps(mine))
    on_main(lambda: judge(_records(store, what)), doing)


def _records(store: Any, what: str) -> list[dict[str, Any]]:
    """The records of all processes. Transient that names those whose record does not come."""
    keys = [f"{KEY}{what}/{rank}" for rank in range(distributed.world_size())]
    give_up, pause = time.monotonic() + ABSENT, 0.005
    while not store.check(keys):
        if time.monotonic() > give_up:
            absent = [rank for rank, key in enumerate(keys) if not store.check([key])]
            raise Transient(
                f"of {len(keys)} processes {_ranges(absent)} did not report within {ABSENT:.0f} s: they hang, or have "
                "ended; see their output"
            )
        time.sleep(pause)
        pause = min(2 * pause, LOOK)
    return [json.loads(word) for word in store.multi_get(keys)]


def _release(version: str) -> str:
    """Major and minor number of a version."""
    return ".".join(version.split(".")[:2])
