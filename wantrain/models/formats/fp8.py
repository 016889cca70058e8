"""Published fp8 files of a transformer: weights in float8, alone or with a scale each (ComfyUI's `fp8_scaled`).

A scaled file holds, beside `LAYER.weight`, the factor that gives its values, `LAYER.scale_weight` or
`LAYER.weight_scale`; what it says for products in fp8 (`scale_input`, `input_scale`, an empty `scaled_fp8`) does not
change the weights and is left out here. `LAYER.comfy_quant` states the format as JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from wantrain.models.quantize import Stored

CODINGS = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALE = re.compile(r"(?P<layer>.+)\.(?:scale_weight|weight_scale)")
_UNUSED = re.compile(r"(?:.*\.)?(?:scale_input|input_scale|scaled_fp8)")
_STATED = re.compile(r".+\.comfy_quant")


def is_fp8(tensors: Mapping[str, Tensor]) -> bool:
    """True if any of a part's tensors is stored in float8."""
    return any(tensor.dtype in CODINGS for tensor in tensors.values())


def split(tensors: Mapping[str, Tensor], where: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file's weights, and the scale of each that has one, by the weight's name.

    ValueError for a scale without a weight in float8 or of another shape than one number (or one per row), and for
    another 8- or 4-bit format.
    """
    weights, scales = dict[str, Tensor](), dict[str, Tensor]()
    for key, tensor in tensors.items():
        if match := _SCALE.fullmatch(key):
            scales[f"{match['layer']}.weight"] = tensor
        elif _STATED.fullmatch(key):
            _check_stated(key, tensor, where)
        elif not _UNUSED.fullmatch(key):
            weights[key] = tensor
    for key, scale in scales.items():
        weight = weights.get(key)
        if weight is None or weight.dtype not in CODINGS:
            held = "no such weight" if weight is None else f"that weight in {str(weight.dtype).removeprefix('torch.')}"
            raise ValueError(f"{where} holds a scale for {key} and {held}, not one in float8; download it again")
        if scale.numel() not in {1, len(weight)}:
            raise ValueError(
                f"{where}: the scale of {key} is {tuple(scale.shape)}; one number, or one for each of its "
                f"{len(weight)} rows, is supported: take the fp16 or bf16 file of the same model"
            )
    return weights, scales


def _check_stated(key: str, tensor: Tensor, where: str | Path) -> None:
    stated = json.loads(bytes(tensor.tolist()))
    if not str(stated.get("format", "")).startswith("float8"):
        raise ValueError(
            f"{where}: {key} says {stated.get('format')}; of the quantised files those in float8 are supported: take "
            "the fp16 or bf16 file of the same model, and base.dtype=nf4 to train on it in 4 bits"
        )


def stored(weight: Tensor, scale: Tensor | None, device: str | torch.device) -> Stored:
    """A float8 weight and its scale (None: 1) on `device`, with the file's own bytes."""
    factor = torch.ones(1) if scale is None else scale.float()
    data = weight.detach().to(device).contiguous()
    return Stored(data.view(torch.uint8), factor.reshape(-1, 1).to(device), weight.dtype, weight.shape)


def dequantized(tensor: Tensor, scale: Tensor | None, dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """The values of a float8 tensor, of any shape, in `dtype` on `device`."""
    values = tensor.to(device).to(dtype)
    return values if scale is None else values.mul_(scale.float().to(device).reshape(-1, *[1] * (tensor.ndim - 1)))
