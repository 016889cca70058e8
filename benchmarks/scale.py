"""A run on 1,024 cards and 100 million clips, on paper: python benchmarks/scale.py [key=value ...] [--out FOLDER]

The product's own code is driven without cards, weights or data: its samplers for all clips and processes, its planner
for memory, operations and seconds, its writer of tars, its cuts into shards, its cache. What that code does not know is
assumed: one block, benchmarks/scale_parts/assumptions.py, each value a key that can be given. Nothing is measured on a
cluster.

Without keys it writes scale.json beside this file, docs/scale.md and its pictures. With keys, or --out, it writes
scale.json, scale.md and the pictures into a folder, runs/scale if none is given. It takes about two minutes and 3 GB.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scale_parts import assumptions, charts, costs, failures, order, page, storage
from scale_parts.cluster import Cluster

from wantrain.util.console import errors_to_exit_code, say
from wantrain.util.files import write_atomically, write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS, DOCS = Path(__file__).with_suffix(".json"), ROOT / "docs"
#: The clip of the full fine-tune.
FULL = "81x480x832"


def simulate(taken: assumptions.Assumptions, *, said: Callable[[str], None] = say) -> dict[str, Any]:
    """All results, as JSON takes them."""
    cluster = Cluster(taken)
    said("order")
    whole = order.whole_order(taken)
    said("balance")
    balanced = order.balance(taken, cluster, whole["shares"])
    said("storage")
    seconds = {bucket: step["compute"] for bucket, step in balanced["steps"].items()}
    stored = storage.storage(taken, seconds, whole["shares"])
    said("failures")
    full = cluster.step(FULL, 1)
    failed = failures.failures(taken, cluster.checkpoint, cluster.card, full)
    said("costs")
    spent = costs.costs(taken, full)
    found = {
        "assumptions": vars(taken),
        "order": whole,
        "balance": balanced,
        "storage": stored,
        "failures": failed,
        "costs": spent,
    }
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def main() -> None:
    """Simulate, write results, page and pictures."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("words", nargs="*", metavar="key=value", help="an assumption other than its default")
    asked.add_argument("--out", type=Path, help="a folder for results, page and pictures")
    given = asked.parse_args()
    with errors_to_exit_code():
        taken, began = assumptions.read(given.words), time.perf_counter()
        folder = given.out or (ROOT / "runs" / "scale" if given.words else None)
        results = simulate(taken)
        pages = DOCS if folder is None else folder
        pages.mkdir(parents=True, exist_ok=True)
        write_json(RESULTS if folder is None else folder / "scale.json", results)
        charts.draw(results, pages / "images")
        write_atomically(pages / "scale.md", page.page(results, words=given.words))
        say(f"{pages / 'scale.md'} after {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
