"""The way through the house: footage -> shards -> latents -> both experts -> videos -> files that others load."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_video
from PIL import Image
from safetensors.torch import save_file

from wantrain import flow
from wantrain.data import PixelData
from wantrain.demo.footage import make_footage
from wantrain.geometry import Bucket
from wantrain.models import Base, WanVAE, load_text_encoder, load_transformer, load_vae
from wantrain.models.formats.base import PARTS
from wantrain.models.formats.weights import fingerprint, read_file, read_metadata, read_tensors, write_part
from wantrain.sampling import Settings
from wantrain.sampling.build import build_sampler
from wantrain.sampling.generate import Experts, Texts, generate
from wantrain.video import to_frames

PROMPT = "a red circle moving right on a dark background"
SMALL_5B = {"num_attention_heads": 2, "attention_head_dim": 32, "text_dim": 64, "ffn_dim": 64, "num_layers": 2}
#: A small video of the micro model.
SMALL = (
    *("height=32", "width=48", "num_frames=9", "steps=4"),
    *("model.transformer.num_layers=2", "model.transformer.ffn_dim=64", "model.transformer.attention_head_dim=32"),
)


@dataclass(frozen=True)
class Story:
    """A folder with runs high and low, trained from `pair` for three steps, and their export."""

    folder: Path
    pipeline: Path

    def checkpoint(self, run):
        return self.folder / "runs" / run / "checkpoints" / "step_000003"


def told(tiny, pair, inside, folder, *more):
    """Train both experts from `pair` and export them."""
    for name in ("high", "low"):
        command = (f"expert={name}_noise", f"run={name}", f"weights={pair}", "steps=3", "batch_size=4", *more)
        inside(folder, "train.py", *tiny.train, *command)
    inside(folder, "export.py", "run=high,low", "out=pipeline")
    return Story(folder, folder / "pipeline")


@pytest.fixture(scope="module")
def story(tiny, pair, inside, tmp_path_factory):
    return told(tiny, pair, inside, tmp_path_factory.mktemp("story"), "optimizer.lr=1e-3")


@pytest.fixture(scope="module")
def loras(tiny, pair, inside, tmp_path_factory):
    lora = ("adapter=lora", "adapter.rank=4", "adapter.alpha=8", "optimizer.lr=1e-2")
    return told(tiny, pair, inside, tmp_path_factory.mktemp("loras"), *lora)


def frames_of(folder):
    return [iio.imread(path) for path in sorted(folder.glob("*.mp4"))]


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_diffusers_pipeline_parity(story, guidance, tmp_path):
    """diffusers' published example runs on the exported pair, and our sampler gives the same latents and frames."""
    seen = []

    def note(pipe, step, timestep, values):
        seen.append((int(timestep), values["latents"].clone()))
        return values

    # The published example, with path, sizes and dtype changed.
    pipe = WanPipeline.from_pretrained(story.pipeline, torch_dtype=torch.float32)
    output = pipe(
        prompt=PROMPT,
        height=32,
        width=48,
        num_frames=9,
        num_inference_steps=4,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(7),
        callback_on_step_end=note,
    ).frames[0]
    export_to_video(output, str(tmp_path / "output.mp4"), fps=16)
    assert iio.imread(tmp_path / "output.mp4").shape == (9, 32, 48, 3)

    vae, text, trace = load_vae(story.pipeline), load_text_encoder(story.pipeline), []
    experts = {name: load_transformer(story.pipeline, part=PARTS[name]) for name in ("high_noise", "low_noise")}
    ours = generate(
        Experts(experts, boundary=pipe.config.boundary_ratio),
        latents=torch.randn((1, 16, 3, 4, 6), generator=torch.Generator().manual_seed(7)),
        texts=Texts(text([PROMPT]), text([""])),
        sigmas=pipe.scheduler.sigmas,
        guidance={"high_noise": guidance, "low_noise": guidance},
        on_step=lambda step, name: trace.append(name),
    )
    assert trace == ["high_noise", "high_noise", "low_noise", "low_noise"]
    timesteps = [timestep for timestep, _ in seen]
    assert flow.sampling_timesteps(pipe.scheduler.sigmas).tolist() == timesteps == [999, 900, 750, 500]
    theirs = seen[-1][1]
    assert theirs.std() > 0.3, "experts that answer nothing would prove nothing"
    assert (ours - theirs).abs().max() < 1e-4
    decoded = to_frames(vae.decode(ours)[0])
    assert np.abs(decoded.astype(float) - 255 * output).max() <= 2
    assert decoded.std() > 1


