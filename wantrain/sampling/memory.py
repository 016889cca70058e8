"""Memory that sampling will need on the device and on the host, estimated before it starts, each figure with its parts.

Weights are counted. Activations of a transformer step and of decoding are traced: the same modules run at the same size
on tensors that have shapes and no values, while the bytes alive are summed. Attention is assumed to keep nothing of
size tokens x tokens, as flash and memory-efficient kernels do. No trace shows what libraries allocate (cuBLAS, cuDNN,
the CUDA context): `HEADROOM` and `CONTEXT` estimate it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from wantrain import geometry
from wantrain.models import WanTransformer, WanVAE
from wantrain.models.facts import blocks_of, outside_blocks
from wantrain.models.flops import text_flops, training_flops
from wantrain.models.formats.loading import cast_as_loaded
from wantrain.models.kept_text import KeptText
from wantrain.models.offload import EXPERTS, OffloadPolicy
from wantrain.models.pinned_memory import layout
from wantrain.models.vae import Half
from wantrain.models.vae_convolutions import plain_forms
from wantrain.sampling.peers import ALONE, Peers
from wantrain.util.live_bytes import LiveBytes
from wantrain.util.parts import shortened

GIB = float(2**30)
#: Share of the sum added for fragmentation and workspaces, and bytes of a CUDA context with its libraries.
HEADROOM, CONTEXT = 0.1, 0.8 * GIB
#: Share of a call's operations from which on the keys and values of its text are kept.
WORTH = 0.01
#: GPU memory sizes on the market, GB.
CARDS = (8, 12, 16, 24, 32, 48, 80, 96, 141, 192)
#: Tensors of the latents' size that a multistep solver holds: x, the corrected x, two data predictions, the noise.
SOLVER_STATE = 5


@dataclass(frozen=True)
class Needs:
    """Bytes that sampling takes under one offload policy.

    experts    the experts' weights on the device
    other      VAE, latents, and the larger of a transformer step and the decoding
    host       weights in host memory, locked where there is a GPU; mapped files are not counted, since the kernel may
               drop their pages
    """

    policy: OffloadPolicy
    experts: int
    other: int
    host: int

    @property
    def device(self) -> float:
        """Bytes on the device, with headroom and the CUDA context."""
        return (self.experts + self.other) * (1 + HEADROOM) + CONTEXT

    @property
    def card(self) -> str:
        """The smallest card that holds it."""
        fitting = [size for size in CARDS if size * GIB * 0.98 >= self.device]
        return f"a {fitting[0]} GB card" if fitting else "no single card"


@dataclass(frozen=True)
class Call:
    """What is sampled at once.

    tile          side in pixels of the squares that are decoded one by one; None: whole frames
    processes     make each video together; the memory is that of one of them
    conditioning  the experts' conditioning type (wantrain/conditioning.py)
    """

    bucket: geometry.Bucket
    batch_size: int = 1
    tile: int | None = None
    processes: int = 1
    conditioning: str = "none"

    def peers(self, num_heads: int) -> Peers:
        """The first of these processes, where what it is sent has no values."""
        if self.processes == 1:
            return ALONE
        from wantrain.models.sequence import Group, SequenceParallel  # half a second

        heads = math.gcd(self.processes, num_heads)
        among, groups = (Group(size, lambda x: x.new_empty(x.shape)) for size in (heads, self.processes // heads))
        return Peers(SequenceParallel(0, among, groups))


def half_of_vae(conditioning: str) -> Half | None:
    """The half of the VAE that sampling needs (None: both): without conditioning inputs nothing is encoded."""
    return "decoder" if conditioning == "none" else None


def describe(
    build_expert: Callable[[], nn.Module],
    build_vae: Callable[[], WanVAE],
    call: Call,
    *,
    names: Sequence[str],
    dtype: torch.dtype,
    policy: OffloadPolicy,
) -> str:
    """Lines for `dry_run=true`. Modules are built without values, experts in `dtype` except for their float32 parts."""
    with FakeTensorMode():
        expert, vae = cast_as_loaded(build_expert(), dtype), build_vae()
        if (half := half_of_vae(call.conditioning)) is not None:
            vae.keep_only(half)
        return _describe(dict.fromkeys(names, expert), vae, call, policy)


def _describe(experts: Mapping[str, nn.Module], vae: Any, call: Call, policy: OffloadPolicy) -> str:
    first: Any = next(iter(experts.values()))
    bucket, tile = call.bucket, call.tile
    shape = geometry.latent_shape(bucket, vae.temporal_stride, vae.spatial_stride)
    latents = torch.empty(call.batch_size, vae.z_dim, *shape)
    rows = None if tile is None else tile // vae.spatial_stride
    peers = call.peers(first.num_attention_heads)
    peers.split(first)
    step, decoding = trace_step(first, latents), trace_decoding(vae, latents, rows, peers)
    state = SOLVER_STATE * latents.nbytes
    other = _bytes(vae.parameters()) + state + max(step, decoding)
    choices = [needs(experts, other, OffloadPolicy(name, blocks)) for name in EXPERTS for blocks in (False, True)]
    chosen = next(choice for choice in choices if choice.policy == policy)
    blocks, outside = _blocks(first), _bytes(outside_blocks(first))
    patches = " x ".join(str(side // part) for side, part in zip(shape, geometry.PATCH, strict=True))
    lines = [
        f"tokens per video    {bucket}: {patches} = {geometry.num_tokens(shape)}; {call.batch_size} at once"
        f"{'' if peers.size == 1 else f', shared by {call.processes} processes, of which what follows is one'}",
        f"an expert           {len(blocks)} blocks x {_gib(blocks[0])} + {_gib(outside)} outside them "
        f"= {_gib(_bytes(first.parameters()))}; {len(experts)} of them",
        f"experts on device   {_gib(chosen.experts)} ({policy})",
        f"beside them         VAE {_gib(_bytes(vae.parameters()))} + latents {SOLVER_STATE} x {_gib(latents.nbytes)} "
        f"+ the larger of a transformer step {_gib(step)} and decoding {_gib(decoding)}"
        f"{'' if tile is None else f' in tiles of {tile} pixels'} = {_gib(other)}",
        f"device              ({_gib(chosen.experts)} + {_gib(other)}) x {1 + HEADROOM:g} + {_gib(CONTEXT)} for CUDA "
        f"= {_gib(chosen.device)}: {chosen.card}",
        f"host                {_gib(chosen.host)} of experts",
        "texts               encoded before the experts are loaded, on the device if the encoder fits there",
        "offload             experts  blocks  device      host        card",
    ]
    lines += [
        f"                    {each.policy.experts:<8} {str(each.policy.blocks).lower():<7} {_gib(each.device):<11} "
        f"{_gib(each.host):<11} {each.card}"
        for each in choices
    ]
    return "\n".join(lines)


def needs(experts: Mapping[str, nn.Module], other: int, policy: OffloadPolicy) -> Needs:
    """What the experts take under a policy, on the device and on the host, and `other` bytes on the device."""
    whole = [_bytes(module.parameters()) for module in experts.values()]
    outside = [_bytes(outside_blocks(module)) for module in experts.values()]
    resident = outside if policy.blocks else whole
    # While a block is copied to the device, the memory of the one before may not be free yet.
    passing = 2 * max(max(_blocks(module)) for module in experts.values()) if policy.blocks else 0
    held = sum(resident) if policy.experts == "none" else max(resident)
    host = 0
    if policy.experts == "cpu" or (policy.experts == "none" and policy.blocks):  # in arenas (see ExpertOffloader)
        waiting = [module if policy.experts == "cpu" else blocks_of(module) for module in experts.values()]
        host = sum(layout(parameter.nbytes for parameter in each.parameters())[1] for each in waiting)
    return Needs(policy, held + passing, other, host)


def trace_step(expert: Any, latents: Tensor) -> int:
    """Peak bytes of the calls of one solver step of an expert, without its weights and its input."""
    inputs = latents.new_empty(len(latents), expert.in_channels, *latents.shape[2:])
    text, timestep = (
        latents.new_empty(len(latents), expert.text_length, expert.text_dim),
        latents.new_empty(len(latents)),
    )
    texts = [kept(expert, latents, text), kept(expert, latents, text)]  # with guidance there are two

    def calls() -> None:
        for each in texts:
            expert(inputs, timestep, each)

    with shortened(lambda count: None):  # parts of one size hold the same
        return peak_bytes(calls)


def kept(model: Any, latents: Tensor, text_BLD: Tensor) -> Tensor | KeptText:
    """The text as a network is to be given it at every step: kept, if what the network makes of it alone is WORTH its
    memory.

    `model` is a velocity model, or what computes as its `network`. Compiled blocks would be compiled once more for it.
    """
    network = getattr(model, "network", model)
    if type(network) is not WanTransformer or any("forward" in vars(block) for block in blocks_of(network)):
        return text_BLD
    rows, tokens = min(text_BLD.shape[1] + 1, network.text_length), geometry.num_tokens(latents.shape[2:])
    share = text_flops(network, rows) / training_flops(network, tokens=tokens, text_rows=rows).forward
    return KeptText(text_BLD) if share >= WORTH else text_BLD


def trace_decoding(vae: Any, latents: Tensor, rows: int | None, peers: Peers = ALONE) -> int:
    """Peak bytes of decoding on the device: of all latents, or of one tile of `rows` latent rows and columns and those
    of `peers`.
    """
    with plain_forms():
        if rows is None or max(latents.shape[3:]) <= rows:
            return peak_bytes(lambda: vae.decode(latents))
        return peak_bytes(lambda: peers.gathered(vae.decode(latents[..., :rows, :rows])))


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most bytes that tensors made by `work` hold at any moment, without gradients."""
    live = LiveBytes()
    with torch.no_grad(), _LeanAttention(), live:
        work()
    return live.peak


class _LeanAttention(TorchFunctionMode):
    """Attention that allocates only its result: on tensors without values torch would trace the plain formula."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, value = args[0], args[2]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.nbytes for parameter in parameters)


def _blocks(module: nn.Module) -> list[int]:
    return [_bytes(block.parameters()) for block in blocks_of(module)]


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 or size == 0 else f"{size / 2**20:.2f} MiB"
