"""Loading a transformer, a VAE or a text encoder from a folder or a single file, in any supported key naming.

A folder in the diffusers or the official layout states its sizes in config.json; those of a single file are read off
the tensors' shapes. An unsupported model is recognised by its keys and refused; the error names what to use instead.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wantrain.models.facts import is_fp32
from wantrain.models.formats import fp8, names
from wantrain.models.formats.storing import Source
from wantrain.models.formats.weights import check_keys, load_strict, part_folder, read_config, read_tensors
from wantrain.models.quantize import Format
from wantrain.models.text import TextEncoder, check_dtype, read_tokenizer
from wantrain.models.transformer import WanTransformer
from wantrain.models.vae import Half, WanVAE, vae_keywords
from wantrain.util import libraries

#: Published models by (width, input channels): the option of model= that fits.
VARIANTS = {
    (5120, 16): "t2v_a14b (or Wan2.1's t2v_14b)",
    (5120, 36): "i2v_a14b",
    (3072, 48): "ti2v_5b",
    (1536, 16): "t2v_1_3b",
}
#: Parts of keys that only unsupported models have: what such a file is, and what to use instead.
_FOREIGN = {
    ("img_emb.", "k_img.", "add_k_proj.", "image_embedder."): "Wan2.1's image-to-video with a CLIP branch, which is "
    "not built; Wan2.2's image-to-video needs no CLIP: model=i2v_a14b with its files",
    ("vace_",): "a VACE model, which is not built",
    ("audio_",): "the speech-to-video model, which is not built",
    ("face_adapter.", "motion_encoder."): "the Animate model, which is not built",
}

#: config.json entries that every supported transformer has, and the value each must have.
_FIXED = {
    "patch_size": [1, 2, 2],
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "image_dim": None,
    "added_kv_proj_dim": None,
    "rope_max_seq_len": 1024,
    "pos_embed_seq_len": None,
}
_SIZES = (
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "text_dim",
    "freq_dim",
    "ffn_dim",
    "num_layers",
    "eps",
)
#: The width of one attention head in every published model; no tensor shows it.
HEAD_DIM = 128


def load_transformer(
    path: str | Path,
    *,
    part: str = "transformer",
    like: Mapping[str, Any] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    fp32: Iterable[str] = (),
    stored: Format | None = None,
    mapped: bool = False,
) -> WanTransformer:
    """A transformer from a single file, a part's folder, or a pipeline folder in the diffusers layout.

    part    of a pipeline folder: "transformer" (high noise, or the only one) or "transformer_2" (low noise)
    like    the keywords of the expected transformer; a file of another shape is refused
    fp32    names of parameters that are float32 whatever `dtype` says, besides those that the model declares
    stored  the format in which the linear layers of the blocks are frozen and stored, quantised one at a time. Of an
            fp8 file Format("fp8") keeps the bytes, and None gives the values in `dtype`
    mapped  other weights stay where they are, in mapped files and in their dtypes; `device` and `dtype` have no effect

    ValueError names what is absent, does not fit, or is not supported.
    """
    where = _part(path, part)
    tensors, scales = fp8.split(read_tensors(where), where)
    refuse_foreign(tensors, where)
    prefix = names.common_prefix(tensors)
    tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    sizes = transformer_sizes(where, tensors, like)
    if like is not None:
        check_like(sizes, like, where)
    with torch.device("meta"):
        model = WanTransformer(**sizes)
    official = {names.to_diffusers(key): key for key in model.state_dict()}
    tensors = {official.get(key, key): tensor for key, tensor in tensors.items()}
    check_keys(model, tensors, where)
    own = {key.removeprefix(prefix): scale for key, scale in scales.items()}
    source = Source(where, tensors, {official.get(key, key): scale for key, scale in own.items()}, device, dtype)
    source.store(model, stored)
    source.dequantize(model, set(fp32))
    load_strict(model, tensors, where, device=device, dtype=dtype, fp32=fp32, mapped=mapped)
    return model.eval()


def cast_as_loaded(module: nn.Module, dtype: torch.dtype, *, trained: Container[str] = ()) -> nn.Module:
    """Give a module that was built, not loaded, the dtypes that loading gives: `dtype`, but for its float32 parts.

    trained  names of parameters that keep their dtype
    """
    for name, parameter in module.named_parameters():
        if name not in trained and parameter.is_floating_point() and not is_fp32(module, name):
            parameter.data = parameter.data.to(dtype)
    return module


def settled_dtype(module: nn.Module, name: str, parameter: Tensor, frozen: torch.dtype | None) -> torch.dtype:
    """The dtype that a parameter has in training: float32 if it is trained or the module declares it so, else `frozen`
    (None: its own). For weights that were loaded in their file's dtype.
    """
    if frozen is None or not parameter.is_floating_point():
        return parameter.dtype
    return torch.float32 if parameter.requires_grad or is_fp32(module, name) else frozen


def _part(path: str | Path, name: str) -> Path:
    """The file or folder that holds a part."""
    path = Path(path).expanduser()
    return path if path.is_file() else part_folder(path, name)


def refuse_foreign(tensors: Mapping[str, Tensor], where: Path) -> None:
    """Raise ValueError for the weights of a known, unsupported model; it names what to use instead."""
    for parts, what in _FOREIGN.items():
        if key := next((key for key in tensors if any(part in key for part in parts)), None):
            raise ValueError(f"{where} is {what} (it holds {key})")


def transformer_sizes(where: Path, tensors: Mapping[str, Tensor], like: Mapping[str, Any] | None) -> dict[str, Any]:
    """The constructor's keywords, from a folder's config.json in either layout or from the shapes of a single file."""
    shown = _sizes_of_tensors(where, tensors, like)
    if not where.is_dir():
        return shown
    config = read_config(where)
    if "num_heads" in config and "dim" in config:
        return {**shown, **_sizes_of_official(where, config)}
    if config.get("_class_name", "WanTransformer3DModel") != "WanTransformer3DModel":
        raise ValueError(f"{where} holds a {config['_class_name']}, not a Wan transformer")
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise ValueError(
                f"{where}/config.json: {key}={config[key]} is not supported (every Wan2.2 text-to-video, "
                f"image-to-video and 5B model has {value}; Wan2.1's CLIP image branch is not built)"
            )
    absent = [key for key in _SIZES if key not in config]
    if absent:
        raise ValueError(f"{where}/config.json lacks {', '.join(absent)}")
    return {key: config[key] for key in _SIZES}


def _sizes_of_official(where: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords from the official config.json, which holds only what differs between models."""
    wanted = ("num_heads", "dim", "in_dim", "out_dim", "freq_dim", "ffn_dim", "num_layers")
    absent = [key for key in wanted if key not in config]
    if absent:
        raise ValueError(f"{where}/config.json lacks {', '.join(absent)}")
    heads, dim, in_channels, out_channels, freq_dim, ffn_dim, num_layers = (config[key] for key in wanted)
    return {
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "freq_dim": freq_dim,
        "ffn_dim": ffn_dim,
        "num_layers": num_layers,
        "eps": config.get("eps", 1e-6),
    }


