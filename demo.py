"""Demo: train a LoRA on new footage, from clips to files that other programs load, on one CPU.

python demo.py              everything; `make demo` installs first (under ten minutes on two cores after that)
python demo.py data NAME    only footage and shards, into data/NAME: demo, wug, wan_tiny, wan_tiny_i2v, vae

The footage shows a wug, which the shipped model wan-tiny has never seen, and some clips of what it knows, so that it
does not forget them. Both experts are trained; the same prompts and seeds are sampled before and after, and a judge
that uses image analysis alone measures what the samples show.
"""

from wantrain.util import ctrl_c

if __name__ == "__main__":
    ctrl_c.ends_at_once()  # while the imports below load

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import matplotlib
import numpy as np

from wantrain.demo.footage import make_footage
from wantrain.demo.judge import judge, scores, spared_scenes, wug_scenes
from wantrain.demo.vocabulary import SETS
from wantrain.util.console import errors_to_exit_code, say
from wantrain.util.files import write_json
from wantrain.video import Frames, contact_sheet

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent
DATA, RUN = Path("data"), Path("runs/demo")
#: Arguments of shard.py and encode.py for data sets of other models than the shipped one.
ARGUMENTS = {"wan_tiny_i2v": ("model=tiny_i2v", "mask_types={image: 1, boxes: 1}")}
EXPERTS = ("high_noise", "low_noise")
STEPS = 500
WUGS, OTHERS = wug_scenes(20), spared_scenes(40)
PROMPTS = [scene.caption(language) for scene, language in [*WUGS, *OTHERS]]
#: Rows of before_after.png, by place in PROMPTS: wugs, then what the model knew before.
SHOWN = (0, 1, 2, 3, 4, 20, 23, 31)


def command(*command: str) -> None:
    """Print and run one command, as a user would."""
    say("\n$ python " + " ".join(part if " " not in part else f"'{part}'" for part in command))
    process = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], check=False)
    if process.returncode:
        sys.exit(process.returncode)  # the command has printed the error


def make_data(name: str) -> None:
    """Footage -> video shards -> latent shards, in data/NAME; no latent shards for the VAE's own footage."""
    folder = DATA / name
    for scenes, amount in SETS[name].items():
        make_footage(folder / "footage" / scenes, scenes=scenes, **amount)
    model, *mask_types = ARGUMENTS.get(name, ("model=tiny",))
    command("shard.py", f"source={folder / 'footage'}", f"out={folder / 'videos'}", model)
    if name != "vae":
        command("encode.py", f"shards={folder / 'videos'}", f"out={folder / 'latents'}", model, *mask_types)


