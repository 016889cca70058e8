"""benchmarks/gpu.py without a GPU: a stage that dies or hangs costs only itself, checks can fail, and every stage runs
on small shapes on the CPU.
"""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent.parent
CPU = torch.device("cpu")

PLANTED = """
import os, signal, subprocess, sys, time
from pathlib import Path

def well(context):
    context.check("a small error", 0.5, 1.0, "as large as that")
    return {"value": 7, "in_words": "seven"}

def wrong(context):
    context.check("a loss", float("nan"), 1.0, "it must be a number")
    return {}

def dies(context):
    context.note(before=1.5)
    os.kill(os.getpid(), signal.SIGKILL)

def out_of_memory(context):
    context.note(before=2.5)
    raise MemoryError("no more of it")
"""

#: Hangs while it is imported, after it has started a process of its own.
HANGING = """
import subprocess, sys, time
from pathlib import Path

child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path("child.pid").write_text(str(child.pid))
time.sleep(600)
"""


@pytest.fixture
def gpu(monkeypatch):
    """The benchmark, as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu")


@pytest.fixture
def stages(gpu):
    """stages("transformer"): a module of its stages."""
    return lambda name: importlib.import_module(f"gpu_stages.{name}")


@pytest.fixture
def context(stages, tmp_path):
    return stages("context").Context(CPU, True, tmp_path, tmp_path / "kept.json")


def test_stage_limits(gpu):
    """The limits of the stages sum to at most 300 s for the first group, and to 900 s in all."""
    limits = {stage.name: stage.limit for stage in gpu.STAGES}
    assert len(limits) == len(gpu.STAGES)
    first = list(limits)[: list(limits).index(gpu.FIRST_OF_REST)]
    assert sum(limits[name] for name in first) <= 300 and sum(limits.values()) <= 900
    for stage in gpu.STAGES:
        module, name = stage.function.split(":")
        assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.slow
def test_failing_stages(gpu, tmp_path, monkeypatch, capsys):
    """A stage that dies or hangs does not stop the other stages."""
    (tmp_path / "planted.py").write_text(PLANTED)
    (tmp_path / "hanging.py").write_text(HANGING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    bad = [gpu.Stage("hangs", "hanging:stage", 10)]
    bad += [gpu.Stage(name, f"planted:{name}", 200) for name in ("dies", "out_of_memory", "wrong")]
    out = tmp_path / "found" / "gpu.json"
    code = gpu.main(["--device", "cpu", "--out", str(out)], [*bad, gpu.Stage("well", "planted:well", 200)])
    assert code == 1
    lines, found = capsys.readouterr().out.splitlines(), json.loads(out.read_text())
    assert [line.split()[:2] for line in lines[:5]] == [
        ["hangs", "FAILED"], ["dies", "FAILED"], ["out_of_memory", "FAILED"], ["wrong", "FAILED"], ["well", "passed"],
    ]  # fmt: skip
    assert lines[5].startswith("1 of 5 stages passed")
    said = {name: stage["ended"] for name, stage in found["stages"].items()}
    assert said["hangs"] == "after 10 s, its limit" and said["dies"] == "by signal 9 (SIGKILL)"
    assert said["out_of_memory"] == "with exit code 1" and said["wrong"] == said["well"] == "in time"
    assert "MemoryError: no more of it" in lines[2]
    assert "a loss: nan (allowed 1.0: it must be a number)" in lines[3] and "seven" in lines[4]
    measured = {name: stage["measured"] for name, stage in found["stages"].items()}
    assert measured["dies"] == {"before": 1.5} and measured["out_of_memory"] == {"before": 2.5}
    assert measured["well"] == {"value": 7, "in_words": "seven"}
    assert found["stages"]["well"]["checks"][0] == {
        "name": "a small error", "measured": 0.5, "tolerance": 1.0, "passed": True, "why": "as large as that",
    }  # fmt: skip
    assert not is_running(int((tmp_path / "child.pid").read_text())), "what a stage started ends with it"


def is_running(process):
    """True unless the process has ended; one that ended may stand as a zombie until its new parent looks."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        if state == "Z":
            return False
        time.sleep(0.1)
    os.kill(process, signal.SIGKILL)
    return True


