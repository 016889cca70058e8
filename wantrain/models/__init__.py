"""The Wan2.2 networks: transformer, VAE, text encoder. Single-device code; machinery reads what they declare."""

from wantrain.models.text import TextEncoder, load_text_encoder
from wantrain.models.transformer import WanTransformer, load_transformer
from wantrain.models.vae import WanVAE, load_vae

__all__ = [
    "TextEncoder",
    "WanTransformer",
    "WanVAE",
    "load_text_encoder",
    "load_transformer",
    "load_vae",
]
