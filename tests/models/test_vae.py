"""WanVAE 2.1 and 2.2 against diffusers' AutoencoderKLWan on scrambled random weights, and their own properties."""

import re

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file

from wantrain.models import Base
from wantrain.models.formats.inspect import describe
from wantrain.models.formats.loading import load_vae
from wantrain.models.formats.names import VAE_TO_DIFFUSERS, renamed
from wantrain.models.formats.weights import fingerprint, write_part
from wantrain.models.vae import WanVAE, measure_latents
from wantrain.models.vae_layers import AverageDown, DuplicateUp, Stream, patchify, unpatchify

FULL = {
    "2.1": {},
    "2.2": {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "patch_size": 2},
}
#: The same VAEs, thin enough for a test.
SMALL = {"2.1": {"base_dim": 8}, "2.2": {**FULL["2.2"], "base_dim": 6, "decoder_base_dim": 10}}


def scramble(vae, dtype=torch.float32):
    """The VAE with none of its weights at their default, so that no error hides behind a zero or a one."""
    torch.manual_seed(0)
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


def peer_of(vae):
    peer = AutoencoderKLWan.from_config(vae.config()).eval()
    peer.load_state_dict(vae.state_dict())
    return peer


def clip(vae, frames, rows=3, columns=5, batch=1, dtype=torch.float32):
    """Random pixels of `rows` x `columns` latent positions."""
    generator = torch.Generator().manual_seed(frames)
    size = rows * vae.spatial_stride, columns * vae.spatial_stride
    return torch.rand(batch, 3, frames, *size, generator=generator, dtype=dtype) * 2 - 1


def noise(vae, frames, rows, columns):
    return torch.randn(1, vae.z_dim, frames, rows, columns, generator=torch.Generator().manual_seed(frames))


def statistics(vae):
    return (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.latents_mean, vae.latents_std))


def normalised(vae, latents):
    mean, std = statistics(vae)
    return (latents - mean) / std


def denormalised(vae, latents):
    mean, std = statistics(vae)
    return latents * std + mean


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small only wait for a second thread: ten times as long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=list(SMALL))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def vae(kind):
    return scramble(WanVAE(**SMALL[kind]))


@pytest.fixture(scope="module")
def double(kind):
    return scramble(WanVAE(**SMALL[kind]), torch.float64)


@pytest.fixture(scope="module")
def peer(vae):
    return peer_of(vae).requires_grad_(False)


