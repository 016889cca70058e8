"""What a run will be, before it starts: each figure as an equation with its parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from wantrain import geometry
from wantrain.data import PackSampler, PhasedSampler
from wantrain.data.loading.phases import Order
from wantrain.data.loading.schedule import Entry
from wantrain.losses import FlowMatching, LossFunction
from wantrain.models import WanTransformer, quantize
from wantrain.models.flops import training_flops
from wantrain.training.alternation import ExpertAlternation
from wantrain.training.batching import Batching
from wantrain.training.engine.optim import named_trainable
from wantrain.training.planning.memory import Standing
from wantrain.training.planning.outline import Clips

#: Sigma below which a step decides on texture and identity more than on layout; recipes state their share of it.
TEXTURE = 0.3


def run_length(plan: Order, *, steps: int | None, epochs: float | None, default: int) -> int:
    """Optimizer steps of a run: as given, or as many as `epochs` full passes take, or the model's default."""
    if epochs is not None:
        return plan.steps_for_epochs(epochs)
    return default if steps is None else steps


def foreseen_length(plan: Order | None, *, steps: int | None, epochs: float | None, default: int) -> int | None:
    """`run_length`; without a plan, for the data are not there yet, None where epochs were asked for."""
    if plan is not None:
        return run_length(plan, steps=steps, epochs=epochs, default=default)
    return (steps or default) if epochs is None else None


def progress(step: int, steps: int) -> str:
    """Where a run stands."""
    over = "; this run is finished, a larger steps= continues it" if step >= steps else ""
    return f"step {step} of {steps}{over}"


def share_of_steps(alternation: ExpertAlternation, losses: Mapping[str, LossFunction], steps: int | None) -> str:
    """For a pair: each expert's steps, beside the share that the noise distribution alone would give it; else empty."""
    if len(losses) == 1 or steps is None:
        return ""
    parts = []
    for name, loss in losses.items():
        own = alternation.count(name, steps)
        alone = "" if loss.mass is None else f" (the noise distribution alone would give {loss.mass:.1%})"
        parts.append(f"{name} {own} of {steps} = {own / steps:.1%}{alone}")
    return f"optimizer steps     {'; '.join(parts)}"


def noise_levels(losses: Mapping[str, LossFunction]) -> str:
    """Which noise levels each expert trains on, a line each; empty for losses that draw none."""
    lines = []
    for name, around in losses.items():
        if isinstance(loss := around.core, FlowMatching):
            low, *_, high = loss.quadrature(10).tolist()  # the middles of ten equal parts
            texture = loss.noise.share_below(TEXTURE)
            lines.append(
                f"noise               {name}: nine draws of ten at sigma {low:.2f} to {high:.2f}, half below "
                f"{loss.quadrature(1).item():.2f}, {texture:.1%} below {TEXTURE}, where texture is"
            )
    return "\n".join(lines)


def chosen(settings: Mapping[str, Any], batching: Batching) -> str:
    """How a step is computed, and whether that was said or is the model's default: one line."""
    own = settings["model"]["train"]
    keys = ("batch_size", "recompute")
    default = settings["accumulate"] is None and all(settings[key] == own[key] for key in keys) and batching.micro
    blocks = _kept(settings)
    whose = f" (defaults of model={settings['model']['name']})" if default else ""
    size = "" if batching.tokens else f" {batching.batch_size} ="
    return f"batch{size} {batching}, {blocks}{whose}"


def _kept(settings: Mapping[str, Any]) -> str:
    """What is kept of a forward and which weights wait on the host, in words."""
    recompute, dtype = settings["recompute"], "" if settings["activations_dtype"] == "fp32" else "in bfloat16"
    words = {
        "none": "nothing recomputed",
        "block": "blocks recomputed",
        "attention": "blocks recomputed except self-attention",
    }
    said = [words.get(recompute, f"blocks recomputed except the last {recompute}")]
    if place := " ".join(filter(None, ("on the host" if settings["activations"] == "cpu" else "", dtype))):
        said.append(f"their inputs kept {place}")
    if swapped := settings["swap"]["blocks"]:
        said.append(f"the frozen weights of {swapped} blocks on the host")
    return ", ".join(said)


