"""The planner: traced memory equals what real tensors take, and advice fits the card it is given for."""

import importlib.util
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from wantrain import config
from wantrain.models import WanTransformer, feed_forward, fused, quantize
from wantrain.training.initialize import without_values
from wantrain.training.planning import trace
from wantrain.training.planning.memory import UpdateBytes
from wantrain.training.planning.outline import find_clips
from wantrain.training.planning.plan import CUDA, GB, Choice, Sizes
from wantrain.training.planning.planner import Planner
from wantrain.training.planning.roofline import Work
from wantrain.training.planning.search import FILL, Case, cheapest, fits, possible, smallest
from wantrain.training.planning.trace import Sample, between, trace_blocks, trace_step, with_blocks
from wantrain.training.planning.trial_step import largest, out_of_memory
from wantrain.util import parts
from wantrain.util.cards import CARDS, Card, find_card

BENCHMARK = Path(__file__).resolve().parents[3] / "benchmarks" / "memory.py"
spec = importlib.util.spec_from_file_location("memory_benchmark", BENCHMARK)
memory = sys.modules["memory_benchmark"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(memory)

SETTINGS = list(memory.settings())


@pytest.mark.parametrize(
    "setting",
    [pytest.param(each, marks=[pytest.mark.slow] if number % 3 else []) for number, each in enumerate(SETTINGS[::5])],
    ids=lambda s: f"{s.adapter}-{s.recompute}-{s.precision}",
)
def test_predicted_memory(setting):
    """The planner's bytes lie within 10 % of what real tensors take in a real step."""
    row = memory.compare(setting)
    assert 0.9 < row["ratio"] < 1.1, row


@pytest.mark.parametrize("recompute", ["none", "attention", "block"])
def test_extrapolation(recompute):
    """What one and two blocks keep says what five keep, to the byte, and the peaks too."""
    setting = memory.Setting("lora", recompute, "bf16", (1, 3, 16, 16))
    module = without_values(lambda: memory.build(setting))
    sample = Sample(setting.latents, False, setting.precision)
    costs = trace_blocks(module, sample, recompute)
    five = trace_step(with_blocks(module, 5, recompute), sample)
    kept = costs.kept_outside + 5 * costs.kept_block
    assert (kept, kept + costs.backward) == (five.kept, five.backward)
    moved = costs.moved_outside + 5 * (costs.moved_forward_block + costs.moved_backward_block)
    assert moved == five.moved_forward + five.moved_backward


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_parts_left_out(adapter, monkeypatch):
    """A trace that leaves out parts of loops gives the memory of the whole loops, and what they move within 1 %."""
    setting = memory.Setting(adapter, "block", "bf16", (1, 5, 16, 16))
    module = without_values(lambda: memory.build(setting))
    monkeypatch.setattr(feed_forward, "PART", 50)  # of 320 tokens: six parts, and one of 20
    monkeypatch.setattr(fused, "PIECE", 60 * 256)
    traced = []
    for shorten in (parts.shortened, lambda counts: nullcontext()):
        monkeypatch.setattr(trace, "shortened", shorten)
        traced.append(trace_step(with_blocks(module, 2, "block"), Sample(setting.latents, False, "bf16")))
    short, whole = traced
    assert short.moved_backward == pytest.approx(whole.moved_backward, rel=0.01)
    assert replace(short, moved_backward=0) == replace(whole, moved_backward=0)


def test_shapes_stay(setting=SETTINGS[0]):
    """Tracing leaves the module as it was, without values and with all of its blocks."""
    module = without_values(lambda: memory.build(setting))
    trace_blocks(module, Sample((1, 1, 8, 8), False, "fp32"), "block")
    assert len(module.blocks) == memory.SIZES["num_layers"]
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("h100", "H100"), ("H200", "H200"), ("a100-80", "A100"), ("a100-40", "A100 40GB"), ("4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"), ("rtx_3090", "RTX 3090"), ("l40s", "L40S"), ("L40", "L40"), ("h100-80gb", "H100"),
        ("rtx6000ada", "RTX 6000 ADA"), ("24GB", "24 GB"), ("16", "16 GB"),
    ],
)  # fmt: skip
def test_find_card(asked, name):
    """Cards are found as people write them; a size stands for a card whose speed is unknown."""
    card = find_card(asked)
    assert card.name == name and card.memory > 10 * GB
    assert (card.peak > 0) == (name in CARDS)


def test_unknown_card():
    """An unknown card is an error that lists the known ones."""
    with pytest.raises(ValueError, match=r"gpu=voodoo is not known; choose one of B200, .*or give its memory"):
        find_card("voodoo")


@pytest.fixture(scope="module")
def case():
    """A LoRA on a network large enough for its parts to matter."""
    setting = memory.Setting("lora", "block", "bf16", (1, 5, 32, 32))
    module = without_values(lambda: memory.build(setting))
    policies = ("none", "attention", "block")
    costs = {policy: trace_blocks(module, Sample(setting.latents, False, "bf16"), policy) for policy in policies}
    return Case(
        Sizes.of(module, update=UpdateBytes(4.0, 4.0, 8.0), average=False),
        costs,
        Work.of(module, tokens=1280, samples=1),
    )


