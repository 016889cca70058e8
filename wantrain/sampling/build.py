"""A sampler over the experts that were found, and what is encoded before they are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from wantrain import geometry
from wantrain.models import Base, WanTransformer
from wantrain.models.formats.weights import read_tensors
from wantrain.runs.experts import Found, add_loras, check_loras
from wantrain.sampling import ExpertOffloader, Experts, Sampler, Tiled
from wantrain.sampling.generate import Velocity
from wantrain.util.console import say
from wantrain.util.progress import report_progress

#: Bytes that encoding a text takes on a GPU beside the encoder's weights: activations of 512 tokens, and workspaces.
ENCODING = 1 << 30


def build_sampler(
    models: Mapping[str, Velocity],
    *,
    boundary: float | None,
    base: Base,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tile: int | None = None,
    way: str | None = None,
    texts: Mapping[str, Tensor] | None = None,
) -> Sampler:
    """A Sampler over given experts, with VAE (always float32) and text encoder from the base.

    `texts` are embeddings that are there already; the text encoder is loaded for others alone (see `encode_texts`).
    `tile` is the side in pixels of the squares that are decoded one by one; None decodes whole frames. `way` is how the
    experts are told what is known (conditioning.py). ValueError for a tile that the VAE cannot take.
    """
    vae = base.vae(device=device)
    decode: Callable[[Tensor], Tensor] = vae.decode
    if tile is not None:
        geometry.check_size(tile, tile, vae.spatial_stride, key=f"tile={tile}")
        decode = Tiled(vae.decode, tile // vae.spatial_stride)

    return Sampler(
        Experts(models, boundary),
        lambda fresh: [*encode_texts(base, fresh, device=device, dtype=dtype).values()],
        decode,
        vae.z_dim,
        vae.temporal_stride,
        vae.spatial_stride,
        device,
        way,
        lambda pixels: vae.encode(pixels.to(device)),
        dict(texts or {}),
    )


def encode_texts(
    base: Base, texts: Iterable[str], *, device: torch.device | str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Embeddings (L, D) of each text, on the host, by the base's text encoder, which is loaded for it and let go after.

    It goes to `device`, or where that has no room to the host, which is said: so texts are best encoded before experts
    are loaded. One text after the other, so that its embedding does not depend on the others' lengths.
    """
    texts, where = list(dict.fromkeys(texts)), _place_for_encoder(base, torch.device(device), dtype)
    encoder, embeddings = base.text_encoder(device=where, dtype=dtype), dict[str, Tensor]()
    for number, text in enumerate(texts, 1):
        report_progress(f"encoding text {number} of {len(texts)}")
        embeddings[text] = encoder.encode_unpadded([text])[0].cpu()
    del encoder
    if where.type == "cuda":
        torch.cuda.empty_cache()  # for the experts
    return embeddings


def _place_for_encoder(base: Base, device: torch.device, dtype: torch.dtype) -> torch.device:
    """The device, if it is no GPU or the text encoder fits into what is free there; else the host."""
    if device.type != "cuda":
        return device
    torch.cuda.empty_cache()  # what torch keeps for later counts as taken
    free = torch.cuda.mem_get_info(device)[0]
    stored = read_tensors(base.need("text_encoder")).values()  # mapped: only sizes are looked at
    needed = sum(tensor.numel() for tensor in stored) * dtype.itemsize + ENCODING
    if needed <= free:
        return device
    say(f"texts are encoded on the CPU: it takes {needed / 1e9:.1f} GB, {device} has {free / 1e9:.1f} GB free")
    return torch.device("cpu")


def house(
    found: Found,
    loras: Mapping[str, str | None],
    model: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    idle: str = "gpu",
    offload: str = "none",
    scale: float = 1.0,
    alpha: float | None = None,
) -> ExpertOffloader:
    """The experts that were found, with LoRA files added, living as `idle` and `offload` say (see ExpertOffloader)."""
    check_loras(loras, found.names)

    def load(name: str, where: torch.device) -> WanTransformer:
        module = found.load(name, device=where, dtype=dtype)
        add_loras({name: module}, {name: loras.get(name)}, model=model, scale=scale, alpha=alpha)
        return module

    return ExpertOffloader(found.names, load, device, idle=idle, offload=offload)
