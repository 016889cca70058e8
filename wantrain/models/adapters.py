"""Low-rank adapters through peft, LoRA and DoRA: inject, save, restore. Files are models/lora.py's, in the ComfyUI
dialect.

Adapter weights are float32; activations keep the forward's own dtype.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wantrain.models.formats.lora import Layer, LoRA, check_fits, read_lora, row_lengths
from wantrain.util import libraries

#: Groups of linear layers, by name. "all" are those that the forward calls as modules; the patch embedding is none of
#: them (the transformer multiplies by the convolution's weight itself), so nothing put beside it would be heard.
TARGETS = {
    "attention": r".*(self_attn|cross_attn)\.(q|k|v|o)",
    "attention+ffn": r".*((self_attn|cross_attn)\.(q|k|v|o)|ffn\.(0|2))",
    "all": r".*",
}


def inject(
    module: nn.Module,
    *,
    rank: int,
    alpha: float,
    targets: str,
    seed: int,
    dora: bool = False,
    rank_stabilized: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> None:
    """Freeze `module` and put a float32 LoRA (or DoRA) beside its target layers; the change starts at zero.

    The whole scale applies: alpha / rank, or alpha / sqrt(rank) if `rank_stabilized` (arXiv 2312.03732). The patterns
    give layers their own rank or alpha by whole pieces of their name ("ffn", "blocks.1", "cross_attn.k"); where
    several fit, the last one counts. ValueError for an unknown target group or a pattern that fits no target.
    """
    if targets not in TARGETS:
        raise ValueError(f"adapter.targets={targets!r} is unknown; choose one of {', '.join(TARGETS)}")
    linear = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    names = [name for name in linear if re.fullmatch(TARGETS[targets], name)]
    if not names:
        raise ValueError(f"adapter.targets={targets}: this model has no such layers; it is no Wan transformer")
    ranks = _by_pattern("rank", names, rank, rank_pattern or {})
    alphas = _by_pattern("alpha", names, alpha, alpha_pattern or {})
    sizes = {}
    for name in names:
        # Whoever reads the file divides alpha by the rank; what rank stabilisation adds goes into the alpha. It is
        # rounded to the float32 that files hold, so that a resumed run finds its own strength in its checkpoint.
        own = alphas[name] * (ranks[name] ** 0.5 if rank_stabilized else 1.0)
        sizes[name] = (int(ranks[name]), torch.tensor(own, dtype=torch.float32, device="cpu").item())
    _put_in(module, sizes, seed, dora)


def _by_pattern(what: str, names: list[str], default: float, pattern: Mapping[str, float]) -> dict[str, float]:
    """A value for each layer: the last pattern's that fits whole pieces of its name, else the default."""
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
    """Freeze `module` and put an adapter beside it that is `lora`: its layers, ranks, alphas and values, in float32.

    ValueError (naming the file, `where`) if a layer or a shape does not fit the module.
    """
    check_fits(lora, module, where)
    sizes = {name: (layer.rank, layer.alpha) for name, layer in lora.layers.items()}
    _put_in(module, sizes, seed, lora.is_dora)
    for name, layer in adapter_layers(module).items():
        _copy(lora.layers[name], layer)


def _put_in(module: nn.Module, sizes: Mapping[str, tuple[int, float]], seed: int, dora: bool) -> None:
    """Freeze everything and put trainable float32 tensors beside the layers named in `sizes`: (rank, alpha) each."""
    with libraries.importing():  # seconds, which only runs with an adapter pay
        from peft import LoraConfig, inject_adapter_in_model

    whole = {name: f"^{re.escape(name)}$" for name in sizes}
    config = LoraConfig(
        target_modules="|".join(re.escape(name) for name in sizes),
        rank_pattern={whole[name]: rank for name, (rank, _) in sizes.items()},
        alpha_pattern={whole[name]: alpha for name, (_, alpha) in sizes.items()},  # type: ignore[misc]
        use_dora=dora,
    )
    module.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, module)
    for layer in _layers(module).values():
        if dora:
            layer.lora_magnitude_vector["default"] = Magnitude(layer.get_base_layer().weight)
        else:
            layer.lora_variant["default"] = NarrowScale()
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


