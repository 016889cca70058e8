"""Attention's kernels against the formula in float64, and which of them a machine is given."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import flex_attention

from wantrain.models import WanTransformer, attention
from wantrain.models.attention import Kernel, Machine, check_name, choose, flex, fused, set_kernel

CPU = torch.device("cpu")
#: What runs on a CPU, forward and backward.
KERNELS = {
    "efficient": attention.sdpa,
    "math": attention.math,
    "fused": fused(SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION),
}


def heads(length, dtype, *, strided=False, seed=0):
    """(2, length, 3, 24), as it is or every second row of twice as many."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, length * (2 if strided else 1), 3, 24, generator=generator)
    return (values[:, ::2] if strided else values).to(dtype)


def formula(q, k, v, bias):
    """Softmax attention in float64, written out anew."""
    logits = torch.einsum("blnk,bsnk->bnls", q, k) / q.shape[-1] ** 0.5 + (0.0 if bias is None else bias)
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    return torch.einsum("bnls,bsnk->blnk", weights / weights.sum(-1, keepdim=True), v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("queries", "keys", "strided"), [(1, 1, False), (37, 37, True), (64, 13, False)])
@pytest.mark.parametrize("name", KERNELS)
def test_float64(name, queries, keys, strided, biased, dtype):
    """Outputs and the gradients of q, k and v are those of the formula, to the rounding of the dtype."""
    rows = {"q": queries, "k": keys, "v": keys}
    parts = [heads(count, dtype, strided=strided, seed=seed) for seed, count in enumerate(rows.values())]
    bias = torch.linspace(-1, 3, keys) if biased else None
    target = heads(queries, torch.float64, seed=9)
    results = []
    for attend, cast in ((KERNELS[name], dtype), (formula, torch.float64)):
        own = [part.to(cast).detach().requires_grad_() for part in parts]
        out = attend(*own, None if bias is None else bias.to(cast) if cast == torch.float64 else bias)
        (out.double() * target).sum().backward()
        results.append([out.detach().double(), *(part.grad.double() for part in own)])
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    for found, wanted in zip(*results, strict=True):
        assert (found - wanted).norm() <= bound * max(wanted.norm().item(), 1.0), name


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_forward(biased):
    """Flex attention, uncompiled and without gradients: on a CPU it has no more."""
    q, k, v = heads(12, torch.float32, seed=1), heads(5, torch.float32, seed=2), heads(5, torch.float32, seed=3)
    bias = torch.linspace(-1, 3, 5) if biased else None
    with torch.no_grad():
        found = flex(flex_attention)(q, k, v, bias)
    wanted = formula(q.double(), k.double(), v.double(), bias)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)


H100 = Machine("cuda", torch.bfloat16, (9, 0), "NVIDIA H100", 91900, (attention.FLASH3, "triton"))
A100 = dataclasses.replace(H100, capability=(8, 0), card="NVIDIA A100")
B200 = dataclasses.replace(H100, capability=(10, 0), card="NVIDIA B200")
T4 = dataclasses.replace(H100, capability=(7, 5), card="Tesla T4")
MACHINES = {
    "H100": (H100, ["flash3", "cudnn", "flash2", "efficient", "flex", "math"], "flash3"),
    "no packages": (
        dataclasses.replace(H100, packages=()), ["cudnn", "flash2", "efficient", "math"], "cudnn",
    ),
    "old cuDNN": (dataclasses.replace(H100, packages=(), cudnn=90100), ["cudnn", "flash2", "efficient", "math"], "flash2"),
    "no cuDNN": (dataclasses.replace(H100, packages=("triton",), cudnn=0), ["flash2", "efficient", "flex", "math"], "flash2"),
    "fp32": (dataclasses.replace(H100, dtype=torch.float32), ["efficient", "flex", "math"], "efficient"),
    "A100": (A100, ["cudnn", "flash2", "efficient", "flex", "math"], "flash2"),
    "B200": (B200, ["cudnn", "flash2", "efficient", "flex", "math"], "cudnn"),
    "T4": (T4, ["efficient", "math"], "efficient"),
    "CPU": (Machine("cpu", torch.float32), ["efficient", "math"], "efficient"),
    "other": (Machine("mps", torch.bfloat16), ["efficient", "math"], "efficient"),
}  # fmt: skip


@pytest.mark.parametrize("name", MACHINES)
def test_available(name):
    """What a machine has, and what auto takes of it."""
    machine, there, first = MACHINES[name]
    assert machine.available() == there
    assert machine.preferred()[0] == first and set(machine.preferred()) <= set(there)


