"""The benchmarks' one format: ratios, goals and verdicts, and the page's table; and diffusers' side of a comparison."""

import math
from importlib import import_module
from pathlib import Path

import pytest
import torch

from wantrain.models import WanTransformer, adapters
from wantrain.models.activation_policy import ActivationPolicy

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch):
    """bench("result"): a script of benchmarks/, as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module


def test_measure(bench):
    """A result is the median of the pairs' ratios, not the ratio of medians."""
    sides = {"ours": [1.0, 2.0, 9.0], "theirs": [2.0, 2.0, 3.0]}
    row = bench("result").measure("s", sides, at_most=1.0)
    assert row["result"] == {"median": 1.0, "least": 0.5, "most": 3.0, "count": 3}
    assert row["sides"] == sides and row["goal"] == {"at_most": 1.0} and row["verdict"] == "met"
    assert bench("result").measure("s", sides, at_most=0.99)["verdict"] == "missed"
    assert bench("result").measure("s", sides, at_least=1.01)["verdict"] == "missed"
    assert bench("result").measure("s", sides)["verdict"] == "no goal"
    assert bench("result").measure("bytes", {"ours": [44.0]}, at_most=64)["result"]["median"] == 44.0
    with pytest.raises(ValueError, match="zip"):
        bench("result").measure("s", {"ours": [1.0, 2.0], "theirs": [1.0]})


def test_region_bytes(bench):
    """Operations between two products count as what comes in and what goes out; halves of a tensor are parts of it."""
    counted = bench("regions").Counted()

    def work(x, first, shift, second):
        even, odd = ((x @ first).sigmoid() * shift).unflatten(-1, (-1, 2)).unbind(-1)
        return (torch.cat([odd, even], -1) + shift) @ second

    x, first, shift, second = (torch.ones(*shape) for shape in ((64, 8), (8, 16), (16,), (16, 4)))
    first.requires_grad_()
    torch.compile(work, backend=counted.backend(), fullgraph=True)(x, first, shift, second).sum().backward()
    whole, row = 64 * 16 * 4, 16 * 4
    assert counted.forward == 2 * whole + row, "the product's result and the shift are read, the second's input written"
    assert counted.backward == 3 * whole + row, "as is the gradient that the second product gave, beside them"


@pytest.mark.parametrize("error", [1.1e-5, math.nan])
def test_void_case(error, bench):
    """Sides that are too far apart make every verdict void; the values stay."""
    result = bench("result")
    measures = {"seconds": result.measure("s", {"ours": [1.0], "theirs": [2.0]}, at_most=1.0)}
    right = result.case(measures, {"loss": (1e-5, 1e-5)})
    assert right["measures"]["seconds"]["verdict"] == "met"
    wrong = result.case(measures, {"loss": (1e-5, 1e-5), "output": (error, 1e-5)})
    assert wrong["measures"]["seconds"]["verdict"] == "void"
    assert wrong["measures"]["seconds"]["result"] == right["measures"]["seconds"]["result"]


def test_stored_results(bench):
    """Stored verdicts are those of their own values, and the page's table is that of the files."""
    result = bench("result")
    found = result.records()
    assert {"block", "overhead", "step", "vae"} <= found.keys()
    for name, one in found.items():
        assert one["name"] == name and one["command"].startswith(f"python benchmarks/{name}.py"), name
        for title, case in one["cases"].items():
            void = any(not row["measured"] <= row["allowed"] for row in case["errors"].values())
            for quantity, row in case["measures"].items():
                verdict = "void" if void else result.verdict(row["result"]["median"], row["goal"])
                assert row["verdict"] == verdict, (name, title, quantity)
    page = result.PAGE.read_text(encoding="utf-8")
    assert result.with_table(page) == page, "run python benchmarks/result.py"


@pytest.fixture
def small():
    """A small network with values of order one, and the inputs of one sample."""
    torch.manual_seed(0)
    module = WanTransformer(num_attention_heads=2, attention_head_dim=32, ffn_dim=128, num_layers=2, text_dim=16)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=(parameter.shape[0] / parameter.numel()) ** 0.5)
    latents, text = torch.randn(1, 16, 3, 8, 8), torch.randn(1, 512, 16)
    return module, (latents, torch.ones(1), text), torch.randn(1, 16, 3, 8, 8)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_diffusers_side(kind, small, bench):
    """diffusers' network beside ours has the same output, and every gradient under the same name."""
    peers, (ours, inputs, target) = bench("peers"), small
    if kind == "lora":
        adapters.inject(ours, adapters.AdapterSettings(rank=4, alpha=8, targets="attention+ffn"), seed=0)
        for name, parameter in ours.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    ours.run_block = ActivationPolicy("block", blocks=2)
    theirs = peers.transformer(ours).train()
    theirs.enable_gradient_checkpointing()
    outputs = []
    for module in (ours.train(), theirs):
        output = module(*inputs)
        outputs.append({"output": output if module is ours else output.sample})
        (outputs[-1]["output"] - target).square().mean().backward()
    assert peers.apart(*outputs)[0] < 2e-6
    mine, other = peers.gradients(ours, theirs)
    assert len(mine) == sum(p.requires_grad for p in ours.parameters()) == (2 * 10 * 2 if kind == "lora" else 69)
    assert peers.apart(mine, other)[0] < 5e-6
    shared = peers.transformer(ours).blocks[0].attn1.to_q.weight.data_ptr() if kind == "full" else None
    assert shared == (ours.blocks[0].self_attn.q.weight.data_ptr() if kind == "full" else None)


def test_differences(bench):
    """The worst tensor is named; NaN is the worst; a tensor of rounding alone does not count as wrong."""
    apart = bench("peers").apart
    right = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([1e-9])}
    assert apart(right, right)[0] == 0
    assert apart({**right, "a": torch.tensor([1.0, -2.2])}, right) == (pytest.approx(0.1, rel=1e-3), "a")
    assert apart({**right, "b": torch.tensor([2e-9])}, right)[0] < 1e-5
    error, name = apart({**right, "b": torch.tensor([math.nan])}, right)
    assert math.isnan(error) and name == "b"
    with pytest.raises(AssertionError, match="one side only: \\['b'\\]"):
        apart({"a": right["a"]}, right)
