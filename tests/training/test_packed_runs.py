"""Runs of `batch_tokens=`: the losses and gradients of the clips one by one; resumed, and on several processes, equal."""

import json
import re

import pytest
import torch

from wantrain import checks, config
from wantrain.data import PackSampler
from wantrain.losses import FlowMatching
from wantrain.models import WanTransformer
from wantrain.training.engine.optim import build_optimizer
from wantrain.util.seeds import generator_at, seed_at

SEED, STEPS, PASSES = 3, 8, 2
#: A clip of the tiny world has 12 tokens, an image 4: packs hold two clips and an image, or fewer.
COMMAND = ("init=scratch", "batch_tokens=29", f"accumulate={PASSES}", f"seed={SEED}", f"steps={STEPS}",
           "data.holdout=0", "checkpoint.every=3", "schedule.shape=constant", "schedule.warmup=0")  # fmt: skip


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def measured(run):
    return [(row["loss"], row["grad_norm"]) for row in rows(run)]


def one_by_one(tiny):
    """Losses and gradient norms where every clip is a batch of its own and all clips of a step count alike."""
    cfg = config.compose("train", [*tiny.train, *COMMAND])
    data = config.build(cfg.data)
    plan = PackSampler.of(data, budget=29, passes=PASSES, seed=SEED)
    torch.manual_seed(seed_at(SEED, "weights", "low_noise"))
    model = WanTransformer(**{key: value for key, value in cfg.model.transformer.items() if key != "_target_"})
    optimizer = build_optimizer(config.build(cfg.optimizer, _partial_=True), model)
    loss_of, log, samples = config.build(cfg.loss), [], 0
    assert isinstance(loss_of, FlowMatching)
    for step in range(STEPS):
        packs = [plan.pack(step, number, 0, 1) for number in range(PASSES)]
        clips = [
            (sample, place)
            for pack in packs
            for own, places in pack.groups
            for sample, place in zip(own, places, strict=True)
        ]
        assert [place for _, place in clips] == list(range(samples, samples + len(clips)))
        samples += len(clips)
        total = 0.0
        for sample, place in clips:
            batch = data.load([sample], [place])
            loss = loss_of(model, batch, loss_of.prepare(batch, [generator_at(SEED, "noise", int(place))]))
            (loss.value / len(clips)).backward()
            total += loss.value.item() / len(clips)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"]
        optimizer.step()
        optimizer.zero_grad()
        log.append((total, norm.item()))
    return log, samples


