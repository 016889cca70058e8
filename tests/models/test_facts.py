"""What networks declare holds: blocks, float32 parts, sequence plan, attention backends."""

import copy
import inspect
import re

import pytest
import torch
from torch import nn

from wantrain.models import WanTransformer, WanVAE, adapters
from wantrain.models.attention import sdpa
from wantrain.models.facts import block_classes, blocks_of, is_fp32, outside_blocks, place_in_blocks

SIZE = {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 8, "ffn_dim": 32, "num_layers": 3}


def scrambled(**more):
    """A transformer whose output is not zero."""
    torch.manual_seed(0)
    model = WanTransformer(**SIZE, **more)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def inputs():
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 16, 3, 4, 8, generator=generator)
    levels = torch.tensor([[0.0, 700.0, 700.0], [20.0, 500.0, 900.0]])
    return latents, levels, torch.randn(2, 5, 8, generator=generator)


def test_blocks():
    model = scrambled()
    assert list(blocks_of(model)) == list(model.blocks) and block_classes(model) == ["Block"]
    names = {name for name, _ in model.named_parameters() if place_in_blocks(model, name) is None}
    assert names == {name for name, _ in model.named_parameters() if not name.startswith("blocks.")}
    assert {id(parameter) for parameter in outside_blocks(model)} == {id(model.get_parameter(name)) for name in names}
    assert place_in_blocks(WanTransformer, "blocks.12.ffn.0.weight") == (12, "ffn.0.weight")
    assert list(blocks_of(nn.Linear(1, 1))) == [] and place_in_blocks(nn.Linear, "blocks.0.weight") is None


def test_fp32_parts():
    """Every part names a parameter, and those that hold none are linear layers' weights or biases."""
    names = [name for name, _ in scrambled().named_parameters()]
    for part in WanTransformer.fp32_parts:
        assert any(part in name for name in names), part
    rest = {name for name in names if not is_fp32(WanTransformer, name)}
    assert all(re.search(r"(patch_embedding|text_embedding\.\d|attn\.[qkvo]|ffn\.\d)\.(weight|bias)$", x) for x in rest)
    assert not any(is_fp32(WanVAE, name) for name in names)


def test_adapter_targets_are_linear_layers():
    model = scrambled()
    linear = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    for targets in WanTransformer.adapter_targets:
        adapted = copy.deepcopy(model)
        adapters.inject(adapted, adapters.AdapterSettings(rank=1, alpha=1, targets=targets), seed=0)
        assert adapters.adapter_layers(adapted).keys() <= linear


def modules_named(model, name):
    """The submodules that a name of the plan stands for, `*` being any block's number."""
    pattern = re.escape(name).replace(r"\*", r"\d+")
    return {each: module for each, module in model.named_modules() if re.fullmatch(pattern, each)}


@pytest.mark.parametrize("parts", [2, 4])
def test_sequence_plan(parts):
    """Processes that hold a part of the tokens each, cut and gathered as declared, compute what one computes.

    They run one after the other here; the keys and values of all tokens, which they would exchange, are recorded first.
    """
    plan, model = WanTransformer.sequence_plan, scrambled()
    recorded, sharded = {}, {}

    def recording(name):
        def attend(q, k, v, bias=None):
            recorded[name] = k, v
            return sdpa(q, k, v, bias)

        return attend

    for declared in plan.attend:
        for name, module in modules_named(model, declared).items():
            module.attend = recording(name)
            sharded[name] = module
    with torch.no_grad():
        whole = model(*inputs())
    assert recorded.keys() == sharded.keys() and len(sharded) == SIZE["num_layers"]
    for name, module in sharded.items():
        module.attend = lambda q, k, v, bias=None, name=name: sdpa(q, *recorded[name], bias)

    def cut(value, dim, part):
        if isinstance(value, tuple):
            return tuple(cut(each, dim, part) for each in value)
        assert value.shape[dim] % parts == 0, "the dimension divides"
        return value.chunk(parts, dim)[part].contiguous()

    results = {}
    for part in range(parts):
        handles = []
        for split in plan.split:
            for module in modules_named(model, split.module).values():
                place = list(inspect.signature(module.forward).parameters).index(split.argument)

                def narrow(module, args, place=place, split=split, part=part):
                    return tuple(cut(x, split.dim, part) if i == place else x for i, x in enumerate(args))

                handles.append(module.register_forward_pre_hook(narrow))
        for gather in plan.gather:
            (module,) = modules_named(model, gather.module).values()

            def note(module, args, result, gather=gather, part=part):
                results.setdefault(gather, []).append(result)
                # The parts of the other processes are not there yet: repeated, so that the shapes are the whole's.
                return (
                    torch.cat([result] * parts, dim=gather.dim)
                    if part + 1 < parts
                    else torch.cat(results[gather], dim=gather.dim)
                )

            handles.append(module.register_forward_hook(note))
        with torch.no_grad():
            result = model(*inputs())
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(result, whole, rtol=1e-5, atol=1e-5)
