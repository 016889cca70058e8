"""How well the planner predicts the memory of a training step: python benchmarks/memory.py

Small transformers are trained for real on a CPU, with the project's loss, adapters and optimizers, while the bytes of
every tensor that is alive are summed (wantrain/util/live_bytes.py): two micro-steps and an update, twice, so that the
optimizer's state is there. Beside the peak stands what the planner says without values. Workspaces inside kernels and
an allocator's rounding are in neither. Writes memory.json.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from wantrain.batch import Batch
from wantrain.losses import FlowMatching
from wantrain.models import WanTransformer, adapters
from wantrain.models.activation_policy import ActivationPolicy
from wantrain.models.formats.loading import cast_as_loaded
from wantrain.training.engine.accelerator import autocast
from wantrain.training.engine.optim import build_optimizer, named_trainable
from wantrain.training.engine.parameterwise import ParameterwiseOptimizer
from wantrain.training.engine.updates import BackwardUpdates, UpdateOptions
from wantrain.training.initialize import without_values
from wantrain.training.planning.memory import UpdateBytes
from wantrain.training.planning.plan import Choice, Sizes, plan
from wantrain.training.planning.trace import Sample, trace_blocks
from wantrain.util.files import write_json
from wantrain.util.live_bytes import LiveBytes

SIZES = {"num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 688, "num_layers": 6, "text_dim": 128}
#: float32 weights, updated after the backward.
PLAIN = UpdateOptions()


@dataclass(frozen=True)
class Setting:
    """One setting of the comparison."""

    adapter: str
    recompute: str
    precision: str
    latents: tuple[int, int, int, int]
    updates: UpdateOptions = PLAIN


def settings() -> Iterator[Setting]:
    """All combinations."""
    shapes = [(1, 3, 16, 16), (2, 5, 12, 20)]
    for values in itertools.product(("none", "lora", "dora"), ("none", "attention", "block"), ("fp32", "bf16"), shapes):
        yield Setting(*values)
    within = UpdateOptions(in_backward=True)
    smaller = UpdateOptions("bf16"), UpdateOptions("bf16", "kahan"), within, replace(within, dtype="bf16")
    for recompute, updates in itertools.product(("none", "block"), smaller):
        yield Setting("none", recompute, "bf16", shapes[0], updates)


def build(setting: Setting) -> WanTransformer:
    """The module as a run trains it: frozen weights in the run's precision beside an adapter, else float32."""
    module = WanTransformer(**SIZES)  # type: ignore[arg-type]
    module.run_block = ActivationPolicy(setting.recompute, blocks=SIZES["num_layers"])
    if setting.adapter != "none":
        own = adapters.AdapterSettings(rank=8, alpha=8, targets="attention+ffn", dora=setting.adapter == "dora")
        adapters.inject(module, own, seed=0)
    dtype = torch.bfloat16 if setting.precision == "bf16" and setting.adapter != "none" else torch.float32
    cast_as_loaded(module, dtype, trained=named_trainable(module))
    if setting.updates.dtype == "bf16":
        cast_as_loaded(module, torch.bfloat16)
    return module


def make_optimizer(groups: Any) -> torch.optim.Optimizer:
    """The optimizer of the comparison."""
    return torch.optim.AdamW(groups, lr=1e-4, fused=True)


def predict(setting: Setting) -> float:
    """The planner's bytes, without its allowance for CUDA."""
    module = without_values(lambda: build(setting))
    assert isinstance(module, WanTransformer)
    sizes = Sizes.of(module, update=UpdateBytes.of(make_optimizer, setting.updates), average=False)
    costs = {
        name: trace_blocks(module, Sample(setting.latents, False, setting.precision), name)
        for name in dict.fromkeys((setting.recompute, "block"))
    }
    planned = plan(sizes, costs, Choice(recompute=setting.recompute))
    return planned.device - planned.allowance


def measure(setting: Setting) -> float:
    """The most bytes alive in two steps of two micro-steps, or of one where the backward updates."""
    count, frames, rows, columns = setting.latents
    generators = [torch.Generator().manual_seed(number) for number in range(count)]
    loss = FlowMatching(shift=3.0)
    with LiveBytes() as live:
        module = build(setting).train()
        # The adapter's build has passing copies; a run's peak is that of its steps.
        live.peak = live.now
        optimizer = setting.updates.applied(build_optimizer(make_optimizer, module), module, seed=0)
        if within := setting.updates.in_backward:
            assert isinstance(optimizer, ParameterwiseOptimizer)
            BackwardUpdates(optimizer, named_trainable(module).values(), clip=None)
        for _ in range(2):
            for _ in range(1 if within else 2):
                batch = Batch(
                    latents_BCTHW=torch.randn(count, 16, frames, rows, columns),
                    text_BLD=torch.randn(count, module.text_length, SIZES["text_dim"]),
                    ids=tuple(str(number) for number in range(count)),
                    positions=tuple(range(count)),
                )
                with autocast(setting.precision, torch.device("cpu")):
                    value = loss(module, batch, loss.prepare(batch, generators)).value
                value.backward()
                del value
            optimizer.step()  # where the backward updates there are no gradients left
            optimizer.zero_grad(set_to_none=True)
    return live.peak


def compare(setting: Setting) -> dict[str, Any]:
    """One row: both sides in bytes, and their ratio."""
    predicted, measured = predict(setting), measure(setting)
    return {**asdict(setting), "predicted": predicted, "measured": measured, "ratio": predicted / measured}


def main() -> None:
    """Compare all settings and write the table."""
    rows = [compare(setting) for setting in settings()]
    for row in rows:
        print(json.dumps(row))
    ratios = [row["ratio"] for row in rows]
    result = {"torch": torch.__version__, "method": "LiveBytes on a CPU", "rows": rows}
    result |= {"smallest": min(ratios), "largest": max(ratios)}
    write_json(Path(__file__).with_suffix(".json"), result)
    print(f"{len(rows)} settings: predicted / measured between {min(ratios):.3f} and {max(ratios):.3f}")


if __name__ == "__main__":
    main()
