"""Softmax attention: the kernels that there are, and the choice of one, made once when a model is built.

name       kernel                                       runs on
flash3     FlashAttention-3, a package, in SDPA         NVIDIA, compute capability 9.0, bf16
cudnn      cuDNN's, in SDPA                             NVIDIA, 8.0 and later, bf16
flash2     FlashAttention-2, a part of torch, in SDPA   NVIDIA, 8.0 and later, bf16
efficient  torch's memory-efficient one, in SDPA        NVIDIA; elsewhere the one that torch has for the device
flex       torch's flex attention, compiled             NVIDIA, with triton
math       the formula, written out in float32          everywhere; it keeps tokens x tokens values

SDPA is torch.nn.functional.scaled_dot_product_attention. All of these are exact: they differ by rounding, forward and
backward. Kernels that quantise or approximate are refused (`APPROXIMATE`).

Self-attention is never masked: Wan attends to all tokens. Text rows may be weighted: n equal keys count as one whose
logit is raised by ln n. The flash kernels take no such bias; attention to the text, at most 2 % of a block's work,
then goes to `efficient`.

Tensor suffixes: B batch, L queries, S keys, N heads, K head width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

#: softmax(q k^T / sqrt(K) + bias) v of q (B, L, N, K), k and v (B, S, N, K) and bias (S,) or None -> (B, L, N, K).
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

#: What attention= takes.
NAMES = ("auto", "flash3", "cudnn", "flash2", "efficient", "flex", "math")
#: Of these, the ones without a fused forward whose output could be kept while the rest of a block is recomputed.
NOT_KEPT = ("flex", "math")
#: Kernels of other projects whose result, or whose backward, is not that of softmax attention.
APPROXIMATE = ("sage", "sage2", "sage3", "sageattn", "spas_sage", "sparge", "sla", "vsa", "sta", "radial", "fp8")
#: From this version on torch itself prefers cuDNN's kernel on Hopper: earlier ones had faults.
GOOD_CUDNN = 91500
#: The module of FlashAttention-3's package.
FLASH3 = "flash_attn_interface"


def sdpa(q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, bias_S: Tensor | None = None) -> Tensor:
    """PyTorch's scaled_dot_product_attention, which chooses among its kernels at each call."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLNK, k_BSNK, v_BSNK))
    bias = None if bias_S is None else bias_S.to(q.dtype).expand(1, 1, q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def math(q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, bias_S: Tensor | None = None) -> Tensor:
    """The formula in float32, written out, as a reference. It keeps all L x S logits, so it is for small sizes only."""
    with torch.autocast(q_BLNK.device.type, enabled=False):
        logits_BNLS = torch.einsum("blnk,bsnk->bnls", q_BLNK.float(), k_BSNK.float()) * q_BLNK.shape[-1] ** -0.5
        if bias_S is not None:
            logits_BNLS = logits_BNLS + bias_S.float()
        return torch.einsum("bnls,bsnk->blnk", logits_BNLS.softmax(dim=-1), v_BSNK.float()).to(v_BSNK.dtype)


def fused(*backends: SDPBackend) -> Attend:
    """SDPA with the first of these backends that takes the tensors; where there is a bias, `efficient` may too."""
    order = list(backends)
    biased = [*dict.fromkeys([*order, SDPBackend.EFFICIENT_ATTENTION])]  # the flash kernels refuse a bias

    def attend(q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, bias_S: Tensor | None = None) -> Tensor:
        with sdpa_kernel(order if bias_S is None else biased, set_priority=True):
            return sdpa(q_BLNK, k_BSNK, v_BSNK, bias_S)

    return attend


def flex(flex_attention: Callable[..., Any]) -> Attend:
    """torch's flex attention, as given: compiled, or inside a block that is."""

    def attend(q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, bias_S: Tensor | None = None) -> Tensor:
        def weighted(score: Tensor, b: Tensor, n: Tensor, query: Tensor, key: Tensor) -> Tensor:
            assert bias_S is not None
            return score + bias_S[key]

        q, k, v = (x.transpose(1, 2) for x in (q_BLNK, k_BSNK, v_BSNK))
        result: Tensor = flex_attention(q, k, v, score_mod=None if bias_S is None else weighted)
        return result.transpose(1, 2)

    return attend


@dataclass(frozen=True)
class Kernel:
    """A kernel by its name, one of NAMES but for auto."""

    name: str
    attend: Attend = field(repr=False)


#: What a model attends with until it is given another: SDPA's own choice at each call.
DEFAULT = Kernel("efficient", sdpa)


def set_kernel(module: nn.Module, kernel: Kernel) -> None:
    """Have every layer of a network that has an `attend` compute with this kernel."""
    for layer in module.modules():
        if hasattr(layer, "attend"):
            layer.attend = kernel.attend  # type: ignore[assignment]


@dataclass(frozen=True)
class Machine:
    """What decides which kernels there are.

    device      type of the device: cuda, cpu, ...
    dtype       what q, k and v are
    capability  a CUDA device's compute capability, and `card` its name
    cudnn       version of cuDNN, 0 for none
    packages    of FLASH3 and triton, those that are installed
    """

    device: str
    dtype: torch.dtype
    capability: tuple[int, int] = (0, 0)
    card: str = ""
    cudnn: int = 0
    packages: tuple[str, ...] = ()

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> Machine:
        """This one."""
        if device.type != "cuda":
            return cls(device.type, dtype)
        return cls(
            device.type,
            dtype,
            torch.cuda.get_device_capability(device),
            torch.cuda.get_device_name(device),
            torch.backends.cudnn.version() or 0,
            tuple(name for name in (FLASH3, "triton") if importlib.util.find_spec(name) is not None),
        )

    def why_not(self, name: str) -> str | None:
        """Why a kernel is not available here; None if it is."""
        if name == "math" or (name == "efficient" and self.device != "cuda"):
            return None
        if self.device != "cuda":
            backward = ": torch's flex attention has no backward here" if name == "flex" else ""
            return f"it needs an NVIDIA card, and the device is {self.device}{backward}"
        if name == "efficient":
            return None
        if self.capability < (8, 0):
            return f"it needs compute capability 8.0, and {self.card} has {self._capability}"
        if name == "flex":
            return None if "triton" in self.packages else "triton, which compiles it, is not installed"
        if self.dtype not in {torch.bfloat16, torch.float16}:
            return "it computes in bf16, and precision=fp32"
        if name == "cudnn":
            return None if self.cudnn else "torch has no cuDNN"
        return self._why_not_flash3() if name == "flash3" else None

    def _why_not_flash3(self) -> str | None:
        if self.capability[0] != 9:
            return f"it needs compute capability 9.0 (H100, H200), and {self.card} has {self._capability}"
        if FLASH3 not in self.packages:
            return f"its package ({FLASH3}) is not installed"
        if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
            return f"torch {torch.__version__} cannot call it; torch 2.11 can"
        return None

    @property
    def _capability(self) -> str:
        return ".".join(map(str, self.capability))

    def available(self) -> list[str]:
        """The kernels that are available here, in the order of NAMES."""
        return [name for name in NAMES[1:] if self.why_not(name) is None]

    def preferred(self) -> list[str]:
        """Those that `auto` takes: the first is the fastest, by published measurements (docs/speed.md)."""
        fastest = ["cudnn", "flash2"]
        if self.capability[0] == 9:
            fastest = ["flash3", "cudnn", "flash2"] if self.cudnn >= GOOD_CUDNN else ["flash3", "flash2"]
        elif self.capability < (9, 0):
            fastest = ["flash2", "cudnn"]
        return [name for name in (*fastest, "efficient") if self.why_not(name) is None]


def check_name(name: str) -> None:
    """ValueError unless attention= may be `name`."""
    if name in NAMES:
        return
    choices = f"choose one of {', '.join(NAMES)}"
    if name.lower() in APPROXIMATE:
        raise ValueError(
            f"attention={name} quantises or leaves out parts of attention, so its gradient is not that of the model "
            f"that is trained; {choices}"
        )
    raise ValueError(f"attention={name} is unknown; {choices}")


def choose(name: str, device: torch.device, dtype: torch.dtype, *, width: int) -> Kernel:
    """The kernel called `name`, or with auto the fastest, for q, k and v of `dtype` with heads of `width`.

    On a CUDA device it is tried, forward and backward, on a few values. ValueError if it is not available, with what
    is and why the others are not.
    """
    check_name(name)
    machine = Machine.of(device, dtype)
    reasons = {each: machine.why_not(each) for each in NAMES[1:]}
    wanted = machine.preferred() if name == "auto" else [name]
    for number, each in enumerate(wanted):
        if reasons[each] is None:
            try:
                kernel = _kernel(wanted[number:], device)
                _try(kernel, device, dtype, width)
            except (RuntimeError, ImportError) as error:
                reasons[each] = str(error).splitlines()[0]
                if each == "flash3":
                    torch.nn.attention.restore_flash_attention_impl()
                continue
            return kernel
    there = [each for each in NAMES[1:] if reasons[each] is None]
    why = "; ".join(f"{each}: {reason}" for each, reason in reasons.items() if reason is not None)
    raise ValueError(f"attention={name} is not available here. There are: {', '.join(there)}. There are not: {why}")


#: The kernels of SDPA on a CUDA device. FlashAttention-3 takes the place of FlashAttention-2.
_BACKENDS = {
    "flash3": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash2": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def _kernel(names: list[str], device: torch.device) -> Kernel:
    """The first of these kernels, ready for use; the others take the shapes that it refuses."""
    name = names[0]
    if name == "math":
        return Kernel(name, math)
    if name == "flex":
        from torch.nn.attention.flex_attention import flex_attention  # a second to import

        return Kernel(name, flex(torch.compile(flex_attention, dynamic=True)))
    if device.type != "cuda":
        return Kernel(name, sdpa)
    if name == "flash3":
        torch.nn.attention.activate_flash_attention_impl("FA3")
    return Kernel(name, fused(*dict.fromkeys(_BACKENDS[each] for each in names)))


def _try(kernel: Kernel, device: torch.device, dtype: torch.dtype, width: int) -> None:
    """Run a kernel forward and backward on a CUDA device; RuntimeError if it cannot. A flex kernel is not tried: it
    would compile.
    """
    if device.type != "cuda" or kernel.name == "flex":
        return
    q, k, v = (torch.ones(1, 64, 2, width, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    for bias in (None, torch.zeros(64, device=device)):
        kernel.attend(q, k, v, bias).float().sum().backward()
