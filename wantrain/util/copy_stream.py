"""Copies between host and device that run beside the computation, in a stream of their own, and values that the host
reads later than they are computed.

The order is kept by events. A copy begins after everything that was computed so far; the computation waits where it
needs the result. A tensor that is being copied must live until its copy was waited for: then its memory can be reused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class CopyStream:
    """A stream of `device` for copies. A CPU has none: there each copy is done at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._stream: Any = None if self._module is None else self._module.Stream(device=device)

    @torch.no_grad()
    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Any:
        """Copy into the first tensor of each pair the second, after all that was computed so far.

        Returns the event to wait for (see `wait`). Host tensors should be pinned, or the host waits for the copy.
        """
        if self._stream is None:
            for target, source in pairs:
                target.copy_(source)
            return None
        self._stream.wait_stream(self._module.current_stream(self._device))
        with self._module.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def wait(self, event: Any) -> None:
        """Have what is computed from here on wait for a copy; the host does not wait."""
        if event is not None:
            self._module.current_stream(self._device).wait_event(event)


class Readback:
    """Values of tensors of one device on their way to the host. `values` waits until they are there, and for nothing
    that was queued after them: read a step later, it leaves the device busy.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._counts = [tensor.numel() for tensor in tensors]
        values = torch.cat([tensor.detach().flatten().double() for tensor in tensors])
        self._host = values.to("cpu", non_blocking=True)  # into pinned memory
        self._event: Any = None
        if values.device.type != "cpu":
            self._event = torch.get_device_module(values.device).current_stream(values.device).record_event()

    def values(self) -> list[list[float]]:
        """The values of each tensor, flat."""
        if self._event is not None:
            self._event.synchronize()
        parts: list[list[float]] = [part.tolist() for part in self._host.split(self._counts)]
        return parts
