"""What a command gives to encode_shards: the two encoders, and the options of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wantrain.conditioning import EncodePixels
from wantrain.data.footage.decode_workers import DecodeOptions
from wantrain.data.remote import CACHE
from wantrain.util.distributed import Part

EncodeTexts = Callable[[list[str]], list[Tensor]]


@dataclass(frozen=True)
class Encoders:
    """VAE and text encoder as functions, and what identifies them.

    encode_pixels          pixels (B, 3, F, H, W) in [-1, 1] -> latents (B, C, T, H, W), both on `device`
    encode_texts           captions -> embeddings (L, D), one per caption, without padding
    vae_fingerprint        hash of the VAE's weights
    text_fingerprint       hash of the text encoder's weights
    tokenizer_fingerprint  hash of the tokenizer
    count_tokens           tokens of a caption: those of similar lengths are encoded together
    vae_precision          "fp32" or "bf16", which `encode_pixels` computes in
    device                 where `encode_pixels` computes
    files                  identities of the encoders' files, by part (models/formats/fingerprints.py); train.py uses
                           them to recognise the encoders. They are not part of the settings of a latent folder: other
                           files with the same weights change nothing
    """

    encode_pixels: EncodePixels
    encode_texts: EncodeTexts
    vae_fingerprint: str
    text_fingerprint: str
    tokenizer_fingerprint: str = ""
    count_tokens: Callable[[str], int] = len
    vae_precision: str = "fp32"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    files: Mapping[str, str] = field(default_factory=dict)

    def settings(self) -> dict[str, str]:
        """For a manifest: what latents and texts depend on."""
        # Folders made before the precision could be chosen lack the key; without it they match fp32.
        precision = {} if self.vae_precision == "fp32" else {"vae_precision": self.vae_precision}
        return {
            "vae_fingerprint": self.vae_fingerprint,
            **precision,
            "text_encoder_fingerprint": self.text_fingerprint,
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
        }


@dataclass(frozen=True)
class EncodeOptions:
    """Options of `encode_shards`.

    model              name of the model that clips are encoded for
    fps, num_frames    the model's frame rate and longest clip; shards cut for another model must agree with them
    rejects_limit      largest share of bad clips
    shard_bytes        size at which a tar is full, in bytes
    shard_clips        number of clips at which a tar is full
    loss_mask          store the masks beside clips, as weights of the loss
    batch_pixels       clips of one size are encoded together up to this many pixels of all their frames
    retry              try again the clips that an earlier run rejected
    part               the share of the work that this start makes
    heartbeat_timeout  seconds that rank 0 waits for a heartbeat of another rank
    decode             decoder processes
    cache, cache_gb    folder, and size in 10^9 bytes, of the cache for video shards at a URL
    """

    model: str
    fps: float | None = None
    num_frames: int | None = None
    rejects_limit: float = 0.1
    shard_bytes: int = 512 << 20
    shard_clips: int = 64
    loss_mask: bool = False
    batch_pixels: int = 1 << 20
    retry: bool = False
    part: Part = field(default_factory=Part)
    heartbeat_timeout: float = 1800.0
    decode: DecodeOptions = field(default_factory=DecodeOptions)
    cache: str = CACHE
    cache_gb: float = 100.0
