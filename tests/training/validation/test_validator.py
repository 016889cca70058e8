"""Validation measures: the same bits whoever asks, the truth about a change, and training never notices."""

import gc
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import psutil
import pytest
import torch

from wantrain.batch import Batch, PixelBatch
from wantrain.data import LatentData
from wantrain.data.loading.holdout import one_per_group
from wantrain.demo.footage import make_footage
from wantrain.losses import FlowMatching, Reconstruction
from wantrain.losses.flow_matching import velocity_error
from wantrain.models import Base, WanTransformer, adapters
from wantrain.models.formats.weights import read_file
from wantrain.training.engine.accelerator import autocast
from wantrain.training.engine.ema import Ema
from wantrain.training.expert import ExpertTrainer
from wantrain.training.trainable import TrainableModule
from wantrain.training.validation.bootstrap import FEWEST_FILES, LEVEL, change, contrast
from wantrain.training.validation.history import EvalHistory, EvalRecord
from wantrain.training.validation.measure import Clips, Evaluator, one_by_one, over_ranks
from wantrain.training.validation.validator import ClipValidator, EarlyStopping, Validator
from wantrain.util import distributed
from wantrain.util.seeds import generator_at

ASSETS = Path(__file__).resolve().parents[3] / "assets" / "wan-tiny"
SIZE = {"num_attention_heads": 1, "attention_head_dim": 32, "text_dim": 8, "ffn_dim": 32, "num_layers": 1}
WATCHED = ("data.holdout=0.3", "validation.every=1", "validation.clips=3", "validation.points=2")


def alone(module):
    """A Stepper of one process, as far as validation asks."""
    return SimpleNamespace(
        module=module,
        device=torch.device("cpu"),
        forward_context=nullcontext,
        gather=lambda x: x,
        data_ranks=distributed.DataRanks(),
        part=lambda: None,
        local_parts=lambda: {name: p for name, p in module.named_parameters() if p.requires_grad},
    )


def micro(seed=0):
    torch.manual_seed(seed)
    model = WanTransformer(**SIZE).eval()
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    return model


def clips(count, *, seed=1):
    """Clips of two sizes, two to a file."""
    random = torch.Generator().manual_seed(seed)
    texts = torch.randn(count, 3, 8, generator=random)
    names = [f"{number // 2:016x}-{number:04d}" for number in range(count)]
    found = []
    for number in range(count):
        latents = torch.randn(1, 16, 1 + number % 2, 4, 4, generator=random)
        found.append(Batch(latents, texts[[number]], (names[number],), (number,)))
    return found


def probe(module, *, points=3, **more):
    return Evaluator(alone(module), FlowMatching(shift=3.0, high=0.875).quadrature(points), **{"seed": 0, **more})


# The eval_key ------------------------------------------------------------------------------------------------------------


def test_velocity_error():
    """An evaluation is the velocity error at the distribution's noise levels, with noise seeded by clip id.

    Clips apart or together, levels apart or together: the formula is the plain one.
    """
    model, some = micro(), clips(4)[::2]
    eval_key = probe(model)
    found = eval_key.errors(some)
    for number, clip in enumerate(some):
        generator = generator_at(0, "validation", clip.ids[0])
        for place, sigma in enumerate(eval_key.sigmas):
            noise = torch.randn(clip.latents_BCTHW.shape[1:], generator=generator)[None]
            wanted = velocity_error(model, clip, sigma[None], noise)
            assert found[number, place].item() == pytest.approx(wanted.item(), rel=1e-6)
    together = Batch(
        torch.cat([clip.latents_BCTHW for clip in some]),
        torch.cat([clip.text_BLD for clip in some]),
        tuple(clip.ids[0] for clip in some),
        tuple(clip.positions[0] for clip in some),
    )
    assert [clip.ids for clip in one_by_one([together])] == [clip.ids for clip in some]
    assert torch.equal(eval_key.errors(one_by_one([together])), found)
    torch.testing.assert_close(probe(model, together=3).errors(some), found, rtol=1e-6, atol=0)


