"""LoKr: torch.kron and peft say what it computes; it starts as nothing, is all that trains, and comes back from files."""

import copy
from typing import ClassVar

import pytest
import torch
from peft import LoKrConfig, inject_adapter_in_model
from torch.utils._python_dispatch import TorchDispatchMode

from wantrain.models import WanTransformer, adapters
from wantrain.models.adapters import AdapterSettings, KroneckerSettings
from wantrain.models.formats.inspect import describe
from wantrain.models.formats.lora import merge_lora, read_lora, write_lora
from wantrain.models.formats.lora_layers import Kronecker, Layer
from wantrain.models.formats.weights import read_file
from wantrain.models.quantize import Format, quantizable, quantize, replace_layer
from wantrain.training.engine.accelerator import autocast

SIZE = {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 8, "ffn_dim": 48, "num_layers": 2}
#: rank, factor, decompose_both -> the tensors of a 32 x 32 layer.
SHAPES = {
    (2, 4, False): {"lokr_w1": (4, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8)},
    (1, 8, True): {"lokr_w1_a": (8, 1), "lokr_w1_b": (1, 8), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 4)},
    (3, 5, False): {"lokr_w1": (4, 4), "lokr_w2_a": (8, 3), "lokr_w2_b": (3, 8)},  # 4 is the largest divisor below 5
    (1, None, False): {"lokr_w1": (4, 4), "lokr_w2_a": (8, 1), "lokr_w2_b": (1, 8)},
    (40, 4, False): {"lokr_w1": (4, 4), "lokr_w2": (8, 8)},
}


def plain():
    """A transformer whose head answers something."""
    torch.manual_seed(0)
    model = WanTransformer(**SIZE)
    torch.nn.init.normal_(model.head.head.weight, std=0.2)
    return model


def settings(rank=2, factor=4, both=False, *, alpha=None, targets="attention+ffn", **more):
    alpha = (1.5 * rank if rank < 16 else rank) if alpha is None else alpha
    return AdapterSettings(rank=rank, alpha=alpha, targets=targets, lokr=KroneckerSettings(factor, both), **more)


def adapted(*how, trained=True, **more):
    """The same with a LoKr; `trained` gives it a change as training would."""
    model = plain()
    adapters.inject(model, settings(*how, **more), seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if trained and adapters.is_zero_at_start(name):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 16, 3, 4, 6, generator=generator)
    return latents, torch.tensor([900.0, 30.0]), torch.randn(2, 5, 8, generator=generator)


class Layers(torch.nn.Sequential):
    """Some layers, all of which can be adapted."""

    adapter_targets: ClassVar = {"all": ".*"}


def one_layer(*how, **more):
    """A layer of 48 x 32 with a LoKr that changes it, and its parts."""
    torch.manual_seed(0)
    model = Layers(torch.nn.Linear(32, 48))
    adapters.inject(model, settings(*how, targets="all", **more), seed=1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model, adapters._layers(model)["0"]


@pytest.mark.parametrize("how", SHAPES)
def test_equals_kronecker_product(how):
    """Answer and gradients are those of x (W + scale * kron(w1, w2))^T + b, with torch.kron in float64."""
    model, layer = one_layer(*how)
    parts = {name: p for name, p in model.named_parameters() if p.requires_grad}
    exact = {name.split(".")[-2]: p.detach().double().requires_grad_() for name, p in parts.items()}
    first, second = (
        exact[name] if name in exact else exact[f"{name}_a"] @ exact[f"{name}_b"] for name in ("lokr_w1", "lokr_w2")
    )
    scale = 1.0 if {"lokr_w1", "lokr_w2"} <= exact.keys() else 1.5
    x, slope = torch.randn(7, 5, 32, requires_grad=True), torch.randn(7, 5, 48)
    given, base = x.detach().double().requires_grad_(), layer.base_layer
    weight = base.weight.double() + scale * torch.kron(first, second)
    wanted = torch.nn.functional.linear(given, weight, base.bias.double())
    wanted.backward(slope.double())
    answer = model(x)
    answer.backward(slope)
    torch.testing.assert_close(answer.double(), wanted, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), given.grad, rtol=1e-5, atol=1e-4)
    assert len(parts) == len(exact) >= 2
    for name, parameter in parts.items():
        torch.testing.assert_close(parameter.grad.double(), exact[name.split(".")[-2]].grad, rtol=1e-4, atol=1e-3)
    (found,) = adapters.adapter_layers(model).values()
    torch.testing.assert_close(found.change().double(), scale * torch.kron(first, second), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", SHAPES)
def test_equals_peft(how, inputs):
    """Layers have the shapes that peft's LoKrConfig gives them, and compute what its own forward does."""
    model = adapted(*how, targets="all")
    theirs = copy.deepcopy(model)
    for layer in adapters._layers(theirs).values():
        del layer.forward
    assert (model(*inputs) - theirs(*inputs)).abs().max() < 1e-5
    assert (model(*inputs) - plain()(*inputs)).abs().max() > 0.01
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if ".0.self_attn.q.lokr" in f".{name}"}
    assert {name.split(".")[-2]: shape for name, shape in shapes.items()} == SHAPES[how]
    rank, factor, both = how
    config = LoKrConfig(r=rank, decompose_factor=factor or -1, decompose_both=both, target_modules=["q"])
    other = inject_adapter_in_model(config, plain())
    assert {name: tuple(p.shape) for name, p in other.named_parameters() if ".0.self_attn.q.lokr" in name} == shapes


