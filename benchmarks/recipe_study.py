"""Questions about recipes, asked in small: python benchmarks/recipe_study.py [--only NAME,...] [--draw]

A LoRA for both experts of wan-tiny learns the demo's new object, the wug, from other footage with each seed. One
setting at a time differs from BASE: the shift of the low-noise expert, the share of stills, the rank, the batch. Each
run is measured on clips that no run trained on, at noise levels that are the same for all, and by the judge of pixels
on samples of the same prompts and seeds. A setting is compared with BASE seed by seed.

--only NAME,...  runs of these settings alone
--draw           no runs: only the table and the picture from what was measured

Each run is written to recipe_study.json beside this file when it ends; a start goes on with what is missing. The
picture is docs/images/recipe_study.png, the table is printed in Markdown. Footage and runs lie in runs/recipe_study.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
import torch
from quantize import ROOT, WEIGHTS, command
from scipy import stats
from torch import Tensor

from wantrain import geometry
from wantrain.batch import Batch
from wantrain.data import LatentData
from wantrain.demo.footage import make_footage
from wantrain.demo.judge import judge, scores, spared_scenes, wug_scenes
from wantrain.losses.flow_matching import velocity_error
from wantrain.models import Base, WanTransformer
from wantrain.runs.experts import find_experts
from wantrain.sampling import Sampler, Settings
from wantrain.sampling.build import build_sampler
from wantrain.util import distributed
from wantrain.util.files import write_json
from wantrain.util.seeds import generator_at

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

OUT, FOLDER = Path(__file__).with_suffix(".json"), ROOT / "runs" / "recipe_study"
PICTURE = ROOT / "docs" / "images" / "recipe_study.png"
SEEDS, BOUNDARY, BUCKET = (0, 1, 2), 0.875, geometry.Bucket(17, 64, 64)
#: Samples that one expert trains on in every run, so that all see equally many.
SAMPLES = 1024
#: Footage of a seed, and that which all runs are measured on: (scenes, clips, stills, seed).
TRAINED = {"clips": ("wug", 24, 0, 100), "stills": ("wug", 0, 24, 200), "plain": ("plain", 24, 0, 300)}
MEASURED = {"wug": ("wug", 16, 0, 900), "plain": ("plain", 16, 0, 901)}
#: Noise levels of the measurement by the part of the noise that they stand for.
LEVELS = {
    "below 0.3": (0.05, 0.1, 0.15, 0.2, 0.25),
    "0.3 to 0.875": (0.35, 0.45, 0.55, 0.65, 0.75, 0.85),
    "above 0.875": (0.9, 0.93, 0.96, 0.99),
}
#: Prompts that the judge's samples are of.
WUGS, OTHERS = wug_scenes(20), spared_scenes(20)
BASE = "base"
DEFAULTS = {"shift": "3", "stills": "0", "rank": "16", "batch": "8"}
#: Settings by name: what differs from DEFAULTS.
CHOICES: dict[str, dict[str, str]] = {
    BASE: {},
    "shift 1": {"shift": "1"},
    "shift 12": {"shift": "12"},
    "stills 50 %": {"stills": "0.5"},
    "stills 100 %": {"stills": "1"},
    "rank 2": {"rank": "2"},
    "rank 64": {"rank": "64"},
    "batch 2": {"batch": "2"},
    "batch 32": {"batch": "32"},
}
#: Questions: the settings that answer each, in order, and what BASE is among them.
QUESTIONS: dict[str, dict[str, str]] = {
    "shift of the low-noise expert": {"shift 1": "1", BASE: "3", "shift 12": "12"},
    "share of stills among the wugs": {BASE: "0 %", "stills 50 %": "50 %", "stills 100 %": "100 %"},
    "rank": {"rank 2": "2", BASE: "16", "rank 64": "64"},
    "batch, for as many samples": {"batch 2": "2", BASE: "8", "batch 32": "32"},
}
#: What the judge tells of a run, in the table's words.
JUDGED = {"wug": "wugs", "wug_colours": "its colours", "wug_direction": "direction", "others": "others right"}
#: What of that is compared with BASE in the table.
COMPARED = ("wug", "wug_colours", "others")


def main() -> None:
    """Train and measure what is missing, then the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CHOICES))
    parser.add_argument("--draw", action="store_true")
    options = parser.parse_args()
    distributed.set_threads()
    result: dict[str, Any] = json.loads(OUT.read_text(encoding="utf-8")) if OUT.is_file() else {"runs": {}}
    result |= {"samples": SAMPLES, "seeds": list(SEEDS), "levels": LEVELS, "torch": torch.__version__}
    for seed in () if options.draw else SEEDS:
        for name in options.only.split(","):
            if f"{name}, seed {seed}" not in result["runs"]:
                result["runs"][f"{name}, seed {seed}"] = found = run(name, seed)
                write_json(OUT, result)
                told = ", ".join(f"{what} {found[what]:.0%}" for what in JUDGED)
                print(f"{name}, seed {seed}: {told}, {found['seconds']:.0f} s", flush=True)
    print("\n" + table(result["runs"]))
    draw(result["runs"])


