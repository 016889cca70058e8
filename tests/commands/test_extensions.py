"""A loss with a frozen reference, and an optimizer, added by files of one's own: no file of the project is edited."""

import json

import pytest
import torch

CODE = '''
import torch
from wantrain.losses import FlowMatching, Loss


class Anchored(FlowMatching):
    """The velocity loss, and how far the velocity is from the frozen reference's."""

    networks = ("reference",)

    def __init__(self, *, beta, **settings):
        super().__init__(**settings)
        self.beta = beta

    def __call__(self, model, batch, draws):
        answers = []

        def noted(*inputs, **keywords):
            answers.append((inputs, keywords, model(*inputs, **keywords)))
            return answers[-1][2]

        loss = super().__call__(noted, batch, draws)
        (inputs, keywords, velocity), = answers
        anchor = (velocity - self.attached["reference"](*inputs, **keywords)).square().mean()
        return Loss(loss.value + self.beta * anchor, loss.per_sample, loss.sigma, parts={"anchor": anchor.detach()})


class Sign(torch.optim.Optimizer):
    """Steps of one size, in the direction of the gradient's sign."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter -= group["lr"] * parameter.grad.sign()
                    self.state[parameter]["steps"] = self.state[parameter].get("steps", torch.zeros(())) + 1
'''
LOSS = """
# Choose it to stay near the model that the run starts from.
_target_: mine.Anchored
beta: 0.5
density: ${noise.density}
shift: ${noise.shift}
low: ${expert.low}
high: ${expert.high}
batch_size: ${batch_size}
seed: ${seed}
"""
OPTIMIZER = "_target_: mine.Sign\nlr: 1.0e-3\n"
RUN = (
    "batch_size=2",
    "steps=10",
    "validation.every=5",
    "validation.clips=2",
    "validation.points=2",
    "data.holdout=0.3",
)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with code and options of one's own; gives the word that names it on the command line."""
    (tmp_path / "mine.py").write_text(CODE)
    for group, name, text in (("loss", "anchored", LOSS), ("optimizer", "sign", OPTIMIZER)):
        (tmp_path / "conf" / group).mkdir(parents=True)
        (tmp_path / "conf" / group / f"{name}.yaml").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return f"hydra.searchpath=[file://{tmp_path / 'conf'}]"


def rows(tmp_path, run="r"):
    return [json.loads(line) for line in (tmp_path / "runs" / run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_loss_with_reference(adapter, mine, tiny, pair, call, tmp_path):
    """It trains and validates; the reference is the model of step 0, so the anchor begins at zero and then grows."""
    command = ("train.py", *tiny.train, f"weights={pair}", *RUN, f"adapter={adapter}", "optimizer.lr=1e-2", "run=r")
    call(*command, mine, "loss=anchored")
    steps = [row for row in rows(tmp_path) if "loss" in row]
    anchors = [row["anchor"] for row in steps]
    assert len(steps) == 10 and anchors[0] == 0.0 and all(anchor > 0 for anchor in anchors[1:])
    assert [row["step"] for row in rows(tmp_path) if "validation_loss" in row] == [0, 5, 10]
    call(*command[:-1], mine, "loss=anchored", "loss.beta=100", "run=near")
    assert rows(tmp_path, "near")[-1]["anchor"] < anchors[-1], "a heavier anchor keeps the model nearer"


def test_reference_of_continued_adapter(mine, tiny, pair, call, tmp_path):
    """A LoRA that continues from a file has itself, as it was then, as its reference: the anchor begins at zero."""
    command = ("train.py", *tiny.train, f"weights={pair}", *RUN, "adapter=lora", "optimizer.lr=1e-2")
    call(*command, "steps=3", "run=first")
    (lora,) = (tmp_path / "runs" / "first" / "checkpoints").glob("*/adapter.safetensors")
    call(*command, mine, "loss=anchored", f"adapter.init={lora}", "run=r")
    anchors = [row["anchor"] for row in rows(tmp_path) if "anchor" in row]
    assert len(anchors) == 10 and anchors[0] == 0.0 and anchors[-1] > 0


def test_loss_with_unknown_network(mine, tiny, pair, call, tmp_path):
    """The error for a loss that needs an unknown network names the networks that train.py provides."""
    code = (tmp_path / "mine.py").read_text().replace('("reference",)', '("teacher",)').replace("Anchored", "Taught")
    (tmp_path / "other_mine.py").write_text(code)
    run = ("train.py", *tiny.train, f"weights={pair}", *RUN, mine, "loss=anchored", "loss._target_=other_mine.Taught")
    error = call(*run, check=False).error
    assert error == "the loss Taught needs a network 'teacher'; train.py provides: reference, base"


def test_optimizer(mine, tiny, call, tmp_path):
    """Every weight moves by the learning rate in the first step; the run resumes."""
    command = ("train.py", *tiny.train, *RUN, "init=scratch", mine, "optimizer=sign", "schedule=constant", "run=r")
    call(*command, "steps=3")
    call(*command)
    steps = [row for row in rows(tmp_path) if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 11))
    assert torch.tensor([row["loss"] for row in steps]).isfinite().all()
    assert "validation_loss" in rows(tmp_path)[-1]
