"""What a loss is: what it draws, what it returns, and what it tells the loop about itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from wantrain import flow
from wantrain.batch import Batch, moved

#: Any callable network; for flow matching model(latents, timestep, text, **conditioning) -> velocity.
Model = Callable[..., Any]


@dataclass(frozen=True)
class Draws:
    """What is random in the loss of one batch, drawn on the host before the forward pass: while a step before runs.

    generators   one per sample, whose next numbers are for what can only be drawn after the forward pass
    sigma        (B,) noise levels; None for a loss without any
    noise_BCTHW  standard normal noise of the latents' shape; None likewise. Of a PackedBatch one tensor for each part
    more         (B,) tensors that a loss draws besides, by name
    """

    generators: Sequence[torch.Generator]
    sigma: Tensor | None = None
    noise_BCTHW: Tensor | tuple[Tensor, ...] | None = None
    more: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> Draws:
        """The same on another device; generators stay on the host, so that every device sees the same numbers."""
        return replace(self, **moved(self, device))

    def with_more(self, name: str, values: Tensor) -> Draws:
        """The same, and what a loss around draws besides."""
        return replace(self, more={**self.more, name: values})


@dataclass(frozen=True)
class Loss:
    """The scalar to differentiate, and what the log shows of it.

    per_sample  (B,) each sample's error, detached; what safeguards and the log compare
    sigma       (B,) the noise levels of these errors; None for a loss without any
    parts       further scalars for the log, by name; NaN where the batch has nothing of it
    over_base   (B,) each sample's error over that of the base model, detached; None for a loss that measures no base
    """

    value: Tensor
    per_sample: Tensor
    sigma: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)
    over_base: Tensor | None = None

    def with_term(self, name: str, weight: float, term: Tensor) -> Loss:
        """The same loss with a further weighted term, whose value the log shows under `name`."""
        return replace(self, value=self.value + weight * term, parts={**self.parts, name: term.detach()})


@dataclass(frozen=True)
class NoiseLevelValidation:
    """A loss is validated by the errors of fixed clips at fixed noise levels; their mean is the validation loss.

    levels  (count) -> noise levels (count,): midpoints of equal slices of the distribution that is trained on
    error   (model, batch, sigma (B,), noise) -> errors (B,) float32
    weight  batch -> weights of latent cells (B, T, H, W) that `error` goes by, or None: all the same
    about   what the weights are, for people; empty without
    """

    levels: Callable[[int], Tensor]
    error: Callable[[Model, Batch, Tensor, Tensor], Tensor]
    weight: Callable[[Batch], Tensor | None] = lambda batch: None
    about: str = ""


@dataclass(frozen=True)
class ClipValidation:
    """A loss is validated by one error per clip, shown as a score.

    name, unit  of the score, as the log has it: validation_<name>
    error       (model, batch) -> errors (B,)
    score       errors of all clips (N,) -> scalar
    """

    name: str
    unit: str
    error: Callable[[Model, Any], Tensor]
    score: Callable[[Tensor], Tensor]


class LossFunction:
    """A loss: `prepare` draws what is random, on the host; a call computes, on the device. A new loss subclasses it.

    Its batches are those of the data it goes with: `Batch`, or `PixelBatch` for a VAE; where it `packs`, `PackedBatch`
    too.

    window    the noise levels that its draws lie in; None for a loss without noise levels
    networks  frozen networks that it needs besides the one in training; the run gives them by `attach`:
              "reference", the network as the run started from it; "base", the same network with its adapter off
    prompts   texts whose embeddings it needs; the run gives them by `attach`
    mass      share of all noise that falls into the window; None where that has no meaning
    packs     True if it takes clips of several sizes as one batch: batch_tokens=
    rows, base_rows  samples that the network in training, and the base without gradients, compute for each of a batch
    """

    window: flow.NoiseWindow | None = None
    networks: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    mass: float | None = None
    packs: bool = False
    rows: int = 1
    base_rows: int = 0

    def attach(self, networks: Mapping[str, Model], texts: Mapping[str, Tensor] | None = None) -> None:
        """Take the frozen networks that `networks` names and the embeddings (L, D) of `prompts`, before the first
        step."""
        self.attached, self.texts = dict(networks), dict(texts or {})

    def prepare(self, batch: Any, generators: Sequence[torch.Generator]) -> Draws:
        """What sample i draws from generators[i], and from nothing else: or a resumed run is another one."""
        raise NotImplementedError

    def __call__(self, model: Model, batch: Any, draws: Draws) -> Loss:
        """The loss of one batch, on the device of batch and draws."""
        raise NotImplementedError

    @property
    def core(self) -> LossFunction:
        """The loss itself, where others are put around it."""
        return self

    @property
    def validation(self) -> NoiseLevelValidation | ClipValidation | None:
        """How this loss is validated; None: it is not."""
        return None
