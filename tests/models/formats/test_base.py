"""One model in every layout and dialect that people have: the same function, or one clear error."""

import gc
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wantrain.models import Base, load_text_encoder, load_transformer, open_base
from wantrain.models.formats import names
from wantrain.models.formats.base import stated_expert
from wantrain.models.formats.inspect import describe
from wantrain.models.formats.pipeline import About, write_pipeline
from wantrain.models.formats.weights import load_strict, read_file, read_metadata, read_tensors, write_file

SIZE = {"num_attention_heads": 4, "attention_head_dim": 32, "in_channels": 16, "text_dim": 64, "ffn_dim": 64}
ABOUT = About("tiny", 0.875, 3.0, {"high_noise": 2.0, "low_noise": 1.5}, origin={"low_noise": {"run": "r7"}})
EXPERTS = ("high_noise", "low_noise")


def answer(model):
    """What a model says to one fixed question."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 2, 4, 6, generator=generator)
    text = torch.randn(1, 7, 64, generator=generator)
    with torch.no_grad():
        return model(latents, torch.tensor([731.0]), text)


@pytest.fixture(scope="module")
def experts(pair):
    return {name: Base(pair).transformer(name) for name in EXPERTS}


def written(out, pair, experts, **how):
    write_pipeline(out, experts.items(), base=Base(pair), about=ABOUT, **how)
    return out


@pytest.fixture(scope="module")
def layouts(pair, experts, tmp_path_factory):
    """The pair as it is found: sharded, official, and as single files with and without prefixes."""
    folder = tmp_path_factory.mktemp("layouts")
    single = written(folder / "mine", pair, experts, layout="comfyui") / "diffusion_models"
    tensors, about = read_file(single / "mine_low_noise.safetensors")
    for prefix in ("model.diffusion_model.", "diffusion_model.", "model."):
        save_file(
            {prefix + key: value for key, value in tensors.items()}, folder / f"{prefix}low_noise.safetensors", about
        )
    save_file(names_of_diffusers(tensors), folder / "diffusers_low_noise.safetensors")
    torch.save(tensors, folder / "low_noise.pth")
    return SimpleNamespace(
        folder=folder,
        sharded=written(folder / "sharded", pair, experts, shard_bytes=100_000),
        official=written(folder / "official", pair, experts, layout="official", shard_bytes=100_000),
        singles={
            "high_noise": single / "mine_high_noise.safetensors",
            "low_noise": single / "mine_low_noise.safetensors",
        },
        prefixed=sorted(folder.glob("*low_noise.*")),
    )


def names_of_diffusers(tensors):
    return {names.to_diffusers(key): value for key, value in tensors.items()}


def test_layouts_same_outputs(layouts, experts):
    """Every layout and every key prefix load to the same outputs."""
    wanted = {name: answer(model) for name, model in experts.items()}
    assert (wanted["high_noise"] - wanted["low_noise"]).abs().max() > 0.5
    bases = [Base(layouts.sharded), Base(layouts.official), Base(None, layouts.singles, SIZE)]
    for base in bases:
        for name in EXPERTS:
            assert torch.equal(answer(base.transformer(name)), wanted[name]), f"{base} {name}"
    assert len(layouts.prefixed) == 5
    for file in layouts.prefixed:
        assert torch.equal(answer(load_transformer(file, like=SIZE)), wanted["low_noise"]), file


def test_sharded_export(layouts, experts):
    """Large parts are written in several files with an index, and diffusers loads them."""
    files = sorted((layouts.sharded / "transformer_2").glob("*.safetensors"))
    assert len(files) > 2 and files[0].name.startswith("diffusion_pytorch_model-00001-of-000")
    index = json.loads(
        (layouts.sharded / "transformer_2" / "diffusion_pytorch_model.safetensors.index.json").read_text()
    )
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in experts["low_noise"].state_dict().values())
    pipe = WanPipeline.from_pretrained(layouts.sharded, torch_dtype=torch.float32)
    for name, theirs in (("high_noise", pipe.transformer), ("low_noise", pipe.transformer_2)):
        for key, value in names_of_diffusers(experts[name].state_dict()).items():
            assert torch.equal(theirs.state_dict()[key], value)


def test_layout_round_trip(layouts, experts, pair, tmp_path):
    """A conversion through all layouts and back gives the same bytes."""
    first = read_tensors(layouts.official / "low_noise_model")
    step, base = experts, Base(layouts.official)
    for layout in ("diffusers", "comfyui", "official"):
        step = {name: base.transformer(name) for name in EXPERTS}
        out = tmp_path / layout
        write_pipeline(out, step.items(), base=Base(pair), about=ABOUT, layout=layout)
        singles = {name: out / "diffusion_models" / f"{layout}_{name}.safetensors" for name in EXPERTS}
        base = Base(None, singles, SIZE) if layout == "comfyui" else Base(out)
    last = read_tensors(tmp_path / "official" / "low_noise_model")
    assert first.keys() == last.keys()
    assert all(first[key].numpy().tobytes() == last[key].numpy().tobytes() for key in first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(layouts, tmp_path, dtype):
    """Files in half precision load to another dtype with exactly their values."""
    tensors = {key: value.to(dtype) for key, value in read_file(layouts.singles["low_noise"])[0].items()}
    save_file(tensors, tmp_path / "low_noise.safetensors")
    model = load_transformer(tmp_path / "low_noise.safetensors", like=SIZE, dtype=torch.float32)
    rounded = {key: value.float() for key, value in tensors.items()}
    assert all(torch.equal(value, rounded[key]) for key, value in model.state_dict().items())


def test_stated_expert(layouts, tmp_path):
    """Layout, file name or metadata state the expert; it is never guessed."""
    assert stated_expert(layouts.sharded / "transformer") == "high_noise"
    assert stated_expert(layouts.official / "low_noise_model") == "low_noise"
    assert stated_expert(layouts.singles["high_noise"]) == "high_noise"
    bare = tmp_path / "wan.safetensors"
    save_file(read_file(layouts.singles["high_noise"])[0], bare)
    assert stated_expert(bare) is None
    assert Base(None, {"low_noise": bare}, SIZE).transformer("low_noise") is not None, "nothing contradicts"
    with pytest.raises(ValueError, match=r"is the high_noise expert, asked for as low_noise; its tensors do not show"):
        Base(None, {"low_noise": layouts.singles["high_noise"]}, SIZE).transformer("low_noise")
    with pytest.raises(ValueError, match=r"is the low_noise expert, asked for as dense"):
        Base(None, {"dense": layouts.official / "low_noise_model"}, SIZE).transformer("dense")
    renamed = tmp_path / "wan_low_noise.safetensors"
    shutil.copy(layouts.singles["high_noise"], renamed)
    with pytest.raises(ValueError, match=r"its file name says low_noise, but its metadata says high_noise"):
        stated_expert(renamed)


def test_metadata_and_model_card(layouts):
    """Metadata and model card state expert, model, boundary, run and sampling settings."""
    about = read_metadata(layouts.official / "low_noise_model")
    assert (about["expert"], about["model"], about["boundary"], about["run"]) == ("low_noise", "tiny", "0.875", "r7")
    assert about["made_by"].startswith("wantrain 0.")
    card = (layouts.sharded / "README.md").read_text()
    assert "guidance_scale=2.0, guidance_scale_2=1.5" in card and "flow_shift=3.0" in card and "run r7" in card
    assert "Wan2.1_VAE.pth" in (layouts.official / "README.md").read_text()


def test_inspect(layouts, pair):
    """inspect names part, dialect, expert, dtype and blocks of a file, and the parts of a folder."""
    said = describe(layouts.folder / "model.diffusion_model.low_noise.safetensors")
    for words in (
        "transformer",
        "official, with the prefix model.diffusion_model.",
        "low_noise",
        "float32",
        "2 blocks",
    ):
        assert words in said
    assert "not stated, and nothing in the tensors shows it" not in said
    whole = describe(pair)
    assert all(words in whole for words in ("high_noise:", "low_noise:", "Wan-VAE 2.1", "umT5 text encoder"))
    assert "fits      none of the published models" in whole
    with pytest.raises(ValueError, match="holds no part of a Wan model"):
        describe(layouts.folder)
    with pytest.raises(ValueError, match="no-such-file does not exist"):
        describe(layouts.folder / "no-such-file")


def official_text(folder, pair):
    """The text encoder under the official names, as a pickle."""
    back = {
        "shared.weight": "token_embedding.weight",
        "encoder.final_layer_norm.weight": "norm.weight",
    }
    parts = {
        "layer.0.layer_norm": "norm1",
        "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
        "layer.1.layer_norm": "norm2",
        "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
        "layer.1.DenseReluDense.wi_1": "ffn.fc1",
        "layer.1.DenseReluDense.wo": "ffn.fc2",
        **{f"layer.0.SelfAttention.{letter}": f"attn.{letter}" for letter in "qkvo"},
    }
    for layer in range(2):
        for ours, theirs in parts.items():
            back[f"encoder.block.{layer}.{ours}.weight"] = f"blocks.{layer}.{theirs}.weight"
    tensors = read_tensors(pair / "text_encoder")
    assert tensors.keys() == back.keys()
    torch.save({back[key]: value.clone() for key, value in tensors.items()}, folder / "models_t5_umt5-xxl-enc-bf16.pth")


def test_official_text_encoder(pair, tmp_path):
    """The text encoder loads from the official pickle and from ComfyUI's file."""
    official_text(tmp_path, pair)
    shutil.copytree(pair / "tokenizer", tmp_path / "google" / "umt5-xxl")
    save_file(
        {**load_file(pair / "text_encoder" / "model.safetensors"), "spiece_model": torch.zeros(3, dtype=torch.uint8)},
        tmp_path / "umt5.safetensors",
    )
    wanted = load_text_encoder(pair)(["a red ring", "圆形"])
    assert torch.equal(Base(tmp_path).text_encoder()(["a red ring", "圆形"]), wanted)
    parts = {"text_encoder": tmp_path / "umt5.safetensors", "tokenizer": pair / "tokenizer"}
    assert torch.equal(Base(None, parts).text_encoder()(["a red ring", "圆形"]), wanted)


