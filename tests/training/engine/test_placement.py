"""What an engine cannot train is refused before anything starts; weights are loaded where the engine takes them."""

import re

import pytest
import torch

from wantrain import config
from wantrain.training.engine import placement

IMPOSSIBLE = [
    ("zero2", ["expert=both"], "bash launch/pair.sh launch/accelerate/zero2.yaml"),
    ("fsdp2", ["optimizer=muon"], "optimizer=muon needs whole matrices, but fsdp2 cuts them"),
    ("zero3", ["optimizer=muon"], "optimizer=muon needs whole matrices, but zero3 cuts them"),
    ("fsdp2", ["optimizer=adamw_8bit"], "optimizer=adamw_8bit needs whole matrices, but fsdp2 cuts them"),
    ("zero2", ["optimizer=adafactor"], "optimizer=adafactor needs whole matrices, but zero2 cuts them"),
    ("zero3", ["ema=0.9"], "ema=0.9 under ZeRO-3"),
    ("fsdp2", ["expert=both", "adapter=lora", "experts.offload=cpu"], "experts.offload=cpu: fsdp2 shards the weights"),
    ("fsdp2", ["adapter=lora", "base.dtype=nf4"], "a base in fp8, int8 or nf4 (base.dtype=, or an fp8 file) trains in"),
    ("zero3", ["adapter=dora", "base.dtype=int8"], "not under zero3; use launch/accelerate/ddp.yaml"),
    ("single", ["expert=both", "experts.offload=cpu"], "adapter=none trains them"),
    ("zero3", ["compile=blocks"], "compile=blocks under ZeRO-3: DeepSpeed fetches weights inside a block"),
    ("fsdp2", ["adapter=lora", "swap.blocks=4"], "swap.blocks=4: fsdp2 places the weights itself"),
    ("fsdp2", ["trained.dtype=bf16"], "trained.dtype=bf16: fsdp2 shares float32 weights out over the processes"),
    ("zero1", ["trained.dtype=bf16"], "trained.dtype=bf16: zero1 shares float32 weights out over the processes"),
    ("ddp", ["update_in_backward=true"], "update_in_backward=true: under ddp a gradient must be summed"),
    ("zero3", ["update_in_backward=true"], "update_in_backward=true: under zero3 a gradient must be summed"),
    ("fsdp2", ["clip_by=parameter"], "clip_by=parameter: fsdp2 has only parts of a parameter's gradient"),
    ("zero2", ["adapter=lora", "swap.blocks=4"], "swap.blocks=4: zero2 places the weights itself"),
]


@pytest.mark.parametrize(("engine", "given", "message"), IMPOSSIBLE)
def test_impossible_settings_refused(engine, given, message, monkeypatch):
    """Settings that an engine cannot train are refused before anything starts."""
    monkeypatch.setattr(placement, "engine_of", lambda accelerator: engine)
    experts = config.experts(config.compose("train", given))
    with pytest.raises(ValueError, match=re.escape(message)):
        placement.find_placement(Alone(), {name: config.plain(own) for name, own in experts.items()})


class Alone:
    """As much of an Accelerator as a placement needs."""

    device = torch.device("cpu")


def test_offload_loads_on_the_host(monkeypatch):
    swap = ["adapter=lora", "swap.blocks=4"]
    for engine, given, offloads in (
        ("ddp", [], False),
        ("single", ["adapter=lora", "experts.offload=cpu"], True),
        ("single", swap, True),
    ):
        monkeypatch.setattr(placement, "engine_of", lambda accelerator, engine=engine: engine)
        experts = config.experts(config.compose("train", ["expert=both", *given]))
        found = placement.find_placement(Alone(), {name: config.plain(own) for name, own in experts.items()})
        assert (found.offloader is not None) == offloads
