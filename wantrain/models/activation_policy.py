"""What is kept of a forward until its backward: whole blocks, their attention, or only their inputs, and where.

A block of which not all is kept is computed again in the backward (activation checkpointing, arXiv 1604.06174), by
torch.utils.checkpoint. Its input is kept: on the device or in pinned host memory, as it is or in bfloat16. All but
bfloat16 give the gradients of a forward that keeps everything, bit for bit.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from wantrain.models.facts import BlockRunner
from wantrain.models.feed_forward import computed_again
from wantrain.models.pinned_memory import allocate, view_of
from wantrain.util.copy_stream import CopyStream

#: What recompute= takes, besides a number of blocks.
RECOMPUTE = ("none", "attention", "block")
#: What activations= takes.
PLACES = ("gpu", "cpu")
#: What activations_dtype= takes.
DTYPES = {"fp32": None, "bf16": torch.bfloat16}
#: torch's attention, by kernel; each gives its result and the statistics that its backward needs.
_ATTENTION = {
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    )
    if hasattr(torch.ops.aten, name)
}


class ActivationPolicy(BlockRunner):
    """Runs a network's blocks, and keeps of each what the settings say.

    recompute    none: all is kept; block: a block's input, all else is computed again; attention: besides the input
                 the output of self-attention with its statistics; a number: so many blocks, the last ones, keep all,
                 the others their input
    activations  gpu, cpu: where the inputs of recomputed blocks wait
    dtype        of inputs that wait: None for their own (float32), or bfloat16
    blocks       how many there are

    ValueError for settings that do not go together, naming keys of train.py.
    """

    def __init__(
        self, recompute: str | int, *, blocks: int, activations: str = "gpu", dtype: torch.dtype | None = None
    ) -> None:
        self.recomputed = blocks_recomputed(recompute, blocks)
        self.keep_attention = recompute == "attention"
        if not self.recomputed and (activations != "gpu" or dtype is not None):
            key = "activations=cpu" if activations != "gpu" else "activations_dtype=bf16"
            raise ValueError(
                f"{key} is for the inputs of recomputed blocks, and recompute={recompute} recomputes none; give "
                "recompute=block or attention"
            )
        self._inputs: KeptInputs | None = None
        if activations == "cpu":
            self._inputs = HostInputs(dtype)
        elif dtype is not None:
            self._inputs = KeptInputs(dtype)

    def __call__(self, number: int, block: nn.Module, x: Tensor, *inputs: Any) -> Tensor:
        """As BlockRunner; without gradients nothing is kept."""
        if number >= self.recomputed or not torch.is_grad_enabled():
            return super().__call__(number, block, x, *inputs)
        how: dict[str, Any] = {}
        if self.keep_attention:
            how["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_attention)
        kept: AbstractContextManager[Any] = nullcontext()
        if self._inputs is not None:  # checkpoint saves the block's inputs under these hooks, the block under its own
            kept = saved_tensors_hooks(self._inputs.packer(x, first=number == 0), self._inputs.unpack)
        with kept:
            result: Tensor = checkpoint(_computed_again, block, x, *inputs, use_reentrant=False, **how)
        return result


def _computed_again(block: nn.Module, *inputs: Any) -> Tensor:
    """The result of a block of which the backward computes more than it kept."""
    with computed_again():
        result: Tensor = block(*inputs)
        return result


def blocks_recomputed(recompute: str | int, blocks: int) -> int:
    """How many of so many blocks, from the first on, are recomputed with this `recompute=`. The last ones keep all:
    the backward frees their activations first, before it computes any block again.

    ValueError for a word that is none of RECOMPUTE, or for more blocks than there are.
    """
    if recompute in RECOMPUTE:
        return 0 if recompute == "none" else blocks
    if isinstance(recompute, bool) or not isinstance(recompute, int) or not 0 <= recompute <= blocks:
        raise ValueError(
            f"recompute={recompute} must be one of {', '.join(RECOMPUTE)}, or how many of the {blocks} blocks keep all "
            "their activations"
        )
    return blocks - recompute


def _keep_attention(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Self-attention is kept: as many keys as queries. Attention to the text is 2 % of a block's work or less, and its
    output is as large.
    """
    if operation in _ATTENTION and args[0].shape[-2] == args[1].shape[-2]:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


