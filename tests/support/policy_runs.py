"""Runs under each policy of activations and weights, in the launch's engine: python policy_runs.py PRECISION STEPS.

Writes into the current folder ENGINE.json, with the losses of each run, and NAME.safetensors with its weights.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from wantrain.models import WanTransformer, adapters
from wantrain.models.activation_policy import ActivationPolicy
from wantrain.models.offload import ModuleOffloader
from wantrain.training.engine import fsdp
from wantrain.training.engine.accelerator import engine_of, start_accelerator
from wantrain.training.engine.engine import StepOptions, finish
from wantrain.training.engine.optim import build_optimizer, named_trainable
from wantrain.training.engine.placement import Placement, this_machine

SIZE = {
    "num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 8, "text_length": 6, "ffn_dim": 48, "freq_dim": 16,
    "num_layers": 4,
}  # fmt: skip
#: recompute, activations, swapped blocks
POLICIES = {
    "none": ("none", "gpu", 0),
    "block": ("block", "gpu", 0),
    "attention": ("attention", "gpu", 0),
    "two kept": (2, "gpu", 0),
    "host": ("block", "cpu", 0),
    "attention, host": ("attention", "cpu", 0),
    "swap": ("block", "gpu", 3),
    "swap, host": (1, "cpu", 3),
    "gathered in float32": ("none", "gpu", 0),
}


def model(kind, policy):
    torch.manual_seed(3)
    module = WanTransformer(**SIZE)
    for parameter in module.parameters():
        parameter.data.add_(torch.randn(parameter.shape) * 0.05)
    if kind == "lora":
        adapters.inject(module, adapters.AdapterSettings(rank=3, alpha=3, targets="attention+ffn"), seed=1)
    recompute, activations, _ = policy
    module.run_block = ActivationPolicy(recompute, blocks=SIZE["num_layers"], activations=activations)
    return module


def run(accelerator, kind, policy, precision, steps):
    """The losses of so many steps, and the stepper."""
    engine, swapped = engine_of(accelerator), policy[2]
    offloader = ModuleOffloader(accelerator.device, this_machine()) if swapped else None
    cpu = torch.device("cpu")
    placement = Placement(accelerator, engine, accelerator.device, cpu, offloader, swapped=swapped)
    module = model(kind, policy)
    optimizer = build_optimizer(lambda groups: torch.optim.AdamW(groups, lr=1e-2), module)
    stepper = placement.stepper(module, optimizer, StepOptions(1, 1.0, precision))
    stream, losses = torch.Generator().manual_seed(100 + accelerator.process_index), []
    for number in range(steps):
        stepper.begin(1.0, number)
        for last in stepper.micro_steps():
            draw = [torch.randn(1, 16, 2, 4, 4, generator=stream) for _ in range(2)]
            text = torch.randn(1, 4, 8, generator=stream)
            with stepper.forward_context():
                error = (
                    (stepper.wrapped(draw[0], torch.rand(1, generator=stream) * 1000, text) - draw[1]).square().mean()
                )
            stepper.backward(error, last=last)
        losses.append(stepper.mean(error).item())
        stepper.clip_gradients()
        stepper.step(update=True)
    return losses, stepper


def dtypes_in_forward(stepper):
    """The dtypes that parameters have while the first block computes."""
    seen = {}
    block = stepper.module.blocks[0]
    handle = block.ffn.register_forward_pre_hook(
        lambda *_: seen.update({name: str(p.dtype) for name, p in block.named_parameters()})
    )
    with torch.no_grad(), stepper.forward_context():
        stepper.wrapped(torch.zeros(1, 16, 2, 4, 4), torch.ones(1), torch.zeros(1, 4, 8))
    stepper.part()
    handle.remove()
    return seen


def runs_of(engine, precision):
    """(full or lora, name of the policy): those that the engine takes."""
    for kind in ("lora", "full"):
        for name, (_, _, swapped) in POLICIES.items():
            if precision == "bf16":
                chosen = kind == "full" and name in {"none", "block", "gathered in float32"}
            else:
                few = {"none", "block", "attention", "host"}
                chosen = name != "gathered in float32" and (name in few or engine == "ddp")
                chosen = chosen and not (swapped and kind == "full")
            if chosen:
                yield kind, name


def main(precision, steps):
    accelerator = start_accelerator("cpu", hang=None)
    engine, found, steppers = engine_of(accelerator), {}, []
    for kind, name in runs_of(engine, precision):
        fsdp.has_adapter = (lambda module: True) if name == "gathered in float32" else adapters.has_adapter
        losses, stepper = run(accelerator, kind, POLICIES[name], precision, steps)
        weights = {key: stepper.whole(parameter).clone() for key, parameter in named_trainable(stepper.module).items()}
        dtypes = dtypes_in_forward(stepper)
        steppers.append(stepper)
        if accelerator.is_main_process:
            found[f"{kind} {name}"] = {"losses": losses, "dtypes": dtypes}
            save_file(weights, f"{engine} {kind} {name}.safetensors")
    if accelerator.is_main_process:
        Path(f"{engine}.json").write_text(json.dumps(found))
    finish(steppers)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