class Fetched:
    """A stand-in for the hub: copies what the patterns allow."""

    def __init__(self, source, target):
        self.source, self.target, self.asked = source, target, []

    def __call__(self, repository, *, revision=None, allow_patterns=None, tqdm_class=None):
        self.asked.append((repository, revision))
        for file in self.source.rglob("*"):
            inside = file.relative_to(self.source)
            if file.is_file() and any(inside.match(pattern) for pattern in allow_patterns):
                (self.target / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, self.target / inside)
        return str(self.target)


@pytest.mark.parametrize("layout", ["sharded", "official"])
def test_one_expert_fetched(layouts, layout, tmp_path, monkeypatch):
    """A base that needs one expert fetches the files of this expert alone."""
    hub = Fetched(getattr(layouts, layout), tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    base = open_base("Wan-AI/Wan2.2-T2V", wanted=["low_noise"], revision="main", like=SIZE)
    assert hub.asked == [("Wan-AI/Wan2.2-T2V", "main")]
    assert base.holds("low_noise") and not base.holds("high_noise")
    assert not any("vae" in str(file) or "transformer/" in str(file) for file in (tmp_path / "cache").rglob("*"))
    assert torch.equal(
        answer(base.transformer("low_noise")), answer(load_transformer(layouts.singles["low_noise"], like=SIZE))
    )


def test_given_part_not_fetched(layouts, tmp_path, monkeypatch):
    """A part that is given as a file is not fetched."""
    hub = Fetched(layouts.sharded, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    parts = {"low_noise": str(layouts.singles["low_noise"]), "vae": None}
    base = open_base("Wan-AI/Wan2.2-T2V", parts, wanted=["low_noise", "vae"], like=SIZE)
    assert base.find("low_noise") == layouts.singles["low_noise"]
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"model_index.json", "scheduler", "vae"}


def test_hub_unreachable(monkeypatch):
    """A hub that cannot be reached is one error."""

    def offline(*args, **kwargs):
        raise OSError("no network\nhere")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(
        ValueError, match=r"weights=a/b is neither a folder here nor .* at revision=v2: no network here"
    ):
        open_base("a/b", revision="v2")
    with pytest.raises(ValueError, match=r"weights=just_a_name is not there; weights= takes a folder, or a repository"):
        open_base("just_a_name")


def test_boundary_mismatch(layouts, tmp_path):
    """A boundary without a second transformer, or of another value than the model's, is refused."""
    folder = tmp_path / "converted"
    shutil.copytree(layouts.sharded, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "transformer_2": [None, None]}))
    with pytest.raises(ValueError, match=r"has boundary_ratio=0.875 but names no transformer_2"):
        Base(folder).check_boundary(0.875)
    with pytest.raises(ValueError, match=r"has boundary_ratio=0.875, the chosen model has boundary=0.9"):
        Base(layouts.sharded).check_boundary(0.9)


