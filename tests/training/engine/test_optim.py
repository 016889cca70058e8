"""Schedules as functions of progress; parameter groups; one update."""

import functools
import itertools
import math
import re
import sys

import pytest
import torch
from accelerate import Accelerator

from wantrain import checks, config
from wantrain.models import WanTransformer, adapters
from wantrain.training.engine.engine import StepOptions, Stepper
from wantrain.training.engine.optim import (
    FALLS,
    MuonAdamW,
    Schedule,
    adamw_8bit,
    build_optimizer,
    named_trainable,
    plain_tensors,
)

SIZE = {"num_attention_heads": 1, "attention_head_dim": 16, "text_dim": 8, "ffn_dim": 32, "num_layers": 1}
adamw = functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)


def test_cosine_schedule():
    """The cosine schedule warms up linearly and ends at its floor."""
    schedule = Schedule(shape="cosine", warmup=10, floor=0.1)
    scales = [schedule(step, 200) for step in range(200)]
    assert scales[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert scales[10] == 1.0 == max(scales)
    assert all(later < earlier for earlier, later in itertools.pairwise(scales[10:]))
    assert scales[105] == pytest.approx(0.55), "half way down at half of the rest"
    assert scales[-1] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 189 / 190)))
    assert schedule(200, 200) == pytest.approx(0.1)


def test_constant_schedule():
    """The constant schedule stays at the peak after warm-up, whatever the length of the run."""
    schedule = Schedule(shape="constant", warmup=5, floor=1.0)
    assert [schedule(step, 100) for step in range(5, 100)] == [1.0] * 95
    assert [schedule(step, 100) for step in range(100)] == [schedule(step, 1000) for step in range(100)]


def test_decay_schedule():
    """A schedule with decay stays at the peak and falls over the last share of the steps only."""
    schedule = Schedule(shape="sqrt", warmup=10, decay=0.2, floor=0.1)
    scales = [schedule(step, 200) for step in range(200)]
    assert scales[9] < 1 and scales[10:161] == [1.0] * 151, (
        "the peak until 160 of 200, where the fall is still at its head"
    )
    assert all(later < earlier for earlier, later in itertools.pairwise(scales[160:]))
    assert scales[170] == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(10 / 40)))
    assert schedule(200, 200) == pytest.approx(0.1)
    assert [schedule(step, 400) for step in range(160)] == scales[:160], "a longer run has the same beginning"
    straight = Schedule(shape="linear", decay=0.5)
    assert [straight(step, 8) for step in range(9)] == pytest.approx([1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize("shape", FALLS)
@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 10, 173])
def test_schedule_bounds(shape, decay, steps):
    """Every schedule stays between floor and peak after warm-up, and reaches both if it decays."""
    schedule = Schedule(shape=shape, warmup=20, decay=decay, floor=0.25)
    scales = [schedule(step, steps) for step in range(steps + 1)]
    warmup = min(20, steps // 10)
    assert max(scales) == 1.0 and all(0 < scale < 1 for scale in scales[:warmup])
    assert min(scales[warmup:]) >= 0.25
    falls = shape != "constant" and round(decay * steps) > 0
    assert scales[-1] == pytest.approx(0.25 if falls else 1.0)


def test_short_run_warmup():
    """Warm-up takes at most a tenth of a run's steps."""
    schedule = Schedule(shape="cosine", warmup=50, floor=0.0)
    assert [schedule(step, 20) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert schedule(0, 1) == 1.0


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"shape": "wsd"}, "schedule.shape='wsd' is unknown; choose one of constant, linear, cosine, sqrt"),
        ({"warmup": -1}, "schedule.warmup=-1 must not be below 0"),
        ({"decay": 1.5}, "schedule.decay=1.5 is a share"),
        ({"floor": -0.1}, "schedule.floor=-0.1 is a share"),
    ],
)
def test_bad_schedule_refused(bad, words):
    """A schedule with an unknown shape or a value out of range is refused."""
    with pytest.raises(ValueError, match=re.escape(words)):
        Schedule(**bad)


