"""The content of a run's page as plain data: what the page's scripts draw."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from wantrain.data.loading.views import ClipView
from wantrain.runs.checkpoint import Checkpoints
from wantrain.runs.folder import RunFolder
from wantrain.runs.pages.bins import Bin, Bins, WorstStep
from wantrain.runs.pages.log import OF_EXPERT, OF_RUN, UNUSUAL, RunLog

#: What has been previewed so far, one object per video, in the folder of samples.
PREVIEWS = "previews.jsonl"
#: Clips with a picture, at most, and clips that are named for their losses.
PICTURES, HARD = 160, 6
#: Pictures that one write of the page makes, at most: the others come with the next ones.
AT_ONCE = 12
#: A clip counts as hard once it was seen so often, with losses so many times those of others.
SEEN, HARDER = 3, 1.2
#: Values of an expert's bin of which the largest counts, and those of which the last does; of others the mean.
LARGEST, LAST = {"times_usual"}, {"lr", "samples", "host_gb", "device_gb"}


#: The name of a clip, as the log has it -> the clip to look at; None for an unknown one.
FindClip = Callable[[str], ClipView | None]


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    state    running, finished, stopped, or failed
    message  one line about it; may be empty
    refresh  seconds until the page is written again, about; 0 where it is not
    """

    state: str
    steps: int
    message: str = ""
    refresh: float = 0.0


def content(folder: RunFolder, log: RunLog, progress: Progress, pictures: Pictures) -> dict[str, Any]:
    """Everything that a run's page shows."""
    config = read_yaml(folder.path / "config.yaml")
    bins = log.steps.sorted()
    experts = list(dict.fromkeys(key.split("/")[0] for each in bins for key in each.tallies if key.endswith("/loss")))
    picks = {found.step: found for each in bins for found in each.worst.values()} | log.picked
    records = safeguard_records(folder, (config.get("safeguards") or {}).get("refuse"))
    unusual = sorted(log.unusual, reverse=True)[:UNUSUAL]
    hard = hard_clips(log)
    wanted = [clip for _, step, _ in unusual for clip, _, _ in picks[step].clips[:4]]
    wanted += [clip["id"] for record in records for clip in record["samples"]]
    wanted += [clip for clip, _, _ in hard]
    wanted += [clip for found in reversed(list(picks.values())) for clip, _, _ in found.clips]
    return {
        "name": folder.path.name,
        "state": progress.state,
        "message": progress.message,
        "refresh": progress.refresh,
        "step": log.last_step,
        "steps": progress.steps,
        "updated": round(time.time()),
        "facts": facts(config, folder),
        "experts": experts,
        "width": log.steps.width,
        **columns(bins, experts),
        "picks": {step: pick_as_data(found) for step, found in picks.items() if found.clips},
        "unusual": [[step, expert, rounded(score)] for score, step, expert in unusual],
        "records": records,
        "hard": hard,
        "clips": pictures.of(wanted, AT_ONCE if progress.state == "running" else PICTURES),
        "heat": {expert: heat(binned) for expert, binned in log.heat.items()},
        "validation": {expert: [rounded_row(row) for row in rows] for expert, rows in log.validations.items()},
        "previews": previews(folder),
        "checkpoints": [int(path.name.removeprefix("step_")) for path in complete_checkpoints(folder)],
        "config": yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        "starts": starts(folder),
    }


def columns(bins: Sequence[Bin], experts: Sequence[str]) -> dict[str, Any]:
    """The columns of all charts over steps, and the worst step of each bin, by expert."""
    times = sorted({key for each in bins for key in each.tallies if key.startswith("time/")})
    return {
        "x": [each.step for each in bins],
        "of_expert": {expert: {key: column(bins, f"{expert}/{key}", key) for key in OF_EXPERT} for expert in experts},
        "of_run": {key: column(bins, key, key) for key in OF_RUN},
        "times": {key.removeprefix("time/"): column(bins, key, key) for key in times},
        "worst": {
            expert: [each.worst[expert].step if expert in each.worst else None for each in bins] for expert in experts
        },
    }


def column(bins: Sequence[Bin], key: str, what: str) -> list[float | None]:
    """One value of each bin; None where it has none."""
    found = [each.tallies.get(key) for each in bins]
    if what in LARGEST:
        return [None if tally is None else rounded(tally.largest) for tally in found]
    if what in LAST:
        return [None if tally is None else rounded(tally.last) for tally in found]
    return [None if tally is None else rounded(tally.mean) for tally in found]


def heat(binned: Bins) -> dict[str, Any]:
    """Mean losses by noise level (the middles of its bins), for each bin of steps."""
    bins = binned.sorted()
    sigmas = sorted({sigma for each in bins for sigma in each.tallies}, key=float)
    return {
        "x": [each.step for each in bins],
        "sigma": [float(sigma) for sigma in sigmas],
        "loss": [
            [rounded(each.tallies[sigma].mean) if sigma in each.tallies else None for each in bins] for sigma in sigmas
        ],
    }


def pick_as_data(found: WorstStep) -> dict[str, Any]:
    """One step that the page can show: its values, and its clips as [id, sigma, loss]."""
    return {
        **{key: rounded(value) for key, value in found.values.items()},
        "clips": [[clip, rounded(sigma), rounded(loss)] for clip, sigma, loss in found.clips],
    }