def test_export_weights_and_metadata(story, pair):
    """Exported tensors equal the checkpoint's, and their metadata name expert, model and boundary."""
    index = json.loads((story.pipeline / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline" and index["boundary_ratio"] == 0.875
    for run, part in (("high", "transformer"), ("low", "transformer_2")):
        exported, trained, base = (
            read_tensors(folder / part) for folder in (story.pipeline, story.checkpoint(run), pair)
        )
        assert exported.keys() == trained.keys() == base.keys()
        assert all(torch.equal(exported[key], trained[key]) for key in trained)
        said = read_metadata(story.checkpoint(run) / part)
        assert (said["expert"], said["model"], said["boundary"]) == (f"{run}_noise", "tiny", "0.875")
        assert said["made_by"].startswith("wantrain ")
        assert not any(torch.equal(trained[key], base[key]) for key in trained if key.endswith("to_v.weight"))
    for part in ("vae", "text_encoder", "tokenizer"):
        for file in (pair / part).iterdir():
            assert (story.pipeline / part / file.name).read_bytes() == file.read_bytes()


def test_bf16_export_fp32_parts(story, inside):
    """A bf16 export keeps in float32 the parameters that Wan keeps in float32."""
    inside(story.folder, "export.py", "run=high,low", "out=half", "dtype=bf16")
    tensors = read_tensors(story.folder / "half" / "transformer")
    kept = {key for key, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert {"scale_shift_table", "proj_out.weight", "condition_embedder.time_proj.bias", "blocks.1.norm2.bias"} <= kept
    assert tensors["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16
    pipe = WanPipeline.from_pretrained(story.folder / "half", torch_dtype=torch.bfloat16)
    for name, parameter in pipe.transformer.named_parameters():
        assert (parameter.dtype == torch.float32) <= (name in kept), name


def test_sampling_repeats(story, inside):
    """Two calls give the same files, and so do a pair of runs and their exported pipeline."""
    for out, source in (("one", "run=high,low"), ("two", "run=high,low"), ("files", "weights=pipeline")):
        inside(story.folder, "sample.py", source, f"prompt={PROMPT}", f"out={out}", "count=2", *SMALL)
    kinds = [("000_seed_0_", ".json"), ("000_seed_0_", ".mp4"), ("001_seed_1_", ".json"), ("001_seed_1_", ".mp4")]
    files = {out: sorted(path for path in (story.folder / out).iterdir()) for out in ("one", "two", "files")}
    for paths in files.values():
        assert [(path.name[:11], path.suffix) for path in paths[:4]] == kinds
        assert [path.name for path in paths[4:]] == ["contact_sheet.png", "index.html"]
    assert [path.name for path in files["one"]] == [path.name for path in files["two"]]
    for one, two, from_files in zip(*files.values(), strict=True):
        content = one.read_bytes()
        assert two.read_bytes() == content or one.suffix == ".html"  # which names its folder
        assert from_files.read_bytes() == content or one.suffix != ".mp4"
    first, second = frames_of(story.folder / "one")
    assert not np.array_equal(first, second), "another seed must give another video"


def test_video_format_and_contact_sheet(story, inside):
    """Videos are H.264 in yuv420p with the index first; the contact sheet shows each of them."""
    (story.folder / "prompts.txt").write_text(f"{PROMPT}\n\n一只猫，在草地上奔跑。\n")
    inside(story.folder, "sample.py", "weights=pipeline", "prompts=prompts.txt", "out=seen", "solver=euler", *SMALL)
    files = sorted((story.folder / "seen").glob("*.mp4"))
    assert [path.name[:11] for path in files] == ["000_seed_0_", "001_seed_0_"]
    for file in files:
        with av.open(str(file)) as container:
            (stream,) = container.streams
            assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
            assert (stream.width, stream.height, stream.average_rate) == (48, 32, 16)
            assert sum(1 for _ in container.decode(stream)) == 9
        content = file.read_bytes()
        assert content.index(b"moov") < content.index(b"mdat"), "the index must come first, to play while loading"
    with Image.open(story.folder / "seen" / "contact_sheet.png") as sheet:
        assert sheet.size == (8 * (192 + 2), 2 * (128 + 18))


def test_negative_prompt_and_guidance(story, inside):
    """Negative prompt and guidance change the video; at scale 1 the negative prompt has no effect."""

    def video(out, *more):
        inside(story.folder, "sample.py", "weights=pipeline", f"prompt={PROMPT}", f"out={out}", *SMALL, *more)
        return frames_of(story.folder / out)[0]

    plain = video("plain")
    assert not np.array_equal(plain, video("other", "negative_prompt=blurry, dark"))
    assert not np.array_equal(plain, video("stronger", "guidance.low_noise=5"))
    scale_one = ("guidance.high_noise=1", "guidance.low_noise=1")
    assert np.array_equal(
        video("scale_one", *scale_one), video("scale_one_negative", *scale_one, "negative_prompt=blurry")
    )


def test_exported_loras_in_diffusers(loras, pair):
    """diffusers loads the exported LoRA files, and its outputs equal those of our merged experts."""
    latents = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    text = load_text_encoder(pair)([PROMPT])
    timestep = torch.tensor([20.0])  # small: diffusers takes the sines of its time embedding in float32
    pipe = WanPipeline.from_pretrained(pair, torch_dtype=torch.float32)
    before = {
        name: getattr(pipe, PARTS[name])(latents, timestep, text).sample.detach()
        for name in ("high_noise", "low_noise")
    }
    for run, part in (("high", "transformer"), ("low", "transformer_2")):
        file = loras.pipeline / "lora" / f"{run}_{run}_noise.safetensors"
        tensors, about = read_file(file)
        assert about["expert"] == f"{run}_noise" and about["boundary"] == "0.875"
        assert all(key.startswith("diffusion_model.blocks.") for key in tensors)
        pipe.load_lora_weights(file.parent, weight_name=file.name, load_into_transformer_2=part == "transformer_2")
    for name in ("high_noise", "low_noise"):
        theirs = getattr(pipe, PARTS[name])(latents, timestep, text).sample.detach()
        merged = load_transformer(loras.pipeline, part=PARTS[name])(latents, timestep, text).detach()
        assert (theirs - before[name]).abs().max() > 1e-2, "the adapter must change something"
        assert (theirs - merged).abs().max() < 1e-5


def test_sampling_with_lora_files(loras, pair, inside):
    """LoRA files over the base give the video of the merged pipeline; at scale 0 they give the base's."""
    folder, files = loras.folder, loras.pipeline / "lora"
    both = [f"lora.{run}_noise={files / f'{run}_{run}_noise.safetensors'}" for run in ("high", "low")]

    def video(out, *source):
        inside(folder, "sample.py", *source, f"prompt={PROMPT}", f"out={out}", *SMALL)
        return frames_of(folder / out)[0]

    merged = video("merged", f"weights={loras.pipeline}")
    assert np.array_equal(video("files", f"weights={pair}", *both), merged)
    assert np.array_equal(video("runs", "run=high,low"), merged)
    base = video("base", f"weights={pair}")
    assert np.array_equal(video("nothing", f"weights={pair}", *both, "lora.scale=0"), base)
    assert not np.array_equal(base, merged)


def test_export_run_with_base_expert(story, pair, inside):
    """The export of one run takes the other expert from the base."""
    inside(story.folder, "export.py", "run=low", "out=mixed")
    for part, source in (("transformer", pair), ("transformer_2", story.checkpoint("low"))):
        mixed, wanted = (read_tensors(folder / part) for folder in (story.folder / "mixed", source))
        assert all(torch.equal(mixed[key], wanted[key]) for key in wanted)


def test_dense_model(tiny, call, tmp_path):
    """A dense model is sharded, encoded, trained, exported and sampled by the same commands."""
    dense = ("model=tiny_dense",)
    call("shard.py", *dense, f"source={tiny.footage}", "out=videos", "num_frames=5", "clips=first")
    call("encode.py", *dense, "shards=videos", "out=latents", f"weights={tiny.base}", "area=1024")
    data = "data.shards=latents"
    call("train.py", *tiny.train, *dense, "expert=dense", data, "steps=2", "batch_size=2")
    call("export.py", "run=tiny_dense_dense_none", "out=pipeline")
    pipe = WanPipeline.from_pretrained(tmp_path / "pipeline", torch_dtype=torch.float32)
    assert pipe.transformer_2 is None and pipe.config.boundary_ratio is None
    call("sample.py", *dense, "weights=pipeline", "prompt=a ring", *SMALL)
    assert frames_of(tmp_path / "samples")[0].shape == (9, 32, 48, 3)


def test_ti2v_5b_with_vae_2_2(tiny, call, tmp_path):
    """model=ti2v_5b runs through the same commands as text-to-video.

    The VAE is 4x16x16 with 48 channels; only the sizes are smaller.
    """
    torch.manual_seed(0)
    vae = WanVAE(base_dim=6, decoder_base_dim=10, z_dim=48, is_residual=True, patch_size=2)
    write_part(tmp_path / "base" / "vae", vae.config(), vae.state_dict())
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(tiny.base / part, tmp_path / "base" / part)
    make_footage(tmp_path / "footage", num_videos=4, num_images=1, size=64)
    model = ("model=ti2v_5b", "weights=base")
    small = [f"model.transformer.{key}={value}" for key, value in SMALL_5B.items()]
    call("shard.py", "model=ti2v_5b", "source=footage", "out=videos", "num_frames=9", "clips=first")
    call("encode.py", *model, "shards=videos", "out=latents", "area=4096", "precision=fp32")
    run = ("expert=dense", "init=scratch", "data.shards=latents", "steps=2", "batch_size=2", "tracker=jsonl")
    said = call("train.py", *model, *small, *run, "run=five", "precision=fp32", "dry_run=true").stdout
    assert "tokens per sample   9x64x64: 3 x 2 x 2 = 12 " in said, "a token is 32 pixels a side"
    call("train.py", *model, *small, *run, "run=five", "precision=fp32")
    call("export.py", "run=five", "out=pipeline", "model=ti2v_5b")
    pipe = WanPipeline.from_pretrained(tmp_path / "pipeline", torch_dtype=torch.float32)
    assert pipe.config.expand_timesteps and pipe.transformer_2 is None and pipe.vae.config.z_dim == 48
    assert pipe.scheduler.config.flow_shift == 5.0
    video = ("prompt=a ring", "height=64", "width=96", "num_frames=5", "steps=2", "precision=fp32")
    call("sample.py", "model=ti2v_5b", *small, "weights=pipeline", *video)
    assert frames_of(tmp_path / "samples")[0].shape == (5, 64, 96, 3)
    wrong = call("sample.py", "model=ti2v_5b", *small, "weights=pipeline", *video[:1], "height=48", check=False).error
    assert "height and width go together" in wrong
    wrong = call(
        "sample.py", "model=ti2v_5b", *small, "weights=pipeline", "prompt=x", "height=48", "width=64", check=False
    )
    assert "must be multiples of 32" in wrong.error


@pytest.mark.parametrize("recipe", ["wan_tiny_vae_images", "wan_tiny_vae"])
def test_vae_export_statistics(recipe, tiny, call, tmp_path):
    """A trained VAE is exported with its own latent statistics, which normalise its latents."""
    start = ["model.vae.base_dim=4"] if recipe == "wan_tiny_vae_images" else [f"weights={tiny.base}"]
    size = ("steps=3", "batch_size=2", "model.area=1024")
    call("train.py", f"recipe={recipe}", *start, *size, "run=vae", "tracker=jsonl", f"data.shards={tiny.videos}")
    call("export.py", "run=vae", "out=made")
    vae, trained = load_vae(tmp_path / "made"), load_vae(tmp_path / "runs" / "vae" / "checkpoints" / "step_000003")
    for key, tensor in trained.state_dict().items():
        assert torch.equal(vae.state_dict()[key], tensor.half().float())
    assert vae.latents_mean != trained.latents_mean
    data = PixelData(shards=tiny.videos, num_frames=9, area=1024, multiple=16)
    latents = torch.cat([vae.encode(data.load([i], [0]).pixels_BCFHW)[0].flatten(1) for i in range(len(data.train))], 1)
    assert latents.mean(1).abs().max() < 0.02 and (latents.std(1) - 1).abs().max() < 0.02


def test_vae_decoder_training(tiny, call, tmp_path):
    """The decoder recipe changes the decoder alone: encoder, statistics and fingerprint stay the same."""
    size = ("steps=2", "batch_size=2", "model.area=1024", "data.num_frames=5", "validation.every=1000")
    data = f"data.shards={tiny.videos}"
    call("train.py", "recipe=wan_tiny_vae_decoder", f"weights={tiny.base}", *size, "run=vae", data)
    call("export.py", "run=vae", "out=made")
    before, after = load_vae(tiny.base), load_vae(tmp_path / "made")
    moved = {k for k, v in after.state_dict().items() if not torch.equal(v, before.state_dict()[k].half().float())}
    assert moved and all(key.startswith(("decoder.", "post_quant_conv.")) for key in moved)
    assert fingerprint(after) == fingerprint(before), "shards encoded with the one are the other's too"
    assert (after.latents_mean, after.latents_std) == (before.latents_mean, before.latents_std)


def test_expert_init_from_part(tiny, pair, call, tmp_path):
    """An expert starts from another model's transformer, as low noise did from Wan2.1, or from random weights.

    The transformer of another part states no boundary.
    """
    pair_as_dense = tmp_path / "wan21" / "transformer"
    shutil.copytree(pair / "transformer", pair_as_dense)
    file = pair_as_dense / "diffusion_pytorch_model.safetensors"
    save_file(read_file(file)[0], file, metadata={"format": "pt"})  # a published file says nothing of itself
    start = load_transformer(pair_as_dense).state_dict()

    def trained(run, *how):
        call(
            "train.py",
            *tiny.train,
            *how,
            f"run={run}",
            "steps=1",
            "batch_size=2",
            "optimizer.lr=1e-9",
        )
        checkpoint = tmp_path / "runs" / run / "checkpoints" / "step_000001"
        return load_transformer(checkpoint, part="transformer_2").state_dict()

    def close(run, wanted):
        return all(torch.allclose(run[key], wanted[key], atol=1e-6) for key in wanted)

    assert close(trained("given", f"parts.low_noise={pair_as_dense}"), start)
    own = load_transformer(pair, part="transformer_2").state_dict()
    assert close(trained("own", f"weights={pair}"), own)
    assert not close(trained("random", f"weights={pair}", "init=scratch"), own)
    wider = "model.transformer.num_attention_heads=2"
    wrong = call("train.py", *tiny.train, wider, f"parts.low_noise={pair_as_dense}", check=False).error
    assert f"{pair_as_dense} holds a transformer of another shape than the chosen model (num_attention" in wrong


def test_sampling_batch_size(pair, call, tmp_path):
    """Videos that are sampled in one batch agree with those that are sampled one at a time."""
    (tmp_path / "prompts.txt").write_text("a red ring\na blue circle moving right on a dark background\n圆形\n")
    for size in (1, 2):
        call("sample.py", f"weights={pair}", "prompts=prompts.txt", f"out=by_{size}", f"batch_size={size}", *SMALL)
    one, two = frames_of(tmp_path / "by_1"), frames_of(tmp_path / "by_2")
    assert len(one) == len(two) == 3
    for alone, together in zip(one, two, strict=True):
        assert np.abs(alone.astype(int) - together).mean() < 0.5  # the codec makes more of a level's difference
    experts = {name: Base(pair).transformer(name) for name in ("high_noise", "low_noise")}
    sampler = build_sampler(experts, boundary=0.875, base=Base(pair))
    how = {"bucket": Bucket(9, 32, 48), "settings": Settings({"high_noise": 2.0, "low_noise": 1.0}, 3.0, steps=4)}
    prompts = ["a red ring", "a blue circle moving right on a dark background", "圆形"]  # of three lengths
    for prompt, seed, frames in zip(prompts, (0, 1, 2), sampler.batch(prompts, seeds=(0, 1, 2), **how), strict=True):
        assert np.abs(sampler(prompt, seed=seed, **how).astype(int) - frames).max() <= 2


def test_manifest_counts(tiny):
    """The counts in both manifests add up: files, clips, rejects and samples."""
    videos, latents = (json.loads((folder / "manifest.json").read_text()) for folder in (tiny.videos, tiny.latents))
    assert videos["files_seen"] == videos["files_used"] + videos["files_rejected"] == 10
    assert latents["clips"] + latents["clips_rejected"] == videos["clips"] >= 10
    assert sum(shard["samples"] for shard in latents["shards"]) == latents["clips"]