def test_parameter_groups():
    """Every trained parameter is in exactly one group, and only matrices have weight decay."""
    model = WanTransformer(**SIZE)
    optimizer = build_optimizer(adamw, model)
    names = {parameter: name for name, parameter in named_trainable(model).items()}
    groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    hidden, matrices, others = groups
    assert [group["tag"] for group in optimizer.param_groups] == ["hidden", "matrices", "rest"]
    sizes = [sum(parameter.numel() for parameter in group["params"]) for group in optimizer.param_groups]
    assert sum(sizes) == sum(parameter.numel() for parameter in model.parameters())
    assert sorted(hidden + matrices + others) == sorted(names.values())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    assert all(name.startswith("blocks.") and name.endswith("weight") and "norm" not in name for name in hidden)
    assert {"blocks.0.ffn.0.weight", "blocks.0.self_attn.q.weight"} <= set(hidden)
    assert {"patch_embedding.weight", "head.head.weight", "text_embedding.0.weight"} <= set(matrices)
    assert all("bias" in name or "norm" in name or "modulation" in name for name in others)


muon = functools.partial(MuonAdamW, lr=1e-2, muon_lr=2e-2, weight_decay=0.1)


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_muon_matches_torch():
    """Muon updates the matrices inside blocks, and AdamW updates the rest.

    The updates equal those of torch's two optimizers side by side; Muon's has the size of AdamW's.
    """
    ours, theirs = WanTransformer(**SIZE), WanTransformer(**SIZE)
    theirs.load_state_dict(ours.state_dict())
    start = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    optimizer = build_optimizer(muon, ours)
    split = {True: [], False: []}
    for name, parameter in theirs.named_parameters():
        split[name.startswith("blocks.") and parameter.ndim == 2].append(parameter)
    decayed = [p for p in split[False] if p.ndim >= 2 and p.shape[0] > 1]
    plain = [p for p in split[False] if not (p.ndim >= 2 and p.shape[0] > 1)]
    peers = [
        torch.optim.Muon(split[True], lr=2e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=1e-2, betas=(0.9, 0.99)
        ),
    ]  # fmt: skip
    for seed in range(3):
        gradients(ours, seed)
        gradients(theirs, seed)
        for each in (optimizer, *peers):
            each.step()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter, msg=name)
    moved = (ours.get_parameter("blocks.0.ffn.0.weight") - start["blocks.0.ffn.0.weight"]).square().mean().sqrt()
    assert 0.1 < moved / 2e-2 < 1.0, "three updates of about 0.2 to 0.4 of the rate each, partly cancelling"


def test_muon_resume():
    """Muon with AdamW resumes bit for bit from its saved state."""
    straight, broken = WanTransformer(**SIZE), WanTransformer(**SIZE)
    broken.load_state_dict(straight.state_dict())
    first, second = build_optimizer(muon, straight), build_optimizer(muon, broken)
    for seed in range(2):
        for model, optimizer in ((straight, first), (broken, second)):
            gradients(model, seed)
            optimizer.step()
    how = StepOptions(accumulate=1, clip=1.0, precision="fp32")
    kept = Stepper(Accelerator(cpu=True), broken, second, how).optimizer_state()
    resumed = build_optimizer(muon, broken)
    Stepper(Accelerator(cpu=True), broken, resumed, how).restore_optimizer_state(kept, "the first half")
    for group in resumed.param_groups:  # the schedule's way to set the rate must reach both halves
        group["lr"] = group["peak_lr"] * 0.5
    for group in first.param_groups:
        group["lr"] = group["peak_lr"] * 0.5
    for model, optimizer in ((straight, first), (broken, resumed)):
        gradients(model, 7)
        optimizer.step()
    for name, parameter in straight.named_parameters():
        assert torch.equal(parameter, broken.get_parameter(name)), name


