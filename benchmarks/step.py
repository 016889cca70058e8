"""A training step on a CPU, beside diffusers' transformer in a plain loop: python benchmarks/step.py [--pairs 3]

The same weights (W-S: 6 layers, 384 wide, 14.8 M parameters, float32), one sample of 2,048 tokens and 512 rows of text:
forward, backward, clipping, AdamW. Trained as a whole and by a LoRA of rank 16 beside all linear layers of the blocks,
each with all activations kept and with every block computed again in the backward. Each run is a process of its own;
the two sides take turns, and each pair begins with the other one. Reported are the process's CPU seconds per step
without the first, the peak of its resident memory above what it had before the first step, and the medians of both over
the pairs. The losses of the first step must agree. Writes step.json.
"""

from __future__ import annotations

import argparse
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

import torch
from torch import Tensor, nn

WS: dict[str, Any] = {
    "num_attention_heads": 3, "attention_head_dim": 128, "text_dim": 4096, "ffn_dim": 1024, "num_layers": 6,
}  # fmt: skip
RANK, SIDES = 16, ("ours", "diffusers")
CASES = {
    "full": {"seconds": 1.0, "memory": 0.8},
    "full, recomputed": {"seconds": 1.0},
    "LoRA": {"seconds": 0.95, "memory": 0.65},
    "LoRA, recomputed": {"seconds": 1.0},
}


def build_ours(folder: Path, case: str) -> nn.Module:
    """This project's transformer."""
    from wantrain.models import adapters, load_transformer
    from wantrain.models.activation_policy import ActivationPolicy

    module = load_transformer(folder, dtype=torch.float32)
    if "LoRA" in case:
        own = adapters.AdapterSettings(rank=RANK, alpha=RANK, targets="attention+ffn")
        adapters.inject(module, own, seed=0)
    module.run_block = ActivationPolicy("block" if "recomputed" in case else "none", blocks=WS["num_layers"])
    return module


def build_theirs(folder: Path, case: str) -> nn.Module:
    """diffusers' transformer, with peft's LoRA."""
    from diffusers import WanTransformer3DModel
    from peft import LoraConfig

    module: nn.Module = WanTransformer3DModel.from_pretrained(folder)
    if "LoRA" in case:
        module.requires_grad_(False)
        names = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
        module.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names))  # type: ignore[operator]
    if "recomputed" in case:
        module.enable_gradient_checkpointing()  # type: ignore[operator]
    return module


def resident(name: str) -> int:
    """Bytes of this process: VmRSS, or its peak, VmHWM."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def run(side: str, case: str, folder: Path, steps: int) -> dict[str, Any]:
    """One process's steps."""
    module = (build_ours if side == "ours" else build_theirs)(folder, case).train()
    random = torch.Generator().manual_seed(1)
    latents, noise = (torch.randn(1, 16, 8, 32, 32, generator=random) for _ in range(2))
    text, timestep = 0.1 * torch.randn(1, 512, 4096, generator=random), torch.tensor([700.0])
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def forward(x: Tensor) -> Tensor:
        result = module(x, timestep, text)
        return result if side == "ours" else result.sample

    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # a new peak
    before, losses, seconds = resident("VmRSS"), [], []
    for _ in range(1 + steps):
        start = time.process_time()
        loss = (forward(0.3 * latents + 0.7 * noise) - (noise - latents)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.process_time() - start)
    return {"seconds": min(seconds[1:]), "memory": resident("VmHWM") - before, "losses": losses}


def measure(folder: Path, case: str, pairs: int, steps: int) -> dict[str, Any]:
    """Both sides of a case, turn by turn."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for pair in range(pairs):
        for side in SIDES if pair % 2 else reversed(SIDES):
            command = [sys.executable, __file__, "--one", side, case, str(folder), str(steps)]
            output = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout
            runs[side].append(json.loads(output.splitlines()[-1]))
    first = [runs[side][0]["losses"][0] for side in SIDES]
    assert abs(first[0] - first[1]) < 1e-5 * first[1], f"{case}: the sides are not one model, losses {first}"
    row: dict[str, Any] = {"runs": runs, "ratio": {}}
    for key in ("seconds", "memory"):
        ratios = [mine[key] / other[key] for mine, other in zip(*(runs[side] for side in SIDES), strict=True)]
        row["ratio"][key] = {"median": statistics.median(ratios), "each": ratios}
    return row


def main() -> None:
    """Measure all cases, compare with the goals, and write the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--one", nargs=4)
    args = parser.parse_args()
    if args.one:
        side, case, folder, steps = args.one
        print(json.dumps(run(side, case, Path(folder), int(steps))))
        return
    from wantrain.models import WanTransformer
    from wantrain.models.formats.weights import renamed_to_diffusers, write_part
    from wantrain.util.files import write_json

    result: dict[str, Any] = {"torch": torch.__version__, "machine": platform.processor(), "goals": CASES, "cases": {}}
    result |= {"threads": torch.get_num_threads(), "pairs": args.pairs, "steps": args.steps}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = WanTransformer(**WS)
        nn.init.normal_(model.head.head.weight, std=0.02)
        write_part(Path(folder), model.config(), renamed_to_diffusers(model.state_dict()))
        for case, goals in CASES.items():
            row = result["cases"][case] = measure(Path(folder), case, args.pairs, args.steps)
            for key, ratio in row["ratio"].items():
                each = ", ".join(f"{value:.2f}" for value in ratio["each"])
                print(f"{case}, {key}: {ratio['median']:.3f} ({each}), goal {goals.get(key, '-')}", flush=True)
            write_json(Path(__file__).with_suffix(".json"), result)


if __name__ == "__main__":
    main()
