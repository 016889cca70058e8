"""Clips of several sizes as one sequence, beside each size alone: velocities and every gradient."""

import pytest
import torch

from wantrain.models import WanTransformer, adapters
from wantrain.models.activation_policy import ActivationPolicy
from wantrain.models.attention import Kernel, math, sdpa, set_kernel
from wantrain.models.fused import (
    gated_residual,
    modulated_norm,
    plain_gated_residual,
    plain_modulated_norm,
)
from wantrain.models.offload import ModuleOffloader, blocks_to_swap
from wantrain.models.packing import Packing

SIZE = {
    "num_attention_heads": 3,
    "attention_head_dim": 10,
    "text_dim": 12,
    "text_length": 16,
    "freq_dim": 8,
    "ffn_dim": 40,
    "num_layers": 3,
}
#: (clips, latent frames, rows, columns, rows of text) of each group: images ride along, sizes share no divisor.
GROUPS = [(2, 3, 6, 10, 7), (1, 5, 4, 14, 16), (3, 1, 2, 6, 1)]


def model(**more):
    torch.manual_seed(0)
    made = WanTransformer(**(SIZE | more))
    for parameter in made.parameters():
        if parameter.ndim < 2 or not parameter.abs().sum():
            torch.nn.init.normal_(parameter, std=0.2)
    return made.train()


def inputs(per_frame, channels=0):
    torch.manual_seed(1)
    latents = tuple(torch.randn(clips, 16, *size) for clips, *size, _ in GROUPS)
    timesteps = tuple(1000 * torch.rand(clips, *[size[0]] * per_frame) for clips, *size, _ in GROUPS)
    texts = tuple(torch.randn(clips, rows, 12) for clips, *_, rows in GROUPS)
    concats = tuple(torch.randn(clips, channels, *size) for clips, *size, _ in GROUPS) if channels else None
    return latents, timesteps, texts, concats


def both(module, given, autocast=False):
    """Velocities, and gradients of latents, texts and parameters: packed, and group by group."""
    results = []
    for packed in (True, False):
        latents, timesteps, texts, concats = given
        latents, texts = (tuple(x.clone().requires_grad_() for x in each) for each in (latents, texts))
        more = {} if concats is None else {"concat_BCTHW": concats}
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if packed:
                velocities = module(latents, timesteps, texts, **more)
            else:
                each = zip(latents, timesteps, texts, concats or [None] * len(latents), strict=True)
                velocities = tuple(module(x, t, text, concat_BCTHW=concat) for x, t, text, concat in each)
        torch.manual_seed(2)
        slopes = [torch.randn(x.shape) for x in velocities]
        sum((slope * velocity).sum() for slope, velocity in zip(slopes, velocities, strict=True)).backward()
        grads = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
        grads |= {f"{kind} {n}": x.grad for kind, xs in (("x", latents), ("text", texts)) for n, x in enumerate(xs)}
        module.zero_grad()
        results.append((velocities, grads))
    return results