def _sizes_of_tensors(where: Path, tensors: Mapping[str, Tensor], like: Mapping[str, Any] | None) -> dict[str, Any]:
    """Keywords from shapes, in either naming; the head width is that of `like`, or of every published model."""

    def shape(official: str) -> torch.Size:
        tensor = tensors.get(official, tensors.get(names.to_diffusers(official)))
        if tensor is None:
            raise ValueError(
                f"{where} lacks {official} (in diffusers {names.to_diffusers(official)}): it is no complete Wan "
                f"transformer; its first names are {', '.join(sorted(tensors)[:3])}"
            )
        return tensor.shape

    dim, in_channels = shape("patch_embedding.weight")[:2]
    head_dim = (like or {}).get("attention_head_dim", HEAD_DIM)
    blocks = {int(key.split(".")[1]) for key in tensors if key.startswith("blocks.")}
    return {
        "num_attention_heads": dim // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": in_channels,
        "out_channels": shape("head.head.weight")[0] // 4,
        "text_dim": shape("text_embedding.0.weight")[1],
        "freq_dim": shape("time_embedding.0.weight")[1],
        "ffn_dim": shape("blocks.0.ffn.0.weight")[0],
        "num_layers": len(blocks),
        "eps": (like or {}).get("eps", 1e-6),
    }


def check_like(sizes: Mapping[str, Any], like: Mapping[str, Any], where: Path) -> None:
    """Raise ValueError if a transformer has other sizes than the chosen model's, naming the model that would fit."""
    differing = [f"{key} {sizes[key]} against {like[key]}" for key in _SIZES if key in like and sizes[key] != like[key]]
    if differing:
        width = sizes["num_attention_heads"] * sizes["attention_head_dim"]
        fitting = VARIANTS.get((width, sizes["in_channels"]))
        fix = f"it fits model={fitting}" if fitting else "choose model= to match"
        raise ValueError(
            f"{where} holds a transformer of another shape than the chosen model ({', '.join(differing)}); {fix}"
        )