@pytest.mark.parametrize(
    ("machine", "kernel", "why"),
    [
        (T4, "flash2", "it needs compute capability 8.0, and Tesla T4 has 7.5"),
        (A100, "flash3", r"it needs compute capability 9.0 \(H100, H200\), and NVIDIA A100 has 8.0"),
        (dataclasses.replace(H100, packages=()), "flash3", r"its package \(flash_attn_interface\) is not installed"),
        (dataclasses.replace(H100, packages=()), "flex", "triton, which compiles it, is not installed"),
        (dataclasses.replace(H100, dtype=torch.float32), "cudnn", "it computes in bf16, and precision=fp32"),
        (dataclasses.replace(H100, cudnn=0), "cudnn", "torch has no cuDNN"),
    ],
)
def test_unavailable_on_cuda(machine, kernel, why, monkeypatch):
    """A kernel that a card has not is an error with the reason, and with what the card has."""
    monkeypatch.setattr(Machine, "of", lambda device, dtype: machine)
    with pytest.raises(ValueError, match=rf"^attention={kernel} is not available here\. There are: .*{kernel}: {why}"):
        choose(kernel, torch.device("cuda"), machine.dtype, width=128)


def test_unavailable_on_cpu():
    """The error names what a CPU has, and why each of the others is not there."""
    with pytest.raises(ValueError) as error:
        choose("flash2", CPU, torch.float32, width=32)
    text = "it needs an NVIDIA card, and the device is cpu"
    assert str(error.value) == (
        "attention=flash2 is not available here. There are: efficient, math. There are not: "
        f"flash3: {text}; cudnn: {text}; flash2: {text}; flex: {text}: torch's flex attention has no backward here"
    )


@pytest.mark.parametrize(("name", "taken"), [("auto", attention.sdpa), ("efficient", attention.sdpa), ("math", attention.math)])  # fmt: skip
def test_chosen_on_cpu(name, taken):
    """A CPU's kernel is the one that torch has for it."""
    kernel = choose(name, CPU, torch.float32, width=32)
    assert kernel == Kernel("math" if name == "math" else "efficient", taken)


@pytest.mark.parametrize(
    ("name", "failing", "taken"),
    [
        ("auto", (), "flash3"),
        ("auto", ("flash3",), "cudnn"),
        ("auto", ("flash3", "cudnn"), "flash2"),
        ("auto", ("flash3", "cudnn", "flash2"), "efficient"),
        ("cudnn", (), "cudnn"),
        ("cudnn", ("cudnn",), None),
        ("auto", ("flash3", "cudnn", "flash2", "efficient"), None),
    ],
)
def test_tried_on_cuda(name, failing, taken, monkeypatch):
    """A kernel that fails when it is tried is not taken: auto goes on to the next, another name is an error."""
    switched = []
    monkeypatch.setattr(Machine, "of", lambda device, dtype: H100)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", lambda name: switched.append(name))
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", lambda: switched.append(None))

    def fail(kernel, device, dtype, width):
        if kernel.name in failing:
            raise RuntimeError(f"no room for {kernel.name}\nat line 1")

    monkeypatch.setattr(attention, "_try", fail)
    if taken is None:
        with pytest.raises(ValueError, match=rf"There are: .*{failing[-1]}: no room for {failing[-1]}"):
            choose(name, torch.device("cuda"), torch.bfloat16, width=128)
    else:
        assert choose(name, torch.device("cuda"), torch.bfloat16, width=128).name == taken
    assert switched == (["FA3"] if taken == "flash3" else ["FA3", None] if name == "auto" else [])


@pytest.mark.parametrize("name", ["sage", "SageAttn", "sparge", "sta"])
def test_approximate_refused(name):
    """A kernel that approximates is refused by its name."""
    with pytest.raises(
        ValueError, match=rf"attention={name} quantises or leaves out parts of attention.*choose one of"
    ):
        check_name(name)


def test_unknown_refused():
    """A name that nobody knows."""
    with pytest.raises(ValueError, match=r"attention=fast is unknown; choose one of auto, flash3, cudnn, flash2,"):
        check_name("fast")


def test_set_kernel():
    """All attention of a model computes with the kernel that it was given, and answers as before."""
    torch.manual_seed(0)
    model = WanTransformer(num_attention_heads=2, attention_head_dim=16, text_dim=8, ffn_dim=32, num_layers=2)
    torch.nn.init.normal_(model.head.head.weight)
    inputs = torch.randn(1, 16, 2, 4, 6), torch.tensor([400.0]), torch.randn(1, 5, 8)
    before = model(*inputs)
    set_kernel(model, Kernel("math", attention.math))
    layers = [layer for block in model.blocks for layer in (block.self_attn, block.cross_attn)]
    assert {layer.attend for layer in layers} == {attention.math}
    torch.testing.assert_close(model(*inputs), before, rtol=1e-4, atol=1e-5)
