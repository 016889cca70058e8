"""wan-tiny through the project's own commands on the device, held against the CPU of the same machine.

Footage is made and cut once; every stage finds what the ones before left in the working folder, or makes it. Noise and
data order are drawn on the CPU by position, so both sides see the same and differ by rounding alone. TF32 is off.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import torch

from gpu_stages.context import ROOT, Context, read_losses
from wantrain.data import LatentData, make_footage
from wantrain.models.weights import read_file

BASE = ROOT / "assets" / "wan-tiny"
PROMPT = "a purple triangle moving left on a light background"

#: Largest relative difference of a step's loss in float32. Sums in another order differ by about 1e-6 in a forward;
#: engines on CPUs, which differ by no more than that, part by up to 1e-5 in fifty steps (docs/numerics.md).
FP32_LOSS = 1e-4
#: In bf16 the CPU's own run parts from its float32 run by what rounding costs. Another device rounds elsewhere, by as
#: much; its largest of few steps is another draw, so three times is allowed.
BF16_TIMES = 3.0
#: Largest error of latents, in their standard deviations, and of texts, in float32.
ENCODED = 1e-3
#: Least PSNR of sampled frames: float32 rounding moves few pixels by one grey level, before mp4 and after.
FRAMES_DB = 40.0


def encode(context: Context) -> dict[str, Any]:
    """encode.py on the device and on the CPU: latents and texts of every clip."""
    own, reference = (_latents(context, cpu) for cpu in (False, True))
    found, expected = ({name: tensors for name, *tensors in _clips(folder)} for folder in (own, reference))
    same = "the same shards, cut alike"
    context.require("the same clips", found.keys() == expected.keys() and len(found) > 0, same)
    spread = torch.cat([latents.flatten() for latents, _ in expected.values()]).std().item()
    errors = [
        max((mine - theirs).abs().max().item() for mine, theirs in zip(pairs[0], pairs[1], strict=True))
        for pairs in (
            ([found[name][part] for name in expected], [expected[name][part] for name in expected]) for part in (0, 1)
        )
    ]
    context.check("latents", errors[0] / spread, ENCODED, "largest error in standard deviations; float32 without TF32")
    context.check("texts", errors[1], ENCODED, "largest error of values of order one; float32 without TF32")
    return {
        "clips": len(found),
        "in_words": f"latents of {len(found)} clips differ by {errors[0] / spread:.1e} at most",
    }


def train(context: Context) -> dict[str, Any]:
    """train.py with float32 and bf16: losses on the device beside those on the CPU."""
    rows: dict[str, list[float]] = {}
    for precision in ("fp32", "bf16"):
        for where in ("cpu", "device"):
            rows[f"{precision} {where}"] = _trained(context, precision, cpu=where == "cpu")
    context.note(losses=rows)
    fp32 = _furthest(rows["fp32 device"], rows["fp32 cpu"])
    context.check("float32 losses", fp32, FP32_LOSS, "largest relative difference of a step; TF32 is off")
    rounding = _furthest(rows["bf16 cpu"], rows["fp32 cpu"])
    bf16 = _furthest(rows["bf16 device"], rows["fp32 cpu"])
    why = f"{BF16_TIMES:g} times what the CPU's own bf16 losses differ by from its float32 ones"
    context.check("bf16 losses", bf16, BF16_TIMES * rounding, why)
    steps = len(rows["fp32 device"])
    return {
        "in_words": f"{steps} steps: losses differ by {fp32:.1e} in float32, {bf16:.1e} in bf16 (CPU {rounding:.1e})"
    }


def resume(context: Context) -> dict[str, Any]:
    """A run that stops half way and goes on, beside an unbroken one, on the device: the same bits."""
    whole = _run_folder(context, "fp32", cpu=False)
    losses = _trained(context, "fp32", cpu=False)
    steps = len(losses)
    again = _train(context, "again", "fp32", cpu=False)
    halves = _train(context, "halves", "fp32", f"stop_after={steps // 2}", cpu=False)
    assert len(halves) == steps // 2, f"it stopped after {len(halves)} steps"
    halves = _train(context, "halves", "fp32", cpu=False)
    runs = whole.parent
    repeatable = again == losses and _same_checkpoint(whole, runs / "again", steps)
    context.note(two_unbroken_runs_are_equal=repeatable)
    why = "randomness goes by position, so that only kernels whose sums have no order could part two runs"
    context.require("losses, bit for bit", halves == losses, why)
    context.require("checkpoint, bit for bit", _same_checkpoint(whole, runs / "halves", steps), why)
    return {
        "in_words": f"stopped at {steps // 2} of {steps}; two unbroken runs are {'' if repeatable else 'NOT '}equal"
    }


def sample(context: Context) -> dict[str, Any]:
    """sample.py on the device and on the CPU: the same prompt and seed, frame by frame."""
    videos = {}
    for where in ("cpu", "device"):
        out = context.work / f"samples_{where}"
        shutil.rmtree(out, ignore_errors=True)
        words = (f"weights={BASE}", f"prompt={PROMPT}", f"out={out}", "precision=fp32", "steps=4")
        kind = "cpu" if where == "cpu" else _kind(context)
        context.note(**{f"seconds on {where}": context.verb("sample.py", *words, f"device={kind}", cpu=where == "cpu")})
        (file,) = out.glob("*.mp4")
        videos[where] = iio.imread(file).astype(np.float64)
    error = float(np.mean((videos["device"] - videos["cpu"]) ** 2))
    decibels = 10 * np.log10(255**2 / max(error, 1e-4))
    why = f"mean squared error of grey levels: that of a PSNR of {FRAMES_DB:g} dB"
    context.check("frames", error, 255**2 / 10 ** (FRAMES_DB / 10), why)
    context.require("something is shown", bool(videos["device"].std() > 5), "grey levels spread by more than 5")
    return {"psnr_db": decibels, "in_words": f"frames at {decibels:.0f} dB of the CPU's"}


def _kind(context: Context) -> str:
    return "cuda" if context.device.type == "cuda" else "cpu"


def _videos(context: Context) -> Path:
    """Video shards of procedural clips, made once."""
    out = context.work / "videos"
    if not (out / "manifest.json").is_file():
        count = 6 if context.small else 24
        make_footage(context.work / "footage", num_videos=count, num_images=0, size=64)
        context.verb("shard.py", f"source={context.work / 'footage'}", f"out={out}", cpu=True)
    return out


def _latents(context: Context, cpu: bool) -> Path:
    """Latent shards, encoded on the CPU or on the device, once each."""
    out = context.work / ("latents_cpu" if cpu else "latents_device")
    if not (out / "manifest.json").is_file():
        words = (f"shards={_videos(context)}", f"out={out}", f"weights={BASE}", "precision=fp32", "report=none")
        context.verb("encode.py", *words, f"device={'cpu' if cpu else _kind(context)}", cpu=cpu)
    return out


def _clips(folder: Path) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, latents and text of every clip of a folder."""
    data, found = LatentData(shards=folder, holdout=0.0, caption_dropout=0.0), []
    for number in range(len(data.buckets)):
        batch = data.load([number], [number])
        found.append((batch.ids[0], batch.latents_BCTHW[0], batch.text_BLD[0]))
    return found


