"""What a run really learns from, written into its folder before it starts: noise.json and noise.png.

The effective density of noise levels is p(sigma) * w(sigma) inside the expert's window: what is drawn, times what it
weighs in the loss.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from wantrain import flow, geometry
from wantrain.losses import FlowMatching
from wantrain.losses.noise import NoiseDistribution
from wantrain.util import distributed
from wantrain.util.files import write_json

#: Slices of an expert's window.
BINS = 64
#: Noise levels per slice at which the weight is looked at.
LEVELS = 16


def describe(noise: NoiseDistribution, shift: float) -> dict[str, Any]:
    """One distribution as plain data: its shift, the edges of BINS slices of the window, and for each slice the
    density of the draws, their mean weight, and the effective density, which like the first integrates to 1.
    """
    distribution: dict[str, Any] = {"density": noise.density, "shift": shift, "window": noise.window}
    edges = noise.window.bin_edges(BINS)
    below = flow.sigma_cdf(edges, **distribution)
    mass, width = below.diff(), edges.diff()
    inside = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
    sigma = flow.sigma_quantiles(below[:-1, None] + mass[:, None] * inside, **distribution)
    weight = noise.weight(sigma).double().mean(dim=1)
    effective = mass * weight / (mass * weight).sum()
    return {
        "shift": shift,
        "share_of_all_noise": flow.window_mass(**distribution),
        "mean_weight": (mass * weight).sum().item(),
        "sigma": edges.tolist(),
        "density": (mass / width).tolist(),
        "weight": weight.tolist(),
        "effective_density": (effective / width).tolist(),
    }


def write(folder: Path, losses: Mapping[str, Any], buckets: Iterable[str], settings: Mapping[str, Any]) -> None:
    """Write the effective density of every velocity loss, by expert, into a run folder, with what else the settings say
    about what is learned from: masks and dropped captions. Main process only.

    `buckets` are the sizes of the run's clips ("17x64x64"): where the shift goes by tokens there is one distribution
    for each number of them. Sets with noise of their own have theirs. ValueError if the folder holds another run's
    distributions.
    """
    velocity = {name: loss.core for name, loss in losses.items() if isinstance(loss.core, FlowMatching)}
    if not velocity or not distributed.is_main():
        return
    sizes = {_tokens(bucket, settings["model"]["multiple"]) for bucket in set(buckets)}
    report = {}
    for name, loss in velocity.items():
        sets = {
            of_set: {"window": [noise.window.low, noise.window.high], "distributions": _distributions(noise, sizes)}
            for of_set, noise in loss.noise_of_sets.items()
        }
        report[name] = {
            "window": [loss.noise.window.low, loss.noise.window.high],
            "distance": _distance(loss),
            "stratified": loss.stratified,
            "distributions": _distributions(loss.noise, sizes),
            **({"sets": sets} if sets else {}),
            "loss_mask": vars(loss.masks),
            "caption_dropout": _dropout(settings["data"]),
        }
    _refuse_another(folder / "noise.json", report)
    write_json(folder / "noise.json", report)
    _draw(folder / "noise.png", report)


def _tokens(bucket: str, multiple: int) -> int:
    """Tokens of a sample of a bucket, by the transformer's own count."""
    frames, height, width = (int(part) for part in bucket.split("x"))
    return geometry.latent_frames(frames) * (height // multiple) * (width // multiple)


def _distributions(noise: NoiseDistribution, sizes: Iterable[int]) -> list[dict[str, Any]]:
    """The distribution; several, each with its number of tokens, where the shift goes by them."""
    shifts = {noise.shift_for(tokens): tokens for tokens in sorted(sizes)}
    found = [describe(noise, shift) for shift in shifts]
    if len(found) == 1:
        return found
    return [{"tokens": tokens, **each} for tokens, each in zip(shifts.values(), found, strict=True)]


def _dropout(data: Mapping[str, Any]) -> dict[str, Any]:
    """The share of dropped captions, or its points by step, of all data and of sets with one of their own."""
    own = {name: one["caption_dropout"] for name, one in (data.get("sets") or {}).items() if "caption_dropout" in one}
    return {"all": data.get("caption_dropout"), **own}


def _distance(loss: FlowMatching) -> str:
    return "squared" if loss.huber is None else f"huber {loss.huber}"


def _refuse_another(path: Path, report: Mapping[str, Any]) -> None:
    """Raise ValueError if a run would resume under another distribution, because a table's file was changed."""
    if not path.is_file():
        return
    for name, before in json.loads(path.read_text(encoding="utf-8")).items():
        old, new = (torch.tensor(_curves(expert), dtype=torch.float64) for expert in (before, report.get(name, before)))
        if old.shape != new.shape or not torch.allclose(old, new, rtol=1e-6, atol=1e-9):
            raise ValueError(
                f"{path}: {name} was trained on another distribution of noise than the config gives now (a changed "
                "noise.density.file?); put it back, or give the new run its own name (run=NAME)"
            )


def _curves(expert: Mapping[str, Any]) -> list[list[float]]:
    """The effective densities of an expert, then of its sets."""
    reports = [expert, *(own for _, own in sorted(expert.get("sets", {}).items()))]
    return [distribution["effective_density"] for report in reports for distribution in report["distributions"]]


def _draw(path: Path, report: Mapping[str, Any]) -> None:
    """A small plot: what is drawn as a thin line, what is learned from as a filled one."""
    from matplotlib.figure import Figure  # slow to import, and only the main process draws

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    curves = [(name, distribution) for name, expert in report.items() for distribution in expert["distributions"]]
    for name, expert in report.items():
        own = expert.get("sets", {}).items()
        curves += [(f"{name}, {of_set}", each) for of_set, found in own for each in found["distributions"]]
    for number, (name, distribution) in enumerate(curves):
        label = f"{name}, shift {distribution['shift']:.3g}" + (
            f" ({distribution['tokens']} tokens)" if "tokens" in distribution else ""
        )
        axes.stairs(
            distribution["effective_density"],
            distribution["sigma"],
            fill=True,
            alpha=0.3,
            color=f"C{number}",
            label=label,
        )
        axes.stairs(distribution["density"], distribution["sigma"], color=f"C{number}", linewidth=0.8)
    axes.set(xlim=(0, 1), ylim=(0, None), xlabel="sigma (0 clean, 1 noise)", ylabel="density")
    axes.set_title("noise levels: drawn (line), learned from (filled)", fontsize="medium")
    axes.legend(fontsize="small", frameon=False)
    figure.savefig(path, dpi=100)
