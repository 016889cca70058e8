"""Where experts live while a sampler works: all on the device, only the one that answers, or a block of it at a time.

The pair answers one after the other along a trajectory, so what is idle need not take the device's memory. How weights
move is models/hosted.py's; here is which expert does when.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import nn

from wantrain.models.offload import HostWeights, WeightSwapper, blocks_of, by_block, outside_blocks
from wantrain.models.pinned_memory import settle

IDLE = ("gpu", "cpu", "disk")
OFFLOAD = ("none", "blocks")

#: Loads an expert by name onto a device.
Load = Callable[[str, torch.device], nn.Module]


class ExpertOffloader(Mapping[str, nn.Module]):
    """The experts by name; asking for one sends out the one before.

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
        self._residence = WeightSwapper(device)
        self._loaded: dict[str, nn.Module] = {}
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
            self.inside = name
        return self._loaded[name]

    def _take_in(self, name: str) -> nn.Module:
        """Load an expert to where it lives; it is not trained here."""
        streamed = self.offload == "blocks"
        hosted = streamed or self.idle == "cpu"
        module = self.load(name, torch.device("cpu") if hosted else self.device).requires_grad_(False)
        if self.idle == "cpu":
            self._residence.add(module, streamed=streamed)
        elif streamed:
            if self.idle == "gpu":  # for good: worth the copy; with idle=disk the mapped file is all there is
                settle(blocks_of(module).parameters())
            by_block(module, self.device)
            HostWeights(outside_blocks(module)).come(self.device)
        return module

    def leave(self) -> None:
        """The expert that answered leaves the device, unless idle ones stay there."""
        self._residence.leave()
        if self.inside is not None and self.idle == "disk":
            del self._loaded[self.inside]
        self.inside = None
