"""The sizes of what is measured: those of the published models, or small ones of the same kind for a CPU."""

from __future__ import annotations

from typing import Any

from wantrain.geometry import Bucket, latent_shape

#: Pixels of the clips that are timed: one second and the whole five of 480p; small ones for a CPU.
CLIPS = {"17 frames": Bucket(17, 480, 832), "81 frames": Bucket(81, 480, 832)}
SMALL_CLIPS = {"17 frames": Bucket(5, 32, 64), "81 frames": Bucket(9, 32, 64)}
#: The 5B's own clip.
CLIPS_5B = {"121 frames": Bucket(121, 704, 1280)}
SMALL_CLIPS_5B = {"121 frames": Bucket(9, 64, 64)}
#: On which both sides' VAEs are held against each other.
AGREEMENT = Bucket(9, 64, 64)
#: From 7,800 to 75,600 tokens of an A14B expert.
SCALE = (
    Bucket(17, 480, 832), Bucket(41, 480, 832), Bucket(81, 480, 832), Bucket(121, 480, 832), Bucket(81, 720, 1280),
)  # fmt: skip
SMALL_SCALE = tuple(Bucket(frames, 32, 64) for frames in (1, 5, 9, 13, 17))

A14B: dict[str, Any] = {
    "num_attention_heads": 40, "attention_head_dim": 128, "text_dim": 4096, "ffn_dim": 13824, "num_layers": 40,
}  # fmt: skip
TI2V_5B: dict[str, Any] = {
    **A14B, "num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48, "num_layers": 30,
}  # fmt: skip
TRANSFORMERS = {"a14b": A14B, "5b": TI2V_5B}
SMALL_TRANSFORMER = {"num_attention_heads": 2, "attention_head_dim": 32, "text_dim": 32, "ffn_dim": 128}

VAES: dict[str, dict[str, Any]] = {
    "vae_2_1": {"base_dim": 96, "z_dim": 16},
    "vae_2_2": {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "patch_size": 2},
}
#: Not narrower: a norm over a few channels of random values makes rounding large.
SMALL_VAES = {
    "vae_2_1": {**VAES["vae_2_1"], "base_dim": 16},
    "vae_2_2": {**VAES["vae_2_2"], "base_dim": 16, "decoder_base_dim": 32},
}

UMT5_XXL: dict[str, Any] = {
    "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu", "is_encoder_decoder": False, "use_cache": False, "tie_word_embeddings": False,
}  # fmt: skip
SMALL_UMT5 = {**UMT5_XXL, "vocab_size": 1024, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}

#: Rows of a text of usual length; one more stands for the padding (see WanTransformer).
TEXT_ROWS = 120
#: Rank of the LoRA that is timed.
RANK = 32


def clips(small: bool, model: str = "a14b") -> dict[str, Bucket]:
    """The clips that are timed."""
    if model == "5b":
        return SMALL_CLIPS_5B if small else CLIPS_5B
    return SMALL_CLIPS if small else CLIPS


def scale(small: bool) -> tuple[Bucket, ...]:
    """Clips of more and more tokens."""
    return SMALL_SCALE if small else SCALE


def transformer(small: bool, layers: int | None = None, model: str = "a14b") -> dict[str, Any]:
    """Keywords of a model's transformer with so many blocks; None: all of them, of a small one four."""
    own = {**TRANSFORMERS[model], **(SMALL_TRANSFORMER | {"num_layers": 4} if small else {})}
    return own if layers is None else {**own, "num_layers": layers}


def latents(bucket: Bucket, model: str = "a14b") -> tuple[int, ...]:
    """Shape of one clip's latents: of the 4x8x8 VAE, or of the 5B's 4x16x16."""
    return (1, 48, *latent_shape(bucket, 4, 16)) if model == "5b" else (1, 16, *latent_shape(bucket, 4, 8))
