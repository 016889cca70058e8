"""A training step on a CPU, beside diffusers' transformer: python benchmarks/step.py [--pairs 3] [--only LoRA]

The same weights (W-S: 6 layers, 384 wide, 14.8 M parameters, float32), one sample of 2,048 tokens and 512 rows of
text, in the same plain accelerate loop: forward, backward, clipping, AdamW. Trained as a whole and by a LoRA of rank
16 beside all linear layers of the blocks, each with all activations kept and with every block computed again in the
backward. Each run is a process of its own; the two sides take turns, and each pair begins with the other one.
Reported are the process's CPU seconds per step without the first, and the peak of its resident memory above what it
had before the first step. Both keep freed memory for the next step, as train.py does on a CPU. First the output and
every gradient of both sides are held against each other: if they differ, the timing is void. Writes step.json after
every case; with --only the other cases stay as they are stored: `more` says when each was measured, `command` and
`machine` are those of the last run.
A LoRA is also measured with compile=blocks on our side, and with both sides compiled, by name alone; the compiler's
work is in the first step, and in the memory. Cases "beside DiffSynth-Studio" hold its transformer, with peft's LoRA
as its trainer adds it, against ours in the same loop, without goals. They are measured by name alone, in an
environment where `pip install diffsynth` was done.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import peers
import result
import torch
from torch import Tensor, nn

WS: dict[str, Any] = {
    "num_attention_heads": 3, "attention_head_dim": 128, "text_dim": 4096, "ffn_dim": 1024, "num_layers": 6,
}  # fmt: skip
RANK = 16
#: The other sides, of which the second takes part in the cases that name it.
PEERS = "diffusers", "DiffSynth-Studio"
#: Goals for ours over theirs.
CASES: dict[str, dict[str, float]] = {
    "full": {"CPU s": 1.0, "MB": 0.8},
    "full, recomputed": {"CPU s": 1.0},
    "LoRA": {"CPU s": 0.95, "MB": 0.65},
    "LoRA, recomputed": {"CPU s": 1.0},
}
#: What is measured by name alone: ours with compile=blocks, and both sides compiled; and the second of PEERS.
OURS_COMPILED, BOTH_COMPILED = "LoRA, ours compiled", "LoRA, both compiled"
OTHERS: dict[str, dict[str, float]] = {OURS_COMPILED: {"CPU s": 0.95}, BOTH_COMPILED: {}}
OTHERS |= {f"{case}, beside {PEERS[1]}": {} for case in CASES}
#: What is measured, and its unit.
MEASURES = {"seconds per step": "CPU s", "memory above the start": "MB"}
#: Largest difference of an output or a gradient, as a share of its largest value.
CLOSE = 1e-5


def build_ours(folder: Path, case: str) -> nn.Module:
    """This project's transformer."""
    from wantrain.models import adapters, load_transformer
    from wantrain.models.activation_policy import ActivationPolicy
    from wantrain.models.compiling import BlockCompiler

    module = load_transformer(folder, dtype=torch.float32)
    if "LoRA" in case:
        own = adapters.AdapterSettings(rank=RANK, alpha=RANK, targets="attention+ffn")
        adapters.inject(module, own, seed=0)
    module.run_block = ActivationPolicy("block" if "recomputed" in case else "none", blocks=WS["num_layers"])
    if case in {OURS_COMPILED, BOTH_COMPILED}:
        BlockCompiler().compile(module)
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
    if case == BOTH_COMPILED:
        module.compile_repeated_blocks()  # type: ignore[operator]
    return module


def build_diffsynth(folder: Path, case: str) -> nn.Module:
    """DiffSynth-Studio's transformer, with peft's LoRA."""
    ours: Any = build_ours(folder, case)
    module = peers.diffsynth_transformer(ours)
    module.recompute = "recomputed" in case
    return module


BUILD = {"ours": build_ours, PEERS[0]: build_theirs, PEERS[1]: build_diffsynth}


def sides(case: str) -> tuple[str, str]:
    """Whom a case compares."""
    return "ours", PEERS[PEERS[1] in case]


def resident(name: str) -> int:
    """Bytes of this process: VmRSS, or its peak, VmHWM."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Latents, noise and text of the sample that every run trains on."""
    random = torch.Generator().manual_seed(1)
    latents, noise = (torch.randn(1, 16, 8, 32, 32, generator=random) for _ in range(2))
    return latents, noise, 0.1 * torch.randn(1, 512, 4096, generator=random)


