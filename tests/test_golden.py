"""Files that an earlier version wrote still load: latent and video folders, runs of every adapter, LoRA files.

tests/golden/README.md says what they are and how they were made. Where a file no longer loads as it is, the error must
name the one command that converts it, and after that command everything here must hold. So these tests go through the
commands; where a setting gets another name, only the words typed below change, never the files.
"""

import json
import re
import shlex
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from wantrain.data import LatentData
from wantrain.models import WanVAE
from wantrain.models.text import TextEncoder

GOLDEN = Path(__file__).resolve().parent / "golden"
BASE = "base/diffusion_models/base_dense.safetensors"
MICRO = (
    "model.transformer.num_attention_heads=1",
    "model.transformer.attention_head_dim=8",
    "model.transformer.ffn_dim=16",
    "model.transformer.num_layers=1",
)
MASK_TYPES = {"image": 1.0, "boxes": {"weight": 0.5, "variants": 2}}
#: What every run is continued with. Other settings of validation and safeguards are free, and are left out here.
SMALL = ("batch_size=2", "data.holdout=0.3", "schedule.warmup=1", "tracker=jsonl", "device=cpu")
MEASURE = ("validation.every=2", "validation.clips=2", "validation.points=2")
PAIR = (f"parts.high_noise={BASE}", f"parts.low_noise={BASE}")
SETS = "data.sets={all: {shards: latents, weight: 0.7}, videos: {shards: latents_i2v, weight: 0.3}}"
#: The words that continue each run.
RUNS = {
    "none": (
        *("model=tiny_i2v", "expert=low_noise", "init=scratch", *MICRO, "data.shards=latents_i2v", *MEASURE),
        *("data.mask_types={image: 1.0, boxes: 1.0}", "optimizer.lr=1e-2"),
    ),
    "lora": (
        *("expert=low_noise", "adapter=lora", "adapter.rank=1", "adapter.alpha=2", "adapter.targets=attention"),
        *("data.shards=latents", "optimizer=other", "optimizer.lr=1.0", "+optimizer.momentum=0.9", *MEASURE),
    ),
    "dora": (
        *("expert=high_noise", "adapter=dora", "adapter.rank=2", "adapter.rank_stabilized=true", *MICRO, PAIR[0]),
        *("data=mixed", SETS, "noise=logit_normal", "optimizer=adafactor", "optimizer.lr=1.0", *MEASURE),
    ),
    "partial": (
        *("model=tiny_ti2v", "expert=dense", "adapter=partial", "adapter.layers=0", *MICRO, f"parts.dense={BASE}"),
        *("adapter.tags=[attention,modulation,head]", "data.shards=latents", "optimizer=muon", "schedule=wsd"),
    ),
    "pair": (
        *("expert=both", "adapter=lora", "adapter.rank=2", "experts.high_noise.rank=4", *MICRO, *PAIR, *MEASURE),
        *("data.shards=latents", "optimizer.lr=1e-2", "ema=0.9"),
    ),
    "vae": (
        *(
            "recipe=wan_tiny_vae_images",
            "model.vae.base_dim=2",
            "model.vae.dim_mult=[1,1]",
            "+model.vae.temperal_downsample=[false]",
            "model.area=1024",
        ),
        *(
            "+model.vae.num_res_blocks=1",
            "data.shards=videos",
            "optimizer=other",
            "+optimizer.momentum=0.9",
            *MEASURE[:2],
        ),
    ),
}


@pytest.fixture
def golden(call, tmp_path):
    """A command in a copy of the golden files (tmp_path); it converts them first where its error asks for that."""
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)

    def run(name, *args):
        ended = call(name, *args, check=False)
        if ended.returncode == 0:
            return ended
        named = re.search(r"python (\w+\.py) ([^\n;`]+)", ended.error)
        assert named, f"old files are refused, and no command is named that converts them: {ended.error}"
        call(named[1], *shlex.split(named[2].rstrip(" .,)")))
        return call(name, *args)

    return run


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def measured(row):
    """What must come out again of a step: losses, and how far validation has moved since step 0."""
    kept = ("loss", "grad_norm", "validation_loss", "validation_change")
    return {"step": row["step"], **{key: value for key, value in row.items() if key.split("/")[-1] in kept}}


def resume(golden, tmp_path, run):
    """Two more steps of a golden run: the rows that it had, those that it has then."""
    before = rows(tmp_path / "runs" / run)
    golden("train.py", f"run={run}", *RUNS[run], *SMALL, f"steps={before[-1]['step'] + 2}")
    return before, rows(tmp_path / "runs" / run)


