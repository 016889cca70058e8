"""Streams of the emulated device, as late as streams may be: a copy in a side stream is done when something waits for it.

Using a copy before that is an error, as are two things that a GPU would do in silence: a copy over memory with which
the device may still be computing, and memory that is freed before the copy from or to it was done.
"""

import contextlib
import threading
import weakref

import torch

#: The side stream that each thread is in. (No threading.local: where threads of autograd have one, the process may end.)
_current: dict[int, "Stream"] = {}
#: Operations that the device has computed so far, and the number of the last one that used each storage.
_clock = 0
_used: dict[int, int] = {}
#: Copies that are not done yet.
_pending: list["Late"] = []


class Place:
    """Where a tensor lies; its memory is not kept alive."""

    def __init__(self, tensor):
        storage = tensor.untyped_storage()
        self.storage = weakref.ref(storage)
        self.shape, self.dtype = (tensor.storage_offset(), tensor.size(), tensor.stride()), tensor.dtype
        self.begin, self.end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes

    def tensor(self):
        storage = self.storage()
        if storage is None:
            raise RuntimeError("memory was freed before the copy from or to it was done")
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.shape)

    def overlaps(self, tensor):
        return self.begin < tensor.data_ptr() + tensor.nbytes and tensor.data_ptr() < self.end


class Late:
    """A copy that is under way."""

    def __init__(self, target, source):
        self.target, self.source = Place(target), Place(source)

    def finish(self):
        _pending.remove(self)
        self.target.tensor().copy_(self.source.tensor())


class Stream:
    """A stream; copies queue in it."""

    def __init__(self, device=None, priority=0):
        self.queue, self.issued, self.seen = [], 0, 0

    def wait_stream(self, other):
        assert other is COMPUTE, "what the copies follow is the computation"
        self.seen = _clock

    def wait_event(self, event):
        event.stream.finish(event.number)

    def record_event(self, event=None):
        return Event(self, self.issued)

    def finish(self, number):
        """Do all copies up to the one of this number."""
        while self.queue and self.queue[0][0] <= number:
            self.queue.pop(0)[1].finish()

    def add(self, target, source, held):
        """Queue a copy; `held` is the tensor of the two that lies on the device."""
        if _used.get(address(held), 0) > self.seen:
            raise RuntimeError("a copy uses memory that the device may still be computing with")
        late = Late(target, source)
        self.issued += 1
        self.queue.append((self.issued, late))
        _pending.append(late)


class Event:
    """A place in a stream."""

    def __init__(self, stream, number):
        self.stream, self.number = stream, number


COMPUTE = Stream()


def address(tensor):
    """Where a tensor's storage begins. (A storage object that a thread of autograd makes may end the process.)"""
    return tensor.data_ptr() - tensor.storage_offset() * tensor.element_size()


def current():
    """The stream that this thread is in."""
    return _current.get(threading.get_ident(), COMPUTE)


@contextlib.contextmanager
def inside(stream):
    """While active, copies queue in this stream."""
    thread, before = threading.get_ident(), current()
    _current[thread] = stream
    try:
        yield
    finally:
        _current[thread] = before


def compute(tensors):
    """The device computes with these tensors, and refuses those whose copy has not come."""
    global _clock
    _clock += 1
    for tensor in tensors:
        if any(late.target.overlaps(tensor) for late in _pending):
            raise RuntimeError("a tensor was used before its copy had come")
        _used[address(tensor)] = _clock


def synchronize():
    """Do all copies."""
    for late in list(_pending):
        late.finish()