def test_unknown_stage(gpu, capsys):
    """An unknown stage is named in the error."""
    with pytest.raises(SystemExit, match="no stage blocks; there are machine, "):
        gpu.main(["--device", "cpu", "--only", "machine,blocks"])


def test_random_weights(context, stages):
    """Random weights have the dtypes of loaded weights and outputs of order one."""
    own = stages("transformer")
    module = own.expert(context, 2, "lora", recompute="none")
    for name, parameter in module.named_parameters():
        kept = any(part in name for part in (*module.fp32_parts, "lora_"))
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
        assert parameter.requires_grad == ("lora_" in name)
    latents, text = own.inputs(context, stages("sizes").clips(True)["17 frames"])
    answer = own.expert(context, 2, "full", recompute="none")(latents, torch.tensor([500.0]), text)
    assert 0.1 < answer.std() < 10


def test_training_step(context, stages):
    """A step moves the adapters and nothing else, by the size of AdamW's first step."""
    own = stages("transformer")
    module = own.expert(context, 2, "lora", recompute="block")
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    noised = stages("against").Noised.of(context, stages("sizes").clips(True)["17 frames"], "a14b")
    own.one_step(context, module, noised.loss, noised.batch)[0]()
    moved = {
        name: (parameter.detach() - before[name]).abs().max().item() for name, parameter in module.named_parameters()
    }
    assert not any(size for name, size in moved.items() if "lora_" not in name)
    ups = [size for name, size in moved.items() if "lora_B" in name]
    assert len(ups) == 2 * 10 and ups == pytest.approx([1e-4] * 20, rel=1e-2)


def test_block_flops(context, stages):
    """A block's time is compared with the operations that it needs."""
    own = stages("transformer")
    found = own.block(context) and context.measured
    assert set(found) == {f"{kind}, {clip}" for kind in ("lora", "full") for clip in ("17 frames", "81 frames")}
    for row in found.values():
        assert row["seconds"] == pytest.approx(sum(part["median"] for part in row["parts"].values()), rel=0.9)
        assert row["tflops"] == pytest.approx(row["tflop"]["needed"] / row["seconds"])
        assert row["tflop"]["executed"] == row["tflop"]["needed"], "one block keeps its activations"
        assert row["mfu"] is None and row["peak_gb"] is None, "nobody has said what this CPU could do"
    small, large = (found[f"full, {clip}"] for clip in ("17 frames", "81 frames"))
    assert (small["tokens"], large["tokens"]) == (2 * 2 * 4, 3 * 2 * 4)
    assert large["tflop"]["needed"] > small["tflop"]["needed"] > found["lora, 17 frames"]["tflop"]["needed"]
    assert json.loads(context.kept.read_text())["measured"].keys() == found.keys()


def test_attention_backend(context, stages):
    """The attention stage names the backend that really computes."""
    own = stages("machine")
    own.attention(context)
    assert all(check.passed for check in context.checks) and len(context.checks) == 2
    run = own._attention(CPU, 16, 9, torch.zeros(9), N=2, K=32)
    assert "flash" in own.taken(CPU, run)[0]
    with sdpa_kernel(SDPBackend.MATH):
        assert "math" in own.taken(CPU, run)[0]


def test_machine(context, stages):
    """The machine stage measures copies and names versions."""
    assert stages("machine").machine(context)["copies_gb_per_s"]["pageable to device"] > 0
    assert {"torch", "peft", "cuda"} <= context.measured["versions"].keys()


