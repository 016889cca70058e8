"""Weights in bfloat16 that lose no update, and updates inside the backward pass."""

import functools
import re

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from wantrain import checks, config
from wantrain.models import WanTransformer
from wantrain.models.activation_policy import ActivationPolicy
from wantrain.models.facts import is_fp32
from wantrain.models.formats.loading import cast_as_loaded
from wantrain.training.engine.ema import Ema
from wantrain.training.engine.engine import StepOptions, Stepper
from wantrain.training.engine.optim import MuonAdamW, adamw_8bit, build_optimizer
from wantrain.training.engine.parameterwise import COMPENSATION, round_stochastically
from wantrain.training.engine.updates import UpdateOptions

SIZE = {"num_attention_heads": 2, "attention_head_dim": 32, "text_dim": 64, "ffn_dim": 128, "num_layers": 2}
MAKERS = {
    "adamw": functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.01, fused=True),
    "adamw_8bit": functools.partial(adamw_8bit, lr=1e-3),
    "adafactor": functools.partial(torch.optim.Adafactor, lr=1e-2, weight_decay=0.01),
    "muon": functools.partial(MuonAdamW, lr=1e-3, muon_lr=1e-2),
    "sgd": functools.partial(torch.optim.SGD, lr=1e-2),
}
#: Of those that are alike in this, one is enough.
FEW = ("adamw", "adamw_8bit", "adafactor")
BF16 = [UpdateOptions("bf16", rounding) for rounding in ("stochastic", "kahan")]


@pytest.fixture(autouse=True)
def uncompiled():
    """torchao's optimizers do the same arithmetic without a compiler, which takes minutes."""
    with torch.compiler.set_stance("force_eager"):
        yield


def build(options, make=MAKERS["adamw"], *, clip=None, clip_by="whole", recompute="none", precision="bf16"):
    """A transformer under a Stepper, as a run trains it."""
    torch.manual_seed(0)
    model = WanTransformer(**SIZE)
    nn.init.normal_(model.head.head.weight, std=0.2)
    model.run_block = ActivationPolicy(recompute, blocks=SIZE["num_layers"])
    cast_as_loaded(model, torch.bfloat16 if options.dtype == "bf16" else torch.float32)
    optimizer = options.applied(build_optimizer(make, model), model, seed=5)
    how = StepOptions(1, clip, precision, clip_by=clip_by, in_backward=options.in_backward)
    return Stepper(Accelerator(cpu=True), model, optimizer, how)


def loss_of(stepper, number):
    """A loss on the samples of a step."""
    generator = torch.Generator().manual_seed(number)
    latents = torch.randn(1, 16, 2, 4, 4, generator=generator)
    text = torch.randn(1, 3, SIZE["text_dim"], generator=generator)
    with stepper.forward_context():
        return (stepper.wrapped(latents, torch.tensor([500.0]), text).float() - latents).square().mean()


def train(stepper, numbers):
    """Whole steps; the norm of the last gradient."""
    norm = torch.tensor(0.0)
    for number in numbers:
        stepper.begin(1.0 - 0.05 * number, number)
        stepper.backward(loss_of(stepper, number), last=True)
        norm = stepper.clip_gradients()
        stepper.step(update=bool(norm.isfinite()))
    return norm


def same_weights(one, other):
    """The names of parameters that differ between two steppers."""
    others = dict(other.module.named_parameters())
    return [name for name, parameter in one.module.named_parameters() if not torch.equal(parameter, others[name])]


def test_stochastic_rounding():
    """Each value becomes one of its two neighbours, the mean is the value, and what bf16 has stays."""
    values = torch.tensor([1.0, 1.0 + 2**-9, -3.0 - 2**-8, 0.1, 1e-30, 0.0]).repeat(20_000, 1)
    rounded = torch.empty_like(values, dtype=torch.bfloat16)
    round_stochastically(values, rounded, seed=1)
    again, other = torch.empty_like(rounded), torch.empty_like(rounded)
    round_stochastically(values, again, seed=1)
    round_stochastically(values, other, seed=2)
    assert torch.equal(rounded, again) and not torch.equal(rounded, other)
    up = torch.nextafter(values.bfloat16(), torch.tensor(torch.inf, dtype=torch.bfloat16)).float()
    step = (up - values.bfloat16().float()).abs()
    assert ((rounded.float() - values).abs() < step).all()
    assert ((rounded.float().mean(0) - values[0]).abs() <= 4 * step[0] * 0.5 / 20_000**0.5).all(), "4 standard errors"
    exact = torch.tensor([1.0, -0.0, torch.inf, -torch.inf, 3.3895e38])
    kept = torch.empty(5, dtype=torch.bfloat16)
    round_stochastically(exact.bfloat16().float(), kept, seed=3)
    assert torch.equal(kept, exact.bfloat16())
    nan = torch.empty(64, dtype=torch.bfloat16)
    bits = torch.full((64,), 0x7FFFFFFF, dtype=torch.int32)
    round_stochastically(bits.view(torch.float32), nan, seed=4)
    assert nan.isnan().all()


