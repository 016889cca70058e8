"""export.py as people use it: every layout and dialect from a run, a merge, a conversion, a look at a file."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from wantrain.models import Base, adapters, load_transformer
from wantrain.models.formats import base as bases
from wantrain.models.formats.lora import read_lora, write_lora
from wantrain.models.formats.weights import read_metadata, read_tensors

MODEL = ("model.transformer.num_layers=2", "model.transformer.ffn_dim=64", "model.transformer.attention_head_dim=32")
SIZE = {"num_attention_heads": 4, "attention_head_dim": 32}
EXPERTS = ("high_noise", "low_noise")


@pytest.fixture(scope="module")
def trained(tiny, pair, inside, tmp_path_factory):
    """A folder with runs `high` and `low`: LoRAs of rank 4 and alpha 8 on the pair."""
    folder = tmp_path_factory.mktemp("trained")
    for name in ("high", "low"):
        run = (f"expert={name}_noise", f"run={name}", f"weights={pair}", "steps=2", "batch_size=4")
        lora = ("adapter=lora", "adapter.rank=4", "adapter.alpha=8", "optimizer.lr=1e-2")
        inside(folder, "train.py", *tiny.train, *run, *lora)
    inside(folder, "export.py", "run=high,low", "out=pipeline")
    return folder


def answer(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return model(torch.randn(1, 16, 2, 4, 6, generator=generator), torch.tensor([31.0]), torch.zeros(1, 3, 64))


def experts_of(base):
    return {name: answer(base.transformer(name)) for name in EXPERTS}


def same(one, other):
    return all((one[name] - other[name]).abs().max() < 1e-5 for name in EXPERTS)


@pytest.mark.parametrize("layout", ["diffusers", "official", "comfyui"])
def test_layouts_hold_merged_experts(layout, trained, tiny, pair, inside):
    """Every layout holds the merged experts with their metadata, and training continues from it."""
    inside(trained, "export.py", "run=high,low", f"out={layout}", f"layout={layout}", "shard_gb=0.0001")
    out = trained / layout
    singles = {name: out / "diffusion_models" / f"comfyui_{name}.safetensors" for name in EXPERTS}
    base = Base(None, singles, SIZE) if layout == "comfyui" else Base(out)
    merged = experts_of(Base(trained / "pipeline"))
    assert same(experts_of(base), merged) and not same(merged, experts_of(Base(pair)))
    inside(trained, "export.py", "run=high,low", f"out={layout}", f"layout={layout}")
    assert same(experts_of(base), merged) and not list(out.rglob("*-00001-of-*")), "what is replaced is gone"
    about = read_metadata(base.need("low_noise"))
    assert (about["run"], about["step"], about["adapter"], about["expert"]) == ("low", "2", "lora", "low_noise")
    assert "| low_noise |" in (out / "README.md").read_text()
    where = [f"weights={out}"] if layout != "comfyui" else ["weights=null"]
    parts = [f"parts.{name}={path}" for name, path in singles.items()] if layout == "comfyui" else []
    encoders = [f"parts.{part}={pair / part}" for part in ("vae", "text_encoder", "tokenizer")]
    more = [] if layout == "diffusers" else encoders
    run = ("expert=low_noise", f"run=on_{layout}", "steps=1", "batch_size=2", "adapter=lora")
    said = inside(trained, "train.py", *tiny.train, *where, *parts, *more, *run).stdout
    assert "low_noise starts from" in said


def test_only_written_parts_fetched(trained, pair, call, tmp_path, monkeypatch):
    """An export fetches only the parts that it writes: the encoders for a pipeline alone, 11 GB less elsewhere."""
    asked = []
    monkeypatch.setattr(bases, "_fetch", lambda name, revision, wanted: asked.append(set(wanted)) or pair)
    shutil.copytree(trained / "runs", tmp_path / "runs")
    for config in tmp_path.glob("runs/*/config.yaml"):
        config.write_text(config.read_text().replace(f"weights: {pair}", "weights: owner/name"))
    call("export.py", "run=high,low", "out=one", "layout=comfyui")
    call("export.py", "run=high,low", "weights=owner/name", "out=two", "layout=official")
    encoders = {"vae", "text_encoder", "tokenizer"}
    assert asked and not any(wanted & encoders for wanted in asked)
    call("export.py", "run=high,low", "out=three")
    assert any(wanted >= encoders for wanted in asked)


@pytest.mark.parametrize("dialect", ["comfyui", "diffusers", "kohya"])
def test_lora_dialects(dialect, trained, pair, inside, call):
    """The LoRA of a run is exported in every dialect, and converting it back gives the same layers."""
    inside(trained, "export.py", "run=high,low", f"out=as_{dialect}", f"lora.dialect={dialect}")
    file = trained / f"as_{dialect}" / "lora" / "low_low_noise.safetensors"
    lora, own = read_lora(file), read_lora(trained / "pipeline" / "lora" / "low_low_noise.safetensors")
    assert lora.dialect == dialect and (lora.metadata["expert"], lora.metadata["run"]) == ("low_noise", "low")
    assert (lora.metadata["rank"], lora.metadata["alpha"]) == ("4", "8")
    assert lora.layers.keys() == own.layers.keys() and len(own.layers) == 20
    assert all(torch.equal(lora.layers[name].up, own.layers[name].up) for name in own.layers)
    inside(trained, "export.py", f"lora.low_noise={file}", f"out=back_from_{dialect}")
    back = read_lora(trained / f"back_from_{dialect}" / "low_low_noise_comfyui.safetensors")
    assert back.dialect == "comfyui" and back.layers["blocks.0.ffn.0"].alpha == 8


def test_partial_lora_kohya_note(trained, inside):
    """A LoRA of only some layers in kohya's dialect comes with a note that diffusers will refuse it."""
    file = trained / "pipeline" / "lora" / "low_low_noise.safetensors"
    whole = inside(trained, "export.py", f"lora.low_noise={file}", "lora.dialect=kohya", "out=whole").stdout
    layers = {name: layer for name, layer in read_lora(file).layers.items() if "attn" in name}
    write_lora(trained / "attention.safetensors", layers)
    part = inside(trained, "export.py", "lora.low_noise=attention.safetensors", "lora.dialect=kohya", "out=part").stdout
    assert "diffusers will refuse it" in part and "refuse" not in whole