@pytest.mark.parametrize("frames", [1, 5, 9, 13])
@pytest.mark.parametrize("chunk", [1, 2, None])
def test_encode_matches_diffusers(vae, peer, frames, chunk):
    rows, columns = 64 // vae.spatial_stride, 96 // vae.spatial_stride
    pixels = clip(vae, frames, rows, columns)
    theirs = normalised(vae, peer.encode(pixels).latent_dist.mode())
    ours = vae.encode(pixels, chunk=chunk)
    assert ours.shape == (1, vae.z_dim, 1 + (frames - 1) // 4, rows, columns)
    assert theirs.std() > 0.05
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_log_variance_matches_diffusers(vae, peer):
    pixels = clip(vae, 5)
    torch.testing.assert_close(vae.moments(pixels)[1], peer.encode(pixels).latent_dist.logvar, atol=1e-5, rtol=0)


@pytest.mark.parametrize("frames", [1, 2, 3, 4])
@pytest.mark.parametrize("chunk", [1, 2, None])
def test_decode_matches_diffusers(vae, peer, frames, chunk):
    latents = noise(vae, frames, 5, 3)
    theirs = peer.decode(denormalised(vae, latents)).sample
    ours = vae.decode(latents, chunk=chunk)
    assert ours.shape == (1, 3, 4 * frames - 3, 5 * vae.spatial_stride, 3 * vae.spatial_stride)
    assert theirs.std() > 0.2 and theirs.abs().max() <= 1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_decode_clamps(vae):
    """decode clamps pixels to [-1, 1], and reconstruct does not."""
    latents = 3 * noise(vae, 2, 3, 4)
    free = vae.reconstruct(denormalised(vae, latents))
    assert free.abs().max() > 1.1
    torch.testing.assert_close(vae.decode(latents, chunk=None), free.clamp(-1, 1), atol=1e-6, rtol=0)


def test_batch_equals_single_clips(vae):
    """A batch gives the latents and pixels of its clips one by one."""
    pixels = clip(vae, 5, batch=2)
    latents = vae.encode(pixels)
    torch.testing.assert_close(latents, torch.cat([vae.encode(p[None]) for p in pixels]), atol=1e-5, rtol=0)
    decoded = torch.cat([vae.decode(z[None]) for z in latents])
    torch.testing.assert_close(vae.decode(latents), decoded, atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk", [1, 2, 3, 9])
def test_chunks_equal_whole_clip(double, chunk):
    pixels = clip(double, 17, 2, 3, dtype=torch.float64)
    whole = double.encode(pixels, chunk=None)
    assert whole.dtype == torch.float64
    torch.testing.assert_close(double.encode(pixels, chunk=chunk), whole, atol=1e-12, rtol=0)
    torch.testing.assert_close(double.decode(whole, chunk=chunk), double.decode(whole, chunk=None), atol=1e-12, rtol=0)


def test_image_equals_first_frame(double):
    """The latent of an image equals the first latent frame of a clip that begins with it."""
    pixels = clip(double, 9, dtype=torch.float64)
    image = double.encode(pixels[:, :, :1])
    torch.testing.assert_close(double.encode(pixels)[:, :, :1], image, atol=1e-12, rtol=0)


def test_causality(double):
    """No latent frame and no pixel frame depends on later frames."""
    pixels = clip(double, 13, dtype=torch.float64)
    latents = double.encode(pixels, chunk=None)
    changed = pixels.clone()
    changed[:, :, 9:] = -changed[:, :, 9:]
    again = double.encode(changed, chunk=None)
    torch.testing.assert_close(again[:, :, :3], latents[:, :, :3], atol=1e-12, rtol=0)
    assert (again[:, :, 3] - latents[:, :, 3]).abs().max() > 1e-3
    prefix = double.decode(latents[:, :, :2])
    torch.testing.assert_close(double.decode(latents)[:, :, :5], prefix, atol=1e-12, rtol=0)


def test_stream_memory(vae):
    """A stream keeps at most two frames per layer, without their chunk, and nothing after the end."""
    stream = Stream()
    sizes = []
    for part in stream.chunks(clip(vae, 13), 4):
        vae.encoder(patchify(part, vae.patch_size or 1), stream)
        kept = list(stream._kept.values())
        # A view of a whole chunk would hold all of it in memory.
        assert all(frames.shape[2] <= 2 and frames.untyped_storage().nbytes() == frames.nbytes for frames in kept)
        sizes.append(len(kept))
    assert sizes[0] > 20 and sizes[-1] == 0


@pytest.mark.parametrize("chunk", [1, None])
def test_gradients_match_diffusers(kind, chunk):
    vae = scramble(WanVAE(**SMALL[kind])).requires_grad_(True)
    with torch.no_grad():
        # diffusers clamps what it decodes; a quiet last layer keeps both away from there.
        vae.decoder.conv_out.weight *= 0.1
        vae.decoder.conv_out.bias *= 0.1
    peer, pixels = peer_of(vae), clip(vae, 9, 2, 3)

    mu, logvar = vae.moments(pixels, chunk=chunk)
    rebuilt = vae.reconstruct(mu, chunk=chunk)
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


def test_bfloat16_normalises_in_float32(kind, vae):
    half = scramble(WanVAE(**SMALL[kind]), torch.bfloat16)
    latents = half.encode(clip(vae, 5))
    assert latents.dtype == torch.float32
    wanted = vae.encode(clip(vae, 5))
    assert (latents - wanted).norm() / wanted.norm() < 0.03
    pixels = half.decode(latents)
    assert pixels.dtype == torch.bfloat16
    # The norm itself loses nothing but the last rounding, however large the sum of squares.
    norm = half.encoder.norm_out
    x = 100 * torch.randn(1, norm.gamma.shape[0], 2, 3, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = (x.double() / x.double().norm(dim=1, keepdim=True)) * x.shape[1] ** 0.5 * norm.gamma.double()
    torch.testing.assert_close(norm(x), exact.bfloat16(), atol=0, rtol=0.008)


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (5, 2), (81, 21)])
def test_latent_frame_count(vae, frames, latent_frames):
    """A clip has one latent frame, and one more for each four further frames."""
    assert vae.encode(clip(vae, frames, 1, 1)).shape == (1, vae.z_dim, latent_frames, 1, 1)


@pytest.mark.parametrize(
    ("frames", "nearest"),
    [(2, "1 or 5"), (4, "1 or 5"), (8, "5 or 9"), (80, "77 or 81")],
)
def test_bad_clip_length(vae, frames, nearest):
    """A clip length that would lose frames is refused with the nearest valid ones."""
    with pytest.raises(ValueError, match=nearest):
        vae.encode(torch.zeros(1, 3, frames, 16, 16))


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [("2.1", (60, 100), r"60x100.*multiples of 8.*(56|64)x(96|104)"), ("2.2", (40, 64), r"40x64.*multiples of 16")],
    indirect=["kind"],
)
def test_bad_size(vae, size, message):
    """A size that the stride does not divide is refused with the nearest valid one."""
    with pytest.raises(ValueError, match=message):
        vae.encode(torch.zeros(1, 3, 1, *size))


