"""An A14B expert with random weights: one block, a slice of eight, and whole training steps; LoRA and full.

Everything goes through the model's own forward: a "block" is a transformer of one layer, whose embeddings and head are
0.1 % of it. A LoRA stands beside bf16 weights, full training moves float32 ones under autocast, as in train.py. The
slice and the whole expert compute their blocks again in the backward, as runs of this size must; MFU counts what is
needed, not what is computed twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
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
from wantrain.models.flops import training_flops
from wantrain.training.engine.accelerator import autocast, start_accelerator
from wantrain.training.engine.engine import StepOptions, Stepper
from wantrain.training.engine.optim import build_optimizer
from wantrain.util.seeds import generator_at


def expert(context: Context, layers: int, kind: str, *, recompute: bool) -> WanTransformer:
    """An expert of so many blocks that is trained by a LoRA ("lora") or as a whole ("full")."""
    dtype = torch.bfloat16 if kind == "lora" else torch.float32
    build = functools.partial(WanTransformer, **sizes.transformer(context.small, layers))
    module = random_weights(build, context.device, dtype, fp32_parts=WanTransformer.fp32_parts)
    assert isinstance(module, WanTransformer)
    if kind == "lora":
        settings = adapters.AdapterSettings(rank=sizes.RANK, alpha=sizes.RANK, targets="attention+ffn")
        adapters.inject(module, settings, seed=0)
    module.run_block = ActivationPolicy("block" if recompute else "none", blocks=layers)
    return module.train()


def inputs(context: Context, bucket: Bucket) -> tuple[Tensor, Tensor]:
    """Latents and text of one clip."""
    width = sizes.transformer(context.small, 1)["text_dim"]
    latents = torch.randn(sizes.latents(bucket), device=context.device)
    return latents, torch.randn(1, sizes.TEXT_ROWS, width, device=context.device)


def block(context: Context) -> dict[str, Any]:
    """One block, forward and backward, all activations kept."""
    return _slices(context, layers=1, recompute=False, repeats=5)


def slice_of_8(context: Context) -> dict[str, Any]:
    """Eight blocks, computed again in the backward."""
    return _slices(context, layers=8, recompute=True, repeats=3)


def _slices(context: Context, *, layers: int, recompute: bool, repeats: int) -> dict[str, Any]:
    for kind in ("lora", "full"):
        module = expert(context, layers, kind, recompute=recompute)
        for name, bucket in sizes.clips(context.small).items():
            context.note(**{f"{kind}, {name}": _forward_backward(context, module, bucket, repeats)})
        del module
        release(context.device)
    rows = context.measured.items()
    return {"in_words": "; ".join(f"{name}: {row['seconds']:.4f} s{_mfu(row)}" for name, row in rows)}


def _forward_backward(context: Context, module: WanTransformer, bucket: Bucket, repeats: int) -> dict[str, Any]:
    """Seconds, memory and speed of one forward and backward."""
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

    seconds = measure(context.device, {"forward": forward, "backward": backward}, repeats=repeats)
    return _row(context, module, bucket, seconds)


def _row(context: Context, module: WanTransformer, bucket: Bucket, seconds: dict[str, list[float]]) -> dict[str, Any]:
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


def _mfu(row: dict[str, Any]) -> str:
    return "" if row["mfu"] is None else f", {row['mfu']:.0%} MFU, {row['peak_gb']:.1f} GB"


def step_17(context: Context) -> dict[str, Any]:
    """Whole LoRA steps of an A14B expert at 17 frames."""
    return _steps(context, "17 frames", repeats=3)


def step_81(context: Context) -> dict[str, Any]:
    """Whole LoRA steps of an A14B expert at 81 frames."""
    return _steps(context, "81 frames", repeats=2)


def _steps(context: Context, clip: str, *, repeats: int) -> dict[str, Any]:
    bucket = sizes.clips(context.small)[clip]
    module = expert(context, 4 if context.small else 40, "lora", recompute=True)
    context.note(weights_gb=sum(parameter.nbytes for parameter in module.parameters()) / 1e9)
    seconds = measure(context.device, {"step": one_step(context, module, bucket)}, repeats=repeats)
    row = _row(context, module, bucket, seconds)
    return {**row, "in_words": f"{row['seconds']:.2f} s per step{_mfu(row)}"}


def one_step(context: Context, module: WanTransformer, bucket: Bucket) -> Callable[[], None]:
    """What makes one optimizer step with the project's own loss and Stepper, as the training loop does."""
    optimizer = build_optimizer(functools.partial(torch.optim.AdamW, lr=1e-4, fused=True), module)
    stepper = Stepper(start_accelerator(hang=None), module, optimizer, StepOptions(1, 1.0, "bf16"))
    loss, (latents, text) = FlowMatching(shift=12.0, high=0.875), inputs(context, bucket)
    batch = Batch(latents, text, ("clip",), (0,))
    draws = loss.prepare(batch, [generator_at(0, "noise", 0)]).to(context.device)

    def step() -> None:
        stepper.begin(1.0, 0)
        with stepper.forward_context():
            record = loss(stepper.wrapped, batch, draws)
        stepper.backward(record.value, last=True)
        stepper.step(update=bool(stepper.clip_gradients().isfinite()))

    return step
