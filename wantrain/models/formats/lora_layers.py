"""What an adapter file changes in one place of a model: a LoRA's or DoRA's layer, a LoHa's, a LoKr's, or a difference.

Each kind holds the tensors of a file and says what they add to a weight. A LoRA's, DoRA's or LoKr's layer can be
trained on, a LoHa's or a difference cannot. How files name tensors is in lora_keys.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor


class Change(ABC):
    """The change of one parameter."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""

    @property
    def rank(self) -> int | None:
        """Width of the change; None where nothing is factored."""
        return None

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """Its tensors, as in the file."""

    @abstractmethod
    def change(self) -> Tensor:
        """What is added to the parameter, in its shape, float32."""

    @abstractmethod
    def scaled(self, factor: float) -> Change:
        """The same with `factor` times the change.

        A tensor is multiplied, not alpha: kohya's tools and LyCORIS take an alpha of 0 for none.
        """

    def merged(self, weight: Tensor, scale: float = 1.0) -> Tensor:
        """`weight` with `scale` times the change in it, float32 on the weight's device."""
        return weight.float() + (scale * self.change()).to(weight.device)


@dataclass(frozen=True)
class Layer(Change):
    """A LoRA's change of one linear layer: `down` (rank, in), `up` (out, rank), `alpha`.

    A DoRA also has `magnitude` (out,), the length of each row of the changed weight.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return (self.up.shape[0], self.down.shape[1])

    @property
    def rank(self) -> int:
        """Width of the change."""
        return self.down.shape[0]

    def tensors(self) -> list[Tensor]:
        """Its two or three tensors."""
        return [self.down, self.up, *([] if self.magnitude is None else [self.magnitude])]

    @property
    def scale(self) -> float:
        """The factor of up @ down: alpha / rank."""
        return self.alpha / self.rank

    def change(self) -> Tensor:
        """What is added to the weight, (out, in), float32; of a DoRA before rows are scaled to their magnitude."""
        return (self.up.float() @ self.down.float()) * self.scale

    def scaled(self, factor: float) -> Layer:
        """With `up` multiplied. ValueError for a DoRA, whose magnitudes do not scale."""
        if self.magnitude is not None:
            raise ValueError("a DoRA has no strength other than 1")
        return replace(self, up=_times(self.up, factor))

    def merged(self, weight: Tensor, scale: float = 1.0) -> Tensor:
        """`weight` (out, in) with `scale` times the change in it, float32 on the weight's device.

        For a DoRA it is interpolated linearly from the weight (0) to the changed one (1), as in ComfyUI. (diffusers
        always applies the whole magnitude.)
        """
        if self.magnitude is None:
            return super().merged(weight, scale)
        before = weight.float()
        changed = before + self.change().to(before.device)
        changed *= (self.magnitude.float().to(before.device) / row_lengths(changed))[:, None]
        return before + scale * (changed - before)


@dataclass(frozen=True)
class Hadamard(Change):
    """A LoHa's change of one linear layer: the elementwise product of two low-rank ones (arXiv 2108.06098).

    up_1, up_2      (out, rank); LyCORIS' hada_w1_a, hada_w2_a
    down_1, down_2  (rank, in); LyCORIS' hada_w1_b, hada_w2_b
    """

    up_1: Tensor
    down_1: Tensor
    up_2: Tensor
    down_2: Tensor
    alpha: float

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return (self.up_1.shape[0], self.down_1.shape[1])

    @property
    def rank(self) -> int:
        """Width of either factor."""
        return self.down_1.shape[0]

    def tensors(self) -> list[Tensor]:
        """Its four tensors."""
        return [self.up_1, self.down_1, self.up_2, self.down_2]

    def scaled(self, factor: float) -> Hadamard:
        """With `up_1` multiplied."""
        return replace(self, up_1=_times(self.up_1, factor))

    def change(self) -> Tensor:
        """(up_1 @ down_1) * (up_2 @ down_2) * alpha / rank."""
        first, second = self.up_1.float() @ self.down_1.float(), self.up_2.float() @ self.down_2.float()
        return first * second * (self.alpha / self.rank)


@dataclass(frozen=True)
class Kronecker(Change):
    """A LoKr's change of one linear layer: the Kronecker product of two matrices, either of which may be factored.

    first, second  one tensor each (LyCORIS' lokr_w1, lokr_w2), or the two whose product it is (_a, _b)
    scale          of the product: alpha / rank where a factor has a rank
    """

    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        (rows_1, columns_1), (rows_2, columns_2) = (
            (factor[0].shape[0], factor[-1].shape[1]) for factor in (self.first, self.second)
        )
        return (rows_1 * rows_2, columns_1 * columns_2)

    @property
    def rank(self) -> int | None:
        """Width of what is factored; None if neither matrix is."""
        return next((len(factor[1]) for factor in (self.second, self.first) if len(factor) == 2), None)

    @property
    def alpha(self) -> float | None:
        """scale * rank; None where nothing is factored."""
        return None if self.rank is None else self.scale * self.rank

    def tensors(self) -> list[Tensor]:
        """Its two to four tensors."""
        return [*self.first, *self.second]

    def scaled(self, factor: float) -> Kronecker:
        """With the first tensor multiplied."""
        return replace(self, first=(_times(self.first[0], factor), *self.first[1:]))

    def as_stored(self) -> Kronecker:
        """As files hold it: readers scale by alpha / rank only what has a rank, so else the scale is multiplied in."""
        return self if self.rank is not None or self.scale == 1 else replace(self.scaled(self.scale), scale=1.0)

    def change(self) -> Tensor:
        """kron(first, second) * scale."""
        first, second = (
            factor[0].float() if len(factor) == 1 else factor[0].float() @ factor[1].float()
            for factor in (self.first, self.second)
        )
        return torch.kron(first, second) * self.scale


@dataclass(frozen=True)
class Difference(Change):
    """A whole difference, in the shape of its weight, bias or modulation: ComfyUI's `.diff` and `.diff_b`."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's."""
        return tuple(self.values.shape)

    def tensors(self) -> list[Tensor]:
        """Its one tensor."""
        return [self.values]

    def scaled(self, factor: float) -> Difference:
        """With the values multiplied."""
        return Difference(_times(self.values, factor))

    def change(self) -> Tensor:
        """The difference."""
        return self.values.float()


#: What a file that holds such a change is called.
KINDS: dict[type[Change], str] = {Hadamard: "LoHa", Kronecker: "LoKr", Difference: "whole difference"}
#: The changes that can be trained on.
Trainable = Layer | Kronecker


def kind_of(change: Change) -> str:
    """What an adapter with such a change is called: LoRA, DoRA, LoKr, LoHa or whole difference."""
    plain = "DoRA" if isinstance(change, Layer) and change.magnitude is not None else "LoRA"
    return KINDS.get(type(change), plain)


def _times(tensor: Tensor, factor: float) -> Tensor:
    """A tensor times a number, rounded once to its own dtype."""
    return (tensor.float() * factor).to(tensor.dtype)


def row_lengths(weight: Tensor) -> Tensor:
    """Euclidean length of each row of a weight (out, in), float32: what a DoRA's magnitude starts from."""
    return torch.linalg.vector_norm(weight.float(), dim=1)
