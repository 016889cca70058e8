"""Sequence parallelism: several processes share the tokens of one micro-batch, as a network's `sequence_plan` says.

Each process computes the blocks for its own tokens of every frame. Self-attention needs all tokens, in two ways that
go together. H processes exchange tokens for heads, so that each has their tokens of its part of the heads, and
afterwards back (DeepSpeed-Ulysses, arXiv 2309.14509). Where there are more processes than the heads divide among, S
such groups gather each other's keys and values (context parallelism as of Llama 3, arXiv 2407.21783): each then has
queries of its group's tokens, keys and values of all, in any kernel. Where the tokens of a frame do not divide, the
last processes hold zeros, which no attention sees.

All processes get the whole input and return the whole output. The gradients of the sum of their losses are those that
an exchange passes back, so the mean of the gradients over all processes is that of the samples, as without the split.

Tensor suffixes: B batch, L tokens of one process, N heads, K head width. Sizes in comments: n heads of one process, T
latent frames, P tokens of one frame, p those of one process, so that L = T*p.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from wantrain.models.attention import Attend
from wantrain.models.facts import BlockRunner, SequencePlan

#: Sends part i of dimension 0 to process i, and gives the parts that came, one of each process; with a gradient.
Exchange = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Group:
    """Processes that exchange tensors among themselves: their number, and how."""

    size: int = 1
    exchange: Exchange = lambda x: x

    def gathered(self, part: Tensor, dim: int) -> Tensor:
        """The parts of all of them, one after the other along a dimension, in each of them."""
        if self.size == 1:
            return part
        parts = self.exchange(part.expand(self.size, *part.shape).contiguous())
        return parts.movedim(0, dim).flatten(dim, dim + 1)


class SequenceParallel:
    """The processes that share tokens: `rank` of this one, and their number `size`.

    heads   neighbours that exchange tokens for heads
    groups  one process of each such group, which gather keys and values
    device  where the tensors lie that they exchange

    A copy of a network that was split exchanges with the same processes.
    """

    def __init__(
        self, rank: int, heads: Group, groups: Group = Group(), device: torch.device = torch.device("cpu")
    ) -> None:
        self.rank, self.size, self.device = rank, heads.size * groups.size, device
        self._heads, self._groups = heads, groups
        self._tokens = 0  # of a frame, over all processes, in the block that computes

    @classmethod
    def over(cls, processes: int, size: int, device: torch.device, *, num_heads: int) -> SequenceParallel:
        """Of the launched `processes` each `size` neighbours share tokens. All processes call it, once.

        num_heads  heads of the network's attention
        """
        heads = math.gcd(size, num_heads)
        shape = (processes // size, size // heads, heads)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "groups", "heads"))
        groups, among = (Group(mesh.size(dim), partial(_exchanged, mesh, dim)) for dim in (1, 2))
        return cls(mesh.get_local_rank("groups") * heads + mesh.get_local_rank("heads"), among, groups, device)

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceParallel:
        return self

    def split(self, module: nn.Module) -> None:
        """Have a network compute its tokens' part. Its blocks, kernel and activation policy are settled by now.

        ValueError if it does not declare a `sequence_plan`, or if its heads do not divide.
        """
        plan = plan_of(type(module), self.size)
        if (num_heads := getattr(module, "num_attention_heads", self._heads.size)) % self._heads.size:
            raise ValueError(
                f"sequence_parallel={self.size}: the weights have {num_heads} heads of attention, which the model's "
                "config does not say; give the model= that they are of"
            )
        first = f"{module.repeated_blocks[0]}.0"  # type: ignore[index]
        for cut in plan.split:
            if cut.module == first:  # before the block, so that a recomputed one keeps only its part
                module.run_block = _PartRunner(module.run_block, self, cut.dim)  # type: ignore[arg-type, assignment]
                continue
            for layer in _named(module, cut.module):
                place = list(inspect.signature(layer.forward).parameters).index(str(cut.argument))
                layer.register_forward_pre_hook(partial(self._cut, place, cut.dim))
        for whole in plan.gather:
            for layer in _named(module, whole.module):
                layer.register_forward_hook(partial(self._gathered, whole.dim))
        for name in plan.attend:
            for layer in _named(module, name):
                layer.attend = partial(self.attend, layer.attend)  # type: ignore[arg-type, assignment]

    def part(self, whole: Tensor, dim: int) -> Tensor:
        """This process's part of a dimension, with zeros where it has less than the others."""
        size = whole.shape[dim]
        each = -(-size // self.size)
        start = min(self.rank * each, size)
        own = whole.narrow(dim, start, min(each, size - start))
        if own.shape[dim] < each:
            zeros = list(whole.shape)
            zeros[dim] = each - own.shape[dim]
            own = torch.cat([own, whole.new_zeros(zeros)], dim)
        return own.contiguous()

    def whole(self, part: Tensor, dim: int, size: int) -> Tensor:
        """The parts of all processes again, in every process: `size` elements of a dimension."""
        return self._groups.gathered(self._heads.gathered(part, dim), dim).narrow(dim, 0, size)

    def attend(
        self, kernel: Attend, q_BLNK: Tensor, k_BLNK: Tensor, v_BLNK: Tensor, bias_S: Tensor | None = None
    ) -> Tensor:
        """Attention of this process's tokens to all tokens by `kernel`, which takes a part of the heads."""
        assert bias_S is None, "self-attention has no weighted rows"
        heads, each = self._heads, -(-self._tokens // self.size)
        frames, first = q_BLNK.shape[1] // each, self.rank // heads.size * heads.size * each
        # All three in one exchange: (B, T*p, H*n, K) of this process's tokens -> (B, T, H*p, n, K) of its heads.
        qkv = torch.stack((q_BLNK, k_BLNK, v_BLNK)).unflatten(3, (heads.size, -1)).movedim(3, 0)
        qkv = heads.exchange(qkv.contiguous()).unflatten(3, (frames, -1))  # (H, 3, B, T, p, n, K)
        qkv = qkv.movedim(0, 3).flatten(3, 4)
        own = max(1, min(self._tokens - first, heads.size * each))  # the rest are zeros; no kernel takes no queries
        q = qkv[0].narrow(2, 0, own).flatten(1, 2)
        k, v = self._groups.gathered(qkv[1:], 3).narrow(3, 0, self._tokens).flatten(2, 3)
        result = kernel(q, k, v, None).unflatten(1, (frames, -1))  # (B, T, own, n, K)
        result = F.pad(result, (0, 0, 0, 0, 0, heads.size * each - own))
        result = heads.exchange(result.unflatten(2, (heads.size, -1)).movedim(2, 0).contiguous())
        return result.movedim(0, 3).flatten(3, 4).flatten(1, 2)  # (H, B, T, p, n, K): H counts heads again

    def _cut(self, place: int, dim: int, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before a layer: its inputs, with this process's part of the tensors at one place.

        It runs before every forward of a block, a recomputed one's too: so the number of tokens is always that block's.
        """
        self._tokens = inputs[place][0].shape[dim]
        parts = tuple(self.part(tensor, dim) for tensor in inputs[place])
        return (*inputs[:place], parts, *inputs[place + 1 :])

    def _gathered(self, dim: int, layer: nn.Module, inputs: tuple[Any, ...], result: Tensor) -> Tensor:
        """After a layer: its result for all tokens."""
        return self.whole(result, dim, self._tokens)


class _PartRunner(BlockRunner):
    """Runs blocks as `runner` does, with this process's part of what the first one takes."""

    def __init__(self, runner: BlockRunner, sequence: SequenceParallel, dim: int) -> None:
        self._runner, self._sequence, self._dim = runner, sequence, dim
        self.recomputed, self.keep_attention = runner.recomputed, runner.keep_attention

    def __call__(self, number: int, block: nn.Module, x: Tensor, *inputs: Any) -> Tensor:
        if number == 0:
            x = self._sequence.part(x, self._dim)
        return self._runner(number, block, x, *inputs)


def plan_of(network: type[nn.Module], size: int) -> SequencePlan:
    """Where a network's tokens may be split over `size` processes. ValueError if it does not declare that."""
    plan: SequencePlan | None = getattr(network, "sequence_plan", None)
    if plan is None:
        raise ValueError(
            f"sequence_parallel={size}: {network.__name__} does not say where its tokens may be split; give "
            "sequence_parallel=1, or declare its sequence_plan (docs/architecture.md)"
        )
    return plan


def _named(module: nn.Module, name: str) -> list[nn.Module]:
    """The submodules that a name of a plan stands for, `*` being any block's number."""
    pattern = re.escape(name).replace(r"\*", r"\d+")
    return [layer for found, layer in module.named_modules() if re.fullmatch(pattern, found)]


def _exchanged(mesh: DeviceMesh, dim: int, x: Tensor) -> Tensor:
    """An Exchange along a mesh's dimension. The group is looked up each time: nothing here keeps it alive."""
    came = collectives.all_to_all_single_autograd(x, None, None, (mesh, dim))
    return collectives.wait_tensor(came)  # type: ignore[no-any-return]