@pytest.mark.parametrize("run", RUNS)
def test_run_resumes(run, golden, tmp_path):
    expected = json.loads((GOLDEN / "resumed.json").read_text())[run]
    before, after = resume(golden, tmp_path, run)
    assert [row["step"] for row in after] == list(range(after[0]["step"], len(before) + 2 + after[0]["step"]))
    assert after[: len(before)] == before, "a run that continues begins where its checkpoint ended"
    for row, wanted in zip(after[len(before) :], expected, strict=True):
        row, wanted = measured(row), dict(wanted)
        if (
            run == "vae"
        ):  # validation.points was part of its key and is refused now, so the change is from another start
            row.pop("validation_change", None), wanted.pop("validation_change", None)
        assert row.keys() == wanted.keys()
        assert row == {key: pytest.approx(value, rel=1e-4, abs=1e-5) for key, value in wanted.items()}


def test_run_replays(golden, tmp_path):
    """run.json holds the words that were typed; a replay types them again."""
    golden("train.py", "replay=runs/none/run.json", "run=again", "steps=2")
    losses = [
        [row["loss"] for row in rows(tmp_path / "runs" / run) if 0 < row["step"] <= 2] for run in ("none", "again")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(losses[1]) == 2


def linear_layers(file):
    """A LoRA file, whatever its dialect, without our own reader: {layer's name in pieces: its tensors by role}."""
    ends = {
        "lora_A.weight": "down", "lora_down.weight": "down", "lora_B.weight": "up", "lora_up.weight": "up",
        "alpha": "alpha", "dora_scale": "lengths", "lora_magnitude_vector": "lengths",
    }  # fmt: skip
    renamed = {
        "attn1.to": "self_attn",
        "attn2.to": "cross_attn",
        "out.0": "o",
        "ffn.net.0.proj": "ffn.0",
        "ffn.net.2": "ffn.2",
    }
    with safe_open(file, "pt") as opened:
        settings = json.loads(opened.metadata().get("lora_adapter_metadata", "{}"))
    layers = {}
    for key, tensor in load_file(file).items():
        end = next(end for end in ends if key.endswith(end))
        name = re.sub(r"^(diffusion_model\.|transformer\.|lora_unet_)", "", key.removesuffix(f".{end}"))
        for theirs, official in renamed.items():
            name = name.replace(theirs, official)
        layers.setdefault(name.replace("_", "."), {})[ends[end]] = (
            tensor.flatten() if ends[end] == "lengths" else tensor
        )
    for layer in layers.values():
        layer["alpha"] = torch.tensor(float(layer.get("alpha", settings.get("transformer.lora_alpha"))))
    return layers


def same_layers(one, other):
    return one.keys() == other.keys() and all(
        one[name].keys() == other[name].keys()
        and all(torch.equal(one[name][role], other[name][role]) for role in one[name])
        for name in one
    )


def merged_by_hand(weights, layers):
    """The weights, by Wan's own names, with a LoRA or DoRA in them: the definition, in three lines."""
    weights = {key: tensor.float() for key, tensor in weights.items()}
    for key, before in weights.items():
        layer = layers.get(key.removesuffix(".weight").replace("_", "."))
        if layer is not None and key.endswith(".weight"):
            changed = before + layer["alpha"] / len(layer["down"]) * layer["up"] @ layer["down"]
            if "lengths" in layer:
                changed = changed * (layer["lengths"] / changed.norm(dim=1))[:, None]
            weights[key] = changed
    return weights


def close(one, other):
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(tensor.float(), other[key].float(), rtol=1e-5, atol=1e-6, msg=key)
    return True


@pytest.mark.parametrize("dialect", ["comfyui", "diffusers", "kohya"])
@pytest.mark.parametrize("run", ["pair", "dora"])
def test_run_exports_its_lora(run, dialect, golden, tmp_path):
    """The file that a run gives is the one it gave then, and so is the model with it merged."""
    golden("export.py", f"run={run}", *PAIR, "layout=comfyui", f"lora.dialect={dialect}", "out=out")
    wanted = linear_layers(GOLDEN / "loras" / f"{run}_{dialect}.safetensors")
    assert same_layers(linear_layers(tmp_path / "out" / "lora" / f"{run}_high_noise.safetensors"), wanted)
    merged = load_file(tmp_path / "out" / "diffusion_models" / "out_high_noise.safetensors")
    assert close(merged, merged_by_hand(load_file(GOLDEN / BASE), wanted))


@pytest.mark.parametrize("file", sorted(path.stem for path in (GOLDEN / "loras").glob("*.safetensors")))
def test_lora_file_merges(file, golden, tmp_path):
    size = ("weights=null", *MICRO, *PAIR)
    golden("export.py", *size, f"lora.high_noise=loras/{file}.safetensors", "layout=comfyui", "out=out")
    written = {
        name: load_file(tmp_path / "out" / "diffusion_models" / f"out_{name}.safetensors")
        for name in ("high_noise", "low_noise")
    }
    base = load_file(GOLDEN / BASE)
    assert close(written["high_noise"], merged_by_hand(base, linear_layers(GOLDEN / "loras" / f"{file}.safetensors")))
    assert close(written["low_noise"], base)


def test_checkpoint_adapter_merges(golden, tmp_path):
    """The adapter file of a checkpoint merges into wan-tiny."""
    adapter = next((GOLDEN / "runs" / "lora").rglob("adapter.safetensors"))
    file = adapter.relative_to(GOLDEN)
    golden("export.py", "weights=assets/wan-tiny", "layout=comfyui", "out=untouched")
    golden("export.py", "weights=assets/wan-tiny", f"lora.low_noise={file}", "layout=comfyui", "out=out")
    before, after = (
        load_file(tmp_path / name / "diffusion_models" / f"{name}_low_noise.safetensors")
        for name in ("untouched", "out")
    )
    layers = linear_layers(adapter)
    assert len(layers) == 48 and sum(not torch.equal(before[key], after[key]) for key in before) == 48
    assert close(after, merged_by_hand(before, layers))


def test_run_samples(golden, tmp_path):
    golden("sample.py", "run=pair", "prompt=a ring", "steps=2", "num_frames=5", "height=32", "width=32", "out=out")
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 1


@pytest.mark.parametrize("folder", ["latents", "latents_i2v"])
def test_batch_of_a_latent_folder(folder):
    """What training reads: sums of squares of a batch's latents, texts and conditioning."""
    settings = {"mask_types": MASK_TYPES, "conditioning": "channel_concat"} if folder == "latents_i2v" else {}
    data = LatentData(shards=GOLDEN / folder, holdout=0.0, caption_dropout=0.0, **settings)
    expected = json.loads((GOLDEN / "batches.json").read_text())[folder]
    samples = [number for number, name in enumerate(data.bucket_names) if name == "9x32x32"]
    batch = data.load(samples, range(len(samples)))
    found = {
        "latents": batch.latents_BCTHW,
        "text": batch.text_BLD,
        "condition": batch.conditioning.get("concat_BCTHW"),
    }
    squares = {name: tensor.double().square().sum().item() for name, tensor in found.items() if tensor is not None}
    assert squares == {name: pytest.approx(value, rel=1e-6) for name, value in expected["squares"].items()}
    assert list(batch.ids) == expected["ids"] and data.manifest["clips"] == expected["clips"]


@pytest.mark.parametrize("folder", ["latents", "latents_i2v"])
def test_encode_finds_everything_done(folder, golden, tmp_path):
    """Not one clip and not one caption is encoded again, and no tar changes."""
    mask_types = "mask_types={image: 1.0, boxes: {weight: 0.5, variants: 2}}"
    more = ("model=tiny_i2v", mask_types, "rejects.limit=0.5") if folder == "latents_i2v" else ("shard_clips=8",)
    before = {tar.name: tar.read_bytes() for tar in (tmp_path / folder).glob("*.tar")}
    never = {"side_effect": AssertionError("everything is there already")}
    with mock.patch.object(WanVAE, "encode", **never), mock.patch.object(TextEncoder, "encode_unpadded", **never):
        golden("encode.py", "shards=videos", f"out={folder}", "area=1024", "report=none", *more)
    assert {tar.name: tar.read_bytes() for tar in (tmp_path / folder).glob("*.tar")} == before
    assert "all as written" in golden("encode.py", f"out={folder}", "check=true").stdout


def test_shard_finds_everything_done(golden, tmp_path):
    """The video shards too: no footage is cut again."""
    before = {tar.name: tar.read_bytes() for tar in (tmp_path / "videos").glob("*.tar")}
    more = ("num_frames=9", "clips=first", "rejects.limit=0.5", "report=none")
    golden("shard.py", "source=footage", "out=videos", *more)
    assert {tar.name: tar.read_bytes() for tar in (tmp_path / "videos").glob("*.tar")} == before
