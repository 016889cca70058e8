"""The one place that builds the Accelerator, on the engine that the launcher asked for and no other.

An engine is how several processes share the work: each with the whole model (DDP), or each with a part of the
optimizer's state (ZeRO-1), of the gradients too (ZeRO-2), or of the weights too (ZeRO-3, FSDP2). Which one is said by
the launch file alone.

Precision is the model's own: accelerate runs with mixed_precision="no" and bf16 is torch.autocast here, around the
forward pass, with Wan's float32 islands inside the model. accelerate's own bf16 would round the timestep.
"""

from __future__ import annotations

import itertools
import os
import warnings
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from wantrain.util import allocator, devices, distributed
from wantrain.util.build_locks import stale_locks

#: Engines that give each process only a part of the weights: every forward needs all processes.
SHARDED = ("zero3", "fsdp2")
#: What engines warn of in every step though nothing is wrong: DeepSpeed calls torch by names that will change; FSDP2
#: fears for in-place changes of the model's answer, which nobody makes.
NOISE = (r"`torch\.distributed\.\w+` is deprecated", r"FSDP2-wrapped module .* returned a view")

#: What a collective has beyond the watchdog's time: the watchdog speaks first, and says where everything stands.
MARGIN = timedelta(minutes=5)
#: How long a collective may take where the watchdog never ends a run.
LONGEST = timedelta(days=1)


def start_accelerator(device: str = "auto", *, hang: float | None) -> Accelerator:
    """The Accelerator of this process on `device` (auto, cpu or cuda), after making sure that it is the one the
    launcher meant.

    `hang` is the watchdog's time in seconds (None: it never ends a run); a collective has a little longer.
    ValueError if the device cannot be had, or if the engine ends up as another one or with another number of processes
    than were asked for.
    """
    distributed.set_threads()
    for noise in NOISE:
        warnings.filterwarnings("ignore", message=noise)
    _refuse_hydras_knobs()
    wanted = engine_asked_for()
    if wanted.startswith("zero"):
        _refuse_stale_locks()
    on_cpu, timeout = devices.choose(device).type == "cpu", group_timeout(hang)
    if on_cpu:
        allocator.keep_freed_memory()
    passed_over = on_cpu and torch.cuda.is_available()  # accelerate would take the GPU
    if passed_over and wanted not in {"single", "ddp"}:
        raise ValueError(
            f"{launched_with()}: device=cpu with {wanted} on a machine with GPUs: accelerate would take them all the "
            "same; hide them with CUDA_VISIBLE_DEVICES= (empty), or use launch/accelerate/cpu_ddp.yaml"
        )
    longer = InitProcessGroupKwargs(timeout=timeout)
    with distributed.meeting():
        if "LOCAL_RANK" in os.environ and on_cpu:
            _make_group_on_cpu(wanted, timeout)
        accelerator = Accelerator(mixed_precision="no", cpu=passed_over, kwargs_handlers=[longer])
    if accelerator.num_processes != distributed.world_size():
        raise ValueError(
            f"{launched_with()}: {distributed.world_size()} processes were started but the engine holds "
            f"{accelerator.num_processes}; launch with: accelerate launch --multi_gpu --num_processes N "
            "--num_machines 1 train.py ..."
        )
    if engine_of(accelerator) != wanted:
        raise ValueError(
            f"{launched_with()} asks for {wanted}, but accelerate made {engine_of(accelerator)}; launch with one of "
            "the files in launch/accelerate (launch/README.md)"
        )
    return accelerator


def engine_of(accelerator: Accelerator) -> str:
    """single, ddp, zero1, zero2, zero3 or fsdp2; ValueError for what is not supported."""
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    names = {"NO": "single", "MULTI_GPU": "ddp", "MULTI_CPU": "ddp"}
    names |= {"FSDP": "fsdp2"} if accelerator.is_fsdp2 else {}
    if kind.value not in names:
        raise ValueError(
            f"{launched_with()}: the engine {kind.value} is not supported; use a file of launch/accelerate"
        )
    return names[kind.value]


def group_timeout(hang: float | None) -> timedelta:
    """The time-out of a process group beside a watchdog that ends a run after `hang` seconds (None: never)."""
    return LONGEST if hang is None else timedelta(seconds=hang) + MARGIN


def share_timeout() -> None:
    """Give every process group the time-out of the first: those that an engine makes for itself have torch's own."""
    if dist.is_initialized():
        timeout = first_store().timeout
        for group in dist.distributed_c10d._world.pg_map:
            dist.distributed_c10d._set_pg_timeout(timeout, group)


def first_store() -> Any:  # a torch.distributed.Store, but torch's types do not know all that it has
    """The store of keys and values by which the processes found each other; it has the time-out of the first group."""
    assert dist.group.WORLD is not None
    return dist.group.WORLD.get_group_store()


