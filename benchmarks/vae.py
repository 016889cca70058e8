"""Wan-VAE beside diffusers' AutoencoderKLWan: python benchmarks/vae.py [--pairs 5] [--shapes VAE-S,VAE-5B] [--flat]

Both sides get the same random weights and the same clip (float32, seed 0), each in a fresh process with one thread, in
the order ours, theirs, theirs, ours. The outputs must agree within 1e-5 of the largest value, or the timing is void.
Ours holds the half that is used, as encode.py and sample.py load it; diffusers' class has no such way, and holds both.
Reported are CPU seconds of the call, the peak of the process's memory during it, and that peak without what the process
held when the call began (libraries, weights, input; memory that was freed before is given back first).
--flat  also: the same of ours at 17, 33 and 65 frames of 64x64, with the allocator as it is, and with glibc told to
        map every block above 1 MB by itself (MALLOC_MMAP_THRESHOLD_), so that none is a hole between others
Writes vae.json after every pair; pairs are added to those that it has, so delete it when the code has changed.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import result

ROOT = Path(__file__).resolve().parent.parent
#: Keywords of the VAEs beyond the defaults, and the clip: frames, height, width.
SHAPES: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "VAE-S": ({}, (17, 128, 128)),
    "VAE-5B": (
        {
            "base_dim": 160,
            "decoder_base_dim": 256,
            "z_dim": 48,
            "is_residual": True,
            "patch_size": 2,
            "latents_mean": (0.0,) * 48,
            "latents_std": (1.0,) * 48,
        },
        (17, 128, 128),
    ),
}
SIDES, PARTS, FLAT = ("ours", "diffusers"), ("encode", "decode"), ((17, 64, 64), (33, 64, 64), (65, 64, 64))
#: What is measured: its unit, and the goal for ours over theirs.
MEASURES: dict[str, tuple[str, float | None]] = {
    "CPU seconds": ("CPU s", 0.9),
    "peak memory": ("MB", 0.8),
    "memory added": ("MB", None),
}
#: Environments of --flat, by what is said of them.
ALLOCATORS: dict[str, dict[str, str]] = {"": {}, ", blocks mapped": {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}}
#: Largest difference from diffusers, as a share of the largest value.
CLOSE = 1e-5


def child(side: str, shape: str, part: str, clip: tuple[int, int, int], out: Path) -> None:
    """One call of one side: prints what it took, and saves what it gave."""
    import torch

    torch.set_num_threads(1)
    keywords, _ = SHAPES[shape]
    if side == "ours":
        from wantrain.models import WanVAE

        vae: Any = WanVAE(**keywords)
    else:
        from diffusers import AutoencoderKLWan

        squares = {} if shape == "VAE-S" else {"in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
        vae = AutoencoderKLWan(**keywords, **squares)
    vae.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(vae.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.1 * noise if name.endswith("gamma") else noise / parameter[0].numel() ** 0.5)
    if side == "ours":
        vae.keep_only({"encode": "encoder", "decode": "decoder"}[part])  # as encode.py and sample.py load it
    frames, height, width = clip
    channels, stride = (16, 8) if shape == "VAE-S" else (48, 16)
    if part == "encode":
        x = torch.rand(1, 3, frames, height, width, generator=generator) * 2 - 1
    else:
        x = torch.randn(1, channels, 1 + (frames - 1) // 4, height // stride, width // stride, generator=generator)
    with torch.no_grad():
        call = {
            ("ours", "encode"): lambda: vae.encode(x),
            ("ours", "decode"): lambda: vae.decode(x),
            ("diffusers", "encode"): lambda: vae.encode(x).latent_dist.mode(),
            ("diffusers", "decode"): lambda: vae.decode(denormalised(vae, x)).sample,
        }[side, part]
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before, began = status("VmRSS"), time.process_time()
        output = call()
        took, peak = time.process_time() - began, status("VmHWM")
        if side == "diffusers" and part == "encode":
            mean, std = (torch.tensor(getattr(vae.config, f"latents_{what}")) for what in ("mean", "std"))
            output = (output - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)
    torch.save(output.clone(), out)
    print(json.dumps({"CPU seconds": took, "peak memory": peak, "memory added": peak - before}))


def denormalised(vae: Any, latents: Any) -> Any:
    """Latents as diffusers' decoder takes them."""
    import torch

    mean, std = (torch.tensor(getattr(vae.config, f"latents_{what}")) for what in ("mean", "std"))
    return latents * std.view(1, -1, 1, 1, 1) + mean.view(1, -1, 1, 1, 1)


