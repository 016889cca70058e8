"""The VAE's convolutions in fewer multiplications against torch's plain ones in float64, and where they are used."""

import pytest
import torch
import torch.nn.functional as F

from wantrain.models import vae_convolutions as convolutions
from wantrain.models.vae_layers import CausalConv3d, ChannelNorm, Stream, Upsample


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1]), dtype=dtype)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("height", "width"), [(5, 3), (1, 1)])
def test_causal_is_the_plain_convolution(frames, height, width, dtype, error):
    x, weight, bias = random(2, 6, frames + 2, height, width), random(4, 6, 3, 3, 3) / 13, random(4)
    wanted = F.conv3d(x, weight, bias, padding=(0, 1, 1))
    found = convolutions.causal(x.to(dtype).unbind(2), weight.to(dtype), bias.to(dtype))
    assert found.dtype == dtype and found.shape == wanted.shape
    assert (found.double() - wanted).norm() / wanted.norm() < error


@pytest.mark.parametrize("bias", [True, False])
def test_large_kernels(monkeypatch, bias):
    """A kernel of more elements than one convolution takes is applied in parts."""
    monkeypatch.setattr(convolutions, "MOST", 3 * 6 * 27)
    x, weight, added = random(1, 6, 3, 4, 5), random(7, 6, 3, 3, 3), random(7) if bias else None
    found = convolutions.causal(x.unbind(2), weight, added)
    torch.testing.assert_close(found, F.conv3d(x, weight, added, padding=(0, 1, 1)), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize(("height", "width"), [(5, 3), (1, 2)])
def test_doubled_is_repeated_pixels(height, width, dtype, error):
    x, weight, bias = random(3, 6, height, width), random(4, 6, 3, 3) / 7, random(4)
    wanted = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest-exact"), weight, bias, padding=1)
    found = convolutions.doubled(x.to(dtype), weight.to(dtype), bias.to(dtype))
    assert found.dtype == dtype and found.shape == wanted.shape
    assert (found.double() - wanted).norm() / wanted.norm() < error


@pytest.mark.parametrize("lengths", [(1, 4, 2, 1, 3), (5, 1, 1, 4), (9,)])
def test_history_across_chunks(lengths):
    """Chunks of any length give what the plain layer gives for the whole clip, and the stream ends empty."""
    layer, clip = CausalConv3d(3, 5).double(), random(2, 3, sum(lengths), 4, 6)
    wanted = F.conv3d(F.pad(clip, (1, 1, 1, 1, 2, 0)), layer.weight, layer.bias)
    stream, found = Stream(), []
    with torch.no_grad():
        for number, part in enumerate(clip.split(lengths, dim=2), start=1):
            stream.first, stream.last = number == 1, number == len(lengths)
            found.append(layer(part, stream))
    torch.testing.assert_close(torch.cat(found, dim=2), wanted, atol=1e-12, rtol=0)
    assert not stream._kept


@pytest.mark.parametrize("fits", [True, False])
def test_plain_form_where_it_must_be(fits):
    """Gradients, autocast and who asks for it take the plain form, with the same values."""
    x, layer, calls = random(1, 3, 4, 4, 4, dtype=torch.float32), CausalConv3d(3, 5), []
    with pytest.MonkeyPatch.context() as patch:
        causal = convolutions.causal
        patch.setattr(convolutions, "causal", lambda *given: calls.append(1) or causal(*given))
        with torch.set_grad_enabled(not fits):
            found = layer(x, Stream())
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            layer(x, Stream())
        with torch.no_grad(), convolutions.plain_forms():
            layer(x, Stream())
    assert len(calls) == fits and found.requires_grad == (not fits)
    torch.testing.assert_close(found, F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), layer.weight, layer.bias))


@pytest.mark.parametrize("channels_last", [True, False])
def test_norm_without_gradients(channels_last):
    """The norm and its SiLU in place are those of the training path; only a spent input is overwritten."""
    norm, x = ChannelNorm(6), random(2, 6, 3, 4, 5, dtype=torch.float32)
    norm.gamma.data.uniform_(0.5, 2)
    x[0, :, 0, 0, 0] = 0
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    wanted, before = norm.activated(x).detach(), x.clone()
    with torch.no_grad():
        torch.testing.assert_close(norm.activated(x), wanted)
        torch.testing.assert_close(F.silu(norm(x)), wanted)
        assert torch.equal(x, before)
        assert norm.activated(x, spent=True).data_ptr() == x.data_ptr()


def test_upsample_in_both_forms():
    """With and without gradients an upsampling gives the same frames, in chunks too."""
    up, clip = Upsample(4, 2, temporal=True).double(), random(1, 4, 5, 3, 2)
    results = []
    for grad in (True, False):
        stream = Stream()
        with torch.set_grad_enabled(grad):
            results.append(torch.cat([up(part, stream) for part in stream.chunks(clip, 2)], dim=2))
    torch.testing.assert_close(*results, atol=1e-12, rtol=0)
