"""Linear layers computed together, and the feed-forward network, against plain operations in float64."""

import copy
import itertools
from typing import ClassVar

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from wantrain.models import WanTransformer, adapters, feed_forward, linear, quantize
from wantrain.models.activation_policy import ActivationPolicy
from wantrain.models.feed_forward import FeedForward, computed_again, gated_feed_forward
from wantrain.models.fused import affine_of, gated_residual, modulated_norm
from wantrain.models.linear import Layer, linears
from wantrain.training.engine.accelerator import autocast

WIDTH, INNER = 6, 20
KINDS = ["full", "frozen", "lora", "lora, scaled", "lora, some", "int8", "int8, lora", "dora"]
#: Of the size of each tensor. Six values wide, plain layers in bf16 (DoRA here) are as far off.
CLOSE = {"fp32": 3e-6, "bf16": 3e-2}


class Network(torch.nn.Module):
    """Three layers of one input, as q, k and v are, and a feed-forward network of their sum."""

    #: Some: the first and the third of the three layers, and the last of the feed-forward network.
    adapter_targets: ClassVar = {"all": ".*", "some": r"blocks\.0\.(0|2|3\.2)"}
    repeated_blocks: ClassVar = ("blocks",)

    def __init__(self):
        super().__init__()
        layers = [torch.nn.Linear(WIDTH, WIDTH) for _ in range(2)] + [torch.nn.Linear(WIDTH, WIDTH, bias=False)]
        self.blocks = torch.nn.ModuleList([torch.nn.ModuleList([*layers, FeedForward(WIDTH, INNER)])])

    def forward(self, x):
        *layers, ffn = self.blocks[0]
        a, b, c = linears(layers, x)
        return ffn(a * b + c) + ffn(x)


def network(kind):
    """A network whose layers are of a kind; adapters have a change."""
    torch.manual_seed(0)
    module = Network()
    if "int8" in kind:
        for name in quantize.quantizable(module):
            stored = quantize.quantize(module.get_submodule(name).weight, quantize.Format("int8"))
            quantize.replace_layer(module, name, stored, torch.float32)
    if "lora" in kind or kind == "dora":
        alpha = 3 if "scaled" in kind else 2
        targets = "some" if "some" in kind else "all"
        adapters.inject(module, adapters.AdapterSettings(2, alpha, targets, dora=kind == "dora"), seed=0)
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
    elif kind == "frozen":
        module.requires_grad_(False)
    return module


def in_float64(module):
    """The same network in plain operations: every layer is called as a module, quantised ones by their values."""
    exact = copy.deepcopy(module).double()
    for name, layer in quantize.quantized_layers(copy.deepcopy(exact)):
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None).double()
        plain.weight, plain.bias = torch.nn.Parameter(layer.dequantized(torch.float32).double()), layer.bias
        exact.set_submodule(name, plain.requires_grad_(False))
    for layer in exact.modules():
        layer.register_forward_pre_hook(lambda layer, given: None)
    return exact


def drawn(*shape, strided=False):
    x = torch.randn(*shape[:-1], 2 * shape[-1])
    return (x[..., ::2] if strided else x[..., : shape[-1]].contiguous()).detach().requires_grad_()


def near(ours, theirs, precision):
    assert (ours.double() - theirs).norm() <= CLOSE[precision] * theirs.norm()


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("precision", CLOSE)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind, precision, normed, monkeypatch):
    """Outputs and the gradient of every input and weight, for layers of every kind; `normed`: after a norm, of whose
    parts the gradients are made.
    """
    monkeypatch.setattr(feed_forward, "PART", 3)
    module = network(kind)
    exact = in_float64(module)
    inputs = [drawn(2, 3, 5, WIDTH), drawn(2, 3, WIDTH), drawn(2, 3, WIDTH)]
    others = [x.detach().double().requires_grad_() for x in inputs]

    def run(module, inputs, dtype):
        x = inputs[0].flatten(1, 2)
        if normed:
            x = modulated_norm(*inputs, 1e-6, dtype)[1]
            assert affine_of(x) is not None
        return module(x)

    with autocast(precision, torch.device("cpu")):
        ours = run(module, inputs, torch.bfloat16 if precision == "bf16" else torch.float32)
    theirs = run(exact, others, torch.float64)
    assert all(linear.hooked(layer) for layer in exact.modules())
    slope = torch.randn(theirs.shape)
    ours.float().backward(slope)
    theirs.backward(slope.double())
    near(ours, theirs, precision)
    for own, other in itertools.chain(
        zip(inputs if normed else inputs[:1], others, strict=False),
        ((p, dict(exact.named_parameters())[name]) for name, p in module.named_parameters() if p.requires_grad),
    ):
        assert own.grad.dtype == own.dtype
        near(own.grad, other.grad, precision)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("tokens", [1, 7])
def test_strided_input(kind, tokens):
    """An input that is not contiguous, and one that has no gradient."""
    module = network(kind)
    exact = in_float64(module)
    for gradient in (True, False):
        module.zero_grad(), exact.zero_grad()
        x = drawn(2, tokens, WIDTH, strided=True).requires_grad_(gradient)
        other = x.detach().double().requires_grad_(gradient)
        for each, given in ((module, x), (exact, other)):
            each(given).square().sum().backward()
        if gradient:
            near(x.grad, other.grad, "fp32")
        for (_, own), (_, theirs) in zip(module.named_parameters(), exact.named_parameters(), strict=True):
            if own.requires_grad:
                near(own.grad, theirs.grad, "fp32")


