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
from wantrain.data import LatentData
from wantrain.demo.footage import make_footage
from wantrain.models.formats.weights import read_file

BASE = ROOT / "assets" / "wan-tiny"
PROMPT = "a purple triangle moving left on a light background"

# Tolerances. What rounding alone does was measured between two instruction sets of one CPU (AVX-512 and SSE4).
#: Largest relative difference of a step's loss in float32. Two instruction sets: 2e-7 in thirty steps; two processes:
#: up to 1e-5 in fifty (docs/numerics.md). TF32 would part by about 5e-3, an eighth of bf16.
FP32_LOSS = 1e-4
#: Largest difference of bf16 losses, as a share of what bf16 itself costs on the CPU (its losses beside its float32
#: ones: 4e-2). Two instruction sets: 4 % of that. A device that really computed in float32: all of it.
BF16_SHARE = 0.5
#: Share of encoded values that may be stored as another bf16 number, and by how many of its steps. Two instruction
#: sets: 0.06 %, one step. TF32 errs by about a tenth of a step, so that about a tenth would differ.
ENCODED_SHARE, ENCODED_STEPS = 0.01, 1.0
#: Mean squared error of sampled frames, in grey levels: a PSNR of 40 dB. Two instruction sets: 0.
FRAMES = 255**2 / 10**4


def encode(context: Context) -> dict[str, Any]:
    """encode.py on the device and on the CPU: latents and texts of every clip."""
    own, reference = (_latents(context, cpu) for cpu in (False, True))
    found, expected = _clips(own), _clips(reference)
    context.require("the same clips", found.keys() == expected.keys() and len(found) > 0, "the same shards, cut alike")
    errors = {}
    for number, what in enumerate(("latents", "texts")):
        mine, theirs = (torch.cat([clips[name][number].flatten() for name in expected]) for clips in (found, expected))
        # bf16 keeps 8 bits: neighbours are 2^-7 of the power of two below them apart.
        step = torch.exp2(torch.maximum(mine.abs(), theirs.abs()).log2().floor() - 7)
        errors[what] = (mine != theirs).double().mean().item()
        context.check(
            f"{what} that differ", errors[what], ENCODED_SHARE, "a share; float32 without TF32, stored in bf16"
        )
        furthest = torch.where(mine == theirs, 0.0, (mine - theirs).abs() / step).max().item()
        context.check(f"{what}, how far", furthest, ENCODED_STEPS, "in steps of the bf16 that is stored")
    words = ", ".join(f"{error:.3%} of {what}" for what, error in errors.items())
    return {"clips": len(found), "in_words": f"{len(found)} clips: {words} differ by a step of bf16"}


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
    bf16 = _furthest(rows["bf16 device"], rows["bf16 cpu"])
    why = f"{BF16_SHARE:g} times what the CPU's own bf16 losses differ by from its float32 ones"
    context.check("bf16 losses", bf16, BF16_SHARE * rounding, why)
    steps = len(rows["fp32 device"])
    words = f"losses differ by {fp32:.1e} in float32, by {bf16:.1e} in bf16, which itself costs {rounding:.1e}"
    return {"in_words": f"{steps} steps: {words}"}


def resume(context: Context) -> dict[str, Any]:
    """A run that stops half way and goes on, beside an unbroken one, on the device: the same bits."""
    whole = _run_folder(context, "fp32", cpu=False)
    losses = _trained(context, "fp32", cpu=False)
    steps, runs = len(losses), whole.parent
    for left in ("again", "halves"):
        shutil.rmtree(runs / left, ignore_errors=True)
    again = _train(context, "again", "fp32", cpu=False)
    halves = _train(context, "halves", "fp32", f"stop_after={steps // 2}", cpu=False)
    assert len(halves) == steps // 2, f"it stopped after {len(halves)} steps"
    halves = _train(context, "halves", "fp32", cpu=False)
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
        context.note(
            **{f"seconds on {where}": context.command("sample.py", *words, f"device={kind}", cpu=where == "cpu")}
        )
        (file,) = out.glob("*.mp4")
        videos[where] = iio.imread(file).astype(np.float64)
    error = float(np.mean((videos["device"] - videos["cpu"]) ** 2))
    context.check("frames", error, FRAMES, "mean squared error of grey levels: that of a PSNR of 40 dB")
    context.require("something is shown", bool(videos["device"].std() > 5), "grey levels spread by more than 5")
    return {"in_words": f"frames differ from the CPU's by {error:.2g} squared grey levels"}


def _kind(context: Context) -> str:
    return "cuda" if context.device.type == "cuda" else "cpu"


def _videos(context: Context) -> Path:
    """Video shards of procedural clips, made once."""
    out = context.work / "videos"
    if not (out / "manifest.json").is_file():
        count = 6 if context.small else 24
        make_footage(context.work / "footage", num_videos=count, num_images=0, size=64)
        context.command("shard.py", f"source={context.work / 'footage'}", f"out={out}", cpu=True)
    return out


def _latents(context: Context, cpu: bool) -> Path:
    """Latent shards, encoded on the CPU or on the device, once each."""
    out = context.work / ("latents_cpu" if cpu else "latents_device")
    if not (out / "manifest.json").is_file():
        words = (f"shards={_videos(context)}", f"out={out}", f"weights={BASE}", "precision=fp32", "report=none")
        # That the VAE computes in float32 is encode.py's own doing, and is what is checked here.
        context.command("encode.py", *words, f"device={'cpu' if cpu else _kind(context)}", cpu=cpu, tf32=True)
    return out


def _clips(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Latents and text of every clip of a folder, by name."""
    data = LatentData(shards=folder, holdout=0.0, caption_dropout=0.0)
    batches = [data.load([number], [number]) for number in range(len(data.buckets))]
    return {batch.ids[0]: (batch.latents_BCTHW[0], batch.text_BLD[0]) for batch in batches}


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
    how = (f"steps={_steps(context)}", "batch_size=8", "data.holdout=0")
    seconds = context.command("train.py", *what, *how, "tracker=jsonl", "check_expert=off", *more, cpu=cpu)
    context.note(**{f"seconds of {run}": seconds})
    return read_losses(context.work / "runs" / run)


def _furthest(losses: list[float], reference: list[float]) -> float:
    """The largest relative difference of a step; no number where one of them is none."""
    mine, theirs = np.array(losses, dtype=float), np.array(reference, dtype=float)
    return float(np.max(np.abs(mine - theirs) / np.abs(theirs)))


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
