"""A second device for machines without a GPU: tensors that hold CPU values and behave like those of an accelerator.

`install()` registers the device type "emulated" with torch, for the whole process. Its tensors refuse to mix with CPU
tensors as CUDA's do, cannot be read by numpy, take no CPU generator, and `reads` counts every time the host waits for
their values. Copies to the device are told apart by the host memory they come from, pinned or pageable.

A copy that need not wait (`non_blocking`, pinned memory) is late: in a stream of its own until that is waited for, and
to the host until its event is. What it fills has no values before: a tensor of the device cannot be used then, and
memory of the host holds NaN. Waiting for an event counts as a read if the device has nothing else to do.

Built on torch's own hook for backends written in Python (PrivateUse1), so autograd, autocast, `.to`, factories and
`torch.device` contexts are torch's. What it cannot show: kernels, fragmentation, speed.
"""

import contextlib
import functools
import threading
import traceback
from collections import Counter
from pathlib import Path

import torch
import torch.utils.backend_registration as backends
from torch.utils._pytree import tree_leaves, tree_map

NAME = "emulated"
ROOT = Path(__file__).resolve().parent.parent.parent
#: Where the host waited for the device: (kind, place) -> how often. Kinds are "read", "bool index" and "drain", an event
#: after which nothing was queued.
reads: Counter = Counter()
#: Copies from the host: (pinned or pageable, place) -> how often.
uploads: Counter = Counter()
#: Addresses of pinned host memory, as long as it lives.
_pinned: dict[int, torch.Tensor] = {}
#: Operations that give the host a value: CUDA drains its queue for each.
_READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim")
#: Operations whose indices may lie on the host.
_INDEXED = ("index.", "index_put", "_index_put_impl_", "_unsafe_index")
_lock = threading.Lock()


def place() -> str:
    """The innermost lines of the project on the stack, as file:line < file:line."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(str(ROOT))]
    ours = [frame for frame in frames if "/.venv/" not in frame.filename and "/tests/" not in frame.filename]
    return " < ".join(f"{Path(f.filename).relative_to(ROOT)}:{f.lineno}" for f in reversed(ours[-2:]))


def count(counter: Counter, kind: str) -> None:
    """One more of a kind, at this place."""
    where = place()
    with _lock:  # backward runs in a thread of the device's own
        counter[kind, where] += 1


class Emulated(torch.Tensor):
    """A tensor of the device; `held` are its values, an ordinary CPU tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held, requires_grad=False):
        shape = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), **shape, device=f"{NAME}:0", requires_grad=requires_grad
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def data_ptr(self):
        return self.held.data_ptr()

    def tolist(self):
        return self.cpu().tolist()

    def __format__(self, spec):
        return self.item().__format__(spec) if self.ndim == 0 else object.__format__(self, spec)

    def __repr__(self, **_):
        return f"Emulated({tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo):
        return torch.nn.Parameter(self.detach().clone(), self.requires_grad) if self.is_leaf else self.clone()


def is_here(value) -> bool:
    """True for a tensor of the device."""
    return isinstance(value, Emulated)


def _is_ours(device) -> bool:
    return device is not None and torch.device(device).type == NAME


def run(func, args, kwargs):
    """One operation of torch, on the values that its tensors hold."""
    name = func.name().removeprefix("aten::")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    ours = [tensor for tensor in tensors if is_here(tensor)]
    others = [tensor for tensor in tensors if not is_here(tensor)]
    if name.startswith("copy_"):
        return _copy(*args[:3])
    streams.check(ours)
    streams.queued += 1
    if name.startswith(("_to_copy", "to.")):
        return _moved(func, args, kwargs)
    _refuse_mixing(func, name, args, ours, others)
    _refuse_generators(args, kwargs, ours)
    if name.startswith(_READS):
        count(reads, "read")
    elif name.startswith(_INDEXED) and any(t.dtype in (torch.bool, torch.uint8) for t in args[1] if t is not None):
        count(reads, "bool index")
    result = func(*tree_map(_unwrapped, args), **tree_map(_unwrapped, kwargs))
    known = {id(tensor.held): tensor for tensor in ours}
    device = kwargs.get("device")
    here = _is_ours(device) if device is not None else bool(ours)
    return tree_map(lambda value: _wrapped(value, known) if here else value, result)


def _unwrapped(value):
    if isinstance(value, torch.device):
        return torch.device("cpu") if _is_ours(value) else value
    return value.held if is_here(value) else value


def _wrapped(value, known):
    if not isinstance(value, torch.Tensor) or is_here(value):
        return value
    return known.get(id(value)) if id(value) in known else Emulated(value)


