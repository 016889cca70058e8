"""Storing a transformer's frozen weights in few bytes while they are loaded, one layer at a time.

So loading takes the quantised model and the largest layer in float32 and little more.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from wantrain.models import quantize
from wantrain.models.facts import is_fp32
from wantrain.models.formats import fp8
from wantrain.util.console import say
from wantrain.util.progress import report_progress


@dataclass(frozen=True)
class Source:
    """A transformer's tensors on their way from files into a module on the meta device.

    tensors  by official name; what is stored or dequantised takes the place of what the file holds
    scales   of weights in float8 that have one, by the weight's name
    """

    where: Path
    tensors: dict[str, Tensor]
    scales: Mapping[str, Tensor]
    device: str | torch.device
    dtype: torch.dtype

    def store(self, model: nn.Module, form: quantize.Format | None) -> None:
        """Store the linear layers of the blocks in a format (None: none of them), one at a time.

        Of an fp8 file only fp8 without a product is taken, and layers that it holds in more bits stay so.
        """
        if form is None:
            return
        narrow = fp8.is_fp8(self.tensors)
        assert not narrow or form == quantize.Format("fp8"), form
        quantize.check_library(form.name)
        for name in quantize.quantizable(model):
            key = f"{name}.weight"
            weight = self.tensors[key]
            report_progress(f"loading {self.where}: {key}")
            if narrow and weight.dtype in fp8.CODINGS:
                layer = fp8.stored(weight, self.scales.get(key), self.device)
                self._check_finite(key, layer)
            elif narrow:
                continue
            else:
                layer = quantize.quantize(weight.to(self.device), form)
            del self.tensors[key]
            placed = quantize.replace_layer(model, name, layer, self.dtype)
            self.tensors.update({f"{name}.{part}": tensor.data for part, tensor in placed.parts.items()})

    def dequantize(self, model: nn.Module, fp32: Container[str]) -> None:
        """Give what is left in float8 its values in the dtype that it is loaded to, one tensor at a time."""
        narrow = [key for key, tensor in self.tensors.items() if tensor.dtype in fp8.CODINGS]
        for key in narrow:
            report_progress(f"loading {self.where}: {key}")
            dtype = torch.float32 if key in fp32 or is_fp32(model, key) else self.dtype
            self.tensors[key] = fp8.dequantized(self.tensors[key], self.scales.get(key), dtype, self.device)
        if any(self.tensors[key].ndim == 2 for key in narrow) and not any(quantize.quantized_layers(model)):
            say(f"{self.where} is stored in fp8: its values are used in {str(self.dtype).removeprefix('torch.')}")

    def _check_finite(self, key: str, layer: quantize.Stored) -> None:
        """Bytes that stand for NaN would not show in their sum, which loading examines."""
        if not layer.dequantized(self.dtype).isfinite().all():
            raise ValueError(f"{self.where}: {key} holds NaN or infinity; the file is damaged: download it again")
