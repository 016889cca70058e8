"""What a base in 8 or 4 bits costs: python benchmarks/quantize.py [--study [--folder DIR]] [--block]

            the error of weights, outputs and input gradients by kind of layer, for wan-tiny and its own activations;
            and what a product of low rank takes of it, for wan-tiny's weights and random ones of their shapes
--block     also for one block of A14B's sizes with random weights, and the seconds of making and using each layer
--study     a LoRA on wan-tiny over each base with three seeds and the same held-out clips: validation losses beside the
            bf16 base's, over its own base and over a bf16 base
--folder    where the runs of a study stay: one that was stopped goes on there
Prints tables in Markdown and writes quantize.json beside this file; what was not measured is kept in it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import re
import runpy
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from wantrain.demo.footage import make_footage
from wantrain.models import Base, WanTransformer
from wantrain.models.quantize import FORMATS, Format, QuantizedLinear, quantizable, quantize
from wantrain.util import distributed
from wantrain.util.files import write_json

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = f"weights={ROOT / 'assets/wan-tiny'}"
SEEDS, STEPS, RANK = (0, 1, 2), 320, 16
#: Rank of the product beside a weight, and the formats that are measured, by a short name.
LOW_RANK = 32
FORMS = {name: Format(name) for name in FORMATS} | {f"nf4_r{LOW_RANK}": Format("nf4", LOW_RANK)}
#: Latent frames, rows and columns of the block's clip: few tokens, as the errors do not depend on their number.
GRID = (2, 8, 8)
#: The demo's new object and some clips of what wan-tiny knows: (scenes, footage).
FOOTAGE = {"wug": {"num_videos": 32, "num_images": 0}, "plain": {"num_videos": 16, "num_images": 0, "seed": 3}}


def main() -> None:
    """Measure what was asked for, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block", action="store_true")
    parser.add_argument("--study", action="store_true")
    parser.add_argument("--folder", type=Path)
    options, out = parser.parse_args(), Path(__file__).with_suffix(".json")
    distributed.set_threads()
    results: dict[str, Any] = {}
    if options.study:
        with contextlib.nullcontext(options.folder) if options.folder else tempfile.TemporaryDirectory() as folder:
            results["study"] = study(Path(folder).resolve())
    else:
        model = Base(ROOT / "assets/wan-tiny").transformer("low_noise")
        results |= {"wan_tiny": errors(model, "wan-tiny"), "low_rank": spectra(model)}
    if options.block:
        torch.manual_seed(0)
        block = WanTransformer(num_layers=1)
        nn.init.normal_(block.head.head.weight, std=0.02)
        results["a14b_block"] = errors(block, "one A14B block")
    kept = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    write_json(out, kept | results)


