"""Low-rank adapters through peft, LoRA and DoRA: inject, snapshot, restore. formats/lora.py reads and writes the files.

Adapter weights are float32; activations keep the dtype of the forward. Which layers can be adapted is declared by the
model (`adapter_targets`, see facts.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wantrain.models.formats.lora import LoRA, check_fits, read_lora
from wantrain.models.formats.lora_layers import Layer, row_lengths
from wantrain.models.linear import LowRank
from wantrain.util import libraries


@dataclass(frozen=True)
class AdapterSettings:
    """A LoRA (or, with `dora`, a DoRA).

    targets  a group of the model's `adapter_targets`
    scale of the change: alpha / rank, or alpha / sqrt(rank) if `rank_stabilized` (arXiv 2312.03732)
    rank_pattern, alpha_pattern  own ranks and alphas of layers, by whole pieces of their names ("ffn", "blocks.1",
             "cross_attn.k"); of several that fit a layer the last counts
    """

    rank: int
    alpha: float
    targets: str
    dora: bool = False
    rank_stabilized: bool = False
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None


def inject(module: nn.Module, settings: AdapterSettings, *, seed: int) -> None:
    """Freeze `module` and put a float32 adapter beside its target layers; the change starts at zero.

    ValueError for an unknown target group or a pattern that fits no target.
    """
    groups: Mapping[str, str] = getattr(module, "adapter_targets", {})
    if not groups:
        raise ValueError(
            f"{type(module).__name__} declares no layers for an adapter (adapter_targets); give adapter=none"
        )
    if settings.targets not in groups:
        raise ValueError(f"adapter.targets={settings.targets!r} is unknown; choose one of {', '.join(groups)}")
    linear = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    names = [name for name in linear if re.fullmatch(groups[settings.targets], name)]
    ranks = _by_pattern("rank", names, settings.rank, settings.rank_pattern or {})
    alphas = _by_pattern("alpha", names, settings.alpha, settings.alpha_pattern or {})
    sizes = {}
    for name in names:
        # Readers of the file divide alpha by the rank, so rank stabilisation is part of the alpha. It is rounded to the
        # float32 that files hold, so that a resumed run finds in its checkpoint the same scale.
        alpha = alphas[name] * (ranks[name] ** 0.5 if settings.rank_stabilized else 1.0)
        sizes[name] = (int(ranks[name]), torch.tensor(alpha, dtype=torch.float32, device="cpu").item())
    _add_layers(module, sizes, seed, settings.dora)


def _by_pattern(what: str, names: list[str], default: float, pattern: Mapping[str, float]) -> dict[str, float]:
    """The rank or alpha of each layer: that of the last pattern that fits whole pieces of its name, or `default`."""
    values = dict.fromkeys(names, default)
    for part, value in pattern.items():
        fitting = [name for name in names if f".{part}." in f".{name}."]
        if not fitting:
            raise ValueError(
                f"adapter.{what}_pattern: {part} is part of no layer's name among adapter.targets (first: {names[0]}); "
                "give whole pieces such as ffn, cross_attn.k or blocks.1"
            )
        values.update(dict.fromkeys(fitting, value))
    return values


def inject_lora(module: nn.Module, lora: LoRA, *, seed: int, where: str | Path = "the LoRA") -> None:
    """Freeze `module` and add the adapter `lora`, with its layers, ranks, alphas and values, in float32.

    ValueError (naming the file, `where`) if a layer or a shape does not fit the module, or if it is of a kind that is
    merged but not trained on (LoHa, LoKr, whole differences).
    """
    stored = lora.trainable(where)
    check_fits(lora, module, where)
    sizes = {name: (layer.rank, layer.alpha) for name, layer in stored.items()}
    _add_layers(module, sizes, seed, lora.is_dora)
    for name, layer in adapter_layers(module).items():
        _copy(stored[name], layer)


def _add_layers(module: nn.Module, sizes: Mapping[str, tuple[int, float]], seed: int, dora: bool) -> None:
    """Freeze everything and put trainable float32 tensors beside the layers named in `sizes`: (rank, alpha) each."""
    with libraries.importing():  # takes seconds, so only where an adapter is used
        from peft import LoraConfig, inject_adapter_in_model

    patterns = {name: f"^{re.escape(name)}$" for name in sizes}
    config = LoraConfig(
        target_modules="|".join(re.escape(name) for name in sizes),
        rank_pattern={patterns[name]: rank for name, (rank, _) in sizes.items()},
        alpha_pattern={patterns[name]: alpha for name, (_, alpha) in sizes.items()},  # type: ignore[misc]
        use_dora=dora,
    )
    module.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with libraries.importing():  # peft imports bitsandbytes here, where it is installed
            inject_adapter_in_model(config, module)
    for layer in _layers(module).values():
        # Else peft casts bf16 inputs to the adapter's float32 (4 TB of traffic in a 14B step). Set for good, not around
        # the forward: a recomputed forward runs inside the backward.
        layer.cast_input_dtype_enabled = False
        if dora:
            layer.lora_magnitude_vector["default"] = Magnitude(layer.get_base_layer().weight)
        else:
            layer.lora_variant["default"] = NarrowScale()
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


class NarrowScale:
    """The forward of a LoRA layer, in place of peft's: the scale is applied between A and B. For peft a `LoraVariant`.

    peft multiplies the output of B, which is as wide as the layer, also by a scale of 1: 6.5 GB of memory traffic
    forward and as much backward in one A14B block at 32,760 tokens. Between A and B activations are as narrow as the
    rank, and a scale of 1 is skipped. For powers of two results and gradients equal peft's, bit for bit.
    """

    @staticmethod
    def low_rank(module: Any) -> LowRank:
        """What linear.py computes with, where it computes in the place of `module`."""
        down, up = (part["default"].weight for part in (module.lora_A, module.lora_B))
        return LowRank(down, up, module.scaling["default"])

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """`result` (the frozen layer's output) plus the LoRA's; `kwargs` are what peft passes to other variants."""
        narrow: Tensor = module.lora_A[active_adapter](x)
        scaling = module.scaling[active_adapter]
        if scaling != 1:
            narrow = narrow * scaling
        changed: Tensor = result + module.lora_B[active_adapter](narrow)
        return changed


class Magnitude(nn.Module):
    """A DoRA layer's magnitude (the length of each row of the changed weight), and the layer's forward, not peft's.

    peft computes the rows' lengths in the activations' dtype. In bf16 that rounds them by up to 0.4 %, as much as
    training changes them, so that merging would give another model; and it casts every activation to float32. Here
    lengths are float32 and activations keep their dtype.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(row_lengths(weight.detach()))

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: nn.Linear,
        lora_B: nn.Linear,
        scaling: float,
        base_layer: nn.Linear,
        base_result: Tensor,
        adapter_name: str = "default",
    ) -> Tensor:
        """What the DoRA adds to `base_result` (the frozen layer's output, with bias), in its dtype."""
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            # No gradient flows through the lengths (arXiv 2402.09353, section 4.3).
            change = lora_B.weight @ lora_A.weight
            lengths = row_lengths(base_layer.weight.float() + scaling * change)
        gain = self.weight / lengths
        plain = base_result if base_layer.bias is None else base_result - base_layer.bias.to(base_result.dtype)
        dtype = base_result.dtype
        # gain - 1 is computed in float32 and then rounded: bf16 would round a gain near 1 to 1.
        return (gain - 1).to(dtype) * plain + (gain * scaling).to(dtype) * lora_B(lora_A(x))


