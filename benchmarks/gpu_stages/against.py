"""Our transformer beside diffusers' in a plain loop, the same weights and inputs: eight blocks, and whole steps.

Ours keeps the outputs of self-attention (recompute=attention), diffusers' gradient checkpointing nothing but the inputs
of blocks; both have the same kernel of attention where torch has it. Before the timing, two blocks of the same sizes
show that both compute the same: in float32, and each in bf16 against float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peers
import torch
from torch import Tensor, nn

from gpu_stages import sizes
from gpu_stages.context import Context, product_rate, release
from gpu_stages.pairs import CLOSE, CLOSE_BF16, Side, bf16_error, in_turn, in_words, theirs_missing
from gpu_stages.transformer import expert, forward_backward, inputs, mfu, one_step, row_of
from wantrain import flow
from wantrain.batch import Batch
from wantrain.geometry import Bucket
from wantrain.losses import FlowMatching
from wantrain.models import WanTransformer
from wantrain.models.activation_policy import ActivationPolicy
from wantrain.models.attention import DEFAULT, choose, set_kernel
from wantrain.models.compiling import BlockCompiler
from wantrain.models.precision import computing_in
from wantrain.training.engine.accelerator import autocast
from wantrain.util.seeds import generator_at

#: Goal for ours over the plain loop.
GOAL = 0.75
#: Bytes of memory that a whole step of the 5B needs with every weight trained (planned: 97 GB).
ROOM_5B = 100e9


def slice_lora(context: Context) -> dict[str, Any]:
    """Eight blocks with a LoRA."""
    return _slices(context, "lora", compiled=False)


def slice_full(context: Context) -> dict[str, Any]:
    """Eight blocks trained as a whole."""
    return _slices(context, "full", compiled=False)


def slice_compiled(context: Context) -> dict[str, Any]:
    """Eight blocks with a LoRA, both sides compiled by blocks."""
    return _slices(context, "lora", compiled=True)


def _slices(context: Context, kind: str, *, compiled: bool) -> dict[str, Any]:
    alone = theirs_missing(context)
    errors = {} if alone else agreement(context, kind)
    clip, bucket = list(sizes.clips(context.small).items())[-1]
    ours = expert(context, 8, kind, recompute="attention")
    runs = {"ours": Side(_pass(context, ours, bucket))}
    if not alone:
        theirs = _plain(context, ours)
        runs["diffusers"] = Side(_pass(context, theirs, bucket))
    if compiled:
        backend = "aot_eager" if context.small else "inductor"
        BlockCompiler(backend).compile(ours)
        if not alone:
            theirs.compile_repeated_blocks(backend=backend)  # type: ignore[operator]
    name = f"{kind}, {clip}{', compiled' if compiled else ''}"
    case = in_turn(context, runs, pairs=1 if context.small else 5, at_most=GOAL, errors=errors)
    context.compare(name, case)
    context.note(ours=_own_row(context, ours, bucket, case))
    if not compiled:
        ours.run_block = ActivationPolicy("block", blocks=8)  # as diffusers' side
        context.note(blocks_recomputed=forward_backward(context, ours, bucket, repeats=1))
    return {"in_words": f"{in_words(context)}{mfu(context.measured['ours'])}"}


def _own_row(context: Context, ours: WanTransformer, bucket: Bucket, case: dict[str, Any]) -> dict[str, Any]:
    """Operations, MFU and peak of our side of a case."""
    sides = {name: row["sides"]["ours"] for name, row in case["measures"].items()}
    row = row_of(context, ours, bucket, {"all": sides["seconds"]})
    return {**row, "peak_gb": max(sides["peak memory"]) if "peak memory" in sides else None}


def _plain(context: Context, ours: WanTransformer) -> nn.Module:
    """diffusers' side: recomputed by blocks, with our kernel of attention where it has it too."""
    theirs: Any = peers.transformer(ours).train()
    theirs.enable_gradient_checkpointing()
    kernel = choose("auto", context.device, torch.bfloat16, width=ours.attention_head_dim).name
    if context.device.type == "cuda" and kernel in peers.KERNELS:
        theirs.set_attention_backend(peers.KERNELS[kernel])
    context.note(attention={"ours": kernel, "diffusers": peers.KERNELS.get(kernel, "native")})
    module: nn.Module = theirs
    return module


def _pass(context: Context, module: nn.Module, bucket: Bucket) -> Callable[[], None]:
    """A forward and backward."""
    torch.manual_seed(1)
    latents, text = inputs(context, bucket)
    timestep = torch.tensor([500.0], device=context.device)

    def run() -> None:
        with autocast("bf16", context.device):
            loss = answer(module, latents, timestep, text).square().mean()
        loss.backward()
        for parameter in module.parameters():
            parameter.grad = None

    return run


