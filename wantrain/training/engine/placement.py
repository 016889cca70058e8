"""Where the experts of a run live, and what an engine cannot train."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from wantrain.models.offload import WeightSwapper
from wantrain.training.engine.accelerator import SHARDED, engine_of

#: Optimizers that look at whole matrices, or at blocks of them, and not at each element: class -> what users call it.
WHOLE = {"MuonAdamW": "muon", "Muon": "torch.optim.Muon", "Adafactor": "adafactor", "adamw_8bit": "adamw_8bit"}


@dataclass(frozen=True)
class Placement:
    """Where a run's experts live.

    device     where weights are loaded to at first; an engine that cuts them up takes them from the host
    swapper  keeps the frozen weights of the expert whose turn it is not on the host, if that is wanted
    """

    accelerator: Accelerator
    engine: str
    device: torch.device
    swapper: WeightSwapper | None


def find_placement(accelerator: Accelerator, experts: Mapping[str, Mapping[str, Any]]) -> Placement:
    """Where the experts of a run live, by their settings. ValueError if the engine cannot train them, or not so."""
    engine = engine_of(accelerator)
    hosted = check_engine(engine, experts)
    device = torch.device("cpu") if hosted or engine in SHARDED else accelerator.device
    return Placement(accelerator, engine, device, WeightSwapper(accelerator.device) if hosted else None)


def card_of(placement: Placement) -> int | None:
    """Bytes of the GPU that holds the whole run; None on a CPU, or where processes share it out."""
    if placement.engine not in {"single", "ddp"} or placement.accelerator.device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(placement.accelerator.device).total_memory)


def check_engine(engine: str, experts: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the experts wait for their turn on the host; ValueError if the engine cannot train them, or not so."""
    pair = len(experts) > 1
    if pair and engine.startswith("zero"):
        raise ValueError(
            f"expert=both: DeepSpeed holds one model per job, and the launch file chose {engine}. Start two jobs, one "
            f"per expert, with: bash launch/pair.sh launch/accelerate/{engine}.yaml data.shards=DIR (what follows is "
            "train.py's); or train both in one job with launch/accelerate/fsdp2.yaml or ddp.yaml"
        )
    hosted = False
    for own in experts.values():
        whole = WHOLE.get(own["optimizer"]["_target_"].rpartition(".")[2])
        if whole is not None and engine not in {"single", "ddp"}:
            raise ValueError(
                f"optimizer={whole} needs whole matrices, but {engine} cuts them; use optimizer=adamw, or "
                "launch/accelerate/ddp.yaml"
            )
        if own["ema"] is not None and engine == "zero3":
            raise ValueError(
                f"ema={own['ema']} under ZeRO-3: DeepSpeed keeps the weights' parts where no average can follow; use "
                "launch/accelerate/fsdp2.yaml or zero2.yaml, or ema=null"
            )
        hosted = pair and own["experts"]["idle"] == "cpu"
        if hosted and engine == "fsdp2":
            raise ValueError("experts.idle=cpu: fsdp2 keeps only parts of the weights anywhere; give experts.idle=gpu")
        if hosted and own["adapter"]["name"] == "none":
            raise ValueError(
                "experts.idle=cpu keeps frozen weights on the host, but adapter=none trains them; give "
                "experts.idle=gpu, or adapter=lora"
            )
    return hosted


def device_name(device: torch.device) -> str:
    """What computes: the GPU's name, or the processor's kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"