def _layers(module: nn.Module) -> dict[str, Any]:
    """The layers with an adapter, by name; found by the attributes that peft gives them, without importing peft."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(getattr(layer, "lora_A", None), nn.ModuleDict)
    }


def has_adapter(module: nn.Module) -> bool:
    """True if `module` has adapter layers."""
    return bool(_layers(module))


@contextmanager
def switched_off(module: nn.Module) -> Iterator[None]:
    """While active, the module computes what its base does; meanwhile the adapter cannot be trained."""
    layers = _layers(module).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def adapter_layers(module: nn.Module, copy: Callable[[Tensor], Tensor] = Tensor.detach) -> dict[str, Layer]:
    """The adapter's layers by official module name, with `copy` applied to each tensor."""
    return {
        name: Layer(
            copy(layer.lora_A["default"].weight),
            copy(layer.lora_B["default"].weight),
            float(layer.lora_alpha["default"]),
            copy(layer.lora_magnitude_vector["default"].weight) if layer.use_dora["default"] else None,
        )
        for name, layer in _layers(module).items()
    }


def restore_adapter(path: Path, module: nn.Module) -> None:
    """Load a file that `write_lora` wrote from `adapter_layers` into the adapter of a module of the same shape."""
    stored, current = read_lora(path).trainable(path), adapter_layers(module)
    if stored.keys() != current.keys():
        raise ValueError(f"{path} holds an adapter of other layers; it belongs to another run")
    for name, layer in current.items():
        saved = stored[name]
        types = ["LoRA" if part.magnitude is None else "DoRA" for part in (saved, layer)]
        if types[0] != types[1]:
            raise ValueError(f"{path} holds a {types[0]}, this run trains a {types[1]}; it belongs to another run")
        if (saved.rank, saved.alpha) != (layer.rank, layer.alpha):
            raise ValueError(
                f"{path}: {name} has rank {saved.rank} and alpha {saved.alpha:g}, in this run it has {layer.rank} and "
                f"{layer.alpha:g}"
            )
        theirs, ours = ((part.up.shape[0], part.down.shape[1]) for part in (saved, layer))
        if theirs != ours:
            raise ValueError(
                f"{path}: {name} is {theirs[0]} x {theirs[1]}, in this run it is {ours[0]} x {ours[1]}; the adapter "
                "belongs to another run"
            )
        _copy(saved, layer)


@torch.no_grad()
def _copy(stored: Layer, current: Layer) -> None:
    """Copy the values of a stored layer into a layer of the module."""
    current.down.copy_(stored.down)
    current.up.copy_(stored.up)
    if current.magnitude is not None and stored.magnitude is not None:
        current.magnitude.copy_(stored.magnitude)
