"""What is trained: a module, which file names it wears in a checkpoint, and how it gets them back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wantrain.models import WanTransformer, WanVAE
from wantrain.models.adapters import has_adapter, restore_adapter, save_adapter
from wantrain.models.weights import read_tensors, renamed_to_diffusers, write_part

ADAPTER = "adapter.safetensors"


@dataclass(frozen=True)
class Trainee:
    """A module in training and its place on disk.

    part      folder of the diffusers layout: transformer, transformer_2 or vae
    metadata  what its files say about themselves: expert, model, boundary, base, recipe, commit
    """

    module: nn.Module
    part: str
    metadata: Mapping[str, str | float] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Put the trained weights into `folder`: the adapter alone, or the whole part in the diffusers layout."""
        if has_adapter(self.module):
            save_adapter(folder / ADAPTER, self.module, self.metadata)
        else:
            config, tensors = self._layout()
            write_part(folder / self.part, config, tensors, metadata=self.metadata)

    @torch.no_grad()
    def read(self, folder: Path) -> None:
        """Give the module the weights that `write` put into `folder`."""
        if has_adapter(self.module):
            restore_adapter(folder / ADAPTER, self.module)
            return
        stored = read_tensors(folder / self.part)
        for name, tensor in self._layout()[1].items():
            tensor.copy_(stored[name])

    def _layout(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """config.json and tensors under the names the diffusers layout gives them."""
        if isinstance(self.module, WanTransformer):
            return self.module.config(), renamed_to_diffusers(self.module.state_dict())
        assert isinstance(self.module, Autoencoder)
        return self.module.vae.config(), self.module.vae.state_dict()


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
