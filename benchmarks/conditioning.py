"""How faithful a tiny model is to its conditioning input: python benchmarks/conditioning.py FOLDER [--sheet PNG]

FOLDER is a pipeline that export.py wrote of a model of conditioning channel_concat (recipe=wan_tiny_i2v). It is given
a part of the pixels of clips that it was not trained on, and their captions. Are the known pixels kept, as well as the
VAE can show them? Do colour, shape and direction (wantrain/demo/judge.py) fit the caption? Is a hole filled?
Prints a table in Markdown and writes conditioning.json beside this file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wantrain import conditioning, geometry
from wantrain.data.footage.pixels import prepare_pixels
from wantrain.demo.footage import Shot, draw_shot
from wantrain.demo.judge import judge, scores
from wantrain.masks import MaskMix
from wantrain.models import Base
from wantrain.sampling import Sampler, Settings
from wantrain.sampling.build import build_sampler
from wantrain.util import distributed
from wantrain.util.files import write_json
from wantrain.util.seeds import generator_at
from wantrain.video import Frames, contact_sheet, to_frames

CLIPS, STEPS, TOGETHER = 24, 20, 12
#: As conf/model/tiny_i2v.yaml has it.
GUIDANCE = 1.0
#: Pixels that a latent covers, in a row.
LATENT = 8
MEASURED = ("kept", "limit", "clear_kept", "clear_limit", "hole", "hole_gray")
BUCKET = geometry.Bucket(17, 64, 64)


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--masks", nargs="+", default=["image", "boxes"])
    parser.add_argument("--clips", type=int, default=CLIPS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--sheet", type=Path, help="write the first videos of each mask type as one picture")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    distributed.set_threads()
    sampler, settings = open_sampler(options.folder, steps=options.steps, guidance=options.guidance)
    results: dict[str, Any] = {"clips": options.clips, "settings": str(settings)}
    for name in options.masks:
        results[name] = measure(name, sampler, settings, count=options.clips, sheet=options.sheet)
    print(in_markdown({name: results[name] for name in options.masks}))
    write_json(options.out, results)


def open_sampler(folder: Path, *, steps: int = STEPS, guidance: float = GUIDANCE) -> tuple[Sampler, Settings]:
    """The pipeline, and how it is sampled: its own shift, the same guidance for each expert."""
    boundary = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["boundary_ratio"]
    shift = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))["flow_shift"]
    base = Base(folder)
    experts: dict[str, Any] = {
        name: base.transformer(name) for name in (("high_noise", "low_noise") if boundary else ("dense",))
    }
    sampler = build_sampler(experts, boundary=boundary, base=base, conditioning="channel_concat")
    return sampler, Settings(dict.fromkeys(experts, guidance), shift, steps)


@torch.no_grad()
def measure(
    name: str, sampler: Sampler, settings: Settings, *, count: int = CLIPS, sheet: Path | None = None
) -> dict[str, float]:
    """Measures over `count` clips whose known pixels are a mask type's (wantrain/masks.py).

    kept, limit, lost   PSNR in dB of the known pixels; of the same pixels through the VAE alone; the difference
    clear_...           the same of known pixels that lie a latent or more from any hole: of a latent that is partly
                        hole the model does not see the clip's own
    hole, hole_gray     PSNR of the other pixels; with mid-gray in their place
    colour, shape, direction, all   shares of videos that show what the clip does; shown_...: of the clips as the
                        model sees them, with gray holes
    """
    shots = [draw_shot(number, seed=1000, size=64) for number in range(count)]
    mix, made, true, decoded, shown, known = MaskMix.read({name: 1.0}), list[Frames](), [], [], [], []
    assert sampler.encode_pixels is not None
    for first in range(0, count, TOGETHER):
        some = shots[first : first + TOGETHER]
        pixels, given_B1FHW = pixels_of(some), masks_of(mix, name, range(first, first + len(some)))
        record = conditioning.encode(sampler.encode_pixels, pixels, given_B1FHW)
        inputs = conditioning.model_inputs(record, sampler.conditioning)
        prompts, seeds = [shot.caption for shot in some], list(range(first, first + len(some)))
        made += sampler.batch(prompts, bucket=BUCKET, settings=settings, seeds=seeds, inputs=inputs)
        true += [to_frames(clip) for clip in pixels]
        decoded += [to_frames(clip) for clip in sampler.decode(sampler.encode_pixels(pixels))]
        shown += [to_frames(clip) for clip in conditioning.gray_unknown(pixels, given_B1FHW)]
        known += list(given_B1FHW[:, 0].numpy())
    if sheet is not None:
        rows = {f"{shot.caption} ({what})": clips[n] for n, shot in enumerate(shots[:6])
                for what, clips in (("true", true), ("shown", shown), ("made", made))}  # fmt: skip
        contact_sheet(sheet.with_stem(f"{sheet.stem}_{name}"), rows, columns=6, cell=96)
    measured = dict[str, float]()
    for what, where in {"": known, "clear_": [far_from_holes(each) for each in known]}.items():
        kept, limit = mean_psnr(made, true, where), mean_psnr(decoded, true, where)
        measured |= {f"{what}kept": kept, f"{what}limit": limit, f"{what}lost": limit - kept}
    holes = [~each for each in known]
    measured |= {"hole": mean_psnr(made, true, holes), "hole_gray": mean_psnr(shown, true, holes)}
    scenes = [shot.scene for shot in shots]
    measured |= scores([judge(clip) for clip in made], scenes)
    return measured | {
        f"shown_{what}": share for what, share in scores([judge(clip) for clip in shown], scenes).items()
    }


def pixels_of(shots: Sequence[Shot]) -> Tensor:
    """The clips drawn at the model's size and rate: (B, 3, F, H, W) in [-1, 1]."""
    size = BUCKET.height, BUCKET.width
    drawn = [shot.scene.frames(*size, fps=16, num_frames=BUCKET.num_frames) for shot in shots]
    return torch.stack([prepare_pixels(frames, size)[0] for frames in drawn])


