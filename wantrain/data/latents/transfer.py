"""Tensors to a device and back without stopping it: pinned memory, and on CUDA a stream for each direction.

A copy from ordinary memory makes the host wait, and one on the stream that computes makes the computation wait. So what
goes up is gathered in pinned memory and copied on a stream of its own, what comes down takes another, and events say
when each has arrived. Other devices, the CPU among them, copy in place: the same calls, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: What is on its way: the call gives the tensors, once they have arrived.
Arriving = Callable[[], list[Tensor]]


class Transfer:
    """Copies between the host and one device. `stack` and what `download` gives may be called from any thread."""

    def __init__(self, device: torch.device) -> None:
        # With its number: "cuda" alone is the current GPU of whichever thread asks.
        self.device = torch.empty(0, device=device).device
        self._pinned = self.device.type == "cuda"
        self._up = torch.cuda.Stream(self.device) if self._pinned else None
        self._down = torch.cuda.Stream(self.device) if self._pinned else None

    def stack(self, parts: Sequence[Tensor]) -> Tensor:
        """Host tensors of one shape as one, in memory that `upload` copies from while the device works."""
        found = torch.empty((len(parts), *parts[0].shape), dtype=parts[0].dtype, pin_memory=self._pinned)
        return torch.stack(list(parts), out=found)

    def upload(self, tensors: Sequence[Tensor]) -> Arriving:
        """Begin to copy to the device; the call then makes the current stream wait, and not the host."""
        if self._up is None:
            there = [tensor.to(self.device) for tensor in tensors]
            return lambda: there
        with torch.cuda.stream(self._up):
            copies = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
            done = self._up.record_event()

        def arrive() -> list[Tensor]:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(done)
            for copy in copies:
                copy.record_stream(current)  # else its memory could be given away while this stream still reads it
            return copies

        return arrive

    def download(self, tensors: Sequence[Tensor]) -> Arriving:
        """Begin to copy to the host what the current stream has been given to compute; the call then waits for it."""
        if self._down is None:
            there = [tensor.cpu() for tensor in tensors]
            return lambda: there
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
