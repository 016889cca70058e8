"""Prodigy and schedule-free AdamW: what they compute, that what they keep is saved, and which settings they refuse."""

import copy
import functools
import re

import pytest
import torch
from accelerate import Accelerator

from wantrain import checks, config
from wantrain.training.engine.adaptive import adaptive_name, group_numbers, keeps_average, prodigy, schedule_free
from wantrain.training.engine.ema import OwnAverage
from wantrain.training.engine.engine import StepOptions, Stepper
from wantrain.training.engine.optim import build_optimizer, named_trainable
from wantrain.training.engine.placement import check_engine
from wantrain.training.planning.memory import state_bytes

pytest.importorskip("prodigyopt", reason="the extra adaptive is not installed")
pytest.importorskip("schedulefree", reason="the extra adaptive is not installed")
MAKERS = {
    "prodigy": functools.partial(prodigy, lr=1.0, d0=1e-3),
    "schedule_free": functools.partial(schedule_free, lr=0.1),
}
HOW = StepOptions(accumulate=1, clip=None, precision="fp32")


def compose(*overrides):
    return config.compose("train", list(overrides))


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))


def started(kind, module=None):
    """A stepper over a small network, with so much as a run has before its first step."""
    module = network() if module is None else module
    return Stepper(Accelerator(cpu=True), module, build_optimizer(MAKERS[kind], module), HOW)


def steps(stepper, first, last, scale=1.0):
    """Steps towards a target that does not move, each on data of its own number."""
    for number in range(first, last):
        random = torch.Generator().manual_seed(number)
        x = torch.randn(8, 6, generator=random)
        stepper.begin(scale, number)
        stepper.backward((stepper.module(x) - x[:, :3]).square().mean(), last=True)
        stepper.clip_gradients()
        stepper.step(update=True)


def values(stepper):
    return {name: parameter.detach().clone() for name, parameter in named_trainable(stepper.module).items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", MAKERS)
def test_resumes_exactly(kind):
    """Five steps, a save, and five more by an optimizer that takes the save over, are ten: numbers of groups too."""
    straight, broken = started(kind), started(kind)
    steps(straight, 0, 10)
    steps(broken, 0, 5)
    kept = {key: tensor.clone() for key, tensor in broken.optimizer_state().items()}
    assert {tensor.dtype for key, tensor in kept.items() if key.endswith("/group")} == {torch.float64}
    resumed = started(kind, copy.deepcopy(broken.module))
    resumed.restore_optimizer_state(kept, "the first half")
    steps(resumed, 5, 10)
    assert same(values(resumed), values(straight))
    numbers = [list(group_numbers(each.optimizer.optimizer).values()) for each in (resumed, straight)]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*numbers, strict=True))
    # Without the numbers of the groups the run would go on otherwise.
    other = started(kind, copy.deepcopy(broken.module))
    without = {key: tensor.clone() for key, tensor in kept.items() if not key.endswith("/group")}
    with pytest.raises(ValueError, match=r"the first half holds no k, .*; it belongs to a run of another optimizer"):
        other.restore_optimizer_state(without, "the first half")


def test_prodigy_finds_a_rate():
    """The estimate grows from its start, and the loss falls, without a rate being given; the log has rate x estimate."""
    stepper = started("prodigy")
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(99))
    before = (stepper.module(x) - x[:, :3]).square().mean().item()
    steps(stepper, 0, 60)
    after = (stepper.module(x) - x[:, :3]).square().mean().item()
    (estimate,) = {group["d"] for group in stepper.optimizer.param_groups}
    assert estimate > 5e-3 and after < 0.6 * before, (estimate, before, after)


def test_prodigy_says_nothing(capsys):
    """The library's line about weight decay is not shown: all optimizers here decay so."""
    started("prodigy")
    assert capsys.readouterr().out == ""


def test_schedule_free_recursion():
    """Weights in training and their average follow the paper's recursion, in float64 (arXiv 2405.15682, algorithm 1).

    With warm-up, whose steps count in the average by the square of the largest rate so far.
    """
    module = torch.nn.Linear(4, 4, bias=False)
    stepper = Stepper(
        Accelerator(cpu=True), module, build_optimizer(functools.partial(schedule_free, lr=0.1), module), HOW
    )
    average = OwnAverage(stepper, moved=False)
    z = x = y = module.weight.detach().double().clone()
    v, total, (b1, b2) = torch.zeros_like(z), 0.0, (0.9, 0.99)
    for number in range(6):
        rate = 0.1 * min(1.0, (number + 1) / 4)
        stepper.begin(rate / 0.1, number)
        slope = torch.randn(4, 4, generator=torch.Generator().manual_seed(number))
        stepper.backward((module.weight * slope).sum(), last=True)
        stepper.clip_gradients()
        stepper.step(update=True)
        grad = slope.double()
        v = b2 * v + (1 - b2) * grad.square()
        step = grad / ((v / (1 - b2 ** (number + 1))).sqrt() + 1e-8) + 0.01 * y
        total += rate**2
        z = z - rate * step
        x = x + (z - x) * rate**2 / total
        y = (1 - b1) * z + b1 * x
        torch.testing.assert_close(module.weight.double(), y, rtol=1e-5, atol=1e-6)
        with average.applied():
            torch.testing.assert_close(module.weight.double(), x, rtol=1e-5, atol=1e-5)


