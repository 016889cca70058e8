"""Which part of a transformer trains in full precision while the rest is frozen: by block and by tag.

Nothing is put into the model here (adapters.py does that); parameters are chosen by their official names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

_IN_BLOCKS = {
    "attention": r"(self|cross)_attn\..+",
    "self_attn": r"self_attn\..+",
    "cross_attn": r"cross_attn\..+",
    "ffn": r"ffn\..+",
    "modulation": r"modulation",
    "norm": r"norm3\..+|(self|cross)_attn\.norm_[qk]\..+",
}
_OUTSIDE = {
    "text_embedding": r"text_embedding\..+",
    "time_embedding": r"time_(embedding|projection)\..+",
    "patch_embedding": r"patch_embedding\..+",
    "head": r"head\..+",
}
#: Names for kinds of parameters. The first six lie in the blocks; the norms of q and k belong to the attention too. The
#: projection of time to the blocks' modulations belongs to `time_embedding`, the head's own modulation to `head`.
TAGS = (*_IN_BLOCKS, *_OUTSIDE)

#: Blocks as a user writes them: a number, a range "0-9" (both ends included), or several of either.
Layers = int | str | Sequence[int | str] | None


def train_only(module: nn.Module, *, layers: Layers, tags: str | Sequence[str] | None) -> None:
    """Freeze `module` but for what `layers` and `tags` choose. ValueError as `choose` raises it."""
    parameters = dict(module.named_parameters())
    module.requires_grad_(False)
    for name in choose(parameters, layers=layers, tags=tags):
        parameters[name].requires_grad_(True)


def choose(names: Iterable[str], *, layers: Layers, tags: str | Sequence[str] | None) -> list[str]:
    """Those of a transformer's parameter names that train.

    layers  block numbers; None for all of them. They limit what lies in the blocks, and nothing else
    tags    out of `TAGS`; None for everything in the blocks

    ValueError as `check` raises it.
    """
    names = list(names)
    places = {name: re.fullmatch(r"blocks\.(\d+)\.(.+)", name) for name in names}
    num_blocks = 1 + max((int(place[1]) for place in places.values() if place), default=-1)
    check(layers, tags, num_blocks)
    blocks, kinds = _blocks(layers, num_blocks), _listed(tags)
    inside = [_IN_BLOCKS[tag] for tag in kinds if tag in _IN_BLOCKS] if tags is not None else [".+"]
    outside = [_OUTSIDE[tag] for tag in kinds if tag in _OUTSIDE]
    chosen = []
    for name, place in places.items():
        if place is None:
            trains = any(re.fullmatch(pattern, name) for pattern in outside)
        else:
            trains = int(place[1]) in blocks and any(re.fullmatch(pattern, place[2]) for pattern in inside)
        if trains:
            chosen.append(name)
    return chosen


def check(layers: Layers, tags: str | Sequence[str] | None, num_blocks: int) -> None:
    """Raise ValueError for a block that a model of `num_blocks` does not have, an unknown tag, or if what is chosen is
    nothing or everything."""
    if layers is None and tags is None:
        raise ValueError(
            "adapter=partial trains the part that adapter.layers= and adapter.tags= name; for every weight give "
            "adapter=none"
        )
    unknown = [tag for tag in _listed(tags) if tag not in TAGS]
    if unknown:
        raise ValueError(f"adapter.tags: {unknown[0]} is unknown; choose out of {', '.join(TAGS)}")
    if tags is not None and not _listed(tags):
        raise ValueError(f"adapter.tags={tags} leaves 0 weights to train; choose out of {', '.join(TAGS)}")
    blocks = _blocks(layers, num_blocks)
    if not blocks:
        raise ValueError(
            f"adapter.layers={layers} leaves 0 of {num_blocks} blocks to train; give some, or null for all"
        )
    if layers is not None and tags is not None and not set(_listed(tags)) & _IN_BLOCKS.keys():
        raise ValueError(
            f"adapter.layers={layers} chooses {len(blocks)} of {num_blocks} blocks, but adapter.tags="
            f"{', '.join(_listed(tags))} lies outside them; leave out layers, or add one of {', '.join(_IN_BLOCKS)}"
        )


def _listed(tags: str | Sequence[str] | None) -> list[str]:
    return [] if tags is None else list(tags) if isinstance(tags, list | tuple) else [str(tags)]


def _blocks(layers: Layers, num_blocks: int) -> set[int]:
    """The block numbers that `layers` means; ValueError for what is no number or range, and for one out of range."""
    if layers is None:
        return set(range(num_blocks))
    found: set[int] = set()
    for item in layers if isinstance(layers, list | tuple) else [layers]:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", str(item))
        if match is None or int(match[1]) > int(match[2] or match[1]):
            raise ValueError(f"adapter.layers: {item} is no block; give numbers or ranges such as 0-9 or [0, 1, 20-29]")
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= num_blocks:
            raise ValueError(
                f"adapter.layers: {item} is out of range; this model has {num_blocks} blocks, 0 to {num_blocks - 1}"
            )
        found.update(range(first, last + 1))
    return found