def _refuse_mixing(func, name, args, ours, others):
    """CUDA takes CPU tensors beside its own only as indices, or as scalars of pointwise operations."""
    if not ours:
        return
    if name.startswith(_INDEXED):
        # Indices may lie on the host; what is indexed, and what is written there, may not.
        others = [
            tensor for tensor in (args[0], *args[2:3]) if isinstance(tensor, torch.Tensor) and not is_here(tensor)
        ]
    large = [tensor for tensor in others if tensor.ndim > 0 or torch.Tag.pointwise not in func.tags]
    if large and not name.startswith(("set_", "_has_compatible")):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 and cpu! "
            f"({name} at {place()})"
        )


def _refuse_generators(args, kwargs, ours):
    generators = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Generator)]
    if generators and (ours or _is_ours(kwargs.get("device"))):
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")


def _copy(target, source, non_blocking=False):
    streams.queued += 1
    from_here, to_here = is_here(source), is_here(target)
    streams.check([tensor for tensor in (source, *([] if from_here != to_here else [target])) if is_here(tensor)])
    if from_here != to_here:
        host = target if from_here else source
        if to_here:
            _count_upload(source)
        if non_blocking and _is_pinned(host) and (from_here or streams.side):  # else it is in order anyway
            streams.start(_unwrapped(target), _unwrapped(source))
            return target
        if from_here:
            count(reads, "read")
    _unwrapped(target).copy_(_unwrapped(source))
    return target


def _count_upload(source):
    if source.device.type == "cpu" and source.numel() > 1:  # a scalar travels with the launch
        count(uploads, "pinned" if _is_pinned(source) else "pageable")


def _moved(func, args, kwargs):
    """To another dtype, layout or device, as the keywords say."""
    source, device = args[0], kwargs.get("device")
    here = _is_ours(device) if device is not None else is_here(source)
    if is_here(source) and not here:
        if torch.device(device).type == "meta":
            return torch.empty_like(source.held, device="meta", dtype=kwargs.get("dtype") or source.dtype)
        if kwargs.get("non_blocking"):
            return _copy(_pin(torch.empty_like(source.held, dtype=kwargs.get("dtype"))), source, True)
        count(reads, "read")
    elif here and not is_here(source):
        _count_upload(source)
    keep = {key: value for key, value in kwargs.items() if key not in ("device", "non_blocking", "pin_memory")}
    result = func(_unwrapped(source), *args[1:], **keep)
    result = result.clone() if result is _unwrapped(source) else result
    return Emulated(result) if here else result


def _is_pinned(tensor) -> bool:
    return any(
        base.data_ptr() <= tensor.data_ptr() < base.data_ptr() + max(1, base.nbytes) for base in list(_pinned.values())
    )


def _pin(tensor, device=None):
    """A copy in pinned memory; it counts as pinned for good, which is enough for a test."""
    copy = tensor.clone(memory_format=torch.contiguous_format)
    _pinned[copy.data_ptr()] = copy
    return copy


class Streams:
    """The copies that are under way, in the order of each stream; everything else is done at once.

    queued  operations so far
    side    the stream in which this thread queues copies, if it is not that of the computation
    """

    def __init__(self):
        self.queued = 0
        self.compute = Stream()
        self._own = threading.local()

    @property
    def side(self):
        return getattr(self._own, "stream", None)

    @contextlib.contextmanager
    def within(self, stream):
        before, self._own.stream = self.side, stream
        try:
            yield
        finally:
            self._own.stream = before

    def start(self, target, source):
        """A copy that is late. What the computation sends to the host is fixed now; a copy into the device is not, for
        the host must leave its memory alone until then."""
        stream = self.side or self.compute
        spoil(target)
        stream.copies.append((target, source.clone() if stream is self.compute else source))
        if not _is_pinned(target):
            late.append(target)

    def check(self, tensors):
        """RuntimeError for a tensor of the device that a copy is still to fill."""
        for tensor in tensors if late else ():
            begin = tensor.held.data_ptr()
            for other in late:
                if begin < other.data_ptr() + extent(other) and other.data_ptr() < begin + extent(tensor.held):
                    raise RuntimeError(f"used before the copy into it has been waited for ({place()})")


