"""Building a Sampler: texts are encoded first, then the experts are loaded, then the sampler is put together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wantrain import geometry
from wantrain.models import Base
from wantrain.models.formats.weights import read_tensors
from wantrain.models.offload import OffloadPolicy
from wantrain.runs.experts import ExpertSources
from wantrain.sampling import ExpertOffloader, Experts, Sampler, Tiled
from wantrain.sampling.generate import Velocity
from wantrain.sampling.memory import half_of_vae
from wantrain.sampling.peers import ALONE, Peers
from wantrain.util.console import say
from wantrain.util.progress import report_progress

#: Bytes that encoding a text takes on a GPU besides the encoder's weights: activations of 512 tokens, and workspaces.
ENCODING = 1 << 30


def build_sampler(
    models: Mapping[str, Velocity],
    *,
    boundary: float | None,
    base: Base,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tile: int | None = None,
    conditioning: str = "none",
    peers: Peers = ALONE,
) -> Sampler:
    """A Sampler over given experts, with VAE (always float32) and text encoder from the base.

    The text encoder is loaded for texts alone that are not in the sampler's `texts` by then (see `encode_texts`).
    `tile` is the side in pixels of the squares that are decoded one by one; None decodes whole frames.
    `conditioning` is the experts' conditioning type (wantrain/conditioning.py). `peers` are the processes that make
    each video together. ValueError for a tile that the VAE cannot take.
    """
    vae = base.vae(half=half_of_vae(conditioning), device=device)
    decode: Callable[[Tensor], Tensor] = vae.decode
    if tile is not None:
        geometry.check_size(tile, tile, vae.spatial_stride, key=f"tile={tile}")
        decode = Tiled(vae.decode, tile // vae.spatial_stride, peers)

    return Sampler(
        Experts(models, boundary),
        lambda fresh: [*encode_texts(base, fresh, device=device, dtype=dtype).values()],
        decode,
        vae.z_dim,
        vae.temporal_stride,
        vae.spatial_stride,
        device,
        conditioning,
        lambda pixels: vae.encode(pixels.to(device)),
    )


def encode_texts(
    base: Base, texts: Iterable[str], *, device: torch.device | str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Embeddings (L, D) of each text, on the host. The base's text encoder is loaded for this call alone.

    It is loaded to `device`, or to the host if it does not fit, which is reported: so encode texts before experts are
    loaded. Texts are encoded one by one, so that an embedding does not depend on the lengths of the others.
    """
    texts, where = list(dict.fromkeys(texts)), _encoder_device(base, torch.device(device), dtype)
    encoder, embeddings = base.text_encoder(device=where, dtype=dtype), dict[str, Tensor]()
    for number, text in enumerate(texts, 1):
        report_progress(f"encoding text {number} of {len(texts)}")
        embeddings[text] = encoder.encode_unpadded([text])[0].cpu()
    del encoder
    if where.type == "cuda":
        torch.cuda.empty_cache()  # for the experts
    return embeddings


def _encoder_device(base: Base, device: torch.device, dtype: torch.dtype) -> torch.device:
    """The device, if it is no GPU or the text encoder fits into its free memory; else the host."""
    if device.type != "cuda":
        return device
    torch.cuda.empty_cache()  # else what torch's allocator caches would count as used
    free = torch.cuda.mem_get_info(device)[0]
    stored = read_tensors(base.need("text_encoder")).values()  # mapped: no values are read
    needed = sum(tensor.numel() for tensor in stored) * dtype.itemsize + ENCODING
    if needed <= free:
        return device
    say(f"texts are encoded on the CPU: it takes {needed / 1e9:.1f} GB, {device} has {free / 1e9:.1f} GB free")
    return torch.device("cpu")


def load_sampler(
    found: ExpertSources,
    texts: Iterable[str],
    policy: OffloadPolicy = OffloadPolicy(),
    *,
    device: torch.device,
    dtype: torch.dtype,
    peers: Peers = ALONE,
    **facts: Any,
) -> Sampler:
    """A Sampler over experts that were found, their LoRAs merged, offloaded as `policy` says.

    `texts` are encoded first. The processes of `peers` share the experts' tokens, and on one machine the host memory in
    which these wait. `facts` are those of `build_sampler`. ValueError if heads do not divide among the processes.
    """
    embeddings = encode_texts(found.base, texts, device=device, dtype=dtype)

    def load(name: str, to: torch.device) -> nn.Module:
        return peers.split(found.load(name, device=to, dtype=dtype))

    experts = ExpertOffloader(found.names, load, device, policy, peers.node())
    sampler = build_sampler(experts, base=found.base, device=device, dtype=dtype, peers=peers, **facts)
    sampler.texts = embeddings
    return sampler