class Bad:
    """Each a way in which a file is not what it should be; returns the file."""

    def truncated(self, source, folder):
        (folder / "cut.safetensors").write_bytes(source.read_bytes()[:-1000])
        return folder / "cut.safetensors"

    def missing_shard(self, source, folder):
        shutil.copytree(source.parents[2] / "sharded" / "transformer", folder / "part")
        next((folder / "part").glob("*00002-of*")).unlink()
        return folder / "part"

    def code_in_a_pickle(self, source, folder):
        torch.save({"weight": print}, folder / "evil.pth")
        return folder / "evil.pth"

    def no_state_dict(self, source, folder):
        torch.save({"weight": 3}, folder / "odd.pth")
        return folder / "odd.pth"

    def image_to_video(self, source, folder):
        tensors = read_file(source)[0]
        weight = tensors["patch_embedding.weight"]
        wide = torch.cat([weight, torch.randn(weight.shape[0], 20, *weight.shape[2:])], 1).contiguous()
        save_file({**tensors, "patch_embedding.weight": wide}, folder / "i2v.safetensors")
        return folder / "i2v.safetensors"

    def clip_branch(self, source, folder):
        extra = {"img_emb.proj.0.weight": torch.ones(4)}
        save_file({**read_file(source)[0], **extra}, folder / "wan21_i2v.safetensors")
        return folder / "wan21_i2v.safetensors"

    def not_a_number(self, source, folder):
        tensors = read_file(source)[0]
        sick = tensors["blocks.1.ffn.0.weight"].clone()
        sick[3, 4] = float("nan")
        save_file({**tensors, "blocks.1.ffn.0.weight": sick}, folder / "nan.safetensors")
        return folder / "nan.safetensors"

    def never_written(self, source, folder):
        tensors = read_file(source)[0]
        empty = torch.zeros_like(tensors["blocks.1.self_attn.q.weight"])
        save_file({**tensors, "blocks.1.self_attn.q.weight": empty}, folder / "zero.safetensors")
        return folder / "zero.safetensors"

    def missing_key(self, source, folder):
        tensors = dict(read_file(source)[0])
        del tensors["blocks.1.norm3.bias"]
        save_file({**tensors, "stranger": torch.ones(1)}, folder / "less.safetensors")
        return folder / "less.safetensors"

    def no_transformer(self, source, folder):
        save_file({"a": torch.ones(1)}, folder / "a.safetensors")
        return folder / "a.safetensors"


