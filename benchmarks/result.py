"""The format of results, and the table of them: python benchmarks/result.py writes it into benchmarks/README.md

A benchmark that holds two sides against each other stores NAME.json beside NAME.py:

  name, date, command  what measured, when, and how it is run again
  machine              processor, cores, threads, the load before, the device
  versions             python and the libraries that took part
  protocol             how the sides were run, in words
  shapes               what was computed
  cases                by name: `errors` of the sides against each other, each {measured, allowed}, and `measures`, each
                       {unit, sides, result, goal, verdict}
  more                 what is no comparison; absent if there is nothing

A measure has the values of each side, one for each pair. Its result is the first side over the second, pair by pair; of
one side alone it is that side's values. Where an error is above what is allowed, the sides did not compute the same:
every verdict of the case is "void", whatever was measured.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE / "README.md"
#: The lines of the page between which the table stands.
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
HEAD = ("name", "date", "command", "machine", "versions", "protocol", "shapes", "cases")


def measure(
    unit: str,
    sides: Mapping[str, Sequence[float]],
    *,
    at_most: float | None = None,
    at_least: float | None = None,
) -> dict[str, Any]:
    """One quantity: `sides` has the values of one side or of two, of each as many as there were pairs.

    at_most, at_least  the goal for the median of the result; at most one of them
    """
    assert 1 <= len(sides) <= 2 and (at_most is None or at_least is None)
    values = [list(own) for own in sides.values()]
    results = values[0] if len(values) == 1 else [mine / other for mine, other in zip(*values, strict=True)]
    result = {"median": statistics.median(results), "least": min(results), "most": max(results), "count": len(results)}
    goal = {name: bound for name, bound in (("at_most", at_most), ("at_least", at_least)) if bound is not None}
    return {
        "unit": unit,
        "sides": dict(zip(sides, values, strict=True)),
        "result": result,
        "goal": goal,
        "verdict": verdict(result["median"], goal),
    }


def verdict(median: float, goal: Mapping[str, float]) -> str:
    """Whether a result meets its goal."""
    if not goal:
        return "no goal"
    met = median <= goal["at_most"] if "at_most" in goal else median >= goal["at_least"]
    return "met" if met else "missed"


def case(
    measures: Mapping[str, dict[str, Any]], errors: Mapping[str, tuple[float, float]] | None = None
) -> dict[str, Any]:
    """A comparison: its measures, and by name how far apart the sides are and may be (measured, allowed)."""
    found = {name: {"measured": error, "allowed": allowed} for name, (error, allowed) in (errors or {}).items()}
    void = any(not row["measured"] <= row["allowed"] for row in found.values())  # NaN too
    own = {name: {**row, "verdict": "void"} if void else row for name, row in measures.items()}
    return {"errors": found, "measures": own}


def record(
    script: str,
    *,
    protocol: str,
    shapes: Mapping[str, Any],
    cases: Mapping[str, dict[str, Any]],
    libraries: Iterable[str] = ("torch",),
    threads: int | None = None,
    device: str = "cpu",
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What is stored of a benchmark: `script` is its __file__, `libraries` are distributions that took part."""
    name = Path(script).stem
    return {
        "name": name,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "command": shlex.join(["python", f"benchmarks/{name}.py", *sys.argv[1:]]),
        "machine": machine(threads=threads, device=device),
        "versions": versions(libraries),
        "protocol": " ".join(protocol.split()),
        "shapes": dict(shapes),
        "cases": dict(cases),
        **({"more": dict(more)} if more else {}),
    }


def machine(*, threads: int | None = None, device: str = "cpu") -> dict[str, Any]:
    """What was measured on: processor, cores, threads of the computation (None: one per core), load, device."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "processor": model or platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads or os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "device": device,
    }


def versions(libraries: Iterable[str]) -> dict[str, str | None]:
    """Versions of python and of distributions; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in libraries:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def shown(found: Mapping[str, Any]) -> Iterator[str]:
    """A line for each measure of a record, as it is printed."""
    for name, own in found["cases"].items():
        for quantity, row in own["measures"].items():
            yield f"{name}, {quantity}: {_result(row)}, goal {_goal(row)}: {row['verdict']}"


def records() -> dict[str, dict[str, Any]]:
    """The stored results that have this format, by name."""
    read = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(HERE.glob("*.json"))}
    return {name: found for name, found in read.items() if found.keys() >= set(HEAD)}


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows of all results."""
    lines = ["| Script | Case | Measured | Result | Goal | Verdict |", "|---|---|---|---|---|---|"]
    for name, one in found.items():
        for title, own in one["cases"].items():
            for quantity, row in own["measures"].items():
                of = " / ".join(row["sides"]) if len(row["sides"]) == 2 else row["unit"]
                cells = (f"[{name}]({name}.json)", title, f"{quantity}, {of}", _result(row), _goal(row), _said(row))
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _result(row: Mapping[str, Any]) -> str:
    result = row["result"]
    spread = f" ({result['least']:.3g} to {result['most']:.3g}, {result['count']})" if result["count"] > 1 else ""
    return f"{result['median']:.4g}{spread}"


def _goal(row: Mapping[str, Any]) -> str:
    goal = row["goal"]
    return next((f"{name.replace('_', ' ')} {bound:g}" for name, bound in goal.items()), "–")


def _said(row: Mapping[str, Any]) -> str:
    verdict: str = row["verdict"]
    return {"no goal": "–", "met": "met"}.get(verdict, f"**{verdict}**")


def with_table(page: str) -> str:
    """The text of the page with the table of what is stored."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert rest and after, f"{PAGE} has no {BEGIN} and {END}"
    return f"{before}{BEGIN}\n\n{table(records())}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
