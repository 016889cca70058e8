"""The whole story on one CPU: the five verbs on procedural footage, then what came of it.

python demo.py         everything; `make demo` installs first (under ten minutes on two cores after that)
python demo.py data    only the footage and its shards, which `python train.py` uses when nothing else is given
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import matplotlib

from wantrain import world
from wantrain.data import make_footage
from wantrain.video import contact_sheet

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent
DATA, RUN = Path("data/demo"), Path("runs/demo")
EXPERTS = ("high_noise", "low_noise")
STEPS = 1500
PROMPTS = (
    "a red circle moving right on a dark background",
    "a yellow star moving up on a grey background",
    "a cyan square standing still on a light background",
    "一个绿色的三角形在深色背景上向左移动",
)


def verb(*command: str) -> None:
    """Run one verb as a user would, showing the command."""
    world.say("\n$ python " + " ".join(part if " " not in part else f"'{part}'" for part in command))
    ended = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], check=False)
    if ended.returncode:
        sys.exit(ended.returncode)  # the verb has said what is wrong


def make_data() -> None:
    """Footage -> video shards -> latent shards, in data/demo."""
    make_footage(DATA / "footage")
    verb("shard.py", f"source={DATA / 'footage'}", f"out={DATA / 'videos'}", "model=tiny")
    verb("encode.py", f"shards={DATA / 'videos'}", f"out={DATA / 'latents'}", "model=tiny")


def main() -> None:
    """Data, both experts, export, samples, summary."""
    started = time.time()
    make_data()
    for expert in EXPERTS:
        verb(
            "train.py", f"expert={expert}", f"run={expert}", f"runs={RUN}", f"data.shards={DATA / 'latents'}",
            f"steps={STEPS}", "batch_size=8",
            "optimizer.lr=1.5e-3", "schedule.floor=0.02", f"validation.every={STEPS // 2}",
            "tracker=jsonl",
        )  # fmt: skip
    pair = f"run={','.join(EXPERTS)}"
    verb("export.py", pair, f"runs={RUN}", f"out={RUN / 'pipeline'}")
    (RUN / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    verb(
        "sample.py", f"weights={RUN / 'pipeline'}", f"prompts={RUN / 'prompts.txt'}", f"out={RUN / 'samples'}",
        "model=tiny", "steps=30",
    )  # fmt: skip
    summarise(time.time() - started)


def summarise(seconds: float) -> None:
    """Write summary.json, loss.png and contact_sheet.png into runs/demo, and say where to look."""
    logs = {expert: read_log(RUN / expert / "metrics.jsonl") for expert in EXPERTS}
    summary: dict[str, Any] = {"seconds": round(seconds, 1), "experts": {}}
    for expert, log in logs.items():
        validated = [row for row in log if "validation_loss" in row]
        summary["experts"][expert] = {
            "steps": log[-1]["step"],
            "validation_loss_start": validated[0]["validation_loss"],
            "validation_loss_end": validated[-1]["validation_loss"],
            "validation_loss_best_linear": validated[-1]["validation_linear"],
            "below_linear": validated[-1]["validation_loss"] < validated[-1]["validation_linear"],
        }
    videos = sorted((RUN / "samples").glob("*.mp4"))
    summary["samples"] = {video.name: prompt for video, prompt in zip(videos, PROMPTS, strict=True)}
    world.write_json(RUN / "summary.json", summary)
    draw_losses(logs)
    contact_sheet(
        RUN / "contact_sheet.png", {prompt: iio.imread(video) for video, prompt in zip(videos, PROMPTS, strict=True)}
    )
    world.say(
        f"\nDone in {seconds / 60:.1f} minutes. Look at {RUN / 'contact_sheet.png'}, {RUN / 'loss.png'}, "
        f"{RUN / 'summary.json'} and {RUN / 'samples'}.\nOn your own footage (videos with a NAME.txt caption each):\n"
        "  python shard.py source=YOUR_FOLDER out=data/mine/videos model=tiny\n"
        "  python encode.py shards=data/mine/videos out=data/mine/latents model=tiny\n"
        f"  python train.py expert=low_noise adapter=lora weights={RUN / 'pipeline'} data.shards=data/mine/latents\n"
        f'  python sample.py run=tiny_low_noise_lora prompt="..."'
    )


def read_log(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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
    if sys.argv[1:] not in ([], ["data"]):
        sys.exit(f"error: demo.py takes nothing, or the word data; got {' '.join(sys.argv[1:])}")
    with world.errors_to_exit_code():
        make_data() if sys.argv[1:] == ["data"] else main()
