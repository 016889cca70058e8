"""WanTransformer against diffusers' WanTransformer3DModel on scrambled random weights, and its own properties."""

import pytest
import torch
from diffusers import WanTransformer3DModel

from wantrain.models import WanTransformer, load_transformer
from wantrain.models.activation_policy import ActivationPolicy
from wantrain.models.attention import sdpa
from wantrain.models.formats.weights import renamed_to_diffusers, write_part
from wantrain.models.positions import rope_angles, sinusoid
from wantrain.models.transformer import Attention

SHAPE = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 24,
    "freq_dim": 256,
    "ffn_dim": 96,
    "num_layers": 3,
    "eps": 1e-6,
}


def scrambled(**changes):
    """A model none of whose weights sit at their default, so that no error hides behind a zero or a one."""
    torch.manual_seed(0)
    model = WanTransformer(**{**SHAPE, **changes})
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else parameter.numel()
            noise = torch.randn_like(parameter) / fan_in**0.5
            parameter.copy_(1 + 0.3 * noise * fan_in**0.5 if "norm" in name and "weight" in name else noise)
            if name.endswith("bias"):
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return model


def reference(model):
    peer = WanTransformer3DModel(
        patch_size=(1, 2, 2), cross_attn_norm=True, qk_norm="rms_norm_across_heads", **model_shape(model)
    )
    peer.load_state_dict(renamed_to_diffusers(model.state_dict()))
    return peer


def model_shape(model):
    return {key: model.config()[key] for key in SHAPE}


def inputs(batch, frames, height, width, channels=16, text_dim=24, rows=(7, 12)):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, channels, frames, height, width, generator=generator)
    text = torch.zeros(batch, 512, text_dim)
    for sample, length in zip(range(batch), rows, strict=False):
        text[sample, :length] = torch.randn(length, text_dim, generator=generator)
    return latents, text


GEOMETRIES = [(1, 1, 2, 6), (2, 3, 8, 12), (1, 5, 6, 10), (2, 2, 14, 4)]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("timesteps", [(0.0, 1.0), (250.0, 731.0)], ids=str)
def test_outputs_gradients_match_diffusers(geometry, timesteps):
    model = scrambled()
    peer = reference(model)
    latents, text = inputs(*geometry)
    timestep = torch.tensor(timesteps[: geometry[0]])
    target = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))

    ours = model(latents, timestep, text)
    theirs = peer(latents, timestep, text, return_dict=False)[0]
    assert theirs.square().mean().sqrt() > 0.1
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)

    (ours - target).square().mean().backward()
    (theirs - target).square().mean().backward()
    named = renamed_to_diffusers({name: p.grad for name, p in model.named_parameters()})
    expected = dict(peer.named_parameters())
    # A key bias barely moves a softmax: its gradient is rounding. Such tensors are held against the typical one.
    typical = torch.stack([p.grad.norm() for p in expected.values()]).median()
    for name, parameter in expected.items():
        assert named[name] is not None, name
        error = (named[name] - parameter.grad).norm() / parameter.grad.norm().clamp_min(0.3 * typical)
        assert error < 1e-4, (name, error)


@pytest.mark.parametrize("timestep", [875.0, 999.0, 999.9166])
def test_late_timesteps_match_diffusers(timestep):
    """At late timesteps outputs agree with diffusers up to the rounding of its float32 angles."""
    model = scrambled()
    latents, text = inputs(2, 3, 8, 12)
    levels = torch.tensor([timestep, timestep])
    with torch.no_grad():
        ours = model(latents, levels, text)
        theirs = reference(model)(latents, levels, text, return_dict=False)[0]
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)
    assert (ours - theirs).norm() / theirs.norm() < 5e-5


@pytest.mark.parametrize("channels", [36, 48])
def test_other_channels_match_diffusers(channels):
    """The shapes of I2V-A14B (36 channels in) and TI2V-5B (48), the latter with a timestep per latent frame."""
    out = 48 if channels == 48 else 16
    model = scrambled(in_channels=channels, out_channels=out)
    latents, text = inputs(2, 3, 8, 12, channels=channels)
    if channels == 48:
        timestep = torch.tensor([[0.0, 731.0, 731.0], [0.0, 250.0, 250.0]])
        per_token = timestep.repeat_interleave(4 * 6, dim=1)
    else:
        timestep = per_token = torch.tensor([731.0, 250.0])
    with torch.no_grad():
        theirs = reference(model)(latents, per_token, text, return_dict=False)[0]
        ours = model(latents, timestep, text)
        split = model(latents[:, :16], timestep, text, concat_BCTHW=latents[:, 16:])
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)
    assert torch.equal(ours, split)