@pytest.mark.parametrize("chunk", [0, -1])
def test_bad_chunk(vae, chunk):
    """A chunk below one latent frame is refused."""
    with pytest.raises(ValueError, match="at least 1 latent frame"):
        vae.decode(torch.zeros(1, vae.z_dim, 2, 1, 1), chunk=chunk)


def test_patchify_order():
    """Patches of pixels become channels in which the column varies slower than the row."""
    pixels = torch.arange(2 * 3 * 2 * 4 * 6.0).view(2, 3, 2, 4, 6)
    patches = patchify(pixels, 2)
    assert patches.shape == (2, 12, 2, 2, 3)
    for colour in range(3):
        for column in range(2):
            for row in range(2):
                wanted = pixels[:, colour, :, row::2, column::2]
                assert torch.equal(patches[:, colour * 4 + column * 2 + row], wanted)
    assert torch.equal(unpatchify(patches, 2), pixels)


def test_average_down():
    """AverageDown averages 2x2 pixels and puts pairs of frames into channels."""
    x = torch.randn(2, 3, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    means = F.avg_pool3d(x, (1, 2, 2))
    # Only in space: the mean of 2x2. In time too: of each channel its even frames after the first, then its odd ones,
    # and the frame before the first is zero.
    torch.testing.assert_close(AverageDown(3, 3, frames=1, side=2)(x, Stream()), means)
    down = AverageDown(3, 6, frames=2, side=2)(x, Stream())
    assert down.shape == (2, 6, 3, 2, 3)
    torch.testing.assert_close(down[:, 0::2, 1:], means[:, :, 1::2])
    torch.testing.assert_close(down[:, 1::2], means[:, :, 0::2])
    assert down[:, 0::2, 0].count_nonzero() == 0


def test_duplicate_up():
    """DuplicateUp repeats pixels, and every frame but the first."""
    x = torch.randn(2, 6, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    up = DuplicateUp(6, 6, frames=2, side=2)(x, Stream())
    assert torch.equal(up, F.interpolate(x, scale_factor=2.0, mode="nearest-exact")[:, :, 1:])
    # Half the channels, only in space: one channel's pixels are the even rows, the next one's the odd rows.
    half = DuplicateUp(6, 3, frames=1, side=2)(x, Stream())
    assert half.shape == (2, 3, 3, 8, 10)
    for column in range(2):
        assert torch.equal(half[:, :, :, 0::2, column::2], x[:, 0::2])
        assert torch.equal(half[:, :, :, 1::2, column::2], x[:, 1::2])


#: (encoder, decoder, the two 1x1x1 convolutions) parameters, and tensors, of the released VAEs.
COUNTS = {
    "2.1": (53_595_872, 73_295_331, 1_328, 194),
    "2.2": (149_627_776, 555_049_228, 11_664, 196),
}


@pytest.mark.parametrize("kind", FULL)
def test_full_size_matches_released_vae(kind):
    """In full size names, shapes and counts equal the released VAE's."""
    with torch.device("meta"):
        ours = WanVAE(**FULL[kind])
        theirs = AutoencoderKLWan.from_config(ours.config())
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    parts = (ours.encoder, ours.decoder, torch.nn.ModuleList([ours.quant_conv, ours.post_quant_conv]))
    assert (*(sum(p.numel() for p in part.parameters()) for part in parts), len(shapes)) == COUNTS[kind]
    assert sum(COUNTS[kind][:3]) == {"2.1": 126_892_531, "2.2": 704_688_668}[kind]
    assert (ours.temporal_stride, ours.spatial_stride) == {"2.1": (4, 8), "2.2": (4, 16)}[kind]


def plain(config):
    """A diffusers config without what diffusers notes of itself, and with lists for tuples."""
    pairs = ((key, value) for key, value in config.items() if not key.startswith("_"))
    return {key: list(value) if isinstance(value, tuple) else value for key, value in pairs}


def test_config_matches_diffusers(vae, peer, tmp_path):
    assert plain(vae.config()) == plain(peer.config)
    peer.save_pretrained(tmp_path)
    assert plain(AutoencoderKLWan.from_pretrained(tmp_path).config) == plain(load_vae(tmp_path).config())
    with torch.device("meta"):
        assert plain(WanVAE().config()) == plain(AutoencoderKLWan().config)


@pytest.mark.parametrize(("z_dim", "mean", "std"), [(16, -0.2126, 286.1255), (48, -7.6248, 790.8891)])
def test_published_latent_statistics(z_dim, mean, std):
    """The published latent statistics are complete and in order."""
    with torch.device("meta"):
        vae = WanVAE(z_dim=z_dim)
    # A checksum in which each value counts by its place.
    for values, wanted in ((vae.latents_mean, mean), (vae.latents_std, std)):
        assert len(values) == z_dim
        assert sum(place * value for place, value in enumerate(values, 1)) == pytest.approx(wanted, abs=1e-6)


def residual_keys(prefix, before, after):
    """Official names and shapes of a residual block."""
    keys = {
        "residual.0.gamma": (before, 1, 1, 1),
        "residual.2.weight": (after, before, 3, 3, 3),
        "residual.2.bias": (after,),
        "residual.3.gamma": (after, 1, 1, 1),
        "residual.6.weight": (after, after, 3, 3, 3),
        "residual.6.bias": (after,),
    }
    if before != after:
        keys |= {"shortcut.weight": (after, before, 1, 1, 1), "shortcut.bias": (after,)}
    return {f"{prefix}.{key}": shape for key, shape in keys.items()}


def resampling_keys(prefix, before, after, times=None):
    """Official names and shapes of a resampling; `times` is how often its temporal convolution has the channels."""
    keys = {f"{prefix}.resample.1.weight": (after, before, 3, 3), f"{prefix}.resample.1.bias": (after,)}
    if times:
        keys[f"{prefix}.time_conv.weight"] = (times * before, before, 3, 1, 1)
        keys[f"{prefix}.time_conv.bias"] = (times * before,)
    return keys


def convolution_keys(prefix, before, after, *kernel):
    return {f"{prefix}.weight": (after, before, *kernel), f"{prefix}.bias": (after,)}


def ends_keys(side, first, middle, last):
    """Official names and shapes of an encoder's or decoder's ends: (before, after) of its first and last layers."""
    return {
        **convolution_keys(f"{side}.conv1", *first, 3, 3, 3),
        **residual_keys(f"{side}.middle.0", middle, middle),
        f"{side}.middle.1.norm.gamma": (middle, 1, 1),
        **convolution_keys(f"{side}.middle.1.to_qkv", middle, 3 * middle, 1, 1),
        **convolution_keys(f"{side}.middle.1.proj", middle, middle, 1, 1),
        **residual_keys(f"{side}.middle.2", middle, middle),
        f"{side}.head.0.gamma": (last[0], 1, 1, 1),
        **convolution_keys(f"{side}.head.2", *last, 3, 3, 3),
    }


def official_keys_of_2_1():
    """Names and shapes of Wan2.1_VAE.pth, layer by layer: all levels' layers are counted through."""
    keys = {
        **convolution_keys("conv1", 32, 32, 1, 1, 1),
        **convolution_keys("conv2", 16, 16, 1, 1, 1),
        **ends_keys("encoder", (3, 96), 384, (384, 32)),
        **ends_keys("decoder", (16, 384), 384, (96, 3)),
    }
    widths = {0: (96, 96), 1: (96, 96), 3: (96, 192), 4: (192, 192), 6: (192, 384), 7: (384, 384)}
    for place, (before, after) in {**widths, 9: (384, 384), 10: (384, 384)}.items():
        keys |= residual_keys(f"encoder.downsamples.{place}", before, after)
    keys |= resampling_keys("encoder.downsamples.2", 96, 96)
    keys |= resampling_keys("encoder.downsamples.5", 192, 192, times=1)
    keys |= resampling_keys("encoder.downsamples.8", 384, 384, times=1)
    widths = {0: (384, 384), 1: (384, 384), 2: (384, 384), 4: (192, 384), 5: (384, 384), 6: (384, 384)}
    widths |= dict.fromkeys((8, 9, 10), (192, 192)) | dict.fromkeys((12, 13, 14), (96, 96))
    for place, (before, after) in widths.items():
        keys |= residual_keys(f"decoder.upsamples.{place}", before, after)
    keys |= resampling_keys("decoder.upsamples.3", 384, 192, times=2)
    keys |= resampling_keys("decoder.upsamples.7", 384, 192, times=2)
    return keys | resampling_keys("decoder.upsamples.11", 192, 96)


def official_keys_of_2_2():
    """Names and shapes of Wan2.2_VAE.pth: levels, and in each level layers."""
    keys = {
        **convolution_keys("conv1", 96, 96, 1, 1, 1),
        **convolution_keys("conv2", 48, 48, 1, 1, 1),
        **ends_keys("encoder", (12, 160), 640, (640, 96)),
        **ends_keys("decoder", (48, 1024), 1024, (256, 12)),
    }
    for level, (before, after) in enumerate([(160, 160), (160, 320), (320, 640), (640, 640)]):
        keys |= residual_keys(f"encoder.downsamples.{level}.downsamples.0", before, after)
        keys |= residual_keys(f"encoder.downsamples.{level}.downsamples.1", after, after)
    for level, (width, times) in enumerate([(160, None), (320, 1), (640, 1)]):
        keys |= resampling_keys(f"encoder.downsamples.{level}.downsamples.2", width, width, times)
    for level, (before, after) in enumerate([(1024, 1024), (1024, 1024), (1024, 512), (512, 256)]):
        keys |= residual_keys(f"decoder.upsamples.{level}.upsamples.0", before, after)
        keys |= residual_keys(f"decoder.upsamples.{level}.upsamples.1", after, after)
        keys |= residual_keys(f"decoder.upsamples.{level}.upsamples.2", after, after)
    for level, (width, times) in enumerate([(1024, 2), (1024, 2), (512, None)]):
        keys |= resampling_keys(f"decoder.upsamples.{level}.upsamples.3", width, width, times)
    return keys


@pytest.mark.parametrize(("kind", "official"), [("2.1", official_keys_of_2_1()), ("2.2", official_keys_of_2_2())])
def test_official_names(kind, official):
    """The table of names maps each official tensor to one of ours of the same shape."""
    assert len(official) == COUNTS[kind][3]
    with torch.device("meta"):
        ours = {name: tuple(tensor.shape) for name, tensor in WanVAE(**FULL[kind]).state_dict().items()}
    named = {key: renamed(key, VAE_TO_DIFFUSERS) for key in official}
    assert [key for key, name in named.items() if name is None] == []
    assert len(set(named.values())) == len(official)
    assert {named[key]: shape for key, shape in official.items()} == ours


@pytest.mark.parametrize(("kind", "official"), [("2.1", official_keys_of_2_1()), ("2.2", official_keys_of_2_2())])
def test_single_file_load(kind, official, tmp_path):
    """A single file loads under official names and under diffusers'.

    Wan2.x_VAE.pth is a pickle without a config; ComfyUI users have a safetensors file.
    """
    vae = scramble(WanVAE(**SMALL[kind]))
    back = {renamed(key, VAE_TO_DIFFUSERS): key for key in official}
    torch.save({back[key]: value for key, value in vae.state_dict().items()}, tmp_path / f"Wan{kind}_VAE.pth")
    save_file(vae.state_dict(), tmp_path / "vae.safetensors")
    pixels = clip(vae, 5)
    for file in (tmp_path / f"Wan{kind}_VAE.pth", tmp_path / "vae.safetensors"):
        loaded = load_vae(file)
        assert loaded.config() == vae.config()
        assert torch.equal(loaded.encode(pixels), vae.encode(pixels))
    assert torch.equal(Base(tmp_path).vae().encode(pixels), vae.encode(pixels))
    assert f"Wan-VAE {kind}" in describe(tmp_path / f"Wan{kind}_VAE.pth")


@pytest.mark.parametrize("dim_mult", [[1, 2, 2], [2, 4, 4], [1, 4, 4]])
def test_other_sizes_match_diffusers(kind, dim_mult):
    """VAEs of other widths and strides agree with diffusers."""
    changes = {"dim_mult": dim_mult, "num_res_blocks": 1, "temperal_downsample": [True, False]}
    vae = scramble(WanVAE(**{**SMALL[kind], "decoder_base_dim": 12, **changes}))
    peer = peer_of(vae)
    assert (vae.temporal_stride, vae.spatial_stride) == (2, {"2.1": 4, "2.2": 8}[kind])
    pixels = clip(vae, 5, 2, 3)
    mu, _ = vae.moments(pixels, chunk=1)
    assert mu.shape == (1, vae.z_dim, 3, 2, 3)
    torch.testing.assert_close(mu, peer.encode(pixels).latent_dist.mode(), atol=1e-5, rtol=0)
    torch.testing.assert_close(vae.reconstruct(mu).clamp(-1, 1), peer.decode(mu).sample, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"z_dim": 4}, "z_dim=4: latents_mean and latents_std are published for 16 and 48 channels only"),
        ({"latents_mean": [0.0] * 16}, "latents_mean and latents_std need z_dim=16 entries each"),
        ({"is_residual": True, "dim_mult": [1, 2, 4, 8]}, "cannot average 16 channels (16 in blocks of 1x1x1) to 32"),
        ({"is_residual": True, "dim_mult": [1, 1, 8, 8]}, "cannot repeat 32 channels to 16 (4 in blocks of 1x2x2)"),
    ],
)
def test_bad_settings(keywords, message):
    """Settings that do not fit together are refused."""
    with pytest.raises(ValueError, match=re.escape(message)), torch.device("meta"):
        WanVAE(base_dim=4, **keywords)