@pytest.mark.parametrize(
    ("kind", "words"),
    {
        "truncated": "cut.safetensors cannot be read as safetensors",
        "missing_shard": r"its index names diffusion_pytorch_model-00002-of-\d+.safetensors, not there; finish the download",
        "code_in_a_pickle": "evil.pth holds more than tensors, and loading it would run code from the file; refused",
        "no_state_dict": "odd.pth is not a state dict",
        "image_to_video": r"another shape than the chosen model \(in_channels 36 against 16\); choose model=",
        "clip_branch": "Wan2.1's image-to-video with a CLIP branch, which is not built.*model=i2v_a14b",
        "not_a_number": r"1 tensor \(blocks.1.ffn.0.weight is NaN or infinite\)",
        "never_written": r"1 tensor \(blocks.1.self_attn.q.weight is all zeros\)",
        "missing_key": r"1 missing \(blocks.1.norm3.bias\); 1 unexpected \(stranger\)",
        "no_transformer": "it is no complete Wan transformer",
    }.items(),
)
def test_bad_file(layouts, tmp_path, kind, words):
    """Each kind of bad weight file is one clear error."""
    file = getattr(Bad(), kind)(layouts.singles["low_noise"], tmp_path)
    with pytest.raises(ValueError, match=words):
        load_transformer(file, like=SIZE)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_value_check(dtype):
    """Weights that sum to zero or to infinity load; NaN, infinity and all zeros are refused."""
    module = torch.nn.Linear(400, 400, bias=False, device="meta")
    halves = torch.cat([torch.full((400, 200), 3.0), torch.full((400, 200), -3.0)], dim=1).half()
    load_strict(module, {"weight": halves}, "file", dtype=dtype)
    assert torch.equal(module.weight.float(), halves.float())
    large = torch.full((400, 400), 3.0).half()
    assert large.sum().isinf()
    load_strict(module, {"weight": large}, "file", dtype=dtype)
    assert torch.equal(module.weight.float(), large.float())
    for bad, words in [(float("nan"), "NaN or infinite"), (float("inf"), "NaN or infinite"), (0.0, "all zeros")]:
        sick = torch.full_like(large, bad) if bad == 0 else large.clone()
        sick[399, 399] = bad
        with pytest.raises(ValueError, match=words):
            load_strict(module, {"weight": sick}, "file", dtype=dtype)