@pytest.mark.parametrize(
    ("stage", "cases"),
    [
        ("encoders:vae_2_1", 4),
        ("encoders:text", 1),
        ("against:slice_lora", 1),
        pytest.param("against:slice_full", 1, marks=pytest.mark.slow),
        pytest.param("against:slice_compiled", 1, marks=pytest.mark.slow),
        pytest.param("against:step_81", 1, marks=pytest.mark.slow),
        ("against:step_5b", 1),
        pytest.param("encoders:vae_2_2", 4, marks=pytest.mark.slow),
        ("variants:quantized", 4),
        ("variants:swap", 2),
    ],
)
def test_comparisons(stage, cases, context, stages):
    """Comparisons have a result, and their sides compute the same."""
    module, name = stage.split(":")
    words = getattr(stages(module), name)(context)["in_words"]
    assert len(context.cases) == cases and all(title in words for title in context.cases)
    assert all(check.passed for check in context.checks), context.checks
    for case in context.cases.values():
        row = case["measures"]["seconds"]
        assert row["verdict"] == "no goal" and row["result"]["median"] > 0 and len(row["sides"]) == 2
    if module in ("against", "encoders"):
        assert all(case["errors"] for case in context.cases.values()), "correctness comes before timing"


def test_void_comparison(context, stages, monkeypatch):
    """Where diffusers' side has another weight, the comparison is void and the stage fails."""
    own = stages("against")
    right = own.peers.transformer

    def wrong(ours):
        theirs = right(ours)
        theirs.blocks[1].attn1.to_q.bias.data = theirs.blocks[1].attn1.to_q.bias + 0.01
        return theirs

    monkeypatch.setattr(own.peers, "transformer", wrong)
    own.slice_lora(context)
    (case,) = context.cases.values()
    assert case["measures"]["seconds"]["verdict"] == "void"
    assert not all(check.passed for check in context.checks)


def test_without_diffusers(context, stages, monkeypatch):
    """Where diffusers cannot be imported, ours is measured alone and the reason is kept."""
    monkeypatch.setattr(stages("pairs").peers, "missing", lambda: "ModuleNotFoundError: No module named 'diffusers'")
    words = stages("encoders").vae_2_1(context)["in_words"]
    assert "No module named 'diffusers'" in context.measured["diffusers"]
    assert all(set(case["measures"]["seconds"]["sides"]) == {"ours"} for case in context.cases.values())
    assert "ours" in words and "diffusers" not in words


def test_fit_by_tokens(stages):
    """The fit finds the coefficients that made the values."""
    tokens = [7800, 17160, 32760, 48360, 75600]
    values = [0.05 + 2e-5 * n + 1e-9 * n**2 for n in tokens]
    assert stages("variants").fitted(tokens, values) == pytest.approx((0.05, 2e-5, 1e-9), rel=1e-6)


@pytest.mark.slow
def test_predictions(stages):
    """What was predicted of an H200 is near what the planner's estimate gives."""
    own = stages("predictions")
    computed = own.predicted("H200")
    assert computed.keys() == own.PREDICTED["H200"].keys()
    for name, sides in own.PREDICTED["H200"].items():
        assert computed[name] == pytest.approx(sides, rel=0.1), name


def test_predictions_on_page(stages):
    """docs/speed.md shows predictions as they were written down."""
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| .+ \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (?:0\.75|–) \|$", page, flags=re.M)
    found = [tuple(sides.values()) for sides in stages("predictions").PREDICTED["H200"].values()]
    assert len(shown) == 6
    for mine, other, ratio in shown:
        assert (float(mine), float(other)) in found and f"{float(mine) / float(other):.2f}" == ratio


def test_added_stages(gpu, tmp_path, capsys, monkeypatch):
    """--add keeps what is there; --within starts nothing for which no time is left; both are said."""
    out, ran = tmp_path / "gpu.json", []

    def run_apart(stage, options, left):
        ran.append((stage.name, left))
        return {"seconds": 1.0, "limit": 5.0, "ended": "in time", "passed": True, "measured": {}, "checks": [],
                "cases": {"a case": {"errors": {}, "measures": {}}}}  # fmt: skip

    monkeypatch.setattr(gpu, "run_apart", run_apart)
    few = [gpu.Stage(name, "planted:well", 200) for name in ("one", "two")]
    words = ["--device", "cpu", "--out", str(out)]
    assert gpu.main([*words, "--only", "one"], few) == 0
    assert gpu.main([*words, "--add", "--within", "5"], few) == 1
    assert "two            not started: --within 5 leaves 5 s" in capsys.readouterr().out
    assert gpu.main([*words, "--add", "--within", "100"], few) == 0
    found = json.loads(out.read_text())
    assert [name for name, _ in ran] == ["one", "two"] and ran[1][1] <= 100
    assert list(found["stages"]) == ["one", "two"] and list(found["cases"]) == ["one: a case", "two: a case"]
    with pytest.raises(SystemExit, match="is of device cpu, small True"):
        gpu.main(["--device", "cuda", "--out", str(out), "--add"], few)


