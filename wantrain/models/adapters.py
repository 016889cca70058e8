"""Low-rank adapters through peft (LoRA, DoRA, LoKr): inject, snapshot, restore. formats/lora.py reads and writes files.

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

from wantrain.models import kronecker
from wantrain.models.formats.lora import LoRA, check_fits, read_lora
from wantrain.models.formats.lora_layers import Kronecker, Layer, Trainable, kind_of, row_lengths
from wantrain.models.linear import LowRank
from wantrain.util import libraries

#: adapter= of what trains beside frozen weights.
ADAPTERS = ("lora", "dora", "lokr")
#: Tensors that are zero when training begins, so that the adapter adds nothing then.
_ZERO_AT_START = ("lora_B", *kronecker.ZERO_AT_START)
#: Other tensors of a LoRA or LoKr. A DoRA's magnitudes are neither: never zero, they add something by themselves.
_OTHERS = ("lora_A", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a")


@dataclass(frozen=True)
class KroneckerSettings:
    """The sizes of a LoKr's matrices, whose Kronecker product the change is.

    factor          rows and columns of the first matrix: the layer's divide by it, else the largest number below by
                    which they do; None: near the square root, so that both matrices are about equally large
    decompose_both  the first matrix is a product of two of the rank's width too, if that is smaller. The second always
    """

    factor: int | None = None
    decompose_both: bool = False


@dataclass(frozen=True)
class AdapterSettings:
    """A LoRA (or, with `dora`, a DoRA; with `lokr`, a LoKr).

    targets  a group of the model's `adapter_targets`
    scale of the change: alpha / rank, or alpha / sqrt(rank) if `rank_stabilized` (arXiv 2312.03732)
    rank_pattern, alpha_pattern  own ranks and alphas of layers, by whole pieces of their names ("ffn", "blocks.1",
             "cross_attn.k"); of several that fit a layer the last counts
    """

    rank: int
    alpha: float
    targets: str
    dora: bool = False
    lokr: KroneckerSettings | None = None
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
    _add_layers(module, sizes, seed, dora=settings.dora, lokr=settings.lokr)
    layers = adapter_layers(module).values()
    if settings.lokr is not None and settings.alpha != settings.rank and all(layer.rank is None for layer in layers):
        raise ValueError(
            f"adapter.alpha={settings.alpha:g} has no effect: with adapter.rank={settings.rank} both matrices of every "
            "layer are whole, and readers of the file scale only products; leave out adapter.alpha, or give a lower "
            "adapter.rank"
        )


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
    merged but not trained on (LoHa, whole differences).
    """
    stored = lora.trainable(where)
    check_fits(lora, module, where)
    sizes = {name: (layer.rank or 1, layer.alpha or 1.0) for name, layer in stored.items()}
    _add_layers(module, sizes, seed, dora=lora.is_dora, lokr=KroneckerSettings() if lora.kind == "lokr" else None)
    for name, module_layer in _layers(module).items():
        if isinstance(layer := stored[name], Kronecker):  # its shapes may be any that multiply to the layer's
            kronecker.set_parts(module_layer, "lokr_w1", tuple(part.float() for part in layer.first))
            kronecker.set_parts(module_layer, "lokr_w2", tuple(part.float() for part in layer.second))
            module_layer.scaling["default"] = layer.scale
    for name, layer in adapter_layers(module).items():
        _copy(stored[name], layer)


def _add_layers(
    module: nn.Module,
    sizes: Mapping[str, tuple[int, float]],
    seed: int,
    *,
    dora: bool,
    lokr: KroneckerSettings | None = None,
) -> None:
    """Freeze everything and put trainable float32 tensors beside the layers named in `sizes`: (rank, alpha) each."""
    with libraries.importing():  # takes seconds, so only where an adapter is used
        from peft import LoKrConfig, LoraConfig, inject_adapter_in_model

    patterns = {name: f"^{re.escape(name)}$" for name in sizes}
    common: dict[str, Any] = {
        "target_modules": "|".join(re.escape(name) for name in sizes),
        "rank_pattern": {patterns[name]: rank for name, (rank, _) in sizes.items()},
        "alpha_pattern": {patterns[name]: alpha for name, (_, alpha) in sizes.items()},
    }
    config: LoraConfig | LoKrConfig
    if lokr is None:
        config = LoraConfig(**common, use_dora=dora)
    else:
        shape: dict[str, Any] = {"decompose_factor": lokr.factor or -1, "decompose_both": lokr.decompose_both}
        config = LoKrConfig(**common, **shape, init_weights="lycoris")
    module.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with libraries.importing():  # peft imports bitsandbytes here, where it is installed
            inject_adapter_in_model(config, module)
    for layer in _layers(module).values():
        # Else peft casts bf16 inputs to the adapter's float32 (4 TB of traffic in a 14B step). Set for good, not around
        # the forward: a recomputed forward runs inside the backward.
        layer.cast_input_dtype_enabled = False
        if lokr is not None:
            kronecker.compute_narrow(layer)
            if len(kronecker.parts_of(layer, "lokr_w1")) == len(kronecker.parts_of(layer, "lokr_w2")) == 1:
                layer.scaling["default"] = 1.0  # readers of the file scale only products
        elif dora:
            layer.lora_magnitude_vector["default"] = Magnitude(layer.get_base_layer().weight)
        else:
            layer.lora_variant["default"] = NarrowScale()
    for name, parameter in module.named_parameters():
        if is_of_adapter(name):
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
        up = module.lora_B[active_adapter]
        if (
            torch.compiler.is_compiling()
        ):  # the product adds in its own pass; elsewhere calling `up` may fetch its weight
            flat = torch.addmm(result.flatten(0, -2), narrow.flatten(0, -2), up.weight.t())
            return flat.view_as(result)
        changed: Tensor = result + up(narrow)
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
        if isinstance(getattr(layer, "lora_A", None), nn.ModuleDict) or kronecker.is_kronecker(layer)
    }