@pytest.fixture(scope="module")
def unbroken(tiny, inside, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    ended = inside(folder, "train.py", *tiny.train, *COMMAND, "run=r")
    assert "batch packs of up to 29 tokens, 1 per backward x 2 accumulation x 1 process" in ended.stdout
    return folder / "runs" / "r"


def test_run_matches_clips_one_by_one(tiny, unbroken):
    """Losses and gradient norms of every step are those of the step's clips computed alone; the log counts the samples
    and their tokens.
    """
    wanted, samples = one_by_one(tiny)
    for ours, theirs in zip(measured(unbroken), wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)
    log = rows(unbroken)
    assert log[-1]["samples"] == samples
    clips = [len(row["clips"]) for row in log]
    assert sum(clips) == samples and len(set(clips)) > 1, "packs differ in their samples"
    assert all(4 * count <= row["tokens"] <= 29 * PASSES for count, row in zip(clips, log, strict=True))


def test_resume(tiny, unbroken, call, tmp_path):
    """Stopped and continued, a run is the unbroken one, bit for bit; with other packs in a step it is refused."""
    call("train.py", *tiny.train, *COMMAND, "run=r", "stop_after=3")
    refused = call("train.py", *tiny.train, *COMMAND, "run=r", "accumulate=1", check=False)
    assert re.search(
        r"has used \d+ samples, and with as many packs in a step as now it would be \d+; give", refused.error
    )
    call("train.py", *tiny.train, *COMMAND, "run=r")
    assert measured(tmp_path / "runs" / "r") == measured(unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_two_processes(engine, tiny, unbroken, launch, tmp_path):
    """Two processes with one pack each take the steps of one process with two."""
    launch(engine, *tiny.train, *COMMAND, "accumulate=1", "run=two")
    for ours, theirs in zip(measured(tmp_path / "runs" / "two"), measured(unbroken), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    mine, other = rows(tmp_path / "runs" / "two"), rows(unbroken)
    assert [row["tokens"] for row in mine] == [row["tokens"] for row in other]
    assert [row["samples"] for row in mine] == [row["samples"] for row in other]


def test_lora(tiny, pair, call, tmp_path):
    """A LoRA on recomputed blocks trains on packs."""
    more = (f"weights={pair}", "adapter=lora", "adapter.rank=4", "recompute=block", "batch_tokens=29", "steps=2")
    call("train.py", *tiny.train, *more, "data.holdout=0", "check_expert=off", "run=lora")
    assert len(rows(tmp_path / "runs" / "lora")) == 2


@pytest.mark.slow
def test_both_experts(tiny, pair, call, tmp_path):
    """Of a pair each expert has an order of packs of its own, and its steps are those of a run by itself."""
    more = (
        f"weights={pair}",
        "adapter=lora",
        "adapter.rank=2",
        "batch_tokens=29",
        "data.holdout=0",
        "check_expert=off",
    )
    share = ("experts.share.high_noise=0.5", "experts.share.low_noise=0.5")
    call("train.py", *tiny.train, *more, *share, "expert=both", "steps=6", "run=both")
    call("train.py", *tiny.train, *more, "expert=low_noise", "steps=3", "run=low")
    both = [row for row in rows(tmp_path / "runs" / "both") if row["expert"] == "low_noise"]
    alone = rows(tmp_path / "runs" / "low")
    assert [(row["loss"], row["tokens"], row["clips"]) for row in both] == [
        (row["loss"], row["tokens"], row["clips"]) for row in alone
    ]


def test_dry_run(tiny, call):
    """A dry run counts packs and plans the memory of a full one."""
    said = call("train.py", *tiny.train, *COMMAND, "dry_run=true").stdout
    assert re.search(r"samples per step    packs of up to 29 tokens, 1 per backward .* = \d\S* in the mean", said)
    assert re.search(r"packs               18 clips = 8 packs an epoch, 86.2% of their tokens used", said)
    assert re.search(r"steps               8: \d+ samples", said)
    assert re.search(r"TFLOP per step      \S+ in the mean x \S+ samples", said)
    assert "memory              pack of 29 tokens: " in said


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["compile=blocks"], "batch_tokens=100 computes clips of several sizes at once, for which a compiled block"),
        (["data.caption_dropout=[[0,0.3],[9,0]]"], "a caption_dropout by step needs batch_size="),
        (["loss.stratified=true"], "loss.stratified=true needs batch_size="),
        (["batch_size=4"], "batch_size has no effect: batch_tokens=100 says how large a step is"),
        (["model.train.micro_batch=1"], "model.train.micro_batch has no effect: batch_tokens=100 says"),
        (["expert=vae", "recipe=wan_tiny_vae"], "expert=vae trains on pixels, which have no tokens; give batch_size="),
    ],
)
def test_refused(given, words):
    """What does not go together with packs is an error that says so."""
    cfg = config.compose("train", ["batch_tokens=100", *given])
    keys = {"batch_tokens", *(word.split("=")[0] for word in given)}
    with pytest.raises(ValueError, match=re.escape(words)):
        checks.check(cfg, given=keys)


def test_loss_refused():
    """So is a loss that does not declare that it takes packs."""
    cfg = config.compose("train", ["batch_tokens=100"])
    cfg.loss = {"_target_": "wantrain.losses.Reconstruction"}
    with pytest.raises(ValueError, match=r"which wantrain.losses.Reconstruction cannot; give batch_size="):
        checks.check(cfg)


def test_no_size_refused():
    """A step needs one of both sizes; a recipe's batch size is taken back by null."""
    with pytest.raises(ValueError, match=r"batch_size=null and batch_tokens=null: a step has no size; give one"):
        checks.check(config.compose("train", ["batch_size=null"]))
    null = config.compose("train", ["recipe=style", "batch_size=null", "batch_tokens=100", "data.shards=x"])
    checks.check(null, given={"batch_size", "batch_tokens"})  # the recipe gives the first


def test_too_small(tiny, call):
    """A budget below the largest clip is an error before anything trains."""
    ended = call("train.py", *tiny.train, *COMMAND, "batch_tokens=11", "run=small", check=False)
    assert ended.error.startswith("batch_tokens=11 is less than the 12 tokens of the largest clip; give 12 or more")
