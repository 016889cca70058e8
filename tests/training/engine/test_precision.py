"""The context of a forward pass: what bf16 keeps alive beside the weights, and that keeping less changes no bit."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from wantrain.models import WanTransformer
from wantrain.models.activation_policy import ActivationPolicy
from wantrain.training.engine.accelerator import autocast

SIZE = {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 8, "ffn_dim": 48, "num_layers": 4}
CPU = torch.device("cpu")


def model_and_inputs():
    torch.manual_seed(0)
    model = WanTransformer(**SIZE)
    nn.init.normal_(model.head.head.weight, std=0.2)
    model.run_block = ActivationPolicy("block", blocks=len(model.blocks))
    return model, (torch.randn(2, 16, 3, 4, 6), torch.tensor([900.0, 30.0]), torch.randn(2, 5, 8))


def with_cache():
    """Autocast as torch has it by default."""
    return torch.autocast("cpu", dtype=torch.bfloat16)


class Copies(TorchDispatchMode):
    """The bfloat16 copies of parameters: how many were made, and the storages of those that somebody still holds."""

    def __init__(self):
        super().__init__()
        self.made, self.alive = 0, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter):
            assert result.dtype == torch.bfloat16
            self.made += 1
            self.alive.add(result.untyped_storage())
        return result

    @property
    def bytes(self):
        return sum(storage.nbytes() for storage in self.alive)


def test_bf16_weight_copies():
    """A forward casts each weight once, and frees the bf16 copies of recomputed blocks before its end."""
    model, inputs = model_and_inputs()
    blocks = [parameter for block in model.blocks for parameter in block.parameters() if parameter.ndim == 2]
    blocks += [module.bias for block in model.blocks for module in block.modules() if isinstance(module, nn.Linear)]
    # The patches' weight is flattened first: what is cast is no parameter.
    outside = [*model.text_embedding.parameters(), model.patch_embedding.bias]
    with autocast("bf16", CPU), Copies() as copies:
        answer = model(*inputs)
        assert copies.made == len(blocks) + len(outside)
        held = copies.bytes
    assert answer.requires_grad
    assert 0 < held <= 2 * sum(parameter.numel() for parameter in outside), "what the backward pass needs"


@pytest.mark.parametrize("recompute", [False, True])
def test_autocast_without_cache(recompute):
    """Outputs and gradients are bit-equal with and without torch's autocast cache."""
    results = []
    for context in (with_cache(), autocast("bf16", CPU)):
        model, inputs = model_and_inputs()
        model.run_block = ActivationPolicy("block" if recompute else "none", blocks=len(model.blocks))
        with context:
            answer = model(*inputs)
        answer.square().mean().backward()
        results.append([answer.detach(), *(parameter.grad for parameter in model.parameters())])
    assert len(results[0]) == len(results[1]) > 80
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_nested_autocast():
    """Nested autocast contexts leave the cache off.

    Those are the model's own float32 parts, and DeepSpeed's autocast around its forward.
    """
    with autocast("bf16", CPU):
        for enabled in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                assert not torch.is_autocast_cache_enabled()
    assert torch.is_autocast_cache_enabled()
