"""What kept texts save in sampling: python benchmarks/kept_text.py [--pairs 5]

The transformer of W-S (6 layers, 384 wide, float32, one thread) makes the eight calls of four solver steps with
guidance, with texts as tensors and with kept ones, turn by turn. Results must be the same bits, or nothing is timed.
Reported are CPU seconds of the process, the median over the pairs of kept / not kept, beside the ratio of the
operations counted. The shapes: a still of 32x32 latents (256 tokens) and a clip of 8 latent frames (2,048), with texts
of 60 and 512 rows. Writes kept_text.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wantrain import geometry
from wantrain.models import WanTransformer
from wantrain.models.flops import text_flops, training_flops
from wantrain.models.kept_text import KeptText
from wantrain.util import distributed

WS: dict[str, Any] = {
    "num_attention_heads": 3, "attention_head_dim": 128, "text_dim": 4096, "ffn_dim": 1024, "num_layers": 6,
}  # fmt: skip
STEPS = 4
SHAPES = {"still": (1, 32, 32), "clip": (8, 32, 32)}
ROWS = (60, 512)


def sampled(model: WanTransformer, latents: Tensor, texts: list[Tensor], *, keep: bool) -> tuple[Tensor, float]:
    """The sum of all answers, and CPU seconds."""
    began, total = time.process_time(), torch.zeros_like(latents)
    given = [KeptText(text) if keep else text for text in texts]
    for step in range(STEPS):
        level = torch.full((1,), 900.0 - 200 * step)
        for text in given:
            total += model(latents, level, text)
    return total, time.process_time() - began


def measure(model: WanTransformer, shape: tuple[int, int, int], rows: int, pairs: int) -> dict[str, Any]:
    """One shape and length of text."""
    random = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, *shape, generator=random)
    texts = [0.1 * torch.randn(1, rows, 4096, generator=random) for _ in range(2)]
    one, other = (sampled(model, latents, texts, keep=keep)[0] for keep in (False, True))
    if not torch.equal(one, other):
        raise SystemExit("kept texts changed the result: nothing is timed")
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(pairs):
        for keep in (False, True) if turn % 2 == 0 else (True, False):
            seconds[keep].append(sampled(model, latents, texts, keep=keep)[1])
    computed = min(rows + 1, model.text_length)
    forward = training_flops(model, tokens=geometry.num_tokens(shape), text_rows=computed).forward
    text = text_flops(model, computed)
    return {
        "tokens": geometry.num_tokens(shape),
        "rows": rows,
        "share_of_operations": round(text / forward, 4),
        "operations": round(1 - (1 - 1 / STEPS) * text / forward, 4),
        "seconds": round(statistics.median(k / n for k, n in zip(seconds[True], seconds[False], strict=True)), 4),
        "pairs": [[round(n, 3), round(k, 3)] for n, k in zip(seconds[False], seconds[True], strict=True)],
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--pairs", type=int, default=5)
    pairs = arguments.parse_args().pairs
    distributed.set_threads()
    torch.manual_seed(0)
    model = WanTransformer(**WS).eval()
    torch.nn.init.normal_(model.head.head.weight, std=0.02)
    result: dict[str, Any] = {"torch": torch.__version__, "cpu": platform.processor() or platform.machine()}
    with torch.no_grad():
        for name, shape in SHAPES.items():
            for rows in ROWS:
                result[f"{name}, {rows} rows"] = found = measure(model, shape, rows, pairs)
                print(f"{name}, {rows} rows: operations {found['operations']}, seconds {found['seconds']}")
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
