"""The Stepper: one model under an engine. It hides how the engine steps, and where it keeps weights and state.

DeepSpeed divides by the accumulation, clips and steps inside its backward; FSDP2 and ZeRO-3 give a process only parts
of the weights. Outside this file a step is begin, backward for each micro-step, clip_gradients, step; weights and state
come out whole, under the names that they have in one process, and go in again under any engine and number of processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from wantrain.runs.checkpoint import Copier
from wantrain.training.engine import fsdp, zero
from wantrain.training.engine.accelerator import SHARDED, autocast, engine_of, share_timeout
from wantrain.training.engine.adaptive import NUMBERS, group_numbers, set_group_numbers
from wantrain.training.engine.optim import fill_state, make_state, named_trainable, plain_tensors
from wantrain.training.engine.parameterwise import ParameterwiseOptimizer
from wantrain.training.engine.updates import BackwardUpdates, clip_gradients
from wantrain.training.engine.zero import ZeroState
from wantrain.util import distributed
from wantrain.util.libraries import is_dtensor
from wantrain.util.progress import report_progress


@dataclass(frozen=True)
class StepOptions:
    """How an optimizer step is computed.

    accumulate   micro-steps of a step
    clip         largest norm of the gradient; None: any
    precision    fp32 or bf16: what linear layers compute in
    clip_by      whole: the norm is that of the whole gradient; parameter: each parameter's gradient has its own
    in_backward  parameters are updated in the backward pass, one at a time
    sequence_parallel  processes that share the tokens of a sample
    """

    accumulate: int
    clip: float | None
    precision: str
    clip_by: str = "whole"
    in_backward: bool = False
    sequence_parallel: int = 1


class Stepper:
    """A model under an engine: forward in its precision, backward, and one update per optimizer step.

    waiting  names of parameters and buffers that wait on the host, where the others are on the device already; None:
             the engine brings the whole module to the device
    frozen   the dtype of frozen weights, where they are in mapped files still
    """

    def __init__(
        self,
        accelerator: Accelerator,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        options: StepOptions,
        *,
        waiting: Iterable[str] | None = None,
        frozen: torch.dtype | None = None,
    ) -> None:
        self._accelerator = accelerator
        self.engine = engine_of(accelerator)
        self.module = module
        self.accumulate, self.precision = options.accumulate, options.precision
        self.clip, self.clip_by = options.clip, options.clip_by
        self.data_ranks = distributed.DataRanks(options.sequence_parallel)
        self.device = accelerator.device
        self.copier = Copier()
        if self._zero:
            self._configure_deepspeed()
        trained = {name: parameter.numel() for name, parameter in named_trainable(module).items()}
        if self.engine == "fsdp2":
            # By torch's own call: accelerate's needs the whole model in memory, and knows one dtype per block.
            plugin = accelerator.state.fsdp_plugin
            how: dict[str, Any] = {"mesh": fsdp.mesh_of(accelerator), "plugin": plugin}
            fsdp.shard(module, optimizer, self.device, precision=self.precision, frozen=frozen, **how)
            wrapped: Any = module
            self.wrapped, self.optimizer = wrapped, accelerator.prepare_optimizer(optimizer, device_placement=False)
        elif waiting is None:
            self.wrapped, self.optimizer = accelerator.prepare(module, optimizer)
        else:
            # DDP takes one device only, and would send what waits from the main process. All have read the same.
            module._ddp_params_and_buffers_to_ignore = list(waiting)  # type: ignore[assignment]
            self.wrapped, self.optimizer = accelerator.prepare(module, optimizer, device_placement=[False, False])
        share_timeout()
        self._check_trained(trained)
        self._parameterwise = optimizer if isinstance(optimizer, ParameterwiseOptimizer) else None
        self._in_backward: BackwardUpdates | None = None
        if options.in_backward:
            assert self._parameterwise is not None and self.accumulate == 1
            self._in_backward = BackwardUpdates(self._parameterwise, named_trainable(module).values(), self.clip)

    def _check_trained(self, wanted: Mapping[str, int]) -> None:
        """ValueError unless the engine's optimizer moves just the parameters that training was to move."""
        # ZeRO-3 leaves an empty tensor with the whole's size beside it.
        found = {name: getattr(p, "ds_numel", p.numel()) for name, p in named_trainable(self.module).items()}
        groups = sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])
        if found != dict(wanted) or (not self._zero and groups != sum(wanted.values())):
            raise ValueError(
                f"{sum(wanted.values()):,} parameters were to be trained, {self.engine} trains {sum(found.values()):,} "
                f"and its optimizer holds {groups:,}: some would never move"
            )

    @property
    def _zero(self) -> bool:
        return self.engine.startswith("zero")

    @property
    def zero_state(self) -> ZeroState | None:
        """The optimizer's state under DeepSpeed; None under other engines."""
        rank = self._accelerator.process_index
        return ZeroState(self.wrapped, self.engine, rank, self.processes) if self._zero else None

    @property
    def updates_in_backward(self) -> bool:
        """True if each parameter is updated in the backward, before the gradients of others are known."""
        return self._in_backward is not None

    @property
    def processes(self) -> int:
        """How many processes train together."""
        return self._accelerator.num_processes

    @property
    def sharded(self) -> bool:
        """True if every forward needs all processes, for each holds only a part of the weights."""
        return self.engine in SHARDED

    @property
    def forwards_together(self) -> bool:
        """True if a forward needs other processes, which hold other weights or compute other tokens."""
        return self.sharded or self.data_ranks.shared_by > 1

    @property
    def keeps_parts(self) -> bool:
        """True if the processes hold the run's state in parts, which they can write together (slices.py)."""
        return (self._zero or self.engine == "fsdp2") and self.processes > 1

    @property
    def replicated_gradients(self) -> bool:
        """True if every one of several processes holds all reduced gradients."""
        return self.engine == "ddp" and self.processes > 1

    @property
    def replicated_weights(self) -> bool:
        """True if every one of several processes holds all weights."""
        return self.engine in {"ddp", "zero1", "zero2"} and self.processes > 1

    def micro_steps(self) -> Iterator[bool]:
        """The micro-steps of an optimizer step: for each, whether it is the last."""
        return (number == self.accumulate for number in range(1, self.accumulate + 1))

    def _configure_deepspeed(self) -> None:
        """What Hydra owns goes into DeepSpeed's config here; the launch file owns the rest."""
        config = self._accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = 1  # a name for its logs: the data come split by rank
        config["gradient_accumulation_steps"] = self.accumulate
        config["gradient_clipping"] = self.clip or 0.0
        self._accelerator.gradient_accumulation_steps = self.accumulate
        # DeepSpeed switches autocast off inside its forward unless its config says so. No module is named as safe for
        # bf16: that list is not about computing, it is about which gradients are rounded before they are summed.
        precision = {"enabled": self.precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []}
        config["torch_autocast"] = precision

    def forward_context(self) -> AbstractContextManager[Any]:
        """How every forward of this run computes: also previews and validation enter it."""
        return autocast(self.precision, self.device)

    def begin(self, learning_rate_scale: float, number: int) -> None:
        """Set learning rate and number of the step that begins: some engines step inside the last backward."""
        if self._parameterwise is not None:
            self._parameterwise.number = number
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * learning_rate_scale

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add one micro-step's share of the gradient; DDP synchronises ranks only in the last one of a step.

        A loss that is no number becomes a gradient that is none, on every rank, whatever the slope there. Where the
        backward updates parameters one by one, the host looks at the loss first, and does without a backward.
        """
        if self._in_backward is not None and not self._in_backward.paused and not loss.detach().isfinite():
            return
        loss = loss * (1 + 0 * loss.detach())
        if self._zero:
            self._accelerator.gradient_state._set_sync_gradients(last)
            self._accelerator.backward(loss)
            return
        alone = not last and self.engine == "ddp"  # FSDP2 would keep whole gradients until the last one
        with self._accelerator.no_sync(self.wrapped) if alone else nullcontext():
            self._accelerator.backward(loss / self.accumulate)

    def rehearse(self, loss: Tensor) -> None:
        """A backward whose gradients are thrown away. Not under ZeRO, whose backward updates."""
        assert not self._zero
        if self._in_backward is not None:
            self._in_backward.paused = True
        self.backward(loss, last=True)
        self.optimizer.zero_grad(set_to_none=True)
        if self._in_backward is not None:
            self._in_backward.paused = False

    def clip_gradients(self) -> Tensor:
        """The gradient's norm before it is clipped, a scalar on the device, the same on every rank."""
        if self._zero:  # its last backward has clipped, and stepped if this is a number
            return torch.as_tensor(self.wrapped.get_global_grad_norm(), device=self.device)
        if self._in_backward is not None:
            return self._in_backward.norm(self.device)
        return clip_gradients(named_trainable(self.module).values(), self.clip, self.clip_by)

    @property
    def selects_updates(self) -> bool:
        """True if `step` takes a tensor: the optimizer's kernel looks at it on the device, as torch's fused ones do,
        and the host need not know whether the weights move. On a CPU the host knows at once.
        """
        if self.device.type == "cpu" or self.engine not in {"single", "ddp"} or self._parameterwise is not None:
            return False
        return getattr(self.optimizer.optimizer, "_step_supports_amp_scaling", False)

    def step(self, *, update: bool | Tensor) -> None:
        """Move the weights, if they are to be updated, and clear the gradients; else weights and optimizer stay as they
        were. All ranks say the same; DeepSpeed has done as the norm says, and updates in the backward are made already.

        update  a scalar on the device only where `selects_updates`
        """
        if self._zero or self.updates_in_backward:
            return
        if isinstance(update, Tensor):
            optimizer = self.optimizer.optimizer
            optimizer.found_inf = (~update).float()  # the name by which torch's GradScaler says it
            self.optimizer.step()
            del optimizer.found_inf
        elif update:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes of a scalar."""
        return self._accelerator.reduce(value.detach().clone(), reduction="mean")

    def mean_of_present(self, values: Tensor) -> Tensor:
        """The mean over all processes of those values (N,) that are not NaN; NaN if all are."""
        present = ~values.isnan()
        total, count = self.sum(torch.stack([values.nansum(), present.sum().to(values.dtype)]))
        return total / count

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, elementwise."""
        return self._accelerator.reduce(values.detach().clone(), reduction="sum")

    def gather(self, values: Tensor) -> Tensor:
        """The rows of all processes, those of the first one first."""
        gathered: Tensor = self._accelerator.gather(values)
        return gathered

    def any_signal(self, signal: int | None) -> Tensor:
        """The signal that any process has received, 0 for none, as a scalar on the device: all of them must leave the
        loop at the same step, or one waits.
        """
        received = torch.full((1,), float(signal or 0), device=self.device)
        return self.gather(received).max()

    def part(self) -> None:
        """After a forward that no backward follows: FSDP2 keeps its outermost weights in one piece for that one."""
        if self.engine == "fsdp2":
            self.module.reshard()  # type: ignore[operator]

    def local_parts(self) -> dict[str, Tensor]:
        """What this process holds of each parameter that training moves, by name: with its gradient, if it has one."""
        return {name: self._local_part(parameter) for name, parameter in named_trainable(self.module).items()}

    def _local_part(self, parameter: nn.Parameter) -> Tensor:
        if self.engine == "zero3":
            part: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
            return part
        return local_part(parameter)

    def whole(self, tensor: Tensor) -> Tensor:
        """A copy of a parameter, or of a tensor of its optimizer's state, in one piece on the CPU (see Copier).

        All processes ask for the same tensors in the same order; only the main one gets the values.
        """
        report_progress(f"copying a tensor of {tensor.numel():,} elements for a checkpoint")
        if is_dtensor(tensor):
            tensor = tensor.full_tensor()
        elif self.engine == "zero3" and isinstance(tensor, nn.Parameter):
            with zero.gathered(tensor):
                return self._copied(tensor)
        return self._copied(tensor)

    def _copied(self, tensor: Tensor) -> Tensor:
        return self.copier(tensor) if distributed.is_main() else tensor.new_empty(0)

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's tensors under `parameter name/state key`, each in one piece on the CPU (see `whole`).

        ValueError if the optimizer keeps anything but tensors and a count of steps.
        """
        deepspeed = self.zero_state
        if deepspeed is not None:
            deepspeed.link()
        state, numbers = {}, {} if deepspeed else group_numbers(self.optimizer.optimizer)
        for name, parameter in named_trainable(self.module).items():
            own = deepspeed.whole(parameter) if deepspeed else plain_tensors(self.optimizer.state[parameter])
            if parameter in numbers:
                own[NUMBERS] = numbers[parameter]
            for key, value in own.items():
                state[f"{name}/{key}"] = self.whole(value)
        return state

    def restore_optimizer_state(self, tensors: Mapping[str, Tensor], where: object) -> None:
        """Give the optimizer what `optimizer_state` gave, under whatever engine that was.

        ValueError, naming `where` it comes from, if the state is that of other parameters or of another optimizer.
        """
        by_name: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition("/")
            by_name.setdefault(name, {})[part] = tensor
        parameters = named_trainable(self.module)
        if not by_name and not self._keeps_state():
            return
        numbers = {p: by_name[name].pop(NUMBERS) for name, p in parameters.items() if NUMBERS in by_name.get(name, {})}
        quantised = any("." in part for own in by_name.values() for part in own)
        filled = quantised or self._parameterwise is not None  # then each parameter's state is compared there
        if by_name.keys() - parameters.keys() or (by_name.keys() != parameters.keys() and not filled):
            raise ValueError(f"{where} holds the state of other parameters; it belongs to another run")
        if self.zero_state is not None:
            self.zero_state.fill(by_name, parameters, self.device)
            return
        if filled:
            fill_state(self.optimizer.optimizer, {p: by_name.get(name, {}) for name, p in parameters.items()}, where)
            return
        # The order of the groups is that of their parameters' numbers in a state dict.
        names = {parameter: name for name, parameter in parameters.items()}
        order = [names[parameter] for group in self.optimizer.param_groups for parameter in group["params"]]
        state = {}
        for number, name in enumerate(order):
            report_progress(f"reading {where}: {name}")
            state[number] = {key: laid_out_like(parameters[name], value) for key, value in by_name[name].items()}
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        set_group_numbers(self.optimizer.optimizer, numbers, where)

    def _keeps_state(self) -> bool:
        """False for an optimizer without state, such as plain SGD: found by an update that moves nothing."""
        if self.zero_state is not None:
            return self.zero_state.keeps_any()
        make_state(self.optimizer.optimizer, named_trainable(self.module).values())
        return any(self.optimizer.state.values())


def finish(steppers: Iterable[Stepper]) -> None:
    """Leave together: without this, a rank that is done first can abort the others. No step follows."""
    for stepper in steppers:
        stepper._accelerator.wait_for_everyone()
        # The wrapper goes before the process group. As the group's last owner it would end the group's threads while
        # it holds the interpreter, and one of them may be waiting for just that: 1 run in 50 never ended.
        del stepper.wrapped
    stepper._accelerator.free_memory()
    stepper._accelerator.end_training()


def laid_out_like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """A whole tensor laid out over the processes as a parameter is; a scalar (a count of steps) stays as it is."""
    if not is_dtensor(parameter) or value.ndim == 0:
        return value
    from torch.distributed.tensor import distribute_tensor  # a second to import, and only FSDP2 needs it

    # Every process has read the whole tensor (src_data_rank=None): it cuts out its own part, and nothing is sent.
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it, unless it is laid out over processes."""
    return tensor.to_local() if is_dtensor(tensor) else tensor
