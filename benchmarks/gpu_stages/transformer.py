"""A transformer with random weights as the stages train it, by a LoRA or as a whole; and one block of it, timed.

Everything goes through the model's own forward: a "block" is a transformer of one layer, whose embeddings and head are
0.1 % of it. A LoRA stands beside bf16 weights, full training moves float32 ones under autocast, as in train.py. MFU
counts what is needed, not what is computed twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gpu_stages import sizes
from gpu_stages.context import Context, measure, peak_gb, random_weights, release, speed, summary
from wantrain.batch import Batch
from wantrain.geometry import Bucket, num_tokens
from wantrain.losses import FlowMatching
from wantrain.models import WanTransformer, adapters
from wantrain.models.activation_policy import ActivationPolicy
from wantrain.models.attention import choose, set_kernel
from wantrain.models.flops import training_flops
from wantrain.models.quantize import Format, quantizable, quantize, replace_layer
from wantrain.training.engine.accelerator import autocast, start_accelerator
from wantrain.training.engine.engine import StepOptions, Stepper
from wantrain.training.engine.optim import build_optimizer
from wantrain.util.seeds import generator_at


def expert(
    context: Context,
    layers: int | None,
    kind: str,
    *,
    recompute: str,
    model: str = "a14b",
    stored: Format | None = None,
) -> WanTransformer:
    """An expert of so many blocks (None: all) that is trained by a LoRA ("lora") or as a whole ("full"), with the
    kernel of attention that a run takes. `stored` is base.dtype with base.low_rank.
    """
    dtype = torch.bfloat16 if kind == "lora" else torch.float32
    keywords = sizes.transformer(context.small, layers, model)
    module = random_weights(
        functools.partial(WanTransformer, **keywords), context.device, dtype, fp32_parts=WanTransformer.fp32_parts
    )
    assert isinstance(module, WanTransformer)
    for name in quantizable(module) if stored else ():
        replace_layer(module, name, quantize(module.get_submodule(name).weight, stored), dtype)  # type: ignore[arg-type]
    if kind == "lora":
        settings = adapters.AdapterSettings(rank=sizes.RANK, alpha=sizes.RANK, targets="attention+ffn")
        adapters.inject(module, settings, seed=0)
    module.run_block = ActivationPolicy(recompute, blocks=keywords["num_layers"])
    set_kernel(module, choose("auto", context.device, torch.bfloat16, width=keywords["attention_head_dim"]))
    return module.train()


def inputs(context: Context, bucket: Bucket, model: str = "a14b") -> tuple[Tensor, Tensor]:
    """Latents and text of one clip."""
    width = sizes.transformer(context.small, 1, model)["text_dim"]
    latents = torch.randn(sizes.latents(bucket, model), device=context.device)
    return latents, torch.randn(1, sizes.TEXT_ROWS, width, device=context.device)


def block(context: Context) -> dict[str, Any]:
    """One block, forward and backward, all activations kept."""
    for kind in ("lora", "full"):
        module = expert(context, 1, kind, recompute="none")
        for name, bucket in sizes.clips(context.small).items():
            context.note(**{f"{kind}, {name}": forward_backward(context, module, bucket, repeats=5)})
        del module
        release(context.device)
    rows = context.measured.items()
    return {"in_words": "; ".join(f"{name}: {row['seconds']:.4f} s{mfu(row)}" for name, row in rows)}


def forward_backward(context: Context, module: WanTransformer, bucket: Bucket, *, repeats: int) -> dict[str, Any]:
    """Seconds, memory and speed of one forward and backward."""
    seconds = measure(context.device, passes(context, module, bucket), repeats=repeats)
    return row_of(context, module, bucket, seconds)


def passes(context: Context, module: WanTransformer, bucket: Bucket) -> dict[str, Callable[[], None]]:
    """What computes a forward, and the backward after it."""
    latents, text = inputs(context, bucket)
    timestep = torch.tensor([500.0], device=context.device)
    losses: list[Tensor] = []

    def forward() -> None:
        with autocast("bf16", context.device):
            losses.append(module(latents, timestep, text).square().mean())

    def backward() -> None:
        losses.pop().backward()
        for parameter in module.parameters():
            parameter.grad = None

    return {"forward": forward, "backward": backward}


def row_of(
    context: Context, module: WanTransformer, bucket: Bucket, seconds: Mapping[str, list[float]]
) -> dict[str, Any]:
    """What is kept of a measurement: each part's seconds, and all of them together against the operations needed."""
    tokens = num_tokens(sizes.latents(bucket)[2:])
    flops = training_flops(module, tokens=tokens, text_rows=sizes.TEXT_ROWS + 1)
    together = summary([sum(parts) for parts in zip(*seconds.values(), strict=True)])["median"]
    return {
        "tokens": tokens,
        "seconds": together,
        "parts": {name: summary(took) for name, took in seconds.items()},
        "peak_gb": peak_gb(context.device),
        "tflop": {"needed": flops.model / 1e12, "executed": flops.executed / 1e12},
        **speed(context.device, flops.model, together),
    }


def mfu(row: Mapping[str, Any]) -> str:
    """MFU and memory of a row, for a line; empty where nobody knows them."""
    return "" if row["mfu"] is None else f", {row['mfu']:.0%} MFU, {row['peak_gb']:.1f} GB"


def one_step(
    context: Context, module: WanTransformer, loss: FlowMatching, batch: Batch
) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """What makes one optimizer step with the project's own loss and Stepper, as the training loop does; and the
    optimizer.
    """
    optimizer = build_optimizer(functools.partial(torch.optim.AdamW, lr=1e-4, fused=True), module)
    stepper = Stepper(start_accelerator(hang=None), module, optimizer, StepOptions(1, 1.0, "bf16"))
    draws = loss.prepare(batch, [generator_at(0, "noise", 0)]).to(context.device)

    def step() -> None:
        stepper.begin(1.0, 0)
        with stepper.forward_context():
            record = loss(stepper.wrapped, batch, draws)
        stepper.backward(record.value, last=True)
        stepper.step(update=bool(stepper.clip_gradients().isfinite()))

    return step, optimizer
