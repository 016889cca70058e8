"""LoRA and DoRA files in every dialect: what comes out of the model counts, for diffusers ignores strange names in silence."""

import json
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from diffusers import WanPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from wantrain.models import Base, adapters
from wantrain.models.formats import names
from wantrain.models.formats.inspect import describe
from wantrain.models.formats.lora import merge_lora, read_lora, write_lora
from wantrain.models.formats.lora_dialects import DIALECTS, is_complete
from wantrain.models.formats.lora_layers import Layer
from wantrain.models.formats.lora_peft import PEFT
from wantrain.models.formats.weights import read_file

RANK, ALPHA, DIM, FFN, BLOCKS = 4, 2.0, 128, 64, 2
ATTENTION = [f"{kind}.{part}" for kind in ("self_attn", "cross_attn") for part in "qkvo"]
EXPERTS = ("high_noise", "low_noise")
ABOUT = {"expert": "low_noise", "model": "tiny"}


def layer(name, seed, rank=RANK, alpha=ALPHA):
    generator = torch.Generator().manual_seed(seed)
    sizes = {"ffn.0": (DIM, FFN), "ffn.2": (FFN, DIM)}
    before, after = sizes.get(name, (DIM, DIM))
    down = torch.randn(rank, before, generator=generator) / before**0.5
    return Layer(down, torch.randn(after, rank, generator=generator) / rank**0.5, alpha)


def lora(parts=(*ATTENTION, "ffn.0", "ffn.2"), **how):
    """A change of order one in the named layers of every block."""
    places = [(block, part) for block in range(BLOCKS) for part in parts]
    return {f"blocks.{block}.{part}": layer(part, seed, **how) for seed, (block, part) in enumerate(places)}


def question():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 2, 4, 6, generator=generator)
    return latents, torch.tensor([731.0]), torch.randn(1, 512, 64, generator=generator)


def answer(model):
    with torch.no_grad():
        return model(*question())


def answer_of_diffusers(model):
    with torch.no_grad():
        return model(*question(), return_dict=False)[0]


@pytest.fixture
def expert(pair):
    """A fresh low-noise expert, to be changed."""
    return Base(pair).transformer("low_noise")


def by_hand(model, layers):
    """The answer of a model whose weights were changed here, by the formula alone."""
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, change in layers.items():
            weights[f"{name}.weight"] += change.alpha / change.down.shape[0] * (change.up @ change.down)
    return answer(model)


@pytest.fixture(scope="module")
def changed(pair):
    """What each expert says before, and with `lora()` in it."""
    said = {}
    for name in EXPERTS:
        model = Base(pair).transformer(name)
        said[name] = (answer(model), by_hand(model, lora()))
        assert (said[name][1] - said[name][0]).abs().max() > 0.3
    return said


def close(one, other, tolerance=1e-5):
    return (one - other).abs().max() <= tolerance * max(1.0, other.abs().max())


@pytest.mark.parametrize("dialect", DIALECTS)
def test_write_read_merge(dialect, changed, expert, tmp_path):
    """A LoRA in every dialect is written, read and merged to the same outputs."""
    file = tmp_path / "lora.safetensors"
    write_lora(file, lora(), dialect=dialect, metadata=ABOUT)
    found = read_lora(file)
    assert found.dialect == dialect and found.metadata == ABOUT
    assert merge_lora(file, expert, expert="low_noise", base="tiny") == 20
    assert close(answer(expert), changed["low_noise"][1])
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", EXPERTS)
def test_diffusers_loads_dialects(dialect, name, changed, pair, tmp_path):
    """diffusers loads every dialect into either expert and leaves the other one unchanged."""
    write_lora(tmp_path / "lora.safetensors", lora(), dialect=dialect, metadata=ABOUT)
    pipe = WanPipeline.from_pretrained(pair, torch_dtype=torch.float32)
    second = name == "low_noise"
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors", load_into_transformer_2=second)
    before, after = changed[name]
    said = answer_of_diffusers(pipe.transformer_2 if second else pipe.transformer)
    assert close(said, after) and not close(said, before, 0.1)
    other = EXPERTS[not second]
    assert close(answer_of_diffusers(pipe.transformer if second else pipe.transformer_2), changed[other][0])