def run(side: str, case: str, folder: Path, steps: int) -> dict[str, Any]:
    """One process's steps."""
    from accelerate import Accelerator

    from wantrain.util import allocator

    allocator.keep_freed_memory()
    accelerator = Accelerator(cpu=True)
    module = BUILD[side](folder, case).train()
    (latents, noise, text), timestep = batch(), torch.tensor([700.0])
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module, optimizer = accelerator.prepare(module, torch.optim.AdamW(trained, lr=1e-4, fused=True))

    def forward(x: Tensor) -> Tensor:
        output = module(x, timestep, text)
        return output.sample if side == PEERS[0] else output

    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # a new peak
    before, losses, seconds = resident("VmRSS"), [], []
    for _ in range(1 + steps):
        start = time.process_time()
        loss = (forward(0.3 * latents + 0.7 * noise) - (noise - latents)).square().mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.process_time() - start)
    return {"CPU s": min(seconds[1:]), "MB": (resident("VmHWM") - before) / 1e6, "losses": losses}


def differences(case: str, folder: Path) -> dict[str, float]:
    """How far apart output and gradients of both sides are. At timestep 1: diffusers' angles of the time embedding are
    float32, ours float64, which differ by more than rounding at large timesteps.
    """
    ours: Any = build_ours(folder, case).train()
    for name, parameter in ours.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)  # at zero A would have no gradient
    theirs: Any
    if sides(case)[1] == PEERS[0]:
        theirs = peers.transformer(ours).train()
        if "recomputed" in case:
            theirs.enable_gradient_checkpointing()
        if case == BOTH_COMPILED:
            theirs.compile_repeated_blocks()
    else:
        theirs = peers.diffsynth_transformer(ours).train()
        theirs.recompute = "recomputed" in case
    latents, noise, text = batch()
    outputs = []
    for module in (ours, theirs):
        output = module(noise, torch.ones(1), text)
        output = getattr(output, "sample", output)
        (output - latents).square().mean().backward()
        outputs.append({"output": output.detach()})
    return {"output": peers.apart(*outputs)[0], "gradients": peers.apart(*peers.gradients(ours, theirs))[0]}


def apart(*words: str) -> dict[str, Any]:
    """What this script says in a process of its own."""
    command = [sys.executable, __file__, *words]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def compare(folder: Path, case: str, pairs: int, steps: int) -> dict[str, Any]:
    """Both sides of a case: held against each other, then timed turn by turn."""
    errors = {name: (error, CLOSE) for name, error in apart("--differences", case, str(folder)).items()}
    both = sides(case)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in both}
    for pair in range(pairs):
        for side in both if pair % 2 else reversed(both):
            runs[side].append(apart("--one", side, case, str(folder), str(steps)))
    first = [runs[side][0]["losses"][0] for side in both]
    errors["loss of the first step"] = abs(first[0] - first[1]) / first[1], CLOSE
    goals = CASES | OTHERS
    measures = {
        name: result.measure(
            unit, {side: [run[unit] for run in runs[side]] for side in both}, at_most=goals[case].get(unit)
        )
        for name, unit in MEASURES.items()
    }
    return result.case(measures, errors)


def main() -> None:
    """Measure all cases, compare with the goals, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument(
        "--only", nargs="+", choices=CASES | OTHERS, default=list(CASES), help="cases that are measured"
    )
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--differences", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        side, case, folder, steps = args.one
        print(json.dumps(run(side, case, Path(folder), int(steps))))
        return
    if args.differences:
        print(json.dumps(differences(args.differences[0], Path(args.differences[1]))))
        return
    from wantrain.models import WanTransformer
    from wantrain.models.formats.weights import renamed_to_diffusers, write_part
    from wantrain.util.files import write_json

    protocol = "a process per run, sides in turn, each pair in the other order; least CPU seconds of the steps but one"
    shapes = {"transformer": WS, "latents": [1, 16, 8, 32, 32], "text": [1, 512, 4096], "rank": RANK}
    path = Path(__file__).with_suffix(".json")
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"cases": {}}
    cases: dict[str, Any] = {name: own for name, own in stored["cases"].items() if name not in args.only}
    dates = {name: stored.get("more", {}).get("measured", {}).get(name, stored["date"]) for name in cases}
    found = result.record(
        __file__,
        protocol=protocol,
        shapes={**shapes, "dtype": "float32", "steps": args.steps},
        cases={},
        libraries=("torch", "diffusers", "diffsynth", "peft", "accelerate"),
        threads=torch.get_num_threads(),
    )
    with tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(0)
        model = WanTransformer(**WS)
        nn.init.normal_(model.head.head.weight, std=0.02)
        write_part(Path(scratch), model.config(), renamed_to_diffusers(model.state_dict()))
        for case in args.only:
            cases[case] = compare(Path(scratch), case, args.pairs, args.steps)
            print("\n".join(result.shown({"cases": {case: cases[case]}})), flush=True)
            dates[case] = found["date"]
            ordered = {name: cases[name] for name in CASES | OTHERS if name in cases}
            write_json(path, {**found, "cases": ordered, "more": {"measured": {name: dates[name] for name in ordered}}})


if __name__ == "__main__":
    main()
