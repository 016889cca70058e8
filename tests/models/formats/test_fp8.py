"""Published fp8 files, plain and scaled, as the base of an adapter and of sampling: their own bytes, their own values."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from wantrain import config
from wantrain.models import Base, adapters, load_text_encoder, load_transformer, quantize
from wantrain.models.formats.fp8 import split
from wantrain.models.formats.inspect import describe
from wantrain.training.initialize import Initializer

SIZE = {"num_attention_heads": 4, "attention_head_dim": 32, "in_channels": 16, "text_dim": 64, "ffn_dim": 64}


def answer(model):
    generator = torch.Generator().manual_seed(0)
    latents, text = (torch.randn(shape, generator=generator) for shape in ((1, 16, 2, 4, 6), (1, 7, 64)))
    with torch.no_grad():
        return model(latents, torch.tensor([731.0]), text)


def scaled(tensors, names, *, scale, prefix=""):
    """As ComfyUI's fp8_scaled: each linear weight of a block with one scale, and an empty tensor that marks the file."""
    out = {f"{prefix}scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}
    for key, value in tensors.items():
        if key not in names:
            out[prefix + key] = value.to(torch.float16) if value.ndim == 2 else value
            continue
        factor = value.abs().max() / 448
        out[prefix + key] = (value / factor).to(torch.float8_e4m3fn)
        out[f"{prefix}{key.removesuffix('weight')}{scale}"] = factor
        out[f"{prefix}{key.removesuffix('weight')}scale_input"] = torch.tensor(2.0)
    return out


def plain(tensors, names, coding):
    """Every linear weight and bias of the blocks cast, as tools that know no scales do; the rest stays."""
    biases = {name.replace(".weight", ".bias") for name in names}
    return {key: value.to(coding) if key in names | biases else value for key, value in tensors.items()}


KINDS = {
    "scaled": lambda tensors, names: scaled(tensors, names, scale="scale_weight"),
    "prefixed": lambda tensors, names: scaled(tensors, names, scale="weight_scale", prefix="model.diffusion_model."),
    "e4m3fn": lambda tensors, names: plain(tensors, names, torch.float8_e4m3fn),
    "e5m2": lambda tensors, names: plain(tensors, names, torch.float8_e5m2),
}


@pytest.fixture(scope="module")
def files(pair, tmp_path_factory):
    """Each kind of file, with the values that it stands for by name, computed in float64."""
    model = Base(pair).transformer("low_noise")
    names = {f"{name}.weight" for name in quantize.quantizable(model)}
    folder, found = tmp_path_factory.mktemp("fp8"), {}
    for kind, make in KINDS.items():
        tensors = make(model.state_dict(), names)
        path = folder / f"{kind}_low_noise.safetensors"
        save_file(tensors, path)
        bare = {key.removeprefix("model.diffusion_model."): value for key, value in tensors.items()}
        values = {}
        for key in model.state_dict():
            ends = (key.removesuffix("weight") + end for end in ("scale_weight", "weight_scale"))
            factor = next((bare[end].double() for end in ends if end in bare), 1.0)
            values[key] = (bare[key].double() * factor).float()
        found[kind] = path, bare, values
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_stored_bytes_are_used(files, kind):
    """A base keeps the file's bytes and scales; its values are their product."""
    path, bare, values = files[kind]
    model = load_transformer(path, like=SIZE, stored=quantize.Format("fp8"))
    layers = dict(quantize.quantized_layers(model))
    assert len(layers) == 20
    for name, layer in layers.items():
        assert torch.equal(layer.weight_stored, bare[f"{name}.weight"].view(torch.uint8)), name
        assert torch.allclose(layer.weight, values[f"{name}.weight"], rtol=1e-6, atol=0), name
    for key, value in model.state_dict().items():
        if "weight_" not in key:
            assert torch.equal(value, values[key]), key


@pytest.mark.parametrize("kind", KINDS)
def test_values_for_sampling(files, kind, capsys):
    """Loaded to sample, merge or export it gives the values in the dtype asked for, says so, and answers the same."""
    path, _, values = files[kind]
    model = Base(None, {"low_noise": path}, SIZE).transformer("low_noise")
    said = capsys.readouterr()
    assert "is stored in fp8: its values are used in float32" in said.out + said.err
    for key, value in model.state_dict().items():
        assert torch.allclose(value, values[key], rtol=1e-6, atol=0), key
        assert value.dtype == torch.float32
    assert torch.allclose(
        answer(model), answer(load_transformer(path, like=SIZE, stored=quantize.Format("fp8"))), atol=1e-5
    )
    half = load_transformer(path, like=SIZE, dtype=torch.bfloat16)
    assert half.blocks[0].ffn[0].weight.dtype == torch.bfloat16
    assert half.blocks[0].self_attn.norm_q.weight.dtype == torch.float32
    # The scale is not rounded before the product is.
    wanted = values["blocks.1.ffn.2.weight"].to(torch.bfloat16)
    assert torch.equal(half.blocks[1].ffn[2].weight, wanted)


def start(path, tiny, *given):
    cfg = config.compose("train", [*tiny.train, f"parts.low_noise={path}", "model.transformer.ffn_dim=64", *given])
    own = config.plain(cfg)
    own["model"]["transformer"]["num_layers"] = 2
    base = Base(None, {"low_noise": path}, {**SIZE, "num_layers": 2})
    where = {"base": base, "device": torch.device("cpu"), "dtype": config.dtype(cfg.precision)}
    return Initializer.of(config.network(cfg), own, **where)


def test_start_from_fp8(files, tiny, capsys):
    """A LoRA on an fp8 file implies base.dtype=fp8; another dtype, and training the file's own weights, are refused."""
    path = files["scaled"][0]
    for given in ((), ("base.dtype=fp8",)):
        module = start(path, tiny, "adapter=lora", "adapter.rank=2", *given).trainable().module
        assert adapters.has_adapter(module)
        assert any(quantize.quantized_layers(module))
    said = capsys.readouterr()
    assert "low_noise: the frozen weights of the blocks are stored in fp8" in said.out + said.err
    for asked in ("bf16", "fp32", "int8", "nf4"):
        with pytest.raises(ValueError, match=f"base.dtype={asked}: .*is stored in fp8, and its own bytes are used"):
            start(path, tiny, "adapter=lora", f"base.dtype={asked}").trainable()
    with pytest.raises(ValueError, match=r"base.low_rank=2: .*is stored in fp8, which does not hold what its rounding"):
        start(path, tiny, "adapter=lora", "base.dtype=fp8", "base.low_rank=2").trainable()
    for kind in ("none", "partial"):
        more = ["adapter.tags=[ffn]"] if kind == "partial" else []
        with pytest.raises(ValueError, match=rf"is stored in fp8, and adapter={kind} would train"):
            start(path, tiny, f"adapter={kind}", *more).trainable()


def test_mixed_file(files):
    """A layer that an fp8 file holds in full stays so."""
    path, bare, values = files["e4m3fn"]
    mixed = path.with_name("mixed_low_noise.safetensors")
    save_file({**bare, "blocks.0.ffn.0.weight": values["blocks.0.ffn.0.weight"].to(torch.bfloat16)}, mixed)
    model = load_transformer(mixed, like=SIZE, stored=quantize.Format("fp8"))
    assert len(list(quantize.quantized_layers(model))) == 19
    assert type(model.blocks[0].ffn[0]) is torch.nn.Linear


def statement(text):
    return torch.tensor(list(json.dumps(text).encode()), dtype=torch.uint8)


BAD = {
    "lonely": ({"blocks.0.ffn.9.scale_weight": torch.ones(1)}, "holds a scale for blocks.0.ffn.9.weight and no such"),
    "wide": ({"blocks.0.norm3.scale_weight": torch.ones(1)}, "a scale for blocks.0.norm3.weight and that weight in float32"),
    "blocks": ({"blocks.0.ffn.0.scale_weight": torch.ones(64, 2)}, "the scale of blocks.0.ffn.0.weight is (64, 2); one"),
    "nvfp4": ({"blocks.0.ffn.0.comfy_quant": statement({"format": "nvfp4"})}, "comfy_quant says nvfp4; of the quantised"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_file(files, bad, tmp_path):
    more, words = BAD[bad]
    save_file({**files["scaled"][1], **more}, tmp_path / "low_noise.safetensors")
    with pytest.raises(ValueError, match=re.escape(words)):
        load_transformer(tmp_path / "low_noise.safetensors", like=SIZE, stored=quantize.Format("fp8"))


def test_stated_format(files):
    """A file that states float8 by layer is taken, and what it says for products in fp8 is left out."""
    tensors = {**files["scaled"][1], "blocks.0.ffn.0.comfy_quant": statement({"format": "float8_e4m3fn"})}
    weights, scales = split(tensors, "file")
    assert set(weights) == set(files["scaled"][2])
    assert len(scales) == 20


def test_not_a_number(files, tmp_path):
    tensors = dict(files["scaled"][1])
    tensors["blocks.0.ffn.0.weight"] = torch.full_like(tensors["blocks.0.ffn.0.weight"].float(), torch.nan).to(
        torch.float8_e4m3fn
    )
    save_file(tensors, tmp_path / "low_noise.safetensors")
    with pytest.raises(ValueError, match=r"blocks.0.ffn.0.weight holds NaN or infinity; the file is damaged"):
        load_transformer(tmp_path / "low_noise.safetensors", like=SIZE, stored=quantize.Format("fp8"))


def test_described(files):
    """inspect= describes an fp8 file as the transformer that it is."""
    for kind in KINDS:
        text = describe(files[kind][0])
        assert "kind      transformer" in text
        assert "float8_e" in text
        assert "shape     width 128, 2 blocks" in text


def test_text_encoder_refused(tmp_path):
    save_file({"token_embedding.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}, tmp_path / "t5.safetensors")
    with pytest.raises(ValueError, match=r"is a text encoder in fp8; take the fp16 or bf16 file"):
        load_text_encoder(tmp_path / "t5.safetensors")
