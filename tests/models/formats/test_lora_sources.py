"""LoRA files as the tools write them: peft's folder, diffusers without a prefix, two experts in one, fp8, a CLIP branch."""

import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from wantrain.models import Base
from wantrain.models.formats.inspect import describe
from wantrain.models.formats.lora import merge_lora, read_lora, write_lora
from wantrain.models.formats.lora_dialects import diffusers_module
from wantrain.models.formats.lora_layers import Layer
from wantrain.models.formats.lora_peft import PEFT

RANK, DIM, FFN = 4, 128, 64
NAMES = ("blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.1.self_attn.k")


def lora(seed=0, names=NAMES, alpha=2.0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Layer(torch.randn(RANK, DIM, generator=generator), torch.randn(DIM, RANK, generator=generator), alpha)
        for name in names
    }


def same_change(one, other):
    assert one.keys() == other.keys()
    for name, layer in one.items():
        torch.testing.assert_close(layer.change(), other[name].change())
        assert layer.change().abs().max() > 1e-3


@pytest.fixture
def wan(pair):
    """diffusers' own transformer, with the weights of the low-noise expert."""
    return WanTransformer3DModel.from_pretrained(pair / "transformer_2")


@pytest.fixture
def expert(pair):
    """A fresh low-noise expert, to be changed."""
    return Base(pair).transformer("low_noise")


def assert_merged_as(model, file, ours, **how):
    """The file, merged into our expert, gives the answer that `model` gives with its adapter in."""
    generator = torch.Generator().manual_seed(0)
    question = (torch.randn(1, 16, 2, 4, 6, generator=generator), torch.tensor([731.0]),
                torch.randn(1, 512, 64, generator=generator))  # fmt: skip
    with torch.no_grad():
        before, wanted = ours(*question), model(*question, return_dict=False)[0]
        merge_lora(file, ours, **how)
        torch.testing.assert_close(ours(*question), wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - before).abs().max() > 0.05


#: What peft's users set; every one changes the strength of some layer.
SETTINGS = {
    "alpha": {"r": 4, "lora_alpha": 16},
    "patterns": {"r": 4, "lora_alpha": 2, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_k": 5, "net.2": 9}},
    "rank-stabilised": {"r": 4, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"ffn.net.2": 9}},
    "DoRA": {"r": 4, "lora_alpha": 6, "use_dora": True},
    "gaussian": {"r": 2, "lora_alpha": 3, "init_lora_weights": "gaussian"},
}


def adapted(settings, wan):
    torch.manual_seed(0)
    config = LoraConfig(**{"init_lora_weights": False, "target_modules": ["to_q", "to_k", "net.2"], **settings})
    model = get_peft_model(wan, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter) * 0.2
        elif "magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_peft_folder(settings, wan, expert, tmp_path):
    """peft's folder, and its file with the config beside it, are merged at the strength that the config states."""
    model = adapted(settings, wan)
    model.save_pretrained(tmp_path / "cat_low_noise")
    assert_merged_as(model, tmp_path / "cat_low_noise", expert, expert="low_noise")
    file = tmp_path / "cat_low_noise" / "adapter_model.safetensors"
    same_change(read_lora(file).layers, read_lora(tmp_path / "cat_low_noise").layers)
    with pytest.raises(ValueError, match="was trained for low_noise, not for high_noise"):
        merge_lora(tmp_path / "cat_low_noise", expert, expert="high_noise")
    said = describe(tmp_path / "cat_low_noise")
    assert "dialect   diffusers" in said and "expert    low_noise" in said


def test_peft_without_config(wan, tmp_path, capsys):
    """Without its config beside it the alpha of peft's file is assumed, which is said; a given one is taken."""
    adapted(SETTINGS["alpha"], wan).save_pretrained(tmp_path / "a")
    file = tmp_path / "cat.safetensors"
    (tmp_path / "a" / "adapter_model.safetensors").rename(file)
    assert {layer.alpha for layer in read_lora(file).layers.values()} == {4.0}
    said = capsys.readouterr()
    assert "no adapter_config.json beside it, which holds alpha; alpha = rank is assumed" in said.out + said.err
    assert {layer.alpha for layer in read_lora(file, alpha=16).layers.values()} == {16.0}
    said = capsys.readouterr()
    assert "assumed" not in said.out + said.err


