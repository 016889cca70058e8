"""Bytes of one block, beside diffusers': python benchmarks/block.py

On tensors that have shapes and no values, one block of A14B at 81x480x832 (32,760 tokens, 512 rows of text), trained as
a whole and by a LoRA of rank 32 beside all its linear layers, and one of TI2V-5B at 121x704x1280 whose first frame has
a timestep of its own. One script counts both sides:

  forward, backward  bytes that all operations read and write, except matrix products and attention
  saved              bytes kept for the backward, without weights, when all activations are kept

A case "compiled" holds our compiled block, whose operations between products count together (regions.py), against
diffusers' in plain operations; `more` has diffusers' compiled. Both have bf16 weights; ours also as full fine-tuning
trains it, float32 under autocast, where the casts of weights count. Writes block.json.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import regions
import result
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from wantrain.models import WanTransformer, adapters
from wantrain.models.formats.loading import cast_as_loaded
from wantrain.models.positions import rope_angles
from wantrain.training.engine.accelerator import autocast
from wantrain.training.engine.optim import named_trainable
from wantrain.training.initialize import without_values
from wantrain.training.planning.trace import give_fake_parameters
from wantrain.util.files import write_json
from wantrain.util.moved_bytes import MovedBytes

GB = 1e9
TEXT_ROWS, RANK = 512, 32
A14B = {"num_attention_heads": 40, "ffn_dim": 13824}
TI2V_5B = {"num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48}
#: Sizes of the network, the grid of tokens, and whether each frame has a timestep, in words.
CASES = {
    "A14B full": (A14B, (21, 30, 52), False),
    "A14B LoRA": (A14B, (21, 30, 52), False),
    "TI2V-5B full": (TI2V_5B, (31, 22, 40), True),
}
GOALS = {"forward": 0.45, "backward": 0.45, "saved": 0.55}
#: Of compiled blocks, beside diffusers' in plain operations.
COMPILED_GOALS = {"forward": 0.20, "backward": 0.20}
#: Counts a block's forward and backward, by its inputs, in a context.
Count = Callable[[nn.Module, tuple[Any, ...], AbstractContextManager[Any]], dict[str, Any]]


def without_tensors(
    count: Count, block: nn.Module, inputs: Callable[[], tuple[Any, ...]], context: AbstractContextManager[Any]
) -> dict[str, Any]:
    """What `count` finds where no tensor has values."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        give_fake_parameters(block)
        return count(block, inputs(), context)


