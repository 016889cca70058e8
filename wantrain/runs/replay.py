"""Replay: run.json records how a run was started; `replay=runs/NAME/run.json` starts it again and compares the losses.

run.json is data. Only its command-line words are used, and only those that set a plain value or choose an option that
ships with the project. So it cannot make the program import or call anything.
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

#: Largest relative difference of two losses of one step where engine, processes, device or versions differ.
BOUND = 1e-4


def described(
    command: Iterable[str],
    *,
    data: str,
    sources: Mapping[str, str],
    engine: str,
    processes: int,
    sequence_parallel: int,
    device: str,
    attention: str | None,
) -> dict[str, Any]:
    """One start of a run, for run.json: its command line, and everything else that its numbers depend on.

    data     the hash of the shards' manifest
    sources  identities of the files that it starts from
    sequence_parallel  processes that share a clip
    attention  the kernel of attention; None where nothing attends
    """
    return {
        "command": list(command),
        "folder": str(Path.cwd()),
        "made_by": made_by(),
        "versions": versions(),
        "engine": engine,
        "processes": processes,
        "sequence_parallel": sequence_parallel,
        "device": device,
        "attention": attention,
        "data": data,
        "sources": dict(sources),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def record(path: Path, start: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Add a start to run.json (main process only). A replay repeats the first."""
    starts = read_starts(path) if path.is_file() else []
    write_json(path, {"config": dict(config), "starts": [*starts, dict(start)]})


def read_starts(path: Path) -> list[dict[str, Any]]:
    """The starts recorded in a run.json. ValueError for another file."""
    starts = read_json(path).get("starts")
    if not isinstance(starts, list) or not all(isinstance(start, dict) and "command" in start for start in starts):
        raise ValueError(f"{path} is no run.json: it records no start")
    return starts


def arguments(given: list[str], conf: Path) -> list[str]:
    """A command line with replay=FILE, replaced by that of the recorded run; words `given` now override its words.

    `steps=N` sets where the replay stops; the run's own length, which its learning rate follows, stays. The replay gets
    its own run name. ValueError for a word that does more than set a value; `conf` holds the options that may be
    chosen.
    """
    words = dict(word.split("=", 1) for word in given if "=" in word)
    if "replay" not in words or words["replay"] in {"", "null"}:
        return given
    path = Path(words["replay"].strip('"'))
    if not path.is_file():
        raise ValueError(f"replay={path} does not exist; give the run.json of a run")
    starts = read_starts(path)
    if not starts:
        raise ValueError(f"{path} records no start")
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
        raise ValueError(f"{path}: {word!r} sets no value; a replay uses key=value only, so type the rest yourself")
    key, value = match[1], match[2].strip("\"'")
    if "_target_" in word or key.split(".")[0] == "hydra" or "${" in value.replace("\\${", ""):
        raise ValueError(f"{path}: {word!r} could make the program call something; type it yourself if you trust it")
    group = conf / key.replace(".", "/")
    if group.is_dir() and not (re.fullmatch(r"\w+", value) and (group / f"{value}.yaml").is_file()):
        raise ValueError(f"{path}: {word!r} is none of the options in conf/{key}")


def compare_starts(path: Path, now: Mapping[str, Any]) -> None:
    """Print what differs between the replayed start and this one. ValueError if data or base differ."""
    before = read_starts(path)[0]
    if before["data"] != now["data"]:
        raise ValueError(
            f"{path}: the run saw other shards than data.shards holds now (another manifest), so nothing can be "
            "compared; give those it was trained on"
        )
    if before.get("sources", now["sources"]) != now["sources"]:
        raise ValueError(
            f"{path}: the run started from other files than weights=, parts= and init= name now, so nothing can be "
            "compared; give those it started from, wherever they lie"
        )
    keys = ("made_by", "versions", "engine", "processes", "sequence_parallel", "device", "attention")
    differing = [f"{key}: {before.get(key)} -> {now[key]}" for key in keys if before.get(key, now[key]) != now[key]]
    say(f"replay of {path.parent}: {'; '.join(differing) or 'everything that its bits depend on is the same'}")


def compare(path: Path, ours: Path) -> str:
    """A line on how the losses of two runs compare. ValueError if they differ by more than BOUND.

    path  the run.json that was replayed; ours: metrics.jsonl of the replay
    """
    before, now = _losses(path.parent / "metrics.jsonl"), _losses(ours)
    steps = sorted(before.keys() & now.keys())
    if not steps:
        raise ValueError(f"{path.parent} and its replay have no step in common")
    equal = sum(before[step] == now[step] for step in steps)
    if equal == len(steps):
        return f"replay: the losses of {equal} steps are the same, bit for bit"
    apart = {step: abs(now[step] - before[step]) / max(abs(before[step]), 1e-12) for step in steps}
    first = next(step for step in steps if before[step] != now[step])
    line = (
        f"replay: {equal} of {len(steps)} losses are the same bits; the first that is not is step {first} "
        f"({before[first]!r} then, {now[first]!r} now), the farthest apart by {max(apart.values()):.1e}"
    )
    if max(apart.values()) > BOUND:
        raise ValueError(f"{line}, more than {BOUND:g}: this is not that run again")
    return line


def _losses(path: Path) -> dict[int, float]:
    if not path.is_file():
        return {}
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return {row["step"]: row["loss"] for row in rows if row.get("loss") is not None}
