"""Replays: run.json says how a run was started, and `replay=runs/NAME/run.json` starts it so again and compares.

run.json is data. Of it only the words that were typed are used again, and only those that set a plain value or choose
among the options that ship with the project: it can make the program import or call nothing that the command line of
today does not ask for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wantrain.models.formats.weights import read_json
from wantrain.runs.checkpoint import versions
from wantrain.util.console import say
from wantrain.util.files import made_by, write_json
from wantrain.util.renamed import upgraded_words

#: How far two losses of one step may lie apart (relative) where engine, world, device or versions differ.
BOUND = 1e-4


def described(command: Iterable[str], *, data: str, engine: str, processes: int, device: str) -> dict[str, Any]:
    """One start of a run, for run.json: the words typed, and what else decides about its numbers.

    data  the hash of the shards' manifest
    """
    return {
        "command": list(command),
        "folder": str(Path.cwd()),
        "made_by": made_by(),
        "versions": versions(),
        "engine": engine,
        "processes": processes,
        "device": device,
        "data": data,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def record(path: Path, start: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Add a start to run.json (the main process only): the first is what a replay repeats."""
    starts = read_starts(path) if path.is_file() else []
    write_json(path, {"config": dict(config), "starts": [*starts, dict(start)]})


def read_starts(path: Path) -> list[dict[str, Any]]:
    """The starts that a run.json tells of. ValueError if it is none."""
    starts = read_json(path).get("starts")
    if not isinstance(starts, list) or not all(isinstance(start, dict) and "command" in start for start in starts):
        raise ValueError(f"{path} is no run.json: it tells of no start")
    return starts


def arguments(given: list[str], conf: Path) -> list[str]:
    """A command line with replay=FILE, as the run's own: its words, then those `given` now, which go before.

    `steps=N` says how far to go; the run's own length, which its learning rate follows, stays. The replay gets a name
    of its own. ValueError for a word that sets more than a value; `conf` holds the options that may be chosen.
    """
    words = dict(word.split("=", 1) for word in given if "=" in word)
    if "replay" not in words or words["replay"] in {"", "null"}:
        return given
    path = Path(words["replay"].strip('"'))
    if not path.is_file():
        raise ValueError(f"replay={path} does not exist; give the run.json of a run")
    starts = read_starts(path)
    if not starts:
        raise ValueError(f"{path} tells of no start")
    command = upgraded_words(str(word) for word in starts[0]["command"])
    for word in command:
        _check_word(word, path, conf)
    if "steps" in words:
        given = [word for word in given if not word.startswith("steps=")] + [f"stop_after={words['steps']}"]
    if "run" not in words:
        given = [*given, f'run="{path.resolve().parent.name}_replay"']
    now = {word.split("=", 1)[0] for word in given}
    return [word for word in command if word.split("=", 1)[0] not in now] + given


def _check_word(word: str, path: Path, conf: Path) -> None:
    match = re.fullmatch(r"([\w.]+)=(.*)", word, flags=re.DOTALL)
    if match is None:
        raise ValueError(f"{path}: {word!r} sets no value; a replay takes key=value alone, type the rest yourself")
    key, value = match[1], match[2].strip("\"'")
    if "_target_" in word or key.split(".")[0] == "hydra" or "${" in value.replace("\\${", ""):
        raise ValueError(f"{path}: {word!r} could make the program call something; type it yourself if you trust it")
    group = conf / key.replace(".", "/")
    if group.is_dir() and not (re.fullmatch(r"\w+", value) and (group / f"{value}.yaml").is_file()):
        raise ValueError(f"{path}: {word!r} is none of the options in conf/{key}")


def compare_starts(path: Path, now: Mapping[str, Any]) -> None:
    """Say what differs between the start that is replayed and this one. ValueError if the data do."""
    before = read_starts(path)[0]
    if before["data"] != now["data"]:
        raise ValueError(
            f"{path}: the run saw other shards than data.shards holds now (another manifest), so nothing can be "
            "compared; give those it was trained on"
        )
    keys = ("made_by", "versions", "engine", "processes", "device")
    differing = [f"{key}: {before.get(key)} -> {now[key]}" for key in keys if before.get(key) != now[key]]
    how = "; ".join(differing) if differing else "everything that decides about its bits is the same"
    say(f"replay of {path.parent}: {how}")


def compare(path: Path, ours: Path) -> str:
    """What two logs say about the same steps, in one line. ValueError if the losses part.

    path  the run.json that was replayed; ours: metrics.jsonl of the replay
    """
    wanted, found = _losses(path.parent / "metrics.jsonl"), _losses(ours)
    steps = sorted(wanted.keys() & found.keys())
    if not steps:
        raise ValueError(f"{path.parent} and its replay have no step in common")
    equal = sum(wanted[step] == found[step] for step in steps)
    if equal == len(steps):
        return f"replay: the losses of {equal} steps are the same, bit for bit"
    apart = {step: abs(found[step] - wanted[step]) / max(abs(wanted[step]), 1e-12) for step in steps}
    first = next(step for step in steps if wanted[step] != found[step])
    line = (
        f"replay: {equal} of {len(steps)} losses are the same bits; the first that is not is step {first} "
        f"({wanted[first]!r} then, {found[first]!r} now), the farthest apart by {max(apart.values()):.1e}"
    )
    if max(apart.values()) > BOUND:
        raise ValueError(f"{line}, more than {BOUND:g}: this is not that run again")
    return line


def _losses(path: Path) -> dict[int, float]:
    if not path.is_file():
        return {}
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return {row["step"]: row["loss"] for row in rows if row.get("loss") is not None}
