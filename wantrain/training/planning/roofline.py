"""Seconds per step on a card, estimated from operations and bytes: a roofline with stated efficiencies.

Matrix products and attention run at a share of the card's peak, everything else at a share of its memory's bandwidth,
and copies from and to the host beside them. The shares are typical of an H100's kernels; nothing here is measured, and
exchange between cards is not included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

from wantrain.models import WanTransformer
from wantrain.models.facts import blocks_of
from wantrain.models.flops import attention_flops, training_flops
from wantrain.training.planning.plan import SHARED_STATE, Choice, Sizes
from wantrain.training.planning.trace import BlockCosts
from wantrain.util.cards import Card

#: Shares of the peak that matrix products, attention forward and attention backward reach, and of the bandwidth.
PRODUCTS, ATTENTION, ATTENTION_BACKWARD, BANDWIDTH = 0.70, 0.62, 0.54, 0.85
#: A flash kernel's backward executes two and a half times the operations of its forward; the convention counts two.
FLASH_BACKWARD = 2.5


@dataclass(frozen=True)
class Work:
    """What one micro-batch computes: operations without recomputation."""

    products_forward: float
    products_backward: float
    attention: float

    @classmethod
    def of_groups(cls, module: WanTransformer, groups: Sequence[tuple[int, int]]) -> Work:
        """The work of several groups together, (samples, tokens of each)."""
        each = [astuple(cls.of(module, tokens=tokens, samples=samples)) for samples, tokens in groups]
        return cls(*map(sum, zip(*each, strict=True)))

    @classmethod
    def of(cls, module: WanTransformer, *, tokens: int, samples: int) -> Work:
        """The work of `samples` samples of so many tokens, with texts as long as they may be."""
        each = training_flops(module, tokens=tokens, text_rows=module.text_length)
        each_block = attention_flops(tokens, tokens + module.text_length, module.dim)
        attention = len(blocks_of(module)) * each_block
        return cls(
            samples * (each.forward - attention),
            samples * (each.backward - 2 * attention),
            samples * attention,
        )


def seconds(
    work: Work, sizes: Sizes, costs: Mapping[str, BlockCosts], choice: Choice, card: Card, *, micro_steps: int = 1
) -> float:
    """Seconds of one optimizer step of `micro_steps` micro-batches on `card`."""
    sizes, costs = choice.applied(sizes), choice.costs(costs, sizes.blocks)
    policies = choice.policies(sizes.blocks)
    shares = {name: count / max(1, sizes.blocks) for name, count in policies.items()}
    again = shares.get("block", 0.0) + shares.get("attention", 0.0)
    products = work.products_forward * (1 + again) + work.products_backward
    forward = work.attention * (1 + shares.get("block", 0.0))
    moved = max(costs[name].moved_outside for name in policies) + sum(
        count * (costs[name].moved_forward_block + costs[name].moved_backward_block) for name, count in policies.items()
    )
    if choice.base is not None:  # stored bytes are read and bf16 is written, at each use of a matrix
        moved += sizes.base * (choice.base_bytes(sizes) + 2.0) * (2 + again)
    if choice.low_rank:  # and a product is added to what was written
        products += 2.0 * choice.low_rank * sizes.base * (2 + again) * choice.sequence  # each process adds its own
        moved += 4.0 * sizes.base * (2 + again)
    operations = (
        products / (PRODUCTS * card.peak)
        + forward / (ATTENTION * card.peak)
        + FLASH_BACKWARD * work.attention / (ATTENTION_BACKWARD * card.peak)
    )
    compute = operations / choice.sequence + moved / (BANDWIDTH * card.bandwidth)
    visits = 2.0 * sizes.base * choice.base_bytes(sizes) * choice.swap / max(1, sizes.blocks)
    inputs = costs["block"].kept_block * (sizes.blocks - policies.get("none", 0))
    waiting = 2.0 * inputs if choice.activations == "cpu" else 0.0
    copies = (visits + waiting) / card.link if card.link else 0.0
    # An update reads gradient, weight and state, and writes the last two; of what an engine shares out, a part each.
    own = sizes.trained / (choice.processes if choice.engine in SHARED_STATE else 1)
    update = own * (3 * sizes.weight + 2 * sizes.state) / (BANDWIDTH * card.bandwidth)
    return micro_steps * max(compute, copies) + update