def test_lora_merge(trained, pair, inside):
    """LoRA files are merged into weights at their scale; a file of the other expert is refused."""
    files = [f"lora.{name}={trained}/pipeline/lora/{name[:-6]}_{name}.safetensors" for name in EXPERTS]
    inside(trained, "export.py", f"weights={pair}", *files, "out=merged", *MODEL)
    assert same(experts_of(Base(trained / "merged")), experts_of(Base(trained / "pipeline")))
    about = read_metadata(trained / "merged" / "transformer")
    assert about["merged"] == "high_high_noise.safetensors"
    inside(trained, "export.py", f"weights={pair}", *files, "lora.scale=0", "out=untouched", *MODEL)
    assert same(experts_of(Base(trained / "untouched")), experts_of(Base(pair)))
    swapped = [f"lora.{name}={trained}/pipeline/lora/{name[:-6]}_{name}.safetensors" for name in EXPERTS]
    swapped = [swapped[0].replace("lora.high", "lora.low")]
    error = inside(trained, "export.py", f"weights={pair}", *swapped, "out=wrong", *MODEL, check=False).error
    assert "lora.low_noise=" in error and "high_noise" in error and "not for low_noise" in error
    assert not (trained / "wrong").exists()


def test_own_lora_at_half_strength(trained, pair, inside, call, tmp_path):
    """lora.scale is the strength of a run's own LoRA in what is exported, in the LoRA beside it, and in a video."""
    inside(trained, "export.py", "run=high,low", "lora.scale={low_noise: 0.5}", "out=half")
    base, full, half = (
        Base(folder).transformer("low_noise") for folder in (pair, trained / "pipeline", trained / "half")
    )
    for (name, before), after, made in zip(base.named_parameters(), full.parameters(), half.parameters(), strict=True):
        torch.testing.assert_close(made, (before + after) / 2, atol=1e-6, rtol=0, msg=name)
    assert read_metadata(trained / "half" / "transformer_2")["merged"] == "run low x 0.5"
    files = [trained / folder / "lora" / "low_low_noise.safetensors" for folder in ("pipeline", "half")]
    own, halved = (read_lora(file).layers["blocks.0.ffn.0"].change() for file in files)
    torch.testing.assert_close(halved, own / 2)
    small = ("height=32", "width=32", "num_frames=5", "steps=2", *MODEL, "prompt=a ring")
    runs = ("run=high,low", f"runs={trained / 'runs'}", *small)
    for scale in (1, 0.5, 0, -1):
        call("sample.py", *runs, f"lora.scale={scale}", f"out=at_{scale}")
    call("sample.py", f"weights={pair}", *small, "out=base")
    videos = {path.parent.name: path.read_bytes() for path in tmp_path.glob("*/*.mp4")}
    assert len(videos) == 5 and videos["at_0"] == videos["base"] and len(set(videos.values())) == 4


