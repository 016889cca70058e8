"""What preserve= and loss=preference do to wan-tiny: python benchmarks/keeping.py [--only preserving|preference]

preserving  a LoRA on wugs alone, with and without the base's answers under class prompts, three seeds: the share of
            wugs among samples that should show one, and the judge's score of what wan-tiny knew, after each STEPS
preference  prompts that leave the direction open; pairs by the judge, of which the better one moves left. The share
            that moves left, on prompts in no pair, and the score of prompts that name a direction; three seeds. And
            a run that is made to unlearn, which a safeguard has to end
The low-noise expert trains on all noise and samples alone. Prints tables in Markdown and writes keeping.json beside
this file; what was not measured is kept in it. Intervals are of 95 %, over samples, paired by prompt and seed.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from quantize import ROOT, WEIGHTS, command

from wantrain.demo.footage import make_footage
from wantrain.demo.judge import Verdict, judge, spared_scenes, wug_scenes
from wantrain.demo.vocabulary import VOCABULARIES
from wantrain.geometry import Bucket
from wantrain.models import Base, adapters
from wantrain.models.formats.lora import read_lora
from wantrain.sampling import Sampler, Settings
from wantrain.sampling.build import build_sampler
from wantrain.sampling.gallery import read_samples
from wantrain.util import distributed
from wantrain.util.files import write_json
from wantrain.video import read_mp4

SEEDS, STEPS = (0, 1, 2), (60, 120)
#: Solver steps: wan-tiny scores alike with 4 to 50.
SOLVER_STEPS, TOGETHER = 8, 16
SIZE = Bucket(17, 64, 64)
WANTED = "left"
WUGS, OTHERS = wug_scenes(20), spared_scenes(24)
PLAIN = VOCABULARIES["plain"]
#: Prompts without a direction: those of the pairs, and others.
OPEN = [f"a {colour} {shape} on a {ground} background"
        for ground in PLAIN.backgrounds for shape in PLAIN.shapes for colour in PLAIN.colours]  # fmt: skip
PAIRED, ASKED = OPEN[:30:2], OPEN[1::2]
TRAIN = ("expert=low_noise", "expert.high=1", "adapter=lora", "batch_size=4", "schedule=constant", "data.holdout=0",
         "validation.every=0", "tracker=jsonl", "check_expert=off", "checkpoint.keep=9", WEIGHTS)  # fmt: skip
PREFERENCE_STEPS = 100


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["preserving", "preference"])
    options = parser.parse_args()
    distributed.set_threads()
    path = Path(__file__).with_suffix(".json")
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name, measure in {"preserving": preserving, "preference": preference}.items():
        if options.only in (None, name):
            with tempfile.TemporaryDirectory() as scratch:
                results[name] = measure(Path(scratch))
            write_json(path, results)


def sampler_of(lora: Path | None) -> Sampler:
    """wan-tiny's low-noise expert for all noise, with a LoRA."""
    base = Base(ROOT / "assets" / "wan-tiny")
    expert = base.transformer("low_noise")
    if lora is not None:
        adapters.inject_lora(expert, read_lora(lora, expert="low_noise"), seed=0, where=lora)
    return build_sampler({"high_noise": expert, "low_noise": expert}, boundary=0.875, base=base)


def verdicts(sampler: Sampler, prompts: Sequence[str]) -> list[Verdict]:
    """What the judge sees in a sample of each prompt; the seed of each is its place."""
    settings = Settings({"high_noise": 2.0, "low_noise": 2.0}, 3.0, SOLVER_STEPS)
    clips = []
    for first in range(0, len(prompts), TOGETHER):
        some = prompts[first : first + TOGETHER]
        seeds = list(range(1000 + first, 1000 + first + len(some)))
        clips += sampler.batch(list(some), bucket=SIZE, settings=settings, seeds=seeds)
    return [judge(clip) for clip in clips]


