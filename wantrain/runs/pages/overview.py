"""runs/index.html: all runs of a folder in one table, and their curves over each other.

It is made from the data inside the runs' own pages, so that no log is read again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from wantrain import page
from wantrain.util.files import write_atomically

INDEX = "index.html"
#: Runs that are compared, the newest; points of a run's curve.
RUNS, POINTS = 60, 400


def write_overview(runs: Path) -> Path:
    """Write the page of all runs in the folder `runs`."""
    found = sorted(summaries(runs), key=lambda run: -run["updated"])[:RUNS]
    data = {"folder": runs.name, "runs": found}
    path = runs / INDEX
    write_atomically(path, page.render("runs", f"Runs in {runs.name}", data=data), sync=False)
    return path


def summaries(runs: Path) -> Iterator[dict[str, Any]]:
    """What the overview shows of each run that has a page."""
    for path in sorted(runs.glob(f"*/{INDEX}")):
        with suppress(OSError, ValueError):  # it is being removed, or is no page of a run
            data = page.data_of(path.read_text(encoding="utf-8"))
            if data is not None and "of_run" in data:
                yield summary(path.parent.name, data)


def summary(name: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """One run: where it stands, its best validation, and curves of at most POINTS points."""
    stride = max(1, -(-len(data["x"]) // POINTS))
    curves: dict[str, Any] = {}
    for expert, own in data["of_expert"].items():
        curves[expert] = {
            "x": data["x"][::stride],
            "samples": data["of_run"]["samples"][::stride],
            "loss": means(own["loss"], stride),
            "grad_norm": means(own["grad_norm"], stride),
            "lr": own["lr"][::stride],
            "validation": [[row["step"], row.get("validation_loss")] for row in data["validation"].get(expert, [])],
        }
    kept = ("state", "step", "steps", "updated", "facts", "experts")
    best = {expert: best_of(rows) for expert, rows in data["validation"].items()}
    return {"name": name, **{key: data[key] for key in kept}, "curves": curves, "best": best}


def best_of(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The validation with the lowest loss, and the newest one's verdict."""
    measured = [row for row in rows if row.get("validation_loss") is not None]
    if not measured:
        return None
    lowest = min(measured, key=lambda row: row["validation_loss"])
    return {
        "step": lowest["step"],
        "loss": lowest["validation_loss"],
        "change": lowest.get("validation_change"),
        "verdict": lowest.get("validation_verdict"),
    }


def means(values: list[float | None], stride: int) -> list[float | None]:
    """Means of `stride` values in a row; None where there is none."""
    found = []
    for first in range(0, len(values), stride):
        some = [value for value in values[first : first + stride] if value is not None]
        found.append(float(f"{sum(some) / len(some):.5g}") if some else None)
    return found