def extent(tensor):
    """Bytes from a tensor's first element to the end of its last; an expanded one has less than its elements take."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.element_size() * (1 + last) if tensor.numel() else 1


class Event:
    """A point in a stream: so many of its copies lie before it."""

    def __init__(self, stream):
        self.stream, self.copies, self.queued = stream, list(stream.copies), streams.queued

    def arrive(self):
        self.stream.arrive(self.copies)

    def synchronize(self):
        if self.queued == streams.queued:
            count(reads, "drain")
        self.arrive()


class Stream:
    """A stream of copies; the one of the computation has only those to the host."""

    def __init__(self, device=None):
        self.copies = []

    def arrive(self, copies):
        for copy in copies:
            if any(copy is each for each in self.copies):
                target, source = copy
                self.copies[:] = [each for each in self.copies if each is not copy]
                late[:] = [each for each in late if each is not target]
                target.copy_(source)

    def wait_stream(self, stream):
        if stream is not streams.compute:  # what goes to the host concerns the host alone
            stream.arrive(list(stream.copies))

    def wait_event(self, event):
        if event.stream is not streams.compute:
            event.arrive()

    def record_event(self):
        return Event(self)

    def synchronize(self):
        self.record_event().synchronize()


def spoil(target):
    """Values that nobody can take for those that are to come."""
    target.fill_(float("nan") if target.is_floating_point() else 99)


#: Values of tensors of the device that copies under way are to fill.
late = []
streams = Streams()


class Module:
    """What torch looks for under `torch.emulated`."""

    def is_available(self):
        return True

    def is_initialized(self):
        return True

    def current_device(self):
        return 0

    def device_count(self):
        return 1

    def manual_seed_all(self, seed):
        pass

    def _is_in_bad_fork(self):
        return False

    def set_device(self, device):
        pass

    def synchronize(self, device=None):
        streams.compute.synchronize()

    Stream = Stream

    def stream(self, stream):
        return streams.within(None if stream is streams.compute else stream)

    def current_stream(self, device=None):
        return streams.side or streams.compute

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]

    def get_device_properties(self, device=None):
        return type("Properties", (), {"name": "an emulated device"})()


def install() -> torch.device:
    """Register the device with torch, once per process; returns it."""
    backends._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    _register()
    _let_data_be_set()
    torch.__future__.set_swap_module_params_on_conversion(
        True
    )  # module.to keeps its parameters, as between CPU and CUDA
    torch.inference_mode = torch.no_grad  # torch has no inference tensors of backends in Python
    return torch.device(NAME, 0)


_libraries: list[torch.library.Library] = []


def _register():
    """Kernels for what reaches the backend without a tensor of ours, and the casts of autocast."""
    aten, every = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    _libraries.extend((aten, every))
    every.fallback(lambda func, *args, **kwargs: run(func, args, kwargs), "PrivateUse1")

    def empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
        return Emulated(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))

    def empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
        return Emulated(torch.empty_strided(size, stride, dtype=dtype))

    def copy_from(source, target, non_blocking=False):
        return _copy(target, source, non_blocking)

    aten.impl("empty.memory_format", empty, "PrivateUse1")
    aten.impl("empty_strided", empty_strided, "PrivateUse1")
    aten.impl("_copy_from", copy_from, "PrivateUse1")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in ("linear", "matmul", "mm", "addmm", "bmm", "conv2d", "conv3d", "scaled_dot_product_attention"):
        aten.impl(name, functools.partial(_in_low_precision, getattr(torch.ops.aten, name)), "AutocastPrivateUse1")
    aten.impl("is_pinned", lambda tensor, device=None: _is_pinned(tensor), "CPU")
    aten.impl("_pin_memory", _pin, "CPU")


def _in_low_precision(operation, *args, **kwargs):
    """What autocast does with a matrix product: floating inputs are cast to its dtype."""
    dtype = torch.get_autocast_dtype(NAME)

    def cast(value):
        wide = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if wide else value

    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
        return operation(*tree_map(cast, args), **tree_map(cast, kwargs))


def _let_data_be_set():
    """`parameter.data = tensor` across devices, which torch has for its own backends alone: the two change places."""
    plain = torch.Tensor.data

    def set_data(self, value):
        if not is_here(self) and not is_here(value):
            plain.__set__(self, value)
            return
        new = torch.nn.Parameter(value.detach(), requires_grad=self.requires_grad)
        kept = {key: value for key, value in vars(self).items() if key != "held"}
        torch.utils.swap_tensors(self, new)
        vars(self).update(kept)

    data = property(lambda self: plain.__get__(self), set_data)
    torch.nn.Parameter.data = data
    Emulated.data = data


@contextlib.contextmanager
def counted():
    """While active, what the host reads is counted anew: yields (reads, uploads) as they grow."""
    before = Counter(reads), Counter(uploads)
    found = Counter(), Counter()
    try:
        yield found
    finally:
        for total, old, new in zip((reads, uploads), before, found, strict=True):
            new.update(total - old)
