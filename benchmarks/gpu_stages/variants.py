"""Eight blocks of an A14B expert with a LoRA, in other ways: clips of more tokens, a base in fewer bits, weights that
wait on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import result
import torch

from gpu_stages import sizes
from gpu_stages.context import Context, measure, product_rate, release
from gpu_stages.pairs import Side, in_turn, in_words
from gpu_stages.transformer import expert, forward_backward, passes
from wantrain.models import WanTransformer
from wantrain.models.offload import ModuleOffloader, blocks_to_swap
from wantrain.models.quantize import FORMATS, Format, check_library, quantize

#: Of eight blocks, those that wait on the host.
SWAPPED = 6
#: Largest difference of a weight dequantised on the card from the CPU's, in steps of bf16: both round once.
DEQUANTIZED = 1.0


def by_tokens(context: Context) -> dict[str, Any]:
    """Seconds at 7,800 to 75,600 tokens, and how they grow: a + b n + c n^2, beside the operations' own b and c."""
    module = expert(context, 8, "lora", recompute="attention")
    rate = product_rate(context.device, 256 if context.small else 8192)
    rows = []
    for bucket in sizes.scale(context.small):
        row = forward_backward(context, module, bucket, repeats=1)
        row["floor"] = row["tflop"]["executed"] * 1e12 / rate / row["seconds"]
        rows.append({**row, "predicted": context.predicted(f"{row['tokens']} tokens").get("ours")})
        context.note(rows=rows)
    tokens = [row["tokens"] for row in rows]
    found = fitted(tokens, [row["seconds"] for row in rows])
    counted = fitted(tokens, [row["tflop"]["executed"] for row in rows])
    context.note(fit={"a, b, c": found, "c over b": found[2] / found[1] if found[1] else None})
    context.note(counted={"a, b, c": counted, "c over b": counted[2] / counted[1]})
    said = ", ".join(f"{row['tokens']}: {row['seconds']:.3g} s, {row['floor']:.0%} of the floor" for row in rows)
    return {"in_words": said}


def fitted(tokens: list[int], values: list[float]) -> tuple[float, float, float]:
    """a, b and c of values = a + b n + c n^2, by least squares of relative errors."""
    n, y = np.array(tokens, dtype=float), np.array(values)
    a, b, c = np.linalg.lstsq(np.stack([n**0, n, n**2], axis=1) / y[:, None], np.ones_like(y), rcond=None)[0]
    return float(a), float(b), float(c)


def quantized(context: Context) -> dict[str, Any]:
    """base.dtype and base.low_rank: what each format costs beside bf16, and whether the card stores and reads the CPU's
    values.
    """
    bucket = sizes.clips(context.small)["17 frames"]
    modules: dict[str, WanTransformer] = {"bf16": expert(context, 8, "lora", recompute="block")}
    for form in (*map(Format, FORMATS), Format("nf4", low_rank=sizes.RANK)):
        try:
            check_library(form.name)
        except ValueError as error:
            context.note(**{f"{form} is not here": str(error)})
            continue
        _same_values(context, form)
        modules[str(form)] = expert(context, 8, "lora", recompute="block", stored=form)
    context.note(weights_gb={kind: sum(p.nbytes for p in own.parameters()) / 1e9 for kind, own in modules.items()})
    works = {kind: _both(passes(context, module, bucket)) for kind, module in modules.items()}
    seconds = measure(context.device, works, repeats=1 if context.small else 5)
    for kind in list(works)[1:]:
        sides = {kind: seconds[kind], "bf16": seconds["bf16"]}
        context.compare(f"{kind}, 17 frames", result.case({"seconds": result.measure("s", sides)}))
    return {"in_words": in_words(context)}


def _same_values(context: Context, form: Format) -> None:
    """A weight stored on the card has the CPU's bytes, and gives its values again. With a product both are other sums,
    but lack as much of the weight.
    """
    side = 256 if context.small else 2048
    weight = 0.02 * torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    there, here = quantize(weight.to(context.device), form), quantize(weight, form)
    if form.low_rank is not None:
        lacks = [each.left_of(own).norm().item() for each, own in ((there, weight.to(context.device)), (here, weight))]
        context.check(f"{form}: error beside the CPU's", abs(lacks[0] / lacks[1] - 1), 1e-3, "a share")
        return
    differ = (there.data.cpu() != here.data).double().mean().item()
    context.check(f"{form}: bytes that differ from the CPU's", differ, 1e-4, "a share: values in the middle of two")
    moved = type(here)(here.data.to(context.device), here.scale.to(context.device), here.coding, here.shape)
    mine, theirs = moved.dequantized(torch.bfloat16).cpu().float(), here.dequantized(torch.bfloat16).float()
    step = torch.exp2(torch.maximum(mine.abs(), theirs.abs()).clamp(min=1e-30).log2().floor() - 7)
    furthest = ((mine - theirs).abs() / step).max().item()
    context.check(f"{form}: dequantised values", furthest, DEQUANTIZED, "in steps of bf16; both round once")


def _both(parts: dict[str, Callable[[], None]]) -> Callable[[], None]:
    def run() -> None:
        for part in parts.values():
            part()

    return run


def swap(context: Context) -> dict[str, Any]:
    """swap.blocks: six of eight blocks' weights wait on the host, beside all on the card, at 17 and 81 frames."""
    plain = expert(context, 8, "lora", recompute="block")
    swapped = expert(context, 8, "lora", recompute="block").to("cpu")
    release(context.device)
    ModuleOffloader(context.device).add(swapped, whole=False, blocks=blocks_to_swap(swapped, SWAPPED))
    moved = sum(p.nbytes for block in blocks_to_swap(swapped, SWAPPED) for p in block.parameters())
    context.note(gb_on_the_host=moved / 1e9)
    for clip, bucket in sizes.clips(context.small).items():
        sides = {"swapped": _both(passes(context, swapped, bucket)), "plain": _both(passes(context, plain, bucket))}
        pairs = 1 if context.small else 2
        context.compare(
            f"swap, {clip}", in_turn(context, {name: Side(run) for name, run in sides.items()}, pairs=pairs)
        )
    return {"in_words": in_words(context)}