def _steps(context: Context) -> int:
    return 6 if context.small else 30


def _run_folder(context: Context, precision: str, cpu: bool) -> Path:
    return context.work / "runs" / f"{precision}_{'cpu' if cpu else 'device'}"


def _trained(context: Context, precision: str, *, cpu: bool) -> list[float]:
    """The losses of an unbroken run, which is made if an earlier stage has not made it."""
    folder = _run_folder(context, precision, cpu)
    if (folder / "metrics.jsonl").is_file() and len(losses := read_losses(folder)) == _steps(context):
        return losses
    return _train(context, folder.name, precision, cpu=cpu)


def _train(context: Context, run: str, precision: str, *more: str, cpu: bool) -> list[float]:
    """train.py under a name of its own; its losses."""
    shards = _latents(context, cpu=True)
    what = ("expert=low_noise", f"weights={BASE}", f"data.shards={shards}", f"precision={precision}", f"run={run}")
    how = (f"steps={_steps(context)}", "batch_size=8", "optimizer.lr=1e-3", "data.holdout=0")
    seconds = context.verb("train.py", *what, *how, "tracker=jsonl", "check_expert=off", *more, cpu=cpu)
    context.note(**{f"seconds of {run}": seconds})
    return read_losses(context.work / "runs" / run)


def _furthest(losses: list[float], reference: list[float]) -> float:
    """The largest relative difference of a step."""
    pairs = zip(losses, reference, strict=True)
    return max(abs(mine - theirs) / abs(theirs) for mine, theirs in pairs)


def _same_checkpoint(one: Path, other: Path, step: int) -> bool:
    """True if weights and optimizer state of two checkpoints are the same bits."""
    tensors = [_tensors(run / "checkpoints" / f"step_{step:06d}") for run in (one, other)]
    return tensors[0].keys() == tensors[1].keys() and all(
        torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0]
    )


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by its file's place in it and its name."""
    files = sorted(checkpoint.rglob("*.safetensors"))
    assert files, f"{checkpoint} holds no tensors"
    return {
        f"{file.relative_to(checkpoint)}/{name}": tensor
        for file in files
        for name, tensor in read_file(file)[0].items()
    }
