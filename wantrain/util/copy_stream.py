"""Copies between host and device that run beside the computation, in a stream of their own.

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
