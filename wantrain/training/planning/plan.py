"""The memory plan of a run: the bytes that one process needs on its card and on the host, part by part.

Weights, gradients, optimizer state and averages are counted, activations are traced (trace.py). No trace shows what
CUDA's libraries, NCCL and the allocator take: the allowances below estimate it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from wantrain.models.facts import blocks_of, is_fp32
from wantrain.training.engine.optim import named_trainable
from wantrain.training.planning.memory import UpdateBytes
from wantrain.training.planning.trace import BlockCosts

GB = 1e9
#: Bytes of a CUDA context with its kernels, and of the workspaces of cuBLAS and cuDNN.
CUDA = 0.9 * GB
#: NCCL's buffers and channels, where several processes train together.
NCCL = 1.0 * GB
#: Share of activations and working memory that fragmentation adds.
FRAGMENTATION = 0.05
#: Elements that DeepSpeed gathers or reduces at once (its default bucket), float32.
DEEPSPEED_BUCKET = 500_000_000
#: Bytes of an element of a base weight, with its share of the scales.
BASE_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "int8": 1.0, "nf4": 0.5625}
#: Engines in the order in which they share more out.
ENGINES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
#: Those of which each process keeps and updates its part of the optimizer's state.
SHARED_STATE = ENGINES[2:]


@dataclass(frozen=True)
class Sizes:
    """What an expert holds, before any engine or memory setting.

    base      elements of the frozen matrices inside the blocks, which base.dtype stores in fewer bytes and swap.blocks
              moves to the host
    plain     bytes of an element of those without base.dtype
    largest   elements of the largest of them
    sides     rows and columns of all of them: elements of a product of rank 1 beside each
    frozen    bytes of all other frozen weights
    trained   elements that training moves
    fp32      elements of those that are float32 whatever trained.dtype says
    biggest   elements of the largest parameter of those
    blocks    how many blocks there are
    update    bytes of one element of the others, with its gradient and the optimizer's state
    average   True if an average of the trained weights is kept, in float32
    """

    base: int
    plain: float
    largest: int
    sides: int
    frozen: int
    trained: int
    fp32: int
    biggest: int
    blocks: int
    update: UpdateBytes
    average: bool

    @property
    def weight(self) -> float:
        """Bytes of a trained element, on average."""
        return (4.0 * self.fp32 + self.update.weight * (self.trained - self.fp32)) / max(1, self.trained)

    @property
    def state(self) -> float:
        """Bytes of the optimizer's state per trained element."""
        return self.update.state

    @classmethod
    def of(cls, module: nn.Module, *, update: UpdateBytes, average: bool) -> Sizes:
        """The sizes of a module, which needs no values."""
        trained = named_trainable(module)
        inside = {id(parameter) for parameter in blocks_of(module).parameters()}
        matrices: list[nn.Parameter] = []
        frozen = 0
        for name, parameter in module.named_parameters():
            if name in trained:
                continue
            if id(parameter) in inside and parameter.ndim == 2 and not is_fp32(module, name):
                matrices.append(parameter)
            else:
                frozen += parameter.nbytes
        return cls(
            base=sum(parameter.numel() for parameter in matrices),
            plain=float(matrices[0].element_size()) if matrices else 0.0,
            largest=max((parameter.numel() for parameter in matrices), default=0),
            sides=sum(sum(parameter.shape) for parameter in matrices),
            frozen=frozen,
            trained=sum(parameter.numel() for parameter in trained.values()),
            fp32=sum(parameter.numel() for name, parameter in trained.items() if is_fp32(module, name)),
            biggest=max((parameter.numel() for parameter in trained.values()), default=0),
            blocks=len(blocks_of(module)),
            update=update,
            average=average,
        )


@dataclass(frozen=True)
class Update:
    """Another way to update the trained weights than the run's own: its settings as overrides, and its bytes."""

    overrides: tuple[str, ...]
    element: UpdateBytes


