"""Names of parameters: Wan's official ones, diffusers' and transformers', and the prefixes that files add to them.

In memory the transformer has its official names, the VAE and the text encoder those of diffusers and transformers.
Tensors are equal in all layouts: none is transposed or fused.
Sources: the public implementations' state dicts, verified key for key (docs/numerics.md).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

#: (pattern, replacement); patterns match whole names and the first match counts. Replacing substrings would be wrong:
#: "modulation", "norm2"/"norm3" and "head." collide.
Table = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]

# The two layouts do swap the names norm2 and norm3.
TRANSFORMER_TO_DIFFUSERS: Table = (
    (r"patch_embedding\.(weight|bias)", r"patch_embedding.\1"),
    (r"text_embedding\.0\.(weight|bias)", r"condition_embedder.text_embedder.linear_1.\1"),
    (r"text_embedding\.2\.(weight|bias)", r"condition_embedder.text_embedder.linear_2.\1"),
    (r"time_embedding\.0\.(weight|bias)", r"condition_embedder.time_embedder.linear_1.\1"),
    (r"time_embedding\.2\.(weight|bias)", r"condition_embedder.time_embedder.linear_2.\1"),
    (r"time_projection\.1\.(weight|bias)", r"condition_embedder.time_proj.\1"),
    (r"blocks\.(\d+)\.modulation", r"blocks.\1.scale_shift_table"),
    (r"blocks\.(\d+)\.self_attn\.([qkv])\.(weight|bias)", r"blocks.\1.attn1.to_\2.\3"),
    (r"blocks\.(\d+)\.self_attn\.o\.(weight|bias)", r"blocks.\1.attn1.to_out.0.\2"),
    (r"blocks\.(\d+)\.self_attn\.norm_([qk])\.weight", r"blocks.\1.attn1.norm_\2.weight"),
    (r"blocks\.(\d+)\.norm3\.(weight|bias)", r"blocks.\1.norm2.\2"),
    (r"blocks\.(\d+)\.cross_attn\.([qkv])\.(weight|bias)", r"blocks.\1.attn2.to_\2.\3"),
    (r"blocks\.(\d+)\.cross_attn\.o\.(weight|bias)", r"blocks.\1.attn2.to_out.0.\2"),
    (r"blocks\.(\d+)\.cross_attn\.norm_([qk])\.weight", r"blocks.\1.attn2.norm_\2.weight"),
    (r"blocks\.(\d+)\.ffn\.0\.(weight|bias)", r"blocks.\1.ffn.net.0.proj.\2"),
    (r"blocks\.(\d+)\.ffn\.2\.(weight|bias)", r"blocks.\1.ffn.net.2.\2"),
    (r"head\.modulation", r"scale_shift_table"),
    (r"head\.head\.(weight|bias)", r"proj_out.\1"),
)

_RESIDUAL = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}


def _layer(rest: str) -> str:
    """diffusers' name of a parameter inside a layer of an official VAE; the parts of residual blocks are renamed."""
    for official, name in {**_RESIDUAL, "shortcut": "conv_shortcut"}.items():
        if rest.startswith(official + "."):
            return name + rest[len(official) :]
    return rest


def _flat_upsampler(match: re.Match[str]) -> str:
    """VAE 2.1 numbers the decoder's layers consecutively: three residual blocks and an upsampler per level."""
    level, place = divmod(int(match[1]), 4)
    part = "upsamplers.0" if place == 3 else f"resnets.{place}"
    return f"decoder.up_blocks.{level}.{part}.{_layer(match[2])}"


def _level(side: str, blocks: str, sampler: str) -> Callable[[re.Match[str]], str]:
    """VAE 2.2 nests levels; in each the residual blocks come first, then (where there is one) the resampling."""

    def name(match: re.Match[str]) -> str:
        resamples = match[3].startswith(("resample.", "time_conv."))
        part = sampler if resamples else f"resnets.{match[2]}"
        return f"{side}.{blocks}.{match[1]}.{part}.{_layer(match[3])}"

    return name


VAE_TO_DIFFUSERS: Table = (
    (r"conv1\.(weight|bias)", r"quant_conv.\1"),
    (r"conv2\.(weight|bias)", r"post_quant_conv.\1"),
    (r"(encoder|decoder)\.conv1\.(weight|bias)", r"\1.conv_in.\2"),
    (r"(encoder|decoder)\.head\.0\.gamma", r"\1.norm_out.gamma"),
    (r"(encoder|decoder)\.head\.2\.(weight|bias)", r"\1.conv_out.\2"),
    (r"(encoder|decoder)\.middle\.1\.(.+)", r"\1.mid_block.attentions.0.\2"),
    (
        r"(encoder|decoder)\.middle\.([02])\.(.+)",
        lambda match: f"{match[1]}.mid_block.resnets.{int(match[2]) // 2}.{_layer(match[3])}",
    ),
    (r"encoder\.downsamples\.(\d+)\.downsamples\.(\d+)\.(.+)", _level("encoder", "down_blocks", "downsampler")),
    (r"decoder\.upsamples\.(\d+)\.upsamples\.(\d+)\.(.+)", _level("decoder", "up_blocks", "upsampler")),
    (r"encoder\.downsamples\.(\d+)\.(.+)", lambda match: f"encoder.down_blocks.{match[1]}.{_layer(match[2])}"),
    (r"decoder\.upsamples\.(\d+)\.(.+)", _flat_upsampler),
)

_T5 = r"encoder.block.\1.layer."
TEXT_TO_TRANSFORMERS: Table = (
    (r"token_embedding\.weight", r"shared.weight"),
    (r"blocks\.(\d+)\.norm1\.weight", _T5 + r"0.layer_norm.weight"),
    (r"blocks\.(\d+)\.attn\.([qkvo])\.weight", _T5 + r"0.SelfAttention.\2.weight"),
    (r"blocks\.(\d+)\.pos_embedding\.embedding\.weight", _T5 + r"0.SelfAttention.relative_attention_bias.weight"),
    (r"blocks\.(\d+)\.norm2\.weight", _T5 + r"1.layer_norm.weight"),
    (r"blocks\.(\d+)\.ffn\.gate\.0\.weight", _T5 + r"1.DenseReluDense.wi_0.weight"),
    (r"blocks\.(\d+)\.ffn\.fc1\.weight", _T5 + r"1.DenseReluDense.wi_1.weight"),
    (r"blocks\.(\d+)\.ffn\.fc2\.weight", _T5 + r"1.DenseReluDense.wo.weight"),
    (r"norm\.weight", r"encoder.final_layer_norm.weight"),
)

#: Prefixes of official transformer names in files; the longest that fits is removed.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")


def renamed(key: str, table: Table) -> str | None:
    """The name that `table` gives to `key`; None if no pattern matches."""
    for pattern, replacement in table:
        match = re.fullmatch(pattern, key)
        if match:
            return match.expand(replacement) if isinstance(replacement, str) else replacement(match)
    return None


def to_diffusers(key: str) -> str:
    """The diffusers name of an official transformer parameter. ValueError for a name outside the table."""
    name = renamed(key, TRANSFORMER_TO_DIFFUSERS)
    if name is None:
        raise ValueError(f"{key!r} is not a parameter of a Wan transformer in the official layout")
    return name


def common_prefix(keys: Iterable[str]) -> str:
    """The known prefix that all of `keys` share; empty if there is none."""
    keys = list(keys)
    return next((prefix for prefix in PREFIXES if keys and all(key.startswith(prefix) for key in keys)), "")