@pytest.mark.parametrize("dialect", DIALECTS)
def test_mixed_rank_and_alpha(dialect, pair, expert, tmp_path):
    """Every dialect keeps layers of different rank and alpha."""
    mixed = lora(ATTENTION) | lora(("ffn.0", "ffn.2"), rank=2, alpha=5.0)
    write_lora(tmp_path / "lora.safetensors", mixed, dialect=dialect)
    wanted = by_hand(Base(pair).transformer("low_noise"), mixed)
    merge_lora(tmp_path / "lora.safetensors", expert)
    assert close(answer(expert), wanted)
    pipe = WanPipeline.from_pretrained(pair, torch_dtype=torch.float32)
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors", load_into_transformer_2=True)
    assert close(answer_of_diffusers(pipe.transformer_2), wanted)


def test_partial_lora(pair, expert, tmp_path):
    """A LoRA of only some layers merges in every dialect; diffusers refuses it in kohya's alone."""
    wanted = by_hand(Base(pair).transformer("low_noise"), lora(ATTENTION))
    for dialect in DIALECTS:
        file = tmp_path / f"{dialect}.safetensors"
        write_lora(file, lora(ATTENTION), dialect=dialect)
        model = Base(pair).transformer("low_noise")
        merge_lora(file, model)
        assert close(answer(model), wanted)
        pipe = WanPipeline.from_pretrained(pair, torch_dtype=torch.float32)
        if dialect == "kohya":
            with pytest.raises(KeyError):
                pipe.load_lora_weights(tmp_path, weight_name=file.name)
        else:
            pipe.load_lora_weights(tmp_path, weight_name=file.name, load_into_transformer_2=True)
            assert close(answer_of_diffusers(pipe.transformer_2), wanted)


def test_lora_round_trip(tmp_path):
    """A LoRA converted through all dialects and back has the same bytes."""
    layers = lora()
    for step, dialect in enumerate(("comfyui", "diffusers", "kohya", "comfyui")):
        write_lora(tmp_path / f"{step}.safetensors", layers, dialect=dialect)
        layers = read_lora(tmp_path / f"{step}.safetensors").layers
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "3.safetensors").read_bytes()


#: Other people's dialects: prefix, name of a layer, ends, whether alpha is in the file, and what it is when it is not.
Foreign = namedtuple("Foreign", "dialect before flat diffusers ends alpha")
PEOPLES = {
    "comfyui, kohya's ends": Foreign("comfyui", "diffusion_model.", False, False, ("lora_down", "lora_up"), True),
    "comfyui, no alpha": Foreign("comfyui", "diffusion_model.", False, False, ("lora_A", "lora_B"), False),
    "checkpoint prefix": Foreign("comfyui", "model.diffusion_model.", False, False, ("lora_A", "lora_B"), True),
    "no prefix": Foreign("comfyui", "", False, False, ("lora_A", "lora_B"), True),
    "old diffusers": Foreign("diffusers", "transformer.", False, True, ("lora.down", "lora.up"), False),
    "peft": Foreign("diffusers", "base_model.model.", False, True, ("lora_A", "lora_B"), False),
    "peft, default": Foreign(
        "diffusers", "base_model.model.", False, True, ("lora_A.default", "lora_B.default"), False
    ),
    "musubi": Foreign("kohya", "lora_unet_", True, False, ("lora_down", "lora_up"), True),
    "diffsynth": Foreign("diffsynth", "", False, False, ("lora_A.default", "lora_B.default"), False),
    "videox-fun": Foreign("videox-fun", "lora_unet__", True, False, ("lora_down", "lora_up"), False),
}


def written_by(people, path, layers):
    tensors = {}
    for name, change in layers.items():
        own = names.to_diffusers(f"{name}.weight").removesuffix(".weight") if people.diffusers else name
        key = people.before + (own.replace(".", "_") if people.flat else own)
        tensors[f"{key}.{people.ends[0]}.weight"] = change.down
        tensors[f"{key}.{people.ends[1]}.weight"] = change.up
        if people.alpha:
            tensors[f"{key}.alpha"] = torch.tensor(change.alpha)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("people", PEOPLES.values(), ids=PEOPLES)
