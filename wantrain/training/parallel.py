"""The one place that builds the Accelerator, and the Stepper that hides how an engine steps.

Precision is the model's own: accelerate runs with mixed_precision="no" and bf16 is torch.autocast here, around the
forward pass, with Wan's float32 islands inside the model. accelerate's own bf16 would round the timestep.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn

from wantrain import world
from wantrain.models.adapters import keep_activation_dtype


def start_accelerator() -> Accelerator:
    """The Accelerator of this process, after making sure that it is the one the launcher meant.

    Several CPU processes need their process group made first, or each would believe to be alone. ValueError if the
    engine ends up with another number of processes than were started, or with one that is not supported yet.
    """
    for engine in ("DEEPSPEED", "FSDP"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true":
            raise ValueError(f"the engine {engine} is not supported yet; use one process or DDP (launch/README.md)")
    world.set_threads()
    launched = "LOCAL_RANK" in os.environ and world.world_size() > 1
    if launched and not torch.cuda.is_available():
        PartialState(cpu=True)
    accelerator = Accelerator(mixed_precision="no")
    if accelerator.num_processes != world.world_size():
        raise ValueError(
            f"{world.world_size()} processes were started but the engine holds {accelerator.num_processes}; "
            "launch with: accelerate launch --multi_gpu --num_processes N --num_machines 1 train.py ..."
        )
    kind = accelerator.distributed_type.value
    if kind not in {"NO", "MULTI_GPU", "MULTI_CPU"}:
        raise ValueError(f"the engine {kind} is not supported; use one process or DDP (launch/README.md)")
    return accelerator


def autocast(precision: str, device: torch.device) -> torch.autocast | nullcontext[None]:
    """The context in which a model's forward runs: bf16 autocast, or nothing for fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


class Stepper:
    """A model under an engine: forward in its precision, backward, and one update per optimizer step."""

    def __init__(
        self,
        accelerator: Accelerator,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        accumulate: int,
        clip: float,
        precision: str,
    ) -> None:
        self.accelerator = accelerator
        self.module = module
        self.accumulate, self.clip, self.precision = accumulate, clip, precision
        self.device = accelerator.device
        self.wrapped, self.optimizer = accelerator.prepare(module, optimizer)

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """How every forward of this run computes: also previews and validation enter it."""
        with autocast(self.precision, self.device), keep_activation_dtype(self.module):
            yield

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add one micro-step's share of the gradient; only the last one of a step synchronises ranks."""
        with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
            self.accelerator.backward(loss / self.accumulate)

    def update(self, learning_rate_scale: float) -> Tensor:
        """Clip, step, clear. Returns the gradient norm before clipping (a scalar on the device)."""
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        norm = self.accelerator.clip_grad_norm_(parameters, self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * learning_rate_scale
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes of a scalar."""
        return self.accelerator.reduce(value.detach().clone(), reduction="mean")

    def agree(self, signal: int | None) -> int | None:
        """The signal that any process has received: all of them must leave the loop at the same step, or one waits."""
        if self.accelerator.num_processes == 1:
            return signal
        received = torch.tensor([signal or 0], device=self.device)
        return int(self.accelerator.gather(received).max()) or None

    def finish(self) -> None:
        """Leave together: without this, a rank that is done first can abort the others. No step follows."""
        self.accelerator.wait_for_everyone()
        # The wrapper goes before the process group. As the group's last owner it would end the group's threads while
        # it holds the interpreter, and one of them may be waiting for just that: 1 run in 50 never ended.
        del self.wrapped
        self.accelerator.free_memory()
        self.accelerator.end_training()
