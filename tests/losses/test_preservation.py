"""Prior preservation against a plain implementation, around every loss, and with real adapters that are switched off
between forward and backward."""

import copy

import pytest
import torch
from toy_velocity import KNOWN, SIZE, Toy, clips, pairs

from wantrain.batch import pad_texts
from wantrain.losses import FlowMatching, Preference, Preserving
from wantrain.losses.preservation import PROMPT
from wantrain.models import WanTransformer, adapters
from wantrain.models.activation_policy import ActivationPolicy
from wantrain.models.adapters import AdapterSettings
from wantrain.training.engine.accelerator import autocast
from wantrain.util.seeds import generator_at

TEXTS = {"a dog": torch.full((2, 3), 0.5), "": torch.full((1, 3), -1.0), "a longer class prompt": torch.ones(8, 3)}


def draws_of(loss, batch):
    return loss.prepare(batch, [generator_at(0, "noise", position) for position in batch.positions])


def preserving(inner, model, weight=0.6):
    loss = Preserving(inner, weight=weight, prompts=list(TEXTS))
    loss.attach({"base": model.base}, TEXTS)
    return loss


@pytest.mark.parametrize("more", [{}, {"noised_BT": KNOWN}, {"conditioning": {"extra": torch.full((4, *SIZE), 0.2)}}])
def test_matches_plain_loss(more):
    """Value and gradient are those of the loss and of the weighted difference, each computed by itself in float64."""
    model, exact, batch = Toy(), Toy(dtype=torch.float64), clips(1, **more)
    loss, inner = preserving(FlowMatching(), model), FlowMatching()
    draws = draws_of(loss, batch)
    found = loss(model, batch, draws)
    found.value.backward()
    alone = draws_of(inner, batch)
    assert torch.equal(draws.sigma, alone.sigma) and torch.equal(draws.noise_BCTHW, alone.noise_BCTHW)
    learned = torch.ones(4, SIZE[1]) if batch.noised_BT is None else batch.noised_BT
    level = (draws.sigma.double()[:, None] * learned)[:, None, :, None, None]
    noise, x0 = draws.noise_BCTHW.double(), batch.latents_BCTHW.double()
    inputs = (1 - level) * x0 + level * noise, 1000 * level[:, 0, :, 0, 0]
    extra = {key: value.double() for key, value in batch.conditioning.items()}
    prompts = pad_texts(list(TEXTS.values())).double()[draws.more[PROMPT]]

    def mean(square):
        frames = square.mean(dim=(1, 3, 4))
        return ((frames * learned).sum(dim=1) / learned.sum(dim=1)).mean()

    error = mean((exact(*inputs, batch.text_BLD.double(), **extra) - noise + x0).square())
    difference = mean((exact(*inputs, prompts, **extra) - exact.base(*inputs, prompts, **extra)).square())
    (error + 0.6 * difference).backward()
    assert found.value.item() == pytest.approx((error + 0.6 * difference).item(), rel=1e-5)
    assert found.parts["preserved"].item() == pytest.approx(difference.item(), rel=1e-5)
    assert torch.allclose(model.adapter.grad.double(), exact.adapter.grad, rtol=1e-4, atol=1e-6)


def test_at_the_start():
    """While the adapter adds nothing, the term and its gradient are exactly zero, and the loss is the inner one's."""
    model, batch = Toy(), clips(1)
    torch.nn.init.zeros_(model.adapter)
    found = []
    for loss in (FlowMatching(), preserving(FlowMatching(), model, weight=1e6)):
        model.zero_grad()
        value = loss(model, batch, draws_of(loss, batch))
        value.value.backward()
        found.append((value, model.adapter.grad.clone()))
    (plain, grad), (kept, kept_grad) = found
    assert kept.parts["preserved"] == 0 and kept.value == plain.value
    assert torch.allclose(grad, kept_grad, rtol=1e-6)