def answer(module: nn.Module, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    """The velocity, float32. diffusers takes texts as its pipelines give them, with rows of zeros up to 512."""
    if isinstance(module, WanTransformer):
        return module(latents, timestep, text)  # type: ignore[no-any-return]
    padded = torch.cat([text, text.new_zeros(len(text), 512 - text.shape[1], text.shape[2])], dim=1)
    return module(latents, timestep, padded).sample.float()  # type: ignore[no-any-return]


def agreement(context: Context, kind: str, model: str = "a14b") -> dict[str, tuple[float, float]]:
    """How far apart two blocks of both sides are, outputs and every gradient, and how far they may be.

    At timestep 1, where the angles of diffusers' time embedding, float32, are right within rounding.
    """
    bucket = sizes.clips(context.small)["17 frames"]
    half = expert(context, 2, kind, recompute="block", model=model)
    for name, parameter in half.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)  # at zero A would have no gradient
    exact = copy.deepcopy(half).float()
    set_kernel(exact, DEFAULT)
    torch.manual_seed(1)
    clip = *inputs(context, bucket, model), torch.randn(sizes.latents(bucket, model), device=context.device)
    found: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
    for precision, ours in (("fp32", exact), ("bf16", half)):
        theirs = peers.transformer(ours).train()
        outputs = [_trained(context, module, clip, precision) for module in (ours, theirs)]
        found[precision] = outputs[0], outputs[1]
        gradients = peers.gradients(ours, theirs)
        found[f"{precision} gradients"] = gradients
    release(context.device)
    return {
        "output in float32": (peers.apart(*found["fp32"])[0], CLOSE),
        "gradients in float32": (peers.apart(*found["fp32 gradients"])[0], CLOSE),
        "output in bf16": bf16_error(*found["bf16"], found["fp32"][1]),
        "gradients in bf16": bf16_error(*found["bf16 gradients"], found["fp32 gradients"][1]),
    }


def _trained(
    context: Context, module: nn.Module, clip: tuple[Tensor, Tensor, Tensor], precision: str
) -> dict[str, Tensor]:
    """The output of one forward, after its backward."""
    latents, text, target = clip
    with computing_in(torch.float32, context.device), autocast(precision, context.device):
        output = answer(module, latents, torch.ones(1, device=context.device), text)
        (output - target).square().mean().backward()
    return {"output": output.detach()}


def step_81(context: Context) -> dict[str, Any]:
    """Whole LoRA steps of an A14B expert at 81 frames."""
    return _steps(context, "lora", "a14b", pairs=2, again=0)


def step_5b(context: Context) -> dict[str, Any]:
    """Whole steps of the 5B at 121 frames of 704x1280, every weight trained: float32 weights and AdamW."""
    on_card = context.device.type == "cuda"
    if on_card and (room := torch.cuda.get_device_properties(context.device).total_memory) < ROOM_5B:
        return {"in_words": f"not run: {room / 1e9:.0f} GB, and a step needs {ROOM_5B / 1e9:.0f} GB"}
    return _steps(context, "full", "5b", pairs=2, again=1)


def _steps(context: Context, kind: str, model: str, *, pairs: int, again: int) -> dict[str, Any]:
    """Whole optimizer steps. Both sides share the frozen weights, or of a full training all; between the turns of a
    full training the optimizer's state is freed, which would not fit twice, and made by a step that does not count.
    """
    alone = theirs_missing(context)
    errors = {} if alone else agreement(context, kind, model)
    clip, bucket = list(sizes.clips(context.small, model).items())[-1]
    ours = expert(context, None, kind, recompute="attention", model=model)
    context.note(weights_gb=sum(parameter.nbytes for parameter in ours.parameters()) / 1e9)
    noised = Noised.of(context, bucket, model)
    makers = {"ours": one_step(context, ours, noised.loss, noised.batch)}
    if not alone:
        theirs = _plain(context, ours)
        losses = [noised.error(context, module).item() for module in (ours, theirs)]
        errors["loss in bf16"] = abs(losses[0] - losses[1]) / losses[1], CLOSE_BF16
        makers["diffusers"] = plain_step(context, theirs, noised)

    def side(step: Callable[[], None], optimizer: torch.optim.Optimizer) -> Side:
        def leave() -> None:
            if again:
                optimizer.state.clear()
                release(context.device)

        return Side(step, leave)

    sides = {name: side(*made) for name, made in makers.items()}
    case = in_turn(context, sides, pairs=1 if context.small else pairs, again=again, at_most=GOAL, errors=errors)
    context.compare(f"step of {model}, {kind}, {clip}", case)
    row = _own_row(context, ours, bucket, case)
    floor = row["tflop"]["executed"] * 1e12 / product_rate(context.device, 256 if context.small else 8192)
    context.note(ours=row, floor={"seconds": floor, "share": floor / row["seconds"]})
    return {"in_words": f"{in_words(context)}; {floor / row['seconds']:.0%} of the floor{mfu(row)}"}


@dataclass(frozen=True)
class Noised:
    """One clip with its noise, as a step takes it."""

    loss: FlowMatching
    batch: Batch
    noisy: Tensor
    target: Tensor
    timestep: Tensor

    @classmethod
    def of(cls, context: Context, bucket: Bucket, model: str) -> Noised:
        """Random latents and text, and what the loss draws for the first position."""
        latents, text = inputs(context, bucket, model)
        loss, batch = FlowMatching(shift=12.0, high=0.875), Batch(latents, text, ("clip",), (0,))
        draws = loss.prepare(batch, [generator_at(0, "noise", 0)]).to(context.device)
        assert draws.sigma is not None and isinstance(draws.noise_BCTHW, Tensor)
        noisy = flow.path(latents, draws.noise_BCTHW, draws.sigma)
        return cls(loss, batch, noisy, draws.noise_BCTHW - latents, 1000 * draws.sigma)

    def error(self, context: Context, module: nn.Module) -> Tensor:
        """The loss of a network on it, without gradients."""
        with torch.no_grad(), autocast("bf16", context.device):
            velocity = answer(module, self.noisy, self.timestep, self.batch.text_BLD)
        return (velocity - self.target).square().mean()


def plain_step(context: Context, module: nn.Module, noised: Noised) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """As `one_step`, of diffusers' network in the loop that anybody writes."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(context.device.type, torch.bfloat16):
            velocity = answer(module, noised.noisy, noised.timestep, noised.batch.text_BLD)
        (velocity - noised.target).square().mean().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, optimizer