@dataclass(frozen=True)
class Choice:
    """The settings that decide on memory and time.

    engine, processes  how the run is spread
    precision    fp32 or bf16, of linear layers: in which FSDP2 gathers trained weights
    recompute    none, attention, block, or how many blocks keep everything while the others are recomputed
    activations  gpu or cpu: where the inputs of recomputed blocks wait for the backward
    inputs       fp32 or bf16: dtype of these inputs
    base         dtype of the base weights of an adapter; None: as they are
    low_rank     rank of the product beside those in fp8, int8 or nf4; 0: there is none
    swap         blocks whose frozen weights wait on the host
    update       how trained weights are kept and updated; None: as the run's settings say
    sequence     processes that share the tokens of a sample
    groups       of these, groups that gather each other's keys and values, the heads being divided inside each
    copies       under FSDP2, groups of processes that hold the same parts
    """

    engine: str = "single"
    processes: int = 1
    precision: str = "fp32"
    recompute: str | int = "block"
    activations: str = "gpu"
    inputs: str = "fp32"
    base: str | None = None
    low_rank: int = 0
    swap: int = 0
    update: Update | None = None
    sequence: int = 1
    groups: int = 1
    copies: int = 1

    def applied(self, sizes: Sizes) -> Sizes:
        """The sizes with the weights updated in this choice's way."""
        return sizes if self.update is None else replace(sizes, update=self.update.element)

    def policies(self, blocks: int) -> dict[str, int]:
        """How many blocks have each policy of recomputation."""
        if isinstance(self.recompute, str):
            return {self.recompute: blocks}
        whole = min(self.recompute, blocks)
        return {name: count for name, count in (("none", whole), ("block", blocks - whole)) if count}

    def costs(self, costs: Mapping[str, BlockCosts], blocks: int) -> Mapping[str, BlockCosts]:
        """The costs that one process has of a micro-batch, by policy: of its part of the tokens."""
        if self.sequence == 1:
            return costs
        stream = costs["block"].kept_block  # the input of a block, in float32
        return {name: costs[name].over(self.sequence, stream) for name in {"block", *self.policies(blocks)}}

    def base_bytes(self, sizes: Sizes) -> float:
        """Bytes of an element of the frozen matrices inside the blocks."""
        if self.base is None:
            return sizes.plain
        return BASE_BYTES[self.base] + sizes.plain * self.low_rank * sizes.sides / max(1, sizes.base)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that one process needs: on its card by part, and of pinned memory on the host.

    kept      activations between forward and backward
    working   the most that forward or backward needs above those
    exchange  what an engine gathers and sends, and blocks on their way from the host
    """

    weights: float
    gradients: float
    optimizer: float
    average: float
    kept: float
    working: float
    exchange: float
    allowance: float
    host: float = 0.0

    @property
    def device(self) -> float:
        """Bytes on the card."""
        return sum(self.parts.values())

    @property
    def tensors(self) -> float:
        """Bytes of tensors on the card: what torch counts as allocated."""
        return self.device - self.allowance

    @property
    def parts(self) -> dict[str, float]:
        """The parts that are on the card, by the name that a line shows."""
        names = {"kept": "activations", "working": "working memory", "exchange": "buffers"}
        return {names.get(key, key): value for key, value in vars(self).items() if key != "host"}

    def __str__(self) -> str:
        shown = [f"{name} {size / GB:.3g}" for name, size in self.parts.items() if size >= 0.5e6]
        host = f"; {self.host / GB:.3g} GB pinned on the host" if self.host else ""
        return f"{' + '.join(shown)} = {self.device / GB:.4g} GB{host}"


def plan(sizes: Sizes, costs: Mapping[str, BlockCosts], choice: Choice) -> MemoryPlan:
    """The memory of one expert's step. `costs` are those of a micro-batch under each policy of recomputation."""
    sizes, costs = choice.applied(sizes), choice.costs(costs, sizes.blocks)
    kept, working, waiting = _activations(sizes, costs, choice)
    frozen, trained = sizes.base * choice.base_bytes(sizes), sizes.trained * sizes.weight
    weights, gradients, state = frozen + sizes.frozen + trained, trained, sizes.trained * sizes.state
    passing = sizes.update.passing * sizes.biggest
    if sizes.update.gradient:  # activations are gone when the first parameter is updated
        working = max(working, passing - kept)
    else:
        gradients, working = 0.0, working + passing
    average, exchange, host = 4.0 * sizes.trained * sizes.average, 0.0, waiting
    block = (frozen + trained) / max(1, sizes.blocks)
    if choice.swap:
        swapped = frozen_on_host(sizes, choice)
        weights, host = weights - swapped, host + swapped
        exchange += 2 * frozen / sizes.blocks  # the block that computes and the one on its way
    if choice.sequence > 1:  # q, k and v: as they are sent, as they come, and in order; of groups k and v once more
        parts = 9 + (6 * choice.groups if choice.groups > 1 else 0)
        exchange += parts * costs["block"].kept_block * (0.5 if choice.precision == "bf16" else 1.0)
    if choice.base is not None:
        working += 2.0 * sizes.largest  # one matrix as bf16 again
    match choice.engine:
        case "ddp":
            exchange += gradients  # the reducer's buckets
        case "zero1" | "zero2" | "zero3":
            master = 4.0 * sizes.trained / choice.processes
            state = state / choice.processes + master
            exchange += 4.0 * min(DEEPSPEED_BUCKET, sizes.trained)
            if choice.engine != "zero1":
                gradients /= choice.processes
            if choice.engine == "zero3":
                weights /= choice.processes
                exchange += 2 * block
        case "fsdp2":
            weights, gradients, state, average = (
                part * choice.copies / choice.processes for part in (weights, gradients, state, average)
            )
            # Two blocks gathered, and one block's gradients, which are summed in float32.
            each = 2.0 if choice.precision == "bf16" else 4.0
            reduced = 4.0 if each == 4.0 else each + 4.0
            exchange += (2 * (frozen + each * sizes.trained) + reduced * sizes.trained) / max(1, sizes.blocks)
    allowance = CUDA + FRAGMENTATION * (kept + working + exchange) + (NCCL if choice.processes > 1 else 0.0)
    return MemoryPlan(weights, gradients, state, average, kept, working, exchange, allowance, host)


def frozen_on_host(sizes: Sizes, choice: Choice, *, whole: bool = False) -> float:
    """Bytes of frozen weights that wait on the host: those of swapped blocks, or with `whole` all."""
    frozen = sizes.base * choice.base_bytes(sizes)
    return frozen + sizes.frozen if whole else frozen * choice.swap / max(1, sizes.blocks)


def _activations(sizes: Sizes, costs: Mapping[str, BlockCosts], choice: Choice) -> tuple[float, float, float]:
    """(kept on the card, working memory, waiting on the host) of a step."""
    policies = choice.policies(sizes.blocks)
    kept = max(costs[name].kept_outside for name in policies)
    waiting = 0.0
    for name, count in policies.items():
        kept += costs[name].kept_block * count
        if name == "none":
            continue
        # A recomputed block keeps its input, float32 as it is; of those on the host two at a time are on the card.
        plain = costs["block"].kept_block
        own = plain / 2 if choice.inputs == "bf16" else plain
        here = min(count, 2) if choice.activations == "cpu" else count
        waiting += own * (count - here)
        kept += own * here - plain * count
    working = max(max(costs[name].forward, costs[name].backward) for name in policies)
    return kept, working, waiting