def load_vae(
    path: str | Path,
    *,
    half: Half | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> WanVAE:
    """A Wan-VAE 2.1 or 2.2 from a single file, its folder, or a pipeline folder in the diffusers layout; frozen.

    `half` loads the encoder's or the decoder's weights alone. For a single file the published latent statistics are
    assumed. ValueError names what is absent or does not fit, and refuses other VAEs.
    """
    where = _part(path, "vae")
    tensors = read_tensors(where)
    if where.is_dir():
        keywords = vae_keywords(read_config(where), where)
    else:
        if "encoder.conv1.weight" in tensors:
            tensors = _all_renamed(tensors, names.VAE_TO_DIFFUSERS, where)
        keywords = _vae_sizes(tensors, where)
    with torch.device("meta"):
        vae = WanVAE(**keywords)
    if half is not None:
        check_keys(vae, tensors, where)
        vae.keep_only(half)
        tensors = {key: tensors[key] for key in vae.state_dict()}
    load_strict(vae, tensors, where, device=device, dtype=dtype)
    return vae.eval().requires_grad_(False)


def _all_renamed(tensors: Mapping[str, Tensor], table: names.Table, where: Path) -> dict[str, Tensor]:
    """Every tensor under the name that `table` gives it, or its own where it has no entry (loading refuses those)."""
    return {names.renamed(key, table) or key: tensor for key, tensor in tensors.items()}


def _vae_sizes(tensors: Mapping[str, Tensor], where: Path) -> dict[str, Any]:
    """The constructor's keywords from the shapes of a single file."""
    ups = sorted({int(key.split(".")[2]) for key in tensors if key.startswith("decoder.up_blocks.")})
    needed = ("encoder.conv_in.weight", "decoder.conv_out.weight", "post_quant_conv.weight")
    absent = [key for key in needed if key not in tensors]
    if absent or not ups:
        raise ValueError(f"{where} is no Wan-VAE: it lacks {', '.join(absent) or 'decoder.up_blocks'}")
    residual = any(".upsampler." in key for key in tensors)
    base_dim, decoder_dim = tensors["encoder.conv_in.weight"].shape[0], tensors["decoder.conv_out.weight"].shape[1]
    widths = [tensors[f"decoder.up_blocks.{level}.resnets.0.conv1.weight"].shape[0] for level in ups]
    sampler = "upsampler" if residual else "upsamplers.0"
    blocks = sum(key.startswith("decoder.up_blocks.0.resnets.") and key.endswith("conv1.bias") for key in tensors)
    shape = {
        "base_dim": base_dim,
        "z_dim": tensors["post_quant_conv.weight"].shape[0],
        "dim_mult": [width // decoder_dim for width in reversed(widths)],
        "num_res_blocks": blocks - 1,
        "temperal_downsample": [
            f"decoder.up_blocks.{level}.{sampler}.time_conv.weight" in tensors for level in reversed(ups[:-1])
        ],
    }
    if residual:
        shape |= {"is_residual": True, "decoder_base_dim": decoder_dim, "patch_size": 2}
    return shape


def load_text_encoder(
    path: str | Path,
    *,
    tokenizer: Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TextEncoder:
    """The umT5 encoder of a pipeline folder in the diffusers layout, its text_encoder/ sub-folder, or a single file
    (the official .pth, ComfyUI's safetensors); frozen.

    `tokenizer` is a folder with tokenizer.json; by default tokenizer/ beside text_encoder/. ValueError names what is
    absent or does not fit, and refuses float16.
    """
    with libraries.importing():  # slow, and needed only where prompts are encoded
        from transformers import UMT5Config, UMT5EncoderModel

    check_dtype(dtype)
    where = _part(path, "text_encoder")
    # Some files hold the embedding under both of its names; ComfyUI's also hold the tokenizer.
    spare = {"encoder.embed_tokens.weight", "spiece_model"}
    tensors = {key: tensor for key, tensor in read_tensors(where).items() if key not in spare}
    if fp8.is_fp8(tensors):
        raise ValueError(f"{where} is a text encoder in fp8; take the fp16 or bf16 file of the same model")
    if where.is_dir():
        config = read_config(where)
        if config.get("model_type") != "umt5":
            stated = config.get("model_type", "model without model_type")
            raise ValueError(f"{where} holds a {stated}, not a umT5 encoder")
    else:
        if "token_embedding.weight" in tensors:
            tensors = _all_renamed(tensors, names.TEXT_TO_TRANSFORMERS, where)
        config = _text_sizes(tensors, where)
    reader = read_tokenizer(tokenizer or where.parent / "tokenizer")
    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config.from_dict(config))
    del model.encoder.embed_tokens
    load_strict(model, tensors, where, device=device, dtype=dtype)
    model.set_input_embeddings(model.shared)
    return TextEncoder(model, reader)


def _text_sizes(tensors: Mapping[str, Tensor], where: Path) -> dict[str, Any]:
    """The config of a umT5 encoder from its shapes; the rest is the same in every umT5."""
    first = "encoder.block.0.layer."
    needed = {
        "embedding": "shared.weight",
        "bias": f"{first}0.SelfAttention.relative_attention_bias.weight",
        "q": f"{first}0.SelfAttention.q.weight",
        "ffn": f"{first}1.DenseReluDense.wi_0.weight",
    }
    absent = [key for key in needed.values() if key not in tensors]
    if absent:
        raise ValueError(f"{where} is no umT5 encoder: it lacks {', '.join(absent)}")
    shapes = {name: tensors[key].shape for name, key in needed.items()}
    heads = shapes["bias"][1]
    return {
        "model_type": "umt5",
        "vocab_size": shapes["embedding"][0],
        "d_model": shapes["embedding"][1],
        "num_heads": heads,
        "d_kv": shapes["q"][0] // heads,
        "d_ff": shapes["ffn"][0],
        "num_layers": len({key.split(".")[2] for key in tensors if key.startswith("encoder.block.")}),
        "relative_attention_num_buckets": shapes["bias"][0],
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "is_encoder_decoder": False,
        "use_cache": False,
        "tie_word_embeddings": False,
    }
