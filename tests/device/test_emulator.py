"""The emulated device refuses what CUDA refuses, allows what it allows, and counts what makes the host wait."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent

PROGRAM = """
import json, sys
sys.path.insert(0, {here!r})
import emulator, torch
device = emulator.install()
here, host = torch.arange(6.0, device=device).view(2, 3), torch.ones(2, 3)
found = {{}}
for line in {lines!r}:
    reads, uploads = emulator.reads.total(), dict(emulator.uploads)
    try:
        answer = str(eval(line))
    except Exception as error:
        answer = type(error).__name__ + ": " + str(error)
    kinds = sorted(kind for (kind, _), n in emulator.uploads.items() if n > uploads.get((kind, _), 0))
    found[line] = [answer, emulator.reads.total() - reads, kinds]
print(json.dumps(found))
"""
REFUSED = (
    "here + host",
    "torch.stack([here.sum(), torch.tensor(1.0)])",
    "torch.cat([here, host])",
    "host[torch.tensor([1], device=device)]",
    "here.index_put((torch.tensor([0]),), host[:1])",
    "torch.randn(3, device=device, generator=torch.Generator())",
    "here.numpy()",
    "torch.nn.functional.linear(here, host)",
    "here.lerp_(host, 0.5)",
    "torch.where(here > 1, here, host)",
)
#: Expression -> (what it gives, how often the host reads, which uploads).
ALLOWED = {
    "(here * torch.tensor(2.0)).device": ("emulated:0", 0, []),
    "(here * 2 + 1).sum().device": ("emulated:0", 0, []),
    "here[torch.tensor([1])].device": ("emulated:0", 0, []),
    "host.to(device).device": ("emulated:0", 0, ["pageable"]),
    "host.pin_memory().to(device, non_blocking=True).device": ("emulated:0", 0, ["pinned"]),
    "torch.empty(2, 3, device=device).copy_(host).device": ("emulated:0", 0, ["pageable"]),
    "here.sum().item()": ("15.0", 1, []),
    "here.cpu().device": ("cpu", 1, []),
    "here.tolist()": ("[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]", 1, []),
    "here[here > 1].shape": ("torch.Size([4])", 1, []),
    "bool((here > 1).any())": ("True", 1, []),
    "torch.isfinite(here).all().device": ("emulated:0", 0, []),
    "torch.nn.Linear(3, 1).to(device)(here).shape": ("torch.Size([2, 1])", 0, ["pageable"]),
    "torch.equal(here, here)": ("True", 1, []),
}


@pytest.fixture(scope="module")
def found():
    lines = [*REFUSED, *ALLOWED]
    program = PROGRAM.format(here=str(HERE), lines=lines)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.parametrize("line", REFUSED)
def test_refused(found, line):
    assert "Error: " in found[line][0], found[line]


@pytest.mark.parametrize("line", ALLOWED)
def test_allowed(found, line):
    assert tuple(found[line]) == ALLOWED[line]
