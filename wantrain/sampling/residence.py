"""Where experts live while a sampler works: all on the device, only the one that answers, or a block of it at a time.

The pair answers one after the other along a trajectory, so what is idle need not take the device's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

IDLE = ("gpu", "cpu", "disk")
OFFLOAD = ("none", "blocks")

#: Loads an expert by name onto a device.
Load = Callable[[str, torch.device], nn.Module]


class House(Mapping[str, nn.Module]):
    """The experts by name; asking for one brings it in, and sends out the one before.

    idle     gpu: all stay on the device; cpu: those that do not answer wait in host memory; disk: they are not in
             memory at all, and are loaded when their turn comes (a file that is mapped costs the device's copy alone)
    offload  blocks: also of the expert that answers, only the block at work is on the device, with what is outside
             the blocks; the rest stays on the host, or with idle=disk in the mapped file. none: all of it is
    """

    def __init__(
        self, names: Iterable[str], load: Load, device: torch.device, *, idle: str = "gpu", offload: str = "none"
    ) -> None:
        self.names, self.load, self.device = tuple(names), load, device
        self.idle, self.offload = idle, offload
        self.inside: str | None = None
        self._loaded: dict[str, nn.Module] = {}
        self._hosted: dict[str, Hosted] = {}
        for name in self.names if idle != "disk" else ():
            self._loaded[name] = self._take_in(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: str) -> nn.Module:
        if name != self.inside:
            self.leave()
            if name not in self._loaded:
                self._loaded[name] = self._take_in(name)
            if name in self._hosted:
                self._hosted[name].come(self.device)
            self.inside = name
        return self._loaded[name]

    def _take_in(self, name: str) -> nn.Module:
        """Load an expert to where it lives."""
        if self.idle != "cpu" and self.offload == "none":
            return self.load(name, self.device)
        module = self.load(name, torch.device("cpu"))
        pinned = self.idle == "cpu"  # for good: worth the copy into locked memory, from which the bus runs faster
        if self.offload == "blocks":
            by_block(module, self.device, pinned=pinned)
        if self.idle == "cpu":
            blocks = {id(p) for p in _in_blocks(module)} if self.offload == "blocks" else set()
            self._hosted[name] = Hosted((p for p in module.parameters() if id(p) not in blocks), pinned=pinned)
        elif self.offload == "blocks":
            Hosted(outside_blocks(module), pinned=False).come(self.device)
        return module

    def leave(self) -> None:
        """The expert that answered leaves the device, unless idle ones stay there."""
        if self.inside in self._hosted:
            self._hosted[self.inside].leave()
        if self.inside is not None and self.idle == "disk":
            del self._loaded[self.inside]
        self.inside = None


class Hosted:
    """Frozen weights that live on the host and come to the device for a while; leaving only drops the copy."""

    def __init__(self, parameters: Iterable[nn.Parameter], *, pinned: bool) -> None:
        self.hosts: dict[nn.Parameter, Tensor] = {}
        for parameter in parameters:
            host = parameter.detach()
            self.hosts[parameter] = host.pin_memory() if pinned and torch.cuda.is_available() else host
            parameter.data = self.hosts[parameter]

    def come(self, device: torch.device) -> None:
        """Copy to the device."""
        for parameter, host in self.hosts.items():
            parameter.data = host.to(device, copy=True, non_blocking=True)

    def leave(self) -> None:
        """Let the device's copy go."""
        for parameter, host in self.hosts.items():
            parameter.data = host


def by_block(module: nn.Module, device: torch.device, *, pinned: bool) -> None:
    """Let each of a transformer's blocks come to the device when it is called, and leave when it has answered."""
    blocks = module.blocks
    assert isinstance(blocks, nn.ModuleList)
    for block in blocks:
        weights = Hosted(block.parameters(), pinned=pinned)
        block.register_forward_pre_hook(lambda block, args, weights=weights: weights.come(device))
        block.register_forward_hook(lambda block, args, result, weights=weights: weights.leave())


def _in_blocks(module: nn.Module) -> list[nn.Parameter]:
    blocks = module.blocks
    assert isinstance(blocks, nn.ModuleList)
    return list(blocks.parameters())


def outside_blocks(module: nn.Module) -> list[nn.Parameter]:
    """A transformer's parameters that belong to no block: embeddings and head."""
    inside = {id(parameter) for parameter in _in_blocks(module)}
    return [parameter for parameter in module.parameters() if id(parameter) not in inside]
