"""The Wan2.2 networks: transformer, VAE, text encoder. Single-device code; machinery reads what they declare."""

from wantrain.models.formats.base import Base, open_base
from wantrain.models.formats.loading import load_text_encoder, load_transformer, load_vae
from wantrain.models.text import TextEncoder
from wantrain.models.transformer import WanTransformer
from wantrain.models.vae import WanVAE

__all__ = [
    "Base",
    "TextEncoder",
    "WanTransformer",
    "WanVAE",
    "load_text_encoder",
    "load_transformer",
    "load_vae",
    "open_base",
]