def run(name: str, seed: int) -> dict[str, Any]:
    """One LoRA of both experts, measured and judged."""
    began, own = time.perf_counter(), DEFAULTS | CHOICES[name]
    run_name = f"{name.replace(' %', '').replace(' ', '_')}_{seed}"
    shutil.rmtree(FOLDER / "runs" / run_name, ignore_errors=True)  # of a start that was killed
    steps = SAMPLES // int(own["batch"])
    given = [f"run={run_name}", f"seed={seed}", f"steps={2 * steps}", f"batch_size={own['batch']}", WEIGHTS]
    given += ["expert=both", "adapter=lora", f"adapter.rank={own['rank']}", f"adapter.alpha={own['rank']}"]
    given += [f"experts.low_noise.shift={own['shift']}", "optimizer.lr=5e-3", "schedule.floor=0.02"]
    given += ["data=mixed", f"data.sets={sets(float(own['stills']), seed)}", "data.holdout=0", "validation.every=0"]
    given += ["check_expert=off", f"checkpoint.every={2 * steps}", "checkpoint.keep=1", "tracker=jsonl"]
    command(FOLDER, "train.py", *given)
    trained = time.perf_counter()
    found = find_experts(
        ["high_noise", "low_noise"], model="tiny", boundary=BOUNDARY, run=run_name, runs=FOLDER / "runs", base=None,
        locate=lambda path: ROOT / path,
    )  # fmt: skip
    experts = {each: found.load(each) for each in found.names}
    losses = {what: measure(experts, what) for what in MEASURED}
    sampler = build_sampler(experts, boundary=BOUNDARY, base=Base(ROOT / "assets/wan-tiny"))
    return {
        **judged(sampler),
        "losses": losses,
        "training_seconds": trained - began,
        "seconds": time.perf_counter() - began,
    }


def sets(stills: float, seed: int) -> str:
    """The sets of a run: half of its samples show wugs, and of these a share are stills."""
    shares = {"clips": 0.5 * (1 - stills), "stills": 0.5 * stills, "plain": 0.5}
    own = []
    for name, (scenes, clips, images, first) in TRAINED.items():
        if shares[name]:
            place = latents(f"{name}_{seed}", (scenes, clips, images, first + seed))
            own.append(f"{name}: {{shards: {place}, weight: {shares[name]}}}")
    return "{" + ", ".join(own) + "}"


def latents(name: str, footage: tuple[str, int, int, int]) -> Path:
    """The latent shards of some footage, made if they are not there."""
    folder, (scenes, clips, stills, seed) = FOLDER / name, footage
    if not (folder / "latents" / "manifest.json").is_file():
        make_footage(folder / "footage", scenes=scenes, num_videos=clips, num_images=stills, seed=seed)
        command(FOLDER, "shard.py", f"source={folder / 'footage'}", f"out={folder / 'videos'}")
        command(FOLDER, "encode.py", f"shards={folder / 'videos'}", f"out={folder / 'latents'}", WEIGHTS)
    return folder / "latents"


@torch.no_grad()
def measure(experts: dict[str, WanTransformer], what: str) -> dict[str, float]:
    """The mean velocity error by part of the noise, with the same clips and noises for every run."""
    found: dict[str, list[float]] = {part: [] for part in LEVELS}
    data = LatentData(shards=latents(f"measured_{what}", MEASURED[what]), holdout=0.0)
    clips = sorted(
        (batch.take([number]) for batch in data.train_batches(len(data.train)) for number in range(len(batch))),
        key=lambda clip: clip.ids,
    )
    for clip in clips:
        for part, levels in LEVELS.items():
            expert = experts["high_noise" if min(levels) >= BOUNDARY else "low_noise"]
            found[part].append(errors(expert, clip, levels).mean().item())
    return {part: round(mean(errors_of_clips), 6) for part, errors_of_clips in found.items()}


def errors(expert: WanTransformer, clip: Batch, levels: Sequence[float]) -> Tensor:
    """The velocity error of a clip at each level, with noise by the clip's name."""
    sigma, shape = torch.tensor(levels, dtype=torch.float64), clip.latents_BCTHW.shape[1:]
    keys = [generator_at("study", clip.ids[0], at) for at in levels]  # type: ignore[arg-type]
    noise = torch.stack([torch.randn(shape, generator=key) for key in keys])
    return velocity_error(expert, clip.take([0] * len(levels)), sigma, noise)