def test_third_party_files(people, pair, expert, tmp_path):
    """LoRA files of other trainers are merged at their own strength."""
    file = written_by(people, tmp_path / "theirs.safetensors", lora())
    alpha = ALPHA if people.dialect == "videox-fun" else None
    assert read_lora(file, alpha=alpha).dialect == people.dialect
    strength = ALPHA if people.alpha or alpha else RANK
    wanted = by_hand(Base(pair).transformer("low_noise"), lora(alpha=strength))
    assert merge_lora(file, expert, alpha=alpha) == 20
    assert close(answer(expert), wanted)


def test_missing_alpha(tmp_path):
    """The error for a file without alpha asks for it; a given alpha must agree with the file's."""
    theirs = written_by(PEOPLES["videox-fun"], tmp_path / "theirs.safetensors", lora())
    with pytest.raises(ValueError, match=r"VideoX-Fun's.*give the network_alpha of its training as lora.alpha="):
        read_lora(theirs)
    write_lora(tmp_path / "ours.safetensors", lora())
    assert read_lora(tmp_path / "ours.safetensors", alpha=ALPHA).layers
    with pytest.raises(ValueError, match=r"holds its own alpha, 2 for blocks\.\d.*; leave out alpha=8"):
        read_lora(tmp_path / "ours.safetensors", alpha=8)


def test_layers_outside_blocks(pair, tmp_path):
    """We read layers outside the blocks in every dialect; diffusers reads them in its own alone."""
    sizes = {
        "text_embedding.0": (64, DIM),
        "text_embedding.2": (DIM, DIM),
        "time_embedding.0": (256, DIM),
        "time_embedding.2": (DIM, DIM),
        "time_projection.1": (DIM, 6 * DIM),
        "head.head": (DIM, 64),
    }
    generator = torch.Generator().manual_seed(9)
    outside = {}
    for name, (before, after) in sizes.items():
        down = torch.randn(RANK, before, generator=generator) / before**0.5
        outside[name] = Layer(down, torch.randn(after, RANK, generator=generator) / RANK**0.5, ALPHA)
    both = lora() | outside
    wanted, inside_alone = (by_hand(Base(pair).transformer("low_noise"), layers) for layers in (both, lora()))
    assert not close(wanted, inside_alone, 0.1)
    assert is_complete(lora()) and not is_complete(both)
    for dialect in DIALECTS:
        file = tmp_path / f"{dialect}.safetensors"
        write_lora(file, both, dialect=dialect)
        model = Base(pair).transformer("low_noise")
        assert merge_lora(file, model) == 26
        assert close(answer(model), wanted)
        pipe = WanPipeline.from_pretrained(pair, torch_dtype=torch.float32)
        if dialect == "diffusers":
            pipe.load_lora_weights(tmp_path, weight_name=file.name, load_into_transformer_2=True)
            assert close(answer_of_diffusers(pipe.transformer_2), wanted)
        else:
            with pytest.raises((ValueError, IndexError)):
                pipe.load_lora_weights(tmp_path, weight_name=file.name)


def test_kohya_needs_all_blocks(pair, tmp_path):
    """diffusers refuses kohya's dialect unless it holds the blocks from the first on."""
    second = {name: change for name, change in lora().items() if name.startswith("blocks.1.")}
    assert not is_complete(second) and not is_complete(lora(ATTENTION))
    write_lora(tmp_path / "lora.safetensors", second, dialect="kohya")
    with pytest.raises(KeyError):
        WanPipeline.from_pretrained(pair).load_lora_weights(tmp_path, weight_name="lora.safetensors")


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_diffusers_lora_strength(rank_stabilised, pair, expert, tmp_path):
    """A LoRA that diffusers saved is merged at the strength that its header states."""
    pipe = WanPipeline.from_pretrained(pair, torch_dtype=torch.float32)
    config = LoraConfig(
        r=4,
        lora_alpha=2,
        target_modules=["to_q", "to_k", "ffn.net.2"],
        rank_pattern={"to_k": 2},
        alpha_pattern={"to_k": 5, "blocks.1.ffn.net.2": 7},
        use_rslora=rank_stabilised,
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    pipe.transformer_2.add_adapter(config)
    WanPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer_2),
        transformer_lora_adapter_metadata=config.to_dict(),
    )
    (file,) = tmp_path.iterdir()
    before = answer(expert)
    assert merge_lora(file, expert) == 2 * 5
    assert close(answer(expert), answer_of_diffusers(pipe.transformer_2))
    assert not close(answer(expert), before, 0.1)