def test_scalar_and_per_frame_timestep():
    """One timestep for all frames equals the same timestep given per frame."""
    model = scrambled()
    latents, text = inputs(2, 3, 8, 12)
    with torch.no_grad():
        scalar = model(latents, torch.tensor([731.0, 250.0]), text)
        frames = model(latents, torch.tensor([[731.0] * 3, [250.0] * 3]), text)
    torch.testing.assert_close(scalar, frames, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows", [12, 13, 511])
def test_short_text_equals_padded(rows):
    """A short text gives the outputs and gradients of its 512 padded rows."""
    model = scrambled()
    latents, text = inputs(2, 2, 4, 6)
    results = []
    for given in (text, text[:, :rows]):
        model.zero_grad()
        out = model(latents, torch.tensor([500.0, 3.0]), given)
        out.square().mean().backward()
        results.append([out, *(parameter.grad.clone() for parameter in model.parameters())])
    for padded, short in zip(*results, strict=True):
        assert (padded - short).norm() <= 1e-4 * padded.norm().clamp_min(1e-3)


def test_text_padding_and_limit():
    """The rows of padding change the output, and a text over 512 rows is refused."""
    model = scrambled()
    latents, text = inputs(1, 1, 4, 4)
    level = torch.tensor([500.0])
    with torch.no_grad():
        peer = reference(model)
        shorter = peer(latents, level, text[:, :226], return_dict=False)[0]
        assert (shorter - model(latents, level, text)).abs().max() > 1e-4
    with pytest.raises(ValueError, match=r"600 tokens, more than the model's 512"):
        model(latents, level, torch.zeros(1, 600, 24))


def test_self_attention_of_two_tensors():
    """Hooks, as DeepSpeed's, may pass one tensor as two: keys are turned all the same, and positions matter."""
    torch.manual_seed(0)
    attention = Attention(24, 2, 1e-6, sdpa)
    x_BLD, angles = torch.randn(1, 6, 24), rope_angles((1, 2, 3), 12, torch.device("cpu"))
    rope = (angles.cos().float(), angles.sin().float())
    together = attention(x_BLD, x_BLD, rope)
    torch.testing.assert_close(attention(x_BLD, x_BLD.clone(), rope), together, atol=1e-6, rtol=0)
    assert (attention(x_BLD, x_BLD) - together).abs().max() > 1e-4


def test_timestep_vector_and_rotary_angles():
    """The timestep vector and the rotary angles equal their golden values."""
    vector = sinusoid(torch.tensor([500.0]), 256)[0]
    golden = [-0.883849273, 0.94594258, 0.848514544, 0.69868809]
    torch.testing.assert_close(vector[:4], torch.tensor(golden), atol=1e-7, rtol=0)
    golden = [-0.467771805, 0.324334142, -0.52917206, 0.715426413]
    torch.testing.assert_close(vector[128:132], torch.tensor(golden), atol=1e-7, rtol=0)
    assert vector[127].item() == pytest.approx(0.99855687) and vector[255].item() == pytest.approx(0.053704542)
    angles = rope_angles((6, 6, 6), 128, torch.device("cpu")).view(6, 6, 6, 64)[5, 5, 5]
    wrapped = torch.atan2(angles.sin(), angles.cos())
    time, row, column = wrapped.split([22, 21, 21])
    for axis, places, expected in (
        (time, [0, 1, 21], [-1.283185307, -2.993519184, 0.000759956]),
        (row, [0, 1, 20], [-1.283185307, -3.058451922, 0.000775258]),
        (column, [0, 1, 20], [-1.283185307, -3.058451922, 0.000775258]),
    ):
        torch.testing.assert_close(axis[places], torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("frozen_base", [False, True])
def test_recompute_exact(frozen_base):
    model = scrambled()
    if frozen_base:
        model.requires_grad_(False)
        model.blocks[1].ffn.requires_grad_(True)
    latents, text = inputs(2, 3, 8, 12)
    gradients = []
    for recompute in ("none", "block", "attention", 1):
        model.zero_grad()
        model.run_block = ActivationPolicy(recompute, blocks=len(model.blocks))
        model(latents, torch.tensor([900.0, 3.0]), text).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 0
    for each in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], each, strict=True))


