"""What is trained: a module, which file names it wears in a checkpoint, and how it gets them back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wantrain.models import WanTransformer, WanVAE
from wantrain.models.adapters import adapter_layers, has_adapter, restore_adapter
from wantrain.models.formats.lora import write_lora
from wantrain.models.formats.weights import read_tensors, renamed_to_diffusers, write_part
from wantrain.runs.folder import ADAPTER
from wantrain.training.engine.optim import named_trainable
from wantrain.util.progress import report_progress


@dataclass(frozen=True)
class Snapshot:
    """Weights as they were at one moment: their size in bytes, and what writes them into a folder and gives the sha256
    of each file of tensors.
    """

    size: int
    write: Callable[[Path], dict[Path, str]]


@dataclass(frozen=True)
class TrainableModule:
    """A module in training and its place on disk.

    part      folder of the diffusers layout: transformer, transformer_2 or vae
    metadata  what its files say about themselves: expert, model, boundary, base, recipe, commit
    frozen    if weights stay in mapped files until an engine takes its part: the dtype that frozen ones then have
    """

    module: nn.Module
    part: str
    metadata: Mapping[str, str | float] = field(default_factory=dict)
    frozen: torch.dtype | None = None

    def snapshot(self, copy: Callable[[Tensor], Tensor]) -> Snapshot:
        """The weights of this moment: the adapter alone, or the whole part in the diffusers layout.

        `copy` makes of each parameter what is written.
        """
        if has_adapter(self.module):
            layers = adapter_layers(self.module, copy)
            size = sum(tensor.nbytes for layer in layers.values() for tensor in layer.tensors())
            return Snapshot(
                size, lambda folder: {folder / ADAPTER: write_lora(folder / ADAPTER, layers, metadata=self.metadata)}
            )
        config, tensors = self.layout()
        copies = {name: copy(tensor) for name, tensor in tensors.items()}
        size = sum(tensor.nbytes for tensor in copies.values())
        return Snapshot(size, lambda folder: write_part(folder / self.part, config, copies, metadata=self.metadata))

    @torch.no_grad()
    def read(self, folder: Path) -> None:
        """Give the module the weights that a snapshot wrote into `folder`. It is not under an engine yet."""
        if has_adapter(self.module):
            restore_adapter(folder / ADAPTER, self.module)
            return
        stored = read_tensors(folder / self.part)
        for name, tensor in self.layout()[1].items():
            report_progress(f"reading {folder}: {name}")
            if self.frozen is None:
                tensor.copy_(stored[name])
            else:
                tensor.data = stored[name]

    @torch.no_grad()
    def stored(self, folder: Path) -> dict[str, Tensor]:
        """What a snapshot in `folder` holds of the parameters that training moves, by name, in float32.

        Where there is an adapter, the module has those weights afterwards.
        """
        trained = named_trainable(self.module)
        if has_adapter(self.module):
            self.read(folder)
            return {name: parameter.detach().float().clone() for name, parameter in trained.items()}
        stored, names = read_tensors(folder / self.part), {id(own): name for name, own in self.layout()[1].items()}
        return {name: stored[names[id(own)]].to(own.device, torch.float32) for name, own in trained.items()}

    def layout(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """config.json and the parameters themselves, under the names the diffusers layout gives them."""
        if isinstance(self.module, WanTransformer):
            return self.module.config(), renamed_to_diffusers(self.module.state_dict(keep_vars=True))
        assert isinstance(self.module, Autoencoder)
        return self.module.vae.config(), self.module.vae.state_dict(keep_vars=True)


class Autoencoder(nn.Module):
    """A VAE as a trainable there-and-back: pixels -> (pixels again, mean, log variance)."""

    def __init__(self, vae: WanVAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels_BCTHW: Tensor, draw: Callable[[torch.Size], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """`draw(shape)` gives the standard normal noise of the posterior sample."""
        mean, logvar = self.vae.moments(pixels_BCTHW)
        latents = mean + (0.5 * logvar).exp() * draw(mean.shape).to(mean.device)
        return self.vae.reconstruct(latents), mean, logvar