def test_product_never_made():
    """No tensor of the layer's own size is made, forward or backward, but the frozen layer's own; peft makes some."""

    class Sizes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.shapes = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and func.overloadpacket is not torch.ops.aten.t:
                self.shapes.append(result.numel())
            return result

    found = []
    for own in (True, False):
        model, layer = one_layer(2, 4)
        if not own:
            del layer.forward
        with Sizes() as seen:
            model(torch.randn(3, 32, requires_grad=True)).sum().backward()
        found.append(seen.shapes.count(32 * 48))
    assert found[0] == 0 < found[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_starts_as_base(precision, inputs):
    """A new LoKr changes no bit of the answer, and neither does a trained one that is switched off."""
    fresh, trained = adapted(trained=False, targets="all"), adapted(targets="all")
    with autocast(precision, torch.device("cpu")):
        wanted = plain()(*inputs)
        assert torch.equal(fresh(*inputs), wanted)
        assert not torch.equal(trained(*inputs), wanted)
        with adapters.switched_off(trained):
            assert torch.equal(trained(*inputs), wanted)
        trained(*inputs).square().sum().backward()
    graded = {name: p.grad for name, p in trained.named_parameters() if p.grad is not None}
    assert graded.keys() == {name for name, _ in trained.named_parameters() if adapters.is_of_adapter(name)}
    assert len(graded) == 3 * 26 and all(grad.any() and grad.dtype == torch.float32 for grad in graded.values())


def test_first_gradients(inputs):
    """At the start the gradient is in what is zero (w2's second factor), which the first step therefore moves."""
    model = adapted(trained=False)
    model(*inputs).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.any() == adapters.is_zero_at_start(name) == name.endswith("lokr_w2_b.default"), name


def test_seed_alone():
    """The start depends on the seed alone."""
    torch.manual_seed(123)
    one = adapters.adapter_layers(adapted(trained=False))
    torch.manual_seed(456)
    two = adapters.adapter_layers(adapted(trained=False))
    assert all(torch.equal(one[name].first[0], two[name].first[0]) for name in one)


@pytest.mark.parametrize("dialect", ["comfyui", "kohya"])
@pytest.mark.parametrize("how", SHAPES)
def test_files(how, dialect, inputs, tmp_path):
    """A file has LyCORIS' names, is restored and continued bit for bit, and merges to what peft's own merge gives."""
    model, file = adapted(*how), tmp_path / "a.safetensors"
    write_lora(file, adapters.adapter_layers(model), dialect=dialect, metadata={"expert": "low_noise"})
    keys = {key.rpartition(".")[2] for key in read_file(file)[0] if ".0.self_attn.q." in key.replace("_0_", ".0.")}
    assert not keys or keys - {"alpha"} == SHAPES[how].keys()
    assert ("alpha" in {key.rpartition(".")[2] for key in read_file(file)[0]}) == (how[0] < 16)
    wanted, fresh, merged, going_on = model(*inputs), adapted(*how, trained=False), plain(), plain()
    adapters.restore_adapter(file, fresh)
    assert torch.equal(fresh(*inputs), wanted)
    read = read_lora(file)
    assert (read.kind, read.dialect) == ("lokr", dialect) and "kind      LoKr" in describe(file)
    adapters.inject_lora(going_on, read, seed=5)
    assert torch.equal(going_on(*inputs), wanted)
    trained = {name: p for name, p in going_on.named_parameters() if p.requires_grad}
    assert trained.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert merge_lora(file, merged) == 20
    assert (merged(*inputs) - wanted).abs().max() < 1e-5
    for name, layer in adapters._layers(model).items():
        layer.merge()
        torch.testing.assert_close(merged.get_submodule(name).weight, layer.get_base_layer().weight)


def test_continues_any_shape(inputs, tmp_path):
    """A file whose shapes no setting gives (other factors for rows and columns, peft's scale of a whole product) is
    trained on as it is.
    """
    random = torch.Generator().manual_seed(0)
    layers = {
        "blocks.0.self_attn.q": Kronecker((torch.randn(8, 2, generator=random),), (torch.randn(4, 16),), 0.3),
        "blocks.1.ffn.0": Kronecker((torch.randn(3, 16),), (torch.randn(16, 5), torch.randn(5, 2)), 0.7),
    }
    model, merged = plain(), plain()
    write_lora(tmp_path / "a.safetensors", layers)
    adapters.inject_lora(model, read_lora(tmp_path / "a.safetensors"), seed=0)
    merge_lora(tmp_path / "a.safetensors", merged)
    torch.testing.assert_close(model(*inputs), merged(*inputs), rtol=1e-4, atol=1e-4)
    model(*inputs).sum().backward()
    write_lora(tmp_path / "b.safetensors", adapters.adapter_layers(model))
    again = read_file(tmp_path / "b.safetensors")[0]
    assert all(torch.equal(again[key], value) for key, value in read_file(tmp_path / "a.safetensors")[0].items())


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (adapted(1, 4), "has rank 1 and alpha 1.5, in this run it has 2 and 3"),
        (adapted(2, 4, alpha=1), "has rank 2 and alpha 1, in this run it has 2 and 3"),
        (adapted(40, 4), "has rank None and alpha none, in this run it has 2 and 3"),
        (adapted(2, 2), "is 2 x 2, in this run it is 4 x 4; the adapter belongs to another run"),
        (adapted(2, 4, targets="all"), "holds an adapter of other layers"),
    ],
    ids=["rank", "alpha", "whole", "factor", "targets"],
)
def test_restore_mismatch(other, words, tmp_path):
    """A file of another LoKr is not restored."""
    write_lora(tmp_path / "a.safetensors", adapters.adapter_layers(other))
    with pytest.raises(ValueError, match=words):
        adapters.restore_adapter(tmp_path / "a.safetensors", adapted())


