"""Where the experts of a run live, and what an engine cannot train."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from wantrain.models.formats.loading import settled_dtype
from wantrain.models.offload import ModuleOffloader, blocks_to_swap
from wantrain.models.pinned_memory import Node, move_to_arena
from wantrain.models.quantize import FORMATS, quantized_layers
from wantrain.models.sequence import SequenceParallel
from wantrain.training.engine.accelerator import SHARDED, engine_of
from wantrain.training.engine.adaptive import adaptive_name
from wantrain.training.engine.engine import StepOptions, Stepper
from wantrain.util import distributed
from wantrain.util.console import say

#: Optimizers whose update of an element depends on its whole matrix, or a block of it: class -> what users call it.
WHOLE = {"MuonAdamW": "muon", "Muon": "torch.optim.Muon", "Adafactor": "adafactor", "adamw_8bit": "adamw_8bit"}


@dataclass(frozen=True)
class Placement:
    """On which device a run's experts are, and the engine that trains them.

    engine          single, ddp, zero1, zero2, zero3 or fsdp2
    device          what this process computes on
    weights_device  where weights are loaded to: the host, if the engine shards them or some of them wait there
    offloader       keeps frozen weights on the host while they are not needed; None: all stay on the device
    whole           those of the expert that is not training wait
    swapped         of so many blocks they wait except around the block's computation
    sequence        the processes that share the tokens of a clip with this one; None: it computes them all
    """

    accelerator: Accelerator
    engine: str
    device: torch.device
    weights_device: torch.device
    offloader: ModuleOffloader | None
    whole: bool = False
    swapped: int = 0
    sequence: SequenceParallel | None = None

    @property
    def processes(self) -> int:
        """How many processes train together."""
        return self.accelerator.num_processes

    @property
    def every_process_samples(self) -> bool:
        """True if a forward needs other processes, so that all of them make previews."""
        return self.engine in SHARDED or self.sequence is not None

    @property
    def maps_weights(self) -> bool:
        """True if the engine gives each process its part of the weights straight from the mapped files."""
        return self.engine in SHARDED

    def stepper(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        options: StepOptions,
        *,
        frozen: torch.dtype | None = None,
    ) -> Stepper:
        """An expert's module under the engine. What does not wait on the host is on the device before that: the engine
        would bring everything. `frozen` is the dtype of frozen weights, where those are in mapped files still.
        """
        if any(quantized_layers(module)):
            _refuse_quantized(self.engine)
        if frozen is not None and self.engine == "zero3":
            settle_in_arena(module, frozen, this_machine())
        return Stepper(self.accelerator, module, optimizer, options, waiting=self.place(module), frozen=frozen)

    def place(self, module: nn.Module) -> set[str] | None:
        """Bring a module that was loaded to the host to the device, except for what waits there: returns its names.
        None where nothing waits.
        """
        if self.offloader is None:
            return None
        blocks = blocks_to_swap(module, self.swapped) if self.swapped else []
        return self.offloader.add(module, whole=self.whole, blocks=blocks)


def find_placement(accelerator: Accelerator, experts: Mapping[str, Mapping[str, Any]]) -> Placement:
    """The placement of a run's experts, by their settings. ValueError if the engine cannot train them so."""
    engine, device = engine_of(accelerator), accelerator.device
    whole, swapped = check_engine(engine, experts)
    waits = whole or swapped > 0
    weights = torch.device("cpu") if waits or engine in SHARDED else device
    if waits and device.type == "cpu":
        what = f"swap.blocks={swapped}" if swapped else "experts.offload=cpu"
        say(f"{what} saves nothing here: the device is the CPU, whose memory is the host's")
    offloader = ModuleOffloader(device, this_machine()) if waits else None
    shared_by = max(own["sequence_parallel"] for own in experts.values())
    sequence = None
    if shared_by > 1:
        num_heads = next(iter(experts.values()))["model"]["transformer"]["num_attention_heads"]
        sequence = SequenceParallel.over(accelerator.num_processes, shared_by, device, num_heads=num_heads)
    return Placement(accelerator, engine, device, weights, offloader, whole, swapped, sequence)


def settle_in_arena(module: nn.Module, frozen: torch.dtype, node: Node | None) -> None:
    """Give parameters in mapped files the dtypes of training, in memory that the processes of a machine share, so that
    the host holds them once: DeepSpeed takes each process's part from there.
    """
    parameters = dict(module.named_parameters())
    dtypes = [settled_dtype(module, name, parameter, frozen) for name, parameter in parameters.items()]
    move_to_arena(parameters.values(), node, dtypes=dtypes, lock=False)


def this_machine() -> Node | None:
    """The processes of this machine, which share what waits on the host; None where this is the only one."""
    if distributed.local_world_size() == 1 or not dist.is_initialized():
        return None

    def exchange(word: str) -> str:
        words: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(words, word)
        first: str = words[dist.get_rank() - distributed.local_rank()]
        return first

    return Node(distributed.local_rank() == 0, exchange, dist.barrier)


