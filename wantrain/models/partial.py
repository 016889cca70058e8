"""Partial fine-tuning: some blocks, or some groups of parameters (tags), train in full precision; the rest is frozen.

Nothing is added to the model (adapters.py does that). Parameters are chosen by their official names; the model declares
its blocks and tags (facts.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from wantrain.models.facts import Tags, place_in_blocks
from wantrain.models.transformer import WanTransformer

#: Blocks as a user writes them: a number, a range "0-9" (both ends included), or several of either.
Layers = int | str | Sequence[int | str] | None


def train_only(module: nn.Module, *, layers: Layers, tags: str | Sequence[str] | None) -> None:
    """Freeze `module` except for what `layers` and `tags` choose. ValueError as `choose` raises it."""
    parameters = dict(module.named_parameters())
    module.requires_grad_(False)
    for name in choose(parameters, layers=layers, tags=tags, network=type(module)):
        parameters[name].requires_grad_(True)


def choose(
    names: Iterable[str],
    *,
    layers: Layers,
    tags: str | Sequence[str] | None,
    network: type[nn.Module] = WanTransformer,
) -> list[str]:
    """Those of the parameter names of a `network` that train.

    layers  block numbers; None for all of them. They limit the parameters inside blocks, and no others
    tags    tags that `network` declares; None for everything in the blocks

    ValueError as `check` raises it.
    """
    places = {name: place_in_blocks(network, name) for name in names}
    num_blocks = 1 + max((place[0] for place in places.values() if place), default=-1)
    check(layers, tags, num_blocks, network)
    blocks, declared = _blocks(layers, num_blocks), _tags(network)
    inside = [".+"] if tags is None else [declared.inside[tag] for tag in _listed(tags) if tag in declared.inside]
    outside = [declared.outside[tag] for tag in _listed(tags) if tag in declared.outside]
    chosen = []
    for name, place in places.items():
        if place is None:
            trains = any(re.fullmatch(pattern, name) for pattern in outside)
        else:
            trains = place[0] in blocks and any(re.fullmatch(pattern, place[1]) for pattern in inside)
        if trains:
            chosen.append(name)
    return chosen


def check(
    layers: Layers, tags: str | Sequence[str] | None, num_blocks: int, network: type[nn.Module] = WanTransformer
) -> None:
    """ValueError for a block that a model of `num_blocks` does not have, a tag that `network` does not declare, or if
    nothing would train.
    """
    declared = _tags(network)
    if layers is None and tags is None:
        raise ValueError(
            "adapter=partial trains the part that adapter.layers= and adapter.tags= name; for every weight give "
            "adapter=none"
        )
    unknown = [tag for tag in _listed(tags) if tag not in declared.names]
    if unknown:
        raise ValueError(f"adapter.tags: {unknown[0]} is unknown; choose out of {', '.join(declared.names)}")
    if tags is not None and not _listed(tags):
        raise ValueError(f"adapter.tags={tags} leaves 0 weights to train; choose out of {', '.join(declared.names)}")
    blocks = _blocks(layers, num_blocks)
    if not blocks:
        raise ValueError(
            f"adapter.layers={layers} leaves 0 of {num_blocks} blocks to train; give some, or null for all"
        )
    if layers is not None and tags is not None and not set(_listed(tags)) & declared.inside.keys():
        raise ValueError(
            f"adapter.layers={layers} chooses {len(blocks)} of {num_blocks} blocks, but adapter.tags="
            f"{', '.join(_listed(tags))} lies outside them; leave out layers, or add one of "
            f"{', '.join(declared.inside)}"
        )


def _tags(network: type[nn.Module]) -> Tags:
    tags: Tags = getattr(network, "tags", Tags())
    return tags


def _listed(tags: str | Sequence[str] | None) -> list[str]:
    return [] if tags is None else list(tags) if isinstance(tags, list | tuple) else [str(tags)]


def _blocks(layers: Layers, num_blocks: int) -> set[int]:
    """The block numbers that `layers` names. ValueError for anything but numbers and ranges, or one out of range."""
    if layers is None:
        return set(range(num_blocks))
    numbers: set[int] = set()
    for item in layers if isinstance(layers, list | tuple) else [layers]:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", str(item))
        if match is None or int(match[1]) > int(match[2] or match[1]):
            raise ValueError(f"adapter.layers: {item} is no block; give numbers or ranges such as 0-9 or [0, 1, 20-29]")
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= num_blocks:
            raise ValueError(
                f"adapter.layers: {item} is out of range; this model has {num_blocks} blocks, 0 to {num_blocks - 1}"
            )
        numbers.update(range(first, last + 1))
    return numbers
