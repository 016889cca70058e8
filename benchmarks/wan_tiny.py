"""How well a tiny pipeline obeys its prompts: python benchmarks/wan_tiny.py [FOLDER] [--table] [--diffusers]

64 prompts whose combination was never in training, judged by wantrain/data/judge.py; chance levels beside. And what the
VAE does to 256 clips that nothing was trained on.
--table      also: the experts swapped, each alone, and 4 to 50 steps with both solvers
--diffusers  also: the same folder through diffusers' own pipeline
Prints tables in Markdown and writes wan_tiny.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wantrain import geometry
from wantrain.data.footage.pixels import prepare_pixels
from wantrain.demo.footage import draw_shot
from wantrain.demo.judge import Verdict, judge, scores, spared_scenes
from wantrain.demo.vocabulary import DIRECTIONS, VOCABULARIES
from wantrain.models import Base, load_vae
from wantrain.sampling import Sampler, Settings
from wantrain.sampling.build import build_sampler
from wantrain.util import distributed
from wantrain.util.files import write_json
from wantrain.video import contact_sheet, to_frames

PROMPTS, TOGETHER = 64, 16
BUCKET = geometry.Bucket(17, 64, 64)
PLAIN = VOCABULARIES["plain"]
CHANCE = {"colour": 1 / len(PLAIN.colours), "shape": 1 / len(PLAIN.shapes), "direction": 1 / len(DIRECTIONS)}


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="assets/wan-tiny", type=Path)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--diffusers", action="store_true")
    parser.add_argument("--sheet", type=Path, help="write the first videos as one picture")
    parser.add_argument("--guidance", type=float, default=None, help="for both experts")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    distributed.set_threads()
    index = json.loads((options.folder / "model_index.json").read_text(encoding="utf-8"))
    held = ["high_noise", "low_noise"] if index["boundary_ratio"] else ["dense"]
    parts = Base(options.folder)
    experts: dict[str, Any] = {name: parts.transformer(name) for name in held}
    base = build_sampler(experts, boundary=index["boundary_ratio"], base=parts)
    settings = default_settings(options.folder, options.guidance)
    print(
        "| | colour | shape | direction | all three | overlap | English | Chinese | |\n" + "|---" * 9 + "|", flush=True
    )
    results: dict[str, Any] = {"folder": str(options.folder), "settings": str(settings), "chance": CHANCE}
    results["judged"] = measure("as shipped", base, settings, sheet=options.sheet)
    results["vae"] = measure_vae(options.folder)
    if options.table and len(experts) == 2:
        high, low = experts["high_noise"], experts["low_noise"]
        for name, pair in {
            "swapped": (low, high),
            "only high_noise": (high, high),
            "only low_noise": (low, low),
        }.items():
            both = dict(zip(("high_noise", "low_noise"), pair, strict=True))
            sampler = build_sampler(both, boundary=index["boundary_ratio"], base=parts)
            results[name] = measure(name, sampler, settings)
    if options.table:
        for solver in ("euler", "unipc"):
            for steps in (4, 8, 16, 30, 50):
                at = Settings(settings.guidance, settings.shift, steps, solver)
                results[f"{solver} {steps}"] = measure(f"{solver}, {steps} steps", base, at)
    if options.diffusers:
        results["diffusers"] = measure_diffusers(options.folder, settings)
    write_json(options.out, results)


def default_settings(folder: Path, guidance: float | None) -> Settings:
    """The folder's own shift, and the tiny model's guidance unless another is asked for."""
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    scale = 2.0 if guidance is None else guidance
    return Settings({"high_noise": scale, "low_noise": scale, "dense": scale}, scheduler["flow_shift"])


def measure(title: str, sampler: Sampler, settings: Settings, sheet: Path | None = None) -> dict[str, float]:
    """Sample every prompt, judge, print one row."""
    started, scenes = time.time(), spared_scenes(PROMPTS)
    prompts = [scene.caption(language) for scene, language in scenes]
    clips = []
    for first in range(0, PROMPTS, TOGETHER):
        some = prompts[first : first + TOGETHER]
        seeds = list(range(first, first + len(some)))
        clips += sampler.batch(some, bucket=BUCKET, settings=settings, seeds=seeds)
    if sheet is not None:
        contact_sheet(sheet, dict(zip(prompts[:16], clips[:16], strict=True)), columns=6, cell=96)
    return tell(title, [judge(clip) for clip in clips], time.time() - started)


def tell(title: str, verdicts: list[Verdict], seconds: float) -> dict[str, float]:
    """Print and return the scores, of both languages together and apart."""
    scenes = spared_scenes(PROMPTS)
    told: dict[str, float] = scores(verdicts, [scene for scene, _ in scenes])
    told["overlap"] = float(np.mean([verdict.overlap for verdict in verdicts]))
    for language in ("en", "zh"):
        chosen = [i for i, (_, spoken) in enumerate(scenes) if spoken == language]
        each = scores([verdicts[i] for i in chosen], [scenes[i][0] for i in chosen])
        told[language] = float(np.mean([each[what] for what in CHANCE]))
    print(f"| {title} | " + " | ".join(f"{share:.1%}" for share in told.values()) + f" | {seconds:.0f} s |", flush=True)
    return told


def measure_vae(folder: Path, count: int = 256) -> dict[str, float]:
    """PSNR, the latents' mean and spread per channel, and what the judge still reads after a round trip."""
    vae, latents, errors, verdicts = load_vae(folder), [], [], []
    scenes = [draw_shot(number, seed=1000, size=64).scene for number in range(count)]
    for first in range(0, count, TOGETHER):
        some = scenes[first : first + TOGETHER]
        drawn = [scene.frames(BUCKET.height, BUCKET.width, fps=16, num_frames=BUCKET.num_frames) for scene in some]
        pixels = torch.stack([prepare_pixels(frames, (BUCKET.height, BUCKET.width))[0] for frames in drawn])
        with torch.inference_mode():
            encoded = vae.encode(pixels)
            decoded = vae.decode(encoded)
        latents.append(encoded.transpose(0, 1).flatten(1))
        errors += (decoded - pixels).square().mean(dim=(1, 2, 3, 4)).tolist()
        verdicts += [judge(to_frames(clip)) for clip in decoded]
    spread, mean = torch.std_mean(torch.cat(latents, dim=1), dim=1)
    told = {
        "psnr": float(-10 * np.log10(np.array(errors) / 4).mean()),
        "largest_mean": mean.abs().max().item(),
        "smallest_std": spread.min().item(),
        "largest_std": spread.max().item(),
        **scores(verdicts, scenes),
    }
    print("VAE: " + ", ".join(f"{name} {value:.3f}" for name, value in told.items()), flush=True)
    return told


def measure_diffusers(folder: Path, settings: Settings) -> Mapping[str, float]:
    """The same prompts through diffusers' own pipeline, in float32."""
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    started, verdicts = time.time(), []
    for number, (scene, language) in enumerate(spared_scenes(PROMPTS)):
        frames = pipe(
            prompt=scene.caption(language),
            negative_prompt=settings.negative_prompt,
            height=BUCKET.height,
            width=BUCKET.width,
            num_frames=BUCKET.num_frames,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance["high_noise"],
            generator=torch.Generator().manual_seed(number),
        ).frames[0]
        verdicts.append(judge((np.asarray(frames) * 255).round().astype(np.uint8)))
    return tell("diffusers", verdicts, time.time() - started)


if __name__ == "__main__":
    main()
