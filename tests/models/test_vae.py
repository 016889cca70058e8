"""WanVAE against diffusers' AutoencoderKLWan on scrambled random weights, and its own properties."""

import re

import pytest
import torch
from diffusers import AutoencoderKLWan

from wantrain.models.vae import Stream, WanVAE, load_vae, measure_latents
from wantrain.models.weights import write_part

SHAPE = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}


def scrambled(dtype=torch.float32, **changes):
    """A VAE none of whose weights sit at their default, so that no error hides behind a zero or a one."""
    torch.manual_seed(0)
    vae = WanVAE(**{**SHAPE, **changes})
    for name, parameter in vae.named_parameters():
        noise = torch.randn_like(parameter)
        if name.endswith("gamma"):
            value = 1 + 0.3 * noise
        elif name.endswith("bias"):
            value = 0.2 * noise
        else:
            value = noise / parameter[0].numel() ** 0.5
        parameter.data.copy_(value)
    return vae.eval().requires_grad_(False).to(dtype)


def clip(frames, height=24, width=40, batch=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(frames)
    return torch.rand(batch, 3, frames, height, width, generator=generator, dtype=dtype) * 2 - 1


def peer_normalised(peer, vae, latents):
    mean = torch.tensor(vae.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.latents_std).view(1, -1, 1, 1, 1)
    return (latents - mean) / std


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small only wait for a second thread: ten times as long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def vae():
    return scrambled()


@pytest.fixture(scope="module")
def double():
    return scrambled(torch.float64)


@pytest.fixture(scope="module")
def peer(vae):
    peer = AutoencoderKLWan(**SHAPE).eval().requires_grad_(False)
    peer.load_state_dict(vae.state_dict())
    return peer


@pytest.mark.parametrize("frames", [1, 5, 9, 13])
@pytest.mark.parametrize("chunk", [1, None])
def test_encode_agrees_with_diffusers(vae, peer, frames, chunk):
    pixels = clip(frames)
    theirs = peer_normalised(peer, vae, peer.encode(pixels).latent_dist.mode())
    ours = vae.encode(pixels, chunk=chunk)
    assert ours.shape == (1, 16, 1 + (frames - 1) // 4, 3, 5)
    assert theirs.std() > 0.05
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_log_variance_agrees_with_diffusers(vae, peer):
    torch.testing.assert_close(vae.moments(clip(5))[1], peer.encode(clip(5)).latent_dist.logvar, atol=1e-5, rtol=0)


@pytest.mark.parametrize("frames", [1, 2, 4])
@pytest.mark.parametrize("chunk", [1, None])
def test_decode_agrees_with_diffusers(vae, peer, frames, chunk):
    latents = torch.randn(1, 16, frames, 5, 3, generator=torch.Generator().manual_seed(frames))
    mean = torch.tensor(vae.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.latents_std).view(1, -1, 1, 1, 1)
    theirs = peer.decode(latents * std + mean).sample
    ours = vae.decode(latents, chunk=chunk)
    assert ours.shape == (1, 3, 4 * frames - 3, 40, 24)
    assert theirs.std() > 0.2 and theirs.abs().max() <= 1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_decode_clamps_and_reconstruct_does_not(vae):
    latents = 3 * torch.randn(1, 16, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    mean = torch.tensor(vae.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.latents_std).view(1, -1, 1, 1, 1)
    free = vae.reconstruct(latents * std + mean)
    assert free.abs().max() > 1.1
    torch.testing.assert_close(vae.decode(latents, chunk=None), free.clamp(-1, 1), atol=1e-6, rtol=0)


def test_a_batch_is_its_samples(vae):
    pixels = clip(5, batch=2)
    latents = vae.encode(pixels)
    torch.testing.assert_close(latents, torch.cat([vae.encode(p[None]) for p in pixels]), atol=1e-5, rtol=0)
    decoded = torch.cat([vae.decode(z[None]) for z in latents])
    torch.testing.assert_close(vae.decode(latents), decoded, atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk", [1, 2, 3, 9])
def test_chunks_equal_the_whole_clip(double, chunk):
    pixels = clip(17, 16, 24, dtype=torch.float64)
    whole = double.encode(pixels, chunk=None)
    assert whole.dtype == torch.float64
    torch.testing.assert_close(double.encode(pixels, chunk=chunk), whole, atol=1e-12, rtol=0)
    torch.testing.assert_close(double.decode(whole, chunk=chunk), double.decode(whole, chunk=None), atol=1e-12, rtol=0)


def test_an_image_is_a_video_of_one_frame(double):
    pixels = clip(9, dtype=torch.float64)
    image = double.encode(pixels[:, :, :1])
    torch.testing.assert_close(double.encode(pixels)[:, :, :1], image, atol=1e-12, rtol=0)


def test_nothing_depends_on_what_comes_later(double):
    pixels = clip(13, dtype=torch.float64)
    latents = double.encode(pixels, chunk=None)
    changed = pixels.clone()
    changed[:, :, 9:] = -changed[:, :, 9:]
    again = double.encode(changed, chunk=None)
    torch.testing.assert_close(again[:, :, :3], latents[:, :, :3], atol=1e-12, rtol=0)
    assert (again[:, :, 3] - latents[:, :, 3]).abs().max() > 1e-3
    prefix = double.decode(latents[:, :, :2])
    torch.testing.assert_close(double.decode(latents)[:, :, :5], prefix, atol=1e-12, rtol=0)


def test_a_stream_keeps_the_few_frames_it_needs_and_nothing_after_the_end(vae):
    stream = Stream()
    sizes = []
    for part in stream.chunks(clip(13), 4):
        vae.encoder(part, stream)
        kept = list(stream._kept.values())
        # A view of a whole chunk would hold all of it in memory.
        assert all(frames.shape[2] <= 2 and frames.untyped_storage().nbytes() == frames.nbytes for frames in kept)
        sizes.append(len(kept))
    assert sizes[0] > 20 and sizes[-1] == 0


def test_gradients_agree_with_diffusers():
    vae = scrambled().requires_grad_(True)
    with torch.no_grad():
        # diffusers clamps what it decodes; a quiet last layer keeps both away from there.
        vae.decoder.conv_out.weight *= 0.1
        vae.decoder.conv_out.bias *= 0.1
    peer = AutoencoderKLWan(**SHAPE).eval()
    peer.load_state_dict(vae.state_dict())
    pixels = clip(9, 16, 24)

    mu, logvar = vae.moments(pixels)
    rebuilt = vae.reconstruct(mu)
    ((rebuilt - pixels).square().mean() + 0.01 * logvar.square().mean()).backward()

    posterior = peer.encode(pixels).latent_dist
    theirs = peer.decode(posterior.mean).sample
    assert theirs.abs().max() < 0.99
    ((theirs - pixels).square().mean() + 0.01 * posterior.logvar.square().mean()).backward()

    wanted = dict(peer.named_parameters())
    for name, parameter in vae.named_parameters():
        error = (parameter.grad - wanted[name].grad).norm() / wanted[name].grad.norm()
        # The whole network's float32 rounding; a bias before a norm may have hardly any gradient of its own.
        assert error < 1e-4, f"{name}: relative error {error:.1e}"


def test_bfloat16_normalises_in_float32(vae):
    half = scrambled(torch.bfloat16)
    latents = half.encode(clip(5))
    assert latents.dtype == torch.float32
    wanted = vae.encode(clip(5))
    assert (latents - wanted).norm() / wanted.norm() < 0.03
    pixels = half.decode(latents)
    assert pixels.dtype == torch.bfloat16
    # The norm itself loses nothing but the last rounding, however large the sum of squares.
    norm = half.encoder.norm_out
    x = 100 * torch.randn(1, norm.gamma.shape[0], 2, 3, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = (x.double() / x.double().norm(dim=1, keepdim=True)) * x.shape[1] ** 0.5 * norm.gamma.double()
    torch.testing.assert_close(norm(x), exact.bfloat16(), atol=0, rtol=0.008)


@pytest.mark.parametrize(
    ("frames", "nearest"),
    [(2, "1 or 5"), (4, "1 or 5"), (8, "5 or 9"), (80, "77 or 81")],
)
def test_a_length_that_would_lose_frames_is_refused(vae, frames, nearest):
    with pytest.raises(ValueError, match=nearest):
        vae.encode(torch.zeros(1, 3, frames, 8, 8))


def test_a_size_that_does_not_divide_is_refused(vae):
    with pytest.raises(ValueError, match=r"60x100.*multiples of 8.*(56|64)x(96|104)"):
        vae.encode(torch.zeros(1, 3, 1, 60, 100))


@pytest.mark.parametrize("chunk", [0, -1])
def test_a_chunk_of_nothing_is_refused(vae, chunk):
    with pytest.raises(ValueError, match="at least 1 latent frame"):
        vae.decode(torch.zeros(1, 16, 2, 1, 1), chunk=chunk)


def test_the_default_is_the_released_vae():
    with torch.device("meta"):
        ours, theirs = WanVAE(), AutoencoderKLWan()
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert len(shapes) == 194
    assert (ours.temporal_stride, ours.spatial_stride) == (4, 8)
    known = {key: list(value) if isinstance(value, tuple) else value for key, value in theirs.config.items()}
    assert {key: known[key] for key in ours.config() if key != "_class_name"} == {
        key: value for key, value in ours.config().items() if key != "_class_name"
    }


def test_other_widths_and_strides_agree_with_diffusers():
    changes = {"dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [True, False]}
    vae = scrambled(**changes)
    peer = AutoencoderKLWan(
        **{**SHAPE, **changes}, scale_factor_temporal=vae.temporal_stride, scale_factor_spatial=vae.spatial_stride
    ).eval()
    peer.load_state_dict(vae.state_dict())
    assert (vae.temporal_stride, vae.spatial_stride) == (2, 4)
    mu, _ = vae.moments(clip(5, 8, 12))
    assert mu.shape == (1, 16, 3, 2, 3)
    torch.testing.assert_close(vae.reconstruct(mu).clamp(-1, 1), peer.decode(mu).sample, atol=1e-5, rtol=0)


def test_what_is_saved_loads_here_and_in_diffusers(vae, tmp_path):
    write_part(tmp_path / "vae", vae.config(), vae.state_dict())
    pixels = clip(5)
    latents = vae.encode(pixels)
    for path in (tmp_path, tmp_path / "vae"):
        ours = load_vae(path)
        assert not ours.training and not any(parameter.requires_grad for parameter in ours.parameters())
        assert torch.equal(ours.encode(pixels), latents)
    theirs = AutoencoderKLWan.from_pretrained(tmp_path, subfolder="vae")
    theirs_latents = peer_normalised(theirs, vae, theirs.encode(pixels).latent_dist.mode())
    torch.testing.assert_close(theirs_latents, latents, atol=1e-5, rtol=0)
    theirs.save_pretrained(tmp_path / "again")
    assert torch.equal(load_vae(tmp_path / "again").encode(pixels), latents)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_residual": True, "patch_size": 2}, "Wan-VAE 2.2"),
        ({"_class_name": "AutoencoderKL"}, "AutoencoderKL, not a Wan-VAE"),
        ({"attn_scales": [0.5]}, "attn_scales"),
        ({"in_channels": 4}, "in_channels=4"),
        ({"base_dim": 16}, "mis-shaped"),
        ({"num_res_blocks": 3}, "missing"),
        ({"latents_std": [1.0]}, "z_dim=16"),
        ({"temperal_downsample": [True]}, "needs 3 entries"),
    ],
)
def test_another_vae_is_refused(vae, tmp_path, changes, message):
    write_part(tmp_path, {**vae.config(), **changes}, vae.state_dict())
    with pytest.raises(ValueError, match=re.escape(message)):
        load_vae(tmp_path)


def test_a_new_vae_can_be_trained(vae):
    torch.manual_seed(0)
    fresh, pixels = WanVAE(**SHAPE), clip(5, 16, 16, batch=2)
    optimizer = torch.optim.Adam(fresh.parameters(), lr=2e-3)
    losses = []
    for _ in range(8):
        loss = (fresh.reconstruct(fresh.moments(pixels)[0]) - pixels).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in fresh.encoder.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_measured_latents_are_normalised_by_their_measure(vae):
    clips = [clip(5, batch=2), clip(9)]
    mean, std = measure_latents(vae, clips)
    measured = WanVAE(**SHAPE, latents_mean=mean, latents_std=std)
    measured.load_state_dict(vae.state_dict())
    with torch.no_grad():
        latents = torch.cat([measured.encode(x).transpose(0, 1).flatten(1) for x in clips], dim=1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(1, unbiased=False), torch.ones(16), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="no clips"):
        measure_latents(vae, [])