def check(results, tolerance=1e-5):
    (velocities, grads), (others, wanted) = results
    for ours, theirs in zip(velocities, others, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()
    assert grads.keys() == wanted.keys()
    for name, theirs in wanted.items():
        assert (theirs is None) == (grads[name] is None), name
        if theirs is not None:
            # A bias of k moves all logits alike: its gradient is zero but for rounding.
            assert (grads[name] - theirs).norm() <= tolerance * theirs.norm() + 2e-5, name


@pytest.mark.parametrize("kernel", [sdpa, math])
@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("recompute", ["none", "attention", "block", 1])
def test_packed_as_alone(per_frame, recompute, kernel):
    """All weights: velocities and gradients of parameters, latents and texts within 1e-5, under each recomputation."""
    if kernel is math and recompute == "attention":
        pytest.skip("attention=math keeps no output")
    module = model()
    set_kernel(module, Kernel("any", kernel))
    module.run_block = ActivationPolicy(recompute, blocks=SIZE["num_layers"])
    check(both(module, inputs(per_frame)))


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("per_frame", [False, True])
def test_lora(per_frame, recompute):
    """A LoRA: its gradients, from inputs that are kept in parts; and a block that ends before its feed-forward."""
    module = model(in_channels=36)
    adapters.inject(module, adapters.AdapterSettings(rank=4, alpha=8, targets="attention+ffn"), seed=0)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    module.run_block = ActivationPolicy(recompute, blocks=SIZE["num_layers"])
    check(both(module, inputs(per_frame, channels=20)))


@pytest.mark.parametrize("kind", [{"dora": True}, {"lokr": adapters.KroneckerSettings(), "alpha": 4}], ids=str)
def test_other_adapters(kind):
    """A DoRA and a LoKr, whose layers are called as they are."""
    module = model()
    settings = adapters.AdapterSettings(**({"rank": 4, "alpha": 8, "targets": "attention+ffn"} | kind))
    adapters.inject(module, settings, seed=0)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    module.run_block = ActivationPolicy("block", blocks=SIZE["num_layers"])
    check(both(module, inputs(True)))


def test_swapped():
    """Blocks whose frozen weights wait on the host."""
    module = model()
    adapters.inject(module, adapters.AdapterSettings(rank=4, alpha=8, targets="attention+ffn"), seed=0)
    module.run_block = ActivationPolicy("block", blocks=SIZE["num_layers"])
    assert ModuleOffloader(torch.device("cpu")).add(module, whole=False, blocks=blocks_to_swap(module, 3))
    check(both(module, inputs(False)))


def test_autocast():
    """In bfloat16 both sides differ by rounding: of the velocity and of the whole gradient less than 2 %."""
    (velocities, grads), (others, wanted) = both(model(), inputs(False), autocast=True)
    for ours, theirs in zip(velocities, others, strict=True):
        assert (ours - theirs).norm() <= 2e-2 * theirs.norm()
    mine, other = (torch.cat([found[name].flatten() for name in wanted]) for found in (grads, wanted))
    assert (mine - other).norm() <= 2e-2 * other.norm()


def test_one_group():
    """A pack of one clip is that clip."""
    given = tuple(None if each is None else each[1:2] for each in inputs(False))
    check(both(model(), given))


def test_no_clip_sees_another():
    """Another clip beside it changes nothing of a clip's velocity."""
    module, (latents, timesteps, texts, _) = model(), inputs(False)
    with torch.no_grad():
        whole = module(latents, timesteps, texts)
        other = module((latents[0], 9 * latents[1], latents[2]), timesteps, texts)
    for number in (0, 2):
        torch.testing.assert_close(whole[number], other[number], rtol=0, atol=0)
    assert not torch.equal(whole[1], other[1])


def test_packing_of():
    """Groups and rows of modulation, by hand."""
    found = Packing.of([(3, 2, 5), (1, 2, 2)], [torch.zeros(2, 3), torch.zeros(4)])
    assert found == Packing(groups=((2, 30), (4, 4)), rows=(10,) * 6 + (4,) * 4)


def test_plain_operations():
    """The functions of a block with rows of different lengths, beside their plain operations in float64."""
    torch.manual_seed(0)
    lengths = (5, 1, 12)
    x, y = torch.randn(1, 1, 18, 7, requires_grad=True), torch.randn(1, 18, 7, requires_grad=True)
    gain, shift = (torch.randn(1, 3, 7, requires_grad=True) for _ in range(2))

    def compute(norm, residual, x, y, gain, shift):
        return residual(x, norm(x, gain, shift).flatten(1, 2) + y, gain)

    def norm(x, gain, shift):
        return modulated_norm(x, gain, shift, 1e-6, torch.float32, lengths)[1].view_as(x)

    def plain(x, gain, shift):
        return plain_modulated_norm(x, gain, shift, 1e-6, torch.float64, lengths)

    exact = [each.detach().double().requires_grad_() for each in (x, y, gain, shift)]
    ours = compute(norm, lambda *given: gated_residual(*given, lengths), x, y, gain, shift)
    theirs = compute(plain, lambda *given: plain_gated_residual(*given, lengths), *exact)
    slope = torch.randn(ours.shape)
    ours.backward(slope)
    theirs.backward(slope.double())
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    for own, other in zip((x, y, gain, shift), exact, strict=True):
        torch.testing.assert_close(own.grad.double(), other.grad, rtol=1e-5, atol=1e-5)