def hard_clips(log: RunLog) -> list[tuple[str, float, int]]:
    """The clips with the highest losses against those of others at the same noise: name, ratio, times seen."""
    seen = {clip: own for clip, own in log.by_clip.items() if own.count >= SEEN and own.ratio >= HARDER}
    most = sorted(seen, key=lambda clip: -seen[clip].ratio)[:HARD]
    return [(clip, round(seen[clip].ratio, 2), seen[clip].count) for clip in most]


def safeguard_records(folder: RunFolder, refuse: float | None) -> list[dict[str, Any]]:
    """What safeguards recorded: the records of all processes at one step together, the newest steps.

    A step was `skipped` for its gradient, or because its loss was more than `refuse` times the usual one.
    """
    by_step: dict[int, dict[str, Any]] = {}
    for row in read_rows(folder.safeguards):
        kept = by_step.setdefault(row["step"], {**row, "samples": []})
        kept["samples"] += row["samples"]
        usual = row.get("times_usual", 0.0)
        refused = refuse is not None and isinstance(usual, int | float) and usual > refuse
        kept["skipped"] = row["safeguard"] == "gradient" or refused
    return [by_step[step] for step in sorted(by_step)[-UNUSUAL:]]


def previews(folder: RunFolder) -> dict[str, Any]:
    """The sample grid: a row for each prompt and seed, with the video of each step by its path from the page."""
    rows: dict[tuple[int, str, int], dict[str, Any]] = {}
    for row in read_rows(folder.samples / PREVIEWS):
        key = (row["number"], row["prompt"], row["seed"])
        videos = rows.setdefault(key, {"prompt": row["prompt"], "seed": row["seed"], "videos": {}})["videos"]
        file = f"{folder.samples.name}/{row['file']}"
        videos[row["step"]] = {"file": file, "motion": row["motion"], "flicker": row["flicker"]}
    newest = sorted(rows, key=lambda key: (-max(rows[key]["videos"]), key))
    steps = sorted({step for row in rows.values() for step in row["videos"]})
    return {"steps": steps, "rows": [rows[key] for key in newest]}


def facts(config: Mapping[str, Any], folder: RunFolder) -> list[tuple[str, str]]:
    """What a person wants to know of a run before its curves."""
    adapter = config.get("adapter", {})
    name = str(adapter.get("name", "none"))
    rank = f" rank {adapter['rank']}" if adapter.get("rank") else ""
    found = [
        ("model", config.get("model", {}).get("name")),
        ("expert", str(config.get("expert", {}).get("name", "")).replace("_", " ")),
        ("trains", "all weights" if name == "none" else f"{name}{rank}"),
        ("learning rate", number(config.get("optimizer", {}).get("lr"))),
        ("batch", f"{tokens} tokens" if (tokens := config.get("batch_tokens")) else config.get("batch_size")),
        ("precision", config.get("precision")),
        ("data", config.get("data", {}).get("shards") or ", ".join(config.get("data", {}).get("sets") or ())),
    ]
    if started := starts(folder):
        last = started[-1]
        processes = "1 process" if last["processes"] == 1 else f"{last['processes']} processes"
        found.append(("runs on", f"{last['device']}, {last['engine']}, {processes}"))
    return [(key, str(value)) for key, value in found if value not in (None, "")]


def complete_checkpoints(folder: RunFolder) -> list[Path]:
    """The folders of a run's checkpoints, by step."""
    return sorted(Checkpoints(folder.checkpoints, keep=1).complete(), key=lambda path: path.name)


def starts(folder: RunFolder) -> list[dict[str, Any]]:
    """Each start of a run: when, where and with which words."""
    if not folder.record.is_file():
        return []
    kept = ("at", "command", "device", "engine", "processes", "made_by")
    found = json.loads(folder.record.read_text(encoding="utf-8")).get("starts", [])
    return [{key: start.get(key, "") for key in kept} for start in found]


def read_yaml(path: Path) -> dict[str, Any]:
    """A stored config as plain data; empty where there is none."""
    found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return found if isinstance(found, dict) else {}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; none where it is absent."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def rounded(value: float | None) -> float | None:
    """Five significant digits, for a page."""
    return None if value is None else float(f"{value:.5g}")


def rounded_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data with its numbers rounded."""
    kept: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            kept[key] = rounded_row(value)
        else:
            kept[key] = rounded(value) if isinstance(value, float) else value
    return kept


def number(value: Any) -> str:
    """A learning rate as people write it."""
    return f"{value:g}" if isinstance(value, int | float) else ""


class Pictures:
    """Filmstrips of clips as data URIs, each made once."""

    def __init__(self, find: FindClip | None, data_uri: Callable[[bytes], str]) -> None:
        self.find, self.data_uri = find, data_uri
        self.made: dict[str, dict[str, str] | None] = {}

    def of(self, names: Sequence[str], most_new: int) -> dict[str, dict[str, str]]:
        """The first PICTURES of the clips `names` that can be shown, of which at most `most_new` are made now."""
        found: dict[str, dict[str, str]] = {}
        new = 0
        for name in dict.fromkeys(names):
            if len(found) == PICTURES:
                break
            if name not in self.made:
                if new == most_new:
                    continue
                self.made[name] = self._make(name)
                new += 1
            if (view := self.made[name]) is not None:
                found[name] = view
        return found

    def _make(self, name: str) -> dict[str, str] | None:
        if self.find is None:
            return None
        try:
            view = self.find(name)
        except ValueError:  # a damaged clip: training names it
            return None
        if view is None:
            return None
        return {"strip": self.data_uri(view.strip), "caption": view.caption, "bucket": view.bucket}
