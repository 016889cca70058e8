"""Runs whose loss goes by masks: the steps computed clip by clip; resumed, accumulated, mixed, and on two processes."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from wantrain import config
from wantrain.data import BatchSampler
from wantrain.data.footage.probe import probe
from wantrain.models import WanTransformer
from wantrain.training.engine.optim import build_optimizer
from wantrain.util.seeds import generator_at, seed_at

SEED, STEPS, SIZE = 3, 6, 4
COMMAND = ("init=scratch", f"batch_size={SIZE}", f"seed={SEED}", f"steps={STEPS}", "data.holdout=0", "checkpoint.every=3",
           "schedule.shape=constant", "schedule.warmup=0", "loss.mask=focus", "loss.mask_rest=0.1")  # fmt: skip


@pytest.fixture(scope="module")
def latents(tiny, inside, tmp_path_factory):
    """The tiny world's clips; five of them with a mask, white on the left, and one with a loss weight of its own."""
    folder = tmp_path_factory.mktemp("masked")
    shutil.copytree(tiny.footage, folder / "footage")
    (folder / "footage" / "masks").mkdir()
    clips = sorted((folder / "footage").glob("*.mp4"))
    for clip in clips[:5]:
        info = probe(clip)
        mask = np.zeros((info.height, info.width), np.uint8)
        mask[:, : info.width // 2] = 255
        Image.fromarray(mask).save(folder / "footage" / "masks" / f"{clip.stem}.png")
    row = {"path": clips[0].name, "caption": clips[0].with_suffix(".txt").read_text(), "loss_weight": 0.5}
    (folder / "footage" / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    inside(folder, "shard.py", "source=footage", "out=videos", "num_frames=9")
    said = inside(
        folder, "encode.py", "shards=videos", "out=latents", f"weights={tiny.base}", "area=1024", "loss_mask=true"
    ).stdout
    assert "loss_mask=true: 10 of 18 clips have a mask; in training the others count whole" in said
    return folder / "latents"


def command(tiny, latents, *more):
    return (*tiny.train, f"data.shards={latents}", *COMMAND, *more)


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def measured(run):
    return [tuple(row[key] for key in ("loss", "grad_norm", "loss_counted", "loss_rest")) for row in rows(run)]


@pytest.fixture(scope="module")
def unbroken(tiny, latents, inside, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    said = inside(folder, "train.py", *command(tiny, latents, "run=r")).stdout
    assert "loss.mask=focus, the rest at 0.1: 10 of 18 clips have a mask; the others count whole" in said
    return folder / "runs" / "r"


def test_run_matches_clips_one_by_one(tiny, latents, unbroken):
    """Losses and gradient norms of every step are those of its clips computed alone, from the stored masks."""
    cfg = config.compose("train", [*command(tiny, latents)])
    data = config.build(cfg.data)
    plan = BatchSampler.of(data, batch_size=SIZE, seed=SEED)
    torch.manual_seed(seed_at(SEED, "weights", "low_noise"))
    model = WanTransformer(**{key: value for key, value in cfg.model.transformer.items() if key != "_target_"})
    optimizer, loss_of = build_optimizer(config.build(cfg.optimizer, _partial_=True), model), config.build(cfg.loss)
    masked = 0
    for step, row in enumerate(rows(unbroken)):
        total = 0.0
        for number, sample in enumerate(plan.batch(step)):
            place = step * SIZE + number
            batch = data.load([sample], [place])
            masked += batch.mask_BTHW is not None
            draws = loss_of.prepare(batch, [generator_at(SEED, "noise", place)])
            noisy = (1 - draws.sigma) * batch.latents_BCTHW + draws.sigma * draws.noise_BCTHW
            answer = model(noisy, 1000 * draws.sigma, batch.text_BLD)
            error = (answer - (draws.noise_BCTHW - batch.latents_BCTHW)).square().mean(dim=1)[0]
            weight = torch.ones_like(error) if batch.mask_BTHW is None else 0.1 + 0.9 * batch.mask_BTHW[0]
            value = (weight * error).sum() / weight.sum() * (1 if batch.weight_B is None else batch.weight_B[0])
            (value / SIZE).backward()
            total += value.item() / SIZE
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"]
        optimizer.step()
        optimizer.zero_grad()
        assert (row["loss"], row["grad_norm"]) == pytest.approx((total, norm.item()), rel=2e-5)
    assert 0 < masked < STEPS * SIZE


def test_resume_and_accumulation(tiny, latents, unbroken, call, tmp_path):
    """Stopped and continued, a run is the unbroken one, bit for bit, regions and weights; in two micro-steps its loss
    and gradient are the same. Another mask setting is another run.
    """
    call("train.py", *command(tiny, latents, "run=r", "stop_after=3"))
    refused = call("train.py", *command(tiny, latents, "run=r", "loss.mask=ignore"), check=False)
    assert "loss.mask: focus -> ignore" in refused.error
    call("train.py", *command(tiny, latents, "run=r"))
    assert str(measured(tmp_path / "runs" / "r")) == str(measured(unbroken))
    weights = [
        [path.read_bytes() for path in sorted((run / "checkpoints" / f"step_{STEPS:06d}").rglob("*.safetensors"))]
        for run in (tmp_path / "runs" / "r", unbroken)
    ]
    assert weights[0] and weights[0] == weights[1]
    call("train.py", *command(tiny, latents, "run=a", "accumulate=2"))
    for ours, theirs in zip(rows(tmp_path / "runs" / "a"), rows(unbroken), strict=True):
        assert (ours["loss"], ours["grad_norm"]) == pytest.approx((theirs["loss"], theirs["grad_norm"]), rel=2e-5)
    noise = json.loads((unbroken / "noise.json").read_text())["low_noise"]
    assert noise["loss_mask"] == {"mode": "focus", "rest": 0.1, "normalize": True} and noise["caption_dropout"] == {
        "all": 0.1
    }


def test_mixed_sets(tiny, latents, call, tmp_path):
    """Masked clips beside a set without masks, with noise of its own; validation goes by the masks and says so."""
    sets = f"data.sets={{masked: {{shards: {latents}}}, plain: {{shards: {tiny.latents}}}}}"
    words = [word for word in command(tiny, latents) if not word.startswith(("data.", "validation", "steps"))]
    own = "noise.sets={plain: {shift: 1.0, min_sigma: 0.5}}"
    more = (
        "data=mixed",
        sets,
        "data.holdout=0.3",
        own,
        "steps=4",
        "run=m",
        "validation.every=4",
        "validation.points=2",
    )
    said = call("train.py", *words, *more, "validation.clips=4").stdout
    assert "data.sets.plain: 0 of 18 clips have a mask" in said and "data.sets.masked: 10 of 18 clips" in said
    assert "validation measures what loss.mask=focus, the rest at 0.1 says" in said
    report = json.loads((tmp_path / "runs" / "m" / "noise.json").read_text())["low_noise"]
    assert report["window"] == [0.0, 0.875] and report["sets"]["plain"]["window"] == [0.5, 0.875]


def test_without_masks(tiny, call):
    """Latents that were encoded without masks are refused in one line."""
    ended = call("train.py", *tiny.train, *COMMAND, check=False)
    assert "come without masks" in ended.error and "encode again with python encode.py loss_mask=true" in ended.error


@pytest.mark.slow
def test_two_processes(tiny, latents, unbroken, launch, tmp_path):
    """Two processes under DDP take the steps of one: losses, gradients, and the errors by region over both."""
    launch("ddp", *command(tiny, latents, "run=two"))
    for ours, theirs in zip(rows(tmp_path / "runs" / "two"), rows(unbroken), strict=True):
        assert (ours["loss"], ours["grad_norm"]) == pytest.approx((theirs["loss"], theirs["grad_norm"]), rel=1e-4)
        assert (ours["loss_counted"] is None) == (theirs["loss_counted"] is None)