@dataclass(eq=False)
class Waiting:
    """The input of a block while it waits: its values, and the dtype that the block takes."""

    values: Tensor
    dtype: torch.dtype


class KeptInputs:
    """Block inputs that wait on their device in another dtype."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype

    def packer(self, x: Tensor, *, first: bool) -> Callable[[Tensor], Any]:
        """The hook that packs `x` and leaves other tensors as they are; `first`: of the first block of a forward."""
        address, shape = x.data_ptr(), x.shape

        def pack(tensor: Tensor) -> Any:
            is_x = tensor.shape == shape and tensor.data_ptr() == address
            return self.pack(tensor.detach(), first) if is_x else tensor

        return pack

    def pack(self, x: Tensor, first: bool) -> Waiting:
        """What waits for the backward."""
        return Waiting(x.to(self.dtype or x.dtype), x.dtype)

    def unpack(self, packed: Any) -> Tensor:
        """The tensor again."""
        if not isinstance(packed, Waiting):
            unchanged: Tensor = packed
            return unchanged
        return packed.values.to(packed.dtype)


@dataclass(eq=False)
class OnHost(Waiting):
    """The input of a block that waits on the host; with the one before it in the forward, which is needed next."""

    device: torch.device
    before: weakref.ref[OnHost] | None
    coming: tuple[Tensor, Any] | None = None


class HostInputs(KeptInputs):
    """Block inputs that wait in pinned host memory. They leave while the next block computes; in the backward each
    comes while the block after it computes. Two at a time are on the device.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__(dtype)
        self._stream: CopyStream | None = None
        self._free: list[Tensor] = []
        self._last: weakref.ref[OnHost] | None = None
        self._leaving: list[tuple[Tensor, Any]] = []

    def pack(self, x: Tensor, first: bool) -> Waiting:
        """As KeptInputs."""
        self._stream = self._stream or CopyStream(x.device)
        self._forget_those_that_left()
        sent = x.to(self.dtype or x.dtype)
        buffer = self._take(sent.nbytes)
        waiting = OnHost(view_of(buffer, 0, sent), x.dtype, x.device, None if first else self._last)
        weakref.finalize(waiting, self._free.append, buffer).atexit = False
        self._leaving.append((sent, self._stream.copy([(waiting.values, sent)])))
        self._last = weakref.ref(waiting)
        return waiting

    def unpack(self, packed: Any) -> Tensor:
        """As KeptInputs; sends for the input that is needed after this one."""
        if not isinstance(packed, OnHost):
            return super().unpack(packed)
        self._forget_those_that_left()
        values, event = self._sent_for(packed)
        packed.coming = None
        assert self._stream is not None
        self._stream.wait(event)
        before = None if packed.before is None else packed.before()
        if before is not None:
            before.coming = self._sent_for(before)
        return values.to(packed.dtype)

    def _sent_for(self, waiting: OnHost) -> tuple[Tensor, Any]:
        if waiting.coming is not None:
            return waiting.coming
        assert self._stream is not None
        values = torch.empty_like(waiting.values, device=waiting.device)
        return values, self._stream.copy([(values, waiting.values)])

    def _forget_those_that_left(self) -> None:
        """Free the device of inputs on their way to the host, once they are there: the computation waits for that."""
        assert self._stream is not None
        for _, event in self._leaving:
            self._stream.wait(event)
        self._leaving.clear()

    def _take(self, size: int) -> Tensor:
        """Pinned memory of at least so many bytes: the smallest that is free, else new."""
        fitting = [buffer for buffer in self._free if buffer.nbytes >= size]
        if fitting:
            buffer = min(fitting, key=lambda each: each.nbytes)
            self._free[:] = [each for each in self._free if each is not buffer]
            return buffer
        self._free.clear()  # of smaller clips; in time all buffers have the largest one's size
        return allocate(size, "the inputs of blocks", "give activations=gpu")
