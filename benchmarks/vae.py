"""Wan-VAE beside diffusers' AutoencoderKLWan: python benchmarks/vae.py [--pairs 5] [--shapes VAE-S,VAE-5B] [--flat]

Both sides get the same random weights and the same clip (float32, seed 0), each in a fresh process with one thread, in
the order ours, theirs, theirs, ours. Before anything counts, the outputs must agree within 1e-5 of the largest value.
Reported are CPU seconds of the call, the peak of the process's memory during it, and that peak without what the process
held when the call began (libraries, weights, input).
--flat  also: the same peak of ours at 17, 33 and 65 frames of 64x64
Writes vae.json after every pair; runs are added to those that it has, so delete it when the code has changed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

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
SIDES, PARTS, FLAT = ("ours", "theirs"), ("encode", "decode"), ((17, 64, 64), (33, 64, 64), (65, 64, 64))
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
            ("theirs", "encode"): lambda: vae.encode(x).latent_dist.mode(),
            ("theirs", "decode"): lambda: vae.decode(denormalised(vae, x)).sample,
        }[side, part]
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before, began = status("VmRSS"), time.process_time()
        result = call()
        took, peak = time.process_time() - began, status("VmHWM")
        if side == "theirs" and part == "encode":
            mean, std = (torch.tensor(getattr(vae.config, f"latents_{what}")) for what in ("mean", "std"))
            result = (result - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)
    torch.save(result.clone(), out)
    print(json.dumps({"cpu_seconds": took, "peak_mb": peak, "added_mb": peak - before}))


def denormalised(vae: Any, latents: Any) -> Any:
    """Latents as diffusers' decoder takes them."""
    import torch

    mean, std = (torch.tensor(getattr(vae.config, f"latents_{what}")) for what in ("mean", "std"))
    return latents * std.view(1, -1, 1, 1, 1) + mean.view(1, -1, 1, 1, 1)


def status(field: str) -> float:
    """A figure of this process's memory, in MB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def run(side: str, shape: str, part: str, clip: tuple[int, int, int], out: Path) -> dict[str, float]:
    """One call in a process of its own."""
    words = [sys.executable, __file__, "--child", side, shape, part, ",".join(map(str, clip)), str(out)]
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    said = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(said.stdout.splitlines()[-1])
    return found


def difference(first: Path, second: Path) -> float:
    """The largest difference of two results, as a share of the largest value."""
    import torch

    mine, theirs = torch.load(first).double(), torch.load(second).double()
    return float((mine - theirs).abs().max() / theirs.abs().max())


def compare(shape: str, part: str, number: int, scratch: Path) -> dict[str, Any]:
    """One pair of runs, whose order turns round with its number."""
    _, clip = SHAPES[shape]
    found: dict[str, Any] = {}
    for side in SIDES if number % 2 == 0 else reversed(SIDES):
        found[side] = run(side, shape, part, clip, scratch / side)
        print(shape, part, side, {key: round(value, 2) for key, value in found[side].items()}, flush=True)
    found["difference"] = difference(scratch / "ours", scratch / "theirs")
    apart = found["difference"]
    assert apart <= CLOSE, f"{shape} {part}: the sides differ by {apart:.1e}, so their times say nothing"
    return found


def ratios(pairs: list[dict[str, Any]]) -> dict[str, float]:
    """Ours over theirs: the median over the pairs."""
    each = {key: [pair["ours"][key] / pair["theirs"][key] for pair in pairs] for key in pairs[0]["ours"]}
    return {key: round(statistics.median(values), 3) for key, values in each.items()}


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
    results: dict[str, Any] = json.loads(given.out.read_text(encoding="utf-8")) if given.out.is_file() else {}
    results |= {"date": time.strftime("%Y-%m-%d"), "machine": f"{platform.machine()}, 1 thread, float32"}
    with tempfile.TemporaryDirectory() as folder:
        for shape, part in itertools.product(given.shapes.split(","), given.parts.split(",")):
            row = results.setdefault(f"{shape} {part}", {"clip": SHAPES[shape][1], "ratios": {}, "pairs": []})
            for _ in range(given.pairs):
                row["pairs"].append(compare(shape, part, len(row["pairs"]), Path(folder)))
                row["ratios"] = ratios(row["pairs"])
                given.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
            if given.flat:
                peaks = [run("ours", shape, part, clip, Path(folder) / "flat")["added_mb"] for clip in FLAT]
                row["added_mb_at_17_33_65_frames"] = [round(peak) for peak in peaks]
                given.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
            print(shape, part, row["ratios"], flush=True)


if __name__ == "__main__":
    main()
