"""Where frozen weights live when two experts take turns: on the device while their expert is in use, else the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Residence:
    """Lets only one of several modules at a time have its frozen weights on the device.

    A module moves in when it is called, whoever calls it (training, validation, a preview), and the one before moves
    out. Frozen weights do not change, so moving out is only to let the device's copy go.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.inside: nn.Module | None = None
        self._hosts: dict[nn.Module, dict[nn.Parameter, Tensor]] = {}

    def add(self, module: nn.Module) -> None:
        """Take in another module; its frozen weights leave the device."""
        self._hosts[module] = {p: _on_host(p) for p in module.parameters() if not p.requires_grad}
        self._move_out(module)
        module.register_forward_pre_hook(self._called)

    def _called(self, module: nn.Module, args: Any) -> None:
        if module is self.inside:
            return
        if self.inside is not None:
            self._move_out(self.inside)
        for parameter, host in self._hosts[module].items():
            parameter.data = host.to(self.device, copy=True, non_blocking=True)
        self.inside = module

    def _move_out(self, module: nn.Module) -> None:
        for parameter, host in self._hosts[module].items():
            parameter.data = host


def _on_host(parameter: nn.Parameter) -> Tensor:
    """A host copy; in locked memory where there is a GPU, from which copies run at the bus's full speed."""
    host = parameter.detach().cpu()
    return host.pin_memory() if torch.cuda.is_available() else host