def test_misfit_names_model():
    """The error for sizes of a published file names the model that fits them."""
    from wantrain.models.formats.loading import check_like

    sizes = {**SIZE, "num_attention_heads": 40, "attention_head_dim": 128, "in_channels": 36}
    with pytest.raises(ValueError, match=r"in_channels 36 against 16\); it fits model=i2v_a14b"):
        check_like(sizes, {**sizes, "in_channels": 16}, "file")


def files_of(out):
    return {file.relative_to(out): file.read_bytes() for file in out.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("conditioning", "opener", "expands", "kind"),
    [
        ("none", "WanPipeline", False, "t2v"),
        ("channel_concat", "WanImageToVideoPipeline", False, "i2v"),
        ("clean_frames", "WanPipeline", True, "ti2v"),
    ],
)
def test_conditioning_type_sets_pipeline(pair, experts, tmp_path, conditioning, opener, expands, kind):
    """The conditioning type decides the pipeline class, not the channels: clean frames need no further ones."""
    about = replace(ABOUT, conditioning=conditioning)
    for layout in ("diffusers", "official"):
        write_pipeline(tmp_path / layout, experts.items(), base=Base(pair), about=about, layout=layout)
    index = json.loads((tmp_path / "diffusers" / "model_index.json").read_text(encoding="utf-8"))
    assert (index["_class_name"], index["expand_timesteps"]) == (opener, expands)
    assert f"`{opener}.from_pretrained(FOLDER)`" in (tmp_path / "diffusers" / "README.md").read_text(encoding="utf-8")
    official = json.loads((tmp_path / "official" / "low_noise_model" / "config.json").read_text(encoding="utf-8"))
    assert official["model_type"] == kind


