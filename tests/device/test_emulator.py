"""The emulated device refuses what CUDA refuses, allows what it allows, and counts what makes the host wait."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent

PROGRAM = """
import json, sys
sys.path[:0] = [{here!r}, {root!r}]
import emulator, torch
device = emulator.install()
from wantrain.batch import Batch
from wantrain.data.prefetch import prefetch
from wantrain.losses import Draws
from wantrain.training.micro_batches import sent_ahead
from wantrain.util.copy_stream import CopyStream, Readback
here, host = torch.arange(6.0, device=device).view(2, 3), torch.ones(2, 3)

def sent(*, wait):
    stream, target = CopyStream(device), torch.empty(2, 3, device=device)
    event = stream.copy([(target, host.pin_memory())])
    if wait:
        stream.wait(event)
    return target + 1

def drawn(number):
    batch = Batch(torch.full((1, 1, 1, 2, 2), float(number)).pin_memory(), torch.ones(1, 2, 3).pin_memory(), ("a",))
    return batch, Draws((), torch.ones(1).pin_memory())

def fed(*, wait=True):
    # The second is on its way while the first is used; the last one is dropped without being used.
    if not wait:
        CopyStream.wait = lambda self, event: None
    loaded = prefetch(iter([lambda n=n: drawn(n) for n in range(4)]), depth=4)
    while loaded._ready.qsize() < 4:
        pass
    batches, sums = sent_ahead(loaded, device), []
    for _ in range(3):
        batch, draws = next(batches).here
        sums.append(float((batch.latents_BCTHW * draws.sigma).sum()))
        ahead = len(emulator.late)
    batches.close()
    return sums, ahead, len(emulator.late)

def stepped(update):
    # Three steps of AdamW and an average on the device, the second only if `update`, and as it is on the CPU.
    from types import SimpleNamespace
    from wantrain.training.engine.ema import Ema
    from wantrain.training.engine.engine import Stepper
    kept = []
    for where in (device, torch.device("cpu")):
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 2).to(where)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
        stepper = SimpleNamespace(device=where, engine="single", module=module, _zero=False, updates_in_backward=False,
                                  _parameterwise=None, optimizer=SimpleNamespace(optimizer=optimizer,
                                  step=optimizer.step, zero_grad=optimizer.zero_grad))
        ema = Ema(stepper, 0.9)
        assert Stepper.selects_updates.fget(stepper) == (where == device)
        for number, moves in enumerate((True, update, True)):
            bad = 1 if moves else float("nan")
            (module(torch.full((1, 3), number + 1.0).to(where)).square().sum() * bad).backward()
            how = torch.tensor(moves).to(where) if where == device else moves
            Stepper.step(stepper, update=how)
            ema.follow(number + 1, update=how)
        state = [value for own in optimizer.state.values() for value in own.values()]
        kept.append([tensor.detach().cpu() for tensor in [*module.parameters(), *state, *ema.average.values()]])
    return [torch.equal(one, other) for one, other in zip(*kept)]

def late_value():
    readback = Readback(here.sum())
    return float(readback._host)

def read_late():
    readback = Readback(here.sum(), here[0])
    here + 1
    return readback.values()

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
#: Refused too, and last, for they leave copies that nobody waits for: a copy, and the loop's batches.
UNAWAITED = ("sent(wait=False)", "fed(wait=False)")
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
    "sent(wait=True).device": ("emulated:0", 0, ["pinned"]),
    "Readback(here.sum()).values()": ("[[15.0]]", 1, []),
    "read_late()": ("[[15.0], [0.0, 1.0, 2.0]]", 0, []),
    "late_value()": ("nan", 0, []),
    # Sums of the first three batches; of the fourth three tensors are coming, and are waited for when it is dropped.
    "fed()": ("([0.0, 4.0, 8.0], 3, 0)", 3, ["pinned"]),
    "all(stepped(True) + stepped(False))": ("True", 20, ["pageable"]),
}


@pytest.fixture(scope="module")
def found():
    lines = [*REFUSED, *ALLOWED, *UNAWAITED]
    program = PROGRAM.format(here=str(HERE), root=str(HERE.parent.parent), lines=lines)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.parametrize("line", [*REFUSED, *UNAWAITED])
def test_refused(found, line):
    assert "Error: " in found[line][0], found[line]


@pytest.mark.parametrize("line", ALLOWED)
def test_allowed(found, line):
    assert tuple(found[line]) == ALLOWED[line]
