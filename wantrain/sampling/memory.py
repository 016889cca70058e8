"""What sampling will take before it starts: memory of the device and of the host, each figure with its parts.

Weights are counted. What a step and the decoding need beside them is traced: the very modules run at the very size on
tensors that have shapes and no values, while the bytes that would be alive are summed up. Attention is taken to keep
nothing of the size tokens x tokens, as flash and memory-efficient kernels do. What libraries take for themselves
(cuBLAS, cuDNN, the CUDA context) no trace shows: `HEADROOM` and `CONTEXT` stand for it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wantrain import geometry
from wantrain.models.formats.loading import cast_as_loaded
from wantrain.models.offload import blocks_of, outside_blocks
from wantrain.models.pinned_memory import layout
from wantrain.sampling.offload import IDLE, OFFLOAD

GIB = float(2**30)
#: Part of the sum that fragments and workspaces take, and bytes of a CUDA context with its libraries.
HEADROOM, CONTEXT = 0.1, 0.8 * GIB
#: Cards by their memory.
CARDS = (8, 12, 16, 24, 32, 48, 80, 96, 141, 192)
#: Tensors of the latents' size that a multistep solver holds: x, its correction, two answers, the noise.
SOLVER_STATE = 5


@dataclass(frozen=True)
class Needs:
    """Bytes that one way of sampling takes.

    experts    the experts' weights on the device
    beside     VAE, latents, and the larger of a transformer step and the decoding
    host       weights in host memory, locked where there is a GPU; those in mapped files, which the kernel may drop,
               are not counted
    """

    idle: str
    offload: str
    experts: int
    beside: int
    host: int

    @property
    def device(self) -> float:
        """All of it, with headroom and CUDA's own."""
        return (self.experts + self.beside) * (1 + HEADROOM) + CONTEXT

    @property
    def card(self) -> str:
        """The smallest card that holds it."""
        fitting = [size for size in CARDS if size * GIB * 0.98 >= self.device]
        return f"a {fitting[0]} GB card" if fitting else "no single card"


def describe(
    build_expert: Callable[[], nn.Module],
    build_vae: Callable[[], nn.Module],
    *,
    names: Sequence[str],
    bucket: geometry.Bucket,
    batch_size: int,
    dtype: torch.dtype,
    idle: str,
    offload: str,
    tile: int | None,
) -> str:
    """Lines for `dry_run=true`; modules are made without values, experts of `dtype` but for their float32 parts.

    `tile` is a side in pixels, or None.
    """
    with FakeTensorMode():
        expert, vae = cast_as_loaded(build_expert(), dtype), build_vae()
        return _describe(dict.fromkeys(names, expert), vae, bucket, batch_size, idle, offload, tile)


def _describe(
    experts: Mapping[str, nn.Module],
    vae: Any,
    bucket: geometry.Bucket,
    batch_size: int,
    idle: str,
    offload: str,
    tile: int | None,
) -> str:
    first = next(iter(experts.values()))
    shape = geometry.latent_shape(bucket, vae.temporal_stride, vae.spatial_stride)
    latents = torch.empty(batch_size, vae.z_dim, *shape)
    rows = None if tile is None else tile // vae.spatial_stride
    step, decoding = trace_step(first, latents), trace_decoding(vae, latents, rows)
    state = SOLVER_STATE * latents.nbytes
    beside = _bytes(vae.parameters()) + state + max(step, decoding)
    ways = [needs(experts, beside, how, off) for how in IDLE for off in OFFLOAD]
    chosen = next(way for way in ways if (way.idle, way.offload) == (idle, offload))
    blocks, outside = _blocks(first), _bytes(outside_blocks(first))
    patches = " x ".join(str(side // part) for side, part in zip(shape, geometry.PATCH, strict=True))
    lines = [
        f"tokens per video    {bucket}: {patches} = {geometry.num_tokens(shape)}; {batch_size} at once",
        f"an expert           {len(blocks)} blocks x {_gib(blocks[0])} + {_gib(outside)} outside them "
        f"= {_gib(_bytes(first.parameters()))}; {len(experts)} of them",
        f"experts on device   {_gib(chosen.experts)} (idle={idle}, offload={offload})",
        f"beside them         VAE {_gib(_bytes(vae.parameters()))} + latents {SOLVER_STATE} x {_gib(latents.nbytes)} "
        f"+ the larger of a transformer step {_gib(step)} and decoding {_gib(decoding)}"
        f"{'' if tile is None else f' in tiles of {tile} pixels'} = {_gib(beside)}",
        f"device              ({_gib(chosen.experts)} + {_gib(beside)}) x {1 + HEADROOM:g} + {_gib(CONTEXT)} for CUDA "
        f"= {_gib(chosen.device)}: {chosen.card}",
        f"host                {_gib(chosen.host)} of experts",
        "texts               encoded before experts come, on the device; on the host if the encoder has no room there",
        "other ways          idle  offload  device      host        card",
    ]
    lines += [
        f"                    {way.idle:<5} {way.offload:<8} {_gib(way.device):<11} {_gib(way.host):<11} {way.card}"
        for way in ways
    ]
    return "\n".join(lines)


def needs(experts: Mapping[str, nn.Module], beside: int, idle: str, offload: str) -> Needs:
    """What the experts take, on the device and on the host, when they live as `idle` and `offload` say."""
    whole = [_bytes(module.parameters()) for module in experts.values()]
    outside = [_bytes(outside_blocks(module)) for module in experts.values()]
    streamed = offload == "blocks"
    resident = outside if streamed else whole
    # One block is there at a time; while the next one comes, the one before may not be free yet.
    passing = 2 * max(max(_blocks(module)) for module in experts.values()) if streamed else 0
    held = sum(resident) if idle == "gpu" else max(resident)
    host = 0
    if idle == "cpu" or (
        idle == "gpu" and streamed
    ):  # what waits on the host for good lies in arenas (see ExpertOffloader)
        waiting = [module if idle == "cpu" else blocks_of(module) for module in experts.values()]
        host = sum(layout(parameter.nbytes for parameter in each.parameters())[1] for each in waiting)
    return Needs(idle, offload, held + passing, beside, host)


def trace_step(expert: Any, latents: Tensor) -> int:
    """Peak bytes of one call of an expert beside its weights and its input."""
    given = latents.new_empty(len(latents), expert.in_channels, *latents.shape[2:])
    text, timestep = (
        latents.new_empty(len(latents), expert.text_length, expert.text_dim),
        latents.new_empty(len(latents)),
    )
    return peak_bytes(lambda: expert(given, timestep, text))


def trace_decoding(vae: Any, latents: Tensor, rows: int | None) -> int:
    """Peak bytes of decoding on the device; with tiles of so many latent rows and columns, of one of them."""
    part = latents if rows is None or max(latents.shape[3:]) <= rows else latents[..., :rows, :rows]
    return peak_bytes(lambda: vae.decode(part))


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most bytes that tensors made by `work` hold at one time, without gradients."""
    live = _Live()
    with torch.no_grad(), _LeanAttention(), live:
        work()
    return live.peak


class _Live(TorchDispatchMode):
    """Counts the bytes of every storage from the operation that makes it until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self.known.add(tensor.untyped_storage())
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _gone(self, size: int) -> None:
        self.now -= size


class _LeanAttention(TorchFunctionMode):
    """Attention that makes its result and nothing else: without values torch would trace the plain formula."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, value = args[0], args[2]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.nbytes for parameter in parameters)


def _blocks(module: nn.Module) -> list[int]:
    return [_bytes(block.parameters()) for block in blocks_of(module)]


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 or size == 0 else f"{size / 2**20:.2f} MiB"