def errors(model: WanTransformer, title: str) -> dict[str, Any]:
    """Relative errors against the float32 layers on the same inputs and output gradients, mean by kind of layer."""
    calls = recorded(model)
    print(f"\n{title}\n| layer | format | weight | output | gradient of the input | seconds to make, to compute |")
    print("|---" * 6 + "|")
    rows: dict[str, dict[str, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    for name in quantizable(model):
        kind = re.sub(r"^blocks\.\d+\.", "", name)
        x, grad = calls[name]
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        for form in ("bf16", *FORMS):
            rows[kind][form].append(layer_errors(layer, form, x, grad))
    table: dict[str, Any] = {}
    for kind, forms in rows.items():
        for form, found in forms.items():
            weight, output, gradient, make, compute = (mean(column) for column in zip(*found, strict=True))
            table.setdefault(kind, {})[form] = {"weight": weight, "output": output, "input_gradient": gradient}
            table[kind][form] |= {"seconds_to_make": make, "seconds_to_compute": compute}
            print(f"| {kind} | {form} | {weight:.2%} | {output:.2%} | {gradient:.2%} | {make:.3f}, {compute:.4f} |")
    return table


def layer_errors(layer: nn.Linear, form: str, x: Tensor, grad: Tensor) -> list[float]:
    """Errors of weight, output and input gradient over float32, and seconds of making and of one forward."""
    begin = time.perf_counter()
    if form == "bf16":
        with torch.no_grad():
            weight = layer.weight.bfloat16().float()
        other: nn.Module = nn.Linear(layer.in_features, layer.out_features, device="meta")
        other.load_state_dict({"weight": weight, "bias": layer.bias.detach()}, assign=True)
    else:
        other = QuantizedLinear(quantize(layer.weight, FORMS[form]), layer.bias, torch.float32)
        weight = other.weight
    made = time.perf_counter()
    found = []
    for each in (layer, other):
        inputs = x.clone().requires_grad_()
        started = time.perf_counter()
        y = each(inputs)
        seconds = time.perf_counter() - started
        found.append((y.detach(), torch.autograd.grad(y, inputs, grad)[0]))
    pairs = [(layer.weight.detach(), weight), *zip(*found, strict=True)]
    return [float((after - before).norm() / before.norm()) for before, after in pairs] + [made - begin, seconds]


def spectra(model: WanTransformer) -> dict[str, dict[str, float]]:
    """By shape, of the model's weights and of random ones: the share of the squared norm that the LOW_RANK largest
    singular values hold, and nf4's relative error with and without a product of that rank. Means over the layers.
    """
    weights: dict[str, list[Tensor]] = defaultdict(list)
    for name in quantizable(model):
        weight = model.get_parameter(f"{name}.weight").detach()
        weights[" x ".join(map(str, weight.shape))].append(weight)
    forms = {form: FORMS[form] for form in ("nf4", f"nf4_r{LOW_RANK}")}
    columns = [f"{LOW_RANK} largest singular values hold", *forms]
    print(f"\n| weights | {' | '.join(columns)} |\n{'|---' * 4}|")
    table: dict[str, dict[str, float]] = {}
    for shape, trained in weights.items():
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(weight.shape, generator=generator) for weight in trained]
        for kind, both in (("trained", trained), ("random", drawn)):
            squares = [torch.linalg.svdvals(weight) ** 2 for weight in both]
            found = [mean(float(each[:LOW_RANK].sum() / each.sum()) for each in squares)]
            for form in forms.values():
                pairs = [(weight, quantize(weight, form).dequantized(torch.float32)) for weight in both]
                found.append(mean(float((after - before).norm() / before.norm()) for before, after in pairs))
            table[f"{shape} {kind}"] = dict(zip(("share", *forms), found, strict=True))
            print(f"| {shape}, {kind} | {' | '.join(f'{value:.1%}' for value in found)} |")
    return table


def recorded(model: WanTransformer) -> dict[str, tuple[Tensor, Tensor]]:
    """The input of each linear layer in the blocks and the gradient of its output, for one clip of noise."""
    generator = torch.Generator().manual_seed(0)
    calls: dict[str, list[Tensor]] = defaultdict(list)
    hooks = []
    for name in quantizable(model):

        def keep(layer: nn.Module, args: Any, result: Tensor, name: str = name) -> None:
            calls[name].append(args[0].detach())
            result.register_hook(lambda grad: calls[name].append(grad))

        hooks.append(model.get_submodule(name).register_forward_hook(keep))
    model.requires_grad_(False)
    latents = torch.randn(1, model.in_channels, *GRID, generator=generator).requires_grad_()
    text = torch.randn(1, 16, model.text_dim, generator=generator).requires_grad_()
    answer = model(latents, torch.tensor([500.0]), text)
    (answer - latents.detach()).square().mean().backward()
    for hook in hooks:
        hook.remove()
    return {name: (x, grad) for name, (x, grad) in calls.items()}


def make_latents(folder: Path) -> None:
    """Draw the footage of a study in `folder`, and encode it to `folder`/latents, unless that is done."""
    if (folder / "latents" / "manifest.json").is_file():
        return
    for scenes, amount in FOOTAGE.items():
        make_footage(folder / "footage" / scenes, scenes=scenes, **amount)  # type: ignore[arg-type]
    command(folder, "shard.py", f"source={folder / 'footage'}", f"out={folder / 'videos'}")
    command(folder, "encode.py", f"shards={folder / 'videos'}", f"out={folder / 'latents'}", WEIGHTS)


def study(folder: Path) -> dict[str, Any]:
    """Validation losses of a LoRA after STEPS steps over each base, beside the bf16 base's with its seed; and of the
    same LoRA over a base of bf16, as it is used afterwards.
    """
    losses: dict[str, list[float]] = defaultdict(list)
    started: dict[str, list[float]] = defaultdict(list)
    used: dict[str, list[float]] = defaultdict(list)
    words = {name: [f"base.dtype={form.name}"] for name, form in FORMS.items()}
    words[f"nf4_r{LOW_RANK}"].append(f"base.low_rank={LOW_RANK}")
    make_latents(folder)
    for seed in SEEDS:
        for form, base in {"bf16": ["base.dtype=bf16"], **words}.items():
            run = f"{form}_{seed}"
            train(folder, run, seed, *base, f"adapter.rank={RANK}", f"adapter.alpha={RANK}")
            start, end = validated(folder, run, STEPS)
            started[form].append(start)
            losses[form].append(end)
            (kept,) = (folder / "runs" / run / "checkpoints" / f"step_{STEPS:06}").rglob("adapter.safetensors")
            train(folder, f"{run}_used", seed, f"adapter.init={kept}", "steps=1", "validation.every=1")
            used[form].append(validated(folder, f"{run}_used", 1)[0])
            said = f"{form} seed {seed}: {started[form][-1]:.5f} -> {losses[form][-1]:.5f}"
            print(f"{said}, over bf16 {used[form][-1]:.5f}", flush=True)
    beside = {name: against(found) for name, found in (("end", losses), ("used", used))}
    print(
        "\n| base | at the start | after training, by seed | against bf16 | the LoRA over a bf16 base, against bf16 |"
    )
    print("|---" * 5 + "|")
    for form, values in losses.items():
        shares = (", ".join(f"{share:+.2%}" for share in beside[name][form]) for name in ("end", "used"))
        print(
            f"| {form} | {mean(started[form]):.5f} | {', '.join(f'{v:.5f}' for v in values)} | {' | '.join(shares)} |"
        )
    about = {"steps": STEPS, "rank": RANK, "seeds": list(SEEDS)}
    losses_of = {"start": dict(started), "end": dict(losses), "used": dict(used)}
    return {**about, **losses_of, "against_bf16": beside["end"], "used_against_bf16": beside["used"]}


def against(losses: dict[str, list[float]]) -> dict[str, list[float]]:
    """Each loss over that of the bf16 base with the same seed, less one."""
    return {
        form: [ours / theirs - 1 for ours, theirs in zip(values, losses["bf16"], strict=True)]
        for form, values in losses.items()
    }


def validated(folder: Path, run: str, last: int) -> tuple[float, float]:
    """Mean held-out loss of a run at step 0 and at step `last`."""
    lines = (folder / "runs" / run / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for line in lines if (record := json.loads(line))["weights"] == "live"]
    assert (records[0]["step"], records[-1]["step"]) == (0, last)
    return tuple(torch.tensor(record["heldout"]).mean().item() for record in (records[0], records[-1]))  # type: ignore[return-value]


def train(folder: Path, run: str, seed: int, *given: str) -> None:
    """One LoRA; what is given wins over the study's settings."""
    settings = [f"data.shards={folder / 'latents'}", f"run={run}", f"seed={seed}"]
    settings += ["adapter=lora", "precision=bf16", f"steps={STEPS}"]
    settings += [
        "batch_size=4",
        "tracker=jsonl",
        "optimizer.lr=1e-3",
        f"validation.every={STEPS}",
        "validation.clips=8",
    ]
    settings += [WEIGHTS, "validation.points=8", "data.seed=0", f"checkpoint.every={STEPS}", "check_expert=off"]
    named = {words.partition("=")[0] for words in given}
    command(folder, "train.py", *(words for words in settings if words.partition("=")[0] not in named), *given)


def command(folder: Path, name: str, *given: str) -> None:
    """Run one of the commands in `folder`, inside this process: its imports would take longer than the training."""
    said = io.StringIO()
    before = sys.argv
    sys.argv = [str(ROOT / name), *given]
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise ValueError(f"{name} {' '.join(given)}\n{said.getvalue()}") from ended
    finally:
        sys.argv = before
        gc.collect()  # a process would release its run's lock when it ends


if __name__ == "__main__":
    main()