@pytest.mark.parametrize("kind", FEW)
def test_bf16_weights_follow_fp32(kind):
    """Six steps move bf16 weights as they move float32 ones; the model's float32 parts stay float32."""
    full = build(UpdateOptions(), MAKERS[kind])
    start = {name: parameter.detach().bfloat16().float() for name, parameter in full.module.named_parameters()}
    train(full, range(6))
    wanted = dict(full.module.named_parameters())
    for options in BF16:
        stepper = build(options, MAKERS[kind])
        train(stepper, range(6))
        off = moved = 0.0
        for name, parameter in stepper.module.named_parameters():
            assert (parameter.dtype == torch.float32) == is_fp32(stepper.module, name), name
            value = parameter.float()
            if options.rounding == "kahan" and parameter.dtype == torch.bfloat16:
                value = value + stepper.optimizer.state[parameter][COMPENSATION]
            off += (value - wanted[name]).square().sum().item()
            moved += (wanted[name] - start[name]).square().sum().item()
        assert (off / moved) ** 0.5 < {"stochastic": 0.3, "kahan": 0.15}[options.rounding]


def test_small_updates_count():
    """Updates of a hundredth of bf16's spacing add up under both ways, and would not under rounding to the nearest."""
    for options in BF16:
        layer = nn.Linear(64, 64, bias=False)
        layer.weight.data.fill_(1.0)
        layer.to(torch.bfloat16)
        make = functools.partial(torch.optim.SGD, lr=2**-7 / 100)
        optimizer = options.applied(build_optimizer(make, layer), layer, seed=0)
        for number in range(200):
            optimizer.number = number
            layer.weight.grad = -torch.ones_like(layer.weight)
            optimizer.step()
        assert layer.weight.float().mean().item() == pytest.approx(1 + 2 * 2**-7, rel=1e-3), options.rounding
    nearest = torch.ones(4, dtype=torch.bfloat16)
    for _ in range(200):
        nearest += 2**-7 / 100
    assert (nearest == 1).all()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_updates_in_backward(dtype, make):
    """Updates in the backward pass give the bits of updates after it, gradient norm included, and free gradients."""
    for recompute, clip in (("none", None), ("attention", 1e-3)):
        how = {"clip": clip, "clip_by": "parameter", "recompute": recompute}
        after = build(UpdateOptions(dtype), make, **how)
        within = build(UpdateOptions(dtype, in_backward=True), make, **how)
        norms = [train(stepper, range(2)) for stepper in (after, within)]
        assert torch.equal(*norms) and norms[0] > 1e-3
        assert not same_weights(after, within)
        within.backward(loss_of(within, 3), last=True)
        assert all(parameter.grad is None for parameter in within.module.parameters())


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(
    "options", [*BF16, UpdateOptions("bf16", in_backward=True), UpdateOptions(in_backward=True)], ids=str
)
def test_resume_is_exact(options, make):
    """Weights and optimizer state as a checkpoint has them continue to the bits of the unbroken run."""
    straight, broken, resumed = (build(options, make) for _ in range(3))
    train(straight, range(3))
    train(broken, range(2))
    state = {key: tensor.clone() for key, tensor in broken.optimizer_state().items()}
    assert all(type(tensor) is torch.Tensor for tensor in state.values()), "what safetensors can write"
    resumed.module.load_state_dict(broken.module.state_dict())
    resumed.restore_optimizer_state(state, "the first half")
    assert not same_weights(resumed, broken)
    train(resumed, [2])
    assert not same_weights(straight, resumed)
    found, wanted = resumed.optimizer_state(), straight.optimizer_state()
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    if options.rounding == "kahan" and options.dtype == "bf16":
        assert {tensor.dtype for key, tensor in wanted.items() if key.endswith(COMPENSATION)} == {torch.bfloat16}
    moments = [tensor for key, tensor in wanted.items() if key.endswith(("exp_avg", "exp_avg_sq", "row_var"))]
    assert all(tensor.dtype == torch.float32 for tensor in moments)


def test_other_state_refused():
    """State without Kahan's compensation is refused where it is needed."""
    state = train_and_save(UpdateOptions("bf16"))
    with pytest.raises(ValueError, match=r"the run before holds .*exp_avg_sq.* keeps compensation, exp_avg"):
        build(UpdateOptions("bf16", "kahan")).restore_optimizer_state(state, "the run before")


def train_and_save(options):
    stepper = build(options)
    train(stepper, range(1))
    return stepper.optimizer_state()


def test_loss_that_is_no_number():
    """With updates in the backward a loss that is no number moves nothing and leaves no gradient."""
    stepper, still = (build(UpdateOptions("bf16", in_backward=True)) for _ in range(2))
    stepper.begin(1.0, 0)
    stepper.backward(loss_of(stepper, 0) * torch.nan, last=True)
    assert stepper.clip_gradients().isnan()
    stepper.step(update=False)
    assert not same_weights(stepper, still) and not stepper.optimizer.state
    assert all(parameter.grad is None for parameter in stepper.module.parameters())
    assert train(stepper, [1]).isfinite() and same_weights(stepper, still)