def describe(
    clips: Clips,
    modules: Mapping[str, nn.Module | None],
    batching: Batching,
    steps: int | None,
    kept: Standing,
    checkpoints: Mapping[str, Any],
    losses: Mapping[str, LossFunction],
    alternation: ExpertAlternation,
) -> str:
    """Lines for `dry_run=true`: tokens per sample, samples per step, steps, epochs, operations, trained parameters,
    memory, disk. `steps` is None where only data that are not there could tell; a module is None where only weights
    could. `checkpoints` are the settings of that name.
    """
    lines = [_clips(clips, bucket, count) for bucket, count in clips.counts.most_common()]
    if clips.entries:
        assert steps is not None, "epochs= is refused with a schedule"
        lines += _phases(clips, batching, {name: alternation.count(name, steps) for name in modules})
    else:
        lines += _samples(clips, batching) + _length(clips, batching, steps)
    for name, module in modules.items():
        whose = f"   ({name})" if len(modules) > 1 else ""
        if isinstance(module, WanTransformer) and clips.strides is not None:
            lines.append(_operations(module, clips, batching, losses[name]) + whose)
        lines.append(_trained(module) + whose)
    lines.append(f"kept in memory      {kept}, before activations")
    if parts := checkpoint_bytes(modules, kept):
        lines.append(_checkpoints(parts, steps, **checkpoints))
    if line := kept.warning():
        lines.append(line)
    return "\n".join(lines)


