"""The report's pictures, as SVG with the same bytes for the same results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "scale",
    "font.size": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
}
#: checkpoint.every of conf/train.yaml.
DEFAULT = 100
NAMES = ("scale_steps.svg", "scale_storage.svg", "scale_failures.svg")


def draw(results: Mapping[str, Any], folder: Path) -> None:
    """Write all pictures into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in zip(NAMES, (_steps, _storage, _failures), strict=True):
        with plt.rc_context(STYLE):
            figure = picture(results)
            figure.tight_layout()
            figure.savefig(folder / name, metadata={"Date": None}, facecolor="white")
            plt.close(figure)


def _steps(results: Mapping[str, Any]) -> Figure:
    """Seconds of a step by bucket: computation and exchange."""
    steps = sorted(results["balance"]["steps"].values(), key=lambda step: step["tokens"])
    figure, axis = plt.subplots(figsize=(8, 3.6))
    names = [step["bucket"] for step in steps]
    axis.bar(names, [step["compute"] for step in steps], label="computation")
    axis.bar(
        names,
        [step["exchange"] for step in steps],
        bottom=[step["compute"] for step in steps],
        label="exchange, if none is hidden",
    )
    axis.set(ylabel="seconds of a step (calculated)", title="One clip for each card")
    axis.set_xticks(range(len(names)), names, rotation=35, ha="right")
    axis.grid(axis="x", visible=False)
    axis.legend()
    return figure


def _storage(results: Mapping[str, Any]) -> Figure:
    """Bytes fetched over bytes read by the part of the set that a node's cache holds."""
    seen = results["storage"]["cache"]
    figure, axis = plt.subplots(figsize=(6, 3.4))
    held = [row["held"] for row in seen]
    shard = seen[0]["expected"] / (1 - seen[0]["held"])
    axis.plot([0, 1], [shard, 0], "-", label="(1 − part) × clips of a shard")
    axis.plot(held, [row["amplification"] for row in seen], "o", label="the cache at work")
    axis.set(
        xlabel="part of the set that the node's cache holds",
        ylabel="bytes fetched / bytes read",
        title=f"Shards of {shard:g} clips, read in the run's order",
        ylim=(0, None),
    )
    axis.legend()
    return figure


def _failures(results: Mapping[str, Any]) -> Figure:
    """Goodput by interval, with what the equations say."""
    found = results["failures"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    for axis, kind in zip(axes, ("background", "waiting"), strict=True):
        for place, name in enumerate(("rare", "frequent")):
            _curve(axis, found["curves"][f"{name}, {kind}"], f"C{place}", name)
        axis.axvline(DEFAULT, color="gray", linestyle=":", linewidth=0.8, label=f"the default, {DEFAULT}")
        axis.set_xscale("log")
        axis.set(xlabel="steps between checkpoints", title=f"checkpoint.background={str(kind == 'background').lower()}")
        axis.legend(fontsize=8, loc="lower left")
    axes[0].set(ylabel="goodput (simulated)", ylim=(0.85, 1.0))
    return figure


def _curve(axis: Axes, curve: Mapping[str, Any], colour: str, name: str) -> None:
    label = f"{name}: every {curve['hours_between']:.0f} h"
    axis.plot(curve["steps"], curve["goodput"], ".-", color=colour, linewidth=1, label=label)
    axis.axvline(max(1, curve["daly"]), color=colour, linestyle="--", linewidth=0.8, label="Daly's interval")