def test_save_load_in_diffusers(vae, tmp_path):
    """A saved VAE loads here and in diffusers, and what diffusers saves loads here."""
    write_part(tmp_path / "vae", vae.config(), vae.state_dict())
    pixels = clip(vae, 5)
    latents = vae.encode(pixels)
    for path in (tmp_path, tmp_path / "vae"):
        ours = load_vae(path)
        assert not ours.training and not any(parameter.requires_grad for parameter in ours.parameters())
        assert torch.equal(ours.encode(pixels), latents)
    theirs = AutoencoderKLWan.from_pretrained(tmp_path, subfolder="vae")
    theirs_latents = normalised(vae, theirs.encode(pixels).latent_dist.mode())
    torch.testing.assert_close(theirs_latents, latents, atol=1e-5, rtol=0)
    theirs.save_pretrained(tmp_path / "again")
    assert torch.equal(load_vae(tmp_path / "again").encode(pixels), latents)


def test_half(vae, tmp_path):
    """A half of a VAE gives what the whole gives, with the half's weights alone; the file is checked as a whole."""
    write_part(tmp_path, vae.config(), vae.state_dict())
    pixels, count = clip(vae, 5), {}
    encoder, decoder = load_vae(tmp_path, half="encoder"), load_vae(tmp_path, half="decoder")
    latents = encoder.encode(pixels)
    assert torch.equal(latents, vae.encode(pixels)) and torch.equal(decoder.decode(latents), vae.decode(latents))
    assert fingerprint(encoder) == fingerprint(vae) and encoder.config() == decoder.config() == vae.config()
    for name, half in (("encoder", encoder), ("decoder", decoder)):
        count[name] = len(half.state_dict())
        assert not any(parameter.requires_grad for parameter in half.parameters())
    assert sum(count.values()) == len(vae.state_dict()) and min(count.values()) > 0
    state = vae.state_dict()
    state.pop("decoder.conv_in.weight")
    write_part(tmp_path / "cut", vae.config(), state)
    with pytest.raises(ValueError, match=re.escape("1 missing (decoder.conv_in.weight)")):
        load_vae(tmp_path / "cut", half="encoder")


