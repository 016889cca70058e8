"""Two experts in one job: whose turn it is, averages of the weights, offloaded weights, and that a pair run is the
two single runs."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from wantrain.models import WanTransformer, adapters
from wantrain.models.formats.weights import read_file
from wantrain.models.offload import ModuleOffloader
from wantrain.runs.checkpoint import read_state
from wantrain.training.alternation import ExpertAlternation
from wantrain.training.engine.ema import Ema
from wantrain.training.engine.engine import StepOptions, Stepper
from wantrain.training.engine.optim import build_optimizer

NAMES = ("high_noise", "low_noise")
SIZE = {"num_attention_heads": 1, "attention_head_dim": 16, "text_dim": 8, "ffn_dim": 32, "num_layers": 1}


# ExpertAlternation ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("high", "low"), [(0.5, 0.5), (0.7, 0.3), (0.05, 0.95), (0.333, 0.667)])
def test_expert_shares(high, low):
    """Shares are exact at every step within half a step, and each expert's count rises in order."""
    alternation = ExpertAlternation({"high_noise": high, "low_noise": low})
    taken = {"high_noise": 0, "low_noise": 0}
    for step in range(3000):
        name, own = alternation.at(step)
        assert own == taken[name]
        taken[name] += 1
        assert abs(taken["high_noise"] - high * (step + 1)) <= 0.5 + 1e-9
        assert {each: alternation.count(each, step + 1) for each in taken} == taken


def test_single_expert_share():
    """A single expert has every step."""
    alternation = ExpertAlternation({"dense": 1})
    assert [alternation.at(step) for step in (0, 7)] == [("dense", 0), ("dense", 7)] and alternation.count(
        "dense", 9
    ) == 9


@pytest.mark.parametrize("share", [{"a": 0.5, "b": 0.4}, {"a": 1.0, "b": 0.0}, {"a": 1.5, "b": -0.5}])
def test_bad_shares_refused(share):
    """Shares that are not above 0, or do not sum to 1, are refused."""
    with pytest.raises(ValueError, match=r"experts\.share .* 1 together"):
        ExpertAlternation(share)


# Averages -------------------------------------------------------------------------------------------------------------


def stepper_over(module):
    optimizer = build_optimizer(lambda groups: torch.optim.SGD(groups, lr=1.0), module)
    return Stepper(Accelerator(cpu=True), module, optimizer, StepOptions(1, 1e9, "fp32"))


def test_ema_formula():
    """The average follows its formula, and replaces the weights only while it is applied."""
    module = torch.nn.Linear(2, 2)
    ema = Ema(stepper_over(module), 0.8)
    by_hand = module.weight.detach().clone()
    for step in range(1, 60):
        with torch.no_grad():
            module.weight.add_(1.0)
        ema.follow(step)
        weight = max(0.2, 9 / (10 + step))  # a young run forgets faster: at step 1 nine elevenths
        by_hand = by_hand + weight * (module.weight.detach() - by_hand)
    torch.testing.assert_close(ema.average["weight"], by_hand, rtol=1e-5, atol=1e-5)
    trained = module.weight.detach().clone()
    with ema.applied():
        assert torch.equal(module.weight, ema.stepper.module.weight) and not torch.equal(module.weight, trained)
        torch.testing.assert_close(module.weight.detach(), by_hand, rtol=1e-5, atol=1e-5)
    assert torch.equal(module.weight, trained)


# Idle weights ---------------------------------------------------------------------------------------------------------


def lora_model(seed):
    torch.manual_seed(seed)
    model = WanTransformer(**SIZE)
    adapters.inject(model, adapters.AdapterSettings(rank=2, alpha=2, targets="attention"), seed=seed)
    return model


def test_module_offloader():
    """Only the model in use has its frozen weights on the device.

    The CPU stands for the device: a weight that has moved in is a copy, one that has moved out is the host's own.
    """
    first, second = lora_model(0), lora_model(1)
    inputs = (torch.randn(1, 16, 1, 4, 4), torch.tensor([500.0]), torch.randn(1, 3, 8))
    wanted = [model(*inputs) for model in (first, second)]
    offloader = ModuleOffloader(torch.device("cpu"))
    hosts = []
    for model in (first, second):
        offloader.add(model)
        hosts.append({name: p.data_ptr() for name, p in model.named_parameters()})

    def moved_in(model, host):
        moved = {name for name, p in model.named_parameters() if p.data_ptr() != host[name]}
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert moved in (frozen, set()), "all frozen weights or none; what is trained never moves"
        return bool(moved)

    for turn in (0, 1, 1, 0, 1):
        answer = (first, second)[turn](*inputs)
        assert torch.equal(answer, wanted[turn])
        assert [moved_in(first, hosts[0]), moved_in(second, hosts[1])] == [turn == 0, turn == 1]


# A pair run -----------------------------------------------------------------------------------------------------------


def state(folder):
    """Every tensor of a checkpoint's folder."""
    return {
        f"{path.relative_to(folder)}/{key}": value
        for path in sorted(Path(folder).rglob("*.safetensors"))
        for key, value in read_file(path)[0].items()
    }


def equal(folder, other):
    mine, theirs = state(folder), state(other)
    assert mine.keys() == theirs.keys() and mine
    return all(torch.equal(mine[key], theirs[key]) for key in mine)


def log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


HOW = {
    "full": ("ema=0.9",),
    "lora": ("adapter=lora", "adapter.rank=2", "optimizer.lr=1e-2", "accumulate=2"),
    "offload": ("adapter=lora", "adapter.rank=2", "optimizer.lr=1e-2"),
}