class NarrowScale:
    """A LoRA's part of the forward pass, in the place of peft's own, which multiplies what B answers.

    That product is as wide as the layer, and it is computed for a scale of 1 too: 6.5 GB of memory traffic forward and
    as much backward in one A14B block at 32,760 tokens. Here the scale is applied between A and B, where activations
    are as narrow as the rank, and a scale of 1 not at all. For powers of two the answers and gradients are peft's, bit
    for bit. To peft it is a layer's `LoraVariant`.
    """

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """`result` (the frozen layer's answer) with the change added; peft's further keywords are other variants'."""
        narrow: Tensor = module.lora_A[active_adapter](x)
        scaling = module.scaling[active_adapter]
        if scaling != 1:
            narrow = narrow * scaling
        changed: Tensor = result + module.lora_B[active_adapter](narrow)
        return changed


class Magnitude(nn.Module):
    """The lengths of a DoRA layer's rows, and its part of the forward pass, in the place of peft's own.

    peft computes the lengths of the changed weight in the activations' dtype: in bf16 each row's is rounded by up to
    0.4 %, as much as a training changes it, so that the merged model is another one; and it lifts every activation to
    float32. Here lengths are float32 and activations stay what they are.
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
        """What the DoRA adds to `base_result` (the frozen layer's answer, bias included), in its dtype."""
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            # The lengths count as constants for the gradient (arXiv 2402.09353, section 4.3).
            change = lora_B.weight @ lora_A.weight
            lengths = row_lengths(base_layer.weight.float() + scaling * change)
        gain = self.weight / lengths
        plain = base_result if base_layer.bias is None else base_result - base_layer.bias.to(base_result.dtype)
        dtype = base_result.dtype
        # What is small is rounded as something small: (gain - 1) and not gain, which bf16 would take for 1.
        return (gain - 1).to(dtype) * plain + (gain * scaling).to(dtype) * lora_B(lora_A(x))


def _layers(module: nn.Module) -> dict[str, Any]:
    """The layers that peft has put an adapter beside: known by its parts, so that asking imports no peft."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(getattr(layer, "lora_A", None), nn.ModuleDict)
    }


def has_adapter(module: nn.Module) -> bool:
    """True if `inject` has been here."""
    return bool(_layers(module))


@contextmanager
def keep_activation_dtype(module: nn.Module) -> Iterator[None]:
    """While active, float32 adapters do not drag their bf16 inputs up to float32 (4 TB of traffic in a 14B step)."""
    if not has_adapter(module):
        yield
        return
    from peft.helpers import disable_input_dtype_casting

    with disable_input_dtype_casting(module):
        yield


@contextmanager
def switched_off(module: nn.Module) -> Iterator[None]:
    """While active, the module answers as its base does; peft keeps an adapter that is off from being trained."""
    layers = _layers(module).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def adapter_layers(module: nn.Module, copy: Callable[[Tensor], Tensor] = Tensor.detach) -> dict[str, Layer]:
    """The adapter, by official module name; its tensors are the module's own, or what `copy` makes of them."""
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
    """Load what `write_lora` made of `adapter_layers` into the adapter of a module of the same shape."""
    stored, current = read_lora(path).layers, adapter_layers(module)
    if stored.keys() != current.keys():
        raise ValueError(f"{path} holds an adapter of other layers; it belongs to another run")
    for name, layer in current.items():
        own = stored[name]
        kinds = ["LoRA" if part.magnitude is None else "DoRA" for part in (own, layer)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"{path} holds a {kinds[0]}, this run trains a {kinds[1]}; it belongs to another run")
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
        _copy(own, layer)


@torch.no_grad()
def _copy(stored: Layer, current: Layer) -> None:
    """Give the tensors of a layer in training the values of a stored one."""
    current.down.copy_(stored.down)
    current.up.copy_(stored.up)
    if current.magnitude is not None and stored.magnitude is not None:
        current.magnitude.copy_(stored.magnitude)