def main() -> None:
    """Footage, shards, a LoRA for each expert, export; samples before and after, and what they show."""
    started = time.time()
    make_data("wug")
    for expert in EXPERTS:
        command(
            "train.py", f"expert={expert}", "adapter=lora", f"run={expert}", f"runs={RUN}",
            f"data.shards={DATA / 'wug' / 'latents'}", "data.holdout=0.15", f"steps={STEPS}",
            "optimizer.lr=1.5e-3", "schedule.floor=0.02", f"validation.every={STEPS}", "tracker=jsonl",
        )  # fmt: skip
    pair = f"run={','.join(EXPERTS)}"
    command("export.py", pair, f"runs={RUN}", f"out={RUN / 'pipeline'}")
    (RUN / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    for what, weights in {"before": "assets/wan-tiny", "after": str(RUN / "pipeline")}.items():
        command(
            "sample.py", f"weights={weights}", f"prompts={RUN / 'prompts.txt'}", f"out={RUN / what}",
            "model=tiny", "batch_size=15",
        )  # fmt: skip
    summarise(time.time() - started)


def summarise(seconds: float) -> None:
    """Judge the samples, write summary.json, loss.png and before_after.png into runs/demo, and print the result."""
    logs = {expert: read_log(RUN / expert / "metrics.jsonl") for expert in EXPERTS}
    clips = {what: [iio.imread(path) for path in sorted((RUN / what).glob("*.mp4"))] for what in ("before", "after")}
    judged = {what: judge_samples(videos) for what, videos in clips.items()}
    summary = {
        "seconds": round(seconds, 1),
        "experts": {expert: losses(log) for expert, log in logs.items()},
        "judged": judged,
        "prompts": PROMPTS,
    }
    write_json(RUN / "summary.json", summary)
    draw_losses(logs)
    draw_before_after(clips["before"], clips["after"])
    say(
        f"\nDone in {seconds / 60:.1f} minutes. Samples that show a wug when asked for one: "
        f"{judged['before']['wug']:.0%} before, {judged['after']['wug']:.0%} after; what the model knew is right in "
        f"{judged['before']['others']:.0%} before, {judged['after']['others']:.0%} after.\n"
        f"Open {RUN / 'index.html'} (the two runs) and {RUN / 'after' / 'index.html'} (the samples) in a browser. "
        f"Look at {RUN / 'before_after.png'}, {RUN / 'loss.png'}, {RUN / 'summary.json'}, {RUN / 'after'}; the LoRA "
        f"files are in {RUN / 'pipeline' / 'lora'}.\nOn your own footage (videos with a NAME.txt caption each):\n"
        "  python shard.py source=YOUR_FOLDER out=data/mine/videos model=tiny\n"
        "  python encode.py shards=data/mine/videos out=data/mine/latents model=tiny\n"
        "  python train.py expert=low_noise adapter=lora data.shards=data/mine/latents\n"
        '  python sample.py run=tiny_low_noise_lora prompt="..."'
    )


def judge_samples(clips: Sequence[Frames]) -> dict[str, float]:
    """The share of wugs among samples that should show one, and the mean score (colour, shape, direction) of others."""
    verdicts = [judge(clip) for clip in clips]
    wugs = [verdict.shape == "wug" for verdict in verdicts[: len(WUGS)]]
    others = scores(verdicts[len(WUGS) :], [scene for scene, _ in OTHERS])
    moves = scores(verdicts[: len(WUGS)], [scene for scene, _ in WUGS])["direction"]
    mean = float(np.mean([others[what] for what in ("colour", "shape", "direction")]))
    return {"wug": float(np.mean(wugs)), "wug_direction": moves, "others": mean, **others}


def losses(log: list[dict[str, Any]]) -> dict[str, Any]:
    """Validation losses on held-out clips of the new footage: at step 0, at the end, and of a linear predictor."""
    validated = [row for row in log if "validation_loss" in row]
    return {
        "steps": log[-1]["step"],
        "validation_loss_start": validated[0]["validation_loss"],
        "validation_loss_end": validated[-1]["validation_loss"],
        "validation_loss_best_linear": validated[-1]["validation_linear"],
        "below_linear": validated[-1]["validation_loss"] < validated[-1]["validation_linear"],
    }


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def draw_before_after(before: Sequence[Frames], after: Sequence[Frames]) -> None:
    """One row per prompt: four frames before, a gap, four frames after."""
    rows = {}
    for place in SHOWN:
        picks = np.linspace(0, len(before[place]) - 1, 4).round().astype(int)
        gap = np.full_like(before[place][:1], 255)
        rows[f"{PROMPTS[place]}   (left: before, right: after)"] = np.concatenate(
            [before[place][picks], gap, after[place][picks]]
        )
    contact_sheet(RUN / "before_after.png", rows, columns=9, cell=96)


def draw_losses(logs: dict[str, list[dict[str, Any]]]) -> None:
    """Training loss (thin), validation loss (dots) and the best linear predictor (dashed) of each expert."""
    figure, axes = plt.subplots(1, len(logs), figsize=(11, 4), squeeze=False)
    for axis, (expert, log) in zip(axes[0], logs.items(), strict=True):
        trained = [row for row in log if "loss" in row]
        validated = [row for row in log if "validation_loss" in row]
        axis.plot([row["step"] for row in trained], [row["loss"] for row in trained], linewidth=0.5, label="training")
        axis.plot(
            [row["step"] for row in validated], [row["validation_loss"] for row in validated], "o-", label="validation"
        )
        axis.axhline(validated[-1]["validation_linear"], linestyle="--", color="gray", label="best linear predictor")
        axis.set(title=expert, xlabel="step", ylabel="velocity loss", ylim=(0, None))
        axis.legend()
    figure.tight_layout()
    figure.savefig(RUN / "loss.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments and (arguments[0] != "data" or len(arguments) != 2 or arguments[1] not in SETS):
        sys.exit(f"error: demo.py takes nothing, or data and one of {', '.join(SETS)}; got {' '.join(arguments)}")
    with errors_to_exit_code():
        make_data(arguments[1]) if arguments else main()
