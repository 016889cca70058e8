"""What preserve= and loss=preference do to wan-tiny: python benchmarks/keeping.py preserving|preference [--seed N]

preserving  a LoRA on wugs alone, with and without the base's answers under class prompts: the share of wugs among
            samples that should show one, and the judge's score of what wan-tiny knew, after each of STEPS
preference  prompts without a direction, which wan-tiny shows as standing still. Pairs of its own samples, by the judge:
            the better one moves left. The share that moves left, on prompts in no pair, and the score of prompts that
            name a direction. And a run that is made to unlearn, which a safeguard has to end
The low-noise expert trains on all noise and samples alone. Each seed adds its rows to keeping.json beside this file;
tables in Markdown are of all that is there. Intervals are of 95 %, over samples, paired by prompt and seed.
--work DIR  keeps footage and runs for the next seed; without it they are made anew
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from collections.abc import Mapping, Sequence
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
from wantrain.util import distributed
from wantrain.util.files import write_json
from wantrain.video import write_mp4

#: Steps after which each way is judged: with the base's answers the new object takes about twice as many.
STEPS = {"none": (60, 120), "preserve": (120, 240)}
#: Solver steps: wan-tiny scores alike with 4 to 50.
SOLVER_STEPS, TOGETHER = 8, 16
SIZE, FPS = Bucket(17, 64, 64), 16
WANTED = "left"
WUGS, OTHERS = wug_scenes(16), spared_scenes(24)
PLAIN = VOCABULARIES["plain"]
#: Prompts without a direction: those of the pairs, and others.
OPEN = [f"a {colour} {shape} on a {ground} background"
        for ground in PLAIN.backgrounds for shape in PLAIN.shapes for colour in PLAIN.colours]  # fmt: skip
PAIRED, ASKED = OPEN[:30:2], OPEN[1::3]
TRAIN = ("expert=low_noise", "expert.high=1", "adapter=lora", "batch_size=4", "schedule=constant", "data.holdout=0",
         "validation.every=0", "tracker=jsonl", "check_expert=off", "checkpoint.keep=9", WEIGHTS)  # fmt: skip
PREFERENCE_STEPS = 50
#: A run that is made to unlearn: it pulls without end, far and fast.
PLANTED = ("loss.beta=50000", "loss.cap=null", "optimizer.lr=3e-2", "clip=null", "safeguards.refuse=null", "steps=200")


def main() -> None:
    """Measure one seed, print all, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["preserving", "preference"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    distributed.set_threads()
    path = Path(__file__).with_suffix(".json")
    measure, show = {"preserving": (preserving, show_preserving), "preference": (preference, show_preference)}[
        options.what
    ]
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.work or Path(scratch)).absolute() / options.what
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(folder, options.seed, read(path).get(options.what, {}))
    results = read(path)  # again: another seed may have been measured meanwhile
    results[options.what] = {**results.get(options.what, {}), **found}
    write_json(path, results)
    show(results[options.what])


def read(path: Path) -> dict[str, Any]:
    """What was measured before."""
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return results


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


def interval(differences: Sequence[float]) -> str:
    """Mean and both ends of its interval, in points."""
    middle, half = mean(differences), 1.96 * stdev(differences) / len(differences) ** 0.5
    return f"{100 * middle:+.1f} ({100 * (middle - half):+.1f} to {100 * (middle + half):+.1f})"


def moved(after: Sequence[Sequence[float]], before: Sequence[float]) -> list[float]:
    """The differences of every sample of every seed."""
    return [new - old for own in after for new, old in zip(own, before, strict=True)]


def preserving(folder: Path, seed: int, before: Mapping[str, Any]) -> dict[str, Any]:
    """A LoRA on wugs alone, with and without preserve=."""
    if not (folder / "latents" / "manifest.json").is_file():
        make_footage(folder / "footage", scenes="wug", num_videos=24, num_images=0)
        command(folder, "shard.py", f"source={folder / 'footage'}", f"out={folder / 'videos'}")
        command(folder, "encode.py", f"shards={folder / 'videos'}", f"out={folder / 'latents'}", WEIGHTS)
        (folder / "classes.txt").write_text("\n".join(class_prompts()) + "\n", encoding="utf-8")
    ways = {"none": (), "preserve": ("preserve.weight=1", f"preserve.prompts={folder / 'classes.txt'}")}
    found: dict[str, Any] = {"before": before.get("before") or known(sampler_of(None))}
    wugs = [scene.caption(language) for scene, language in WUGS]
    for way, words in ways.items():
        given = (f"data.shards={folder / 'latents'}", f"run={way}_{seed}", f"seed={seed}")
        length = (f"steps={STEPS[way][-1]}", f"checkpoint.every={STEPS[way][0]}", "optimizer.lr=3e-3")
        command(folder, "train.py", *TRAIN, *given, *length, *words)
        for step in STEPS[way]:
            sampler = sampler_of(adapter(folder, f"{way}_{seed}", step))
            shares = [float(verdict.shape == "wug") for verdict in verdicts(sampler, wugs)]
            found[f"{way} step {step} seed {seed}"] = {"wugs": shares, "known": known(sampler)}
    return found


