"""The machine: what it is, how fast it multiplies and reaches the host's memory, and which attention it has."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import subprocess
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from gpu_stages import sizes
from gpu_stages.context import Context, measure, summary, synchronize
from wantrain.geometry import num_tokens
from wantrain.models.attention import sdpa

LIBRARIES = ("torch", "triton", "accelerate", "peft", "transformers", "diffusers", "deepspeed", "torchao")


def machine(context: Context) -> dict[str, Any]:
    """Names and versions, then bf16 matrix products and copies between host and device as yardsticks."""
    context.note(card=card(context.device), versions=versions(), host=f"{platform.machine()}, {_cores()} cores")
    side = 256 if context.small else 8192
    a, b = (torch.randn(side, side, device=context.device, dtype=torch.bfloat16) for _ in range(2))
    seconds = summary(measure(context.device, {"product": lambda: a @ b}, repeats=10, warmup=3)["product"])["median"]
    context.note(matmul={"side": side, "tflops": 2 * side**3 / seconds / 1e12})
    copies = copy_speeds(context.device, (1 << 20) if context.small else (1 << 29))
    name, matmul = context.measured["card"]["name"], context.measured["matmul"]["tflops"]
    words = f"{name}; bf16 product {matmul:.1f} TFLOP/s; " + ", ".join(f"{k} {v:.1f} GB/s" for k, v in copies.items())
    return {"copies_gb_per_s": copies, "in_words": words}


def card(device: torch.device) -> dict[str, Any]:
    """What the device is."""
    if device.type != "cuda":
        return {"name": f"{device.type} {platform.processor() or platform.machine()}"}
    about = torch.cuda.get_device_properties(device)
    asked = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    except (OSError, subprocess.CalledProcessError) as error:
        told = [f"unknown ({error})"]
    return {
        "name": about.name,
        "memory_gb": about.total_memory / 1e9,
        "multiprocessors": about.multi_processor_count,
        "capability": f"{about.major}.{about.minor}",
        "driver, power limit, clock": told,
    }


def versions() -> dict[str, Any]:
    """What is installed, and what torch was built with."""
    found: dict[str, Any] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    found["cudnn"] = torch.backends.cudnn.version()
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _cores() -> int:
    return torch.get_num_threads()


def copy_speeds(device: torch.device, size: int) -> dict[str, float]:
    """GB/s between host and device, from ordinary (pageable) and from locked (pinned) host memory, both ways."""
    on_device = torch.empty(size, dtype=torch.uint8, device=device)
    hosts = {"pageable": torch.ones(size, dtype=torch.uint8)}
    if device.type == "cuda":
        hosts["pinned"] = torch.ones(size, dtype=torch.uint8).pin_memory()
    found = {}
    for kind, host in hosts.items():
        parts: dict[str, Callable[[], Any]] = {
            f"{kind} to device": lambda host=host: on_device.copy_(host, non_blocking=True),  # type: ignore[misc]
            f"device to {kind}": lambda host=host: host.copy_(on_device, non_blocking=True),  # type: ignore[misc]
        }
        for name, seconds in measure(device, parts, repeats=5).items():
            found[name] = size / summary(seconds)["median"] / 1e9
    return found


def attention(context: Context) -> dict[str, Any]:
    """Which kernel takes self- and cross-attention at an A14B expert's shapes, forward and backward, and what each
    backend that can takes for it.
    """
    heads = sizes.transformer(context.small, 1)
    shape = {"N": heads["num_attention_heads"], "K": heads["attention_head_dim"]}
    tokens = num_tokens(sizes.latents(sizes.clips(context.small)["17 frames"])[2:])
    bias = torch.zeros(sizes.TEXT_ROWS + 1, device=context.device)
    bias[-1] = math.log(512 - sizes.TEXT_ROWS)
    cases = {"self-attention": (tokens, tokens, None), "text, with bias": (tokens, sizes.TEXT_ROWS + 1, bias)}
    for name, (queries, keys, added) in cases.items():
        run = _attention(context.device, queries, keys, added, **shape)
        backend, kernels = taken(context.device, run)
        trials = {kind.name: _trial(context, kind, run) for kind in BACKENDS}
        context.note(**{name: {"backend": backend, "kernels": kernels, "seconds": trials, "tokens": [queries, keys]}})
        why = "the math backend keeps tokens x tokens values: 81 frames would not fit"
        context.require(f"{name}: a fused kernel", "math" not in backend and backend != "", why)
    found = {name: context.measured[name]["backend"] for name in cases}
    return {"in_words": "; ".join(f"{name}: {backend}" for name, backend in found.items())}


BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


def _attention(
    device: torch.device, queries: int, keys: int, bias: Tensor | None, N: int, K: int
) -> Callable[[], None]:
    """Forward and backward of sdpa() on bf16 tensors of these sizes."""
    rows = {"q": queries, "k": keys, "v": keys}
    q, k, v = (
        torch.randn(1, count, N, K, device=device, dtype=torch.bfloat16, requires_grad=True) for count in rows.values()
    )

    def run() -> None:
        sdpa(q, k, v, bias).float().sum().backward()

    return run


def taken(device: torch.device, run: Callable[[], None]) -> tuple[str, list[str]]:
    """The operator that scaled_dot_product_attention chose, and the device's kernels by time, the longest first."""
    run()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as seen:
        run()
        synchronize(device)
    events = seen.key_averages()
    operators = [event.key.removeprefix("aten::_") for event in events if _is_attention(event.key)]
    on_device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    on_device.sort(key=lambda event: event.self_device_time_total, reverse=True)
    return min(operators, key=len, default=""), [event.key for event in on_device[:4]]


def _is_attention(operator: str) -> bool:
    return operator.startswith("aten::_scaled_dot_product") and "backward" not in operator


def _trial(context: Context, backend: SDPBackend, run: Callable[[], None]) -> dict[str, float] | str:
    """Seconds with one backend alone; the reason where it cannot."""
    try:
        with sdpa_kernel(backend):
            return summary(measure(context.device, {"both": run}, repeats=3)["both"])
    except RuntimeError as error:
        return str(error).splitlines()[0]
