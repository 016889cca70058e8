"""ExpertOffloader: the experts of a sampler, with the offload policy applied. models/offload.py moves the weights.

High noise answers first, then low noise, so the expert that is not at work need not take memory of the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import nn

from wantrain.models.facts import blocks_of
from wantrain.models.offload import ModuleOffloader, OffloadPolicy
from wantrain.models.pinned_memory import Node

#: Loads an expert by name onto a device.
Load = Callable[[str, torch.device], nn.Module]


class ExpertOffloader(Mapping[str, nn.Module]):
    """The experts by name, frozen; taking one out of it offloads the one before, as `policy` says.

    node  the processes that load the same experts, and share what waits on the host
    """

    def __init__(
        self,
        names: Iterable[str],
        load: Load,
        device: torch.device,
        policy: OffloadPolicy = OffloadPolicy(),
        node: Node | None = None,
    ) -> None:
        self.names, self.load, self.device, self.policy = tuple(names), load, device, policy
        self.current: str | None = None
        self._offloader = ModuleOffloader(device, node)
        self._loaded: dict[str, nn.Module] = {}
        if policy.experts != "disk":
            self._loaded = {name: self._load(name) for name in self.names}

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: str) -> nn.Module:
        if name != self.current:
            self.offload()
            if name not in self._loaded:
                self._loaded[name] = self._load(name)
            self.current = name
        return self._loaded[name]

    def _load(self, name: str) -> nn.Module:
        """Load an expert to where it waits; it is not trained here."""
        experts, blocks = self.policy.experts, self.policy.blocks
        first = torch.device("cpu") if blocks or experts == "cpu" else self.device
        module = self.load(name, first).requires_grad_(False)
        if blocks or experts == "cpu":
            # With disk the mapped file is all there is: a copy of it would be made at each load.
            swapped = blocks_of(module) if blocks else ()
            self._offloader.add(module, whole=experts == "cpu", blocks=[*swapped], arena=experts != "disk")
        return module

    def offload(self) -> None:
        """Free the device of the current expert, unless the policy keeps all experts there."""
        self._offloader.offload()
        if self.current is not None and self.policy.experts == "disk":
            del self._loaded[self.current]
        self.current = None
