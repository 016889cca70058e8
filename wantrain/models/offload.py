"""Weights whose home is the host: they come to the device while they are needed, and the device's copy is let go after.

One mechanism for training and sampling: frozen weights do not change, so leaving costs no copy back. Copies run in the
device's current stream, as the work that uses them does: what takes the memory of a dropped copy comes after both.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from wantrain.models.pinned_memory import settle


class HostWeights:
    """Frozen weights that live where they lie now, on the host, and come to the device for a while."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.homes: dict[nn.Parameter, Tensor] = {parameter: parameter.data for parameter in parameters}

    def come(self, device: torch.device) -> None:
        """Copy to the device."""
        for parameter, home in self.homes.items():
            parameter.data = home.to(device, copy=True, non_blocking=True)

    def leave(self) -> None:
        """Let the device's copy go."""
        for parameter, home in self.homes.items():
            parameter.data = home


class WeightSwapper:
    """Lets only one of several modules at a time have its frozen weights on the device; the others' wait on the host.

    A module moves in when it is called, whoever calls it (training, validation, a preview), and the one before moves
    out. What is trained stays where it is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._inside: HostWeights | None = None

    def add(self, module: nn.Module, *, streamed: bool = False) -> None:
        """Take in another module: its frozen weights leave the device for an arena.

        streamed   of a transformer's blocks only the one at work comes to the device; what is outside them comes whole
        """
        frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
        settle(frozen)
        if streamed:
            by_block(module, self.device)
            frozen = outside_blocks(module)
        weights = HostWeights(frozen)  # and no reference to the module, which would keep itself alive
        module.register_forward_pre_hook(lambda module, args: self._enter(weights))

    def _enter(self, weights: HostWeights) -> None:
        if weights is not self._inside:
            self.leave()
            weights.come(self.device)
            self._inside = weights

    def leave(self) -> None:
        """The weights that are on the device leave it."""
        if self._inside is not None:
            self._inside.leave()
            self._inside = None


def by_block(module: nn.Module, device: torch.device) -> None:
    """Let each block of a frozen transformer come to the device when it is called, and leave when it has answered."""
    for block in blocks_of(module):
        weights = HostWeights(block.parameters())
        block.register_forward_pre_hook(lambda block, args, weights=weights: weights.come(device))
        block.register_forward_hook(lambda block, args, result, weights=weights: weights.leave())


def blocks_of(module: nn.Module) -> nn.ModuleList:
    """A transformer's blocks."""
    blocks = module.blocks
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def outside_blocks(module: nn.Module) -> list[nn.Parameter]:
    """A transformer's parameters that belong to no block: embeddings and head."""
    inside = {id(parameter) for parameter in blocks_of(module).parameters()}
    return [parameter for parameter in module.parameters() if id(parameter) not in inside]