def is_of_adapter(name: str) -> bool:
    """True for the name of an adapter's parameter."""
    return ".lora_" in f".{name}" or ".lokr_" in f".{name}"


def is_zero_at_start(name: str) -> bool:
    """True for a LoRA's B and what corresponds to it in a LoKr: zero when training begins, moved by its first step."""
    return any(f".{kind}." in name for kind in _ZERO_AT_START)


def adds_by_itself(name: str) -> bool:
    """False for an adapter's parameters that add nothing to the base while those that are zero at start are zero."""
    return not any(f".{kind}." in name for kind in _OTHERS)


def has_adapter(module: nn.Module) -> bool:
    """True if `module` has adapter layers."""
    return bool(_layers(module))


@contextmanager
def switched_off(module: nn.Module) -> Iterator[None]:
    """While active, the module computes what its base does.

    Between a forward with the adapter and its backward it must be over: what a backward computes again would be the
    base's. peft's own switch also sets requires_grad, which engines read that hold weights in parts.
    """
    before = {layer: layer.disable_adapters for layer in _layers(module).values()}
    for layer in before:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in before.items():
            layer._disable_adapters = was


def adapter_layers(module: nn.Module, copy: Callable[[Tensor], Tensor] = Tensor.detach) -> dict[str, Trainable]:
    """The adapter's layers by official module name, with `copy` applied to each tensor."""
    return {name: _layer(layer, copy) for name, layer in _layers(module).items()}


def _layer(layer: Any, copy: Callable[[Tensor], Tensor]) -> Trainable:
    if kronecker.is_kronecker(layer):
        first, second = (
            tuple(copy(part) for part in kronecker.parts_of(layer, name)) for name in ("lokr_w1", "lokr_w2")
        )
        return Kronecker(first, second, float(layer.scaling["default"]))
    return Layer(
        copy(layer.lora_A["default"].weight),
        copy(layer.lora_B["default"].weight),
        float(layer.lora_alpha["default"]),
        copy(layer.lora_magnitude_vector["default"].weight) if layer.use_dora["default"] else None,
    )


def restore_adapter(path: Path, module: nn.Module) -> None:
    """Load a file that `write_lora` wrote from `adapter_layers` into the adapter of a module of the same shape."""
    stored, current = read_lora(path).trainable(path), adapter_layers(module)
    if stored.keys() != current.keys():
        raise ValueError(f"{path} holds an adapter of other layers; it belongs to another run")
    for name, layer in current.items():
        saved = stored[name]
        types = [kind_of(part) for part in (saved, layer)]
        if types[0] != types[1]:
            raise ValueError(f"{path} holds a {types[0]}, this run trains a {types[1]}; it belongs to another run")
        if (saved.rank, saved.alpha) != (layer.rank, layer.alpha):
            raise ValueError(
                f"{path}: {name} has rank {saved.rank} and alpha {_number(saved.alpha)}, in this run it has "
                f"{layer.rank} and {_number(layer.alpha)}"
            )
        for theirs, ours in ((saved.shape, layer.shape), *zip(_shapes(saved), _shapes(layer), strict=False)):
            if theirs != ours:
                raise ValueError(
                    f"{path}: {name} is {' x '.join(map(str, theirs))}, in this run it is "
                    f"{' x '.join(map(str, ours))}; the adapter belongs to another run"
                )
        _copy(saved, layer)


def _shapes(layer: Trainable) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in layer.tensors()]


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"


@torch.no_grad()
def _copy(stored: Trainable, current: Trainable) -> None:
    """Copy the values of a stored layer into a layer of the module."""
    for tensor, values in zip(current.tensors(), stored.tensors(), strict=True):
        tensor.copy_(values)
