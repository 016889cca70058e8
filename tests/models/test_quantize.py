"""A frozen base in 8 or 4 bits: what a layer holds and computes, the gradients of adapters, and what loading takes."""

import copy
import dataclasses
import re
import sys
from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from wantrain.models import Base, WanTransformer, adapters, load_transformer, quantize
from wantrain.models.activation_policy import ActivationPolicy
from wantrain.models.formats.lora import read_lora, write_lora
from wantrain.models.formats.lora_layers import row_lengths
from wantrain.models.formats.weights import renamed_to_diffusers, write_part
from wantrain.models.offload import ModuleOffloader, blocks_to_swap
from wantrain.models.quantize import FORMATS, Format, QuantizedLinear, Stored, quantized_layers
from wantrain.training.engine.accelerator import autocast

#: Every format, and some beside a product of low rank.
FORMS = [*map(Format, FORMATS), Format("nf4", 8), Format("int8", 8)]
SIZE = {"num_attention_heads": 4, "attention_head_dim": 32, "text_dim": 64, "ffn_dim": 64}
#: The values of NF4 that are above zero, from the paper's appendix E (arXiv 2305.14314), rounded.
NF4 = [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]


def inputs(batch=2):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(batch, 16, 2, 4, 6, generator=generator)
    return latents, torch.tensor([900.0, 30.0])[:batch], torch.randn(batch, 5, 64, generator=generator)


def unquantized(model, full):
    """`full` with the values that `model` holds."""
    plain = copy.deepcopy(full)
    for name, layer in quantized_layers(model):
        plain.get_submodule(name).weight.data = layer.weight
    return plain


