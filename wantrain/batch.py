"""Batch, the record that travels from the loader to the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from wantrain.geometry import num_tokens


@dataclass(frozen=True)
class Batch:
    """Samples of one bucket.

    latents_BCTHW  what is learned: normalised latents (or pixels in [-1, 1] where a VAE is trained), float32
    text_BLD       text embeddings, zeros after each text; L is the longest text of the batch
    ids            one name per sample, as in the manifest
    positions      the place of each sample in the order of the whole run: what its randomness is drawn by
    mask_BT        1 for latent frames that are noised and learned, 0 for those given clean, at timestep 0; None: all
    condition_BCTHW  further input channels: what is known of the clips, and where; None: no such channels

    Of the last two a model takes one at most, and nobody but conditioning.py (which makes them) knows for what task.
    """

    latents_BCTHW: Tensor
    text_BLD: Tensor
    ids: tuple[str, ...]
    positions: tuple[int, ...]
    mask_BT: Tensor | None = None
    condition_BCTHW: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return replace(self, **moved(self, device))

    def take(self, samples: Sequence[int]) -> Batch:
        """Some of the samples, by number; one may come several times."""
        chosen: dict[str, Any] = {
            name: value[list(samples)] if isinstance(value, Tensor) else tuple(value[sample] for sample in samples)
            for name, value in vars(self).items()
            if value is not None
        }
        return replace(self, **chosen)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole batch, as the transformer counts them."""
        return len(self) * num_tokens(self.latents_BCTHW.shape[2:])


def moved(record: object, device: torch.device | str) -> dict[str, Any]:
    """The tensors among a record's fields on another device. From pinned memory nobody waits for the copies."""
    tensors = {name: value for name, value in vars(record).items() if isinstance(value, Tensor)}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


def pinned(record: object) -> dict[str, Any]:
    """The tensors among a record's fields in pinned host memory."""
    return {name: value.pin_memory() for name, value in vars(record).items() if isinstance(value, Tensor)}


def pad_texts(texts_LD: list[Tensor], length: int | None = None) -> Tensor:
    """(B, L, D) from texts of different lengths, zeros after each; L is `length` or the longest."""
    longest = max(len(text) for text in texts_LD)
    target = longest if length is None else length
    if longest > target:
        raise ValueError(f"a text has {longest} tokens, more than the model's {target}; encode it with truncation")
    padded = texts_LD[0].new_zeros(len(texts_LD), target, texts_LD[0].shape[-1])
    for row, text in zip(padded, texts_LD, strict=True):
        row[: len(text)] = text
    return padded
