"""Copies to a device and back. CUDA's streams are played by lists of work that nothing begins before it must.

The player is as lazy as CUDA may be: work of a stream is done when another stream or the host waits for an event of it,
and not before; so what is read without waiting is not there yet. It also knows which streams use which memory.
"""

import contextlib

import pytest
import torch

from wantrain.data.latents import transfer
from wantrain.data.latents.transfer import Transfer


class Stream:
    def __init__(self, device=None):
        self.work = []

    def record_event(self):
        return Event(self, len(self.work))

    def wait_event(self, event):
        self.work.append(event.synchronize)

    def wait_stream(self, other):
        self.wait_event(other.record_event())


class Event:
    def __init__(self, stream, count):
        self.stream, self.count = stream, count

    def synchronize(self):
        for place in range(self.count):
            step, self.stream.work[place] = self.stream.work[place], lambda: None
            step()


class Cuda:
    """What transfer.py uses of torch.cuda, with one stream that computes."""

    Stream = Stream

    def __init__(self):
        self.computes = self.current = Stream()

    def current_stream(self, device=None):
        return self.current

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def do(self, step):
        self.current.work.append(step)


class Remote:
    """A tensor that is somewhere else: its value is there once the stream that makes it has come so far."""

    def __init__(self, cuda, compute):
        self.cuda, self.value, self.streams = cuda, None, {cuda.current}
        cuda.do(lambda: setattr(self, "value", compute()))

    def to(self, where, non_blocking):
        assert non_blocking, "a copy that makes the host wait"
        return Remote(self.cuda, self.read)

    def read(self):
        assert self.value is not None, "read before it was there"
        return self.value

    def record_stream(self, stream):
        self.streams.add(stream)


class Host(Remote):
    """A tensor of the host."""

    def __init__(self, cuda, value):
        self.cuda, self.value = cuda, value


@pytest.fixture
def cuda(monkeypatch):
    player = Cuda()
    monkeypatch.setattr(transfer.torch, "cuda", player)
    return player


@pytest.fixture
def moving(cuda):
    found = Transfer(torch.device("cpu"))
    found._up, found._down = Stream(), Stream()
    return found


def test_round_trip(cuda, moving):
    """Results computed from uploaded tensors come back right, and neither copy makes the host wait."""
    arrive = moving.upload([Host(cuda, 3), Host(cuda, 4)])
    assert cuda.computes.work == [], "the stream that computes copies nothing"
    one, other = arrive()
    product = Remote(cuda, lambda: one.read() * other.read())
    back = moving.download([product])
    assert product.value is None, "neither call has waited"
    assert [copy.read() for copy in back()] == [12]


def test_stream_memory(cuda, moving):
    """Memory is kept for every stream that uses it."""
    (copy,) = moving.upload([Host(cuda, 1)])()
    assert copy.streams == {moving._up, cuda.computes}
    result = Remote(cuda, copy.read)
    moving.download([result])
    assert result.streams == {cuda.computes, moving._down}


def test_batches_overlap(cuda, moving):
    """The next batch is on its way while this one is computed; nothing of it waits for the computation."""
    first, second = moving.upload([Host(cuda, 1)]), moving.upload([Host(cuda, 2)])
    (one,) = first()
    moving.download([Remote(cuda, one.read)])
    moving._up.record_event().synchronize()
    assert one.value == 1 and len(cuda.computes.work) == 2, "to wait for the copy, and to compute"
    (two,) = second()
    assert two.read() == 2


def test_cpu_without_copies():
    """On a CPU, upload and download leave tensors where they are."""
    moving, parts = Transfer(torch.device("cpu")), [torch.arange(6).byte().view(2, 3) + n for n in range(3)]
    stacked = moving.stack(parts)
    assert torch.equal(stacked, torch.stack(parts)) and stacked.dtype == torch.uint8
    (there,) = moving.upload([stacked])()
    (back,) = moving.download([there])()
    assert back.data_ptr() == stacked.data_ptr()