def test_bf16_float32_parts():
    """Timestep, modulation, residual stream and head stay float32 under autocast; linear layers see bf16."""
    model = scrambled(num_layers=12)
    latents, text = inputs(2, 3, 8, 12)
    timestep = torch.tensor([998.7, 3.3])
    seen = {}
    block = model.blocks[1]
    block.register_forward_pre_hook(lambda _, args: seen.update(residual=args[0].dtype, time=args[1].dtype))
    block.self_attn.q.register_forward_hook(lambda _, args, out: seen.update(linear=out.dtype))
    model.head.register_forward_hook(lambda _, args, out: seen.update(head=out.dtype))
    model.time_embedding[0].register_forward_pre_hook(lambda _, args: seen.update(vector=args[0]))
    with torch.no_grad():
        exact = model(latents, timestep, text)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = model(latents, timestep, text)
    assert seen["residual"] == seen["time"] == seen["head"] == mixed.dtype == torch.float32
    assert seen["linear"] == torch.bfloat16
    assert torch.equal(seen["vector"], sinusoid(timestep[:, None], 256))
    assert (mixed - exact).norm() / exact.norm() < 0.006


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_diffusers_folder(tmp_path, dtype):
    model = scrambled()
    reference(model).save_pretrained(tmp_path / "pipeline" / "transformer_2", max_shard_size="100KB")
    latents, text = inputs(1, 2, 4, 4)
    for path, part in (
        (tmp_path / "pipeline", "transformer_2"),
        (tmp_path / "pipeline" / "transformer_2", "x"),
    ):
        loaded = load_transformer(path, dtype=dtype, part=part)
        assert loaded.blocks[0].ffn[0].weight.dtype == dtype
        assert loaded.blocks[0].modulation.dtype == loaded.head.head.weight.dtype == torch.float32
        with torch.no_grad():
            difference = loaded(latents, torch.tensor([7.0]), text) - model(latents, torch.tensor([7.0]), text)
        assert difference.abs().max() <= (0 if dtype == torch.float32 else 0.1)


def test_diffusers_loads_our_folder(tmp_path):
    model = scrambled()
    write_part(tmp_path, model.config(), renamed_to_diffusers(model.state_dict()))
    peer = WanTransformer3DModel.from_pretrained(tmp_path)
    latents, text = inputs(1, 2, 4, 4)
    with torch.no_grad():
        ours = model(latents, torch.tensor([7.0]), text)
        torch.testing.assert_close(
            ours, peer(latents, torch.tensor([7.0]), text, return_dict=False)[0], atol=2e-5, rtol=0
        )


def test_load_mismatch(tmp_path):
    """Weights that do not fit give one error with the missing, unexpected and misshapen tensors."""
    model = scrambled()
    tensors = renamed_to_diffusers(model.state_dict())
    tensors["extra.weight"] = torch.zeros(1)
    tensors["proj_out.bias"] = torch.zeros(3)
    del tensors["scale_shift_table"]
    write_part(tmp_path, model.config(), tensors)
    with pytest.raises(
        ValueError, match=r"1 missing \(head.modulation\).*1 unexpected \(extra.weight\).*head.head.bias"
    ):
        load_transformer(tmp_path)
    with pytest.raises(ValueError, match=r"neither config.json nor transformer/config.json"):
        load_transformer(tmp_path.parent)
    write_part(tmp_path, {**model.config(), "image_dim": 1280}, tensors)
    with pytest.raises(ValueError, match=r"image_dim=1280 is not supported"):
        load_transformer(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"channels": 20}, "takes 16 input channels, got 20"),
        ({"height": 7}, "must be even"),
        ({"timestep": torch.zeros(2, 5)}, r"expected \(1,\) or \(1, 2\)"),
        ({"timestep": torch.zeros(1, dtype=torch.bfloat16)}, "rounds 998.7 to 1000"),
    ],
)
def test_bad_input(change, words):
    shape = {"channels": 16, "height": 4, "timestep": torch.zeros(1), **change}
    latents = torch.zeros(1, shape["channels"], 2, shape["height"], 4)
    with pytest.raises(ValueError, match=words):
        scrambled()(latents, shape["timestep"], torch.zeros(1, 3, 24))
