"""The arena: weights lie in one allocation of their exact size, get there one by one, and stay locked while they live."""

import gc
import mmap
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from wantrain.models import WanTransformer, pinned_memory
from wantrain.sampling.memory import cast_as_loaded

SIZE = {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 8, "ffn_dim": 48, "num_layers": 2}


def expert():
    """A small expert of bfloat16 weights with float32 parts, of sizes that are no multiples of anything."""
    torch.manual_seed(0)
    return cast_as_loaded(WanTransformer(**SIZE), torch.bfloat16).requires_grad_(False).eval()


class Runtime:
    """Stands for CUDA's runtime: notes what is locked and unlocked, and answers `code`."""

    def __init__(self, code=0):
        self.code, self.locked, self.events = code, {}, []

    def cudaHostRegister(self, address, size, flags):
        if not self.code:
            self.locked[address] = size
        return self.code

    def cudaHostUnregister(self, address):
        spans = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
        mapped = any(int(begin, 16) <= address < int(end, 16) for begin, end in spans)
        self.events.append("unlocked" if mapped else "unlocked after it was unmapped")
        del self.locked[address]
        return 0


@pytest.fixture
def runtime(monkeypatch):
    fake = Runtime()
    monkeypatch.setattr(pinned_memory, "cuda_runtime", lambda: fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: fake.events.append("waited"))
    return fake


def test_arena_size():
    """The arena of an A14B expert has the size of its weights; the next powers of two would take half as much again."""
    with torch.device("meta"):
        model = cast_as_loaded(WanTransformer(), torch.bfloat16)
    sizes = [parameter.nbytes for parameter in model.parameters()]
    begins, size = pinned_memory.layout(sizes)
    for begin, end, after in zip(begins, map(sum, zip(begins, sizes, strict=True)), [*begins[1:], size], strict=True):
        assert begin % 64 == 0 and end <= after
    assert size % mmap.PAGESIZE == 0 and sum(sizes) <= size < sum(sizes) + 64 * len(sizes) + mmap.PAGESIZE
    rounded = sum(1 << (each - 1).bit_length() for each in sizes)
    assert size / 1e9 == pytest.approx(28.95, abs=0.01) and rounded / 1e9 == pytest.approx(44.3, abs=0.1)
    assert pinned_memory.layout([]) == ([], 0) and pinned_memory.layout([1, 64, 65, 3]) == (
        [0, 64, 128, 256],
        mmap.PAGESIZE,
    )


def test_move_to_arena():
    """The weights lie in one allocation, and the outputs keep their bits."""
    model, other = expert(), expert()
    nn.init.normal_(model.head.head.weight)
    other.load_state_dict(model.state_dict())
    pinned_memory.move_to_arena(model.parameters())
    (storage,) = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    begins, size = pinned_memory.layout(parameter.nbytes for parameter in model.parameters())
    assert storage % mmap.PAGESIZE == 0 and next(model.parameters()).untyped_storage().nbytes() == size
    assert [parameter.data_ptr() - storage for parameter in model.parameters()] == begins
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(1, 16, 2, 4, 4, generator=generator), torch.tensor([500.0]), torch.ones(1, 5, 8)
    for name, parameter in model.named_parameters():
        wanted = other.get_parameter(name)
        assert parameter.dtype == wanted.dtype and torch.equal(parameter, wanted), name
    assert torch.equal(model(*inputs), other(*inputs))


def test_move_frees_each_weight(monkeypatch):
    """Each weight is freed before the next is copied, so an expert of 29 GB never takes twice that on the host."""
    model = expert()
    before = weakref.WeakSet(parameter.untyped_storage() for parameter in model.parameters())
    alive, make_pages = [], pinned_memory.make_pages

    def note(place):
        alive.append(len(before))
        make_pages(place)

    monkeypatch.setattr(pinned_memory, "make_pages", note)
    count = len(list(model.parameters()))
    pinned_memory.move_to_arena(model.parameters())
    assert alive == list(range(count, 0, -1)) and len(before) == 0


def test_arena_lock_lifetime(runtime):
    """An arena is locked as a whole until its last weight is freed."""
    models = [expert(), expert()]
    for model in models:
        pinned_memory.move_to_arena(model.parameters())
    _, size = pinned_memory.layout(parameter.nbytes for parameter in model.parameters())
    first = [next(model.parameters()).data_ptr() for model in models]
    assert runtime.locked == dict.fromkeys(first, size)
    gc.disable()  # what is let go is let go at once
    try:
        last = models[0].head.head.bias
        del models[0], model
        assert runtime.locked.keys() == set(first) and runtime.events == []
        del last
        assert runtime.locked.keys() == {first[1]}
        assert runtime.events == ["waited", "unlocked"], "copies that are on their way end first"
    finally:
        gc.enable()


def test_lock_failure(monkeypatch):
    """Host memory that CUDA cannot lock is one clear error."""
    monkeypatch.setattr(pinned_memory, "cuda_runtime", lambda: Runtime(code=2))
    layer = nn.Linear(4096, 4096, bias=False)
    words = (
        r"could not lock 0\.1 GB of host memory for offloaded weights \(CUDA error 2\); free .*offload\.experts=disk"
    )
    with pytest.raises(ValueError, match=words):
        pinned_memory.move_to_arena(layer.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="locks memory for a GPU; there is none")
def test_pinned_on_gpu():
    """On a GPU the weights of an arena are pinned, and freed arenas are unlocked."""
    model = expert()
    wanted = {name: parameter.clone() for name, parameter in model.named_parameters()}
    pinned_memory.move_to_arena(model.parameters())
    for name, parameter in model.named_parameters():
        assert parameter.is_pinned(), name
        assert torch.equal(parameter.to("cuda", non_blocking=True).cpu(), wanted[name])
    address = next(model.parameters()).data_ptr()
    _, size = pinned_memory.layout(parameter.nbytes for parameter in model.parameters())
    del model, parameter
    gc.collect()
    # The pages are gone with the arena; locking the same range anew would fail if they still counted as locked.
    other = expert()
    pinned_memory.move_to_arena(other.parameters())
    assert next(other.parameters()).is_pinned() and address % mmap.PAGESIZE == size % mmap.PAGESIZE == 0