def test_optional_config_entries(vae, kind, tmp_path):
    """Config entries without effect may be present or absent."""
    notes = {"_diffusers_version": "0.35.0", "_name_or_path": "vae", "clip_output": False}
    write_part(tmp_path / "more", {**vae.config(), **notes, "scale_factor_spatial": None}, vae.state_dict())
    write_part(tmp_path / "less", SMALL[kind], vae.state_dict())
    assert load_vae(tmp_path / "more").config() == load_vae(tmp_path / "less").config() == vae.config()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("2.1", {"is_residual": True}, "missing"),
        ("2.1", {"patch_size": 2}, "in_channels=3 is not supported; with patch_size=2 a Wan-VAE has in_channels=12"),
        ("2.1", {"_class_name": "AutoencoderKL"}, "AutoencoderKL, not a Wan-VAE"),
        ("2.1", {"attn_scales": [0.5]}, "attn_scales"),
        ("2.1", {"in_channels": 4}, "in_channels=4"),
        ("2.1", {"base_dim": 16}, "mis-shaped"),
        ("2.1", {"num_res_blocks": 3}, "missing"),
        ("2.1", {"latents_std": [1.0]}, "z_dim=16"),
        ("2.1", {"temperal_downsample": [True]}, "needs 3 entries"),
        ("2.1", {"clip_output": True}, "clip_output=True"),
        ("2.1", {"window_size": 7}, "window_size=7 is unknown"),
        ("2.2", {"is_residual": False}, "missing"),
        ("2.2", {"patch_size": None}, "in_channels=12"),
        ("2.2", {"out_channels": 3}, "out_channels=3"),
        ("2.2", {"decoder_base_dim": None}, "mis-shaped"),
    ],
    indirect=["kind"],
)
def test_unsupported_vae(vae, tmp_path, changes, message):
    """A VAE of another kind or of other sizes is refused."""
    write_part(tmp_path, {**vae.config(), **changes}, vae.state_dict())
    with pytest.raises(ValueError, match=re.escape(message)):
        load_vae(tmp_path)


