"""FSDP2: a module's weights over the processes, block by block, each process reading its own rows from the file.

The module comes with weights in mapped files. It is sharded on the meta device, where it takes no memory, and then each
process copies its rows of every parameter to its device, in the dtype that the parameter is to have. So the host holds
the file's pages once for all processes of a machine, and the device no more than the process's part.

A launch file may have groups of processes hold the same parts (hybrid: shards inside a node, copies across nodes). A
mesh has two dimensions then, copies and shards: weights are gathered inside a group, gradients are averaged over both.

In bf16 a trained block is gathered in bf16, half of float32's bytes. What the model computes in float32 (norms,
modulation, time embedding, head) is gathered beside it in float32, as a group of its own. Gradients are summed in
float32 in both. The cast is the one that autocast would make after the gather, so results are the same.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wantrain.models.adapters import has_adapter
from wantrain.models.facts import blocks_of, is_fp32
from wantrain.models.formats.loading import settled_dtype
from wantrain.util.console import say
from wantrain.util.progress import report_progress


def shard(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    *,
    mesh: Any,
    plugin: Any,
    precision: str,
    frozen: torch.dtype | None = None,
) -> None:
    """Shard a module on the host over the processes of a mesh, in place. Its parameters are other objects afterwards,
    which its optimizer, without state yet, has instead.

    mesh       of `mesh_of`
    plugin     accelerate's FSDP plugin: what the launch file says
    precision  what linear layers compute in: fp32 or bf16
    frozen     the dtype that frozen weights are to have; None: weights have theirs already
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard  # a second to import

    values = {name: parameter.detach() for name, parameter in module.named_parameters()}
    names = {parameter: name for name, parameter in module.named_parameters()}
    _leave_shapes(module, frozen)
    # Only a network that says what stays float32 can have the rest in bf16. An adapter's base is in bf16 by itself.
    narrow = precision == "bf16" and hasattr(module, "fp32_parts") and not has_adapter(module)
    policy = partial(MixedPrecisionPolicy, reduce_dtype=torch.float32, cast_forward_inputs=False)
    how: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": policy(param_dtype=torch.bfloat16 if narrow else None),
        "reshard_after_forward": plugin.reshard_after_forward,
        "offload_policy": plugin.cpu_offload,
    }
    apart = _second_mesh(mesh) if narrow else None
    if apart is not None:
        islands = {parameter for name, parameter in module.named_parameters() if is_fp32(module, name)}
        how["shard_placement_fn"] = lambda parameter: apart if parameter in islands else None
    elif narrow:
        how["mp_policy"] = policy(param_dtype=None)
    blocks = list(blocks_of(module))
    for unit in blocks:
        fully_shard(unit, **how)
    # The outermost weights are in use when the backward begins, so they stay whole until then.
    fully_shard(module, **{**how, "reshard_after_forward": False})
    if apart is not None:
        for unit in (*blocks, module):
            _gather_in_fp32(unit, apart.mesh_info, policy(param_dtype=None))
    _prefetch(module, blocks)
    offloads = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    _fill(module, values, torch.device("cpu") if offloads else device)
    sharded = dict(module.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [sharded[names[parameter]] for parameter in group["params"]]


def mesh_of(accelerator: Any) -> Any:
    """The mesh over which weights are sharded: all processes, or as the launch file says (copies, shards)."""
    config = accelerator.parallelism_config
    if config is None or config.dp_replicate_size == 1:
        return dist.device_mesh.init_device_mesh(accelerator.device.type, (dist.get_world_size(),))
    return accelerator.torch_device_mesh["dp_replicate", "dp_shard"]


def _leave_shapes(module: nn.Module, frozen: torch.dtype | None) -> None:
    """Replace each parameter by one on the meta device, in the dtype that it is to have."""
    for name, parameter in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        shape = torch.empty_like(parameter, device="meta", dtype=settled_dtype(module, name, parameter, frozen))
        setattr(module.get_submodule(owner), leaf, nn.Parameter(shape, requires_grad=parameter.requires_grad))


def _fill(module: nn.Module, values: dict[str, Tensor], device: torch.device) -> None:
    """Give each sharded parameter this process's rows of its values."""
    from torch.distributed.tensor import DTensor

    parts = {}
    for name, parameter in module.named_parameters():
        report_progress(f"sharding {name}")
        assert isinstance(parameter, DTensor), name
        start, rows = rows_of(parameter)
        mine = values.pop(name)[start : start + rows].to(device, parameter.dtype, copy=True)
        parts[name] = DTensor.from_local(
            mine.contiguous(), parameter.device_mesh, parameter.placements,
            run_check=False, shape=parameter.shape, stride=parameter.stride(),
        )  # fmt: skip
    module.load_state_dict(parts, strict=False, assign=True)


def rows_of(tensor: Any) -> tuple[int, int]:
    """First row and number of rows of a DTensor, sharded by rows, that this process holds."""
    from torch.distributed.tensor import Shard

    mesh, shards = tensor.device_mesh, tensor.device_mesh.ndim - 1
    assert tensor.placements[shards] == Shard(0), tensor.placements
    size = tensor.shape[0]
    chunk = -(-size // mesh.size(shards))
    start = min(mesh.get_local_rank(shards) * chunk, size)
    return start, min(chunk, size - start)


def copy_of(tensor: Any) -> tuple[int, int]:
    """Which copy of its part of a DTensor this process holds, and how many there are."""
    mesh = tensor.device_mesh
    return (0, 1) if mesh.ndim == 1 else (mesh.get_local_rank(0), mesh.size(0))


def _second_mesh(mesh: Any) -> Any:
    """Where float32 parameters go, beside those of the same block that are gathered in bf16: torch makes a group of
    parameters per process group, so they get a second one. None where torch cannot.
    """
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult
    except ImportError:
        say(f"fsdp2: torch {torch.__version__} has one dtype per block, so weights are gathered in float32")
        return None
    if mesh.ndim == 1:
        again = dist.device_mesh.DeviceMesh.from_group(dist.new_group(), mesh.device_type)
        return ShardPlacementResult(None, FSDPMeshInfo(again, shard_mesh_dim=0))
    # Of the same names: tensors of both meshes meet in the norm of all gradients.
    again = dist.device_mesh.init_device_mesh(mesh.device_type, tuple(mesh.shape), mesh_dim_names=mesh.mesh_dim_names)
    return ShardPlacementResult(None, HSDPMeshInfo(again, shard_mesh_dim=1, replicate_mesh_dim=0))


def _gather_in_fp32(unit: nn.Module, mesh_info: Any, policy: Any) -> None:
    """Set the policy of the group on a mesh: fully_shard takes one for all groups of a unit, and reads each group's own
    at its first forward.
    """
    for group in unit._get_fsdp_state()._fsdp_param_groups:  # type: ignore[operator]
        if group.mesh_info is mesh_info:
            group.mp_policy = policy


def _prefetch(module: Any, blocks: list[Any]) -> None:
    """Have each block gathered while the one before it computes, in both directions."""
    for this, following in zip((module, *blocks), blocks, strict=False):
        this.set_modules_to_forward_prefetch([following])
    for this, following in zip((module, *reversed(blocks)), reversed(blocks), strict=False):
        this.set_modules_to_backward_prefetch([following])