def test_peft_refused(wan, tmp_path):
    """A pickle, another kind of adapter, an initialisation that changed the base, and a damaged config are refused."""
    model, folder = adapted(SETTINGS["alpha"], wan), tmp_path / "a"
    model.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    with pytest.raises(ValueError, match=r"holds its own alpha, 16 for .*; leave out alpha=2"):
        read_lora(folder, alpha=2)
    for more, words in (
        ({"peft_type": "ADALORA"}, "says that it is peft's ADALORA; LORA, LOHA, LOKR are supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4, which also changed the base's weig"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps({**config, **more}))
        with pytest.raises(ValueError, match=words):
            read_lora(folder)
    (folder / "adapter_config.json").write_text("{oops")
    with pytest.raises(ValueError, match=r"adapter_config\.json cannot be read as JSON"):
        read_lora(folder)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    for path in (folder, folder / "adapter_model.bin"):
        with pytest.raises(
            ValueError, match=r"adapter_model\.bin is a pickle, .*may run code .*safe_serialization=True"
        ):
            read_lora(path)


def test_save_lora_adapter(wan, expert, tmp_path):
    """diffusers' save_lora_adapter writes names without a prefix, and peft's config in the header."""
    torch.manual_seed(0)
    wan.add_adapter(LoraConfig(r=4, lora_alpha=9, target_modules=["to_q", "net.2"], rank_pattern={"to_q": 2},
                               alpha_pattern={"net.2": 3}, init_lora_weights=False))  # fmt: skip
    wan.save_lora_adapter(tmp_path)
    (file,) = tmp_path.iterdir()
    assert not any(key.startswith("transformer") for key in load_file(file))
    found = read_lora(file)
    assert found.dialect == "diffusers" and {layer.alpha for layer in found.layers.values()} == {9.0, 3.0}
    assert_merged_as(wan, file, expert)


def both_experts(path, header):
    """One file with a LoRA for each expert, under diffusers' names of its two components."""
    tensors, config = {}, {}
    for prefix, layers, alpha in (("transformer", lora(1), 8.0), ("transformer_2", lora(2), 3.0)):
        for name, layer in layers.items():
            tensors[f"{prefix}.{diffusers_module(name)}.lora_A.weight"] = layer.down
            tensors[f"{prefix}.{diffusers_module(name)}.lora_B.weight"] = layer.up
        config |= {f"{prefix}.r": RANK, f"{prefix}.lora_alpha": alpha}
    save_file(tensors, path, metadata={PEFT: json.dumps(config)} if header else None)
    return path


@pytest.mark.parametrize("header", [True, False])
def test_two_experts_in_one_file(header, expert, tmp_path):
    """A file with a LoRA for each expert gives each its own, at its own strength; inspect shows both."""
    file = both_experts(tmp_path / "cat.safetensors", header)
    for name, seed, alpha in (("high_noise", 1, 8.0), ("low_noise", 2, 3.0)):
        found = read_lora(file, expert=name)
        same_change(found.layers, lora(seed, alpha=alpha if header else RANK))
        assert found.metadata == {"expert": name}
        assert merge_lora(file, expert, expert=name) == 3
    for name in (None, "dense"):
        with pytest.raises(
            ValueError, match=r"a LoRA for each of two experts \(transformer\. and transformer_2\.\); gi"
        ):
            read_lora(file, expert=name)
    said = describe(file)
    assert said.count("kind      LoRA") == 2 and "expert    high_noise" in said and "expert    low_noise" in said


def test_second_expert_alone(expert, tmp_path):
    """A file of transformer_2's names alone is for the low-noise expert."""
    tensors = load_file(both_experts(tmp_path / "cat.safetensors", header=False))
    second = {key: tensor for key, tensor in tensors.items() if key.startswith("transformer_2.")}
    save_file(second, tmp_path / "second.safetensors")
    assert read_lora(tmp_path / "second.safetensors").metadata == {"expert": "low_noise"}
    merge_lora(tmp_path / "second.safetensors", expert, expert="low_noise")
    with pytest.raises(ValueError, match="was trained for low_noise, not for high_noise"):
        merge_lora(tmp_path / "second.safetensors", expert, expert="high_noise")
    save_file(second, tmp_path / "odd.safetensors", metadata={"expert": "high_noise"})
    with pytest.raises(ValueError, match="metadata says high_noise, but the names of its tensors say low_noise"):
        read_lora(tmp_path / "odd.safetensors")
    save_file({**tensors, "stranger": torch.ones(2)}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"holds both experts, .* and stranger, of neither"):
        read_lora(tmp_path / "odd.safetensors", expert="low_noise")


@pytest.mark.parametrize("own", ["official", "diffusers"])
def test_lycoris_plain(own, tmp_path):
    """LyCORIS' names of a plain LoRA are read, on Wan's own model and on diffusers'."""
    tensors = {}
    for name, layer in lora().items():
        key = f"lycoris_{(diffusers_module(name) if own == 'diffusers' else name).replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": layer.down, f"{key}.lora_up.weight": layer.up}
        tensors[f"{key}.alpha"] = torch.tensor(layer.alpha)
    save_file(tensors, tmp_path / "a.safetensors")
    found = read_lora(tmp_path / "a.safetensors")
    assert found.dialect == "lycoris"
    same_change(found.layers, lora())


