"""Compiled blocks: one graph for all blocks and sizes, the same losses and gradients, and nothing read by the host.

Most tests trace and do not generate code ("eager" as backend), which takes a second; `slow` ones use the compiler.
"""

import copy

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from wantrain.models import WanTransformer, adapters, compiling, partial
from wantrain.models.activation_policy import ActivationPolicy
from wantrain.models.attention import DEFAULT, Kernel, fused, math, set_kernel
from wantrain.models.compiling import BlockCompiler, check_compiler
from wantrain.models.offload import ModuleOffloader, blocks_to_swap
from wantrain.models.quantize import Format, quantizable, quantize, replace_layer

BLOCKS = 4
SIZE = {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 8, "ffn_dim": 32, "num_layers": BLOCKS}
#: Latent frames, rows and columns of five buckets, one of them of images.
BUCKETS = [(2, 8, 8), (3, 8, 8), (5, 6, 10), (4, 12, 8), (1, 8, 12)]
SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def forget():
    """Each test compiles anew."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def network(how="full", recompute="none", stored=None, **kept):
    """A network with random weights of which all, an adapter, or two blocks are trained; `stored` is its base's format."""
    torch.manual_seed(0)
    module = WanTransformer(**SIZE)
    torch.nn.init.normal_(module.head.head.weight)
    for name in quantizable(module) if stored else []:
        layer = module.get_submodule(name)
        replace_layer(module, name, quantize(layer.weight, stored), torch.float32)
    if how in {"lora", "dora"}:
        settings = adapters.AdapterSettings(rank=4, alpha=2.0, targets="attention+ffn", dora=how == "dora")
        adapters.inject(module, settings, seed=0)
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    elif how == "partial":
        partial.train_only(module, layers="2-3", tags=["attention"])
    module.run_block = ActivationPolicy(recompute, blocks=BLOCKS, **kept)
    return module


def inputs(bucket, samples=1, rows=5):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(samples, 16, *bucket, generator=generator)
    return latents, torch.full((samples,), 400.0), torch.randn(samples, rows, 8, generator=generator)


def step(module, *given, precision="fp32"):
    """Loss and gradients of a step."""
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
        loss = module(*given).square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def compiled(module, backend="eager"):
    """The compiler of a module whose blocks it has compiled; a graph break is an error."""
    compiler = BlockCompiler(backend, fullgraph=True)
    compiler.compile(module)
    return compiler


def assert_equal_steps(module, reference, *given, precision="fp32"):
    """The same loss and gradients, up to the rounding of the precision, by each tensor's norm."""
    bound, how = {"fp32": 1e-5, "bf16": 3e-2}[precision], {"precision": precision}
    (loss, gradients), (wanted_loss, wanted) = step(module, *given, **how), step(reference, *given, **how)
    assert gradients.keys() == wanted.keys()
    assert (loss - wanted_loss).abs() <= bound * wanted_loss
    typical = torch.stack([each.norm() for each in wanted.values()]).median()
    for name, gradient in gradients.items():
        error = (gradient - wanted[name]).norm() / wanted[name].norm().clamp_min(0.1 * typical)
        assert error <= bound, (name, error)


@pytest.mark.parametrize("recompute", ["attention", *(pytest.param(each, marks=SLOW) for each in ("none", "block", 2))])
def test_graphs_of_buckets(recompute):
    """Five buckets take two graphs, one for videos and one for images, without a break."""
    module, reference = network("lora", recompute), network("lora", recompute)
    compiler = compiled(module)
    for bucket in BUCKETS:
        assert_equal_steps(module, reference, *inputs(bucket, rows=3 + bucket[0]))
    assert compiler.graphs == 2


@pytest.mark.parametrize("how", ["full", pytest.param("dora", marks=SLOW), "partial"])
def test_graphs_of_blocks(how):
    """All blocks share a graph, also those of a second network; frozen blocks before those that train have their own."""
    module, reference = network(how, "block"), network(how, "block")
    compiler = compiled(module)
    assert_equal_steps(module, reference, *inputs(BUCKETS[0]))
    compiler.compile(reference)
    assert_equal_steps(reference, network(how, "block"), *inputs(BUCKETS[1]))
    assert compiler.graphs == (2 if how == "partial" else 1)


@pytest.mark.parametrize(("activations", "precision"), [("cpu", "bf16"), pytest.param("gpu", "fp32", marks=SLOW)])
def test_swapped_blocks(activations, precision):
    """Weights that visit, inputs that wait, and autocast go together with compiled blocks."""
    module, reference = (network("lora", "attention", activations=each) for each in (activations, "gpu"))
    ModuleOffloader(torch.device("cpu")).add(module, whole=False, blocks=blocks_to_swap(module, 3))
    compiler = compiled(module)
    assert_equal_steps(module, reference, *inputs(BUCKETS[0]), precision=precision)
    assert compiler.graphs == 1


@pytest.mark.parametrize(
    "kernel", [Kernel("math", math), Kernel("flash2", fused(SDPBackend.FLASH_ATTENTION))], ids=lambda own: own.name
)
def test_kernels(kernel):
    """A kernel that is named is compiled without a graph break."""
    module, reference = network("lora"), network("lora")
    for each in (module, reference):
        set_kernel(each, kernel)
    compiled(module)
    assert_equal_steps(module, reference, *inputs(BUCKETS[0]))