def check_engine(engine: str, experts: Mapping[str, Mapping[str, Any]]) -> tuple[bool, int]:
    """Whether the expert that is not training waits on the host, and of how many blocks the weights wait there.

    ValueError if the engine cannot train the experts with these settings.
    """
    pair = len(experts) > 1
    if pair and engine.startswith("zero"):
        raise ValueError(
            f"expert=both: DeepSpeed holds one model per job, and the launch file chose {engine}. Start two jobs, one "
            f"per expert, with: bash launch/pair.sh launch/accelerate/{engine}.yaml data.shards=DIR (what follows is "
            "train.py's); or train both in one job with launch/accelerate/fsdp2.yaml or ddp.yaml"
        )
    whole, swapped = False, 0
    for own in experts.values():
        needs_whole = WHOLE.get(own["optimizer"]["_target_"].rpartition(".")[2])
        if needs_whole is not None and engine not in {"single", "ddp"}:
            raise ValueError(
                f"optimizer={needs_whole} needs whole matrices, but {engine} cuts them; use optimizer=adamw, or "
                "launch/accelerate/ddp.yaml"
            )
        if own["base"]["dtype"] in FORMATS:
            _refuse_quantized(engine)
        if (adaptive := adaptive_name(own["optimizer"]["_target_"])) and engine not in {"single", "ddp"}:
            raise ValueError(
                f"optimizer={adaptive} looks at whole weights and keeps numbers of its own, but {engine} cuts "
                "them; use optimizer=adamw, or launch/accelerate/ddp.yaml"
            )
        _check_updates(engine, own)
        if own["adapter"]["name"] == "lokr" and engine == "zero3":
            raise ValueError(
                "adapter=lokr under ZeRO-3: DeepSpeed gathers weights for the layer that computes with them, and a "
                "LoKr's belong to none; use adapter=lora, or launch/accelerate/fsdp2.yaml or zero2.yaml"
            )
        if own["ema"] is not None and engine == "zero3":
            raise ValueError(
                f"ema={own['ema']} under ZeRO-3: DeepSpeed keeps the weights' parts where no average can follow; use "
                "launch/accelerate/fsdp2.yaml or zero2.yaml, or ema=null"
            )
        whole, swapped = pair and own["experts"]["offload"] == "cpu", own["swap"]["blocks"]
        if swapped and engine not in {"single", "ddp"}:
            raise ValueError(
                f"swap.blocks={swapped}: {engine} places the weights itself; give swap.blocks=0, or "
                "launch/accelerate/ddp.yaml"
            )
        if own["compile"] != "none" and engine == "zero3":
            raise ValueError(
                "compile=blocks under ZeRO-3: DeepSpeed fetches weights inside a block, where nothing can be compiled; "
                "give compile=none, or launch/accelerate/fsdp2.yaml"
            )
        if whole and engine == "fsdp2":
            raise ValueError(
                "experts.offload=cpu: fsdp2 shards the weights over the processes instead; give experts.offload=none"
            )
        if whole and own["adapter"]["name"] == "none":
            raise ValueError(
                "experts.offload=cpu keeps frozen weights on the host, but adapter=none trains them; give "
                "experts.offload=none, or adapter=lora"
            )
    return whole, swapped


def _check_updates(engine: str, own: Mapping[str, Any]) -> None:
    """Raise ValueError if an engine cannot update an expert's weights as its settings say."""
    if own["trained"]["dtype"] != "fp32" and engine not in {"single", "ddp"}:
        raise ValueError(
            f"trained.dtype={own['trained']['dtype']}: {engine} shares float32 weights out over the processes; give "
            "trained.dtype=fp32, or launch/accelerate/ddp.yaml"
        )
    if own["update_in_backward"] and engine != "single":
        raise ValueError(
            f"update_in_backward=true: under {engine} a gradient must be summed over the processes first; give "
            "update_in_backward=false, or start one process"
        )
    if own["clip_by"] == "parameter" and engine not in {"single", "ddp"}:
        raise ValueError(
            f"clip_by=parameter: {engine} has only parts of a parameter's gradient; give clip_by=whole, or "
            "launch/accelerate/ddp.yaml"
        )


def _refuse_quantized(engine: str) -> None:
    """Raise ValueError if an engine cannot hold frozen weights in 8 or 4 bits."""
    if engine not in {"single", "ddp"}:
        raise ValueError(
            f"a base in fp8, int8 or nf4 (base.dtype=, or an fp8 file) trains in one process or under DDP, not under "
            f"{engine}; use launch/accelerate/ddp.yaml, or base.dtype=bf16"
        )


def device_name(device: torch.device) -> str:
    """The GPU's name, or the type of processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"