def dora(model, **how):
    """`lora()` with lengths that are neither the base's nor the changed weight's."""
    generator = torch.Generator().manual_seed(7)
    layers = {}
    for name, change in lora(**how).items():
        lengths = by_formula(model.get_submodule(name).weight, change, None).norm(dim=1)
        magnitude = lengths * (1 + 0.3 * torch.randn(lengths.shape, generator=generator))
        layers[name] = replace(change, magnitude=magnitude)
    return layers


def by_formula(weight, change, divide_by):
    """W + alpha / rank BA, its rows given the DoRA's lengths after dividing by those of "changed" or "base"."""
    weight = weight.detach()
    changed = weight + change.alpha / change.down.shape[0] * (change.up @ change.down)
    if divide_by is None:
        return changed
    lengths = {"changed": changed, "base": weight}[divide_by].norm(dim=1)
    return changed * (change.magnitude / lengths)[:, None]


def as_formula(base, layers, divide_by):
    """The answer of the base whose weights were changed here, by the formula alone."""
    model = base.transformer("low_noise")
    for name, change in layers.items():
        weight = model.get_submodule(name).weight
        weight.data = by_formula(weight, change, divide_by)
    return answer(model)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dora_dialects(dialect, pair, expert, tmp_path):
    """A DoRA is read and merged in every dialect; diffusers loads it in its own."""
    before, layers, file = answer(expert), dora(expert), tmp_path / "dora.safetensors"
    wanted = as_formula(Base(pair), layers, "changed")
    assert not close(wanted, before, 0.1) and not close(wanted, as_formula(Base(pair), layers, None), 0.1)
    write_lora(file, layers, dialect=dialect, metadata=ABOUT)
    found = read_lora(file)
    assert found.is_dora and found.dialect == dialect and found.metadata == ABOUT
    assert all(torch.equal(found.layers[name].magnitude, layers[name].magnitude) for name in layers)
    assert merge_lora(file, expert) == 20 and close(answer(expert), wanted)
    pipe = WanPipeline.from_pretrained(pair, torch_dtype=torch.float32)
    if dialect == "diffusers":
        pipe.load_lora_weights(tmp_path, weight_name=file.name, load_into_transformer_2=True)
        assert close(answer_of_diffusers(pipe.transformer_2), wanted)
    else:
        with pytest.raises(ValueError, match="dora_scale"):
            pipe.load_lora_weights(tmp_path, weight_name=file.name, load_into_transformer_2=True)


def test_dora_round_trip(expert, tmp_path):
    """A DoRA converted through all dialects and back has the same bytes."""
    layers = dora(expert, rank=3, alpha=5.0)
    for step, dialect in enumerate(("comfyui", "diffusers", "kohya", "comfyui")):
        write_lora(tmp_path / f"{step}.safetensors", layers, dialect=dialect)
        layers = read_lora(tmp_path / f"{step}.safetensors").layers
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "3.safetensors").read_bytes()


def test_comfyui_dora_formula(pair, expert, tmp_path):
    """ComfyUI's formula for a DoRA, m (W + D) / |W|, does not give the trained weights.

    Pull request 15458 quotes it; paper, peft and LyCORIS divide by |W + D|. When ComfyUI merges that, the note of
    export.py and the line in docs/models.md can go.
    """
    layers = dora(expert)
    wanted, theirs = (as_formula(Base(pair), layers, by) for by in ("changed", "base"))
    assert not close(theirs, wanted, 0.1)
    write_lora(tmp_path / "dora.safetensors", layers)
    for key, tensor in read_file(tmp_path / "dora.safetensors")[0].items():
        if key.endswith("dora_scale"):  # (out, 1): a bare (out,) is multiplied along the wrong axis there
            assert tensor.ndim == 2 and tensor.shape[1] == 1