@pytest.mark.parametrize("overwrite", ["false", "true"])
def test_export_into_what_it_reads(overwrite, trained, pair, inside, tmp_path):
    """No export goes into the folder that it reads, though an earlier export made it; nor into a foreign pipeline."""
    more = (f"overwrite={overwrite}", *MODEL)
    inside(trained, "export.py", f"weights={pair}", *MODEL, f"out={tmp_path / 'source'}")
    shutil.copytree(pair, tmp_path / "foreign", ignore=shutil.ignore_patterns("wantrain_export.json"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    source = f"weights={tmp_path / 'source'}"
    for out in ("source", "source/transformer/new"):
        error = inside(
            trained, "export.py", source, f"out={tmp_path / out}", "layout=official", *more, check=False
        ).error
        assert "which is read; give a new or empty folder" in error
    error = inside(trained, "export.py", source, f"out={tmp_path / 'foreign'}", *more, check=False).error
    assert "holds something else" in error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("layout", ["comfyui", "official"])
def test_foreign_models_folder(layout, trained, inside):
    """export.py never writes into a folder of other models, such as ComfyUI's models/ with its diffusion_models/."""
    models = trained / f"ComfyUI_{layout}"
    other = models / ("diffusion_models/flux.safetensors" if layout == "comfyui" else "low_noise_model/config.json")
    other.parent.mkdir(parents=True)
    other.write_text("precious")
    (models / "config.json").write_text("{}")
    error = inside(trained, "export.py", "run=high,low", f"out={models.name}", f"layout={layout}", check=False).error
    assert (
        f"out={models.name} holds something else (no wantrain_export.json in it); give a new or empty folder" in error
    )
    assert other.read_text() == "precious" and len([path for path in models.rglob("*") if path.is_file()]) == 2


def test_lora_of_other_expert(trained, inside):
    """A LoRA file whose metadata name the other expert is not converted."""
    file = trained / "pipeline" / "lora" / "low_low_noise.safetensors"
    error = inside(trained, "export.py", f"lora.high_noise={file}", "out=mislabelled", check=False).error
    assert f"lora.high_noise={file}" in error and "low_noise" in error and "not for high_noise" in error
    assert not (trained / "mislabelled").exists()


def test_official_to_diffusers_pipeline(trained, pair, inside, tmp_path):
    """A folder in the official layout becomes a pipeline that diffusers loads and runs."""
    inside(trained, "export.py", f"weights={pair}", "layout=official", "out=official_pair", *MODEL)
    encoders = [f"parts.{part}={pair / part}" for part in ("vae", "text_encoder", "tokenizer")]
    inside(trained, "export.py", "weights=official_pair", *encoders, "out=opened", "dtype=bf16", *MODEL)
    pipe = WanPipeline.from_pretrained(trained / "opened", torch_dtype=torch.float32)
    assert pipe.config.boundary_ratio == 0.875 and pipe.scheduler.config.flow_shift == 3.0
    frames = pipe("a red ring", height=32, width=48, num_frames=5, num_inference_steps=2, output_type="np").frames
    assert np.isfinite(frames).all() and frames.std() > 0
    if torch.cuda.is_available():
        pipe.enable_model_cpu_offload()
        pipe("a red ring", height=32, width=48, num_frames=5, num_inference_steps=2)


def test_lora_file_as_init(trained, tiny, pair, inside):
    """Training continues from a LoRA file with its layers, rank and alpha."""
    file = trained / "as_kohya_start.safetensors"
    inside(trained, "export.py", "run=high,low", "out=for_start", "lora.dialect=kohya")
    file = trained / "for_start" / "lora" / "low_low_noise.safetensors"
    run = ("expert=low_noise", f"weights={pair}", "batch_size=2", "adapter=lora", f"adapter.init={file}", "run=further")
    said = inside(trained, "train.py", *tiny.train, *run, "steps=1", "optimizer.lr=1e-9").stdout
    assert f"the adapter goes on from {file}: 20 layers, rank 4, alpha 8" in said
    adapter = trained / "runs" / "further" / "checkpoints" / "step_000001" / "adapter.safetensors"
    was, now = read_lora(file), read_lora(adapter)
    assert (now.metadata["rank"], now.metadata["alpha"]) == ("4", "8.0")
    for name, layer in was.layers.items():
        torch.testing.assert_close(now.layers[name].up, layer.up, atol=1e-6, rtol=0)
    other = [part.replace("low_noise", "high_noise") if part.startswith("expert") else part for part in run[:-1]]
    error = inside(trained, "train.py", *tiny.train, *other, "run=x", "steps=1", check=False).error
    assert f"adapter.init={file} was trained for low_noise, not for high_noise" in error


ALL = ("adapter.rank=3", "adapter.targets=all", "adapter.rank_stabilized=true", "adapter.rank_pattern={ffn: 5}")


@pytest.mark.parametrize(
    ("adapter", "more"), [("lora", ALL), pytest.param("dora", (), marks=pytest.mark.slow), ("dora", ALL)]
)
def test_adapters_end_to_end(adapter, more, trained, tiny, pair, inside, tmp_path):
    """LoRA and DoRA adapters of all layers are merged, exported, sampled and loaded by diffusers."""
    run = ("expert=low_noise", f"weights={pair}", "run=r", "steps=3", "batch_size=2", "optimizer.lr=3e-2")
    inside(tmp_path, "train.py", *tiny.train, *run, f"adapter={adapter}", *more)
    stored = read_lora(tmp_path / "runs" / "r" / "checkpoints" / "step_000003" / "adapter.safetensors")
    assert stored.is_dora == (adapter == "dora") and len(stored.layers) == (26 if more else 20)
    unmerged = Base(pair).transformer("low_noise")
    adapters.inject_lora(unmerged, stored, seed=0)
    said = inside(tmp_path, "export.py", "run=r", "out=out", "lora.dialect=diffusers").stdout
    assert "note" not in said
    wanted, merged = answer(unmerged), answer(Base(tmp_path / "out").transformer("low_noise"))
    assert (
        (merged - wanted).abs().max() < 1e-5 < 0.01 < (answer(Base(pair).transformer("low_noise")) - wanted).abs().max()
    )
    (file,) = (tmp_path / "out" / "lora").iterdir()
    pipe = WanPipeline.from_pretrained(pair, torch_dtype=torch.float32)
    pipe.load_lora_weights(file.parent, weight_name=file.name, load_into_transformer_2=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        noise, text = torch.randn(1, 16, 2, 4, 6, generator=generator), torch.zeros(1, 512, 64)
        theirs = pipe.transformer_2(noise, torch.tensor([31.0]), text, return_dict=False)[0]
    assert (theirs - wanted).abs().max() < 3e-5
    inside(tmp_path, "export.py", f"weights={pair}", f"lora.low_noise={file}", "out=again", *MODEL)
    assert torch.equal(answer(Base(tmp_path / "again").transformer("low_noise")), merged)
    said = inside(tmp_path, "export.py", f"lora.low_noise={file}", "out=converted").stdout
    assert ("ComfyUI divides by the" in said) == stored.is_dora
    assert "diffusers takes those as lora.dialect=diffusers" in said
    size = ("num_frames=5", "height=32", "width=48", "steps=1", "prompt=a ring")
    inside(tmp_path, "sample.py", "run=r", *size)
    assert len(list((tmp_path / "samples").glob("*.mp4"))) == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_partial_training_export(precision, tiny, pair, inside, tmp_path):
    """The export of a partly trained expert holds its trained layers; all other tensors are the base's."""
    run = ("expert=low_noise", f"weights={pair}", "run=r", "steps=2", "batch_size=2", f"precision={precision}")
    part = ("adapter=partial", "adapter.layers=1", "adapter.tags=[ffn,head]")
    inside(tmp_path, "train.py", *tiny.train, *run, *part)
    checkpoint = tmp_path / "runs" / "r" / "checkpoints" / "step_000002" / "transformer_2"
    about = read_metadata(checkpoint)
    assert (about["layers"], about["tags"]) == ("1", "['ffn', 'head']")
    inside(tmp_path, "export.py", "run=r", "out=out")
    was, held, now = (read_tensors(path / "transformer_2") for path in (pair, checkpoint.parent, tmp_path / "out"))
    trained = {"scale_shift_table", "proj_out.weight", "proj_out.bias"} | {
        f"blocks.1.ffn.net.{layer}.{end}" for layer in ("0.proj", "2") for end in ("weight", "bias")
    }
    assert {key for key in was if not torch.equal(held[key].float(), was[key].float())} >= trained
    assert {held[key].dtype for key in trained} == {torch.float32}
    for key in was.keys() - trained:
        # A frozen weight lies in memory, and so in the checkpoint, as the run computes with it.
        half = held[key].dtype == torch.bfloat16
        assert half <= (precision == "bf16") and torch.equal(held[key], was[key].to(held[key].dtype))
        assert torch.equal(now[key], held[key].float())
    assert {key for key in held if held[key].dtype == torch.bfloat16} == (
        set() if precision == "fp32" else {key for key in was.keys() - trained if not is_island(key)}
    )


def is_island(key):
    """True for what Wan computes in float32: time, modulations, norms, head (names of the diffusers layout)."""
    return any(part in key for part in ("time_embedder", "time_proj", "scale_shift_table", "norm", "proj_out"))


def test_lora_file_as_dora_init(trained, tiny, pair, inside, tmp_path):
    """A LoRA file is refused as the start of a DoRA."""
    file = trained / "pipeline" / "lora" / "low_low_noise.safetensors"
    run = ("expert=low_noise", f"weights={pair}", "adapter=dora", f"adapter.init={file}")
    error = inside(tmp_path, "train.py", *tiny.train, *run, check=False).error
    assert f"adapter.init={file} was trained with adapter=lora; give that, not adapter=dora" in error


def test_inspect(trained, call):
    """inspect= prints dialect, expert, rank, alpha, layers and size; a missing path is an error."""
    said = call("export.py", f"inspect={trained / 'pipeline' / 'lora' / 'low_low_noise.safetensors'}").stdout
    for line in (
        "dialect   comfyui",
        "expert    low_noise",
        "rank      4",
        "alpha     8",
        "20 in blocks 0 to 1",
        "size",
    ):
        assert line in said
    said = call("export.py", f"inspect={trained / 'pipeline' / 'transformer_2'}").stdout
    assert "expert    low_noise" in said and "dialect   diffusers" in said and "says      run: low" in said
    assert "inspect=nothing does not exist" in call("export.py", "inspect=nothing", check=False).error
    assert "give out=PATH" in call("export.py", "run=r", check=False).error


def test_fp16_export_of_merged_expert(trained, inside):
    """A merged expert in fp16 keeps its float32 parts and stays near the float32 export."""
    inside(trained, "export.py", "run=high,low", "out=half16", "dtype=fp16", "layout=comfyui")
    tensors = read_tensors(trained / "half16" / "diffusion_models" / "half16_low_noise.safetensors")
    assert tensors["blocks.0.ffn.0.weight"].dtype == torch.float16
    assert tensors["head.modulation"].dtype == torch.float32
    loaded = load_transformer(trained / "half16" / "diffusion_models" / "half16_low_noise.safetensors", like=SIZE)
    assert (answer(loaded) - answer(Base(trained / "pipeline").transformer("low_noise"))).abs().max() < 1e-2
