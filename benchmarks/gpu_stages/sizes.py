"""The sizes of what is measured: those of the published models, or small ones of the same kind for a CPU."""

from __future__ import annotations

from typing import Any

from wantrain.geometry import Bucket, latent_shape

#: Pixels of the clips that are timed: one second and the whole five of 480p; small ones for a CPU.
CLIPS = {"17 frames": Bucket(17, 480, 832), "81 frames": Bucket(81, 480, 832)}
SMALL_CLIPS = {"17 frames": Bucket(5, 32, 64), "81 frames": Bucket(9, 32, 64)}

A14B: dict[str, Any] = {
    "num_attention_heads": 40, "attention_head_dim": 128, "text_dim": 4096, "ffn_dim": 13824, "num_layers": 40,
}  # fmt: skip
SMALL_TRANSFORMER = {**A14B, "num_attention_heads": 2, "attention_head_dim": 32, "text_dim": 32, "ffn_dim": 128}

VAES: dict[str, dict[str, Any]] = {
    "vae_2_1": {"base_dim": 96, "z_dim": 16},
    "vae_2_2": {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "patch_size": 2},
}
SMALL_VAES = {
    "vae_2_1": {**VAES["vae_2_1"], "base_dim": 4},
    "vae_2_2": {**VAES["vae_2_2"], "base_dim": 4, "decoder_base_dim": 8},
}

UMT5_XXL: dict[str, Any] = {
    "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu", "is_encoder_decoder": False, "use_cache": False, "tie_word_embeddings": False,
}  # fmt: skip
SMALL_UMT5 = {**UMT5_XXL, "vocab_size": 512, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}

#: Rows of a text of usual length; one more stands for the padding (see WanTransformer).
TEXT_ROWS = 120
#: Rank of the LoRA that is timed.
RANK = 32


def clips(small: bool) -> dict[str, Bucket]:
    """The clips that are timed."""
    return SMALL_CLIPS if small else CLIPS


def transformer(small: bool, layers: int) -> dict[str, Any]:
    """Keywords of an A14B expert with so many blocks."""
    return {**(SMALL_TRANSFORMER if small else A14B), "num_layers": layers}


def latents(bucket: Bucket, channels: int = 16) -> tuple[int, ...]:
    """Shape of one clip's latents of the 4x8x8 VAE."""
    return (1, channels, *latent_shape(bucket, 4, 8))