def judged(sampler: Sampler) -> dict[str, float]:
    """What samples show. Of prompts for a wug: the share of wugs, of its two colours, of the directions asked for; of
    the others the mean score of colour, shape and direction.
    """
    prompts, clips = [scene.caption(language) for scene, language in [*WUGS, *OTHERS]], []
    settings = Settings({"high_noise": 2.0, "low_noise": 2.0}, 3.0, steps=10)
    for first in range(0, len(prompts), 20):
        some = prompts[first : first + 20]
        clips += sampler.batch(some, bucket=BUCKET, settings=settings, seeds=list(range(first, first + len(some))))
    verdicts = [judge(clip) for clip in clips]
    wugs, others = verdicts[: len(WUGS)], verdicts[len(WUGS) :]
    of_others = scores(others, [scene for scene, _ in OTHERS])
    return {
        "wug": mean(float(verdict.shape == "wug") for verdict in wugs),
        "wug_colours": mean(float(verdict.colour == "wug") for verdict in wugs),
        "wug_direction": scores(wugs, [scene for scene, _ in WUGS])["direction"],
        "others": mean(of_others[each] for each in ("colour", "shape", "direction")),
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean of one value per seed, and half of its 95 % interval by Student's t; NaN with fewer than two."""
    if len(values) < 2:
        return mean(values), math.nan
    return mean(values), float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def of_seeds(runs: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The runs of a setting, by seed."""
    return [found for seed in SEEDS if (found := runs.get(f"{name}, seed {seed}"))]


def against_base(runs: dict[str, Any], name: str, what: str) -> tuple[float, float]:
    """How far a judged share is from BASE's with the same seed, over seeds; at least one prompt either way."""
    pairs = zip(of_seeds(runs, name), of_seeds(runs, BASE), strict=False)
    middle, reach = interval([found[what] - base[what] for found, base in pairs])
    return middle, max(reach, 1 / len(WUGS))


def loss_against_base(runs: dict[str, Any], name: str, what: str, part: str) -> tuple[float, float]:
    """The relative difference of a loss from BASE's on the same clips, with the same seed, over seeds."""
    pairs = zip(of_seeds(runs, name), of_seeds(runs, BASE), strict=False)
    return interval([found["losses"][what][part] / base["losses"][what][part] - 1 for found, base in pairs])


def table(runs: dict[str, Any]) -> str:
    """Every setting's wugs by seed, and what differs from BASE with the same seed, with intervals, in Markdown."""
    parts = [("wug", part) for part in LEVELS] + [("plain", "0.3 to 0.875")]
    heads = ["wugs, by seed", *(f"{JUDGED[what]}, points" for what in COMPARED)]
    heads += [f"loss of {'others' if what == 'plain' else 'wugs'}, {part}" for what, part in parts]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name in CHOICES:
        cells = [", ".join(f"{100 * found['wug']:.0f}" for found in of_seeds(runs, name)) + " %"]
        if name == BASE:
            cells += ["–"] * (len(heads) - 1)
        else:
            cells += [shown(*against_base(runs, name, what)) for what in COMPARED]
            cells += [shown(*loss_against_base(runs, name, *each), unit=" %") for each in parts]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown(middle: float, reach: float, *, unit: str = "") -> str:
    """A difference in hundredths with its interval; bold where the interval leaves out 0."""
    told = f"{middle * 100:+.0f} ± {reach * 100:.0f}{unit}".replace("-", "−")
    return f"**{told}**" if abs(middle) > reach else told


def draw(runs: dict[str, Any]) -> None:
    """One column per question: what the judge sees above, the losses beside BASE's below."""
    asked = {title: [name for name in names if of_seeds(runs, name)] for title, names in QUESTIONS.items()}
    figure, axes = plt.subplots(2, len(asked), figsize=(3.6 * len(asked), 6.4), squeeze=False, sharey="row")
    for column, (title, names) in enumerate(asked.items()):
        for place, (what, label) in enumerate(JUDGED.items()):
            levels = [[100 * found[what] for found in of_seeds(runs, name)] for name in names]
            series(axes[0][column], [(mean(seeds), 0.0) for seeds in levels], label, place, levels)
        for place, part in enumerate(LEVELS):
            found = [(0.0, 0.0) if name == BASE else loss_against_base(runs, name, "wug", part) for name in names]
            found = [(100 * middle, 100 * reach) for middle, reach in found]
            series(axes[1][column], found, f"sigma {part}", place)
        axes[0][column].set_title(title, fontsize=10)
        for axis in axes[:, column]:
            axis.set_xticks(range(len(names)), [QUESTIONS[title][name] for name in names])
            axis.grid(axis="y", alpha=0.3)
        axes[1][column].axhline(0, color="gray", linewidth=0.8)
    axes[0][0].set(ylabel="samples, % (small: one seed)", ylim=(-5, 107))
    axes[1][0].set_ylabel("loss on held-out wugs beside the base's, %")
    for row in axes:
        row[0].legend(fontsize=7)
    figure.tight_layout()
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=110)
    plt.close(figure)


def series(
    axis: Axes,
    found: Sequence[tuple[float, float]],
    label: str,
    place: int,
    seeds: Sequence[Sequence[float]] = (),
) -> None:
    """Means with their intervals, and single seeds, moved aside so that series do not cover each other."""
    where = [number + (place - 1.5) / 12 for number in range(len(found))]
    middle, reach = zip(*found, strict=True)
    colour = f"C{place}"
    axis.errorbar(where, middle, yerr=reach, fmt="o-", color=colour, linewidth=0.8, capsize=3, label=label)
    for x, values in zip(where, seeds, strict=False):
        axis.plot([x] * len(values), values, "o", color=colour, markersize=2.5, alpha=0.6)


if __name__ == "__main__":
    main()
