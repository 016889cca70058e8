"""Copies of tensors to a device and back that overlap with computation: pinned memory, one CUDA stream per direction.

A copy from pageable memory blocks the host, and a copy on the compute stream delays the computation. So uploads are
stacked in pinned memory and copied on one stream, downloads on another, and events mark when each has arrived. Other
devices, such as the CPU, copy synchronously, with the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: A copy in progress: the call returns the tensors once they have arrived.
Arriving = Callable[[], list[Tensor]]


class Transfer:
    """Copies between the host and one device. `stack` and the result of `download` may be called from any thread."""

    def __init__(self, device: torch.device) -> None:
        # With its index: "cuda" alone means the current GPU of the calling thread.
        self.device = torch.empty(0, device=device).device
        self._pinned = self.device.type == "cuda"
        self._up = torch.cuda.Stream(self.device) if self._pinned else None
        self._down = torch.cuda.Stream(self.device) if self._pinned else None

    def stack(self, parts: Sequence[Tensor]) -> Tensor:
        """Stack host tensors of one shape, in memory that `upload` can copy from asynchronously."""
        stacked = torch.empty((len(parts), *parts[0].shape), dtype=parts[0].dtype, pin_memory=self._pinned)
        return torch.stack(list(parts), out=stacked)

    def upload(self, tensors: Sequence[Tensor]) -> Arriving:
        """Start to copy to the device. Calling the result makes the current stream wait, not the host."""
        if self._up is None:
            copied = [tensor.to(self.device) for tensor in tensors]
            return lambda: copied
        with torch.cuda.stream(self._up):
            copies = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
            done = self._up.record_event()

        def arrive() -> list[Tensor]:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(done)
            for copy in copies:
                copy.record_stream(current)  # else its memory could be reused while this stream reads it
            return copies

        return arrive

    def download(self, tensors: Sequence[Tensor]) -> Arriving:
        """Start to copy to the host what the current stream computes. Calling the result waits for it."""
        if self._down is None:
            copied = [tensor.cpu() for tensor in tensors]
            return lambda: copied
        self._down.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._down):
            copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]  # into pinned memory
            done = self._down.record_event()
        for tensor in tensors:
            tensor.record_stream(self._down)

        def arrive() -> list[Tensor]:
            done.synchronize()
            return copies

        return arrive
