"""The processes that make each video together: they share its tokens, the tiles of its decoding, and host memory.

All of them load the weights, follow the solver and have all frames; the first of them writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wantrain.models.pinned_memory import Node
from wantrain.util import distributed

if TYPE_CHECKING:
    from wantrain.models.sequence import SequenceParallel

#: Bytes in which a path is sent.
PATH = 256


@dataclass(frozen=True)
class Peers:
    """These processes, as one of them sees them; without a `sequence` it makes videos alone."""

    sequence: SequenceParallel | None = None

    @property
    def rank(self) -> int:
        """Number of this process among them."""
        return 0 if self.sequence is None else self.sequence.rank

    @property
    def size(self) -> int:
        """How many they are."""
        return 1 if self.sequence is None else self.sequence.size

    def split(self, module: nn.Module) -> nn.Module:
        """The network again, which computes this process's part of the tokens now. ValueError if it cannot."""
        if self.sequence is not None:
            self.sequence.split(module)
        return module

    def gathered(self, tensor: Tensor) -> Tensor:
        """(R, ...): the tensors of all, which have one shape, by rank."""
        return tensor[None] if self.sequence is None else self.sequence.whole(tensor[None], 0, self.size)

    def agreed(self, values: Sequence[int]) -> list[int]:
        """What the first of them passes; all pass as many numbers from 0 to 255."""
        if self.sequence is None or not values:
            return list(values)
        sent = torch.tensor(values, dtype=torch.uint8, device=self.sequence.device)
        first: list[int] = self.gathered(sent)[0].tolist()
        return first

    def node(self) -> Node | None:
        """The same processes as those that share what waits on the host; None for one, or on several machines."""
        if self.sequence is None or distributed.local_world_size() % self.size:
            return None
        return Node(self.rank == 0, self._path_of_first, self._wait)

    def _wait(self) -> None:
        self.agreed([0])

    def _path_of_first(self, path: str) -> str:
        return bytes(self.agreed([*path.encode().ljust(PATH)])).decode().rstrip()


#: One process that makes videos by itself.
ALONE = Peers()


@contextmanager
def start(size: int, device: torch.device, *, num_heads: int) -> Iterator[Peers]:
    """The processes that make each video with this one, `size` neighbours of the launch.

    num_heads  heads of the experts' attention
    """
    if size == 1:
        yield ALONE
        return
    from wantrain.models.sequence import SequenceParallel  # half a second

    with distributed.process_group(device):
        yield Peers(SequenceParallel.over(distributed.world_size(), size, device, num_heads=num_heads))