def test_repeated_evaluation():
    """Two evaluations of one model are bit-equal, and draw nothing from the run's random generators."""
    model = micro()
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second = (probe(model).errors(clips(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, probe(model, seed=1).errors(clips(5)))
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()


def in_a_world(processes, measure):
    """What each of several processes gets from `measure(stepper)`, and how often each has called the model."""
    parts, calls = [], []
    for rank in range(processes):
        model = micro()
        counted = mock.Mock(side_effect=model)
        stepper = alone(counted)
        stepper.gather = lambda mine: parts.append(mine) or mine.repeat(processes, *[1] * (mine.ndim - 1))
        with mock.patch.multiple(distributed, rank=lambda r=rank: r, world_size=lambda: processes):
            measure(stepper)
        calls.append(counted.call_count)
    found = []
    for rank in range(processes):
        stepper = alone(micro())
        stepper.gather = lambda mine: torch.cat(parts)
        with mock.patch.multiple(distributed, rank=lambda r=rank: r, world_size=lambda: processes):
            found.append(measure(stepper))
    return found, calls


@pytest.mark.parametrize("processes", [2, 3, 4, 7])
def test_evaluation_across_processes(processes):
    """Any number of processes measures the same bits, with equally many forwards on each."""
    some, sigmas = clips(5), FlowMatching(shift=3.0).quadrature(2)
    wanted = Evaluator(alone(micro()), sigmas, 0).errors(some)
    found, calls = in_a_world(processes, lambda stepper: Evaluator(stepper, sigmas, 0).errors(some))
    assert all(torch.equal(errors, wanted) for errors in found)
    assert set(calls) == {2 * -(-5 // processes)}, "engines that cut up the weights would hang otherwise"
    baseline = Evaluator(alone(micro()), sigmas, 0).linear(some)
    found, _ = in_a_world(processes, lambda stepper: Evaluator(stepper, sigmas, 0).linear(some))
    assert all(torch.equal(linear, baseline) for linear in found)


def test_over_ranks_order():
    """Results come back in the order of the clips."""
    some = clips(5)
    ordered = over_ranks(some, lambda clip: torch.tensor(clip.positions[0]), alone(None))
    assert ordered.tolist() == [0, 1, 2, 3, 4]


def test_linear_predictor():
    """The linear predictor is the least-squares fit."""
    eval_key, some = probe(None, points=2), clips(4)[::2]
    for place, (sigma, found) in enumerate(zip(eval_key.sigmas, eval_key.linear(some), strict=True)):
        noisy, target = [], []
        for clip in some:
            generator = generator_at(0, "validation", clip.ids[0])
            x0, noise = clip.latents_BCTHW[0], None
            for _ in range(place + 1):
                noise = torch.randn(x0.shape, generator=generator)
            noisy.append(((1 - sigma) * x0 + sigma * noise).flatten())
            target.append((noise - x0).flatten())
        x, v = torch.cat(noisy).double(), torch.cat(target).double()
        a = torch.linalg.lstsq(x[:, None], v).solution
        assert found.item() == pytest.approx((v - a * x).square().mean().item(), rel=1e-5)


def test_one_clip_per_file():
    """Chosen clips come from as many files as there are."""
    sources = np.array([7, 7, 7, 3, 3, 9], dtype=np.uint64)
    assert one_per_group(np.array([1, 0, 2, 5, 3, 4]), sources).tolist() == [1, 5, 3, 0, 4, 2]
    assert one_per_group(np.array([], dtype=np.int64), sources).tolist() == []


def test_training_clips(tiny):
    """Training clips are measured with their captions, and are never held-out clips."""
    data = LatentData(shards=tiny.latents, holdout=0.3, caption_dropout=1.0)
    batches = data.train_batches(4)
    samples = [clip for batch in batches for clip in batch.clips]
    assert all(batch.positions == () for batch in batches)
    assert len(samples) == len(set(data.groups_of(samples))) == 4, "of four files"
    assert set(samples) <= set(data.train.tolist()) and not set(samples) & set(data.heldout.tolist())
    assert all(batch.text_BLD[:, 0].any() for batch in batches)
    assert data.tags_of(samples) == [()] * 4, "this footage has none"
    assert len([clip for batch in data.train_batches(100) for clip in batch.clips]) == len(data.train)


# What a change is worth -----------------------------------------------------------------------------------------------


def test_confidence_interval():
    """An interval and its p-value agree, and the interval shrinks with the root of the number of files."""
    random = torch.Generator().manual_seed(0)
    for size in (6, 12, 40):
        for shift in torch.linspace(0, 2, 9).tolist():
            found = change(torch.randn(size, generator=random) + shift, range(size))
            assert found.distinct == (found.low > 0 or found.high < 0) == (found.p <= LEVEL)
            assert found.low < found.mean < found.high
    values = torch.randn(400, generator=random)
    reach = [found.high - found.mean for found in (change(values[:n], range(n)) for n in (25, 100, 400))]
    assert reach[0] / reach[1] == pytest.approx(2, rel=0.3) and reach[1] / reach[2] == pytest.approx(2, rel=0.3)
    normal = 2.576 * values.std().item() / 20
    assert reach[2] == pytest.approx(normal, rel=0.1), "with many files the normal interval"


@pytest.mark.parametrize(("files", "alike"), [(5, 1), (8, 1), (16, 1), (8, 3)])
def test_false_positive_rate(files, alike):
    """An absent change is reported as a change no more often than the level allows.

    500 experiments without a change; clips of one file are alike, which a bootstrap over clips would not see.
    """
    random, labels = torch.Generator().manual_seed(files), [number // alike for number in range(files * alike)]
    draws = torch.randn(500, files, 1, generator=random) + 0.5 * torch.randn(500, files, alike, generator=random)
    hits = sum(change(values.flatten(), labels).distinct for values in draws)
    assert hits <= 500 * LEVEL + 3 * (500 * LEVEL) ** 0.5, "three standard deviations"
    if alike > 1:
        naive = sum(change(values.flatten(), range(files * alike)).distinct for values in draws)
        assert naive > 5 * hits, "which is why files are drawn, not clips"


def test_too_few_files():
    """Too few files, or values without a difference, give no distinguishable change."""
    for files in range(1, FEWEST_FILES):
        found = change(torch.linspace(1.0, 1.01, files), range(files))
        assert not found.distinct and found.low is None and "too few files" in str(found)
    assert change(torch.linspace(1.0, 1.01, FEWEST_FILES), range(FEWEST_FILES)).verdict == "worse"
    none = change(torch.zeros(8), range(8))
    assert (none.mean, none.low, none.high, none.p, none.verdict) == (0, 0, 0, 1, "not distinguishable")
    assert change(torch.full((8,), torch.nan), range(8)).verdict == "not distinguishable"


def test_contrast():
    """A gap is the difference of two independent means."""
    random = torch.Generator().manual_seed(3)
    held, train = (torch.randn(60, generator=random) for _ in range(2))
    same = contrast(held, range(60), train, range(60))
    apart = contrast(held + 1, range(60), train, range(60))
    assert not same.distinct and apart.verdict == "worse"
    assert apart.mean == pytest.approx((held + 1).mean().item() - train.mean().item())
    error = (held.var() / 60 + train.var() / 60).sqrt().item()
    assert apart.high - apart.mean == pytest.approx(2.6 * error, rel=0.15)


@pytest.fixture(scope="module")
def known(inside, tmp_path_factory):
    """Clips of what wan-tiny was trained on, at its own size: 16 files held out."""
    folder = tmp_path_factory.mktemp("known")
    make_footage(folder / "footage", num_videos=20, num_images=0, seed=7)
    inside(folder, "shard.py", "source=footage", "out=videos")
    inside(folder, "encode.py", "shards=videos", "out=latents", f"weights={ASSETS}")
    data = LatentData(shards=folder / "latents", holdout=0.8)
    found = one_by_one(data.heldout_batches(16))
    assert len({clip.ids[0][:16] for clip in found}) == 16
    return found


def experiment(known, expert, *, points, directions, nulls):
    """What is said of an unchanged wan-tiny read with other noise, and of one whose true loss has risen by 1 %.

    The true loss is that of other noise draws than the validation's. Weights are moved in random directions, as far as
    raises it by 1 %: its parabola along the direction says how far.
    """
    low, high = {"low_noise": (0.0, 0.875), "high_noise": (0.875, 1.0)}[expert]
    model = Base(ASSETS).transformer(expert, dtype=torch.float32).eval()
    levels, files = FlowMatching(shift=3.0, low=low, high=high).quadrature(points), [clip.ids[0][:16] for clip in known]

    def read(seed):
        return Evaluator(alone(model), levels, seed, together=points).errors(known)

    def since(base, now):
        return change((now - base).mean(dim=1), files)

    first = read(0)
    flagged = [since(first, read(seed)).distinct for seed in range(100, 100 + nulls)]
    start = {name: value.clone() for name, value in model.state_dict().items()}
    other, found = (1, 2), []
    true = torch.stack([read(seed) for seed in other]).mean().item()

    def rise(direction, scale):
        model.load_state_dict({name: value + scale * direction[name] for name, value in start.items()})
        return torch.stack([read(seed) for seed in other]).mean().item() / true - 1

    for seed in range(directions):
        random = torch.Generator().manual_seed(seed)
        spread = {name: value.std().item() if value.numel() > 1 else 0.0 for name, value in start.items()}
        way = {name: spread[name] * torch.randn(value.shape, generator=random) for name, value in start.items()}
        up, down = rise(way, 0.01), rise(way, -0.01)
        bend, slope = (up + down) / 2e-4, (up - down) / 0.02
        rise(way, (-slope + (slope**2 + 0.04 * bend) ** 0.5) / (2 * bend))
        found.append(since(first, read(0)))
        model.load_state_dict(start)
    return true, flagged, found


def test_one_percent_change(known):
    """A loss that rose by one percent is detected, and an unchanged loss is not."""
    true, flagged, found = experiment(known, "low_noise", points=4, directions=1, nulls=6)
    assert sum(flagged) == 0
    assert all(rose.p < 0.01 and rose.verdict == "worse" for rose in found)
    assert all(rose.low < 0.01 * true < rose.high for rose in found), "the interval holds the truth"


@pytest.mark.slow
@pytest.mark.parametrize("expert", ["low_noise", "high_noise"])
def test_detection_rate(known, expert):
    """A rise of one percent is detected each time, and at most one of twenty unchanged models is flagged."""
    true, flagged, found = experiment(known, expert, points=8, directions=3, nulls=20)
    assert sum(flagged) <= 1
    assert all(rose.p < 0.01 and rose.low < 0.01 * true < rose.high for rose in found)


# The hook -------------------------------------------------------------------------------------------------------------


def validator(folder, module, **more):
    """A Validator over eight held-out clips of four files, and four training clips."""
    held, train = clips(8), clips(4, seed=2)
    trainer = SimpleNamespace(name="low_noise", stepper=alone(module), ema=None)
    files = [int(clip.ids[0][:16], 16) for clip in (*held, *train)]
    tags = [("day", "near") if number % 2 else ("day",) for number in range(8)]
    return Validator(
        trainer,
        probe(module),
        Clips(held, files[:8], tags),
        Clips(train, [100 + file for file in files[8:]], [()] * 4),
        EvalHistory(folder / "validation.jsonl"),
        every=10,
        steps=100,
        **more,
    )


def test_validation_row(tmp_path, capsys):
    """Logged values add up, and a new start reads the base's errors from the run folder."""
    model = micro()
    hook = validator(tmp_path, model, prefix="low_noise/")
    first = hook(0)
    assert first["low_noise/validation_change"] == 0 and first["low_noise/validation_stale"] == 0
    assert {key.split("/")[0] for key in first} == {"low_noise"}
    with torch.no_grad():
        model.head.head.weight.mul_(0.5)
    for row, now in ((hook(10), "same process"), (validator(tmp_path, model, prefix="low_noise/")(10), "new start")):
        row = {key.removeprefix("low_noise/"): value for key, value in row.items()}
        base, shown = [first["low_noise/validation_loss"], row["validation_loss"]]
        assert row["validation_change"] == pytest.approx(shown - base), now
        by_sigma = [row[key].values() for key in ("validation_by_sigma", "validation_change_by_sigma")]
        assert [np.mean(list(values)) for values in by_sigma] == pytest.approx([shown, shown - base])
        assert row["validation_gap"] == pytest.approx(shown - row["validation_train_loss"])
        was = first["low_noise/validation_gap"]
        assert row["validation_gap_change"] == pytest.approx(row["validation_gap"] - was)
        tags = row["validation_by_tag"]
        assert [(tag, about["clips"]) for tag, about in tags.items()] == [("day", 8), ("near", 4)]
        assert tags["day"]["loss"] == pytest.approx(shown) and tags["day"]["change"] == pytest.approx(shown - base)
        reach = row["validation_change_high"] is None, row["validation_gap_change_p"] > LEVEL
        assert reach == (True, True), "four files tell nothing"
        json.dumps(row, allow_nan=False)
    assert [one.step for one in EvalHistory(tmp_path / "validation.jsonl").all] == [0, 10], "10 was read anew"
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith(")") and "not distinguishable from the base" in said[1] and said[1] == said[2]


def test_changed_eval_key(tmp_path, capsys):
    """Another evaluation key starts a new comparison, and the message names its first step."""
    model = micro()
    validator(tmp_path, model)(0)
    for step in (10, 20):
        hook = validator(tmp_path, model)
        hook.evaluator = probe(model, points=2)
        assert hook(step)["validation_change"] == 0
    assert "not distinguishable from step 10" in capsys.readouterr().out


def test_lora_against_base(tmp_path):
    """A LoRA is compared with its base, which is measured once with the LoRA switched off."""
    model = micro()
    base = probe(model).errors(clips(8)).mean().item()
    adapters.inject(model, adapters.AdapterSettings(rank=2, alpha=2, targets="attention"), seed=0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for layer in adapters.adapter_layers(model).values():
        layer.up.normal_(std=0.5)
    hook = validator(tmp_path, model.eval())
    row = hook(10)
    assert row["validation_loss"] - row["validation_change"] == pytest.approx(base, abs=1e-12)
    assert row["validation_change"] != 0
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    validator(tmp_path, model)(20)
    measured = [(one.step, one.weights) for one in EvalHistory(tmp_path / "validation.jsonl").all]
    assert measured == [(10, "live"), (10, "base"), (20, "live")], "once in a run"


@pytest.mark.parametrize(
    ("kind", "ema", "passes"),
    [
        ("none", False, [1, 1]),
        ("none", True, [1, 2]),  # later the average and the live weights
        ("lora", False, [1, 1]),
        ("lora", True, [1, 2]),
        ("trained lora", False, [2, 1]),  # adapter.init=FILE: the base is another model
        ("trained lora", True, [2, 2]),
        ("dora", False, [2, 1]),
    ],
)
def test_passes_per_validation(kind, ema, passes, tmp_path):
    """Weights that must give the same result are measured once.

    Passes over eight held-out and four training clips, at the start and after a step.
    """
    model = micro()
    if kind != "none":
        adapters.inject(
            model, adapters.AdapterSettings(rank=2, alpha=2, targets="attention", dora=kind == "dora"), seed=0
        )
    if kind == "trained lora":
        next(iter(adapters.adapter_layers(model).values())).up[0, 0] = 0.5
    hook = validator(tmp_path, model.eval())
    hook.trainer = ExpertTrainer(
        "low_noise", TrainableModule(model, "transformer"), hook.trainer.stepper, None, None, None, 100
    )
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    if ema:
        hook.trainer.stepper.engine = "single"
        hook.trainer.ema = Ema(hook.trainer.stepper, 0.9)
    found = []
    for step in (0, 10):
        with hook.trainer.evaluating():
            row = hook(step)
        found.append(len(calls) / (12 * 3))
        calls.clear()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * parameter.requires_grad
        if ema:
            hook.trainer.ema.follow(1)
        if step == 0:
            assert row.get("validation_live_loss", row["validation_loss"]) == row["validation_loss"]
            assert (row["validation_change"] == 0) == (kind != "trained lora")
    assert found == passes
    weights = ["ema", "live"] if ema else ["live"]
    first = [*weights, *["base"] * (kind != "none")]
    assert [(one.step, one.weights) for one in hook.history.all] == [(0, w) for w in first] + [(10, w) for w in weights]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zero_adapter(precision):
    """An adapter that is zero has the errors of its base bit for bit, so one measurement holds for both."""
    model, some = micro(), clips(3)
    adapters.inject(model, adapters.AdapterSettings(rank=2, alpha=2, targets="all"), seed=0)
    eval_key = probe(model)
    eval_key.stepper.forward_context = lambda: autocast(precision, torch.device("cpu"))
    on = eval_key.errors(some)
    with adapters.switched_off(model):
        assert torch.equal(eval_key.errors(some), on)


def test_vae_psnr(capsys):
    """The PSNR of a VAE is the mean over clips, each measured alone."""
    pixels = [torch.rand(1, 3, 1 + number, 8, 8) * 2 - 1 for number in range(3)]
    some = [PixelBatch(clip, (f"{number}",)) for number, clip in enumerate(pixels)]
    halves = mock.Mock(side_effect=lambda clip, draw: (clip / 2, None, None))
    found = ClipValidator(alone(halves), Reconstruction().validation, some, every=1, steps=1)(0)["validation_psnr"]
    wanted = np.mean([10 * np.log10(4 / (clip / 2).square().mean().item()) for clip in pixels])
    assert found == pytest.approx(wanted) and "validation PSNR" in capsys.readouterr().out
    assert [call.args[0].shape[2] for call in halves.call_args_list] == [1, 2, 3]


def record(step, losses):
    errors = torch.as_tensor(losses, dtype=torch.float64)[:, None]
    return EvalRecord(step, "low_noise", "live", "same", errors, errors)


def test_early_stopping_patience():
    """Patience counts from the last distinguishable improvement.

    Small steps add up: what is not better than the record before may be better than the best one.
    """
    random = torch.Generator().manual_seed(0)
    start, stopping, stale = torch.rand(12, generator=random), EarlyStopping(range(12)), []
    drift = 0.1 + 0.02 * torch.randn(12, generator=random)
    noise = 0.12 * torch.randn(6, 12, generator=random)
    for step, amount in enumerate((0, 1, 1, 1.2, 2.5, 2.4)):
        stopping.see(record(step, start - amount * drift + (noise[step] * 0.2 if step else 0)))
        stale.append(stopping.stale)
    assert stale == [0, 0, 1, 2, 0, 1] and stopping.best.step == 4


def test_validation_memory(tmp_path):
    """Validation leaves nothing in memory but its records."""
    model = micro()
    hook = validator(tmp_path, model)

    def alive():
        gc.collect()
        return sum(one.nbytes for one in gc.get_objects() if isinstance(one, torch.Tensor))

    hook(0)
    tensors, process = alive(), psutil.Process()
    before = process.memory_info().rss
    for step in range(10, 60, 10):
        hook(step)
    kept = sum(one.heldout.nbytes + one.train.nbytes for one in hook.history.all[1:])
    assert alive() - tensors <= 2 * kept, "nothing but its records (views and what they are views of)"
    assert process.memory_info().rss - before < 8 << 20


# Whole runs -----------------------------------------------------------------------------------------------------------


def measured(row):
    """What validation has measured: all but the seconds that it took."""
    return {key: value for key, value in row.items() if "validation" in key and not key.startswith("cost/")}


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def records(run):
    return [(one.step, one.weights, one.heldout, one.train) for one in EvalHistory(run / "validation.jsonl").all]


def same(mine, theirs):
    assert [one[:2] for one in mine] == [one[:2] for one in theirs]
    return all(torch.equal(one[n], two[n]) for one, two in zip(mine, theirs, strict=True) for n in (2, 3))


@pytest.mark.parametrize(
    ("engine", "processes"),
    [
        ("ddp", 2),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in (("ddp", 4), ("zero3", 2), ("fsdp2", 2), ("fsdp2", 4))),
    ],
)  # fmt: skip
def test_validation_across_engines(engine, processes, tiny, pair, call, launch, tmp_path):
    """Several processes measure what one process measures, bit for bit.

    Three held-out and three training clips do not divide by two or four.
    """
    command = (*tiny.train, f"weights={pair}", *WATCHED, "steps=1", "batch_size=4", "adapter=lora", "adapter.rank=2")
    call("train.py", *command, "run=one")
    launch(engine, *command, "run=many", processes=processes)
    one, many = (records(tmp_path / "runs" / name)[:2] for name in ("one", "many"))
    assert [row[:2] for row in one] == [(0, "live"), (0, "base")] and same(one, many)
    first, again = (rows(tmp_path / "runs" / name)[0] for name in ("one", "many"))
    assert measured(first) == measured(again)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(("ema=0.9",), marks=pytest.mark.slow),
        ("adapter=lora", "adapter.rank=2", "optimizer.lr=1e-2", "ema=0.9"),
    ],
)
def test_training_with_validation(how, tiny, pair, call, tmp_path):
    """A run with validation trains bit for bit as one without, and resumes its validation."""
    command = ("train.py", *tiny.train, f"weights={pair}", *how, "batch_size=2", "steps=4", "data.holdout=0.3")
    command = (*command, "checkpoint.every=2", "checkpoint.keep=9", "check_expert=off")
    for name, watched in (("alone", ()), ("watched", WATCHED), ("broken", (*WATCHED, "stop_after=2"))):
        call(*command, *watched, f"run={name}")
    assert "step 2 of 4" in call(*command, *WATCHED, "run=broken").stdout
    runs = [tmp_path / "runs" / name for name in ("alone", "watched", "broken")]
    losses = [[(row["loss"], row["grad_norm"]) for row in rows(run) if "loss" in row] for run in runs]
    assert losses[0] == losses[1] == losses[2] and len(losses[0]) == 4
    kept = [
        {f"{path.relative_to(run)}/{key}": value for path in run.rglob("step_000004/**/*.safetensors")
         for key, value in read_file(path)[0].items()}
        for run in runs
    ]  # fmt: skip
    assert kept[0].keys() == kept[1].keys() and kept[0]
    assert all(torch.equal(value, other[key]) for key, value in kept[0].items() for other in kept[1:])
    assert same(records(runs[1]), records(runs[2])), "and the broken run was measured as the unbroken one"
    told = [[measured(row) for row in rows(run)] for run in runs[1:]]
    assert told[0] == told[1] and told[0][-1]["validation_live_loss"] != told[0][-1]["validation_loss"]
    first, last = rows(runs[1])[0], rows(runs[1])[-1]
    assert last["validation_change"] == pytest.approx(last["validation_loss"] - first["validation_loss"], abs=1e-12)


def test_early_stopping(tiny, call, tmp_path):
    """A run that gets no better ends, and more patience lets it continue."""
    command = ("train.py", *tiny.train, "init=scratch", *WATCHED, "batch_size=2", "steps=30", "checkpoint.every=10")
    command = (*command, "optimizer.lr=1e-9", "run=r")
    run = tmp_path / "runs" / "r"
    said = call(*command, "validation.early_stopping_patience=2").stdout
    assert "step 2: 2 validations in a row were not distinguishably better than the best before them" in said
    assert rows(run)[-1]["step"] == 2 and [path.name for path in (run / "checkpoints").iterdir()] == ["step_000002"]
    said = call(*command, "validation.early_stopping_patience=2").stdout
    assert "step 2: 2 validations in a row" in said and rows(run)[-1]["step"] == 2
    assert "step 3: 3 validations in a row" in call(*command, "validation.early_stopping_patience=3").stdout
    assert [row["validation_stale"] for row in rows(run)] == [0, 1, 2, 3]
    call(*command, "steps=5")
    assert rows(run)[-1]["step"] == 5, "null never ends a run"
    error = call(*command, "validation.early_stopping_patience=2", "data.holdout=0", "run=other", check=False).error
    assert (
        error.startswith("validation.early_stopping_patience=2 asks held-out clips") and "raise data.holdout" in error
    )
    error = call(*command, "validation.early_stopping_patience=0", check=False).error
    assert "validation.early_stopping_patience=0" in error