@pytest.mark.parametrize("stop", [1, 4, 9, 14])
def test_failed_replacement(stop, pair, experts, tmp_path, monkeypatch):
    """An export that fails while it replaces parts leaves the folder as it was."""
    out = written(tmp_path / "out", pair, experts)
    before, rename, steps = files_of(out), Path.rename, []

    def ended(self, target):
        steps.append(self)
        if len(steps) == stop:
            raise OSError("disk gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", ended)
    with pytest.raises(OSError, match="disk gone"):
        write_pipeline(out, reversed(experts.items()), base=Base(pair), about=About("tiny", 0.875, 7.0))
    assert files_of(out) == before


def test_replacement_after_kill(pair, experts, tmp_path):
    """Parts that kill -9 left between two renames are restored first, even if the new part has its name already."""
    out = written(tmp_path / "out", pair, experts)
    before = files_of(out)
    (out / ".old").mkdir()
    for part in ("transformer", "model_index.json"):
        (out / part).rename(out / ".old" / part)
    (out / "model_index.json").write_text("new")
    with pytest.raises(ValueError, match=r"holds no vae"):
        write_pipeline(out, experts.items(), base=Base(None), about=ABOUT)
    assert files_of(out) == before


def test_failed_write(pair, experts, tmp_path):
    """A failed export leaves the files of the folder as they were."""
    out = written(tmp_path / "out", pair, experts)
    before = files_of(out)
    with pytest.raises(ValueError, match=r"holds no vae"):
        write_pipeline(out, experts.items(), base=Base(None), about=ABOUT)
    assert files_of(out) == before


def test_memory_mapped_load(pair, tmp_path):
    """An aligned file is memory-mapped and never changed; an unaligned one gives the same values in own memory."""
    folder = tmp_path / "transformer"
    shutil.copytree(pair / "transformer", folder)
    (file,) = folder.glob("*.safetensors")
    before = file.read_bytes()

    def mapped():
        return Path("/proc/self/maps").read_text().count(str(file))

    aligned = load_transformer(folder)
    assert mapped() == 1 and all(p.data_ptr() % 64 == 0 for p in aligned.parameters() if p.numel() % 16 == 0)
    with torch.no_grad():
        for parameter in aligned.parameters():
            parameter.add_(1)
    assert file.read_bytes() == before
    del aligned, parameter
    gc.collect()
    save_file(read_file(file)[0], file, metadata={"format": "pt", "note": "one byte more or less"})
    again = load_transformer(folder)
    with safe_open(file, "pt") as raw:
        shifted = any(raw.get_tensor(key).data_ptr() % 64 for key in raw.keys())  # noqa: SIM118
    assert shifted and all(p.data_ptr() % 64 == 0 for p in again.parameters() if p.numel() > 64)
    wanted = load_transformer(pair, part="transformer").state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in again.state_dict().items())


def test_deterministic_bytes(tmp_path):
    """The same tensors and metadata give the same bytes.

    safetensors itself orders metadata by chance: six notes agree once in 720 times.
    """
    notes = {
        name: f'{name} \u00e9 \u4e2d \u2028 "quoted" \\ \n' for name in ("expert", "base", "rank", "alpha", "recipe")
    }
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(3, dtype=torch.bfloat16)}
    written = set()
    for again in range(4):
        file = tmp_path / f"{again}.safetensors"
        write_file(file, tensors, notes, aligned=bool(again % 2))
        written.add((again % 2, file.read_bytes()))
        assert all(torch.equal(value, tensors[key]) for key, value in load_file(file).items())
        assert read_metadata(file) == {"format": "pt", **notes}
    assert len(written) == 2
