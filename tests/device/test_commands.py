"""Every command on a second device, as a user starts it, and what the host reads there."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wantrain.data import LatentData
from wantrain.models import Base, WanTransformer
from wantrain.models.formats.pipeline import About, write_pipeline
from wantrain.models.formats.weights import read_file, read_tensors
from wantrain.video import read_mp4, write_mp4

#: Steps with everything that happens around them: validation, previews, checkpoints.
AROUND = ("validation.every=2", "validation.clips=2", "validation.points=2", "checkpoint.every=2", "tracker=jsonl",
          "sample.every=2", "sample.count=1", "sample.steps=2", "batch_size=4", "accumulate=2", "steps=4")  # fmt: skip
#: Without previews and the check of the expert, half of a short run's time, where a test looks at neither.
UNSEEN = ("sample.every=0", "check_expert=off")
SIZE = {"num_attention_heads": 4, "attention_head_dim": 32, "text_dim": 64, "ffn_dim": 64, "num_layers": 2}
MICRO = ("model.transformer.num_layers=2", "model.transformer.ffn_dim=64")
SAMPLE = ("num_frames=9", "model.area=1024", "steps=3", *MICRO)


def rows(folder):
    """The steps that a run has logged."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def losses(folder):
    return [row["loss"] for row in rows(folder)]


@pytest.fixture
def train(device, tiny, pair):
    """train("adapter=lora", ...): four steps of a micro expert on the device."""

    def run(*more, weights=pair, **how):
        around = [word for word in AROUND if "sample.every=0" not in more or not word.startswith("sample.")]
        given = (*tiny.train, f"weights={weights}", *around, "run=r", "check_expert=warn")
        return device("train.py", *given, *more, **how)

    return run