def masks_of(mix: MaskMix, name: str, numbers: range) -> Tensor:
    """A mask of this type for the clips of these numbers: boolean (B, 1, F, H, W), True where a pixel is known."""
    shape = BUCKET.num_frames, BUCKET.height, BUCKET.width
    drawn = [mix.draw(name, shape, generator_at("told", name, number)) for number in numbers]
    return torch.stack([mask.expand(shape)[None] for mask in drawn])


def far_from_holes(known_FHW: np.ndarray) -> np.ndarray:
    """Which known pixels lie `LATENT` pixels or more from the holes of their frame."""
    holes = torch.from_numpy(~known_FHW).float()
    return F.max_pool2d(holes, 2 * LATENT + 1, stride=1, padding=LATENT).numpy() == 0  # type: ignore[no-any-return]


def mean_psnr(made: Sequence[Frames], true: Sequence[Frames], where: Sequence[np.ndarray]) -> float:
    """The mean over clips of the PSNR in dB of the pixels where a mask (F, H, W) holds; clips of none do not count."""
    triples = zip(made, true, where, strict=True)
    errors = [((one.astype(float) - other) ** 2)[mask].mean() for one, other, mask in triples if mask.any()]
    return float(np.mean(-10 * np.log10(np.array(errors) / 255**2)))


def in_markdown(results: dict[str, dict[str, float]]) -> str:
    """A row for each mask type."""
    known = "known pixels | VAE's own | far from holes | VAE's own"
    rows = [f"| mask type | {known} | hole | gray hole | colour | shape | direction |", "|---" * 10 + "|"]
    for name, measured in results.items():
        decibels = " | ".join(f"{measured[what]:.1f} dB" for what in MEASURED)
        shares = " | ".join(f"{measured[what]:.0%}" for what in ("colour", "shape", "direction"))
        rows.append(f"| {name} | {decibels} | {shares} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
