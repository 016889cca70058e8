"""What DeepSpeed keeps under ZeRO: which part of weights and optimizer state is this process's, and how it is set.

All of DeepSpeed's own names are here. It is slow to import, so functions import what they need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wantrain.util.progress import report_progress


def gathered(parameter: nn.Parameter) -> AbstractContextManager[None]:
    """While active, a ZeRO-3 parameter is whole in every process; all of them enter it."""
    from deepspeed.runtime.zero import GatheredParameters

    context: AbstractContextManager[None] = GatheredParameters([parameter])
    return context


@dataclass(frozen=True)
class ZeroState:
    """The optimizer's state under DeepSpeed.

    wrapped  DeepSpeed's engine
    stage    zero1, zero2 or zero3
    rank     of this process, of so many `processes`
    """

    wrapped: Any
    stage: str
    rank: int
    processes: int

    def keys(self) -> tuple[list[str], Tensor | None]:
        """Names of the tensors that the optimizer keeps of each parameter, and its count of steps, if it counts."""
        flat = self._flat_partitions()[0]
        inner = self._inner_state()[flat]
        keys = [key for key, value in inner.items() if isinstance(value, Tensor) and value.shape == flat.shape]
        return keys, torch.as_tensor(inner["step"], dtype=torch.float32) if "step" in inner else None

    def keeps_any(self) -> bool:
        """False for an optimizer without state. DeepSpeed steps by itself; of torch's plain SGD alone keeps nothing."""
        inner = self.wrapped.optimizer.optimizer
        return not (isinstance(inner, torch.optim.SGD) and not any(group["momentum"] for group in inner.param_groups))

    def link(self) -> None:
        """ZeRO-1 and 2 find a parameter's state by links, which DeepSpeed makes after the first group's first step,
        when other groups have no state yet: so they are made again.
        """
        if self.stage != "zero3":
            self.wrapped.optimizer._hp_optimizer_states_linked = False
            self.wrapped.optimizer._lazy_init_hp_params_optimizer_state()

    def whole(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The state of a parameter in one piece; all processes ask for it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        keys, step = self.keys()
        state = {key: safe_get_full_optimizer_state(parameter, key) for key in keys}
        return state if step is None else {**state, "step": step}

    def weight_part(self, parameter: Any) -> tuple[int, int]:
        """First element, and number of elements, that this process has of a ZeRO-3 parameter, which is filled up where
        it does not divide by the processes.
        """
        size, whole = parameter.ds_tensor.numel(), parameter.ds_numel
        start = min(self.rank * size, whole)
        return start, min(size, whole - start)

    def state_part(self, parameter: Any) -> tuple[int, int, Callable[[str], Tensor]]:
        """First element and number of elements that this process has of a parameter's state, and what gives those of a
        key. Of an offloaded state it makes a copy on the device.
        """
        if self.stage == "zero3":
            from deepspeed.utils import safe_get_local_optimizer_state

            start, count = self.weight_part(parameter)
            return start, count, lambda key: safe_get_local_optimizer_state(parameter, key)[:count]
        mapping = parameter._hp_mapping
        if mapping is None:  # another process has all of it
            return 0, 0, partial(torch.empty, 0)
        address = mapping.lp_fragment_address
        return address.start, address.numel, mapping.get_optim_state_fragment

    def fill(
        self, by_name: Mapping[str, Mapping[str, Tensor]], parameters: Mapping[str, nn.Parameter], device: torch.device
    ) -> None:
        """Give each parameter its state, whole tensors by key. DeepSpeed's inner optimizer gets empty state, as its
        first step would make it; then each part is filled.
        """
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        first = next(iter(by_name.values()))
        keys = [key for key in first if key != "step"]
        counts_in_python = type(self.wrapped.optimizer.optimizer).__name__ == "DeepSpeedCPUAdam"
        step = int(first["step"].item())
        for flat in self._flat_partitions():
            moments: dict[str, Any] = {key: torch.zeros_like(flat) for key in keys}
            self._inner_state()[flat] = {**moments, "step": step if counts_in_python else torch.tensor(float(step))}
        self.link()
        for name, parameter in parameters.items():
            report_progress(f"giving DeepSpeed the state of {name}")
            for key in keys:
                value = by_name[name][key].to(device)
                if self.stage != "zero3":
                    safe_set_full_optimizer_state(parameter, value, key)
                    continue
                # Its setter for whole values forgets that parameters are filled up, so each process cuts its own part.
                size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
                filled = value.new_zeros(size * self.processes)
                filled[: value.numel()] = value.flatten()
                safe_set_local_optimizer_state(parameter, filled.narrow(0, size * self.rank, size), key)

    def _flat_partitions(self) -> list[Tensor]:
        """What DeepSpeed's inner optimizer really steps on: this process's part of each group, flat and float32."""
        zero = self.wrapped.optimizer
        flat: list[Tensor] = (
            zero.fp32_partitioned_groups_flat if self.stage == "zero3" else zero.single_partition_of_fp32_groups
        )
        return flat

    def _inner_state(self) -> dict[Tensor, dict[str, Any]]:
        state: dict[Tensor, dict[str, Any]] = self.wrapped.optimizer.optimizer.state
        return state
