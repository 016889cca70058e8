"""What a run will be, before it starts: each figure as an equation with its parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from wantrain import geometry, world
from wantrain.data import LatentData, MixedData, PixelData, Plan
from wantrain.losses import FlowMatching
from wantrain.models import WanTransformer
from wantrain.models.flops import training_flops
from wantrain.training.turns import Turns


def run_length(plan: Plan, *, steps: int | None, epochs: float | None, default: int) -> int:
    """Optimizer steps of a run: as given, or as many as `epochs` full passes take, or the model's default."""
    if epochs is not None:
        return plan.steps_for_epochs(epochs)
    return default if steps is None else steps


def progress(step: int, steps: int) -> str:
    """Where a run stands."""
    over = "; this run is finished, a larger steps= continues it" if step >= steps else ""
    return f"step {step} of {steps}{over}"


def say_turns(turns: Turns, losses: Mapping[str, FlowMatching], steps: int) -> None:
    """For a pair: each expert's steps, beside the share that the noise law alone would give it."""
    if len(losses) == 1:
        return
    parts = []
    for name, loss in losses.items():
        own = turns.count(name, steps)
        parts.append(f"{name} {own} of {steps} = {own / steps:.1%} (the noise law alone would give {loss.mass:.1%})")
    world.say(f"optimizer steps     {'; '.join(parts)}")


def describe(
    plan: Plan,
    data: LatentData | MixedData | PixelData,
    module: nn.Module,
    *,
    steps: int,
    accumulate: int,
    processes: int,
) -> str:
    """Lines for `dry_run=true`: tokens per sample, samples per step, steps, epochs, trained parameters."""
    lines, counts = [], Counter(data.bucket_names)
    for name, count in counts.most_common():
        if "spatial_stride" not in data.manifest:
            lines.append(f"clips               {name}: {count}")
            continue
        shape = _latent_shape(name, data.manifest)
        patches = [side // part for side, part in zip(shape, geometry.PATCH, strict=True)]
        tokens = geometry.num_tokens(shape)
        lines.append(f"tokens per sample   {name}: {' x '.join(map(str, patches))} = {tokens}   ({count} clips)")
    micro = plan.batch_size // accumulate // processes
    lines.append(
        f"samples per step    {micro} per backward x {accumulate} accumulation x {processes} processes "
        f"= {plan.batch_size}"
    )
    samples = steps * plan.batch_size
    lines.append(f"steps               {steps}: {steps} x {plan.batch_size} = {samples} samples")
    lines.append(
        f"epochs              {samples} / {plan.samples_per_epoch} clips = {samples / plan.samples_per_epoch:.2f}"
    )
    if isinstance(module, WanTransformer):
        name = counts.most_common(1)[0][0]
        lines.append(_operations(module, name, _latent_shape(name, data.manifest), plan))
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    total = sum(p.numel() for p in module.parameters())
    lines.append(f"trained parameters  {trained:,} of {total:,} ({100 * trained / total:.1f} %)")
    return "\n".join(lines)


def _latent_shape(bucket: str, manifest: Mapping[str, Any]) -> tuple[int, int, int]:
    """Of the clips of a bucket, by the VAE that encoded them."""
    frames, height, width = (int(part) for part in bucket.split("x"))
    strides = manifest["temporal_stride"], manifest["spatial_stride"]
    return geometry.latent_shape(geometry.Bucket(frames, height, width), *strides)


def _operations(module: WanTransformer, bucket: str, shape: tuple[int, int, int], plan: Plan) -> str:
    """The operations of a step in the commonest bucket, with texts as long as they may be."""
    each = training_flops(module, tokens=geometry.num_tokens(shape), text_rows=module.text_length)
    again = f" + {each.recompute / 1e12:.3g} computed again" if each.recompute else ""
    return (
        f"TFLOP per step      {bucket}: ({each.forward / 1e12:.3g} forward + {each.backward / 1e12:.3g} backward"
        f"{again}) x {plan.batch_size} samples = {each.executed * plan.batch_size / 1e12:.4g}"
    )