def adapted(model, *, dora):
    """The module with an adapter, its change as training would make it."""
    model = copy.deepcopy(model)
    settings = adapters.AdapterSettings(rank=4, alpha=4, targets="attention+ffn", dora=dora)
    adapters.inject(model, settings, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("shape", [(32, 48), (3, 64), (40, 100)])  # nf4's blocks also begin inside rows
@pytest.mark.parametrize("kind", FORMATS)
def test_rounding(kind, shape):
    """An element is off by half of its format's step at most: int8 by scale/2, fp8 by a sixteenth, nf4 by half a gap."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stored = quantize.quantize(weight, Format(kind))
    values, off = stored.dequantized(torch.float32), (stored.dequantized(torch.float32) - weight).abs()
    largest = weight.abs().amax(1, keepdim=True)
    if kind == "int8":
        assert (off <= 0.501 * largest / 127).all()
        assert torch.allclose(values.abs().amax(1, keepdim=True), largest)
    elif kind == "fp8":
        # 3 bits of mantissa: a relative 2^-4; below 2^-6 of 448 steps of 2^-9.
        assert (off <= torch.maximum(weight.abs() / 16, largest / 448 * 2**-10) * 1.001).all()
    else:
        flat = torch.nn.functional.pad(values.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
        units = flat / flat.abs().amax(1, keepdim=True)
        above = units[units > 0]
        assert torch.allclose(above, torch.tensor(NF4)[(above[:, None] - torch.tensor(NF4)).abs().argmin(1)], atol=1e-4)
        assert off.pow(2).mean().sqrt() < 0.1 * weight.pow(2).mean().sqrt()
    assert stored.data.dtype == torch.uint8


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_shapes_only(form):
    """What is drawn without values has the shapes and dtypes of what is stored."""
    weight = torch.randn(40, 100, generator=torch.Generator().manual_seed(0))
    drawn, stored = quantize.shapes_only(weight.to("meta"), form), quantize.quantize(weight, form)
    for part in ("data", "scale", "up", "down"):
        mine, theirs = getattr(drawn, part), getattr(stored, part)
        assert (mine is None) == (theirs is None) == (form.low_rank is None and part in {"up", "down"})
        assert mine is None or (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype), part
    assert (drawn.coding, drawn.shape) == (stored.coding, stored.shape)


@pytest.mark.parametrize("kind", FORMATS)
def test_low_rank(kind):
    """The product is nearly the best of its rank for what few bytes leave, and the same bits on each start."""
    generator = torch.Generator().manual_seed(0)
    decay = torch.diag(1.0 / torch.arange(1, 65))  # singular values as a trained weight may have them
    weight = torch.randn(96, 64, generator=generator) @ decay @ torch.randn(64, 64, generator=generator)
    alone, stored = quantize.quantize(weight, Format(kind)), quantize.quantize(weight, Format(kind, 8))
    left = (weight - dataclasses.replace(stored, up=None, down=None).dequantized(torch.float32)).double()
    best = torch.linalg.svdvals(left)[8:].norm()
    error = (weight - stored.dequantized(torch.float32)).norm()
    assert best <= error * 1.0001 and error < 1.05 * best
    assert error < 0.5 * (weight - alone.dequantized(torch.float32)).norm()
    torch.manual_seed(5)
    state, again = torch.get_rng_state(), quantize.quantize(weight, Format(kind, 8))
    assert torch.equal(torch.get_rng_state(), state)
    for part in ("data", "scale", "up", "down"):
        assert torch.equal(getattr(stored, part), getattr(again, part)), part


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("draw", [torch.randn, torch.rand], ids=["normal", "uniform"])
def test_low_rank_of_noise(draw, kind):
    """Where a weight's singular values are those of noise, a product still takes a little of the error and adds none."""
    weight = draw(512, 512, generator=torch.Generator().manual_seed(0))
    weight -= weight.mean()
    errors = [quantize.quantize(weight, Format(kind, rank)).left_of(weight).norm() for rank in (None, 4)]
    assert 0.95 * errors[0] < errors[1] < errors[0]


def test_low_rank_too_large():
    """A rank that a weight cannot have is refused with its shape, with and without values."""
    for make, device in ((quantize.quantize, "cpu"), (quantize.shapes_only, "meta")):
        with pytest.raises(
            ValueError, match=r"base.low_rank=33: the model has a weight of 64 x 32, whose rank is at m"
        ):
            make(torch.randn(64, 32, device=device), Format("int8", 33))
        make(torch.randn(64, 32, device=device), Format("int8", 32))


def test_rounded_once():
    """In bf16 a value is its exact product with the scale, rounded once: the scale itself is not rounded."""
    scale = torch.tensor([[1.2345678]])
    stored = Stored(torch.arange(1, 128, dtype=torch.uint8)[None], scale, torch.int8, torch.Size((1, 127)))
    exact = torch.arange(1, 128, dtype=torch.float64)[None] * scale.double()
    assert torch.equal(stored.dequantized(torch.bfloat16), exact.to(torch.bfloat16))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_same_as_values(pair, form, precision, recompute):
    """Answers and gradients of LoRA and DoRA are those over a model that holds the dequantised values, bit for bit."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model, full = (Base(pair).transformer("low_noise", dtype=dtype, stored=each) for each in (form, None))
    plain = unquantized(model, full)
    for dora in (False, True):
        found = []
        for each in (model, plain):
            each = adapted(each, dora=dora)
            each.run_block = ActivationPolicy("block" if recompute else "none", blocks=len(each.blocks))
            with autocast(precision, torch.device("cpu")):
                answer = each(*inputs())
            answer.square().mean().backward()
            gradients = {name: p.grad for name, p in each.named_parameters() if p.grad is not None}
            found.append({"answer": answer.detach(), **gradients})
        assert len(found[0]) == 1 + (3 if dora else 2) * 20
        assert found[0].keys() == found[1].keys()
        for name, value in found[0].items():
            assert value.abs().max() > 0, name
            assert torch.equal(value, found[1][name]), name


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_is_quantized(pair, form):
    """The linear layers of the blocks are, and nothing else: other parameters are as in a model loaded in full."""
    model, full = (Base(pair).transformer("low_noise", dtype=torch.bfloat16, stored=each) for each in (form, None))
    names = {name for name, _ in quantized_layers(model)}
    groups = WanTransformer.adapter_targets["attention+ffn"]
    assert names == {name for name, layer in full.named_modules() if re.fullmatch(groups, name)}
    whole = full.state_dict()
    for name, value in model.state_dict().items():
        layer, _, part = name.rpartition(".")
        if layer in names and part != "bias":
            assert value.dtype == {"weight_stored": torch.uint8, "weight_scale": torch.float32}.get(
                part, torch.bfloat16
            )
        else:
            assert torch.equal(value, whole[name]), name
            assert value.dtype == whole[name].dtype, name
    assert quantize.count(model) == sum(parameter.numel() for parameter in full.parameters())
    assert not any(parameter.requires_grad for _, layer in quantized_layers(model) for parameter in layer.parameters())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_dora_starts_at_stored_lengths(pair, form):
    """A DoRA's magnitudes start as the lengths of the rows that are stored, so a new DoRA changes nothing."""
    model = Base(pair).transformer("low_noise", stored=form)
    before = model(*inputs()).detach()
    adapters.inject(model, adapters.AdapterSettings(rank=2, alpha=2, targets="attention", dora=True), seed=0)
    layer = model.get_submodule("blocks.1.self_attn.k")
    wanted = row_lengths(layer.get_base_layer().weight)
    assert torch.equal(layer.lora_magnitude_vector["default"].weight.data, wanted)
    assert torch.equal(model(*inputs()), before)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_offloaded(pair, form):
    """The stored weights wait in a host arena between uses, and give the same answers and gradients."""
    model, found = adapted(Base(pair).transformer("low_noise", stored=form), dora=False), []
    offloader = ModuleOffloader(torch.device("cpu"))
    for arena in (False, True):
        if arena:
            offloader.add(model)
        model.zero_grad(set_to_none=True)
        answer = model(*inputs())
        answer.square().mean().backward()
        found.append([answer.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_swapped_blocks(form):
    """Stored blocks that wait on the host one by one give the same answers and gradients, with recomputation."""
    torch.manual_seed(0)
    model = WanTransformer(**SIZE | {"num_layers": 4})
    torch.nn.init.normal_(model.head.head.weight)  # zero at the start: no gradient would pass
    for name in quantize.quantizable(model):
        stored = quantize.quantize(model.get_submodule(name).weight, form)
        quantize.replace_layer(model, name, stored, torch.float32)
    model, found = adapted(model, dora=False), []
    model.run_block = ActivationPolicy("block", blocks=4)
    for swapped in (False, True):
        if swapped:
            offloader = ModuleOffloader(torch.device("cpu"))
            offloader.add(model, whole=False, blocks=blocks_to_swap(model, 4))
        model.zero_grad(set_to_none=True)
        answer = model(*inputs())
        answer.square().mean().backward()
        found.append([answer.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(found[0]) > 40 and all(tensor.any() for tensor in found[0])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_adapter_file_fits(pair, tmp_path):
    """A LoRA file goes on from a quantised base, and one of another shape is refused by its numbers."""
    model = Base(pair).transformer("low_noise", stored=Format("int8"))
    trained = adapted(model, dora=False)
    write_lora(tmp_path / "a.safetensors", adapters.adapter_layers(trained))
    adapters.inject_lora(model, read_lora(tmp_path / "a.safetensors"), seed=0)
    assert torch.equal(model(*inputs()), trained(*inputs()))
    other = WanTransformer(**SIZE | {"ffn_dim": 32, "num_layers": 2})
    quantize.as_if_loaded(other, Format("int8"), torch.float32)
    with pytest.raises(ValueError, match=r"blocks.0.ffn.0 is 64 x 128, the model's layer 32 x 128"):
        adapters.inject_lora(other, read_lora(tmp_path / "a.safetensors"), seed=0)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_nothing_kept_for_backward(form):
    """Of a layer's input and dequantised weight nothing is kept for the backward pass."""
    stored = quantize.quantize(torch.randn(32, 16), form)
    layer, kept = QuantizedLinear(stored, torch.zeros(32), torch.float32), []
    x = torch.randn(4, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    assert {id(tensor.untyped_storage()) and tensor.data_ptr() for tensor in kept} == {
        part.data_ptr() for part in layer.parts.values()
    }


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_loading_peak(form, tmp_path):
    """Loading allocates the quantised model and a few times the largest layer, not the model in full."""
    torch.manual_seed(0)
    model = WanTransformer(**SIZE | {"ffn_dim": 1024, "num_layers": 8})
    torch.nn.init.normal_(model.head.head.weight)
    tensors = {key: value.to(torch.bfloat16) for key, value in renamed_to_diffusers(model.state_dict()).items()}
    write_part(tmp_path, model.config(), tensors)
    load_transformer(tmp_path, dtype=torch.bfloat16, stored=form)  # a library's own first allocations
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loaded = load_transformer(tmp_path, dtype=torch.bfloat16, stored=form)
    mapped = next(tmp_path.glob("*.safetensors")).stat().st_size  # counted too, though the kernel can drop its pages
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events = [event for event in events if abs(event.nbytes()) != mapped]
    peak = max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    layer = 1024 * 128 * 4  # the largest, in float32
    held = sum(parameter.nbytes for parameter in loaded.parameters())
    assert peak < held + LAYERS[form.name] * layer
    assert held + LAYERS[form.name] * layer < sum(tensor.nbytes for tensor in tensors.values())


#: Float32 copies of the largest layer that its quantisation holds at most.
LAYERS = {"fp8": 2.0, "int8": 2.0, "nf4": 3.0}


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_damaged_weights_refused(pair, form, tmp_path):
    """NaN and a layer of zeros are found in the scales."""
    full = Base(pair).transformer("low_noise")
    for value, words in ((float("nan"), "is NaN or infinite"), (0.0, "is all zeros")):
        tensors = renamed_to_diffusers(full.state_dict())
        tensors["blocks.1.ffn.net.2.weight"] = torch.full_like(tensors["blocks.1.ffn.net.2.weight"], value)
        write_part(tmp_path / str(value), full.config(), tensors)
        with pytest.raises(ValueError, match=rf"blocks.1.ffn.2.weight_(scale|stored) {words}"):
            load_transformer(tmp_path / str(value), stored=form)


def test_library_missing(pair, monkeypatch):
    """nf4 without its library says how to install it; the other formats need none."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(quantize, "_functional", None)
    with pytest.raises(ValueError, match=r"base.dtype=nf4 needs bitsandbytes: pip install 'wantrain\[quant\]'"):
        Base(pair).transformer("low_noise", stored=Format("nf4"))
    for kind in ("fp8", "int8"):
        assert any(quantized_layers(Base(pair).transformer("low_noise", stored=Format(kind))))
