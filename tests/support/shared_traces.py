"""Traces of a network without values, each made once in a test process: they say the same whoever asks."""

from unittest import mock

from wantrain.training.planning import trace

PLAIN = (bool, int, float, str, tuple, type(None))


def described(module):
    """All that a trace can depend on: the modules with their plain attributes, and the tensors they hold."""
    modules = [
        (name, type(part), tuple((key, repr(value)) for key, value in vars(part).items() if isinstance(value, PLAIN)))
        for name, part in module.named_modules()
    ]
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return *modules, *((name, tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in tensors)


def shared_traces():
    """A context in which the planner's `trace_blocks` traces what it has not traced before."""
    made, trace_blocks = {}, trace.trace_blocks

    def shared(module, sample, recompute):
        key = described(module), sample, recompute
        if key not in made:
            made[key] = trace_blocks(module, sample, recompute)
        return made[key]

    return mock.patch.object(trace, "trace_blocks", shared)
