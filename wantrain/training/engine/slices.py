"""What each process of a sharding engine holds of the weights, their average and the optimizer's state.

FSDP2 cuts tensors by rows (several processes may hold the same), ZeRO-3 cuts each flat tensor, ZeRO-1 and 2 cut a flat
row of many. All are consecutive elements of a tensor, which is what a `Slice` says. Of what several processes hold each
writes a part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wantrain.models.formats.joint_file import Slice
from wantrain.training.engine.engine import Stepper
from wantrain.training.engine.fsdp import copy_of, rows_of
from wantrain.training.engine.optim import named_trainable, plain_tensors
from wantrain.training.engine.zero import ZeroState
from wantrain.util.libraries import is_dtensor
from wantrain.util.progress import report_progress


class Slicer:
    """The slices of one process under an engine that keeps state in parts."""

    def __init__(self, stepper: Stepper, rank: int) -> None:
        assert stepper.keeps_parts, stepper.engine
        self.stepper, self.rank = stepper, rank

    def weights(self, tensors: Mapping[str, Tensor], instead: Mapping[int, Tensor] | None = None) -> dict[str, Slice]:
        """Slices of the module's own parameters and buffers, by the same names.

        instead  values that take the place of a parameter's, as this process holds them, by the parameter's id
        """
        other = instead or {}
        return {name: self._slice(tensor, other.get(id(tensor))) for name, tensor in tensors.items()}

    def optimizer(self) -> dict[str, Slice]:
        """Slices of the optimizer's tensors, by `parameter name/state key`. ValueError as `Stepper.optimizer_state`."""
        slices: dict[str, Slice] = {}
        stepper = self.stepper
        zero = stepper.zero_state
        if zero is not None:
            zero.link()
        for name, parameter in named_trainable(stepper.module).items():
            own = self._state(parameter) if zero is None else self._zero_state(parameter, zero)
            slices |= {f"{name}/{key}": each for key, each in own.items()}
        return slices

    def _state(self, parameter: nn.Parameter) -> dict[str, Slice]:
        state = plain_tensors(self.stepper.optimizer.state[parameter])
        return {key: self._slice(value) for key, value in state.items()}

    def _slice(self, tensor: Any, instead: Tensor | None = None) -> Slice:
        if is_dtensor(tensor):
            first, rows = rows_of(tensor)
            size = tensor.shape[1:].numel()
            values = tensor.to_local() if instead is None else instead
            copy, copies = copy_of(tensor)  # of processes with the same rows each writes a part of them
            start, end = (rows * size * each // copies for each in (copy, copy + 1))
            own = values if copies == 1 else values.reshape(-1)[start:end]
            return Slice(tensor.shape, tensor.dtype, first * size + start, end - start, lambda: own)
        if self.stepper.engine == "zero3" and hasattr(tensor, "ds_tensor"):
            zero = self.stepper.zero_state
            assert zero is not None
            start, count = zero.weight_part(tensor)
            return Slice(tensor.ds_shape, tensor.ds_tensor.dtype, start, count, lambda: tensor.ds_tensor[:count])
        whole = tensor if instead is None else instead
        return self._part_of(whole.detach())

    def _part_of(self, whole: Tensor) -> Slice:
        """This process's part of a tensor that all hold."""
        start, end = (whole.numel() * rank // self.stepper.processes for rank in (self.rank, self.rank + 1))
        return Slice(whole.shape, whole.dtype, start, end - start, lambda: whole.reshape(-1)[start:end])

    def _zero_state(self, parameter: Any, zero: ZeroState) -> dict[str, Slice]:
        keys, step = zero.keys()
        start, count, values = zero.state_part(parameter)
        shape = getattr(parameter, "ds_shape", parameter.shape)
        state = {key: Slice(shape, torch.float32, start, count, partial(values, key)) for key in keys}
        return state if step is None else {**state, "step": self._part_of(step)}


def _same(tensor: Tensor) -> Tensor:
    return tensor


def copied(slices: Mapping[str, Slice], copy: Callable[[Tensor], Tensor]) -> dict[str, Slice]:
    """The same slices with copies of the values of this moment."""
    copies = {}
    for name, each in slices.items():
        report_progress(f"copying {name} for a checkpoint")
        copies[name] = replace(each, values=partial(_same, copy(each.values()))) if each.count else each
    return copies
