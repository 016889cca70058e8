"""LoHa, LoKr and whole differences: merged as peft and the formulas say, and written; only a LoKr is trained on."""

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from wantrain.models import Base, adapters
from wantrain.models.formats.inspect import describe
from wantrain.models.formats.lora import merge_lora, read_lora, write_lora
from wantrain.models.formats.lora_layers import Difference, Hadamard, Kronecker, Layer
from wantrain.models.formats.weights import read_file

RANK, DIM, FFN = 4, 128, 64
#: The layers that are changed, (out, in).
SIZES = {"blocks.0.self_attn.q": (DIM, DIM), "blocks.1.ffn.0": (FFN, DIM), "blocks.1.ffn.2": (DIM, FFN)}
#: How tools name a layer: ai-toolkit and ComfyUI, musubi-tuner and sd-scripts, LyCORIS on Wan's own model.
PREFIXES = {
    "comfyui": lambda name: f"diffusion_model.{name}",
    "kohya": lambda name: f"lora_unet_{name.replace('.', '_')}",
    "lycoris": lambda name: f"lycoris_{name.replace('.', '_')}",
}


@pytest.fixture
def expert(pair):
    """A fresh low-noise expert, to be changed."""
    return Base(pair).transformer("low_noise")


@pytest.fixture
def random():
    """Random tensors of given shapes, of order one."""
    generator = torch.Generator().manual_seed(5)
    return lambda *shape: torch.randn(*shape, generator=generator)


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_changed(model, before, changes, scale=1.0):
    """Each parameter has moved by its change, and the others not at all."""
    for name, parameter in model.named_parameters():
        wanted = before[name] + scale * changes[name] if name in changes else before[name]
        torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-5, atol=1e-5)
        assert name not in changes or changes[name].abs().max() > 0.01


def loha(random, size):
    out, inputs = size
    return {
        "hada_w1_a": random(out, RANK),
        "hada_w1_b": random(RANK, inputs),
        "hada_w2_a": random(out, RANK),
        "hada_w2_b": random(RANK, inputs),
        "alpha": torch.tensor(2.0),
    }