def test_other_kinds(tmp_path):
    """A LoRA's file is not restored into a LoKr, and a file of both kinds is not trained on."""
    model, file = plain(), tmp_path / "a.safetensors"
    adapters.inject(model, AdapterSettings(rank=2, alpha=2, targets="attention+ffn"), seed=0)
    layers = adapters.adapter_layers(model)
    write_lora(file, layers)
    with pytest.raises(ValueError, match="holds a LoRA, this run trains a LoKr; it belongs to another run"):
        adapters.restore_adapter(file, adapted())
    name, layer = next(iter(adapters.adapter_layers(adapted()).items()))
    write_lora(file, {**layers, name: layer})
    assert isinstance(layers[name], Layer)
    with pytest.raises(ValueError, match=r"by a (LoRA|LoKr) and .* by a (LoRA|LoKr): one kind of adapter is trained"):
        adapters.inject_lora(plain(), read_lora(file), seed=0, where=file)


def test_alpha_without_effect():
    """An alpha that no layer's scale has is refused: with whole matrices readers of the file take none."""
    with pytest.raises(ValueError, match=r"adapter\.alpha=3 has no effect: with adapter\.rank=40 both matrices of ev"):
        adapted(40, 4, alpha=3)


def test_patterns():
    """Patterns give layers their own rank and alpha."""
    layers = adapters.adapter_layers(adapted(rank_pattern={"ffn": 3}, alpha_pattern={"blocks.1": 0.5}))
    for name, layer in layers.items():
        rank = 3 if "ffn" in name else 2
        assert (layer.rank, layer.scale) == (rank, (0.5 if name.startswith("blocks.1.") else 3.0) / rank), name


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_quantised_base(form, inputs):
    """Beside frozen weights in 8 bits a LoKr adds what it does beside the same weights in full."""
    model, wide = plain(), plain()
    for name in quantizable(model):
        replace_layer(model, name, quantize(model.get_submodule(name).weight, Format(form)), torch.float32)
        wide.get_submodule(name).weight.data = model.get_submodule(name).dequantized(torch.float32)
    for each in (model, wide):
        adapters.inject(each, settings(), seed=1)
        for name, parameter in each.named_parameters():
            if adapters.is_zero_at_start(name):
                torch.nn.init.constant_(parameter, 0.1)
    torch.testing.assert_close(model(*inputs), wide(*inputs), rtol=1e-4, atol=1e-4)
