"""Schedules as functions of progress; parameter groups; one update."""

import functools
import itertools
import math

import pytest
import torch
from accelerate import Accelerator

from wantrain.models import WanTransformer, adapters
from wantrain.training.optim import MuonAdamW, Schedule, build_optimizer, named_trainable
from wantrain.training.stepper import Stepper

SIZE = {"num_attention_heads": 1, "attention_head_dim": 16, "text_dim": 8, "ffn_dim": 32, "num_layers": 1}
adamw = functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)


def test_cosine_warms_up_in_a_line_and_ends_at_its_floor():
    schedule = Schedule(shape="cosine", warmup=10, floor=0.1)
    scales = [schedule(step, 200) for step in range(200)]
    assert scales[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert scales[10] == 1.0 == max(scales)
    assert all(later < earlier for earlier, later in itertools.pairwise(scales[10:]))
    assert scales[105] == pytest.approx(0.55), "half way down at half of the rest"
    assert scales[-1] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 189 / 190)))
    assert schedule(200, 200) == pytest.approx(0.1)


def test_constant_stays_at_the_peak_however_long_the_run_becomes():
    schedule = Schedule(shape="constant", warmup=5, floor=1.0)
    assert [schedule(step, 100) for step in range(5, 100)] == [1.0] * 95
    assert [schedule(step, 100) for step in range(100)] == [schedule(step, 1000) for step in range(100)]


def test_a_short_run_warms_up_for_a_tenth_at_most():
    schedule = Schedule(shape="cosine", warmup=50, floor=0.0)
    assert [schedule(step, 20) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert schedule(0, 1) == 1.0


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match=r"schedule\.shape='linear' is unknown; choose cosine or constant"):
        Schedule(shape="linear")


def test_every_trained_parameter_is_in_one_group_and_only_matrices_decay():
    model = WanTransformer(**SIZE)
    optimizer = build_optimizer(adamw, model)
    names = {parameter: name for name, parameter in named_trainable(model).items()}
    groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    hidden, matrices, others = groups
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


def test_muon_moves_the_matrices_inside_blocks_and_adamw_the_rest():
    """The same updates as torch's two optimizers side by side; Muon's has the size of AdamW's."""
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


def test_muon_with_adamw_goes_on_exactly_from_what_was_saved():
    straight, broken = WanTransformer(**SIZE), WanTransformer(**SIZE)
    broken.load_state_dict(straight.state_dict())
    first, second = build_optimizer(muon, straight), build_optimizer(muon, broken)
    for seed in range(2):
        for model, optimizer in ((straight, first), (broken, second)):
            gradients(model, seed)
            optimizer.step()
    how = {"accumulate": 1, "clip": 1.0, "precision": "fp32"}
    kept = Stepper(Accelerator(cpu=True), broken, second, **how).optimizer_state()
    resumed = build_optimizer(muon, broken)
    Stepper(Accelerator(cpu=True), broken, resumed, **how).restore_optimizer_state(kept, "the first half")
    for group in resumed.param_groups:  # the schedule's way to set the rate must reach both halves
        group["lr"] = group["peak_lr"] * 0.5
    for group in first.param_groups:
        group["lr"] = group["peak_lr"] * 0.5
    for model, optimizer in ((straight, first), (broken, resumed)):
        gradients(model, 7)
        optimizer.step()
    for name, parameter in straight.named_parameters():
        assert torch.equal(parameter, broken.get_parameter(name)), name


def test_frozen_parameters_are_in_no_group():
    model = WanTransformer(**SIZE)
    adapters.inject(model, rank=2, alpha=2, targets="attention", seed=0)
    optimizer = build_optimizer(adamw, model)
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(p) for name, p in model.named_parameters() if "lora_" in name} and len(trained) == 16


def test_an_update_is_clipped_scaled_and_cleared_and_decays_matrices_alone():
    module = torch.nn.Linear(3, 2)
    module.weight.data.fill_(1.0)
    module.bias.data.fill_(1.0)
    make = functools.partial(torch.optim.SGD, lr=0.5, weight_decay=0.1)
    accelerator = Accelerator(cpu=True)
    stepper = Stepper(accelerator, module, build_optimizer(make, module), accumulate=2, clip=1.0, precision="fp32")
    stepper.begin(0.2)
    for micro_step in range(2):  # each gives gradient 3 to all of 2 x 3 weights and (through zeros) none to the biases
        stepper.backward((module.weight * 3).sum() + 0 * module.bias.sum(), last=micro_step == 1)
    norm = stepper.update()
    assert norm.item() == pytest.approx(3 * math.sqrt(6)), "the mean over micro-steps, before clipping"
    # Clipped to norm 1: 1 / sqrt(6) each; plus decay 0.1 * 1; times the rate 0.5 * 0.2.
    assert module.weight.flatten().tolist() == pytest.approx([1 - 0.1 * (1 / math.sqrt(6) + 0.1)] * 6)
    assert module.bias.tolist() == [1.0, 1.0]
    assert module.weight.grad is None
    assert [group["peak_lr"] for group in stepper.optimizer.param_groups] == [0.5, 0.5]
