"""Floating-point operations of a training step of a transformer, counted from its layers.

A multiply-add counts as two operations; only matrix products and attention count, the rest is below 1 %. For each layer
the gradient of its input counts if something before the layer trains, the gradient of its weight if the weight trains:
one rule for full fine-tuning, LoRA and partial training. Attention's backward counts as twice its forward (flash
kernels execute 2.5 times as many). Text rows are those computed: all padding is one row (see WanTransformer).
Source: the layer shapes; for the whole formula, PaLM (arXiv 2204.02311) appendix B counts likewise.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from wantrain.models import kronecker
from wantrain.models.facts import blocks_of
from wantrain.models.feed_forward import frozen_layers
from wantrain.models.transformer import Attention, Block, WanTransformer


@dataclass(frozen=True)
class Flops:
    """Operations of one sample: forward, backward, and what is computed again in the backward."""

    forward: int
    backward: int
    recompute: int

    @property
    def model(self) -> int:
        """What training needs, without recomputation: the convention of MFU."""
        return self.forward + self.backward

    @property
    def executed(self) -> int:
        """What is executed, recomputation included."""
        return self.model + self.recompute


class Count:
    """Sums of forward and backward operations over layers."""

    def __init__(self) -> None:
        self.forward = self.backward = 0

    def linear(self, layer: nn.Module, rows: int, flows: bool) -> bool:
        """Add a linear layer, with any adapter beside it, applied to `rows` rows. `flows`: its input has a gradient.

        Returns True if its output has one.
        """
        base = _base(layer)
        products = 2 * rows * _size(base)
        # Among the parameters: a quantised layer has no weight to train, and its attribute would make the values.
        trains = any(name == "weight" and p.requires_grad for name, p in base.named_parameters(recurse=False))
        self.forward += products
        self.backward += products * (flows + trains)
        for name in ("lora_A", "lora_B"):
            beside = getattr(layer, name, None)
            for part in beside.values() if isinstance(beside, nn.ModuleDict) else ():
                # B needs its input's gradient, for A trains; A needs that of its input only if something before trains.
                own = 2 * rows * _size(part)
                self.forward += own
                self.backward += own * (1 + (flows or name == "lora_B"))
                trains = True
        # Each factor of a LoKr trains, so each needs the gradient of its own output, and all but the first give one on.
        for number, size in enumerate(kronecker.products(layer) if kronecker.is_kronecker(layer) else ()):
            self.forward += 2 * rows * size
            self.backward += 2 * rows * size * (1 + (flows or number > 0))
            trains = True
        return flows or trains

    def attention(self, queries: int, keys: int, dim: int, flows: bool) -> None:
        """Add softmax attention over all heads."""
        self.forward += attention_flops(queries, keys, dim)
        self.backward += 2 * attention_flops(queries, keys, dim) * flows


def attention_flops(queries: int, keys: int, dim: int) -> int:
    """Operations of softmax attention over all heads, forward."""
    return 4 * queries * keys * dim


def training_flops(module: WanTransformer, *, tokens: int, text_rows: int, timesteps: int = 1) -> Flops:
    """Operations of one sample's forward and backward, by what trains in `module`.

    tokens     video tokens
    text_rows  rows that the text embedding is computed for
    timesteps  noise levels per sample: 1, or one per latent frame
    """
    count = Count()
    x = count.linear(module.patch_embedding, tokens, False)
    text = False
    for layer in module.text_embedding:
        text = count.linear(layer, text_rows, text) if _is_linear(layer) else text
    time = False
    for layer in (*module.time_embedding, *module.time_projection):
        time = count.linear(layer, timesteps, time) if _is_linear(layer) else time
    recompute = 0
    for number, block in enumerate(blocks_of(module)):
        assert isinstance(block, Block)
        before = count.forward
        x = _block(count, block, tokens, text_rows, x, time, text)
        if number < module.run_block.recomputed and x:
            kept = attention_flops(tokens, tokens, module.dim) if module.run_block.keep_attention else 0
            # The last layer of a frozen network is not (feed_forward.py); its weight is nearly all of its work.
            moved = time or block.modulation.requires_grad
            left_out = 0 if moved or not frozen_layers(block.ffn) else 2 * tokens * _size(_base(block.ffn[2]))
            recompute += count.forward - before - kept - left_out
    flows = x or time or module.head.modulation.requires_grad
    count.linear(module.head.head, tokens, flows)
    return Flops(count.forward, count.backward, recompute)


def text_flops(module: WanTransformer, text_rows: int) -> int:
    """Operations of a forward that depend on the text alone: its embedding, and each block's keys and values."""
    count, layers = Count(), [layer for layer in module.text_embedding if _is_linear(layer)]
    for block in blocks_of(module):
        assert isinstance(block, Block)
        layers += [block.cross_attn.k, block.cross_attn.v]
    for layer in layers:
        count.linear(layer, text_rows, False)
    return count.forward


def _block(count: Count, block: Block, tokens: int, text_rows: int, x: bool, time: bool, text: bool) -> bool:
    """Add one block. Returns True if its output has a gradient."""
    moved = time or block.modulation.requires_grad
    x = _attention(count, block.self_attn, tokens, tokens, x or moved, x or moved) or x or moved
    normed = x or block.norm3.weight.requires_grad
    x = _attention(count, block.cross_attn, tokens, text_rows, normed, text) or x
    inner = count.linear(block.ffn[0], tokens, x or moved)
    return count.linear(block.ffn[2], tokens, inner) or x or moved


def _attention(count: Count, layer: Attention, queries: int, keys: int, x: bool, context: bool) -> bool:
    q = count.linear(layer.q, queries, x) or layer.norm_q.weight.requires_grad
    k = count.linear(layer.k, keys, context) or layer.norm_k.weight.requires_grad
    v = count.linear(layer.v, keys, context)
    flows = q or k or v
    count.attention(queries, keys, layer.q.out_features, flows)
    return count.linear(layer.o, queries, flows)


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(_base(layer), nn.Linear)


def _base(layer: nn.Module) -> nn.Module:
    """The layer beside which an adapter stands, or itself."""
    base: nn.Module = getattr(layer, "base_layer", layer)
    return base


def _size(layer: nn.Module) -> int:
    """Elements of a weight matrix, also where an engine keeps only a part of it in this process."""
    if isinstance(layer, nn.Linear):
        return layer.in_features * layer.out_features
    assert isinstance(layer, nn.Conv3d)
    depth, height, width = layer.kernel_size
    return layer.in_channels * depth * height * width * layer.out_channels
