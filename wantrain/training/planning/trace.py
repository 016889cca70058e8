"""What a training step needs beside weights, gradients and optimizer state: traced on tensors without values.

The network itself runs forward and backward on fake tensors of the real shapes, on a CPU device, where attention is one
flash operation, as on a GPU. A network of 14B needs no memory and no weights for that. It is traced with one and with
two of its blocks: the difference is a block's own, and what is left belongs to the layers outside them. Of loops over
equal parts of a tensor, two parts run and stand for all: what is moved is then right within one percent.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from wantrain.models import WanTransformer
from wantrain.models.activation_policy import ActivationPolicy
from wantrain.training.engine.accelerator import autocast
from wantrain.training.engine.optim import named_trainable
from wantrain.util.live_bytes import LiveBytes
from wantrain.util.moved_bytes import moved_by
from wantrain.util.parts import shortened

#: Policies of recomputation that are traced.
POLICIES = ("none", "attention", "block")


@dataclass(frozen=True)
class StepTrace:
    """Bytes of one micro-step. Weights, gradients and the batch itself are not among them.

    kept               alive between forward and backward
    forward, backward  the most alive at any moment of each
    moved_forward, moved_backward  read and written by everything that is no matrix product and no attention
    """

    kept: int
    forward: int
    backward: int
    moved_forward: int
    moved_backward: int


@dataclass(frozen=True)
class BlockCosts:
    """A step's bytes as a function of how many blocks there are.

    *_block    what each block adds to what is kept and moved
    *_outside  what the layers outside the blocks keep and move
    forward, backward  working memory, the most above what is kept until then
    """

    kept_block: float
    kept_outside: float
    forward: float
    backward: float
    moved_forward_block: float
    moved_backward_block: float
    moved_outside: float

    @classmethod
    def of(cls, one: StepTrace, two: StepTrace) -> BlockCosts:
        """From traces with one and with two blocks."""
        block = {field.name: getattr(two, field.name) - getattr(one, field.name) for field in fields(StepTrace)}
        outside = one.moved_forward + one.moved_backward - block["moved_forward"] - block["moved_backward"]
        return cls(
            kept_block=block["kept"],
            kept_outside=one.kept - block["kept"],
            forward=two.forward - two.kept,
            backward=two.backward - two.kept,
            moved_forward_block=block["moved_forward"],
            moved_backward_block=block["moved_backward"],
            moved_outside=outside,
        )

    def over(self, processes: int, stream: float) -> BlockCosts:
        """Those of one of several processes that share the tokens. What is outside the blocks each computes whole: of
        that at most the embedded patches, `stream` bytes in float32, and their bfloat16 before, are there at a time.
        """
        parts = ("kept_block", "forward", "backward", "moved_forward_block", "moved_backward_block")
        shared = replace(self, **{name: getattr(self, name) / processes for name in parts})
        return replace(shared, forward=max(shared.forward, 1.5 * stream), backward=max(shared.backward, 1.5 * stream))


def between(small: BlockCosts, large: BlockCosts, share: float) -> BlockCosts:
    """The costs at a size between two: each is a constant, for the text, and a part that grows with the tokens.

    Working memory is the largest of several such sums, at different moments: of that it is an upper bound.
    """
    return BlockCosts(*(a + share * (b - a) for a, b in zip(astuple(small), astuple(large), strict=True)))


#: Samples, latent frames, rows, columns.
Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Sample:
    """The shape of one micro-batch.

    latents     (samples, latent frames, rows, columns); of a pack those of each group of clips of one size
    per_frame   True: a timestep for each latent frame
    precision   fp32 or bf16, of linear layers
    """

    latents: Shape | tuple[Shape, ...]
    per_frame: bool
    precision: str


class TracedCosts(Mapping[str, BlockCosts]):
    """The costs of a module by policy of recomputation, each of `policies`, traced when it is asked for."""

    def __init__(self, module: WanTransformer, sample: Sample, policies: Sequence[str] = POLICIES) -> None:
        self.module, self.sample, self.policies = module, sample, policies
        self.found: dict[str, BlockCosts] = {}

    def __getitem__(self, policy: str) -> BlockCosts:
        if policy not in self.found:
            if policy not in self.policies:
                raise KeyError(policy)
            self.found[policy] = trace_blocks(self.module, self.sample, policy)
        return self.found[policy]

    def __iter__(self) -> Iterator[str]:
        return iter(self.policies)

    def __len__(self) -> int:
        return len(self.policies)


def trace_blocks(module: WanTransformer, sample: Sample, recompute: str) -> BlockCosts:
    """The costs of `module`, which has no values (on the meta device), with all blocks under one policy of
    recomputation: none, attention or block.
    """
    return BlockCosts.of(*(trace_step(with_blocks(module, count, recompute), sample) for count in (1, 2)))


def with_blocks(module: nn.Module, count: int, recompute: str) -> nn.Module:
    """A copy of a network without values that has only the first `count` of its repeated blocks, all under one policy
    of recomputation.
    """
    short = copy.copy(module)
    short._modules = dict(module._modules)
    left = count
    for name in getattr(module, "repeated_blocks", ()):
        blocks = list(module.get_submodule(name).children())[:left]
        left -= len(blocks)
        setattr(short, name, nn.ModuleList(blocks))
    short.run_block = ActivationPolicy(recompute, blocks=count)  # type: ignore[assignment]
    return copy.deepcopy(short)


def trace_step(module: Any, sample: Sample) -> StepTrace:
    """Run one micro-step of a network without values."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        give_fake_parameters(module.train())
        inputs = _inputs(module, sample)
        live = _StepBytes()
        for parameter in named_trainable(module).values():
            parameter.register_post_accumulate_grad_hook(lambda own: live.forget(own.grad))  # counted with gradients
        with live, shortened(live.count):
            with autocast(sample.precision, torch.device("cpu")):
                velocity = module(*inputs)
            parts = velocity if isinstance(velocity, tuple) else (velocity,)
            loss = torch.stack([part.float().square().mean() for part in parts]).sum()
            del velocity, parts
            kept, forward, moved_forward = live.now, live.peak, live.moved
            live.peak = live.now
            loss.backward()
    return StepTrace(kept, forward, live.peak, moved_forward, live.moved - moved_forward)


def _inputs(module: Any, sample: Sample) -> tuple[Any, ...]:
    """Latents, timesteps and texts: tensors, or of a pack a tuple of them each."""
    if isinstance(sample.latents[0], tuple):
        groups = [_inputs(module, replace(sample, latents=group)) for group in sample.latents]
        return tuple(zip(*groups, strict=True))
    count, frames, *_ = sample.latents
    latents = torch.empty(count, module.in_channels, *sample.latents[1:])
    timestep = torch.empty(count, frames) if sample.per_frame else torch.empty(count)
    return latents, timestep, torch.empty(count, module.text_length, module.text_dim)


def give_fake_parameters(module: nn.Module) -> None:
    """Replace parameters on the meta device by fake ones on a CPU, inside FakeTensorMode."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                owner._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)


class _StepBytes(LiveBytes):
    """Sums what elementwise operations, norms and copies read and write too, in `moved`."""

    def __init__(self) -> None:
        super().__init__()
        self.moved, self.times = 0, 1

    def count(self, times: int) -> None:
        """From now on, each operation stands for so many."""
        self.times = times

    def observe(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        self.moved += self.times * moved_by(func, args, kwargs, result)