def _clips(clips: Clips, bucket: str, count: int) -> str:
    there = f"({count} clips)" if clips.plan is not None else "(the model's own size)"
    if clips.strides is None:
        return f"clips               {bucket}   {there}"
    shape = clips.latent_shape(bucket)
    patches = [side // part for side, part in zip(shape, geometry.PATCH, strict=True)]
    tokens = f"{' x '.join(map(str, patches))} = {geometry.num_tokens(shape)}"
    return f"tokens per sample   {bucket}: {tokens}   {there}"


def _samples(clips: Clips, batching: Batching) -> list[str]:
    """How many samples a step has."""
    if batching.tokens is None:
        return [f"samples per step    {batching} = {batching.batch_size}"]
    if not isinstance(clips.plan, PackSampler):
        return [f"samples per step    {batching}"]
    plan = clips.plan
    return [
        f"samples per step    {batching} = {plan.samples_per_step:.4g} in the mean",
        f"packs               {plan.samples_per_epoch} clips = {plan.packs_per_epoch} packs an epoch, "
        f"{plan.fill:.1%} of their tokens used",
    ]


def _phases(clips: Clips, batching: Batching, steps: Mapping[str, int]) -> list[str]:
    """A line for each phase of data.schedule, and the samples of all. `steps` are each expert's own, by its name."""
    lines, total = [], 0
    for name, own in steps.items():
        whose = f"   ({name})" if len(steps) > 1 else ""
        ends = [entry.start for entry in clips.entries[1:]] + [own]
        for entry, end in zip(clips.entries, ends, strict=True):
            each, samples = _phase(clips, batching, entry, end)
            said = f"{each} samples per step, {samples or '?'} in {end - entry.start} steps"
            lines.append(f"{f'from step {entry.start}':<19} {entry}: {said}{whose}")
            total += samples
    return [*lines, f"steps               {sum(steps.values())}" + (f": {total} samples" if total else "")]


def _phase(clips: Clips, batching: Batching, entry: Entry, end: int) -> tuple[str, int]:
    """How a step of a phase is shared out, and the samples of its steps; 0 for packs of clips that are not there."""
    if batching.tokens is None:
        sized = batching.resized(entry.batch_size)
        return f"{sized} = {sized.batch_size}", sized.batch_size * (end - entry.start)
    plan = clips.plan
    return f"{batching}", 0 if plan is None else plan.samples_before(end) - plan.samples_before(entry.start)


def _length(clips: Clips, batching: Batching, steps: int | None) -> list[str]:
    if steps is None:
        return ["steps               as many as epochs= takes of data that are not there yet"]
    if batching.tokens is None:
        samples = steps * batching.batch_size
        lines = [f"steps               {steps}: {steps} x {batching.batch_size} = {samples} samples"]
    else:
        samples = 0 if clips.plan is None else clips.plan.samples_before(steps)
        lines = [f"steps               {steps}" + (f": {samples} samples" if samples else "")]
    if clips.plan is not None:
        assert not isinstance(clips.plan, PhasedSampler), "phases have lines of their own"
        clip_count = clips.plan.samples_per_epoch
        lines.append(f"epochs              {samples} / {clip_count} clips = {samples / clip_count:.2f}")
    return lines


def checkpoint_bytes(modules: Mapping[str, nn.Module | None], kept: Standing) -> dict[str, int]:
    """What a checkpoint takes on disk, by its parts; empty where only weights could tell."""
    there = [module for module in modules.values() if module is not None]
    trained = sum(p.nbytes for module in there for p in named_trainable(module).values())
    return {"weights": trained, "optimizer": kept.optimizer, "average": kept.average} if there else {}


def _checkpoints(
    parts: Mapping[str, int], steps: int | None, *, keep: int, keep_every: int | None, keep_best: bool, **_: object
) -> str:
    """What a checkpoint takes on disk, and all that are there at once: trained weights, optimizer state, average."""
    each = sum(parts.values())
    equation = " + ".join(f"{name} {size / 1e9:.3g}" for name, size in parts.items() if size)
    most = keep + 1 + keep_best + ((steps or 0) // keep_every if keep_every else 0)
    return (
        f"checkpoint          {equation} = {each / 1e9:.3g} GB on disk; at most {most} at once, the one being written "
        f"among them = {most * each / 1e9:.3g} GB"
    )


def _trained(module: nn.Module | None) -> str:
    if module is None:
        return "trained parameters  those of the VAE in weights=, which a dry run does not open"
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    total = quantize.count(module)
    return f"trained parameters  {trained:,} of {total:,} ({100 * trained / total:.1f} %)"


def _operations(module: WanTransformer, clips: Clips, batching: Batching, loss: LossFunction) -> str:
    """The operations of a step in the commonest bucket (with a schedule, in the costliest), with texts as long as they
    may be; of packs, in the mean.
    """
    tokens = {bucket: geometry.num_tokens(clips.latent_shape(bucket)) for bucket in clips.counts}
    if batching.tokens is not None:
        flops = {
            bucket: training_flops(module, tokens=own, text_rows=module.text_length) for bucket, own in tokens.items()
        }
        samples = clips.plan.samples_per_step if clips.plan else batching.tokens // tokens[clips.commonest]
        mean = sum(flops[bucket].executed * count for bucket, count in clips.counts.items()) / clips.counts.total()
        return (
            f"TFLOP per step      {mean / 1e12:.3g} in the mean x {samples:.4g} samples = {mean * samples / 1e12:.4g}"
        )
    bucket, batch_size = clips.commonest, batching.batch_size
    if clips.micro:  # with a schedule, the largest step
        bucket = max(clips.micro, key=lambda each: tokens[each] * clips.micro[each])
        batch_size = batch_size // batching.micro * clips.micro[bucket]
    each = training_flops(module, tokens=tokens[bucket], text_rows=module.text_length)
    again = f" + {each.recompute / 1e12:.3g} computed again" if each.recompute else ""
    several = "" if loss.rows == 1 else f" x {loss.rows}"
    base = f" + {each.forward / 1e12:.3g} of the base x {batch_size} x {loss.base_rows}" if loss.base_rows else ""
    total = batch_size * (each.executed * loss.rows + each.forward * loss.base_rows)
    return (
        f"TFLOP per step      {bucket}: ({each.forward / 1e12:.3g} forward + {each.backward / 1e12:.3g} "
        f"backward{again}) x {batch_size} samples{several}{base} = {total / 1e12:.4g}"
    )
