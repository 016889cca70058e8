"""What a network declares about itself, and how machinery reads it: no machinery knows a module by its name.

A network class states facts as class attributes, all of them optional:

repeated_blocks  names of the ModuleLists whose members are the repeated blocks: the unit that is recomputed in the
                 backward pass, compiled, offloaded one by one, and split by FSDP
fp32_parts       parts of names of parameters that stay float32 whatever dtype the network is loaded in
zero_at_start    ends of names of parameters that a trained model may hold as zeros
adapter_targets  groups of linear layers that an adapter can be put beside: name -> pattern of module names
tags             groups of parameters that can be trained by themselves (see Tags)
packs            True if forward takes tuples of tensors too, clips of several sizes as one sequence
sequence_plan    where the tokens may be split over processes (see SequencePlan)

An instance calls its repeated blocks through its attribute `run_block` (see BlockRunner).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

#: End of the names of a quantised layer's scales (quantize.py), which are float32 in every network.
SCALE = ".weight_scale"


@dataclass(frozen=True)
class Tags:
    """Names for groups of parameters: tag -> pattern that a whole name matches.

    inside   the names begin after the block's own (`self_attn.q.weight`)
    outside  the names are the module's
    """

    inside: Mapping[str, str] = field(default_factory=dict)
    outside: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """All tags."""
        return (*self.inside, *self.outside)


@dataclass(frozen=True)
class Split:
    """A tensor, or tuple of tensors, that each process holds one part of.

    module    name of the submodule that takes or gives it; `*` stands for the number of any repeated block
    dim       the dimension that is split
    argument  name of the argument of the submodule's forward; None: its result
    """

    module: str
    dim: int
    argument: str | None = None


@dataclass(frozen=True)
class SequencePlan:
    """Where a network's tokens may be split over processes, and where they must be whole (sequence parallelism).

    split    arguments that are whole in every process and are cut there
    gather   results that are put together again, so that what follows is whole in every process
    attend   names of the attention modules that need the keys and values of all tokens; theirs are rows of frames, and
             of each frame the tokens that a process has
    """

    split: tuple[Split, ...]
    gather: tuple[Split, ...]
    attend: tuple[str, ...]


class BlockRunner:
    """How a network's forward calls its repeated blocks; this one only calls them, so that all activations are kept.

    Machinery that keeps less replaces it (activation_policy.py).
    recomputed      how many blocks, from the first on, are computed again in the backward pass
    keep_attention  of these, the output of self-attention is kept all the same
    """

    recomputed: int = 0
    keep_attention: bool = False

    def __call__(self, number: int, block: nn.Module, x: Tensor, *inputs: Any) -> Tensor:
        """The result of block `number`; `x` is the result of the block before, `inputs` are common to all."""
        result: Tensor = block(x, *inputs)
        return result


def blocks_of(module: nn.Module) -> nn.ModuleList:
    """A network's repeated blocks, in the order of its ModuleLists; none where it declares none."""
    names: tuple[str, ...] = getattr(module, "repeated_blocks", ())
    return nn.ModuleList(block for name in names for block in _module_list(module, name))


def outside_blocks(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that belong to no repeated block: embeddings and head."""
    inside = {id(parameter) for parameter in blocks_of(module).parameters()}
    return [parameter for parameter in module.parameters() if id(parameter) not in inside]


def block_classes(module: nn.Module) -> list[str]:
    """Class names of the repeated blocks: what FSDP splits, each as one unit."""
    return sorted({type(block).__name__ for block in blocks_of(module)})


def place_in_blocks(module: nn.Module | type[nn.Module], name: str) -> tuple[int, str] | None:
    """(block's number, name inside the block) of a parameter or submodule; None if it lies in no repeated block."""
    for blocks in getattr(module, "repeated_blocks", ()):
        if match := re.fullmatch(rf"{re.escape(blocks)}\.(\d+)\.(.+)", name):
            return int(match[1]), match[2]
    return None


def is_fp32(module: Any, name: str) -> bool:
    """True if a parameter of `module` (an instance or a class) stays float32 whatever dtype the rest has."""
    parts: tuple[str, ...] = getattr(module, "fp32_parts", ())
    return name.endswith(SCALE) or any(part in name for part in parts)


def _module_list(module: nn.Module, name: str) -> nn.ModuleList:
    blocks = module.get_submodule(name)
    assert isinstance(blocks, nn.ModuleList), name
    return blocks
