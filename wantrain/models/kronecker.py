"""LoKr beside a linear layer, in the place of peft's forward: the Kronecker product is never multiplied out.

peft makes kron(w1, w2), as large as the layer's weight, in every forward, and keeps it for the backward: 283 MB for a
feed-forward layer of A14B. Here the input is reshaped instead: with x as a matrix of (columns of w1, columns of w2),
kron(w1, w2) x = w1 x w2^T. Where w2 is a product of two, w1 is applied between them, where activations are narrow.
Each layer holds peft's own tensors: w1 or its factors w1_a, w1_b; w2 or w2_a, w2_b (arXiv 2309.14859, section 3).
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Tensors that are zero when training begins, as LyCORIS has them: of each layer the one that it holds.
ZERO_AT_START = ("lokr_w2", "lokr_w2_b")


def is_kronecker(module: nn.Module) -> bool:
    """True for a layer with a LoKr; found by the attributes that peft gives it, without importing peft."""
    return isinstance(getattr(module, "lokr_w1", None), nn.ParameterDict)


def parts_of(module: Any, name: str) -> tuple[Tensor, ...]:
    """The tensors of a layer's first or second matrix, `lokr_w1` or `lokr_w2`: one, or the two whose product it is."""
    whole = getattr(module, name)
    if "default" in whole:
        return (whole["default"],)
    return tuple(getattr(module, f"{name}_{side}")["default"] for side in "ab")


def set_parts(module: Any, name: str, parts: tuple[Tensor, ...]) -> None:
    """Give a layer other tensors for its first or second matrix, whatever shapes it had."""
    places = (name,) if len(parts) == 1 else (f"{name}_a", f"{name}_b")
    for place in (name, f"{name}_a", f"{name}_b"):
        held = getattr(module, place)
        if "default" in held:
            del held["default"]
    for place, tensor in zip(places, parts, strict=True):
        getattr(module, place)["default"] = nn.Parameter(tensor.detach().clone())


def compute_narrow(module: nn.Module) -> None:
    """Have a layer with a LoKr answer by `_forward`. A bound method: a copy of the layer is bound to the copy."""
    module.forward = MethodType(_forward, module)


def _forward(module: Any, x: Tensor) -> Tensor:
    """The frozen layer's output plus the LoKr's."""
    result: Tensor = module.base_layer(x)
    return result if module.disable_adapters else result + change(module, x)


def change(module: Any, x: Tensor) -> Tensor:
    """What a layer's LoKr adds: scale * kron(w1, w2) x, for x (..., in)."""
    with torch.autocast(x.device.type, enabled=False):
        first, *rest = parts_of(module, "lokr_w1")
        for factor in rest:
            first = first @ factor
        if (scale := module.scaling["default"]) != 1:
            first = first * scale
    *outer, inner = parts_of(module, "lokr_w2")
    narrow = F.linear(x.unflatten(-1, (first.shape[1], inner.shape[1])), inner)  # (..., columns of w1, rows of inner)
    mixed = F.linear(narrow.transpose(-1, -2), first).transpose(-1, -2)  # (..., rows of w1, rows of inner)
    for factor in outer:
        mixed = F.linear(mixed, factor)
    return mixed.flatten(-2)


def products(module: nn.Module) -> list[int]:
    """Multiply-adds per row of the input that `change` takes, by factor in the order in which it applies them."""
    first = parts_of(module, "lokr_w1")
    rows, columns = first[0].shape[0], first[-1].shape[1]
    *outer, inner = parts_of(module, "lokr_w2")
    width = inner.shape[0]
    return [columns * inner.numel(), rows * columns * width, *(rows * factor.numel() for factor in outer)]
