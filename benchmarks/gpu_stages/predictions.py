"""What the stages should measure on an H200, written down before any of them has run on a card.

Seconds by case and side, as `predicted` gives them, by the planner's estimate (wantrain/training/planning/roofline.py)
and its shares: 70 % of the peak for matrix products, 62 and 54 % for attention forward and backward, 85 % of the
bandwidth. For diffusers' side the same, with every block computed again in the backward, and the bytes that
benchmarks/block.json counted for its operations. A compiled block is taken to move a fifth of diffusers' bytes, on both
sides. Convolutions of the VAEs run in small causal chunks: users report 0.9 s for encoding 81 frames on an H200, 18 %
of the peak, which is taken for all in bf16, half of it for TF32, and 60 % of float32's peak without TF32. That ours is
faster there is hoped for, not predicted.

`python -m gpu_stages.predictions` in benchmarks/ prints them anew. What has been measured keeps the prediction that was
made before.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gpu_stages import sizes
from wantrain.geometry import Bucket, num_tokens
from wantrain.models import WanTransformer, adapters
from wantrain.models.formats.loading import cast_as_loaded
from wantrain.training.engine.optim import named_trainable
from wantrain.training.engine.updates import UpdateOptions
from wantrain.training.initialize import without_values
from wantrain.training.planning import roofline
from wantrain.training.planning.memory import UpdateBytes
from wantrain.training.planning.plan import Choice, Sizes
from wantrain.training.planning.trace import Sample, TracedCosts
from wantrain.util.cards import CARDS, Card

#: Share of diffusers' bytes that a compiled block moves.
COMPILED = 0.2
#: Share of the bf16 peak that the VAEs' convolutions reach in bf16, and in TF32; of 67 TFLOP/s without TF32.
CONVOLUTIONS, TF32, FP32, FP32_PEAK = 0.18, 0.09, 0.60, 67e12
#: TFLOP of the VAEs, counted by torch's FlopCounterMode on tensors without values.
VAE_TFLOP: Mapping[str, Mapping[str, float]] = {
    "vae_2_1": {
        "encode, 17 frames": 33.2, "decode, 17 frames": 55.9, "encode, 81 frames": 162.0, "decode, 81 frames": 272.7,
    },
    "vae_2_2": {
        "encode, 17 frames": 23.0, "decode, 17 frames": 121.4, "encode, 81 frames": 112.3, "decode, 81 frames": 591.7,
    },
}  # fmt: skip
#: Parameters of umT5-xxl's encoder without its embeddings.
TEXT_PARAMETERS = 4.63e9

Seconds = dict[str, dict[str, float]]
PREDICTED: dict[str, Seconds] = {
    "H200": {
        "lora, 81 frames": {"ours": 2.0, "diffusers": 2.62},
        "lora, 81 frames, compiled": {"ours": 1.91, "diffusers": 2.21},
        "swap, 81 frames": {"swapped": 2.29, "plain": 2.29},
        "full, 81 frames": {"ours": 2.28, "diffusers": 2.8},
        "step of a14b, lora, 81 frames": {"ours": 10.0, "diffusers": 13.1},
        "step of 5b, full, 121 frames": {"ours": 3.62, "diffusers": 4.71},
        "fp8, 17 frames": {"fp8": 0.299, "bf16": 0.293},
        "int8, 17 frames": {"int8": 0.299, "bf16": 0.293},
        "nf4, 17 frames": {"nf4": 0.298, "bf16": 0.293},
        "swap, 17 frames": {"swapped": 0.293, "plain": 0.293},
        "7800 tokens": {"ours": 0.276},
        "17160 tokens": {"ours": 0.771},
        "32760 tokens": {"ours": 2.0},
        "48360 tokens": {"ours": 3.73},
        "75600 tokens": {"ours": 7.96},
        "vae_2_1, encode, 17 frames, fp32": {"ours": 0.826, "diffusers": 0.826},
        "vae_2_1, encode, 81 frames, bf16": {"ours": 0.91, "diffusers": 0.91},
        "vae_2_1, decode, 17 frames, tf32": {"ours": 0.628, "diffusers": 0.628},
        "vae_2_1, decode, 81 frames, bf16": {"ours": 1.53, "diffusers": 1.53},
        "vae_2_2, encode, 17 frames, fp32": {"ours": 0.572, "diffusers": 0.572},
        "vae_2_2, encode, 81 frames, bf16": {"ours": 0.631, "diffusers": 0.631},
        "vae_2_2, decode, 17 frames, tf32": {"ours": 1.36, "diffusers": 1.36},
        "vae_2_2, decode, 81 frames, bf16": {"ours": 3.32, "diffusers": 3.32},
        "64 texts": {"ours": 0.19, "padded": 0.438},
    }
}


class Step:
    """A transformer without values and one clip: what a step of it should take."""

    def __init__(self, card: Card, layers: int | None, kind: str, bucket: Bucket, model: str = "a14b") -> None:
        keywords = sizes.transformer(False, layers, model)
        self.card, self.layers, self.case = card, keywords["num_layers"], _counted(kind, model)
        module = _without_values(keywords, kind)
        _, _, frames, rows, columns = sizes.latents(bucket, model)
        tokens = num_tokens((frames, rows, columns))
        self.work = roofline.Work.of(module, tokens=tokens, samples=1)
        update = UpdateBytes.of(functools.partial(torch.optim.AdamW, lr=1e-4, fused=True), UpdateOptions())
        self.sizes = Sizes.of(module, update=update, average=False)
        self.costs = TracedCosts(module, Sample((1, frames, rows, columns), False, "bf16"))
        self.scale = tokens / self.case["tokens"]

    def ours(self, **choice: Any) -> float:
        """By the planner's estimate; `choice` are settings."""
        own = Choice(precision="bf16", **{"recompute": "attention", **choice})
        return roofline.seconds(self.work, self.sizes, self.costs, own, self.card)

    def diffusers(self) -> float:
        """Of diffusers' blocks, all computed again."""
        return self._computed(attention_again=True) + self._moved(1.0)

    def compiled(self) -> dict[str, float]:
        """Of both sides with compiled blocks."""
        return {
            "ours": self._computed(attention_again=False) + self._moved(COMPILED),
            "diffusers": self._computed(attention_again=True) + self._moved(COMPILED),
        }

    def _computed(self, *, attention_again: bool) -> float:
        work, peak = self.work, self.card.peak
        products = (2 * work.products_forward + work.products_backward) / (roofline.PRODUCTS * peak)
        forward = work.attention * (1 + attention_again) / (roofline.ATTENTION * peak)
        return products + forward + roofline.FLASH_BACKWARD * work.attention / (roofline.ATTENTION_BACKWARD * peak)

    def _moved(self, share: float) -> float:
        """Seconds of the bytes of all operations but products and attention."""
        moved = 2 * self.case["forward"] + self.case["backward"]
        return share * self.layers * self.scale * moved * 1e9 / (roofline.BANDWIDTH * self.card.bandwidth)