def test_optimizer_without_state_resumes():
    """Plain SGD writes an empty state; another optimizer refuses it."""
    assert goes_on_exactly(functools.partial(torch.optim.SGD, lr=1e-2, weight_decay=0.1)) == {}
    model, how = WanTransformer(**SIZE), StepOptions(accumulate=1, clip=1.0, precision="fp32")
    for make in (functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9), torch.optim.AdamW):
        stepper = Stepper(Accelerator(cpu=True), model, build_optimizer(make, model), how)
        with pytest.raises(ValueError, match="the run before holds the state of other parameters"):
            stepper.restore_optimizer_state({}, "the run before")


@pytest.mark.parametrize("name", ["Adafactor", "SGD", "NAdam", "RMSprop", "AdamW"])
def test_torch_optimizers_resume(name):
    """Any optimizer of torch.optim trains and resumes exactly."""
    more = {"fused": True} if name == "AdamW" else {"momentum": 0.9} if name == "SGD" else {}
    goes_on_exactly(functools.partial(getattr(torch.optim, name), lr=1e-2, weight_decay=0.1, **more))


def goes_on_exactly(make, size=SIZE):
    """An update, a save, and another update by an optimizer that takes the save over: as if it had been one."""
    straight, broken = WanTransformer(**size), WanTransformer(**size)
    broken.load_state_dict(straight.state_dict())
    start = {name: parameter.detach().clone() for name, parameter in straight.named_parameters()}
    first, second = build_optimizer(make, straight), build_optimizer(make, broken)
    for model, optimizer in ((straight, first), (broken, second)):
        gradients(model, 0)
        optimizer.step()
    how = StepOptions(accumulate=1, clip=1.0, precision="fp32")
    kept = Stepper(Accelerator(cpu=True), broken, second, how).optimizer_state()
    assert all(type(tensor) is torch.Tensor for tensor in kept.values()), "what safetensors can write"
    resumed = build_optimizer(make, broken)
    Stepper(Accelerator(cpu=True), broken, resumed, how).restore_optimizer_state(kept, "the first half")
    for model, optimizer in ((straight, first), (broken, resumed)):
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * 0.5
        gradients(model, 7)
        optimizer.step()
    for name, parameter in straight.named_parameters():
        assert torch.equal(parameter, broken.get_parameter(name)), name
        assert not torch.equal(parameter, start[name]), name
    return kept


def test_8bit_adamw():
    """8-bit moments are saved as they are, and move the weights as AdamW does, within 5 %."""
    pytest.importorskip("torchao", reason="the extra 8bit is not installed")
    large = {**SIZE, "num_attention_heads": 2, "attention_head_dim": 32, "text_dim": 64, "ffn_dim": 128}
    with torch.compiler.set_stance("force_eager"):  # the same arithmetic, without a compiler
        kept = goes_on_exactly(functools.partial(adamw_8bit, lr=1e-2), large)
        matrix = {key: tensor for key, tensor in kept.items() if key.startswith("blocks.0.self_attn.q.weight/")}
        assert matrix["blocks.0.self_attn.q.weight/exp_avg.codes"].dtype == torch.uint8
        large_parts = sum(tensor.nbytes for key, tensor in matrix.items() if not key.endswith((".qmap", "/step")))
        assert large_parts == 2 * 64 * 64 * (1 + 4 / 256), "a byte per element, and a scale per 256"
        ours, theirs = WanTransformer(**large), WanTransformer(**large)
        theirs.load_state_dict(ours.state_dict())
        start = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
        optimizers = (
            build_optimizer(functools.partial(adamw_8bit, lr=1e-3), ours),
            build_optimizer(
                functools.partial(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01), theirs
            ),
        )
        for seed in range(10):
            for model, optimizer in zip((ours, theirs), optimizers, strict=True):
                gradients(model, seed)
                optimizer.step()
    for name, parameter in theirs.named_parameters():
        moved = parameter - start[name]
        assert (ours.get_parameter(name) - parameter).norm() < 0.05 * moved.norm(), name


def test_8bit_needs_torchao(monkeypatch):
    """optimizer=adamw_8bit without torchao is an error that names the extra."""
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ValueError, match=r"optimizer=adamw_8bit needs torchao .*pip install 'wantrain\[8bit\]'"):
        build_optimizer(functools.partial(adamw_8bit, lr=1e-2), WanTransformer(**SIZE))


