"""The networks around the transformer at their published sizes, with random weights: both VAEs, and umT5-xxl."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from gpu_stages import sizes
from gpu_stages.context import Context, measure, peak_gb, random_weights, summary
from wantrain.geometry import latent_shape
from wantrain.models import WanVAE
from wantrain.models.precision import computing_in
from wantrain.util import libraries


def vae_2_1(context: Context) -> dict[str, Any]:
    """Wan-VAE 2.1 (of the A14B pair), float32: encode, and decode."""
    return _vae(context, "vae_2_1")


def vae_2_2(context: Context) -> dict[str, Any]:
    """Wan-VAE 2.2 (of the 5B), float32: encode, and decode."""
    return _vae(context, "vae_2_2")


@torch.inference_mode()
def _vae(context: Context, name: str) -> dict[str, Any]:
    kind = (sizes.SMALL_VAES if context.small else sizes.VAES)[name]
    vae: Any = random_weights(functools.partial(WanVAE, **kind), context.device, torch.float32).eval()
    for clip, bucket in sizes.clips(context.small).items():
        pixels = torch.rand(1, 3, *vars(bucket).values(), device=context.device) * 2 - 1
        latents = torch.randn(
            1, vae.z_dim, *latent_shape(bucket, vae.temporal_stride, vae.spatial_stride), device=context.device
        )
        work: dict[str, Callable[[], Any]] = {
            "encode": functools.partial(vae.encode, pixels),
            "decode": functools.partial(vae.decode, latents),
        }
        for part, run in work.items():
            # encode.py encodes without TF32; sample.py decodes as torch has it by default, with TF32 in convolutions.
            with computing_in(torch.float32, context.device) if part == "encode" else nullcontext():
                took = summary(measure(context.device, {part: run}, repeats=2)[part])
            context.note(**{f"{part}, {clip}": {"seconds": took, "peak_gb": peak_gb(context.device)}})
    rows = {key: value["seconds"]["median"] for key, value in context.measured.items() if "seconds" in value}
    return {"in_words": "; ".join(f"{key}: {seconds:.2f} s" for key, seconds in rows.items())}


@torch.inference_mode()
def text(context: Context) -> dict[str, Any]:
    """umT5-xxl's encoder in bf16: one text of 512 tokens, and eight."""
    with libraries.importing():
        from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(**(sizes.SMALL_UMT5 if context.small else sizes.UMT5_XXL))

    def build() -> nn.Module:
        model = UMT5EncoderModel(config)
        del model.encoder.embed_tokens  # the same matrix under a second name
        return model

    model: Any = random_weights(build, context.device, torch.bfloat16).eval()
    model.set_input_embeddings(model.shared)
    for count in (1, 8):
        ids = torch.randint(2, config.vocab_size, (count, 512), device=context.device)
        run = functools.partial(model, input_ids=ids, attention_mask=torch.ones_like(ids))
        took = summary(measure(context.device, {"encode": run}, repeats=3)["encode"])
        context.note(**{f"{count} texts": {"seconds": took, "peak_gb": peak_gb(context.device)}})
    rows = {key: value["seconds"]["median"] for key, value in context.measured.items()}
    return {"in_words": "; ".join(f"{key}: {seconds:.3f} s" for key, seconds in rows.items())}
