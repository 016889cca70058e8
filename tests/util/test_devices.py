"""Devices: what is asked for is what is got, and a card that torch cannot use is told in one line, with its fix."""

import subprocess
import sys

import pytest
import torch

from wantrain.util import devices
from wantrain.util.devices import Card, explain, find_card

PROPRIETARY = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27 21:21:55 UTC 2021\nGCC version: 11.2"
)
OPEN = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build  (dvs-builder)\nGCC version: 12"
)


def machine(folder, *, version=None, node=False):
    """The root of a machine as its NVIDIA driver shows it."""
    if version is not None:
        (folder / "proc/driver/nvidia").mkdir(parents=True)
        (folder / "proc/driver/nvidia/version").write_text(version)
    if node:
        (folder / "dev").mkdir()
        (folder / "dev/nvidia0").touch()
    return folder


@pytest.mark.parametrize(
    ("shown", "tools", "card"),
    [
        ({"version": PROPRIETARY, "node": True}, None, Card("470.82.01")),
        ({"version": OPEN}, None, Card("570.124.06")),
        ({"version": "what no driver has written"}, None, Card("of unknown version")),
        ({"node": True}, None, Card(None)),
        ({}, "/usr/bin/nvidia-smi", Card(None)),
        ({}, None, None),
    ],
)
def test_find_card(shown, tools, card, tmp_path):
    """A card is found without CUDA."""
    assert find_card(machine(tmp_path, **shown), which={"nvidia-smi": tools}.get) == card


@pytest.mark.parametrize(
    ("card", "built_for", "told"),
    [
        (Card("570.124.06"), None, ["driver 570.124.06", "is built without CUDA", "install a CUDA build of torch"]),
        (Card("470.82.01"), "12.8", ["driver 470.82.01 is too old", "CUDA 12.8", "driver 525.60.13 or newer"]),
        (Card("525.60.12"), "12.1", ["driver 525.60.12 is too old"]),
        (Card("525.60.13"), "12.1", ["driver 525.60.13, CUDA_VISIBLE_DEVICES=3", "cannot use it (torch said so)"]),
        (Card("570.124.06"), "13.0", ["needs driver 580.65.6 or newer"]),
        (Card("of unknown version"), "12.8", ["driver of unknown version", "cannot use it"]),
        (Card(None), "12.8", ["no NVIDIA driver is loaded", "docker run --gpus all"]),
    ],
)
def test_unusable_card_message(card, built_for, told, monkeypatch):
    """One line explains why a card cannot be used, with the versions and the fix."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    line = explain(card, built_for, warning="torch said so")
    assert all(part in line for part in told), line
    assert "\n" not in line


@pytest.fixture
def without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def old():
    return Card("1.0")


def test_unusable_card(without_cuda, capsys, monkeypatch):
    """An unusable card is reported once with device=auto and refused with device=cuda."""
    assert devices.choose("auto", find=old).type == "cpu"
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("the CPU is used: ") and "driver 1.0" in line
    with pytest.raises(
        ValueError, match=r"device=cuda, but no GPU is visible: .*driver 1\.0.*; use device=cpu or device=auto"
    ):
        devices.choose("cuda", find=old)
    assert devices.choose("cpu", find=old).type == "cpu"
    assert devices.choose("auto", find=lambda: None).type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.choose("auto", find=old).type == "cpu"
    assert capsys.readouterr().out == "", "nothing to say: no card, one that was not wanted, or one that was hidden"


def test_process_without_gpu(monkeypatch):
    """A process without a GPU of its own gets an error that says so."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="process 2 of this machine has no GPU of its own: 2 are visible"):
        devices.choose("auto")


@pytest.mark.parametrize("command", ["encode.py", "sample.py", "train.py"])
def test_commands_without_gpu(command, call, tiny, pair, tmp_path, without_cuda, monkeypatch):
    """Every command that computes refuses device=cuda without a usable GPU.

    Each asks `choose`, also where the device is the CPU in the end.
    """
    monkeypatch.setattr(devices.choose, "__kwdefaults__", {"find": old})
    arguments = {
        "encode.py": (f"shards={tiny.videos}", "out=latents", f"weights={tiny.base}", "area=1024"),
        "sample.py": ("prompt=x", f"weights={pair}"),
        "train.py": (*tiny.train, "steps=1", "batch_size=2"),
    }[command]
    error = call(command, *arguments, "device=cuda", check=False).error
    assert "device=cuda, but no GPU is visible" in error and "driver 1.0" in error
    assert not list(tmp_path.iterdir())


def test_large_model_on_cpu(call, without_cuda, tmp_path, monkeypatch):
    """A large transformer trains on a CPU only with device=cpu."""
    monkeypatch.setattr(devices.choose, "__kwdefaults__", {"find": lambda: None})
    command = ("train.py", "model=t2v_1_3b", "expert=dense", "weights=nowhere", "data.shards=nowhere")
    error = call(*command, check=False).error
    assert error.startswith("dense has 1.4 billion parameters and no GPU can be used") and "device=cpu" in error
    assert "weights=nowhere is not there" in call(*command, "device=cpu", check=False).error
    assert not list(tmp_path.iterdir())


TAKEN = """
import torch
torch.cuda.is_available = lambda: True
from wantrain.training.engine.accelerator import allocator, start_accelerator
allocator.keep_freed_memory = lambda: print("kept")
print(start_accelerator("cpu", hang=None).device)
"""


def test_cpu_accelerator_beside_gpu(environment):
    """With device=cpu the accelerator is on the CPU, also beside a GPU, and freed memory is kept.

    The GPU is simulated: torch has no CUDA in this test.
    """
    ended = subprocess.run([sys.executable, "-c", TAKEN], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout.splitlines()[-2:] == ["kept", "cpu"], ended.stdout + ended.stderr


def test_cpu_with_fsdp2(environment):
    """device=cpu is refused for an engine that would use the GPU regardless."""
    more = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    ended = subprocess.run([sys.executable, "-c", TAKEN], env={**environment, **more}, capture_output=True, text=True)
    assert "without a launch file): device=cpu with fsdp2 on a machine with GPUs" in ended.stderr
