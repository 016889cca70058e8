"""Training with conditioning: from footage to a preview, bit-exact resume, and no task named on the way."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from wantrain.batch import Batch
from wantrain.models.formats.loading import load_transformer
from wantrain.models.formats.weights import read_file
from wantrain.video import read_mp4

ROOT = Path(__file__).resolve().parent.parent.parent
MASK_TYPES = "mask_types={image: 2.0, boxes: 1.0}"


@pytest.fixture(scope="module")
def conditioned(tiny, inside, tmp_path_factory):
    """Latents of the small world with conditioning inputs beside them."""
    folder = tmp_path_factory.mktemp("conditioned")
    inside(folder, "shard.py", f"source={tiny.footage}", "out=videos", "num_frames=9", "model=tiny_i2v")
    weights = f"weights={tiny.base}"
    inside(folder, "encode.py", "shards=videos", "out=latents", weights, "area=1024", "model=tiny_i2v", MASK_TYPES)
    return folder / "latents"


@pytest.fixture
def train(tiny, pair, conditioned, call):
    def run(*more, check=True, model="tiny_i2v", mask_types=MASK_TYPES):
        own = [setting for setting in tiny.train if not setting.startswith(("weights=", "data.shards="))]
        common = ("batch_size=4", "data.holdout=0.3", "schedule=constant", f"data.{mask_types}")
        settings = (f"model={model}", f"weights={pair}", f"data.shards={conditioned}", *own, *common)
        return call("train.py", *settings, "init=expand_input_channels", "run=r", *more, check=check)

    return run


def trained(tmp_path, step):
    folder = tmp_path / "runs" / "r" / "checkpoints" / f"step_{step:06d}"
    return {
        f"{path.relative_to(folder)}/{key}": value
        for path in sorted(folder.rglob("*.safetensors"))
        for key, value in read_file(path)[0].items()
    }


def test_expand_input_channels(pair):
    """An expanded model computes what the old one did, whatever the new channels hold; its new weights have a gradient."""
    old = load_transformer(pair, part="transformer_2")
    new = load_transformer(pair, part="transformer_2")
    new.expand_input_channels(36)
    assert new.config()["in_channels"] == 36
    generator = torch.Generator().manual_seed(0)
    x, more, text = (
        torch.randn(shape, generator=generator) for shape in ((2, 16, 3, 4, 4), (2, 20, 3, 4, 4), (2, 5, 64))
    )
    timestep = torch.tensor([100.0, 700.0])
    assert torch.equal(new(x, timestep, text, concat_BCTHW=more), old(x, timestep, text))
    new(x, timestep, text, concat_BCTHW=more).square().sum().backward()
    assert (new.patch_embedding.weight.grad[:, 16:].abs().amax(dim=(0, 2, 3, 4)) > 0).all()
    with pytest.raises(ValueError, match="36 input channels cannot be made one of 16"):
        new.expand_input_channels(16)


def test_resume_is_bit_exact(train, tmp_path):
    train("steps=4", "expert=low_noise", "checkpoint.every=2", "stop_after=2")
    half = trained(tmp_path, 2)
    weight = next(value for key, value in half.items() if key.endswith("patch_embedding.weight"))
    assert weight.shape[1] == 36 and weight[:, 16:].abs().max() > 0, "the new channels have moved"
    train("steps=4", "expert=low_noise", "checkpoint.every=2")
    resumed = trained(tmp_path, 4)
    shutil.rmtree(tmp_path / "runs")
    train("steps=4", "expert=low_noise", "checkpoint.every=2")
    whole = trained(tmp_path, 4)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_preview_takes_heldout_conditioning(train, tmp_path):
    train("steps=1", "expert=low_noise", "sample.every=1", "sample.count=2", "sample.steps=2")
    files = sorted((tmp_path / "runs" / "r" / "samples").glob("*.mp4"))
    assert [file.name for file in files] == [f"step_00000{step}_{number}.mp4" for step in (0, 1) for number in (0, 1)]
    assert {read_mp4(file).shape[0] for file in files} == {9}


def test_bad_settings_refused(train):
    """Wrong settings of conditioning are refused before work starts."""
    for more, said in (
        (
            ("adapter=lora",),
            "init=expand_input_channels with model=tiny_i2v (which has 20 further input channels) and adapter=lora",
        ),
        (("init=base",), "16 against 36"),
        (("sample.prompts=p.txt", "sample.every=1"), "sample.prompts=p.txt: model=tiny_i2v needs a conditioning input"),
    ):
        ended = train("steps=1", "expert=low_noise", *more, check=False)
        assert ended.returncode != 0 and said in ended.error, ended.error
    for mask_types, said in (
        ("mask_types={first_last: 1}", "data.mask_types.first_last is not in"),
        ("mask_types={}", "data.mask_types={}: this model needs a conditioning input"),
    ):
        ended = train("steps=1", "expert=low_noise", mask_types=mask_types, check=False)
        assert ended.returncode != 0 and said in ended.error, ended.error
    ended = train("steps=1", "expert=low_noise", model="tiny", check=False)
    assert "2 problems" in ended.error and "takes no conditioning besides its text" in ended.stderr


def test_clean_frames_train_on_plain_latents(tiny, call, tmp_path):
    own = (*tiny.train, "model=tiny_ti2v", "expert=dense", "init=scratch", "batch_size=4", "data.holdout=0.3")
    seen = ("sample.every=2", "sample.count=2", "sample.steps=2")
    call("train.py", *own, "data.mask_types={image: 1.0, nothing: 1.0}", "steps=2", "run=r", *seen)
    assert len(list((tmp_path / "runs/r/samples").glob("*.mp4"))) == 4, "two clips, before and after"
    rows = [json.loads(line) for line in (tmp_path / "runs/r/metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)


def test_loop_and_losses_name_no_task():
    """One code path: conditioning travels in the batch, and nobody there knows for what task."""
    tasks = re.compile(
        r"i2v|ti2v|t2v|inpaint|outpaint|image.to.video|first.last|continuation|known_pixels", re.IGNORECASE
    )
    found = {
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for folder in ("training", "losses")
        for path in (ROOT / "wantrain" / folder).glob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if tasks.search(line)
    }
    assert not found
    fields = set(Batch.__dataclass_fields__)
    of_losses = {"mask_BTHW", "masked_B", "weight_B", "sets", "losers"}  # what a loss goes by, whatever the task
    assert fields - of_losses == {
        "latents_BCTHW", "text_BLD", "ids", "positions", "conditioning", "noised_BT", "clips",
    }  # fmt: skip


@pytest.mark.skipif("WANTRAIN_FOOTAGE" not in os.environ, reason="WANTRAIN_FOOTAGE names no folder of real footage")
def test_inpainting_real_footage(call, tmp_path):
    """Real footage with a painted mask is sharded, encoded, trained on for twenty steps, and filled in."""
    source, base = Path(os.environ["WANTRAIN_FOOTAGE"]), ROOT / "assets" / "wan-tiny"
    (tmp_path / "dog" / "masks").mkdir(parents=True)
    for name in ("dog.mp4", "dog.txt", "masks/dog.mp4"):
        shutil.copy(source / name, tmp_path / "dog" / name)
    model = ("model=tiny_i2v", f"weights={base}")
    call("shard.py", "source=dog", "out=videos", model[0])
    call("encode.py", "shards=videos", "out=latents", *model, "mask_types={mask: 1.0}")
    manifest = json.loads((tmp_path / "latents" / "manifest.json").read_text())
    assert manifest["clips"] == 4 and manifest["mask_types"] == {"mask": {"variants": 1}}
    settings = (
        "expert=both",
        "init=expand_input_channels",
        "data.shards=latents",
        "data.mask_types={mask: 1.0}",
        "data.holdout=0",
    )
    call("train.py", *model, *settings, "batch_size=4", "steps=20", "run=dog", "tracker=jsonl", "check_expert=off")
    size = ("num_frames=17", "steps=4")
    call("sample.py", "model=tiny_i2v", "run=dog", f"video={source / 'dog.mp4'}", f"mask={source / 'masks' / 'dog.mp4'}",
         "prompt=a dog", *size)  # fmt: skip
    (made,) = (tmp_path / "samples").rglob("*.mp4")
    frames = read_mp4(made)
    assert len(frames) == 17 and frames.std() > 5
