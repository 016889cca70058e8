"""The machine: what it is, how fast it multiplies and reaches the host's memory, and which attention it has."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import subprocess
from collections.abc import Callable
from typing import Any

import result
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from gpu_stages import sizes
from gpu_stages.context import Context, measure, product_rate, summary, synchronize
from gpu_stages.pairs import in_words
from wantrain.geometry import num_tokens
from wantrain.models.attention import Attend, Kernel, Machine, choose, sdpa

LIBRARIES = ("torch", "triton", "accelerate", "peft", "transformers", "diffusers", "deepspeed", "torchao")


def machine(context: Context) -> dict[str, Any]:
    """Names and versions, then bf16 matrix products and copies between host and device as yardsticks."""
    context.note(card=card(context.device), versions=versions(), host=f"{platform.machine()}, {_cores()} cores")
    side = 256 if context.small else 8192
    context.note(matmul={"side": side, "tflops": product_rate(context.device, side) / 1e12})
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
    """Which kernel `attention=auto` takes for self-attention of 81 frames and for the text, at an A14B expert's shapes;
    every kernel's time, forward and backward, and auto's beside the fastest of SDPA's backends called raw.
    """
    heads = sizes.transformer(context.small, 1)
    shape = {"N": heads["num_attention_heads"], "K": heads["attention_head_dim"]}
    tokens = num_tokens(sizes.latents(sizes.clips(context.small)["81 frames"])[2:])
    bias = torch.zeros(sizes.TEXT_ROWS + 1, device=context.device)
    bias[-1] = math.log(512 - sizes.TEXT_ROWS)
    cases = {"self-attention": (tokens, tokens, None), "text, with bias": (tokens, sizes.TEXT_ROWS + 1, bias)}
    kernels = _kernels(context.device, shape["K"])
    for name, (queries, keys, added) in cases.items():
        case = (context.device, queries, keys, added)
        run = _attention(*case, **shape, attend=kernels["auto"].attend)
        backend, used = taken(context.device, run)
        parts = {f"attention={each}": _attention(*case, **shape, attend=own.attend) for each, own in kernels.items()}
        raw = {f"raw {kind.name}": _raw(kind, *case, **shape) for kind in _backends(context.device)}
        refused = {each: reason for each, work in {**parts, **raw}.items() if (reason := _refusal(work)) is not None}
        works = {each: work for each, work in {**parts, **raw}.items() if each not in refused}
        took = measure(context.device, works, repeats=3)
        found = {"kernel": kernels["auto"].name, "backend": backend, "kernels": used, "tokens": [queries, keys]}
        seconds = {each: summary(own) for each, own in took.items()}
        context.note(**{name: {**found, "seconds": seconds, "refused": refused}})
        why = "the math backend keeps tokens x tokens values: 81 frames would not fit"
        context.require(f"{name}: a fused kernel", "math" not in backend and backend != "", why)
        best = min((each for each in raw if each in seconds), key=lambda each: seconds[each]["median"])
        sides = {"attention=auto": took["attention=auto"], best: took[best]}
        goal = None if context.small or added is not None else OVER_RAW
        context.compare(name, result.case({"seconds": result.measure("s", sides, at_most=goal)}))
    backends = "; ".join(f"{name}: {context.measured[name]['backend']}" for name in cases)
    return {"in_words": f"{backends}; {in_words(context)}"}


#: Goal for the seconds of `auto` over those of the fastest kernel called raw.
OVER_RAW = 1.05
BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


def _backends(device: torch.device) -> tuple[SDPBackend, ...]:
    """Those that are timed: on a GPU not the formula, whose logits at 81 frames take 86 GB."""
    return BACKENDS[:-1] if device.type == "cuda" else BACKENDS


def _kernels(device: torch.device, width: int) -> dict[str, Kernel]:
    """What `auto` takes, and the other kernels that are here, but for the formula. FlashAttention-3 takes the place of
    FlashAttention-2.
    """
    found = {"auto": choose("auto", device, torch.bfloat16, width=width)}
    flash = {"flash3", "flash2"} if found["auto"].name == "flash3" else {"flash3"}
    names = set(Machine.of(device, torch.bfloat16).available()) - flash - {"math"}
    return found | {name: choose(name, device, torch.bfloat16, width=width) for name in sorted(names)}


def _leaves(device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    """bf16 tensors of these shapes that have gradients."""
    return [torch.randn(*shape, device=device, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]


def _attention(
    device: torch.device, queries: int, keys: int, bias: Tensor | None, N: int, K: int, *, attend: Attend = sdpa
) -> Callable[[], None]:
    """Forward and backward of a kernel as the model calls it."""
    q, k, v = _leaves(device, *((1, rows, N, K) for rows in (queries, keys, keys)))

    def run() -> None:
        attend(q, k, v, bias).float().sum().backward()

    return run


def _raw(
    backend: SDPBackend, device: torch.device, queries: int, keys: int, bias: Tensor | None, N: int, K: int
) -> Callable[[], None]:
    """Forward and backward of SDPA with one backend, on contiguous tensors in its own layout."""
    q, k, v = _leaves(device, *((1, N, rows, K) for rows in (queries, keys, keys)))
    mask = None if bias is None else bias.to(q.dtype).expand(1, 1, queries, -1)

    def run() -> None:
        with sdpa_kernel(backend):
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask).float().sum().backward()

    return run


def _refusal(run: Callable[[], None]) -> str | None:
    """Why a kernel cannot; None if it can."""
    try:
        run()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


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