def engine_asked_for() -> str:
    """What the launcher's environment says."""

    def says(engine: str) -> bool:
        return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"

    if says("DEEPSPEED"):
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if stage not in {"1", "2", "3"}:
            raise ValueError(
                f"{launched_with()}: DeepSpeed's ZeRO stage {stage} is not supported; choose launch/accelerate/zero1, "
                "2 or 3"
            )
        return f"zero{stage}"
    if says("FSDP"):
        if os.environ.get("FSDP_VERSION") != "2":
            raise ValueError(
                f"{launched_with()}: FSDP's first version is not supported; use launch/accelerate/fsdp2.yaml"
            )
        return "fsdp2"
    return "ddp" if "LOCAL_RANK" in os.environ and distributed.world_size() > 1 else "single"


def copies_asked_for() -> int:
    """How many groups of processes hold the same parts of the weights, by the launcher's environment."""
    return int(os.environ.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "1"))


def launched_with(process: int | None = None) -> str:
    """The launch file in words, as the command line of the launcher names it; `process` is the launcher's number
    (None: this process's parent).
    """
    try:
        line = Path(f"/proc/{process or os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # no Linux, or the launcher has ended
        line = []
    for word, following in itertools.pairwise([*line, ""]):
        if word.startswith("--config_file"):
            return f"the launch file {word.partition('=')[2] or following}"
    stored = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "accelerate" / "default_config.yaml"
    if any("accelerate" in word for word in line) and stored.is_file():
        return f"the launch file {stored} (accelerate's default)"
    return "the launcher (flags or environment, without a launch file)"


#: What a launch file can say that Hydra owns: the variable it becomes, what it must be, and where it belongs.
_HYDRAS = {
    "ACCELERATE_MIXED_PRECISION": ("mixed_precision", {"no"}, "precision="),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("gradient_accumulation_steps", {"1", "auto"}, "accumulate="),
    "ACCELERATE_GRADIENT_CLIPPING": ("gradient_clipping", {"1.0", "auto", "none"}, "clip="),
    "PARALLELISM_CONFIG_CP_SIZE": ("parallelism_config_cp_size", {"1"}, "sequence_parallel="),
    "PARALLELISM_CONFIG_SP_SIZE": ("parallelism_config_sp_size", {"1"}, "sequence_parallel="),
    "PARALLELISM_CONFIG_TP_SIZE": ("parallelism_config_tp_size", {"1"}, "sequence_parallel="),
    "FSDP_ACTIVATION_CHECKPOINTING": ("fsdp_activation_checkpointing", {"false"}, "recompute="),
    "ACCELERATE_DYNAMO_BACKEND": (
        "dynamo_backend",
        {"no"},
        "compile=",
    ),
}


def _refuse_hydras_knobs() -> None:
    """Raise ValueError where the launch file sets what train.py decides: one of the two would be ignored."""
    clashes = [
        f"{key}: {os.environ[variable]} (give {hydras} to train.py)"
        for variable, (key, allowed, hydras) in _HYDRAS.items()
        if os.environ.get(variable, next(iter(allowed))).lower() not in allowed
    ]
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none").lower() != "none":
        clashes.append(
            "deepspeed_config_file (say stage and offload in the yaml, as launch/accelerate/zero3.yaml does)"
        )
    if clashes:
        raise ValueError(f"{launched_with()} holds what is not its own: {'; '.join(clashes)}; take it out there")


def _refuse_stale_locks() -> None:
    """Raise ValueError for the lock of a build of DeepSpeed's kernels that was killed: it is waited for without end."""
    for lock, minutes in stale_locks():
        raise ValueError(
            f"{lock} is {minutes:.0f} minutes old: a build of DeepSpeed's kernels was killed and left it, and "
            "every start would wait for it; remove that file"
        )


def _make_group_on_cpu(engine: str, timeout: timedelta) -> None:
    """Several CPU processes need their group made before the Accelerator, or each would believe to be alone."""
    if engine == "ddp":
        PartialState(cpu=True, timeout=timeout)
    elif engine != "single":
        PartialState(backend="gloo", timeout=timeout)
        if engine == "fsdp2":  # accelerate takes up FSDP only where it believes in several GPUs
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def autocast(precision: str, device: torch.device) -> torch.autocast | nullcontext[None]:
    """The context in which a model's forward runs: bf16 autocast, or nothing for fp32.

    Without autocast's cache, which keeps the bf16 copy of every float32 weight until the context ends: 28 GB of a 14B
    model, also where recomputing or FSDP2 has let the weights themselves go. A weight is used once in a forward, so the
    cache would save no cast.
    """
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)