def card(size):
    return Card("test", size, 100e12, 1000e9, 25e9)


def test_advice_fits(case):
    """On ever smaller cards the advice fits and takes no less time, until nothing helps; then there is none."""
    whole = case.plan(Choice(recompute="none")).device - CUDA
    times, advice = [], None
    for share in (1.05, 0.9, 0.7, 0.5, 0.3, 0.2, 0.1):
        small = card((CUDA + whole * share) / FILL)
        advice = cheapest([case], Choice(recompute="none"), small, adapter=True)
        if advice is None:
            break
        assert fits(advice.memory, small) and advice.memory.device == case.plan(advice.choice).device
        times.append(advice.seconds)
    assert len(times) > 2 and times == sorted(times)
    assert cheapest([case], Choice(recompute="none"), card(0.9 * GB), adapter=True) is None


def test_no_advice_needed(case):
    """On a card that is large enough nothing is changed."""
    advice = cheapest([case], Choice(recompute="none"), card(100 * GB), adapter=True)
    assert advice.overrides == ()


def test_given_settings_stay(case):
    """The search leaves alone what the user has set, and never quantises or swaps weights that are trained."""
    tight = card(case.plan(Choice(recompute="block")).device * 1.04)
    advice = cheapest([case], Choice(recompute="none"), tight, adapter=True, fixed=["base", "swap"])
    assert advice.choice.base is None and advice.choice.swap == 0 and advice.choice.update is None
    free = cheapest([case], Choice(recompute="none"), tight, adapter=False)
    assert free.choice.base is None and free.choice.swap == 0


def test_base_beside_a_product(case):
    """A base in few bytes takes, with its products, what the layers take; the advice keeps it in few bytes."""
    module = WanTransformer(num_attention_heads=2, attention_head_dim=32, text_dim=64, ffn_dim=128, num_layers=2)
    sizes = Sizes.of(module.bfloat16().requires_grad_(False), update=UpdateBytes(4.0, 4.0, 8.0), average=False)
    quantize.as_if_loaded(module.to("meta"), quantize.Format("nf4", 8), torch.bfloat16)
    stored = sum(part.nbytes for _, layer in quantize.quantized_layers(module) for part in layer.parts.values())
    asked = Choice(recompute="none", base="nf4", low_rank=8)
    assert asked.base_bytes(sizes) * sizes.base == pytest.approx(stored, rel=1e-6)
    plain = replace(asked, low_rank=0)
    assert case.seconds(asked, card(100 * GB)) > case.seconds(plain, card(100 * GB))
    least = smallest([case], asked, card(1 * GB), adapter=True).choice
    assert (least.base, least.low_rank) == ("nf4", 8)
    assert not possible(replace(asked, base=None), sizes.blocks) and possible(asked, sizes.blocks)


def test_shared_tokens(case):
    """Of four processes that share tokens each keeps a quarter of what the blocks keep, and computes a quarter."""
    alone, shared = (Choice(engine="ddp", processes=4, recompute="none", sequence=size) for size in (1, 4))
    blocks = case.sizes.blocks * case.costs["none"].kept_block
    before, after = case.plan(alone), case.plan(shared)
    assert before.kept - after.kept == pytest.approx(0.75 * blocks)
    assert after.working < before.working and before.exchange < after.exchange < before.exchange + before.working
    assert 0.25 <= case.seconds(shared, card(80 * GB)) / case.seconds(alone, card(80 * GB)) < 0.5