@pytest.mark.parametrize(
    "stored",
    [Format("fp8", 2), *(pytest.param(Format(name), marks=SLOW) for name in ("int8", "nf4"))],
    ids=str,
)
def test_quantised_base(stored):
    """A base in 8 or 4 bits is compiled without a graph break."""
    if stored.name == "nf4":
        pytest.importorskip("bitsandbytes")
    module, reference = (network("lora", "block", stored) for _ in range(2))
    compiler = compiled(module)
    assert_equal_steps(module, reference, *inputs(BUCKETS[0]))
    assert compiler.graphs == 1


def test_names_and_copies():
    """State dict names stay, and a copy of a compiled network computes with its own weights."""
    module = network("lora")
    names = list(module.state_dict())
    compiled(module)
    twin = copy.deepcopy(module).requires_grad_(False)
    assert list(module.state_dict()) == list(twin.state_dict()) == names
    before = module(*inputs(BUCKETS[0]))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
        torch.testing.assert_close(twin(*inputs(BUCKETS[0])), before, rtol=1e-5, atol=1e-6)
    assert twin.blocks[0].forward.__self__ is twin.blocks[0]


class HostReads(TorchDispatchMode):
    """Counts operations that give the host a value."""

    def __init__(self):
        super().__init__()
        self.count = 0

    @classmethod
    def ignore_compile_internals(cls):
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += self.counts(func.name().removeprefix("aten::"))
        return func(*args, **(kwargs or {}))

    def counts(self, name):
        return name.startswith(("_local_scalar_dense", "nonzero", "equal"))


@pytest.mark.parametrize(
    ("how", "kernel", "recompute"),
    [
        ("none", DEFAULT, "attention"),
        ("none", Kernel("math", math), "block"),
        ("blocks", DEFAULT, "attention"),
        pytest.param("blocks", Kernel("math", math), "block", marks=SLOW),
    ],
    ids=str,
)
def test_no_host_reads(how, kernel, recompute):
    """Forward and backward of a model give the host no value, compiled or not."""
    module = network("lora", recompute)
    set_kernel(module, kernel)
    if how == "blocks":
        compiled(module)
    step(module, *inputs(BUCKETS[0]))
    with HostReads() as counter:
        step(module, *inputs(BUCKETS[1]))
    assert counter.count == 0


def test_said(capsys, monkeypatch):
    """Each graph is said in a line, the limit in a warning with what to do; what lies beyond runs as it is."""
    monkeypatch.setattr(compiling, "LIMIT", 2)
    module, reference = network("lora"), network("lora")
    compiler = BlockCompiler("eager")
    compiler.compile(module)
    for samples, bucket in ((1, BUCKETS[0]), (2, BUCKETS[0]), (2, BUCKETS[-1])):
        assert_equal_steps(module, reference, *inputs(bucket, samples))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("compile: a block for 1 x 2 x 16 tokens, forward and backward, in ")
    assert lines[1].startswith("compile: a block for 2 x 2 x 16 tokens, ")
    assert lines[2].startswith("warning: 2 graphs of a block were compiled, which is the limit; ")
    assert "model.train.micro_batch=1" in lines[2] and len(lines) == 3
    assert compiler.graphs == 2 and compiler.seconds > 0


@pytest.mark.parametrize(
    ("device", "programs", "words"),
    [
        ("mps", ("g++",), "is for NVIDIA cards and CPUs, and the device is mps"),
        ("cpu", (), r"needs a compiler, and g\+\+ is not there"),
        ("cuda", ("gcc",), "needs triton"),
    ],
)
def test_no_compiler(device, programs, words, monkeypatch):
    """A machine that cannot compile is an error before anything is loaded."""
    monkeypatch.setattr(compiling.shutil, "which", lambda name: name if name in programs else None)
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match=words):
        check_compiler(torch.device(device))


class Attentions(HostReads):
    """Counts attention's forward kernels, also inside compiled code."""

    def counts(self, name):
        return "scaled_dot_product" in name and "backward" not in name


@SLOW
@pytest.mark.parametrize(("recompute", "again"), [("none", 0), ("block", 2 * BLOCKS), ("attention", BLOCKS)])
def test_generated_code(recompute, again):
    """Code generated for the CPU: gradients within 1e-5, and attention is computed again as often as the policy says."""
    module, reference = network("lora", recompute), network("lora", recompute)
    compiled(module, "inductor")
    for bucket in BUCKETS[:2]:
        assert_equal_steps(module, reference, *inputs(bucket))
    loss = module(*inputs(BUCKETS[0])).square().mean()
    with Attentions() as counter:
        loss.backward()
    assert counter.count == again


@SLOW
def test_generated_code_bf16():
    """The same under autocast to bfloat16, with swapped blocks and inputs that wait on the host."""
    module, reference = network("lora", "attention", activations="cpu"), network("lora")
    ModuleOffloader(torch.device("cpu")).add(module, whole=False, blocks=blocks_to_swap(module, 3))
    compiled(module, "inductor")
    assert_equal_steps(module, reference, *inputs(BUCKETS[0]), precision="bf16")