def lokr(random, size, shape):
    """LyCORIS' layouts of a LoKr with factor 8: the second matrix is factored, both are, or neither (alpha ignored)."""
    out, inputs = size
    first = {"lokr_w1": random(8, 4)}
    if shape == "both":
        first = {"lokr_w1_a": random(8, RANK), "lokr_w1_b": random(RANK, 4)}
    second = {"lokr_w2_a": random(out // 8, RANK), "lokr_w2_b": random(RANK, inputs // 4)}
    if shape == "neither":
        second = {"lokr_w2": random(out // 8, inputs // 4)}
    return {**first, **second, "alpha": torch.tensor(100000.0 if shape == "neither" else 2.0)}


def by_formula(parts):
    """The change of a layer, with the definition of each element."""
    if "hada_w1_a" in parts:
        sums = [torch.einsum("or,ri->oi", parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"]) for n in (1, 2)]
        return sums[0] * sums[1] * (parts["alpha"] / RANK)
    first, second = (
        parts[name] if name in parts else torch.einsum("or,ri->oi", parts[f"{name}_a"], parts[f"{name}_b"])
        for name in ("lokr_w1", "lokr_w2")
    )
    scale = 1.0 if "lokr_w1" in parts and "lokr_w2" in parts else parts["alpha"] / RANK
    # Element (i p + k, j q + l) of a Kronecker product is first(i, j) second(k, l).
    product = torch.einsum("ij,kl->ikjl", first, second)
    return product.reshape(first.shape[0] * second.shape[0], first.shape[1] * second.shape[1]) * scale


def stored(path, layers, named, metadata=None):
    tensors = {f"{named(name)}.{end}": tensor for name, parts in layers.items() for end, tensor in parts.items()}
    save_file(tensors, path, metadata=metadata)
    return path


@pytest.mark.parametrize("dialect", PREFIXES)
@pytest.mark.parametrize("kind", ["loha", "second", "both", "neither"])
def test_factored(kind, dialect, expert, random, tmp_path):
    """A LoHa and each layout of a LoKr is read and merged by its formula, at every scale."""
    made = {name: loha(random, size) if kind == "loha" else lokr(random, size, kind) for name, size in SIZES.items()}
    file, before = stored(tmp_path / "a.safetensors", made, PREFIXES[dialect]), weights(expert)
    found = read_lora(file)
    assert found.dialect == dialect and found.layers.keys() == SIZES.keys()
    assert {type(layer) for layer in found.layers.values()} == {Hadamard if kind == "loha" else Kronecker}
    assert merge_lora(file, expert, scale=0.5) == 3
    assert_changed(expert, before, {f"{name}.weight": by_formula(parts) for name, parts in made.items()}, 0.5)
    said = describe(file)
    assert f"kind      {'LoHa' if kind == 'loha' else 'LoKr'}" in said and f"dialect   {dialect}" in said
    assert ("rank      none" if kind == "neither" else "rank      4") in said


class Part(nn.Module):
    """The changed layers alone, under their official names, for peft to wrap."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"self_attn": nn.ModuleDict()}), nn.ModuleDict()])
        self.blocks[0]["self_attn"]["q"] = nn.Linear(DIM, DIM)
        self.blocks[1]["ffn"] = nn.ModuleList([nn.Linear(DIM, FFN), nn.Identity(), nn.Linear(FFN, DIM)])


CONFIGS = {
    "LoHa": lambda **how: LoHaConfig(r=4, alpha=2, **how),
    "LoHa, patterns": lambda **how: LoHaConfig(r=4, alpha=2, rank_pattern={"q": 3}, alpha_pattern={"ffn.0": 7}, **how),
    "LoKr": lambda **how: LoKrConfig(r=4, alpha=2, decompose_factor=8, **how),
    "LoKr, both": lambda **how: LoKrConfig(r=2, alpha=6, decompose_both=True, decompose_factor=16, **how),
    "LoKr, neither": lambda **how: LoKrConfig(r=64, alpha=32, decompose_factor=8, **how),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_as_peft(config, expert, tmp_path):
    """What peft saves (folder, file with its config beside it) is merged as peft computes it."""
    torch.manual_seed(0)
    model = get_peft_model(Part(), config(target_modules=r".*(q|ffn\.[02])", init_weights=False))
    for name, parameter in model.named_parameters():
        parameter.data *= 4 if ".hada_" in name else 1
    model.save_pretrained(tmp_path / "adapter")
    changes = {
        f"{name}.weight": model.get_submodule(f"base_model.model.{name}").get_delta_weight("default").detach()
        for name in SIZES
    }
    before = weights(expert)
    assert merge_lora(tmp_path / "adapter", expert) == 3
    assert_changed(expert, before, changes)
    found = read_lora(tmp_path / "adapter" / "adapter_model.safetensors").layers
    for name, layer in found.items():
        torch.testing.assert_close(layer.change(), changes[f"{name}.weight"])
    for dialect in ("comfyui", "kohya"):  # a scale that only peft's config has is kept
        write_lora(tmp_path / "again.safetensors", found, dialect=dialect)
        for name, layer in read_lora(tmp_path / "again.safetensors").layers.items():
            torch.testing.assert_close(layer.change(), changes[f"{name}.weight"])


#: Keys of a Lightning file: a LoRA, and whole differences of norms, biases, modulations and the patch embedding.
WHOLE = {
    "blocks.0.self_attn.norm_q.diff": ("blocks.0.self_attn.norm_q.weight", (DIM,)),
    "blocks.1.cross_attn.norm_k.diff": ("blocks.1.cross_attn.norm_k.weight", (DIM,)),
    "blocks.1.norm3.diff": ("blocks.1.norm3.weight", (DIM,)),
    "blocks.1.norm3.diff_b": ("blocks.1.norm3.bias", (DIM,)),
    "blocks.0.self_attn.q.diff_b": ("blocks.0.self_attn.q.bias", (DIM,)),
    "blocks.0.ffn.0.diff": ("blocks.0.ffn.0.weight", (FFN, DIM)),
    "blocks.0.modulation.diff": ("blocks.0.modulation", (1, 6, DIM)),
    "patch_embedding.diff": ("patch_embedding.weight", (DIM, 16, 1, 2, 2)),
    "patch_embedding.diff_b": ("patch_embedding.bias", (DIM,)),
    "text_embedding.0.diff_b": ("text_embedding.0.bias", (DIM,)),
    "time_projection.1.diff": ("time_projection.1.weight", (6 * DIM, DIM)),
    "head.head.diff_b": ("head.head.bias", (64,)),
    "head.modulation.diff": ("head.modulation", (1, 2, DIM)),
}


def lightning(random, path, dialect="comfyui", dtype=torch.float32):
    """A LoRA with whole differences, and what changes."""
    named = PREFIXES[dialect]
    tensors = {f"{named('blocks.0.self_attn.q')}.lora_down.weight": random(RANK, DIM)}
    tensors[f"{named('blocks.0.self_attn.q')}.lora_up.weight"] = random(DIM, RANK)
    tensors[f"{named('blocks.0.self_attn.q')}.alpha"] = torch.tensor(2.0)
    down, up = (tensors[f"{named('blocks.0.self_attn.q')}.lora_{side}.weight"] for side in ("down", "up"))
    changes = {"blocks.0.self_attn.q.weight": 0.5 * up @ down}
    for key, (parameter, shape) in WHOLE.items():
        layer, end = key.rsplit(".", 1)
        changes[parameter] = tensors[f"{named(layer)}.{end}"] = random(*shape)
    save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, path)
    return changes


@pytest.mark.parametrize("dialect", PREFIXES)
def test_whole_differences(dialect, expert, random, tmp_path):
    """Whole differences of weights, norms, biases and modulations are merged with the LoRA beside them."""
    changes, before = lightning(random, tmp_path / "a.safetensors", dialect), weights(expert)
    assert changes.keys() <= before.keys()
    assert merge_lora(tmp_path / "a.safetensors", expert, scale=-2.0) == 14
    assert_changed(expert, before, changes, -2.0)
    assert "kind      LoRA and whole difference" in describe(tmp_path / "a.safetensors")


def test_half_precision_differences(expert, random, tmp_path):
    """Differences stored as fp16 are added in float32."""
    changes, before = lightning(random, tmp_path / "a.safetensors", dtype=torch.float16), weights(expert)
    merge_lora(tmp_path / "a.safetensors", expert)
    wanted = before["blocks.1.norm3.bias"] + changes["blocks.1.norm3.bias"].half().float()
    assert torch.equal(expert.blocks[1].norm3.bias.detach(), wanted)


def test_lycoris_norms(expert, random, tmp_path):
    """LyCORIS' names of the differences of norms are read as well."""
    tensors = {"lycoris_blocks_0_norm3.w_norm": random(DIM), "lycoris_blocks_0_norm3.b_norm": random(DIM)}
    save_file(tensors, tmp_path / "a.safetensors")
    before = weights(expert)
    assert merge_lora(tmp_path / "a.safetensors", expert) == 2
    values = list(tensors.values())
    assert_changed(expert, before, {"blocks.0.norm3.weight": values[0], "blocks.0.norm3.bias": values[1]})
    with pytest.raises(ValueError, match=r"which have no alpha; leave out lora\.alpha="):
        read_lora(tmp_path / "a.safetensors", alpha=2.0)


@pytest.mark.parametrize("dialect", ["comfyui", "kohya"])
def test_written_again(dialect, random, tmp_path):
    """All kinds are converted without loss; diffusers' dialect refuses what it cannot hold, and leaves no file."""
    layers = {
        "blocks.0.self_attn.k": Layer(random(RANK, DIM), random(DIM, RANK), 3.0),
        "blocks.0.self_attn.q": Hadamard(*(random(*shape) for shape in [(DIM, RANK), (RANK, DIM)] * 2), 2.0),
        "blocks.1.ffn.0": Kronecker((random(8, 4),), (random(8, RANK), random(RANK, 32)), 0.75),
        "blocks.1.ffn.2": Kronecker((random(8, 4),), (random(16, 16),), 1.0),
        "blocks.1.norm3": Difference(random(DIM)),
        "blocks.1.self_attn.o.bias": Difference(random(DIM)),
        "head.modulation": Difference(random(1, 2, DIM)),
    }
    write_lora(tmp_path / "a.safetensors", layers, dialect=dialect, metadata={"expert": "low_noise"})
    found = read_lora(tmp_path / "a.safetensors")
    assert found.dialect == dialect and found.layers.keys() == layers.keys()
    for name, layer in layers.items():
        assert type(found.layers[name]) is type(layer)
        assert torch.equal(found.layers[name].change(), layer.change())
        if not isinstance(layer, Layer):
            with pytest.raises(ValueError, match=r"lora\.dialect=diffusers cannot hold a (LoHa|LoKr|whole difference)"):
                write_lora(tmp_path / "b.safetensors", {name: layer}, dialect="diffusers")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_not_trained_on(expert, random, tmp_path):
    """Training does not go on from what can only be merged, and the module stays as it was."""
    lightning(random, tmp_path / "a.safetensors")
    stored(tmp_path / "b.safetensors", {"blocks.0.self_attn.q": loha(random, (DIM, DIM))}, PREFIXES["comfyui"])
    for name, kind in (("a", "whole difference"), ("b", "LoHa")):
        file = tmp_path / f"{name}.safetensors"
        with pytest.raises(
            ValueError, match=rf"{name}\.safetensors changes .* by a {kind}, which is merged but not tra"
        ):
            adapters.inject_lora(expert, read_lora(file), seed=0, where=file)
        with pytest.raises(ValueError, match="merged but not trained on; merge the file into weights"):
            adapters.restore_adapter(file, expert)
    assert not adapters.has_adapter(expert) and all(each.requires_grad for each in expert.blocks[0].ffn[0].parameters())


BROKEN = {
    "hada_w1_b": (None, "has no hada_w1_b; the file is incomplete"),
    "hada_w2_a": (torch.ones(DIM, 3), r"is \(128, 3\) x \(4, 128\), which do not multiply"),
    "hada_w2_b": (torch.ones(RANK, FFN), "two products of .* differ in shape"),
    "hada_t1": (torch.ones(4, 4), "changes a convolution"),
    "lokr_w1": (torch.ones(4, 4), "is a LoHa and a LoKr at once"),
    "dora_scale": (torch.ones(DIM, 1), "is a LoHa or LoKr with a DoRA's magnitudes"),
    "alpha": (torch.tensor(float("nan")), "alpha is not one finite number"),
    "lora_A.weight": (torch.ones(RANK, DIM), "has no lora_B"),
}


@pytest.mark.parametrize(("end", "value", "words"), [(end, *rest) for end, rest in BROKEN.items()])
def test_broken_loha(end, value, words, random, tmp_path):
    """An incomplete or contradictory LoHa is refused."""
    parts = {**loha(random, (DIM, DIM)), end: value}
    parts = {key: tensor for key, tensor in parts.items() if tensor is not None}
    file = stored(tmp_path / "a.safetensors", {"blocks.0.self_attn.q": parts}, PREFIXES["comfyui"])
    with pytest.raises(ValueError, match=words):
        read_lora(file)


def test_broken_lokr(expert, random, tmp_path):
    """A LoKr that is whole and factored, of two ranks, of another size or with infinities is refused."""

    def refused(words, size=(DIM, DIM), **more):
        parts = {**lokr(random, size, "both"), **more}
        file = stored(tmp_path / "a.safetensors", {"blocks.0.self_attn.q": parts}, PREFIXES["comfyui"])
        with pytest.raises(ValueError, match=words):
            merge_lora(file, expert)

    before = weights(expert)
    refused("lokr_w1 twice, whole and as a product", lokr_w1=random(8, 4))
    refused("has two ranks, 3 and 4", lokr_w1_a=random(8, 3), lokr_w1_b=random(3, 4))
    refused("is 128 x 64, the model's layer 128 x 128; it is for another base", size=(DIM, FFN))
    refused("lokr_w2_b holds NaN or infinity", lokr_w2_b=torch.full((RANK, DIM // 4), float("inf")))
    refused("changes a convolution", lokr_t2=random(4, 4, 1, 1))
    assert_changed(expert, before, {})


def test_difference_of_other_shape(expert, random, tmp_path):
    """A difference that does not fit is refused before anything is merged."""
    before = weights(expert)
    for key, words in (
        ("patch_embedding.diff", "128 x 36 x 1 x 2 x 2"),
        ("blocks.0.modulation.diff_b", "does not have"),
    ):
        tensors = {
            f"diffusion_model.{key}": random(DIM, 36, 1, 2, 2),
            "diffusion_model.blocks.0.norm3.diff": random(DIM),
        }
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match=words):
            merge_lora(tmp_path / "a.safetensors", expert)
    assert_changed(expert, before, {})
    assert read_file(tmp_path / "a.safetensors")[0].keys() == tensors.keys()