def test_shared_tokens_in_one_process():
    """A dry run in one process plans for the cards that share a clip: DDP, a part of the activations, and where heads
    do not divide the gathered keys and values.
    """
    plans = {}
    for size in (1, 4, 8):
        words = ["expert=low_noise", "bucket=33x128x128", "batch_size=1", "dry_run=true"]
        forecast = config.forecast(config.compose("train", [*words, f"sequence_parallel={size}"]))
        planner = forecast.planner("single")
        assert (planner.processes, planner.asked.sequence, planner.asked.groups) == (size, size, max(1, size // 4))
        assert forecast.engine("single") == planner.engine == ("single" if size == 1 else "ddp")
        (plans[size],) = planner.plan(find_clips([], lambda: None, forecast.settings), "33x128x128")
    kept = {size: plan.kept for size, plan in plans.items()}
    assert kept[4] - kept[8] == pytest.approx((kept[1] - kept[4]) / 6), "1/4 - 1/8 of the blocks' and 1 - 1/4"
    reducer = plans[4].gradients
    assert (plans[8].exchange - reducer) / 21 == pytest.approx((plans[4].exchange - reducer) / 9 / 2)


def test_shared_updates(case):
    """Of an optimizer's state that is shared out each process updates its part."""
    fast = card(80 * GB)
    alone, two, many = (
        case.seconds(Choice(engine=engine, processes=processes), fast)
        for engine, processes in (("ddp", 8), ("zero1", 2), ("fsdp2", 8))
    )
    whole = case.sizes.trained * (3 * case.sizes.weight + 2 * case.sizes.state) / (0.85 * fast.bandwidth)
    assert alone - two == pytest.approx(whole / 2) and alone - many == pytest.approx(whole * 7 / 8)


def test_updates_are_searched():
    """A full fine-tune of 14B fits one card of 141 GB with bf16 weights and 8-bit moments: the advice says both."""
    words = ["model=t2v_a14b", "expert=low_noise", "bucket=81x480x832", "batch_size=1"]
    cfg, card = config.compose("train", words), find_card("h200")
    planner = config.forecast(cfg).planner("single")
    clips = find_clips(config.shards(cfg), lambda: None, config.settings(cfg))
    cases = [*planner.cases(clips, "81x480x832").values()]
    advice = planner.advise(cases, card)
    assert {"trained.dtype=bf16", "optimizer=adamw_8bit"} <= set(advice.overrides)
    assert fits(advice.memory, card) and not fits(cases[0].plan(planner.asked), card)
    words = {word for update in planner.updates for word in update.overrides}
    assert words == {"trained.dtype=bf16", "optimizer=adamw_8bit", "update_in_backward=true", "clip_by=parameter"}
    assert planner.advise(cases, card, fixed=["update"]) is None


@pytest.mark.parametrize(("kernel", "kept"), [("auto", True), ("cudnn", True), ("flex", False), ("math", False)])
def test_kernel_not_kept(case, kernel, kept):
    """Where the output of attention cannot be kept, keeping it is not advised."""
    policies = Planner._policies.fget(SimpleNamespace(settings={"attention": kernel}))
    assert ("attention" in policies) == kept and {"none", "block"} <= set(policies)
    own = replace(case, costs={policy: case.costs[policy] for policy in policies})
    sizes = [each / 40 * GB for each in range(20, 120)]
    found = {cheapest([own], Choice(recompute="none"), card(size), adapter=True) for size in sizes}
    assert ("attention" in {advice.choice.recompute for advice in found if advice is not None}) == kept


def test_dry_run_plans(call):
    """A dry run without weights or data says what a 14B LoRA takes on a card, and which settings make it fit."""
    said = call("train.py", "model=t2v_a14b", "expert=low_noise", "adapter=lora", "dry_run=true", "gpu=rtx4090").stdout
    assert "memory              81x480x832: weights 29.3" in said
    assert "RTX 4090            81x480x832 takes" in said and "too much. The fastest settings that fit:" in said
    assert "GB on each of 8 cards: single" in said and "s per step" in said


@pytest.mark.parametrize(
    ("bucket", "message"),
    [("80x480x832", "4k"), ("81x480", "frames x height x width"), ("81x479x832", "multiples of 16")],
)
def test_bad_bucket(bucket, message, call):
    """A bucket that the model cannot take is one error."""
    given = ("model=t2v_a14b", "expert=low_noise", "adapter=lora", "dry_run=true", f"bucket={bucket}")
    assert message in call("train.py", *given, check=False).error


def test_out_of_memory():
    """An out-of-memory error becomes one message with the advice; other errors pass."""
    with (
        pytest.raises(ValueError, match=r"cpu is out of memory after 0 GB were allocated\. swap\.blocks=20"),
        out_of_memory(torch.device("cpu"), lambda: "swap.blocks=20"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(KeyError), out_of_memory(torch.device("cpu"), lambda: "swap.blocks=20"):
        raise KeyError("other")


def test_largest_bucket():
    """The largest bucket is that of the most pixels, not of the last name; its clips are its own."""
    names = ["9x64x64", "17x32x64", "9x96x64", "1x256x128", "9x96x64"]
    name, clips = largest(SimpleNamespace(bucket_names=names))
    assert name == "9x96x64" and clips.tolist() == [2, 4]


def test_pair_holds_both(case):
    """A pair's plan holds both experts; with the inactive one on the host it needs its trained part alone."""
    alone = case.plan(Choice())
    both, waits = (replace(case, others=(case.sizes,), waits=waits).plan(Choice()) for waits in (False, True))
    assert both.weights == 2 * alone.weights and both.optimizer == waits.optimizer == 2 * alone.optimizer
    trained = case.sizes.trained * case.sizes.weight
    assert waits.weights == alone.weights + trained and waits.kept == both.kept == alone.kept
    assert waits.host - alone.host == 2 * (alone.weights - trained)


def test_buckets_between():
    """Between two traced buckets what is kept and moved lies within 1 % of a trace; working memory is no less."""
    module = without_values(lambda: memory.build(memory.Setting("lora", "block", "bf16", (1, 1, 8, 8))))
    shapes = {16: (1, 1, 8, 8), 288: (1, 3, 16, 24), 1280: (1, 5, 32, 32)}
    small, middle, large = (trace_blocks(module, Sample(shape, False, "bf16"), "block") for shape in shapes.values())
    guessed = between(small, large, (288 - 16) / (1280 - 16))
    working = ("forward", "backward")
    assert all(getattr(guessed, name) >= getattr(middle, name) for name in working)
    straight = {name: value for name, value in vars(middle).items() if name not in working}
    assert {name: vars(guessed)[name] for name in straight} == pytest.approx(straight, rel=0.01)