def kept(module, x):
    """The shapes that one forward keeps, but for weights."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    shapes = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            shapes.append(tuple(tensor.shape))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return shapes


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("full", [(10, WIDTH), (10, INNER)]),
        ("frozen", [(10, INNER)]),
        ("lora", [(10, WIDTH), (10, INNER), (10, 2), (10, 2)]),
    ],
)
def test_kept(kind, shapes):
    """The feed-forward network keeps its input, where a weight needs it, and what its GELU is given."""
    ffn = network(kind).blocks[0][3]
    assert kept(ffn, drawn(2, 5, WIDTH)) == shapes
    with torch.no_grad():
        assert kept(ffn, drawn(2, 5, WIDTH)) == []


def test_norm_parts_kept():
    """Beside a frozen layer a LoRA keeps the parts of its normed input, which the norm keeps anyway."""
    layers = network("lora").blocks[0][:3]
    _, y = modulated_norm(drawn(1, 2, 5, WIDTH), drawn(1, 1, WIDTH), drawn(1, 1, WIDTH), 1e-6, torch.float32)
    pointers = []
    with saved_tensors_hooks(lambda tensor: pointers.append(tensor.data_ptr()) or tensor, lambda tensor: tensor):
        linears(layers, y)
    assert affine_of(y).hat_RPD.data_ptr() in pointers and y.data_ptr() not in pointers


def test_hooked_layer_is_called():
    """A layer with a hook, or in it, is called as a module; so is one whose adapter is not a plain LoRA."""
    module = network("lora")
    layer = module.blocks[0][0]
    assert Layer.of(layer) is not None
    layer.lora_A["default"].register_forward_hook(lambda *_: None)
    assert Layer.of(layer) is None
    assert Layer.of(network("dora").blocks[0][0]) is None
    assert Layer.of(torch.nn.GELU()) is None


def test_adapter_off():
    """A layer whose adapter is switched off is the frozen layer."""
    module = network("lora")
    x = drawn(2, 5, WIDTH)
    with adapters.switched_off(module), torch.no_grad():
        assert torch.equal(module(x), network("frozen")(x)) and not torch.equal(module(x), network("lora")(x) + 1)
    assert (module(x) - network("frozen")(x)).abs().max() > 0.1


@pytest.mark.parametrize("precision", CLOSE)
@pytest.mark.parametrize("kind", ["frozen", "lora", "lora, scaled", "int8, lora"])
@pytest.mark.parametrize("rows", [(2, 3), (2, 1), (1, 1)])
def test_end_of_recomputed_block(rows, kind, precision, monkeypatch):
    """The gated feed-forward network of a block that is computed again: outputs and the gradient of every input."""
    monkeypatch.setattr(feed_forward, "PART", 4)
    ffn = network(kind).blocks[0][3]
    exact = in_float64(network(kind)).blocks[0][3]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x, z, gain, shift = drawn(2, 3, 5, WIDTH), drawn(2, 3, 5, WIDTH), drawn(*rows, WIDTH), drawn(*rows, WIDTH)
    gate = drawn(*rows, WIDTH).detach()
    inputs = [x, z, gain, shift]
    others = [each.detach().double().requires_grad_() for each in inputs]
    with autocast(precision, torch.device("cpu")), computed_again():
        ours = gated_feed_forward(ffn, x, modulated_norm(z, gain, shift, 1e-6, dtype)[1], gate)
    y = modulated_norm(*others[1:], 1e-6, torch.float64)[1]
    theirs = gated_residual(others[0], exact(y), gate.double())
    assert type(ours.grad_fn).__name__ == "_TailBackward"
    slope = torch.randn(theirs.shape)
    ours.backward(slope)
    theirs.backward(slope.double())
    near(ours, theirs, precision)
    for own, other in zip(inputs, others, strict=True):
        near(own.grad, other.grad, precision)
    named = dict(exact.named_parameters())
    for name, own in ffn.named_parameters():
        if own.requires_grad:
            near(own.grad, named[name].grad, precision)


class Widths(TorchDispatchMode):
    """The widths of the results of matrix products."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in {"mm", "addmm"}:
            self.seen.append(result.shape[-1])
        return result


def test_recomputed_block_stops_early():
    """Beside frozen weights the backward does not compute the second layer of the feed-forward network again, and the
    first one once.
    """
    torch.manual_seed(0)
    model = WanTransformer(num_attention_heads=2, attention_head_dim=16, text_dim=8, ffn_dim=48, num_layers=2)
    torch.nn.init.normal_(model.head.head.weight)
    adapters.inject(model, adapters.AdapterSettings(2, 2, "attention"), seed=0)
    loss = {}
    for recompute in ("none", "block"):
        model.run_block = ActivationPolicy(recompute, blocks=2)
        loss[recompute] = model(torch.randn(1, 16, 2, 4, 4), torch.tensor([400.0]), torch.randn(1, 5, 8)).mean()
    seen = {}
    for recompute, value in loss.items():
        with Widths() as widths:
            value.backward()
        seen[recompute] = widths.seen.count(48)
    # The gradient of the GELU's result is as wide as it; in a recomputed block its input is computed as well.
    assert seen == {"none": 2, "block": 4}
