"""A text for calls that repeat it, as the steps of sampling do: what a network makes of the text alone is made once.

That is the text's embedding, and in each block the keys and values of attention to it. They are kept as they are, so
results are those of the calls without, bit for bit. Tensor suffixes as in transformer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: Keys and values (B, S, N, K) of one layer.
KeysValues = tuple[Tensor, Tensor]
#: From a text (B, L, D) to its rows (B, S, D) and the bias of each.
MakeRows = Callable[[Tensor], tuple[Tensor, Tensor | None]]


class KeptRows:
    """Rows of a text for one block, until its keys and values are there: made in the block's first call, when all that
    brings weights to the block has brought them.
    """

    def __init__(self, rows_BSD: Tensor) -> None:
        self.dtype = rows_BSD.dtype
        self._rows: Tensor | None = rows_BSD
        self._kept: KeysValues | None = None

    def keys_values(self, make: Callable[[Tensor], KeysValues]) -> KeysValues:
        """What `make` gives for the rows, or gave."""
        if self._kept is None:
            assert self._rows is not None and not torch.is_grad_enabled(), "weights that train change between calls"
            self._kept, self._rows = make(self._rows), None
        return self._kept


class KeptText:
    """A text (B, L, D) that one network is given in several calls, in the place of the tensor."""

    def __init__(self, text_BLD: Tensor) -> None:
        self.text_BLD = text_BLD
        self._blocks: list[KeptRows] = []
        self._bias_S: Tensor | None = None

    def of_blocks(self, make: MakeRows, count: int) -> tuple[Sequence[KeptRows], Tensor | None]:
        """What each of `count` blocks is given of the text, and the bias."""
        if not self._blocks:
            rows_BSD, self._bias_S = make(self.text_BLD)
            self._blocks = [KeptRows(rows_BSD) for _ in range(count)]
        return self._blocks, self._bias_S


def for_blocks(
    text: Tensor | KeptText, make: MakeRows, count: int
) -> tuple[Sequence[Tensor] | Sequence[KeptRows], Tensor | None]:
    """What each of `count` blocks is given of a text, kept or not, and the bias of its rows."""
    if isinstance(text, KeptText):
        return text.of_blocks(make, count)
    rows_BSD, bias_S = make(text)
    return [rows_BSD] * count, bias_S
