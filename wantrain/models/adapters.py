"""Low-rank adapters through peft: inject, save, restore. Files are models/lora.py's, in the ComfyUI dialect.

Adapter weights are float32; activations keep the forward's own dtype.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from wantrain.models.lora import Layer, LoRA, check_fits, read_lora, write_lora

TARGETS = {
    "attention": r".*(self_attn|cross_attn)\.(q|k|v|o)",
    "attention+ffn": r".*((self_attn|cross_attn)\.(q|k|v|o)|ffn\.(0|2))",
}


def inject(module: nn.Module, *, rank: int, alpha: int, targets: str, seed: int) -> None:
    """Freeze `module` and put a float32 LoRA beside its target layers; the change starts at zero.

    The whole scale alpha / rank applies. ValueError for an unknown target group.
    """
    if targets not in TARGETS:
        raise ValueError(f"adapter.targets={targets!r} is unknown; choose one of {', '.join(TARGETS)}")
    _put_in(module, LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS[targets]), seed)


def inject_lora(module: nn.Module, lora: LoRA, *, seed: int, where: str | Path = "the LoRA") -> None:
    """Freeze `module` and put an adapter beside it that is `lora`: its layers, ranks, alphas and values, in float32.

    ValueError (naming the file, `where`) if a layer or a shape does not fit the module.
    """
    check_fits(lora, module, where)
    names = {name: f"^{re.escape(name)}$" for name in lora.layers}
    config = LoraConfig(
        target_modules="|".join(re.escape(name) for name in lora.layers),
        rank_pattern={names[name]: layer.rank for name, layer in lora.layers.items()},
        alpha_pattern={names[name]: layer.alpha for name, layer in lora.layers.items()},  # type: ignore[misc]
    )
    _put_in(module, config, seed)
    with torch.no_grad():
        for name, layer in adapter_layers(module).items():
            layer.down.copy_(lora.layers[name].down)
            layer.up.copy_(lora.layers[name].up)


def _put_in(module: nn.Module, config: LoraConfig, seed: int) -> None:
    module.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, module)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def _layers(module: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}


def has_adapter(module: nn.Module) -> bool:
    """True if `inject` has been here."""
    return bool(_layers(module))


@contextmanager
def keep_activation_dtype(module: nn.Module) -> Iterator[None]:
    """While active, float32 adapters do not drag their bf16 inputs up to float32 (4 TB of traffic in a 14B step)."""
    if not has_adapter(module):
        yield
        return
    with disable_input_dtype_casting(module):
        yield


def adapter_layers(module: nn.Module, copy: Callable[[Tensor], Tensor] = Tensor.detach) -> dict[str, Layer]:
    """The adapter, by official module name; its tensors are the module's own, or what `copy` makes of them."""
    return {
        name: Layer(
            copy(layer.lora_A["default"].weight),
            copy(layer.lora_B["default"].weight),
            float(layer.lora_alpha["default"]),
        )
        for name, layer in _layers(module).items()
    }


def save_adapter(path: Path, module: nn.Module, metadata: Mapping[str, object]) -> None:
    """Write the adapter as one file; `metadata` says for which expert of which model it is."""
    write_lora(path, adapter_layers(module), metadata=metadata)


def restore_adapter(path: Path, module: nn.Module) -> None:
    """Load a file that `save_adapter` wrote into the adapter of a module of the same shape."""
    stored, current = read_lora(path).layers, adapter_layers(module)
    if stored.keys() != current.keys():
        raise ValueError(f"{path} holds an adapter of other layers; it belongs to another run")
    for name, layer in current.items():
        own = stored[name]
        if (own.rank, own.alpha) != (layer.rank, layer.alpha):
            raise ValueError(
                f"{path}: {name} has rank {own.rank} and alpha {own.alpha:g}, in this run it has {layer.rank} and "
                f"{layer.alpha:g}"
            )
        theirs, ours = ((part.up.shape[0], part.down.shape[1]) for part in (own, layer))
        if theirs != ours:
            raise ValueError(
                f"{path}: {name} is {theirs[0]} x {theirs[1]}, in this run it is {ours[0]} x {ours[1]}; the adapter "
                "belongs to another run"
            )
        layer.down.copy_(own.down)
        layer.up.copy_(own.up)