def test_non_tensor_state_refused():
    """Optimizer state that is no tensor is refused, but for a count of steps."""
    with pytest.raises(ValueError, match="the optimizer keeps rate as float; only tensors can be saved"):
        plain_tensors({"rate": 0.3})
    assert torch.equal(plain_tensors({"step": 3})["step"], torch.tensor(3.0))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["optimizer=other", "+optimizer.momentun=0.9"],
         "optimizer.momentun is no keyword of torch.optim.SGD; it takes lr, momentum, "),
        (["optimizer=other", "optimizer._target_=torch.optim.Nothing"],
         "optimizer._target_=torch.optim.Nothing is no class that can be imported"),
        (["optimizer=other", "optimizer._target_=wantrain.training.engine.optim.MuonAdamW"],
         "wantrain.training.engine.optim.MuonAdamW needs optimizer.muon_lr; give +optimizer.muon_lr=VALUE"),
        (["schedule=wsd", "schedule.decay=2"], "schedule.decay=2 must be at least 0 and at most 1"),
    ],
)  # fmt: skip
def test_bad_optimizer_config_refused(settings, words):
    """An impossible optimizer or schedule is one error before work starts."""
    with pytest.raises(ValueError, match=re.escape(words)):
        checks.check(config.compose("train", settings))


def test_optimizer_from_command_line():
    """The command line builds an optimizer of the user's choice, and a keyword that it lacks is an error."""
    cfg = config.compose("train", ["optimizer=other", "+optimizer.momentum=0.9", "optimizer.lr=0.5"])
    checks.check(cfg)
    optimizer = build_optimizer(config.build(cfg.optimizer, _partial_=True), WanTransformer(**SIZE))
    assert isinstance(optimizer, torch.optim.SGD)
    assert {(group["momentum"], group["lr"]) for group in optimizer.param_groups} == {(0.9, 0.5)}
    with pytest.raises(ValueError, match=r"the optimizer cannot be made: .*nonsense"):
        build_optimizer(functools.partial(torch.optim.SGD, nonsense=1), WanTransformer(**SIZE))


def test_frozen_parameters():
    """Frozen parameters are in no group of the optimizer."""
    model = WanTransformer(**SIZE)
    adapters.inject(model, adapters.AdapterSettings(rank=2, alpha=2, targets="attention"), seed=0)
    optimizer = build_optimizer(adamw, model)
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(p) for name, p in model.named_parameters() if "lora_" in name} and len(trained) == 16


def test_stepper_update():
    """A step clips the mean gradient, scales the rate, decays matrices only, and clears the gradients."""
    module = torch.nn.Linear(3, 2)
    module.weight.data.fill_(1.0)
    module.bias.data.fill_(1.0)
    make = functools.partial(torch.optim.SGD, lr=0.5, weight_decay=0.1)
    accelerator = Accelerator(cpu=True)
    stepper = Stepper(accelerator, module, build_optimizer(make, module), StepOptions(2, 1.0, "fp32"))
    stepper.begin(0.2, 0)
    for micro_step in range(2):  # each gives gradient 3 to all of 2 x 3 weights and (through zeros) none to the biases
        stepper.backward((module.weight * 3).sum() + 0 * module.bias.sum(), last=micro_step == 1)
    norm = stepper.clip_gradients()
    stepper.step(update=True)
    assert norm.item() == pytest.approx(3 * math.sqrt(6)), "the mean over micro-steps, before clipping"
    # Clipped to norm 1: 1 / sqrt(6) each; plus decay 0.1 * 1; times the rate 0.5 * 0.2.
    assert module.weight.flatten().tolist() == pytest.approx([1 - 0.1 * (1 / math.sqrt(6) + 0.1)] * 6)
    assert module.bias.tolist() == [1.0, 1.0]
    assert module.weight.grad is None
    assert [group["peak_lr"] for group in stepper.optimizer.param_groups] == [0.5, 0.5]