def test_looking_changes_nothing():
    """The average is shown and put away without a changed bit, before the first step too; inside, what trains is live."""
    watched, unwatched = started("schedule_free"), started("schedule_free")
    average = OwnAverage(watched, moved=False)
    start = values(watched)
    with average.applied():
        assert same(values(watched), start)
    for number in range(6):
        for stepper in (watched, unwatched):
            steps(stepper, number, number + 1)
        live = values(watched)
        with average.applied():
            shown = values(watched)
            with average.applied():
                assert same(values(watched), live)
            assert same(values(watched), shown)
            # After one step alone all weight of the average is on that step, and z, x and y are one.
            assert number == 0 or not any(torch.equal(shown[name], live[name]) for name in live)
        assert same(values(watched), live) and average.average == {}
    assert same(values(watched), values(unwatched))
    average.follow(6)
    assert average.moved


def test_state_bytes():
    """The planner's bytes of state per weight: four moments of Prodigy's, two of schedule-free AdamW's."""
    assert {kind: state_bytes(make) for kind, make in MAKERS.items()} == {"prodigy": 16, "schedule_free": 8}


def test_names():
    """The names that messages give, and who keeps an average."""
    targets = {
        name: config.plain(compose(f"optimizer={name}").optimizer)["_target_"] for name in (*MAKERS, "adamw", "muon")
    }
    assert {name: adaptive_name(target) for name, target in targets.items()} == {
        "prodigy": "prodigy", "schedule_free": "schedule_free", "adamw": None, "muon": None,
    }  # fmt: skip
    kept = {name: keeps_average({"ema": None, "optimizer": {"_target_": target}}) for name, target in targets.items()}
    assert kept == {"prodigy": False, "schedule_free": True, "adamw": False, "muon": False}
    assert keeps_average({"ema": 0.9, "optimizer": {"_target_": targets["adamw"]}})


FREE = ("optimizer=schedule_free", "schedule=constant")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (("optimizer=prodigy", "optimizer.lr=1e-4"), "lr=0.0001 would multiply what it finds; leave optimizer.lr (and"),
        (("optimizer=prodigy", "expert=both", "experts.low_noise.lr=0.5"), "(and experts.low_noise.lr) at 1, and give"),
        (("optimizer=prodigy", "optimizer.d_coef=0"), "optimizer.d_coef=0 must be above 0"),
        (("optimizer=schedule_free",), "(schedule.shape=cosine); give schedule=constant, whose warm-up it heeds"),
        (("optimizer=schedule_free", "schedule=wsd"), "(schedule.shape=sqrt); give schedule=constant"),
        ((*FREE, "ema=0.99"), "ema=0.99 with optimizer=schedule_free, which keeps an average of its own"),
        (
            (*FREE, "update_in_backward=true", "clip=null"),
            "update_in_backward=true updates one parameter at a time, and",
        ),
        (
            ("optimizer=prodigy", "trained.dtype=bf16", "precision=bf16"),
            "trained.dtype=bf16 updates one parameter at a time, and optimizer=prodigy looks at all of them together",
        ),
        (
            ("optimizer=other", "optimizer._target_=prodigyopt.Prodigy", "optimizer.lr=1"),
            "optimizer._target_=prodigyopt.Prodigy: what it keeps beside the weights would not be saved; give",
        ),
    ],
)
def test_traps(wrong, words):
    """The usual traps end at the start, each with its fix."""
    with pytest.raises(ValueError, match=re.escape(words)):
        checks.check(compose(*wrong))


@pytest.mark.parametrize(
    "right", [("optimizer=prodigy",), ("optimizer=prodigy", "ema=0.9", "schedule=constant"), (*FREE, "expert=both")]
)
def test_allowed(right):
    """What goes together is accepted."""
    checks.check(compose(*right))


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3", "fsdp2"])
@pytest.mark.parametrize("more", [("optimizer=prodigy",), FREE, ("adapter=lokr",)], ids=["prodigy", "free", "lokr"])
def test_engines(more, engine):
    """They train in one process or under DDP; a LoKr under all but ZeRO-3."""
    own = {"low_noise": config.settings(compose(*more))}
    check_engine("single", own)
    check_engine("ddp", own)
    if more == ("adapter=lokr",) and engine != "zero3":
        check_engine(engine, own)
        return
    with pytest.raises(ValueError, match=r"optimizer=\w+ looks at whole weights|adapter=lokr under ZeRO-3"):
        check_engine(engine, own)
