"""The records that travel from the data to the loss: Batch and PackedBatch for transformers, PixelBatch for VAEs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from wantrain import geometry


@dataclass(frozen=True)
class BaseBatch:
    """What both batches can do."""

    def __len__(self) -> int:
        """Number of samples."""
        raise NotImplementedError

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device."""
        return replace(self, **moved(self, device))

    def take(self, samples: Sequence[int]) -> Self:
        """The samples of these numbers; a number may come several times."""
        chosen = map_tensors(self, lambda tensor: tensor[list(samples)])
        for name, value in vars(self).items():
            if isinstance(value, tuple) and value:
                chosen[name] = tuple(value[sample] for sample in samples)
            elif isinstance(value, BaseBatch):
                chosen[name] = value.take(samples)
        return replace(self, **chosen)


@dataclass(frozen=True)
class Batch(BaseBatch):
    """Samples of one bucket: latents with their texts, and what conditioning adds.

    latents_BCTHW  normalised latents, float32: what is learned
    text_BLD       text embeddings, zeros after each text; L is the longest text of the batch
    ids            one name per sample, as in the manifest
    positions      place of each sample in the order of the whole run, by which its randomness is drawn; empty for clips
                   that are measured and not trained on
    conditioning   further inputs of the model, by the keyword under which its forward takes them; samples are the
                   first dimension of each. Empty for text-to-video
    noised_BT      1 for latent frames that are noised and learned, 0 for those given clean, at timestep 0; None: all 1
    clips          number of each sample's clip in the data set; empty where nobody asks for it
    mask_BTHW      share of each latent cell that is white in the mask beside its clip, float32 in [0, 1]; None: no mask
    masked_B       1 for samples that have a mask, 0 for others; None where `mask_BTHW` is
    weight_B       weight of each sample in the loss; None: all 1
    sets           name of each sample's data set; empty where there is one set
    losers         of preference pairs: the samples that these are preferred to, in their order; None elsewhere

    The maker of `conditioning` and the model agree on its keys. Everything between them passes it through.
    """

    latents_BCTHW: Tensor
    text_BLD: Tensor
    ids: tuple[str, ...]
    positions: tuple[int, ...] = ()
    conditioning: Mapping[str, Tensor] = field(default_factory=dict)
    noised_BT: Tensor | None = None
    clips: tuple[int, ...] = ()
    mask_BTHW: Tensor | None = None
    masked_B: Tensor | None = None
    weight_B: Tensor | None = None
    sets: tuple[str, ...] = ()
    losers: Batch | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def parts(self) -> tuple[Batch, ...]:
        """The batches of one shape each that it consists of: itself."""
        return (self,)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole batch, as the transformer counts them."""
        return len(self) * geometry.num_tokens(self.latents_BCTHW.shape[2:])

    @property
    def text_rows(self) -> int:
        """Rows of the longest text."""
        return self.text_BLD.shape[1]

    def num_frames(self, temporal_stride: int) -> int:
        """Pixel frames of one sample."""
        return geometry.pixel_frames(self.latents_BCTHW.shape[2], temporal_stride)


@dataclass(frozen=True)
class PackedBatch(BaseBatch):
    """Samples of several buckets, which the transformer computes as one sequence: a batch for each bucket.

    weight  what the mean over its samples counts in the mean over the step's passes: all samples of the step count
            alike, although passes differ in how many they have
    most    the most samples that a process has in this step
    """

    parts: tuple[Batch, ...]
    weight: float
    most: int

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def ids(self) -> tuple[str, ...]:
        """One name per sample, as in the manifest."""
        return tuple(name for part in self.parts for name in part.ids)

    @property
    def positions(self) -> tuple[int, ...]:
        """Place of each sample in the order of the whole run."""
        return tuple(position for part in self.parts for position in part.positions)


@dataclass(frozen=True)
class PixelBatch(BaseBatch):
    """Samples of one bucket as pixels, for training a VAE.

    pixels_BCFHW  in [-1, 1], float32
    ids           one name per sample
    positions     as in `Batch`
    """

    pixels_BCFHW: Tensor
    ids: tuple[str, ...]
    positions: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def parts(self) -> tuple[PixelBatch, ...]:
        """As `Batch.parts`."""
        return (self,)

    @property
    def num_tokens(self) -> int:
        """0: a VAE has no tokens."""
        return 0

    @property
    def text_rows(self) -> int:
        """0: pixels have no texts."""
        return 0

    def num_frames(self, temporal_stride: int) -> int:
        """Pixel frames of one sample."""
        return self.pixels_BCFHW.shape[2]


#: What the loop passes from the data to the loss: they agree on which it is.
AnyBatch = Batch | PackedBatch | PixelBatch


def map_tensors(record: object, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """`change` of every tensor among a record's fields, by the field's name: in mappings and tuples of tensors, and in
    tuples of batches, too.
    """
    changed: dict[str, Any] = {}
    for name, value in vars(record).items():
        if isinstance(value, Tensor):
            changed[name] = change(value)
        elif isinstance(value, Mapping):
            changed[name] = {key: change(tensor) for key, tensor in value.items()}
        elif isinstance(value, tuple) and value and isinstance(value[0], Tensor):
            changed[name] = tuple(map(change, value))
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseBatch):
            changed[name] = tuple(replace(each, **map_tensors(each, change)) for each in value)
        elif isinstance(value, BaseBatch):
            changed[name] = replace(value, **map_tensors(value, change))
    return changed


def joined(batches: Sequence[Batch]) -> Batch:
    """Batches of one shape as one, their samples one after another. All of them have the same optional fields, but for
    masks and weights.
    """
    if len(batches) == 1:
        return batches[0]
    batches = _weighted_alike(batches)
    found: dict[str, Any] = {}
    for name, value in vars(batches[0]).items():
        every = [getattr(batch, name) for batch in batches]
        if name == "text_BLD":
            longest = max(text.shape[1] for text in every)
            found[name] = torch.cat([F.pad(text, (0, 0, 0, longest - text.shape[1])) for text in every])
        elif isinstance(value, Tensor):
            found[name] = torch.cat(every)
        elif isinstance(value, Mapping):
            found[name] = {key: torch.cat([each[key] for each in every]) for key in value}
        elif isinstance(value, tuple):
            found[name] = tuple(itertools.chain.from_iterable(every))
        elif isinstance(value, Batch):
            found[name] = joined(every)
    return replace(batches[0], **found)


def _weighted_alike(batches: Sequence[Batch]) -> list[Batch]:
    """Where one batch has masks or weights, the others get those of samples without."""
    absent: Mapping[str, Callable[[Batch], Tensor]] = {
        "mask_BTHW": lambda batch: torch.zeros_like(batch.latents_BCTHW[:, 0]),
        "masked_B": lambda batch: batch.latents_BCTHW.new_zeros(len(batch)),
        "weight_B": lambda batch: batch.latents_BCTHW.new_ones(len(batch)),
    }
    names = [name for name in absent if any(getattr(batch, name) is not None for batch in batches)]
    given: list[dict[str, Any]] = [
        {name: absent[name](batch) for name in names if getattr(batch, name) is None} for batch in batches
    ]
    return [replace(batch, **own) for batch, own in zip(batches, given, strict=True)]


def moved(record: object, device: torch.device | str) -> dict[str, Any]:
    """A record's tensors on another device, by field."""
    return map_tensors(record, lambda tensor: uploaded(tensor, device))


def uploaded(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on another device. From host memory by way of pinned memory: from other memory the host would wait until
    the device has done all that was queued before.
    """
    if tensor.device.type == "cpu" and torch.device(device).type not in {"cpu", "meta"} and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def pinned(record: object) -> dict[str, Any]:
    """A record's tensors in pinned host memory, by field."""
    return map_tensors(record, Tensor.pin_memory)


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
