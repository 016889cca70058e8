"""CPU offload of frozen weights, for training and sampling: they lie on the host and are on the device while needed.

Frozen weights do not change, so offloading copies nothing back: the device's copy is freed. Copies run in the device's
current stream, as the computation does: memory of a freed copy is reused only after both.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wantrain.models.facts import blocks_of, outside_blocks
from wantrain.models.pinned_memory import move_to_arena

#: Where an expert that is not at work may wait: on the device, in host memory, or on disk.
EXPERTS = ("none", "cpu", "disk")


@dataclass(frozen=True)
class OffloadPolicy:
    """What leaves the device while it is not needed.

    experts  of the expert that is not at work. none: nothing; cpu: its weights wait in host memory; disk: it is not in
             memory at all, and is loaded when it is needed (a mapped file costs the device's copy alone)
    blocks   of the expert at work, all blocks but the one that computes; they wait in host memory, or with
             experts=disk in the mapped file
    """

    experts: str = "none"
    blocks: bool = False

    def __post_init__(self) -> None:
        assert self.experts in EXPERTS, self.experts

    def __str__(self) -> str:
        return f"offload.experts={self.experts} offload.blocks={str(self.blocks).lower()}"


class HostWeights:
    """Frozen parameters with their values on the host, where they lie when this is made."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.values: dict[nn.Parameter, Tensor] = {parameter: parameter.data for parameter in parameters}

    def onload(self, device: torch.device) -> None:
        """Copy the values to the device, and use the copy."""
        for parameter, value in self.values.items():
            parameter.data = value.to(device, copy=True, non_blocking=True)

    def offload(self) -> None:
        """Use the host's values again, and free the device's copy."""
        for parameter, value in self.values.items():
            parameter.data = value


class ModuleOffloader:
    """Keeps the frozen weights of at most one of several modules on the device; those of the others are on the host.

    Calling a module, from training, validation or a preview, brings its weights in and sends out those of the module
    called before. Trained parameters are not moved.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._on_device: HostWeights | None = None

    def add(self, module: nn.Module, *, blocks: bool = False) -> None:
        """Manage another module: its frozen weights are moved into an arena on the host.

        blocks   bring in the blocks of a transformer one at a time, and the rest of it whole
        """
        frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
        move_to_arena(frozen)
        if blocks:
            offload_blocks(module, self.device)
            frozen = outside_blocks(module)
        weights = HostWeights(frozen)  # and no reference to the module, which would keep itself alive
        module.register_forward_pre_hook(lambda module, args: self._onload(weights))

    def _onload(self, weights: HostWeights) -> None:
        if weights is not self._on_device:
            self.offload()
            weights.onload(self.device)
            self._on_device = weights

    def offload(self) -> None:
        """Free the device of the weights that are on it."""
        if self._on_device is not None:
            self._on_device.offload()
            self._on_device = None


def offload_blocks(module: nn.Module, device: torch.device) -> None:
    """Have each block of a frozen transformer on the device only while it computes."""
    for block in blocks_of(module):
        weights = HostWeights(block.parameters())
        block.register_forward_pre_hook(lambda block, args, weights=weights: weights.onload(device))
        block.register_forward_hook(lambda block, args, result, weights=weights: weights.offload())