@pytest.mark.parametrize("end", ["lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_diffusers_dora_strength(end, pair, expert, tmp_path):
    """A DoRA that diffusers saved is merged at its own strength."""
    pipe = WanPipeline.from_pretrained(pair, torch_dtype=torch.float32)
    config = LoraConfig(
        r=4, lora_alpha=2, target_modules=["to_q", "ffn.net.2"], rank_pattern={"to_q": 2}, use_dora=True,
        init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(0)
    pipe.transformer_2.add_adapter(config)
    for name, parameter in pipe.transformer_2.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.randn(parameter.shape)
    WanPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer_2),
        transformer_lora_adapter_metadata=config.to_dict(),
    )
    (file,) = tmp_path.iterdir()
    tensors, about = read_file(file)
    assert sum(key.endswith("lora_magnitude_vector") for key in tensors) == 6
    save_file({key.replace("lora_magnitude_vector", end): tensors[key] for key in tensors}, file, metadata=about)
    before = answer(expert)
    assert merge_lora(file, expert) == 6
    assert close(answer(expert), answer_of_diffusers(pipe.transformer_2)) and not close(answer(expert), before, 0.1)


@pytest.mark.parametrize(
    ("part", "shape", "words"),
    [
        (
            "self_attn.q",
            (1, DIM),
            r"a DoRA that scales columns \(.*LyCORIS without wd_on_out\), which is not supported",
        ),
        ("ffn.0", (1, DIM), "a DoRA that scales columns"),
        ("ffn.0", (DIM, 1), r"the magnitude of .*ffn\.0 is \(128, 1\), the layer has 64 rows"),
        ("ffn.0", (FFN, DIM), r"is \(64, 128\), the layer has 64 rows"),
        ("self_attn.q", (DIM,), None),
    ],
)
def test_dora_magnitude_shape(part, shape, words, expert, tmp_path):
    """A DoRA magnitude has one finite value for each row; other shapes are refused."""
    write_lora(tmp_path / "dora.safetensors", dora(expert))
    tensors, key = read_file(tmp_path / "dora.safetensors")[0], f"diffusion_model.blocks.0.{part}.dora_scale"
    if words is None:
        save_file({**tensors, key: tensors[key].flatten()}, tmp_path / "flat.safetensors")
        assert torch.equal(
            read_lora(tmp_path / "flat.safetensors").layers[f"blocks.0.{part}"].magnitude, tensors[key][:, 0]
        )
        return
    for value in (1.0, float("nan")):
        save_file({**tensors, key: torch.full(shape, value)}, tmp_path / "bad.safetensors")
        with pytest.raises(ValueError, match=words):
            read_lora(tmp_path / "bad.safetensors")
    save_file({**tensors, key: torch.full_like(tensors[key], float("nan"))}, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        read_lora(tmp_path / "bad.safetensors")


def test_dora_file_as_init(pair, expert, tmp_path):
    """Training continues from a DoRA file with gradients in all its parts; inspect names its kind."""
    layers, file = dora(expert), tmp_path / "dora.safetensors"
    write_lora(file, layers, dialect="diffusers")
    adapters.inject_lora(expert, read_lora(file), seed=0)
    assert close(answer(expert), as_formula(Base(pair), layers, "changed"))
    now = adapters.adapter_layers(expert)
    assert all(torch.equal(now[name].magnitude, layers[name].magnitude) for name in layers)
    moving = [parameter for parameter in expert.parameters() if parameter.requires_grad]
    assert len(moving) == 3 * 20
    expert(*question()).square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in moving)
    assert "kind      DoRA" in describe(file) and "rank      4" in describe(file)
    write_lora(file, lora())
    assert "kind      LoRA" in describe(file)


def test_lora_file_write(tmp_path):
    """A LoRA file keeps its dtypes, is readable for all users, and is written whole or not at all."""
    file = tmp_path / "lora.safetensors"
    wide = torch.randn(16, 8, dtype=torch.bfloat16)
    write_lora(file, {"blocks.0.self_attn.q": Layer(wide[::4], wide[:, ::2], 2.0)})
    back = read_lora(file).layers["blocks.0.self_attn.q"]
    assert (
        back.down.dtype == torch.bfloat16 and torch.equal(back.down, wide[::4]) and torch.equal(back.up, wide[:, ::2])
    )
    assert back.change().dtype == torch.float32
    torch.testing.assert_close(back.change(), 0.5 * wide[:, ::2].float() @ wide[::4].float())
    assert file.stat().st_mode & 0o777 == 0o644
    content = file.read_bytes()
    with pytest.raises(ValueError, match="not a parameter of a Wan transformer"):
        write_lora(file, {"stranger": back}, dialect="diffusers")
    with pytest.raises(ValueError, match=r"lora\.dialect=civitai is unknown; choose one of comfyui, diffusers, kohya"):
        write_lora(file, lora(), dialect="civitai")
    with pytest.raises(ValueError, match="no layers to write"):
        write_lora(file, {})
    assert file.read_bytes() == content


def test_bf16_merge_rounding(pair, tmp_path):
    """A merge into bf16 weights rounds once."""
    model = Base(pair).transformer("low_noise").to(torch.bfloat16)
    before = model.blocks[0].ffn[0].weight.detach().clone()
    change = lora()["blocks.0.ffn.0"]
    write_lora(tmp_path / "lora.safetensors", lora())
    merge_lora(tmp_path / "lora.safetensors", model, scale=0.3)
    wanted = (before.float() + 0.3 * change.change()).to(torch.bfloat16)
    assert torch.equal(model.blocks[0].ffn[0].weight, wanted) and not torch.equal(wanted, before)


def test_diffusers_header(tmp_path):
    """The header in diffusers' dialect states rank and alpha, and no key holds alpha."""
    write_lora(tmp_path / "lora.safetensors", lora(), dialect="diffusers")
    tensors, about = read_file(tmp_path / "lora.safetensors")
    facts = json.loads(about[PEFT])
    assert (facts["transformer.r"], facts["transformer.lora_alpha"]) == (RANK, ALPHA)
    assert "transformer.blocks.0.attn1.to_q.lora_A.weight" in tensors and not any("alpha" in key for key in tensors)


def with_more(tmp_path, **more):
    write_lora(tmp_path / "lora.safetensors", lora())
    tensors = read_file(tmp_path / "lora.safetensors")[0]
    save_file({**tensors, **more}, tmp_path / "bad.safetensors")
    return tmp_path / "bad.safetensors"


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("diffusion_model.blocks.0.self_attn.q.dora_scale", "is a DoRA, but 19 of its 20 layers have no magnitude"),
        (
            "diffusion_model.blocks.7.self_attn.q.dora_scale",
            r"1 names .*first: diffusion_model\.blocks\.7\.self_attn\.q",
        ),
        ("diffusion_model.blocks.0.self_attn.q.hada_w1_a", r"self_attn\.q has no hada_w1_b; the file is incomplete"),
        ("diffusion_model.blocks.0.self_attn.q.hada_t1", "changes a convolution"),
        ("diffusion_model.blocks.0.self_attn.q.lokr_w1", r"self_attn\.q has no lokr_w2_a; the file is incomplete"),
        ("diffusion_model.blocks.0.self_attn.q.lokr_t2", "changes a convolution"),
        ("diffusion_model.blocks.0.self_attn.q.diff", r"blocks\.0\.self_attn\.q twice, as .* and as "),
        ("diffusion_model.blocks.0.norm1.diff", r"1 names .*first: diffusion_model\.blocks\.0\.norm1"),
        ("diffusion_model.blocks.0.self_attn.q.oft_blocks", r"1 names .*first: .*oft_blocks"),
        ("diffusion_model.patch_embedding.lora_A.weight", "not those of a LoRA .*first: diffusion_model.patch_embedd"),
        ("diffusion_model.blocks.0.self_attn.q.lora_down.weight", r"self_attn\.q twice, the second as .*lora_down"),
        ("diffusion_model.blocks.0.self_attn.q.alpha", "q.alpha is not one finite number"),
        ("diffusion_model.blocks.0.self_attn.x.lora_A.weight", "1 names are not those of a LoRA for a Wan"),
        ("diffusion_model.blocks.7.self_attn.q.lora_A.weight", r"blocks.7.self_attn.q has no lora_B.*incomplete"),
        ("stranger", r"1 names are not those of a LoRA .*first: stranger"),
    ],
)
def test_unsupported_keys(tmp_path, key, words):
    """Keys that belong to no plain LoRA are refused."""
    with pytest.raises(ValueError, match=words):
        read_lora(with_more(tmp_path, **{key: torch.ones(2, 2)}))