class Runs:
    """Stands for train.py: writes a log with the losses of a run by its name, and a checkpoint that holds them."""

    def __init__(self, folder, losses):
        self.folder, self.losses = folder, losses

    def __call__(self, program, *words, cpu=False):
        from safetensors.torch import save_file

        given = dict(word.split("=", 1) for word in words)
        losses = self.losses[given["run"]][: int(given.get("stop_after", given["steps"]))]
        run = self.folder / "runs" / given["run"]
        checkpoint = run / "checkpoints" / f"step_{len(losses):06d}"
        checkpoint.mkdir(parents=True, exist_ok=True)
        (run / "metrics.jsonl").write_text("".join(json.dumps({"loss": loss}) + "\n" for loss in losses))
        save_file({"weights": torch.tensor(losses)}, checkpoint / "optimizer.safetensors")
        return 1.0


FP32, BF16 = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5], [1.01, 0.92, 0.79, 0.7, 0.6, 0.5]


def verdicts(context, stages, stage, losses):
    """Which checks of a stage pass, with losses for its runs."""
    (context.work / "latents_cpu").mkdir()
    (context.work / "latents_cpu" / "manifest.json").touch()
    right = {"fp32_cpu": FP32, "bf16_cpu": BF16, "fp32_device": FP32, "bf16_device": BF16}
    context.command = Runs(context.work, {**right, "again": FP32, "halves": FP32, **losses})
    getattr(stages("correctness"), stage)(context)
    return [check.passed for check in context.checks]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({}, [True, True]),
        ({"fp32_device": [1.0, 0.9, 0.8, 0.7, 0.6, 0.501]}, [False, True]),  # TF32, say
        ({"fp32_device": [1.0, 0.9, float("nan"), 0.7, 0.6, 0.5]}, [False, True]),
        ({"bf16_device": FP32}, [True, False]),  # it did not compute in bf16
        ({"bf16_device": [1.0101, 0.9201, 0.79, 0.7, 0.6, 0.5]}, [True, True]),
    ],
)
def test_loss_check(losses, expected, context, stages):
    """Losses that do not follow the CPU's fail the check."""
    assert verdicts(context, stages, "train", losses) == expected


@pytest.mark.parametrize(
    ("losses", "expected", "repeatable"),
    [
        ({}, [True, True], True),
        ({"halves": [*FP32[:-1], 0.5000001]}, [False, False], True),
        ({"again": [*FP32[:-1], 0.5000001]}, [True, True], False),
    ],
)
def test_resume_check(losses, expected, repeatable, context, stages):
    """A resumed run with other bits fails the check where unbroken runs repeat."""
    assert verdicts(context, stages, "resume", losses) == expected
    assert context.measured["two_unbroken_runs_are_equal"] is repeatable


@pytest.mark.slow
def test_benchmark_on_cpu(environment, tmp_path):
    """The whole benchmark passes on a CPU with small shapes."""
    out = tmp_path / "gpu.json"
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--small", "--device", "cpu", "--patience", "20"]
    ended = subprocess.run(
        [*command, "--out", out], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(out.read_text())
    assert all(stage["passed"] for stage in found["stages"].values()) and len(found["stages"]) == 18
    assert found["stages"]["resume"]["measured"]["two_unbroken_runs_are_equal"]
    assert len(found["stages"]["train"]["measured"]["losses"]["bf16 device"]) == 6
    assert ended.stdout.count("passed") == 19 and ended.stderr == ""
