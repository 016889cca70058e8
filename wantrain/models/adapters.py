"""Low-rank adapters through peft: inject, save, load, merge.

Files wear the ComfyUI dialect (`diffusion_model.<official name>.lora_A.weight`, `.lora_B.weight`, `.alpha`), which
diffusers loads too. Adapter weights are float32; activations keep the forward's own dtype.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from wantrain.models.weights import read_file

PREFIX = "diffusion_model."
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
    module.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS[targets], init_lora_weights=True)
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


def adapter_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The adapter under its file names, alpha beside each pair."""
    tensors = {}
    for name, layer in _layers(module).items():
        key = PREFIX + name
        tensors[f"{key}.lora_A.weight"] = layer.lora_A["default"].weight.detach()
        tensors[f"{key}.lora_B.weight"] = layer.lora_B["default"].weight.detach()
        tensors[f"{key}.alpha"] = torch.tensor(float(layer.lora_alpha["default"]))
    return tensors


def save_adapter(path: Path, module: nn.Module, metadata: Mapping[str, str | float]) -> None:
    """Write the adapter as one safetensors file; `metadata` says for which expert of which model it is."""
    tensors = {key: tensor.cpu().contiguous() for key, tensor in adapter_tensors(module).items()}
    save_file(tensors, path, metadata={key: str(value) for key, value in metadata.items()})


def restore_adapter(path: Path, module: nn.Module) -> None:
    """Load a file that `save_adapter` wrote into the adapter of a module of the same shape."""
    stored, _ = read_file(path)
    current = adapter_tensors(module)
    if stored.keys() != current.keys():
        raise ValueError(f"{path} holds an adapter of other layers; it belongs to another run")
    for key, tensor in current.items():
        if stored[key].shape != tensor.shape:
            raise ValueError(f"{path}: {key} is {tuple(stored[key].shape)}, this run's is {tuple(tensor.shape)}")
        tensor.copy_(stored[key])


def merge_file(path: str | Path, module: nn.Module, *, scale: float = 1.0, expert: str | None = None) -> int:
    """Add a LoRA file's change, times `scale`, to a plain module's weights; returns how many layers changed.

    A missing alpha means alpha = rank. ValueError if the file is for another expert, or a key or shape does not fit:
    a LoRA that half applies is worse than none.
    """
    tensors, metadata = read_file(path)
    if expert is not None and metadata.get("expert", expert) != expert:
        raise ValueError(f"{path} was trained for {metadata['expert']}, not for {expert}; swap the two files")
    parameters = dict(module.named_parameters())
    pairs = {match[1] for key in tensors if (match := re.fullmatch(r"(.+)\.lora_A\.weight", key))}
    known = {f"{name}.{end}" for name in pairs for end in ("lora_A.weight", "lora_B.weight", "alpha")}
    strange = sorted(tensors.keys() - known) or sorted(
        name for name in pairs if f"{name.removeprefix(PREFIX)}.weight" not in parameters
    )
    if strange or not pairs:
        example = strange[0] if strange else json.dumps(sorted(tensors)[:1])
        raise ValueError(
            f"{path}: {len(strange)} keys do not fit this model (first: {example}); expected "
            f"{PREFIX}blocks.N.self_attn.q.lora_A.weight and so on, as export.py and ComfyUI write them"
        )
    for name in sorted(pairs):  # all of them before the first is merged
        _check_pair(path, name, tensors, parameters[f"{name.removeprefix(PREFIX)}.weight"])
    for name in sorted(pairs):
        down, up = tensors[f"{name}.lora_A.weight"].float(), tensors[f"{name}.lora_B.weight"].float()
        alpha = tensors.get(f"{name}.alpha", torch.tensor(float(down.shape[0]))).item()
        weight = parameters[f"{name.removeprefix(PREFIX)}.weight"]
        change = (up @ down) * (scale * alpha / down.shape[0])
        weight.data = (weight.data.float() + change.to(weight.device)).to(weight.dtype)
    return len(pairs)


def _check_pair(path: str | Path, name: str, tensors: Mapping[str, Tensor], weight: Tensor) -> None:
    """Raise ValueError unless a layer's two matrices are there and multiply to the shape of its weight."""
    down, up = tensors[f"{name}.lora_A.weight"], tensors.get(f"{name}.lora_B.weight")
    if up is None:
        raise ValueError(f"{path}: {name} has lora_A but no lora_B; the file is not whole")
    if (up.shape[0], down.shape[1]) != tuple(weight.shape) or up.shape[1] != down.shape[0]:
        raise ValueError(
            f"{path}: {name} is {tuple(up.shape)} x {tuple(down.shape)}, the model's layer {tuple(weight.shape)}"
        )
