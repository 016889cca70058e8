"""Compiled blocks: torch.compile of the repeated blocks' forward, once for all of a network's blocks and sizes.

The forward of the blocks' class is compiled, and every block calls that one function: its weights are inputs, and the
numbers of samples, frames, tokens and text rows are symbols. So state dict names stay as they are. Outside the compiled
function lie the hooks of a block (FSDP2's, those that bring swapped weights) and its recomputation.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import time
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from wantrain.models.facts import blocks_of
from wantrain.util.console import say

#: What compile= takes.
COMPILE = ("none", "blocks")
#: Variants of the block that are compiled, at most; what would need another runs as it is.
LIMIT = 16
#: A backend of torch.compile: from a graph and example inputs to what computes it.
Backend = Callable[..., Any]


class BlockCompiler:
    """Compiles the blocks of networks, and counts. One serves all networks of a run.

    graphs   graphs compiled so far: one for each variant of a block, unless its forward cannot be traced in one piece
    seconds  what that took, with the calls in which it happened
    """

    def __init__(self, backend: str | Backend = "inductor", *, fullgraph: bool = False) -> None:
        from torch import _dynamo as dynamo  # seconds to import
        from torch.fx.experimental import _config as symbols

        self._backend: Backend = dynamo.lookup_backend(backend) if isinstance(backend, str) else backend
        self._fullgraph = fullgraph
        self._compiled: dict[type[nn.Module], Callable[..., Tensor]] = {}
        self.graphs, self.seconds = 0, 0.0
        dynamo.config.recompile_limit = LIMIT
        # DDP would cut a block where its buckets of gradients end; a block is small enough as it is.
        dynamo.config.optimize_ddp = False
        # Two sizes that are equal in the first clip, such as frames and text rows, need not be so in the next.
        symbols.use_duck_shape = False
        # A LoRA's scale is a constant; as a symbol it would be a tensor that the host reads.
        dynamo.config.specialize_float = True

    def compile(self, module: nn.Module) -> None:
        """Have the blocks of a network call their compiled forward. What trains in it is settled by now."""
        for block in blocks_of(module):
            kind = type(block)
            if kind not in self._compiled:
                self._compiled[kind] = torch.compile(
                    kind.forward, backend=self._count, dynamic=True, fullgraph=self._fullgraph
                )
            trains = any(parameter.requires_grad for parameter in block.parameters())
            call = functools.partial(self._call, self._compiled[kind], trains)
            block.forward = MethodType(call, block)  # type: ignore[method-assign]

    def _count(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        return self._backend(graph, inputs)

    def _call(self, compiled: Callable[..., Tensor], trains: bool, block: nn.Module, x: Tensor, *inputs: Any) -> Tensor:
        before, began = self.graphs, time.perf_counter()
        result = compiled(block, as_between_blocks(x, trains), *inputs)
        if self.graphs > before:
            self.seconds += time.perf_counter() - began
            self._say(x, time.perf_counter() - began)
        return result

    def _say(self, x: Tensor, seconds: float) -> None:
        what = "forward and backward" if torch.is_grad_enabled() else "forward alone"
        shape = " x ".join(map(str, x.shape[:-1]))
        say(f"compile: a block for {shape} tokens, {what}, in {seconds:.0f} s (graph {self.graphs} of the run)")
        if self.graphs == LIMIT:
            say(
                f"warning: {LIMIT} graphs of a block were compiled, which is the limit; what is not among them runs "
                "uncompiled. One sample or several, one frame or several, text of full length or not, with and without "
                "gradients have graphs of their own. Give every bucket the same number of samples per backward pass "
                "(model.train.micro_batch=1), or compile=none; TORCH_LOGS=recompiles says why each was compiled"
            )


def as_between_blocks(x: Tensor, trains: bool) -> Tensor:
    """The input of a block as all blocks but the first have it, so that one graph serves the first too: no view of
    another tensor, and with a gradient if the block `trains` anything.

    The first block then computes a gradient of its input that nobody reads: under 1 % of a LoRA's backward with 30
    blocks or more.
    """
    if torch.is_grad_enabled() and trains and not x.requires_grad:
        copied: Tensor = _WithGradient.apply(x, x.new_empty(0).requires_grad_())
        return copied
    return x.clone() if x._is_view() else x


class _WithGradient(torch.autograd.Function):
    """A copy that has a gradient, which ends here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


def check_compiler(device: torch.device) -> None:
    """ValueError if blocks cannot be compiled for a device: another kind, or no compiler for it."""
    kind = device.type
    if kind not in {"cpu", "cuda"}:
        raise ValueError(f"compile=blocks is for NVIDIA cards and CPUs, and the device is {kind}; give compile=none")
    if kind == "cuda" and importlib.util.find_spec("triton") is None:
        raise ValueError(
            "compile=blocks needs triton, which is not installed; pip install triton, or give compile=none"
        )
    names = (os.environ.get("CXX") or "g++",) if kind == "cpu" else (os.environ.get("CC") or "gcc", "clang")
    if all(shutil.which(name) is None for name in names):
        raise ValueError(
            f"compile=blocks needs a compiler, and {' or '.join(names)} is not there; install it "
            "(apt-get install g++), or give compile=none"
        )