def test_unsupported_shapes(tmp_path):
    """Matrices that do not multiply, convolutions and other tensors are refused."""
    key = "diffusion_model.blocks.0.self_attn.q.lora_A.weight"
    with pytest.raises(ValueError, match="which do not multiply"):
        read_lora(with_more(tmp_path, **{key: torch.ones(3, DIM)}))
    with pytest.raises(ValueError, match="changes a convolution"):
        read_lora(with_more(tmp_path, **{key: torch.ones(RANK, DIM, 1, 1)}))
    with pytest.raises(ValueError, match="not those of a LoRA"):
        save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
        read_lora(tmp_path / "a.safetensors")


def test_duplicate_layer(tmp_path):
    """One layer under two names is refused."""
    more = {f"blocks.0.self_attn.q.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    words = r"blocks\.0\.self_attn\.q twice, as .*and as .*; keep the one that counts"
    with pytest.raises(ValueError, match=words):
        read_lora(with_more(tmp_path, **more))


@pytest.mark.parametrize(
    ("rank", "alpha", "words"),
    [
        (0, 1.0, "has rank 0"),
        (RANK, float("nan"), "is not one finite number"),
        (RANK, float("inf"), "is not one finite number"),
    ],
)
def test_bad_rank_or_alpha(rank, alpha, words, tmp_path):
    """Rank 0 and an alpha that is not finite are refused."""
    sick = Layer(torch.ones(rank, DIM), torch.ones(DIM, rank), alpha)
    write_lora(tmp_path / "lora.safetensors", {**lora(), "blocks.1.cross_attn.o": sick})
    with pytest.raises(ValueError, match=words):
        read_lora(tmp_path / "lora.safetensors")


@pytest.mark.parametrize(("header", "words"), [("{oops", "is not JSON"), ("[1]", "is not a JSON object")])
def test_bad_header(header, words, tmp_path):
    """The error for a header that is no JSON object names the file."""
    write_lora(tmp_path / "lora.safetensors", lora(), dialect="diffusers")
    save_file(read_file(tmp_path / "lora.safetensors")[0], tmp_path / "bad.safetensors", metadata={PEFT: header})
    with pytest.raises(ValueError, match=f"bad.safetensors: lora_adapter_metadata in its header {words}"):
        read_lora(tmp_path / "bad.safetensors")


def test_videox_fun_partial_alpha(tmp_path):
    """A VideoX-Fun file needs an alpha for each of its layers."""
    file = written_by(PEOPLES["videox-fun"], tmp_path / "some.safetensors", lora())
    tensors = read_file(file)[0]
    save_file({**tensors, "lora_unet__blocks_0_self_attn_q.alpha": torch.tensor(ALPHA)}, file)
    with pytest.raises(ValueError, match="alpha that the file does not hold"):
        read_lora(file)
    layers = [key.removesuffix(".lora_up.weight") for key in tensors if key.endswith(".lora_up.weight")]
    save_file({**tensors, **{f"{key}.alpha": torch.tensor(ALPHA) for key in layers}}, file)
    assert {layer.alpha for layer in read_lora(file).layers.values()} == {ALPHA}


def test_lora_with_nan(tmp_path):
    """A LoRA that holds NaN or infinity is refused."""
    key = "diffusion_model.blocks.0.self_attn.q.lora_A.weight"
    with pytest.raises(ValueError, match=r"blocks.0.self_attn.q.lora_A.weight holds NaN or infinity"):
        read_lora(with_more(tmp_path, **{key: torch.full((RANK, DIM), float("nan"))}))


def test_lora_mismatch(expert, tmp_path):
    """A LoRA of another expert, model or size is refused before any weight changes."""
    before = answer(expert)
    file = tmp_path / "lora.safetensors"
    write_lora(file, lora(), metadata=ABOUT)
    with pytest.raises(ValueError, match="was trained for low_noise, not for high_noise; swap the two files"):
        merge_lora(file, expert, expert="high_noise")
    with pytest.raises(ValueError, match="was trained for model=tiny, not for model=t2v_a14b; choose model="):
        merge_lora(file, expert, base="t2v_a14b")
    wide = Layer(torch.randn(4, 5120), torch.randn(5120, 4), 4.0)
    write_lora(file, {**lora(), "blocks.1.self_attn.o": wide})
    with pytest.raises(
        ValueError, match=r"blocks.1.self_attn.o is 5120 x 5120, the model's layer 128 x 128; .*another base"
    ):
        merge_lora(file, expert)
    write_lora(file, {**lora(), "blocks.39.ffn.0": layer("ffn.0", 0)})
    with pytest.raises(ValueError, match=r"changes blocks.39.ffn.0, which this model does not have; .*another base"):
        merge_lora(file, expert)
    assert torch.equal(answer(expert), before)


def test_lora_file_as_init(pair, changed, expert, tmp_path):
    """Training continues from a LoRA file with its layers, ranks and alphas."""
    mixed = lora(ATTENTION) | lora(("ffn.2",), rank=2, alpha=5.0)
    write_lora(tmp_path / "lora.safetensors", mixed)
    adapters.inject_lora(expert, read_lora(tmp_path / "lora.safetensors"), seed=0)
    assert close(answer(expert), by_hand(Base(pair).transformer("low_noise"), mixed))
    now = adapters.adapter_layers(expert)
    assert now.keys() == mixed.keys()
    for name, change in mixed.items():
        assert torch.equal(now[name].down, change.down) and torch.equal(now[name].up, change.up)
        assert now[name].alpha == change.alpha and now[name].up.abs().max() > 0
    moving = {name for name, parameter in expert.named_parameters() if parameter.requires_grad}
    assert len(moving) == 2 * len(mixed) and all("lora_" in name for name in moving)
    start = answer(expert)
    optimizer = torch.optim.SGD([parameter for parameter in expert.parameters() if parameter.requires_grad], lr=0.1)
    expert(*question()).square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in expert.parameters() if parameter.requires_grad)
    optimizer.step()
    assert not close(answer(expert), start, 1e-3)


