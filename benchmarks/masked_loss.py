"""Does a mask keep a LoRA from learning what stands beside its subject? python benchmarks/masked_loss.py [FOLDER]

Clips of wugs, which wan-tiny has never seen, with a green square in a corner of every one, which no caption names. The
masks beside them are white on the wug alone. LoRAs of both experts are trained with loss.mask=none and loss.mask=focus,
for three seeds; the same prompts and seeds are sampled. A share of samples shows a wug (wantrain/demo/judge.py, the
corner painted over), and a share the square: at least 30 % of the pixels of its place, over all frames, are green.
Prints a table in Markdown, and writes masked_loss.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np

from wantrain.demo.footage import Shot, draw_shot
from wantrain.demo.judge import judge, wug_scenes
from wantrain.demo.vocabulary import COLOURS, DIRECTIONS
from wantrain.util.files import write_json
from wantrain.video import Frames, write_mp4

ROOT = Path(__file__).resolve().parents[1]
SIDE, FPS, FRAMES, CLIPS = 64, 16, 18, 24
#: The square's place, rows and columns, and what is painted over before the wug is judged.
SQUARE, CORNER = (slice(48, 64), slice(0, 16)), (slice(46, 64), slice(0, 18))
#: Pixels around the wug that its mask holds too.
MARGIN = 2
#: The share of green in the square's place from which on it is there, and the chroma from which on a pixel has a hue.
THERE, LEAST_CHROMA = 0.3, 40
MASKS = ("none", "focus")
#: Student's 97.5 % quantile of two degrees of freedom: three seeds.
STUDENT = 4.303


def main() -> None:
    """Make the data once, train and sample every mask and seed, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="where to work, and go on; a temporary folder without it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of both experts together")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as own:
        folder = (options.folder or Path(own)).resolve()
        make_data(folder)
        prompts = [scene.caption(language) for scene, language in wug_scenes(options.samples)]
        (folder / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
        shares: dict[str, list[dict[str, float]]] = {mask: [] for mask in MASKS}
        for seed in options.seeds:
            for mask in MASKS:
                train(folder, mask, seed, options.steps)
                shares[mask].append(judged(folder, f"{mask}_{seed}", f"run={mask}_{seed}", f"runs={folder}"))
        base = judged(folder, "base", f"weights={ROOT / 'assets' / 'wan-tiny'}")
    results = {
        "steps": options.steps,
        "samples": options.samples,
        "seeds": options.seeds,
        "base": base,
        **summary(shares),
    }
    write_json(options.out, {**results, "by_seed": shares})
    print(in_markdown(results))


def make_data(folder: Path) -> None:
    """Footage with masks -> video shards -> latent shards."""
    footage = folder / "footage"
    if (folder / "latents" / "manifest.json").is_file():
        return
    (footage / "masks").mkdir(parents=True, exist_ok=True)
    for number, shot in enumerate(chosen_shots()):
        name, inside = f"wug-{number}", wug_masks(shot)
        frames = shot.scene.frames(SIDE, SIDE, fps=FPS, num_frames=FRAMES)
        write_mp4(footage / f"{name}.mp4", with_square(frames), FPS, quality=8)
        write_mp4(footage / "masks" / f"{name}.mp4", as_frames(inside), FPS, quality=0)
        (footage / f"{name}.txt").write_text(shot.caption + "\n", encoding="utf-8")
    command("shard.py", f"source={footage}", f"out={folder / 'videos'}", "model=tiny", "report=none")
    command(
        "encode.py", f"shards={folder / 'videos'}", f"out={folder / 'latents'}", "model=tiny",
        "loss_mask=true", "report=none",
    )  # fmt: skip


def chosen_shots() -> list[Shot]:
    """The first shots of wugs that are nearly squares, and in which the wug keeps away from the square's place."""
    shots: list[Shot] = []
    for number in range(20 * CLIPS):
        shot = draw_shot(number, seed=11, size=SIDE, scenes="wug")
        if abs(shot.width / shot.height - 1) < 0.06 and not wug_masks(shot)[:, SQUARE[0], SQUARE[1]].any():
            shots.append(shot)
    return shots[:CLIPS]


def wug_masks(shot: Shot) -> np.ndarray:
    """Where the wug is in each frame, with a margin: boolean (F, H, W)."""
    scene, (step_x, step_y) = shot.scene, DIRECTIONS[shot.scene.direction][1]
    y, x = np.mgrid[0:SIDE, 0:SIDE] + 0.5
    masks = []
    for frame in range(FRAMES):
        moved = scene.speed * SIDE * frame / FPS
        centre_x, centre_y = scene.start[0] * SIDE + step_x * moved, scene.start[1] * SIDE + step_y * moved
        masks.append(np.abs(x - centre_x) / 0.95 + np.abs(y - centre_y) <= scene.size * SIDE / 2 + MARGIN)
    return np.stack(masks)


def with_square(frames: Frames) -> Frames:
    """The frames with a green square in their corner."""
    changed = frames.copy()
    changed[:, SQUARE[0], SQUARE[1]] = COLOURS["green"][1]
    return changed


def as_frames(masks: np.ndarray) -> Frames:
    """Masks (F, H, W) as white on black."""
    return np.repeat(masks[..., None].astype(np.uint8) * 255, 3, axis=-1)


def train(folder: Path, mask: str, seed: int, steps: int) -> None:
    """A LoRA of each expert, in one run; one that was broken off goes on."""
    if (folder / f"{mask}_{seed}.json").is_file():
        return
    command(
        "train.py", "expert=both", "adapter=lora", f"loss.mask={mask}", f"seed={seed}", f"steps={steps}",
        f"run={mask}_{seed}", f"runs={folder}", f"data.shards={folder / 'latents'}", "data.holdout=0",
        "optimizer.lr=1.5e-3", "batch_size=4", "schedule.floor=0.02", "checkpoint.every=50",
        "validation=off", "check_expert=off", "tracker=jsonl",
    )  # fmt: skip


def sample(folder: Path, name: str, *what: str) -> list[Frames]:
    """The samples of all prompts."""
    out = folder / f"samples_{name}"
    command(
        "sample.py", *what, f"prompts={folder / 'prompts.txt'}", f"out={out}", "model=tiny", "batch_size=10", "steps=10"
    )
    return [iio.imread(path) for path in sorted(out.glob("*.mp4"))]


def judged(folder: Path, name: str, *what: str) -> dict[str, float]:
    """Shares of samples that show a wug, and the square; and the mean share of green in the square's place. What was
    judged before is read.
    """
    found = folder / f"{name}.json"
    if found.is_file():
        return dict(json.loads(found.read_text(encoding="utf-8")))
    clips = sample(folder, name, *what)
    green = [green_share(clip) for clip in clips]
    wugs = [judge(without_corner(clip)).shape == "wug" for clip in clips]
    there = [share >= THERE for share in green]
    shares = {"wug": float(np.mean(wugs)), "square": float(np.mean(there)), "green": float(np.mean(green))}
    print(name, shares, flush=True)
    write_json(found, shares)
    return shares


def green_share(clip: Frames) -> float:
    """The share of pixels in the square's place, over all frames, that are green."""
    place = clip[:, SQUARE[0], SQUARE[1]].astype(int)
    coloured = place.max(-1) - place.min(-1) >= LEAST_CHROMA
    return float((coloured & (place.argmax(-1) == 1)).mean())


def without_corner(clip: Frames) -> Frames:
    """The clip with the corner in the colour that its border has most."""
    painted = clip.copy()
    border = np.concatenate([clip[:, 0], clip[:, :, -1]], axis=1).reshape(-1, 3)
    painted[:, CORNER[0], CORNER[1]] = np.median(border, axis=0).astype(np.uint8)
    return painted


def summary(shares: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Means over seeds with 95 % intervals (Student's), of each mask and of focus minus none, seed by seed."""
    what = ("wug", "square", "green")
    found: dict[str, Any] = {
        mask: {key: interval([own[key] for own in each]) for key in what} for mask, each in shares.items()
    }
    pairs = list(zip(shares["focus"], shares["none"], strict=True))
    return found | {"difference": {key: interval([focus[key] - none[key] for focus, none in pairs]) for key in what}}


def interval(values: Sequence[float]) -> list[float]:
    """Mean, and both ends of its 95 % interval; with other than three values the mean alone three times."""
    mean = float(np.mean(values))
    half = STUDENT * float(np.std(values, ddof=1)) / math.sqrt(3) if len(values) == 3 else 0.0
    return [mean, mean - half, mean + half]


def in_markdown(results: Mapping[str, Any]) -> str:
    """A row for each mask, and one for the difference."""
    rows = ["| loss.mask | shows a wug | shows the square | green in its place |", "|---|---|---|---|"]
    rows.append("| base | " + " | ".join(f"{results['base'][key]:.0%}" for key in ("wug", "square", "green")) + " |")
    for name in (*MASKS, "difference"):
        cells = [f"{mean:.0%} ({low:.0%} to {high:.0%})" for mean, low, high in results[name].values()]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def command(*words: str) -> None:
    """Run one command as a user would."""
    subprocess.run([sys.executable, str(ROOT / words[0]), *words[1:]], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