def known(sampler: Sampler) -> list[float]:
    """The judge's score of each sample of what wan-tiny knew: the mean of colour, shape and direction."""
    found = verdicts(sampler, [scene.caption(language) for scene, language in OTHERS])
    return [mean(verdict.agrees(scene).values()) for verdict, (scene, _) in zip(found, OTHERS, strict=True)]


def adapter(folder: Path, run: str, step: int) -> Path:
    """The LoRA of a run at a step."""
    return folder / "runs" / run / "checkpoints" / f"step_{step:06d}" / "adapter.safetensors"


def interval(differences: Sequence[float]) -> list[float]:
    """Mean and both ends of its interval, in points."""
    middle, half = mean(differences), 1.96 * stdev(differences) / len(differences) ** 0.5
    return [round(100 * value, 1) for value in (middle, middle - half, middle + half)]


def preserving(folder: Path) -> dict[str, Any]:
    """A LoRA on wugs alone, with and without preserve=."""
    make_footage(folder / "footage", scenes="wug", num_videos=24, num_images=0)
    command(folder, "shard.py", f"source={folder / 'footage'}", f"out={folder / 'videos'}")
    command(folder, "encode.py", f"shards={folder / 'videos'}", f"out={folder / 'latents'}", WEIGHTS)
    (folder / "classes.txt").write_text("\n".join(scene_prompts()) + "\n", encoding="utf-8")
    ways = {"none": (), "preserve.weight=1": ("preserve.weight=1", f"preserve.prompts={folder / 'classes.txt'}")}
    wug_prompts, base = [scene.caption(language) for scene, language in WUGS], known(sampler_of(None))
    found: dict[str, Any] = {"known before": round(mean(base), 4), "rows": []}
    print("| | step | wugs, by seed | known, by seed | known, against the base |\n" + "|---" * 5 + "|", flush=True)
    for way, words in ways.items():
        for seed in SEEDS:
            given = (f"data.shards={folder / 'latents'}", f"run={len(words)}_{seed}", f"seed={seed}")
            more = (f"steps={STEPS[-1]}", f"checkpoint.every={STEPS[0]}", "optimizer.lr=2e-3")
            command(folder, "train.py", *TRAIN, *given, *more, *words)
        for step in STEPS:
            wugs, scores = [], []
            for seed in SEEDS:
                sampler = sampler_of(adapter(folder, f"{len(words)}_{seed}", step))
                wugs.append(mean(verdict.shape == "wug" for verdict in verdicts(sampler, wug_prompts)))
                scores.append(known(sampler))
            change = interval([after - before for own in scores for after, before in zip(own, base, strict=True)])
            row = {"way": way, "step": step, "wugs": wugs, "known": [round(mean(own), 4) for own in scores]}
            found["rows"].append({**row, "against the base": change})
            shares = " | ".join(", ".join(f"{value:.0%}" for value in row[key]) for key in ("wugs", "known"))  # type: ignore[attr-defined]
            print(f"| {way} | {step} | {shares} | {change[0]:+} ({change[1]:+} to {change[2]:+}) |", flush=True)
    return found


def scene_prompts() -> list[str]:
    """Class prompts: captions of plain shapes, none of which is judged."""
    judged = {scene.caption("en") for scene, _ in OTHERS}
    moves = ("left", "right", "up", "down")
    return [prompt for number, start in enumerate(OPEN) if (prompt := moving(start, moves[number % 4])) not in judged]


def moving(prompt: str, direction: str) -> str:
    """A prompt without a direction, with one."""
    thing, _, ground = prompt.partition(" on ")
    return f"{thing} moving {direction} on {ground}"