def show_preserving(found: Mapping[str, Any]) -> None:
    """A row for each way and step."""
    print("| | step | wugs, by seed | known, by seed | known, against the base |\n" + "|---" * 5 + "|")
    for way, steps in STEPS.items():
        for step in steps:
            rows = [own for name, own in sorted(found.items()) if name.startswith(f"{way} step {step} ")]
            wugs, scores = (", ".join(f"{mean(row[key]):.0%}" for row in rows) for key in ("wugs", "known"))
            change = interval(moved([row["known"] for row in rows], found["before"]))
            print(f"| {way} | {step} | {wugs} | {scores} | {change} |")


def class_prompts() -> list[str]:
    """Captions of plain shapes, none of which is judged."""
    judged = {scene.caption("en") for scene, _ in OTHERS}
    moves = ("left", "right", "up", "down")
    return [prompt for number, start in enumerate(OPEN) if (prompt := moving(start, moves[number % 4])) not in judged]


def moving(prompt: str, direction: str) -> str:
    """A prompt without a direction, with one."""
    thing, _, ground = prompt.partition(" on ")
    return f"{thing} moving {direction} on {ground}"


def preference(folder: Path, seed: int, before: Mapping[str, Any]) -> dict[str, Any]:
    """Pairs of which the winner moves left; with the first seed also a run that only unlearns."""
    base = sampler_of(None)
    if not (folder / "latents" / "manifest.json").is_file():
        make_pairs(folder / "pairs", base)
        command(folder, "shard.py", f"source={folder / 'pairs'}", f"out={folder / 'videos'}", "static=report")
        command(folder, "encode.py", f"shards={folder / 'videos'}", f"out={folder / 'latents'}", WEIGHTS)
    found: dict[str, Any] = {"before": before.get("before") or {"wanted": wanted(base), "known": known(base)}}
    pairs = (f"data.shards={folder / 'latents'}", f"data.pairs={folder / 'pairs' / 'pairs.csv'}")
    data = ("loss=preference", "data=pairs", *pairs, f"seed={seed}")
    more = (f"run=dpo_{seed}", f"steps={PREFERENCE_STEPS}", f"checkpoint.every={PREFERENCE_STEPS}", "optimizer.lr=1e-3")
    command(folder, "train.py", *TRAIN, *data, *more, "loss.anchor=1")
    sampler = sampler_of(adapter(folder, f"dpo_{seed}", PREFERENCE_STEPS))
    lines = (folder / "runs" / f"dpo_{seed}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = [json.loads(line) for line in lines[-20:]]
    log = {
        key: mean(row[key] for row in last) for key in ("margin", "preferred", "pull", "winner_change", "loser_change")
    }
    found[f"seed {seed}"] = {"wanted": wanted(sampler), "known": known(sampler), "last 20 steps": log}
    if seed == 0:
        try:
            command(folder, "train.py", *TRAIN, *data, "run=planted", *PLANTED)
            found["planted"] = "no safeguard ended it"
        except ValueError as error:
            found["planted"] = str(error).strip().splitlines()[-1]
    return found


def show_preference(found: Mapping[str, Any]) -> None:
    """A row before, one for each seed, and what all of them changed."""
    rows = {name: own for name, own in sorted(found.items()) if name.startswith("seed")}
    print(f"| | moves {WANTED} | known |\n|---|---|---|")
    for name, own in {"before": found["before"], **rows}.items():
        print(f"| {name} | {mean(own['wanted']):.0%} | {mean(own['known']):.1%} |")
    changes = [
        interval(moved([own[key] for own in rows.values()], found["before"][key])) for key in ("wanted", "known")
    ]
    print(f"| change, points | {changes[0]} | {changes[1]} |\n\nplanted: {found.get('planted')}")


def wanted(sampler: Sampler) -> list[float]:
    """Of prompts that are in no pair and leave the direction open: 1 for each sample that moves as wanted, else 0."""
    return [float(verdict.direction == WANTED) for verdict in verdicts(sampler, ASKED)]


def make_pairs(folder: Path, sampler: Sampler) -> None:
    """Samples of PAIRED, and others of the same prompts with the wanted direction named, all under the prompt without
    one; and the pairs of them in which only the second moves as wanted.
    """
    folder.mkdir(exist_ok=True)
    lines, pairs, settings = [], [], Settings({"high_noise": 2.0, "low_noise": 2.0}, 3.0, SOLVER_STEPS)
    for turn in range(2):
        sides = []
        for side, prompts in enumerate(([moving(prompt, WANTED) for prompt in PAIRED], PAIRED)):
            seeds = [100 * turn + 50 * side + number for number in range(len(PAIRED))]
            sides.append(sampler.batch(list(prompts), bucket=SIZE, settings=settings, seeds=seeds))
        for number, both in enumerate(zip(*sides, strict=True)):
            names = [f"{turn}_{number:02d}_{side}.mp4" for side in "ab"]
            for name, clip in zip(names, both, strict=True):
                write_mp4(folder / name, clip, FPS)
                lines.append(json.dumps({"path": name, "caption": PAIRED[number]}))
            if [judge(clip).direction == WANTED for clip in both] == [True, False]:
                pairs.append(names)
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("winner", "loser"), *pairs])


if __name__ == "__main__":
    main()
