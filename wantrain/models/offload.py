"""Weights on the host: frozen weights lie on the host and are on the device while they are needed.

One mechanism serves the idle expert, the blocks of a sampler and block swap in training. Frozen weights do not change,
so nothing is copied back. They come by a copy stream; of several groups the next one comes while one computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wantrain.models.facts import BlockRunner, blocks_of
from wantrain.models.pinned_memory import Node, layout, move_to_arena, view_of
from wantrain.util.copy_stream import CopyStream

#: Where an expert that is not at work may wait: on the device, in host memory, or on disk.
EXPERTS = ("none", "cpu", "disk")
#: Blocks that are on the device at a time: the one that computes, and the next, which is coming.
SLOTS = 2


@dataclass(frozen=True)
class OffloadPolicy:
    """What leaves the device while it is not needed.

    experts  of the expert that is not at work. none: nothing; cpu: its weights wait in host memory; disk: it is not in
             memory at all, and is loaded when it is needed (a mapped file costs the device's copy alone)
    blocks   of the expert at work, all blocks but the one that computes and the next; they wait in host memory, or with
             experts=disk in the mapped file
    """

    experts: str = "none"
    blocks: bool = False

    def __post_init__(self) -> None:
        assert self.experts in EXPERTS, self.experts

    def __str__(self) -> str:
        return f"offload.experts={self.experts} offload.blocks={str(self.blocks).lower()}"


class WeightGroup:
    """Tensors that come to the device together, with their values on the host, where they lie when this is made."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.values = [(tensor, tensor.data) for tensor in tensors]
        self.begins, self.size = layout(value.nbytes for _, value in self.values)

    def places(self, memory: Tensor) -> list[Tensor]:
        """Where each tensor lies in the memory of a slot."""
        return [view_of(memory, begin, value) for begin, (_, value) in zip(self.begins, self.values, strict=True)]

    def use(self, places: Iterable[Tensor]) -> None:
        """Have the tensors use the values in these places."""
        for (tensor, _), place in zip(self.values, places, strict=True):
            tensor.data = place

    def leave(self) -> None:
        """Have the tensors use the host's values again."""
        for tensor, value in self.values:
            tensor.data = value


@dataclass(eq=False)
class Slot:
    """Memory of the device in which one group lies, or is coming: the event says when it has come."""

    memory: Tensor
    group: int
    places: list[Tensor]
    event: Any
    used: bool = False


class WeightSwap:
    """Groups of weights that come to the device one after the other, forwards and then backwards.

    Each call sends the next group in the direction of travel on its way into the slot of the group before, whose
    computation has been queued by then. `slots` is how many groups have room at a time; with 1 nothing comes ahead.
    """

    def __init__(self, groups: Sequence[WeightGroup], device: torch.device, slots: int = SLOTS) -> None:
        self.groups, self.device = groups, device
        self._count, self._size = min(slots, len(groups)), max(group.size for group in groups)
        self._slots: list[Slot] = []
        self._last: int | None = None
        self._stream = CopyStream(device)

    def onload(self, number: int) -> None:
        """Have a group on the device for what is computed next."""
        slot = self._find(number) or self._start(number, number)
        if not slot.used:
            self._stream.wait(slot.event)
            self.groups[number].use(slot.places)
            slot.used = True
        following, self._last = self._following(number), number
        if following is not None and self._count > 1 and self._find(following) is None:
            self._start(following, number)

    def leave(self) -> None:
        """Free the device of all groups."""
        for slot in self._slots:
            self._stream.wait(slot.event)  # its memory may be given away only after the copy into it
            self.groups[slot.group].leave()
        self._slots, self._last = [], None

    def _find(self, number: int) -> Slot | None:
        return next((slot for slot in self._slots if slot.group == number), None)

    def _following(self, number: int) -> int | None:
        """The group after `number` in the direction of travel; None where that one has been sent for."""
        first, last = 0, len(self.groups) - 1
        if number == first:
            return min(1, last)
        if number == last:  # a backward comes next, or where nothing is trained another forward
            return last - 1 if torch.is_grad_enabled() else first
        if self._last in {None, number}:
            return None if self._last == number else number + 1
        return number + (1 if number > self._last else -1)  # type: ignore[operator]

    @torch.no_grad()
    def _start(self, number: int, needed: int) -> Slot:
        """Send a group on its way, into a slot that does not hold the one needed now."""
        group = self.groups[number]
        if len(self._slots) < self._count:
            memory = torch.empty(self._size, dtype=torch.uint8, device=self.device)
        else:
            old = next(slot for slot in self._slots if slot.group != needed)
            self._slots.remove(old)
            self._stream.wait(old.event)
            self.groups[old.group].leave()
            memory = old.memory
        places = group.places(memory)
        event = self._stream.copy(zip(places, (value for _, value in group.values), strict=True))
        self._slots.append(Slot(memory, number, places, event))
        return self._slots[-1]


@dataclass
class OffloadedModule:
    """A module whose weights are on the host: those outside the swapped blocks come together, blocks one by one."""

    rest: WeightSwap | None
    blocks: WeightSwap | None

    def leave(self) -> None:
        """Free the device of all that came."""
        for swap in (self.rest, self.blocks):
            if swap is not None:
                swap.leave()


class ModuleOffloader:
    """Keeps frozen weights of modules on the host. At most one module's are on the device.

    Calling a module, from training, validation or a preview, brings in what it needs and sends out what another one
    had brought. Trained parameters are not moved.
    """

    def __init__(self, device: torch.device, node: Node | None = None) -> None:
        self.device, self.node = device, node
        self._current: OffloadedModule | None = None

    def add(
        self, module: nn.Module, *, whole: bool = True, blocks: Sequence[nn.Module] = (), arena: bool = True
    ) -> set[str]:
        """Manage another module, which lies on the host. Returns the names of the parameters and buffers that wait.

        whole   all that is frozen outside `blocks` waits on the host while another module is at work
        blocks  of these, what is frozen waits on the host except around their computation
        arena   move what waits into pinned memory; else it stays where it is, such as in a mapped file

        What does not wait is moved to the device.
        """
        inside = [list(_frozen(block).values()) for block in blocks]
        ids = {id(tensor) for tensors in inside for tensor in tensors}
        rest = [tensor for tensor in _frozen(module).values() if id(tensor) not in ids] if whole else []
        waiting = [*(tensor for tensors in inside for tensor in tensors), *rest]
        if arena:
            move_to_arena(waiting, self.node)
        ids |= {id(tensor) for tensor in rest}
        for tensor in _tensors(module).values():
            if id(tensor) not in ids:
                tensor.data = tensor.data.to(self.device)
        offloaded = OffloadedModule(
            WeightSwap([WeightGroup(rest)], self.device) if rest else None,
            WeightSwap([WeightGroup(tensors) for tensors in inside], self.device) if blocks else None,
        )
        # Hooks refer to weights and not to modules, which would keep themselves alive.
        module.register_forward_pre_hook(lambda module, args: self._enter(offloaded))
        if offloaded.blocks is not None:
            for number, block in enumerate(blocks):
                swap: WeightSwap = offloaded.blocks
                block.register_forward_pre_hook(lambda block, args, swap=swap, number=number: swap.onload(number))
        return {name for name, tensor in _tensors(module).items() if id(tensor) in ids}

    def _enter(self, offloaded: OffloadedModule) -> None:
        if offloaded is not self._current:
            self.offload()
            self._current = offloaded
        if offloaded.rest is not None:
            offloaded.rest.onload(0)

    def offload(self) -> None:
        """Free the device of the weights that came."""
        if self._current is not None:
            self._current.leave()
            self._current = None


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _frozen(module: nn.Module) -> dict[str, Tensor]:
    """Those that training does not move."""
    return {name: tensor for name, tensor in _tensors(module).items() if not tensor.requires_grad}


def blocks_to_swap(module: nn.Module, count: int) -> list[nn.Module]:
    """The blocks whose weights wait on the host with `swap.blocks=count`: the last ones of those that are recomputed.

    A block that keeps its activations keeps its weights for the backward too. ValueError where there are too few, or
    where nothing in them is frozen.
    """
    runner: BlockRunner = getattr(module, "run_block", BlockRunner())
    check_swap(count, runner.recomputed)
    chosen = list(blocks_of(module))[runner.recomputed - count : runner.recomputed]
    if bare := [number for number, block in enumerate(chosen) if not _frozen(block)]:
        first = runner.recomputed - count
        raise ValueError(
            f"swap.blocks={count}: block {first + bare[0]} trains all its weights, and only frozen ones can wait on "
            "the host; give fewer swap.blocks, or adapter=lora"
        )
    return chosen


def check_swap(count: int, recomputed: int) -> None:
    """ValueError if not so many blocks can be swapped where so many are recomputed."""
    if count <= SLOTS:
        raise ValueError(
            f"swap.blocks={count} saves nothing, for {SLOTS} swapped blocks are on the device at a time; give 0, or at "
            f"least {SLOTS + 1}"
        )
    if count > recomputed:
        raise ValueError(
            f"swap.blocks={count}: only recomputed blocks can be swapped, and {recomputed} are; give "
            "recompute=block or attention, or fewer swap.blocks"
        )
