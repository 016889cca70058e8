"""Bytes of a compiled graph: what lies between matrix products and attention counts as its inputs and outputs.

torch.compile gives the graphs of forward and backward, decomposed and cut as inductor has them. Operations that are
connected, without a product or attention on a way between them, are one region: each tensor that comes into it is read
once, and each that something outside reads is written once. What inductor's kernels move beyond that (a region that it
cuts into several) is not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn

from wantrain.util.live_bytes import tensors_in
from wantrain.util.moved_bytes import ARITHMETIC


class Counted:
    """The bytes of the graphs that a backend was given: forward first, then backward."""

    def __init__(self) -> None:
        self.forward, self.backward = 0, 0

    def backend(self) -> Callable[..., Any]:
        """A backend of torch.compile that counts, and runs the graphs as they are."""
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.partitioners import min_cut_rematerialization_partition
        from torch._inductor.decomposition import select_decomp_table

        def forward(graph: fx.GraphModule, _: list[Any]) -> Any:
            self.forward += region_bytes(graph.graph)
            return make_boxed_func(graph.forward)

        def backward(graph: fx.GraphModule, _: list[Any]) -> Any:
            self.backward += region_bytes(graph.graph)
            return make_boxed_func(graph.forward)

        made: Callable[..., Any] = aot_autograd(
            fw_compiler=forward,
            bw_compiler=backward,
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )
        return made


def region_bytes(graph: fx.Graph) -> int:
    """Bytes that the regions of a graph read and write."""
    depth, region = levels(graph), dict[Any, Any]()

    def root(node: Any) -> Any:
        while region[node] is not node:
            node = region[node]
        return node

    for node in filter(is_counted, graph.nodes):
        region[node] = node
        for each in map(source, node.all_input_nodes):
            inside = is_counted(each) and depth[each] == depth[node]
            shared = each if inside else (each, depth[node])  # who reads the same tensor reads it together
            region[root(region.setdefault(shared, shared))] = region[node]
    read, written = dict[tuple[Any, fx.Node], set[fx.Node]](), set[fx.Node]()
    for node in graph.nodes:
        for given in node.all_input_nodes:
            each = source(given)
            inside = node in region and each in region and root(each) is root(node)
            if inside or not (node in region or is_arithmetic(node) or node.op == "output"):
                continue
            if each in region:
                written.add(each)
            if node in region:
                read.setdefault((root(node), each), set()).add(given)
    parts = (min(size(each), sum(map(size, given))) for (_, each), given in read.items())  # views show parts, or all
    return sum(map(size, written)) + sum(parts)


def levels(graph: fx.Graph) -> dict[fx.Node, int]:
    """How many products and attentions come before a node on a way to it: what a compiler may fuse has one level. An
    operation is as late as those that read it let it be.
    """
    found = dict[fx.Node, int]()
    for node in graph.nodes:
        found[node] = max((found[each] + is_arithmetic(each) for each in node.all_input_nodes), default=0)
    for node in reversed(graph.nodes):
        if not is_arithmetic(node):
            readers = [found[each] for each in node.users if each.op != "output"]
            found[node] = max(found[node], min(readers, default=found[node]))
    return found


def source(node: fx.Node) -> fx.Node:
    """What a view shows, or the operation of which a node is one result."""
    while node.op == "call_function" and (is_view(node) or node.target.__name__ == "getitem"):  # type: ignore[union-attr]
        if node.target.__name__ == "getitem" and is_arithmetic(node.all_input_nodes[0]):  # type: ignore[union-attr]
            break  # a result of attention is a tensor of its own
        node = node.all_input_nodes[0]
    return node


def is_view(node: fx.Node) -> bool:
    """True for what moves nothing."""
    return bool(getattr(node.target, "is_view", False)) or "reshape" in str(node.target)


def is_arithmetic(node: fx.Node) -> bool:
    """True for matrix products and attention."""
    return node.op == "call_function" and any(word in str(node.target) for word in ARITHMETIC)


def is_counted(node: fx.Node) -> bool:
    """True for an operation that a compiler can put into one kernel with its neighbours."""
    if node.op != "call_function" or is_view(node) or is_arithmetic(node) or node.target.__name__ == "getitem":  # type: ignore[union-attr]
        return False
    return isinstance(node.meta.get("val"), (Tensor, tuple, list))


def size(node: fx.Node) -> int:
    """Bytes of what a node gives; of several results, all."""
    return sum(int(tensor.numel()) * tensor.element_size() for tensor in tensors_in((node.meta.get("val"),)))


def count(block: nn.Module, inputs: tuple[Any, ...], context: AbstractContextManager[Any]) -> dict[str, float]:
    """GB that the regions of a block's forward and backward move, on tensors without values."""
    torch._dynamo.reset()
    counted = Counted()
    with context:
        output = torch.compile(block, backend=counted.backend(), fullgraph=True)(*inputs)
    output.backward(torch.empty_like(output))
    return {"forward": counted.forward / 1e9, "backward": counted.backward / 1e9}