def test_gradient_that_is_no_number():
    """With updates in the backward an infinite gradient counts as zero: the norm says so, weights stay finite."""
    stepper = build(UpdateOptions(in_backward=True), clip=1.0, clip_by="parameter")
    before = stepper.module.patch_embedding.bias.detach().clone()
    stepper.module.patch_embedding.bias.register_hook(lambda grad: grad * torch.inf)
    assert not train(stepper, [0]).isfinite()
    assert all(parameter.isfinite().all() for parameter in stepper.module.parameters())
    assert torch.equal(stepper.module.patch_embedding.bias, before)
    state = stepper.optimizer.state[stepper.module.patch_embedding.bias]
    assert not state["exp_avg"].any() and not state["exp_avg_sq"].any()


@pytest.mark.parametrize("options", [UpdateOptions(), UpdateOptions("bf16", in_backward=True)], ids=str)
def test_rehearsal(options):
    """A rehearsed step moves nothing and leaves neither gradients nor optimizer state."""
    stepper, still = (build(options) for _ in range(2))
    stepper.rehearse(loss_of(stepper, 0))
    assert all(parameter.grad is None for parameter in stepper.module.parameters())
    assert not same_weights(stepper, still) and not stepper.optimizer.state
    train(stepper, [0])
    assert same_weights(stepper, still)


def test_early_state_refused():
    """An optimizer that makes its state in bf16 before its first step is refused."""
    with pytest.raises(ValueError, match="Adagrad makes its state before its first step"):
        build(UpdateOptions("bf16"), functools.partial(torch.optim.Adagrad, lr=1e-3))
    train(build(UpdateOptions(in_backward=True), functools.partial(torch.optim.Adagrad, lr=1e-3)), [0])


@pytest.mark.parametrize("options", [UpdateOptions(), *BF16], ids=str)
def test_average(options):
    """The average of the weights is float32, is computed with in float32, and comes out as it was."""
    stepper = build(options)
    ema = Ema(stepper, 0.9999)
    wanted = {name: value.clone() for name, value in ema.average.items()}
    for number in range(3):
        train(stepper, [number])
        ema.follow(10**6)
        for name, parameter in stepper.module.named_parameters():
            wanted[name] = wanted[name].lerp(parameter.detach().float(), 1 - 0.9999)
    live = {name: parameter.detach().clone() for name, parameter in stepper.module.named_parameters()}
    with ema.applied():
        for name, parameter in stepper.module.named_parameters():
            assert parameter.dtype == torch.float32 and torch.equal(parameter, wanted[name]), name
        with ema.applied():
            assert all(torch.equal(parameter, live[name]) for name, parameter in stepper.module.named_parameters())
    assert all(torch.equal(ema.average[name], value) for name, value in wanted.items())
    assert all(torch.equal(parameter, live[name]) for name, parameter in stepper.module.named_parameters())
    assert {p.dtype for p in live.values()} == {p.dtype for p in stepper.module.parameters()}


WITHIN = ("update_in_backward=true", "clip=null")
REFUSED = [
    (("trained.dtype=bf16", "precision=fp32"), "trained.dtype=bf16: precision=fp32 computes with float32 weights"),
    (("update_in_backward=true",), "update_in_backward=true: the norm of the whole gradient, which clip=1 limits"),
    ((*WITHIN, "batch_size=16", "accumulate=4"), "each of the 4 backward passes of a step would update; give batch_size=4,"),
    ((*WITHIN, "optimizer=other", "optimizer._target_=torch.optim.LBFGS"), "whether torch.optim.LBFGS can do so"),
    (("trained.dtype=bf16", "adapter=lora"), "trained.dtype has no effect: adapter=lora trains the adapter alone"),
    (("trained.rounding=kahan",), "trained.rounding has no effect: trained.dtype=fp32 rounds no weights"),
    (("clip=null", "clip_by=parameter"), "clip_by has no effect: clip=null clips nothing"),
    (("recipe=wan_tiny_vae", "trained.dtype=bf16"), "trained.dtype has no effect: expert=vae trains in float32"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "words"), REFUSED, ids=lambda value: value if isinstance(value, str) else None)
def test_refused(given, words):
    """What would silence a setting, or go wrong with it, is refused with the fix."""
    keys = {word.partition("=")[0] for word in given}
    with pytest.raises(ValueError, match=re.escape(words)):
        checks.check(config.compose("train", [*given, "data.shards=nowhere"]), given=keys)


def test_allowed():
    """The settings of a full fine-tune on one card go together."""
    given = ["precision=bf16", "trained.dtype=bf16", "update_in_backward=true", "clip_by=parameter"]
    for more in (["optimizer=adamw_8bit"], ["optimizer=adafactor", "ema=0.999"], ["expert=both", "batch_size=1"]):
        checks.check(config.compose("train", [*given, *more]))
