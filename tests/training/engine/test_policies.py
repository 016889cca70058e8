"""Policies of activations and weights under DDP and FSDP2 on two processes, and what FSDP2 gathers."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).resolve().parent.parent.parent / "support" / "policy_runs.py"
BOUND = 1e-5  # of the engine table in docs/numerics.md


@pytest.fixture(scope="module")
def runs(tmp_path_factory, environment, launch_command):
    """runs(engine, precision, steps): a folder with what policy_runs.py wrote; each once."""
    done = {}

    def run(engine, precision, steps):
        if (engine, precision) not in done:
            folder = done[engine, precision] = tmp_path_factory.mktemp(f"{engine}_{precision}")
            command = launch_command(engine, precision, steps, script=SCRIPT)
            ended = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False
            )
            assert ended.returncode == 0, ended.stdout + ended.stderr
        return done[engine, precision]

    return run


def results(folder, engine):
    """Of each run of a folder: its losses and dtypes, and its weights."""
    found = json.loads((folder / f"{engine}.json").read_text())
    return {name: (run, load_file(folder / f"{engine} {name}.safetensors")) for name, run in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_policies_bit_equal(engine, runs):
    """Fifty steps with recompute, activations on the host or swapped blocks equal those without, bit for bit."""
    found = results(runs(engine, "fp32", 50), engine)
    wanted = {"none", "block", "attention", "host", *(("two kept", "attention, host") if engine == "ddp" else ())}
    names = {f"{kind} {name}" for kind in ("lora", "full") for name in wanted}
    assert found.keys() == names | ({"lora swap", "lora swap, host"} if engine == "ddp" else set())
    for name, (run, weights) in found.items():
        plain, kept = found[f"{name.split()[0]} none"]
        assert run["losses"] == plain["losses"] and len(set(run["losses"])) == 50, name
        assert all(torch.equal(weights[key], value) for key, value in kept.items()), name


@pytest.mark.slow
def test_fsdp2_policies_match_ddp(runs):
    """Every policy under FSDP2 gives the losses and weights of DDP within the bound of the engine table."""
    ours, theirs = (results(runs(engine, "fp32", 50), engine) for engine in ("fsdp2", "ddp"))
    for name, (run, weights) in ours.items():
        other, kept = theirs[name]
        assert run["losses"] == pytest.approx(other["losses"], rel=BOUND), name
        for key, value in kept.items():
            assert (weights[key] - value).norm() <= BOUND * value.norm(), (name, key)


@pytest.mark.slow
def test_fsdp2_gathers_bf16(runs):
    """In bf16 FSDP2 gathers a block's linear layers in bf16 and its float32 parts in float32.

    Losses and weights are those of a gather in float32, bit for bit: autocast would round the same values.
    """
    found = results(runs("fsdp2", "bf16", 10), "fsdp2")
    plain, kept = found["full gathered in float32"]
    assert set(plain["dtypes"].values()) == {"torch.float32"}
    for name in ("full none", "full block"):
        run, weights = found[name]
        assert run["losses"] == plain["losses"], name
        assert all(torch.equal(weights[key], value) for key, value in kept.items()), name
        for parameter, dtype in run["dtypes"].items():
            island = parameter == "modulation" or "norm" in parameter
            assert dtype == ("torch.float32" if island else "torch.bfloat16"), parameter