def plain(block: nn.Module, inputs: tuple[Any, ...], context: AbstractContextManager[Any]) -> dict[str, Any]:
    """GB of one forward and backward of a block, operation by operation, all activations kept."""
    weights = {id(tensor.untyped_storage()) for tensor in block.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if id(tensor.untyped_storage()) not in weights:
            kept[id(tensor.untyped_storage())] = tensor
        return tensor

    with MovedBytes() as moved, context, saved_tensors_hooks(pack, lambda tensor: tensor):
        output = block(*inputs)
    forward = moved.total
    saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    grad = torch.empty_like(output)
    with moved:
        output.backward(grad)
    largest = sorted(moved.by_name.items(), key=lambda item: -item[1])[:8]
    return {
        "forward": forward / GB,
        "backward": (moved.total - forward) / GB,
        "saved": saved / GB,
        "largest": {name: size / GB for name, size in largest},
    }


def ours(case: str, precision: str, count: Count = plain) -> dict[str, Any]:
    """This project's block; its input is the float32 residual stream."""
    sizes, grid, per_frame = CASES[case]
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16

    def build() -> WanTransformer:
        module = WanTransformer(**sizes, num_layers=1)  # type: ignore[arg-type]
        if "LoRA" in case:
            own = adapters.AdapterSettings(rank=RANK, alpha=RANK, targets="attention+ffn")
            adapters.inject(module, own, seed=0)
        cast_as_loaded(module, dtype, trained=named_trainable(module) if "LoRA" in case else {})
        return module

    module = without_values(build)
    assert isinstance(module, WanTransformer)
    dim, trains = module.dim, "LoRA" not in case

    def inputs() -> tuple[Any, ...]:
        frames, tokens = grid[0], grid[1] * grid[2]
        angles = rope_angles(grid, 128, torch.device("cpu")).unflatten(0, (frames, tokens))
        return (
            torch.empty(1, frames, tokens, dim, requires_grad=True),
            torch.empty(1, frames if per_frame else 1, 6, dim, requires_grad=trains),
            torch.empty(1, TEXT_ROWS, dim, dtype=torch.bfloat16, requires_grad=trains),
            (angles.cos().float(), angles.sin().float()),
            None,
        )

    mixed = precision == "fp32" or "LoRA" in case
    context = autocast("bf16", torch.device("cpu")) if mixed else nullcontext()
    return without_tensors(count, module.blocks[0], inputs, context)


def theirs(case: str, count: Count = plain) -> dict[str, Any]:
    """diffusers' block in bf16; a LoRA is peft's, in bf16 too."""
    sizes, grid, per_frame = CASES[case]
    dim = 128 * sizes["num_attention_heads"]
    trains = "LoRA" not in case
    with torch.device("meta"):
        block: nn.Module = WanTransformerBlock(
            dim, sizes["ffn_dim"], sizes["num_attention_heads"], cross_attn_norm=True
        )
        if not trains:
            names = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
            block = inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names), block)
        block.to(torch.bfloat16)

    def inputs() -> tuple[Any, ...]:
        tokens = grid[0] * grid[1] * grid[2]
        rotary = WanRotaryPosEmbed(128, (1, 2, 2), 1024)(torch.empty(1, 16, grid[0], 2 * grid[1], 2 * grid[2]))
        half = {"dtype": torch.bfloat16}
        return (
            torch.empty(1, tokens, dim, requires_grad=True, **half),  # type: ignore[call-overload]
            torch.empty(1, TEXT_ROWS, dim, requires_grad=trains, **half),  # type: ignore[call-overload]
            torch.empty(1, *((tokens,) if per_frame else ()), 6, dim, requires_grad=trains, **half),  # type: ignore[call-overload]
            rotary,
        )

    return without_tensors(count, block, inputs, nullcontext())


def counted() -> tuple[dict[str, Any], dict[str, Any]]:
    """The cases, and by case what no diffusers stands beside: the largest operations, and float32 weights."""
    cases, more = {}, {}
    for name in CASES:
        sides = {"ours": ours(name, "bf16"), "diffusers": theirs(name)}
        measures = {
            key: result.measure("GB", {side: [found[key]] for side, found in sides.items()}, at_most=goal)
            for key, goal in GOALS.items()
        }
        cases[name] = result.case(measures)
        more[name] = {"largest": {side: found["largest"] for side, found in sides.items()}}
        if "full" in name:
            more[name]["ours, float32 weights"] = ours(name, "fp32")
        compiled = {"ours": ours(name, "bf16", regions.count), "diffusers": sides["diffusers"]}
        measures = {
            key: result.measure("GB", {side: [found[key]] for side, found in compiled.items()}, at_most=goal)
            for key, goal in COMPILED_GOALS.items()
        }
        cases[f"{name}, compiled"] = result.case(measures)
        more[name]["diffusers, compiled"] = theirs(name, regions.count)
    return cases, more


def main() -> None:
    """Count, compare with the goals, and write the file."""
    cases, more = counted()
    found = result.record(
        __file__,
        protocol="counted by a dispatch mode on tensors without values",
        shapes={
            name: {"transformer": sizes, "tokens": grid, "text": TEXT_ROWS, "timestep per frame": per_frame}
            for name, (sizes, grid, per_frame) in CASES.items()
        },
        cases=cases,
        libraries=("torch", "diffusers", "peft"),
        more=more,
    )
    print("\n".join(result.shown(found)))
    write_json(Path(__file__).with_suffix(".json"), found)


if __name__ == "__main__":
    main()