@pytest.mark.parametrize(
    "how",
    [
        ("adapter=lora",),
        pytest.param(("adapter=lora", "precision=bf16", "recompute=block"), marks=pytest.mark.slow),
        pytest.param(("adapter=dora", "ema=0.9"), marks=pytest.mark.slow),
        pytest.param(("adapter=none", "ema=0.9", "optimizer=muon"), marks=pytest.mark.slow),
        pytest.param(
            (
                "adapter=none",
                "ema=0.9",
                "precision=bf16",
                "trained.dtype=bf16",
                "update_in_backward=true",
                "clip_by=parameter",
                "accumulate=1",
            ),
            marks=pytest.mark.slow,
        ),
        pytest.param(("adapter=partial", "adapter.layers=1", "adapter.tags=[ffn,head]"), marks=pytest.mark.slow),
        ("expert=both", "adapter=lora", "experts.offload=cpu"),
        pytest.param(("expert=both", "adapter=none"), marks=pytest.mark.slow),
        pytest.param(
            (
                "adapter=none",
                "noise=by_resolution",
                "noise.weighting=min_snr",
                "loss.huber=0.1",
                "loss.stratified=true",
            ),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda how: " ".join(how),
)
def test_training(train, tmp_path, how):
    """Steps, validation, previews and checkpoints; nothing of it mixes host and device."""
    ended = train(*how)
    said = ended.stdout
    assert "largest bucket" in said and "was tried:" in said, "before the first step, without changing it"
    waits = [
        where for kind, where, _ in ended.uploads if kind == "pageable" and re.match(r".*(measure|batch)\.py", where)
    ]
    assert not waits, "neither a step nor a clip of validation waits for its copy"
    assert np.isfinite(losses(tmp_path / "runs" / "r")).all() and len(losses(tmp_path / "runs" / "r")) == 4
    assert len(list((tmp_path / "runs" / "r" / "samples").glob("*.mp4"))) == 3
    assert (tmp_path / "runs" / "r" / "checkpoints" / "step_000004" / "state.json").is_file()


def test_training_matches_cpu(train, call, tiny, pair, tmp_path):
    """Losses on the device agree with the CPU's to rounding.

    The device computes with the CPU's own kernels, attention's apart.
    """
    how = ("adapter=lora", "optimizer.lr=1e-2", *UNSEEN)
    train(*how)
    here = losses(tmp_path / "runs" / "r")
    around = [word for word in AROUND if not word.startswith("sample.")]
    call("train.py", *tiny.train, f"weights={pair}", *around, "run=cpu", *how)
    assert losses(tmp_path / "runs" / "cpu") == pytest.approx(here, rel=1e-5)


def test_resume_and_replay(train, device, tmp_path):
    """A run resumes on the device, and its replay gives the same weights bit for bit."""

    def trained():
        return read_file(tmp_path / "runs" / "r" / "checkpoints" / "step_000004" / "adapter.safetensors")[0]

    train("adapter=lora", *UNSEEN, "stop_after=2")
    train("adapter=lora", *UNSEEN)
    resumed = trained()
    said = device("train.py", "replay=runs/r/run.json", "steps=4").stdout
    assert "the losses of 4 steps are the same, bit for bit" in said
    replayed = read_file(tmp_path / "runs/r_replay/checkpoints/step_000004/adapter.safetensors")[0]
    assert all(torch.equal(resumed[key], replayed[key]) for key in resumed)


@pytest.mark.slow
def test_packs(train, tmp_path):
    """Packs on the device, with the inputs of recomputed blocks on the host: the fullest one is tried first, and a step
    that logs nothing reads nothing.
    """
    packed = ("batch_size=null", "batch_tokens=29", "recompute=block", "activations=cpu", "steps=8", "sample.every=0")
    ended = train("adapter=lora", *packed, "validation.every=1000", "checkpoint.every=1000")
    assert "the fullest pack was tried:" in ended.stdout
    assert np.isfinite(losses(tmp_path / "runs" / "r")).all()
    # The inputs of blocks leave for the host in a stream of their own, which nothing waits for.
    reads = [row for step in ended.steps[1:-1] for row in step["reads"] if "copy_stream" not in row[1]]
    assert not reads


#: Steps of which none logs, but for the last.
QUIET = ("steps=8", *UNSEEN, "validation.every=1000", "checkpoint.every=1000", "data.caption_dropout=0.5")
slow = pytest.mark.slow


@pytest.fixture
def kinds(tiny, tmp_path):
    """The words of each kind of run whose reads are counted."""
    data, names = LatentData(shards=tiny.latents, holdout=0.0), {}
    for clip in range(len(data.index)):
        names.setdefault(data.index.bucket[clip], []).append(data.index.name(data.index.windows_of(clip)[0]))
    rows = [f"{a},{b}" for own in names.values() for a, b in itertools.pairwise(own)]
    (tmp_path / "pairs.csv").write_text("\n".join(["winner,loser", *rows]) + "\n")
    return {
        "lora": ("adapter=lora", "batch_size=8"),
        "full": ("adapter=none", "ema=0.9", "recompute=block", "clip=0.5"),
        "both": ("expert=both", "adapter=lora", "ema=0.9"),
        "preserving": ("adapter=lora", "preserve.weight=2", "ema=0.9"),
        "preference": ("adapter=lora", "loss=preference", "data=pairs", "data.pairs=pairs.csv", "data.holdout=0"),
        "packs": ("adapter=lora", "batch_size=null", "batch_tokens=29"),
        "muon": ("adapter=none", "optimizer=muon"),
    }


@pytest.mark.parametrize(
    ("kind", "most"),
    [
        ("lora", 0),
        ("full", 0),
        pytest.param("both", 0, marks=slow),
        ("preserving", 0),
        ("preference", 0),
        pytest.param("packs", 0, marks=slow),
        pytest.param("muon", 1, marks=slow),  # not one kernel that can leave the weights as they are
    ],
)
def test_host_reads_per_step(train, kinds, kind, most):
    """A step that logs nothing reads no value of the device, and copies nothing to it that the host waits for."""
    ended = train(*kinds[kind], *QUIET)
    between = ended.steps[2:-1]  # the first step of each expert looks at everything once, the last one is logged
    found = {f"{kind} at {where}" for step in between for kind, where, _ in step["reads"]}
    assert max(sum(number for *_, number in step["reads"]) for step in between) == most, "\n".join(sorted(found))
    late = {where for step in between for kind, where, _ in step["uploads"] if kind == "pageable"}
    assert not late, f"copied to the device from pageable memory, which waits for it: {late}"


#: Losses of some steps (from 1) of four samples are NaN.
FAULT = """
import math
from wantrain.losses import FlowMatching
whole = FlowMatching.__call__
def loss(self, model, batch, draws):
    record = whole(self, model, batch, draws)
    factor = math.nan if batch.positions[0] // 4 + 1 in {steps} else 1.0
    return type(record)(**{{**vars(record), "value": record.value * factor}})
FlowMatching.__call__ = loss
"""


def checkpoint(folder, step):
    files = sorted((folder / "runs" / "r" / "checkpoints" / f"step_{step:06d}").rglob("*.safetensors"))
    return {f"{path.name}/{key}": value for path in files for key, value in read_file(path)[0].items()}


def test_refused_step(train, tmp_path):
    """A step that is refused leaves weights, moments and average as they were, and is reported when the next one is
    made; where too many are refused in a row, the run ends before another checkpoint."""
    steps = ("adapter=lora", "ema=0.9", *QUIET[1:4], "steps=8", "accumulate=1", "safeguards.max_skipped_steps=2")
    ended = train(*steps, "checkpoint.every=1", "checkpoint.keep=9", "stop_after=4", fault=FAULT.format(steps={3}))
    before, after, following = (checkpoint(tmp_path, step) for step in (2, 3, 4))
    assert before.keys() == after.keys() and all(torch.equal(after[key], value) for key, value in before.items())
    assert any(not torch.equal(following[key], value) for key, value in after.items()), "and then it goes on"
    assert "step 3 skipped: the gradient's norm is nan" in ended.stdout

    ended = train(*steps, "checkpoint.every=100", fault=FAULT.format(steps={6, 7}), check=False)
    assert "step 7 skipped" in ended.stderr and "2 steps in a row" in ended.stderr and len(ended.steps) == 3
    assert not (tmp_path / "runs/r/checkpoints/step_000008").exists()
    records = [json.loads(line) for line in (tmp_path / "runs/r/safeguards.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [3, 6, 7]
    assert [row["step"] for row in rows(tmp_path / "runs" / "r") if row["loss"] is None] == [3, 6, 7]


@pytest.fixture(scope="module")
def seen_models(tiny, tmp_path_factory):
    """Pipeline folders of scrambled micro models that are given an image: by channels, and by clean frames."""
    folder = tmp_path_factory.mktemp("seen")
    for name, channels, boundary, experts in (
        ("tiny_i2v", 36, 0.875, ("high_noise", "low_noise")),
        ("tiny_ti2v", 16, None, ("dense",)),
    ):
        torch.manual_seed(0)
        model = WanTransformer(**SIZE, in_channels=channels)
        torch.nn.init.normal_(model.head.head.weight, std=0.05)
        about = About(name, boundary, 3.0, dict.fromkeys(experts, 2.0))
        write_pipeline(folder / name, [(expert, model) for expert in experts], base=Base(tiny.base), about=about)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """An image, a video and a mask that leaves its right half to be made."""
    folder = tmp_path_factory.mktemp("pictures")
    frames = np.zeros((9, 32, 32, 3), np.uint8)
    for place, frame in enumerate(frames):
        frame[8:24, place : place + 16] = (200, 80, 40)
    mask = np.zeros((9, 32, 32, 3), np.uint8)
    mask[:, :, 16:] = 255
    Image.fromarray(frames[0]).save(folder / "image.png")
    write_mp4(folder / "video.mp4", frames, 16, quality=0)
    write_mp4(folder / "mask.mp4", mask, 16, quality=0)
    return folder


@pytest.fixture(scope="module")
def conditioned(commands, tiny, tmp_path_factory):
    """Latents with an image's and boxes' beside them, encoded on the device."""
    folder = tmp_path_factory.mktemp("conditioned")
    commands.run(folder, "shard.py", f"source={tiny.footage}", "out=videos", "num_frames=9", "model=tiny_i2v")
    mask_types = "mask_types={image: 1.0, boxes: 1.0}"
    commands.run(folder, "encode.py", "shards=videos", "out=latents", f"weights={tiny.base}", "area=1024", mask_types,
                 "model=tiny_i2v", "report=decode")  # fmt: skip
    return folder / "latents"


def test_encoding(conditioned, tiny, device, tmp_path):
    """What the device encodes is what the CPU does, and the page shows it decoded."""
    assert "data:image/jpeg" in (conditioned / "report.html").read_text()
    device("encode.py", f"shards={tiny.videos}", "out=latents", f"weights={tiny.base}", "area=1024")

    ours, theirs = (LatentData(shards=folder, holdout=0) for folder in (tmp_path / "latents", tiny.latents))
    for sample in range(len(theirs.train)):
        here, there = (data.load([sample], [0]) for data in (ours, theirs))
        torch.testing.assert_close(here.latents_BCTHW, there.latents_BCTHW, rtol=0.01, atol=0.01)  # stored in bf16
        torch.testing.assert_close(here.text_BLD, there.text_BLD, rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    ("model", "how"),
    [
        ("tiny_i2v", ("expert=low_noise", "adapter=lora")),
        ("tiny_ti2v", ("expert=dense", "data.mask_types={image: 1.0, nothing: 1.0}")),
    ],
)
def test_training_with_conditioning(train, conditioned, seen_models, model, how, tmp_path):
    """Models that are conditioned on pixels train on the device."""
    shards = f"data.shards={conditioned}"
    given = () if model == "tiny_ti2v" else ("data.mask_types={image: 1.0, boxes: 1.0}",)
    train(f"model={model}", *how, *given, shards, "data.holdout=0.3", weights=seen_models / model)
    assert np.isfinite(losses(tmp_path / "runs" / "r")).all()


def test_vae(device, tiny, tmp_path):
    """A VAE is trained and exported on the device."""
    size = ("data.num_frames=5", "data.area=1024", "batch_size=2", "steps=2", "validation.every=1", "tracker=jsonl")
    device("train.py", "recipe=wan_tiny_vae", f"data.shards={tiny.videos}", f"weights={tiny.base}", *size)
    assert np.isfinite(losses(tmp_path / "runs" / "wan_tiny_vae")).all()
    device("export.py", "run=wan_tiny_vae", "out=vae")
    assert read_tensors(tmp_path / "vae" / "vae")


@pytest.mark.parametrize(
    "how",
    [
        (),
        ("offload.experts=cpu",),
        pytest.param(("offload.experts=disk",), marks=pytest.mark.slow),
        pytest.param(("offload.blocks=true", "offload.experts=cpu"), marks=pytest.mark.slow),
        ("offload.blocks=true", "offload.experts=disk", "tile=16"),
        ("tile=16", "solver=dpm++", "precision=bf16"),
    ],
    ids=lambda how: " ".join(how) or "plain",
)
def test_sampling(device, pair, tmp_path, how):
    device("sample.py", f"weights={pair}", "prompt=a red circle", "count=2", "batch_size=2", *SAMPLE, *how)
    frames = [read_mp4(path) for path in (tmp_path / "samples").glob("*.mp4")]
    assert len(frames) == 2 and all(len(clip) == 9 and clip.std() > 0 for clip in frames)


def test_lora_sample_and_export(train, device, tmp_path):
    """A LoRA run and its merged export give the same video; the LoRA on top of the export gives another."""
    train("adapter=lora", "sample.every=0", "optimizer.lr=1e-2")
    device("sample.py", "run=r", "prompt=a red circle", *SAMPLE)
    device("export.py", "run=r", "out=merged")
    file = next((tmp_path / "merged" / "lora").glob("*.safetensors"))
    device("sample.py", "weights=merged", "prompt=a red circle", "out=other", *SAMPLE)
    device("sample.py", "weights=merged", "prompt=a red circle", f"lora.low_noise={file}", "out=twice", *SAMPLE)
    one, other, twice = (next((tmp_path / name).glob("*.mp4")).read_bytes() for name in ("samples", "other", "twice"))
    assert one == other != twice


@pytest.mark.parametrize("model", [pytest.param("tiny_i2v", marks=slow), "tiny_ti2v"])
def test_sampling_with_conditioning(device, seen_models, pictures, model, tmp_path):
    """Sampling on the device takes an image, a video with a mask, or frames to keep."""
    base = ("sample.py", f"model={model}", f"weights={seen_models / model}", "prompt=a red circle", *SAMPLE)
    device(*base, f"image={pictures / 'image.png'}", "out=image")
    if model == "tiny_i2v":
        device(*base, f"video={pictures / 'video.mp4'}", f"mask={pictures / 'mask.mp4'}", "out=mask")
    else:
        device(*base, f"video={pictures / 'video.mp4'}", "keep=5", "out=mask")
    assert all(len(read_mp4(next((tmp_path / name).glob("*.mp4")))) == 9 for name in ("image", "mask"))