def preference(folder: Path) -> dict[str, Any]:
    """Pairs by the judge of which the winner moves left; and a run that only unlearns."""
    (folder / "prompts.txt").write_text("\n".join(PAIRED) + "\n", encoding="utf-8")
    size = ("num_frames=17", f"steps={SOLVER_STEPS}", "batch_size=16", "model=tiny")
    made = (f"prompts={folder / 'prompts.txt'}", f"pairs={folder / 'pairs'}", "count=5")
    command(folder, "sample.py", *made, *size, WEIGHTS)
    number = judged_pairs(folder / "pairs")
    command(folder, "shard.py", f"source={folder / 'pairs'}", f"out={folder / 'videos'}")
    command(folder, "encode.py", f"shards={folder / 'videos'}", f"out={folder / 'latents'}", WEIGHTS)
    base = sampler_of(None)
    before, known_before = wanted(base), known(base)
    found: dict[str, Any] = {
        "pairs": number,
        "wanted before": mean(before),
        "known before": mean(known_before),
        "rows": [],
    }
    print(f"{number} pairs\n\n| seed | moves {WANTED} | known |\n|---|---|---|", flush=True)
    print(f"| before | {mean(before):.0%} | {mean(known_before):.1%} |", flush=True)
    data = (f"data.shards={folder / 'latents'}", f"data.pairs={folder / 'pairs' / 'pairs.csv'}")
    gained, kept = [], []
    for seed in SEEDS:
        more = (
            f"steps={PREFERENCE_STEPS}",
            f"checkpoint.every={PREFERENCE_STEPS}",
            "optimizer.lr=1e-3",
            "loss.anchor=1",
        )
        run = ("loss=preference", "data=pairs", *data, f"run=dpo_{seed}", f"seed={seed}")
        command(folder, "train.py", *TRAIN, *run, *more)
        sampler = sampler_of(adapter(folder, f"dpo_{seed}", PREFERENCE_STEPS))
        after, known_after = wanted(sampler), known(sampler)
        gained += [b - a for a, b in zip(before, after, strict=True)]
        kept += [b - a for a, b in zip(known_before, known_after, strict=True)]
        log = [
            json.loads(line) for line in (folder / "runs" / f"dpo_{seed}" / "metrics.jsonl").read_text().splitlines()
        ]
        last = {key: mean(row[key] for row in log[-20:]) for key in ("margin", "preferred", "pull", "winner_change")}
        found["rows"].append({"seed": seed, "wanted": mean(after), "known": mean(known_after), **last})
        print(f"| {seed} | {mean(after):.0%} | {mean(known_after):.1%} |", flush=True)
    found |= {"gained": interval(gained), "known, against the base": interval(kept)}
    print(f"\nmoves {WANTED}: {found['gained']} points; known: {found['known, against the base']} points", flush=True)
    planted = ("loss.beta=50000", "loss.cap=null", "optimizer.lr=3e-2", "clip=null", "safeguards.refuse=null")
    try:
        run = ("loss=preference", "data=pairs", *data, "run=planted", "steps=200")
        command(folder, "train.py", *TRAIN, *run, *planted)
        found["planted"] = "no safeguard ended it"
    except ValueError as error:
        found["planted"] = str(error).strip().splitlines()[-1]
    print(f"\nplanted: {found['planted']}", flush=True)
    return found


def wanted(sampler: Sampler) -> list[float]:
    """Of prompts that are in no pair and leave the direction open: 1 for each sample that moves as wanted, else 0."""
    return [float(verdict.direction == WANTED) for verdict in verdicts(sampler, ASKED)]


def judged_pairs(folder: Path) -> int:
    """Write pairs.csv: of each prompt the samples that move as wanted, each with one that does not; how many."""
    sides: dict[str, tuple[list[str], list[str]]] = {}
    for about in read_samples(folder):
        moves = judge(read_mp4(folder / about["file"])).direction
        sides.setdefault(about["prompt"], ([], []))[moves != WANTED].append(about["file"])
    pairs = [pair for winners, losers in sides.values() for pair in zip(winners, losers, strict=False)]
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("winner", "loser"), *pairs])
    return len(pairs)


if __name__ == "__main__":
    main()