def test_block_1_and_block_11(tmp_path):
    """Rank and alpha of block 1 and of block 11 stay apart."""
    from wantrain.models import WanTransformer

    torch.manual_seed(0)
    model = WanTransformer(num_attention_heads=1, attention_head_dim=32, text_dim=8, ffn_dim=16, num_layers=12)
    sizes = {"blocks.1.self_attn.q": (2, 3.0), "blocks.11.self_attn.q": (5, 7.0), "blocks.11.self_attn.k": (3, 0.5)}
    small = {name: Layer(torch.randn(rank, 32), torch.randn(32, rank), alpha) for name, (rank, alpha) in sizes.items()}
    write_lora(tmp_path / "lora.safetensors", small)
    adapters.inject_lora(model, read_lora(tmp_path / "lora.safetensors"), seed=0)
    found = adapters.adapter_layers(model)
    assert {name: (layer.rank, layer.alpha) for name, layer in found.items()} == sizes
    assert all(torch.equal(found[name].up, small[name].up) for name in small)


@pytest.mark.parametrize("people", PEOPLES.values(), ids=PEOPLES)
def test_inspect(people, tmp_path):
    """inspect prints dialect, rank, alpha, layers and dtype of a LoRA file."""
    said = describe(written_by(people, tmp_path / "theirs.safetensors", lora()))
    assert f"dialect   {people.dialect}" in said and "rank      4" in said and "20 in blocks 0 to 1" in said
    alpha = "not in the file" if people.dialect == "videox-fun" else "2" if people.alpha else "4"
    assert f"alpha     {alpha}" in said and "not stated" in said and "float32" in said