def _without_values(keywords: Mapping[str, Any], kind: str) -> WanTransformer:
    def build() -> WanTransformer:
        module = WanTransformer(**keywords)
        if kind == "lora":
            settings = adapters.AdapterSettings(rank=sizes.RANK, alpha=sizes.RANK, targets="attention+ffn")
            adapters.inject(module, settings, seed=0)
        trained = named_trainable(module) if kind == "lora" else {}
        cast_as_loaded(module, torch.bfloat16 if kind == "lora" else torch.float32, trained=trained)
        return module

    module = without_values(build)
    assert isinstance(module, WanTransformer)
    return module


@functools.cache
def _counted(kind: str, model: str) -> dict[str, float]:
    """GB that diffusers' block moves forward and backward, and at how many tokens."""
    name = {"5b": "TI2V-5B full"}.get(model, "A14B LoRA" if kind == "lora" else "A14B full")
    found = json.loads((Path(__file__).resolve().parent.parent / "block.json").read_text(encoding="utf-8"))
    frames, rows, columns = found["shapes"][name]["tokens"]
    measures = found["cases"][name]["measures"]
    moved = {part: measures[part]["sides"]["diffusers"][0] for part in ("forward", "backward")}
    return {**moved, "tokens": float(frames * rows * columns)}


def predicted(name: str) -> Seconds:
    """All predictions for a card."""
    card = CARDS[name]
    clips, found = sizes.clips(False), Seconds()
    large, small = clips["81 frames"], clips["17 frames"]
    for kind in ("lora", "full"):
        step = Step(card, 8, kind, large)
        found[f"{kind}, 81 frames"] = {"ours": step.ours(), "diffusers": step.diffusers()}
        if kind == "lora":
            found["lora, 81 frames, compiled"] = step.compiled()
            found["swap, 81 frames"] = _swapped(step)
    step = Step(card, None, "lora", large)
    found["step of a14b, lora, 81 frames"] = {"ours": step.ours(), "diffusers": step.diffusers()}
    step = Step(card, None, "full", sizes.CLIPS_5B["121 frames"], "5b")
    found["step of 5b, full, 121 frames"] = {"ours": step.ours(), "diffusers": step.diffusers()}
    step = Step(card, 8, "lora", small)
    plain = step.ours(recompute="block")
    for kind in ("fp8", "int8", "nf4"):
        found[f"{kind}, 17 frames"] = {kind: step.ours(recompute="block", base=kind), "bf16": plain}
    found["swap, 17 frames"] = _swapped(step)
    for bucket in sizes.scale(False):
        tokens = num_tokens(sizes.latents(bucket)[2:])
        found[f"{tokens} tokens"] = {"ours": Step(card, 8, "lora", bucket).ours()}
    return found | _encoders(card)


def _swapped(step: Step) -> dict[str, float]:
    return {"swapped": step.ours(recompute="block", swap=6), "plain": step.ours(recompute="block")}


def _encoders(card: Card) -> Seconds:
    """Both VAEs and umT5-xxl, 64 captions of 12,911 tokens; ours pads batches to their longest text."""
    rates = {"bf16": CONVOLUTIONS * card.peak, "tf32": TF32 * card.peak, "fp32": FP32 * FP32_PEAK}
    found = Seconds()
    for vae, counts in VAE_TFLOP.items():
        for case in ("encode, 17 frames, fp32", "encode, 81 frames, bf16", "decode, 17 frames, tf32",
                     "decode, 81 frames, bf16"):  # fmt: skip
            part, _, precision = case.rpartition(", ")
            seconds = counts[part] * 1e12 / rates[precision]
            found[f"{vae}, {case}"] = {"ours": seconds, "diffusers": seconds}
    each = 2 * TEXT_PARAMETERS / (roofline.PRODUCTS * card.peak)
    return {**found, "64 texts": {"ours": 1.1 * 12_911 * each, "padded": 64 * 512 * each}}


if __name__ == "__main__":
    rounded = {
        name: {side: float(f"{value:.3g}") for side, value in sides.items()}
        for name, sides in predicted("H200").items()
    }
    print(json.dumps(rounded, indent=4))
