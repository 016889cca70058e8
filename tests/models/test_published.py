"""The published models at full size, on the meta device: names, shapes and counts, without their gigabytes."""

import re

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from wantrain import config
from wantrain.models import WanTransformer
from wantrain.models.formats import names
from wantrain.models.formats.loading import VARIANTS
from wantrain.models.formats.pipeline import official_config

#: Parameters and tensors of one transformer, and of its VAE, as published.
PUBLISHED = {
    "t2v_a14b": (14_288_491_584, 1095, 126_892_531),
    "i2v_a14b": (14_288_901_184, 1095, 126_892_531),
    "ti2v_5b": (4_999_787_712, 825, 704_688_668),
    "t2v_14b": (14_288_491_584, 1095, 126_892_531),
    "t2v_1_3b": (1_418_996_800, 825, 126_892_531),
}


def composed(name):
    return config.compose("train", [f"model={name}", f"expert={'dense' if 'a14b' not in name else 'low_noise'}"]).model


def built(name, part="transformer"):
    with torch.device("meta"):
        return config.build(composed(name)[part])


def shapes(state):
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def official_names(layers):
    """Every name of a text-to-video transformer, as Wan's own checkpoints have them."""
    both = ("weight", "bias")
    inside = [
        f"{attention}.{layer}.{end}" for attention in ("self_attn", "cross_attn") for layer in "qkvo" for end in both
    ]
    inside += [f"{attention}.norm_{letter}.weight" for attention in ("self_attn", "cross_attn") for letter in "qk"]
    inside += [f"{layer}.{end}" for layer in ("norm3", "ffn.0", "ffn.2") for end in both] + ["modulation"]
    outside = ["patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"]
    outside += ["time_projection.1", "head.head"]
    top = [f"{layer}.{end}" for layer in outside for end in both] + ["head.modulation"]
    return {*top, *(f"blocks.{block}.{name}" for block in range(layers) for name in inside)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformer_names_and_shapes(name):
    """The transformer has the names and shapes of the published one, in the official naming and in diffusers'."""
    ours = built(name)
    parameters, tensors, _ = PUBLISHED[name]
    state = ours.state_dict()
    assert sum(parameter.numel() for parameter in ours.parameters()) == parameters
    assert len(state) == tensors and state.keys() == official_names(len(ours.blocks))
    with torch.device("meta"):
        theirs = WanTransformer3DModel.from_config({k: v for k, v in ours.config().items() if not k.startswith("_")})
    assert shapes({names.to_diffusers(key): tensor for key, tensor in state.items()}) == shapes(theirs.state_dict())
    assert ours.config().items() <= {**theirs.config, "_class_name": "WanTransformer3DModel"}.items()


@pytest.mark.parametrize("name", PUBLISHED)
def test_vae_shapes_and_statistics(name):
    """The VAE has the shapes, counts and latent statistics of the published one."""
    vae = built(name, "vae")
    assert sum(parameter.numel() for parameter in vae.parameters()) == PUBLISHED[name][2]
    with torch.device("meta"):
        theirs = AutoencoderKLWan.from_config({k: v for k, v in vae.config().items() if not k.startswith("_")})
    assert shapes(vae.state_dict()) == shapes(theirs.state_dict())
    assert list(theirs.config.latents_mean) == list(vae.latents_mean) and list(theirs.config.latents_std) == list(
        vae.latents_std
    )
    assert composed(name).multiple == vae.spatial_stride * 2


def test_text_encoder_sizes():
    """The sizes that are read from the weights of umT5-XXL equal its published config."""
    from transformers import UMT5Config, UMT5EncoderModel

    from wantrain.models.formats.loading import _text_sizes

    config = UMT5Config(
        vocab_size=256384,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        theirs = UMT5EncoderModel(config)
    state = {key: tensor for key, tensor in theirs.state_dict().items() if "embed_tokens" not in key}
    assert sum(tensor.numel() for tensor in state.values()) == 5_680_910_336 and len(state) == 242
    found = _text_sizes(state, "a single file")
    wanted = config.to_dict()
    assert {
        key: wanted[key]
        for key in found
        if key in wanted and key not in {"use_cache", "tie_word_embeddings", "is_encoder_decoder", "layer_norm_epsilon"}
    } == {
        key: found[key]
        for key in found
        if key in wanted and key not in {"use_cache", "tie_word_embeddings", "is_encoder_decoder", "layer_norm_epsilon"}
    }
    blocks = [f"blocks.{i}.{part}.weight" for i in range(24) for part in (
        "norm1", "norm2", "attn.q", "attn.k", "attn.v", "attn.o", "pos_embedding.embedding", "ffn.gate.0", "ffn.fc1", "ffn.fc2"
    )]  # fmt: skip
    official = ["token_embedding.weight", "norm.weight", *blocks]
    assert {names.renamed(key, names.TEXT_TO_TRANSFORMERS) for key in official} == state.keys()


def test_variants_name_models():
    """The table of variants names every published model."""
    for name in PUBLISHED:
        sizes = composed(name).transformer
        width = sizes.num_attention_heads * sizes.attention_head_dim
        assert name in re.findall(r"\w+", VARIANTS[width, sizes.in_channels])


@pytest.mark.parametrize(
    ("name", "kind"), {"t2v_a14b": "t2v", "i2v_a14b": "i2v", "ti2v_5b": "ti2v", "t2v_1_3b": "t2v"}.items()
)
def test_official_config_model_type(name, kind):
    """The official config names the model type of each published model."""
    written = official_config(built(name), composed(name).conditioning)
    assert (written["model_type"], written["text_len"]) == (kind, 512)
    assert written["dim"] == written["num_heads"] * 128


def test_sampling_settings():
    """The sampling settings of the published models equal the authors'."""
    pair = composed("t2v_a14b")
    assert (pair.shift, pair.boundary, pair.sampling_steps) == (12.0, 0.875, 40)
    assert (pair.guidance.high_noise, pair.guidance.low_noise) == (4.0, 3.0), "official tuples are (low, high)"
    image = composed("i2v_a14b")
    assert (image.shift, image.boundary) == (5.0, 0.9)
    assert {composed(name).num_frames for name in PUBLISHED if name != "ti2v_5b"} == {81}
    assert (composed("ti2v_5b").fps, composed("ti2v_5b").num_frames) == (24, 121)
    assert not isinstance(built("t2v_1_3b"), type(None)) and isinstance(built("t2v_1_3b"), WanTransformer)