def test_around_preference():
    """Around pairs the term is the mean over both samples of each pair, and both losses' parts are logged."""
    model, batch = Toy(), pairs()
    inner = Preference()
    loss = preserving(inner, model)
    assert loss.core is inner and loss.rows == 4 and loss.base_rows == 4 and loss.networks == ("base",)
    found = loss(model, batch, draws_of(loss, batch))
    inner.attach({"base": model.base})
    plain = inner(model, batch, draws_of(inner, batch))
    assert {"preserved", "margin"} <= found.parts.keys()
    assert found.value.item() == pytest.approx((plain.value + 0.6 * found.parts["preserved"]).item(), rel=1e-6)
    assert torch.equal(found.over_base, plain.over_base)


def network(kind, recompute):
    torch.manual_seed(0)
    size = {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 3, "ffn_dim": 48, "num_layers": 2}
    module = WanTransformer(**size, in_channels=2, out_channels=2, freq_dim=16)
    for parameter in module.parameters():
        parameter.data.add_(torch.randn(parameter.shape) * 0.05)
    adapters.inject(module, AdapterSettings(rank=3, alpha=3, targets="all", dora=kind == "dora"), seed=1)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    module.run_block = ActivationPolicy(recompute, blocks=2)
    return module


@pytest.mark.parametrize(
    ("recompute", "precision"), [("none", "fp32"), ("attention", "fp32"), ("block", "fp32"), ("block", "bf16")]
)
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("what", ["preference", "preserving"])
def test_adapter_off(what, kind, recompute, precision):
    """Switching the adapter off for the base and on again changes no bit of loss and gradients: a second model as the
    base gives the same, also where the backward computes blocks again, and in bf16."""
    batch = pairs() if what == "preference" else clips(1)
    losses = []
    for second in (False, True):
        module = network(kind, recompute)
        other = copy.deepcopy(module) if second else module

        @torch.no_grad()
        def base(*inputs, other=other, **keywords):
            with adapters.switched_off(other):
                return other(*inputs, **keywords)

        inner = Preference(beta=50.0) if what == "preference" else FlowMatching()
        loss = inner if what == "preference" else Preserving(inner, weight=2.0, prompts=list(TEXTS))
        loss.attach({"base": base}, TEXTS)
        draws = draws_of(loss, batch)
        with autocast(precision, torch.device("cpu")):
            found = loss(module, batch, draws)
        found.value.backward()
        graded = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.requires_grad}
        losses.append((found, graded))
    (found, grads), (wanted, wanted_grads) = losses
    assert torch.equal(found.value, wanted.value) and grads.keys() == wanted_grads.keys()
    assert all(torch.equal(grads[name], wanted_grads[name]) for name in grads)
    assert all(grad.abs().max() > 0 for grad in grads.values()), "every part of the adapter learns"


def test_switched_off_keeps_gradients_on():
    """What is trained stays so while the adapter is off, and where an error ends it the adapter is on again."""
    module = network("lora", "none")
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    inputs = torch.randn(1, 2, 3, 4, 6), torch.ones(1), torch.ones(1, 5, 3)
    with torch.no_grad():
        on = module(*inputs)
        with pytest.raises(RuntimeError), adapters.switched_off(module):
            assert {name for name, parameter in module.named_parameters() if parameter.requires_grad} == trained
            assert not torch.equal(module(*inputs), on)
            raise RuntimeError
        assert torch.equal(module(*inputs), on)


def test_prompts_by_position():
    """A sample's class prompt depends on its position alone, and all of them come."""
    loss = Preserving(FlowMatching(), weight=1.0, prompts=list(TEXTS))
    batch = clips(1, size=40)
    chosen = draws_of(loss, batch).more[PROMPT]
    few = batch.take([7, 8])
    assert torch.equal(draws_of(loss, few).more[PROMPT], chosen[7:9]) and len(chosen.unique()) == 3
