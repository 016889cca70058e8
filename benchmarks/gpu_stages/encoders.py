"""The networks around the transformer at their published sizes, with random weights: both VAEs beside diffusers', and
umT5-xxl's encoder on texts of usual lengths beside the same padded to 512 tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import peers
import text as texts
import torch
from torch import Tensor, nn

from gpu_stages import sizes
from gpu_stages.context import Context, random_weights
from gpu_stages.pairs import CLOSE, Side, bf16_error, in_turn, in_words, theirs_missing
from wantrain.geometry import Bucket, latent_shape
from wantrain.models import WanVAE
from wantrain.models.precision import computing_in
from wantrain.util import libraries

#: Goal for ours over AutoencoderKLWan, encoding.
ENCODE = 0.6
#: What is timed: part, clip, precision. encode.py encodes in float32 without TF32 unless vae_precision=bf16, sample.py
#: decodes as torch has it, with TF32 in convolutions.
CASES = (
    ("encode", "17 frames", "fp32"),
    ("encode", "81 frames", "bf16"),
    ("decode", "17 frames", "tf32"),
    ("decode", "81 frames", "bf16"),
)


def vae_2_1(context: Context) -> dict[str, Any]:
    """Wan-VAE 2.1 (of the A14B pair): encode, and decode."""
    return _vae(context, "vae_2_1")


def vae_2_2(context: Context) -> dict[str, Any]:
    """Wan-VAE 2.2 (of the 5B): encode, and decode."""
    return _vae(context, "vae_2_2")


@torch.inference_mode()
def _vae(context: Context, name: str) -> dict[str, Any]:
    kind = (sizes.SMALL_VAES if context.small else sizes.VAES)[name]
    vae: Any = random_weights(functools.partial(WanVAE, **kind), context.device, torch.float32).eval()
    sides = {"ours": vae} if theirs_missing(context) else {"ours": vae, "diffusers": peers.vae(vae)}
    errors = {} if len(sides) == 1 else _agreement(context, vae, sides["diffusers"])
    for part, clip, precision in CASES:
        values = _input(context, vae, part, sizes.clips(context.small)[clip])
        calls = {side: Side(_in(context, precision, CALLS[side, part], own, values)) for side, own in sides.items()}
        goal = ENCODE if part == "encode" else None
        wanted = {what: error for what, error in errors.items() if what.startswith(part)}
        case = in_turn(context, calls, pairs=1 if context.small else 2, at_most=goal, errors=wanted)
        context.compare(f"{name}, {part}, {clip}, {precision}", case)
    return {"in_words": in_words(context)}


#: How each side encodes to normalised latents and decodes them.
CALLS: dict[tuple[str, str], Callable[[Any, Tensor], Tensor]] = {
    ("ours", "encode"): lambda vae, pixels: vae.encode(pixels),
    ("ours", "decode"): lambda vae, latents: vae.decode(latents),
    ("diffusers", "encode"): peers.encoded,
    ("diffusers", "decode"): peers.decoded,
}


def _input(context: Context, vae: WanVAE, part: str, bucket: Bucket) -> Tensor:
    """Pixels, or latents, of one clip."""
    if part == "encode":
        return torch.rand(1, 3, *vars(bucket).values(), device=context.device) * 2 - 1
    shape = latent_shape(bucket, vae.temporal_stride, vae.spatial_stride)
    return torch.randn(1, vae.z_dim, *shape, device=context.device)


def _in(
    context: Context, precision: str, call: Callable[[Any, Tensor], Tensor], vae: Any, values: Tensor
) -> Callable[[], Tensor]:
    """A call in a precision: fp32 without TF32, bf16 by autocast, tf32 as torch has it by default."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}

    def run() -> Tensor:
        around: AbstractContextManager[Any] = nullcontext()
        if precision in dtypes:
            around = computing_in(dtypes[precision], context.device)
        with around:
            return call(vae, values)

    return run


def _agreement(context: Context, ours: WanVAE, theirs: nn.Module) -> dict[str, tuple[float, float]]:
    """How far apart both sides are, and may be: in float32, and each in bf16 from diffusers' float32."""
    found, bucket = {}, sizes.AGREEMENT
    for part in ("encode", "decode"):
        values = _input(context, ours, part, bucket)
        results = {
            (side, precision): {part: _in(context, precision, CALLS[side, part], vae, values)().float()}
            for side, vae in (("ours", ours), ("diffusers", theirs))
            for precision in ("fp32", "bf16")
        }
        exact = results["diffusers", "fp32"]
        found[f"{part} in float32"] = (peers.apart(results["ours", "fp32"], exact)[0], CLOSE)
        found[f"{part} in bf16"] = bf16_error(results["ours", "bf16"], results["diffusers", "bf16"], exact)
    return found


@torch.inference_mode()
def text(context: Context) -> dict[str, Any]:
    """umT5-xxl's encoder in bf16: as encode.py batches texts, beside batches padded to 512 tokens."""
    with libraries.importing():
        from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(**(sizes.SMALL_UMT5 if context.small else sizes.UMT5_XXL))

    def build() -> nn.Module:
        model = UMT5EncoderModel(config)
        del model.encoder.embed_tokens  # the same matrix under a second name
        return model

    model: Any = random_weights(build, context.device, torch.bfloat16).eval()
    model.set_input_embeddings(model.shared)
    captions = texts.captions(8 if context.small else 64)
    runs, errors = texts.sides(model, captions)
    context.note(captions=len(captions), tokens=texts.lengths(captions))
    case = in_turn(context, {name: Side(run) for name, run in runs.items()}, pairs=3, errors=errors)
    context.compare(f"{len(captions)} texts", case)
    return {"in_words": in_words(context)}