@pytest.mark.parametrize("how", ["full", pytest.param("lora", marks=pytest.mark.slow), "offload"])
def test_pair_matches_single_runs(how, tiny, pair, call, tmp_path):
    """A pair run equals the two single runs bit for bit."""
    command = ("train.py", *tiny.train, f"weights={pair}", *HOW[how], "batch_size=2", "check_expert=off")
    share = ["experts.share.high_noise=0.3", "experts.share.low_noise=0.7", "experts.low_noise.lr=3e-3"]
    share += ["experts.offload=cpu"] if how == "offload" else []
    said = call(*command, "expert=both", *share, "run=both", "steps=10", "checkpoint.every=4").stdout
    assert "high_noise 3 of 10 = 30.0% (the noise distribution alone would give 30.0%)" in said
    call(*command, "expert=high_noise", "run=high", "steps=3")
    call(*command, "expert=low_noise", "run=low", "steps=7", "optimizer.lr=3e-3")
    runs = tmp_path / "runs"
    last = runs / "both" / "checkpoints" / "step_000010"
    assert equal(last / "high_noise", runs / "high" / "checkpoints" / "step_000003")
    assert equal(last / "low_noise", runs / "low" / "checkpoints" / "step_000007")
    for name, short in (("high_noise", "high"), ("low_noise", "low")):
        own = [(row["loss"], row["grad_norm"]) for row in log(runs / "both") if row["expert"] == name]
        assert own == [(row["loss"], row["grad_norm"]) for row in log(runs / short)]
    about = read_state(last)
    assert about["experts"] == {"high_noise": 3, "low_noise": 7} and about["samples"] == 20 and about["step"] == 10
    assert about["engine"] == "single" and about["config"]["expert"]["name"] == "both" and "torch" in about["versions"]


def test_pair_resume(tiny, pair, call, tmp_path):
    """A pair run resumes bit for bit."""
    command = ("train.py", *tiny.train, f"weights={pair}", "expert=both", "batch_size=2", "check_expert=off")
    command = (*command, "ema=0.9", "steps=9", "checkpoint.every=5")
    for name in ("broken", "whole"):
        call(*command, f"run={name}")
    broken, whole = (tmp_path / "runs" / name for name in ("broken", "whole"))
    newest = broken / "checkpoints" / "step_000009"
    newest.rename(tmp_path / "away")
    assert "step 5 of 9" in call(*command, "run=broken").stdout
    assert equal(newest, tmp_path / "away")
    assert [row["loss"] for row in log(broken)] == [row["loss"] for row in log(whole)]


def test_pair_validation(tiny, pair, call, tmp_path):
    """Validation of a pair measures both experts with their averages."""
    command = ("train.py", *tiny.train, f"weights={pair}", "expert=both", "batch_size=2", "check_expert=off")
    watched = ("data.holdout=0.2", "validation.every=2", "validation.clips=2", "validation.points=2", "ema=0.9")
    kept = ("checkpoint.every=2", "checkpoint.keep=1", "checkpoint.keep_best=true", "steps=6")
    seen = ("sample.every=6", "sample.count=1", "sample.steps=2", "model.num_frames=5")
    call(*command, *watched, *kept, *seen, "run=r")
    run = tmp_path / "runs" / "r"
    measured = {row["step"]: row for row in log(run) if "high_noise/validation_loss" in row}
    assert list(measured) == [0, 2, 4, 6]
    assert all(row["low_noise/validation_linear"] > 0 for row in measured.values())
    scores = {
        step: (row["high_noise/validation_loss"] + row["low_noise/validation_loss"]) / 2
        for step, row in measured.items()
        if step
    }
    best = min(scores, key=scores.get)
    left = {read_state(path)["step"]: read_state(path)["score"] for path in (run / "checkpoints").glob("step_*")}
    assert left.keys() == {best, 6} and left[best] == pytest.approx(scores[best])
    assert [path.name for path in sorted((run / "samples").glob("*.mp4"))] == ["step_000000_0.mp4", "step_000006_0.mp4"]


def test_bad_expert_settings_refused(tiny, call):
    """A setting of one expert that overrides no existing key, or is out of range, is refused."""
    command = ("train.py", *tiny.train, "expert=both", "init=scratch", "steps=2", "batch_size=2")
    error = call(*command, "experts.low_noise.rank=4", check=False).error
    assert error == "experts.low_noise.rank=4: there is no adapter.rank to differ from"
    error = call(*command, "experts.share.low_noise=0.6", check=False).error
    assert "experts.share (high_noise 0.5, low_noise 0.6) must be above 0 for each expert, and 1 together" in error
    assert "ema=1.5 must be above 0 and below 1" in call(*command, "ema=1.5", check=False).error
    error = call(*command, "model=tiny_dense", check=False).error
    assert error.startswith("expert=both: model=tiny_dense has dense")


def test_pair_init_from_loras(tiny, pair, call, tmp_path):
    """Each expert of a pair starts from its own LoRA, and the other expert's LoRA is refused."""
    command = ("train.py", *tiny.train, f"weights={pair}", "batch_size=2", "check_expert=off", "adapter=lora")
    call(*command, "expert=both", "run=first", "steps=4", "experts.high_noise.rank=3", "experts.low_noise.rank=5")
    made = {name: tmp_path / "runs/first/checkpoints/step_000004" / name / "adapter.safetensors" for name in NAMES}
    files = [f"experts.{name}.init={file}" for name, file in made.items()]
    said = call(*command, "expert=both", "run=second", "steps=2", *files).stdout
    assert "rank 3, alpha 16" in said and "rank 5, alpha 16" in said
    swapped = [f"experts.{name}.init={made[other]}" for name, other in zip(NAMES, reversed(NAMES), strict=True)]
    error = call(*command, "expert=both", "run=third", "steps=2", *swapped, check=False).error
    assert "was trained for low_noise, not for high_noise" in error