def test_new_vae_gradients(kind, tmp_path):
    """In a new VAE every parameter has a gradient that is finite and not zero."""
    torch.manual_seed(0)
    fresh = WanVAE(**SMALL[kind])
    write_part(tmp_path, fresh.config(), fresh.state_dict())
    assert load_vae(tmp_path).config() == fresh.config()
    for parameter in fresh.parameters():
        # What starts at zero keeps what is behind it from its gradient.
        if not parameter.any():
            parameter.data.normal_(std=0.1)
    pixels = clip(fresh, 9, 1, 2)
    mu, logvar = fresh.moments(pixels)
    rebuilt = fresh.reconstruct(mu)
    assert mu.isfinite().all() and logvar.isfinite().all() and rebuilt.isfinite().all()
    ((rebuilt - pixels).square().mean() + logvar.exp().mean()).backward()
    for name, parameter in fresh.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_new_vae_trains(kind):
    """Training lowers the error of a new VAE."""
    torch.manual_seed(0)
    fresh = WanVAE(**SMALL[kind])
    pixels = clip(fresh, 5, 2, 2, batch=2)
    optimizer = torch.optim.Adam(fresh.parameters(), lr=2e-3)
    losses = []
    for _ in range(8):
        loss = (fresh.reconstruct(fresh.moments(pixels)[0]) - pixels).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_measured_latent_statistics(vae, kind):
    """Statistics that are measured on clips give their latents mean 0 and standard deviation 1."""
    clips = [clip(vae, 5, batch=2), clip(vae, 9)]
    mean, std = measure_latents(vae, clips)
    measured = WanVAE(**SMALL[kind], latents_mean=mean, latents_std=std)
    measured.load_state_dict(vae.state_dict())
    with torch.no_grad():
        latents = torch.cat([measured.encode(x).transpose(0, 1).flatten(1) for x in clips], dim=1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(vae.z_dim), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(1, unbiased=False), torch.ones(vae.z_dim), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="no clips"):
        measure_latents(vae, [])