def status(field: str) -> float:
    """A figure of this process's memory, in MB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def run(side: str, shape: str, part: str, clip: tuple[int, int, int], out: Path, **variables: str) -> dict[str, float]:
    """One call in a process of its own, with these variables in its environment."""
    words = [sys.executable, __file__, "--child", side, shape, part, ",".join(map(str, clip)), str(out)]
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **variables}
    said = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(said.stdout.splitlines()[-1])
    return found


def difference(first: Path, second: Path) -> float:
    """The largest difference of two results, as a share of the largest value."""
    import torch

    mine, theirs = torch.load(first).double(), torch.load(second).double()
    return float((mine - theirs).abs().max() / theirs.abs().max())


def compare(shape: str, part: str, number: int, scratch: Path) -> dict[str, Any]:
    """One pair of runs, whose order turns round with its number: of each side what was measured, and `difference`."""
    _, clip = SHAPES[shape]
    found: dict[str, Any] = {}
    for side in SIDES if number % 2 == 0 else reversed(SIDES):
        found[side] = run(side, shape, part, clip, scratch / side)
        print(shape, part, side, {key: round(value, 2) for key, value in found[side].items()}, flush=True)
    return {**found, "difference": difference(*(scratch / side for side in SIDES))}


def with_pair(own: dict[str, Any] | None, pair: dict[str, Any]) -> dict[str, Any]:
    """A case with one pair more."""
    measures, worst = {}, pair["difference"]
    if own is not None:
        worst = max(worst, own["errors"]["output"]["measured"])
    for name, (unit, goal) in MEASURES.items():
        before = own["measures"][name]["sides"] if own else {side: [] for side in SIDES}
        sides = {side: [*before[side], pair[side][name]] for side in SIDES}
        measures[name] = result.measure(unit, sides, at_most=goal)
    return result.case(measures, {"output": (worst, CLOSE)})


def main() -> None:
    """Compare, print, write."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--pairs", type=int, default=5)
    asked.add_argument("--shapes", default=",".join(SHAPES))
    asked.add_argument("--parts", default=",".join(PARTS))
    asked.add_argument("--flat", action="store_true")
    asked.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    asked.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    given = asked.parse_args()
    if given.child:
        side, shape, part, clip, out = given.child
        frames, height, width = map(int, clip.split(","))
        child(side, shape, part, (frames, height, width), Path(out))
        return
    stored: dict[str, Any] = json.loads(given.out.read_text(encoding="utf-8")) if given.out.is_file() else {}
    cases, more = stored.get("cases", {}), stored.get("more", {})
    about: dict[str, Any] = {
        "protocol": "a fresh process per call, in the order ours, diffusers, diffusers, ours",
        "shapes": {shape: {"keywords": keywords, "clip": clip} for shape, (keywords, clip) in SHAPES.items()},
        "libraries": ("torch", "diffusers"),
        "threads": 1,
    }

    def store() -> None:
        found = result.record(__file__, cases=cases, more=more, **about)
        given.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as scratch:
        for shape, part in itertools.product(given.shapes.split(","), given.parts.split(",")):
            name = f"{shape} {part}"
            for _ in range(given.pairs):
                before = cases.get(name)
                count = len(before["measures"]["CPU seconds"]["sides"]["ours"]) if before else 0
                cases[name] = with_pair(before, compare(shape, part, count, Path(scratch)))
                store()
            if given.flat:
                for how, variables in ALLOCATORS.items():
                    peaks = [run("ours", shape, part, clip, Path(scratch) / "flat", **variables) for clip in FLAT]
                    own = more.setdefault(f"MB added at 17, 33 and 65 frames{how}", {})
                    own[name] = [round(peak["memory added"]) for peak in peaks]
                store()
            if name in cases:
                print("\n".join(result.shown({"cases": {name: cases[name]}})), flush=True)


if __name__ == "__main__":
    main()