def comfyui(layers):
    return {
        f"diffusion_model.{name}.{end}.weight": tensor
        for name, layer in layers.items()
        for end, tensor in (("lora_A", layer.down), ("lora_B", layer.up))
    }


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16])
def test_narrow_dtypes(dtype, expert, tmp_path):
    """fp8, fp16 and bf16 tensors are merged with exactly the values they hold, and converted without loss."""
    narrow = {key: tensor.to(dtype) for key, tensor in comfyui(lora()).items()}
    save_file(narrow, tmp_path / "a.safetensors")
    before = {name: expert.get_submodule(name).weight.detach().clone() for name in NAMES}
    merge_lora(tmp_path / "a.safetensors", expert)
    for name in NAMES:
        up, down = (narrow[f"diffusion_model.{name}.lora_{side}.weight"].float() for side in "BA")
        torch.testing.assert_close(expert.get_submodule(name).weight.detach(), before[name] + up @ down)
    found = read_lora(tmp_path / "a.safetensors").layers
    write_lora(tmp_path / "b.safetensors", found, dialect="diffusers")
    same_change(read_lora(tmp_path / "b.safetensors").layers, found)


@pytest.mark.parametrize("end", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("rows", [False, True])
def test_scaled_fp8(end, rows, tmp_path):
    """Scales beside fp8 tensors, one number or one per row, multiply them; one that fits neither is refused."""
    tensors = {}
    for key, tensor in comfyui(lora()).items():
        scale = (tensor.abs().amax(1) if rows else tensor.abs().max()) / 448
        tensors[key] = (tensor / (scale[:, None] if rows else scale)).to(torch.float8_e4m3fn)
        tensors[key.replace("weight", end)] = scale
    save_file({**tensors, "scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    found, wanted = read_lora(tmp_path / "a.safetensors").layers, lora(alpha=RANK)
    for name in NAMES:
        torch.testing.assert_close(found[name].down, wanted[name].down, rtol=0.07, atol=0.01)
        assert found[name].down.dtype == torch.float32
    broken = {**tensors, f"diffusion_model.{NAMES[0]}.lora_A.{end}": torch.ones(3)}
    save_file(broken, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"is \(3,\), not one number or one for each row of"):
        read_lora(tmp_path / "a.safetensors")


def test_quantised_integers(tmp_path):
    """Integers are a quantised format, and refused."""
    save_file({key: tensor.to(torch.int8) for key, tensor in comfyui(lora()).items()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"is torch\.int8, a quantised format; take the bf16 or fp16 file"):
        read_lora(tmp_path / "a.safetensors")


CLIP = {
    "comfyui": ["diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight", "diffusion_model.img_emb.proj.1.diff_b",
                "diffusion_model.blocks.0.cross_attn.norm_k_img.diff", "diffusion_model.blocks.0.cross_attn.v_img.alpha"],
    "diffusers": ["transformer.blocks.0.attn2.add_k_proj.lora_A.weight", "transformer.blocks.0.attn2.norm_added_k.diff",
                  "transformer.condition_embedder.image_embedder.ff.net.2.lora_B.weight"],
    "kohya": ["lora_unet_blocks_0_cross_attn_v_img.lora_down.weight", "lora_unet_img_emb_proj_1.lora_up.weight"],
}  # fmt: skip


@pytest.mark.parametrize("dialect", CLIP)
def test_clip_branch(dialect, expert, tmp_path, capsys):
    """Keys of Wan2.1's CLIP branch are left out, with one line; a file of nothing else is refused."""
    write_lora(tmp_path / "a.safetensors", lora(), dialect=dialect)
    clip = {key: torch.ones(2, 2) for key in CLIP[dialect]}
    save_file({**load_file(tmp_path / "a.safetensors"), **clip}, tmp_path / "b.safetensors")
    assert merge_lora(tmp_path / "b.safetensors", expert) == 3
    said = capsys.readouterr()
    assert f"{len(clip)} tensors of Wan2.1's CLIP image branch are left out" in said.out + said.err
    save_file(clip, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"changes only Wan2\.1's CLIP image branch"):
        read_lora(tmp_path / "b.safetensors")
