"""Clips through a device: the bits that they had when pixels were made on the CPU, and nothing computed elsewhere."""

import json
import tarfile
import threading
import time

import numpy as np
import pytest
import shard_helpers
import torch
from safetensors.torch import load
from shard_helpers import shard

from wantrain import conditioning, geometry
from wantrain.data import ConditioningInputs, read_manifest
from wantrain.data.footage.pixels import read_clips
from wantrain.data.footage.video_shards import VideoEntry, read_video_shards
from wantrain.data.latents import clip_encoder
from wantrain.data.latents.conditioning import _label
from wantrain.data.latents.transfer import Transfer
from wantrain.data.latents.work_units import clip_rows
from wantrain.masks import MaskMix
from wantrain.models import WanVAE
from wantrain.util.files import write_json
from wantrain.util.seeds import generator_at
from wantrain.video import write_mp4

SIZE, FRAMES = 32, 9
SPEC = {"image": 1.0, "boxes": {"weight": 1.0, "variants": 2}, "brushes": 1.0, "mask": 1.0}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Video shards of four clips of noise that moves, and a mask for each: boxes that move too."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "footage" / "masks").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(4):
        noise = np.kron(generator.integers(0, 256, (4, 7, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        frames = np.stack([noise[:, step : step + SIZE] for step in range(FRAMES)])
        write_mp4(folder / "footage" / f"{number}.mp4", frames, 16, quality=0)
        (folder / "footage" / f"{number}.txt").write_text(f"clip {number}")
        mask = np.zeros_like(frames)
        for step, frame in enumerate(mask):
            frame[4 * number :, step : step + 16] = 255
        write_mp4(folder / "footage" / "masks" / f"{number}.mp4", mask, 16, quality=0)
    settings = {"model": "tiny", "num_frames": FRAMES, "fps": 16, "rejects_limit": 0.6, "shard_bytes": 1 << 20}
    shard(folder / "footage", folder / "videos", **settings)
    return folder / "videos"


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    small = WanVAE(base_dim=4).requires_grad_(False)
    for parameter in small.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return small


def encode(shards, out, **changes):
    settings = {
        "encode_pixels": lambda pixels: pixels[:, :, ::4, ::8, ::8],
        "encode_texts": lambda texts: [torch.ones(1, 3) for _ in texts],
        "sizes": geometry.Buckets((SIZE**2,), (1.0,), 16),
        "inputs": ConditioningInputs({}, "none"),
        "model": "tiny",
        "vae_fingerprint": "vae",
        "text_fingerprint": "text",
        "rejects_limit": 0.5,
        "shard_bytes": 1 << 20,
        "shard_clips": 1,
        "workers": 1,
    }
    return shard_helpers.encode(shards, out, **{**settings, **changes})


def stored(folder):
    """The tensors of every clip in a folder, by its name."""
    found = {}
    for path in folder.glob("latent-*.tar"):
        with tarfile.open(path) as tar:
            names = [name for name in tar.getnames() if name.endswith(".safetensors")]
            found.update({name.removesuffix(".safetensors"): load(tar.extractfile(name).read()) for name in names})
    return found


def requests(shards):
    """What a decoder would be asked, of every file, with its mask."""
    seen = {}

    def remembering(request):
        write_json(shards.parent / f"{request['key']}.request", request)
        yield from read_clips(request)

    encode(shards, shards.parent / "seen", inputs=ConditioningInputs({"mask": 1.0}, "channel_concat"), read=remembering)
    for path in shards.parent.glob("*.request"):
        seen[path.stem] = json.loads(path.read_text())
    return seen


def test_bitwise_reference(videos, vae, tmp_path):
    """Latents and conditioning inputs equal those of the CPU reference bit for bit.

    What encode.py did until pixels were made on the device, written out here: CPU pixels, one clip after another.
    """
    inputs = ConditioningInputs(SPEC, "channel_concat")
    encode(videos, tmp_path / "out", encode_pixels=vae.encode, inputs=inputs, batch_pixels=1)
    found, mix, shape = stored(tmp_path / "out"), MaskMix.read(SPEC), (FRAMES, SIZE, SIZE)
    assert len(found) == 4
    for key, request in requests(videos).items():
        name, (frames,) = f"{key}-0000", read_clips(request)
        pixels = (torch.from_numpy(frames[..., :3].copy()).permute(3, 0, 1, 2).float() / 127.5 - 1).contiguous()[None]
        wanted = {"latents": vae.encode(pixels)[0].to(torch.bfloat16)}
        painted = torch.from_numpy(frames[..., 3:].mean(axis=-1) < 127.5)
        assert 0.1 < painted.float().mean() < 0.9
        for kind, variant in ConditioningInputs(SPEC, "channel_concat").stored:
            known = painted
            if kind != "mask":
                known = mix.draw(kind, shape, generator_at("known", kind, variant, name)).expand(shape)
            record = conditioning.encode(vae.encode, pixels, known[None, None], conditioning="channel_concat")
            wanted |= conditioning.to_tensors(_label(kind, variant), record)
        assert set(found[name]) == set(wanted)
        for what, tensor in wanted.items():
            assert found[name][what].dtype == tensor.dtype and torch.equal(found[name][what], tensor), what


class OnDevice(torch.Tensor):
    """A tensor that is elsewhere: it takes part in nothing together with a tensor of the host."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        given = [each for each in torch.utils._pytree.tree_leaves((args, kwargs)) if type(each) is torch.Tensor]
        at_home = [tuple(each.shape) for each in given if each.dim()]
        assert not at_home, f"{func} mixes a device's tensors with the host's of shape {at_home}"
        return super().__torch_function__(func, types, args, kwargs or {})


class Elsewhere(Transfer):
    """Copies to such a device, with a list of what came."""

    def __init__(self, device):
        super().__init__(device)
        self.came = []
        made.append(self)

    def upload(self, tensors):
        self.came += [(tensor.dtype, tuple(tensor.shape)) for tensor in tensors]
        there = [tensor.clone().as_subclass(OnDevice) for tensor in tensors]
        return lambda: there

    def download(self, tensors):
        assert all(type(tensor) is OnDevice for tensor in tensors)
        there = [tensor.as_subclass(torch.Tensor) for tensor in tensors]
        return lambda: there


made: list[Elsewhere] = []


def test_device_transfers(videos, tmp_path, monkeypatch):
    """The device gets bytes once and computes all the rest.

    Frames and drawn masks go up, each once; pixels, mid-gray, masks over latents and bf16 are made there.
    """
    seen = []

    def encode_pixels(pixels):
        assert type(pixels) is OnDevice and pixels.dtype == torch.float32 and pixels.is_contiguous()
        seen.append(tuple(pixels.shape))
        return pixels[:, :, ::4, ::8, ::8]

    inputs = ConditioningInputs(SPEC, "channel_concat")
    encode(videos, tmp_path / "here", inputs=inputs, shard_clips=64)
    monkeypatch.setattr(clip_encoder, "Transfer", Elsewhere)
    encode(videos, tmp_path / "there", inputs=inputs, shard_clips=64, encode_pixels=encode_pixels)
    masks = [(torch.bool, (4, 1, FRAMES, *size)) for size in ((1, 1), (SIZE, SIZE), (SIZE, SIZE), (SIZE, SIZE))]
    assert made[-1].came == [(torch.uint8, (4, FRAMES, SIZE, SIZE, 4)), *masks]
    assert seen == [(4, 3, FRAMES, SIZE, SIZE)] * 6, "the clips, and what is known of them: an image, two boxes, ..."
    here, there = stored(tmp_path / "here"), stored(tmp_path / "there")
    assert here.keys() == there.keys()
    for name, tensors in here.items():
        assert all(torch.equal(tensor, there[name][what]) for what, tensor in tensors.items())


def test_transfers_without_masks(videos, tmp_path, monkeypatch):
    """Without mask types, only the frames are copied to the device."""
    monkeypatch.setattr(clip_encoder, "Transfer", Elsewhere)
    encode(videos, tmp_path / "out", shard_clips=64)
    assert made[-1].came == [(torch.uint8, (4, FRAMES, SIZE, SIZE, 3))]


def test_encoder_failure(videos, tmp_path):
    """An encoder that fails leaves the finished units, and the same command encodes only the rest."""
    asked = []

    def failing(pixels):
        asked.append(len(pixels))
        if len(asked) == 4:
            raise ValueError("out of memory")
        return pixels[:, :, ::4, ::8, ::8]

    with pytest.raises(ValueError, match=r"^out of memory$"):
        encode(videos, tmp_path / "out", encode_pixels=failing, batch_pixels=1)
    assert len(list((tmp_path / "out").glob("latent-*.tar"))) == 3
    assert not list((tmp_path / "out").glob(".*.tmp"))
    encode(videos, tmp_path / "out", encode_pixels=failing, batch_pixels=1)
    assert sum(asked) == 5
    encode(videos, tmp_path / "fresh")
    for path in (tmp_path / "fresh").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_encoder_failure_hung_decoder(videos, tmp_path):
    """An encoder that fails does not wait for a decoder that hangs."""
    keys = [sample.key for sample in read_video_shards(videos, read_manifest(videos, "video"))]

    def hangs(request):
        if request["key"] in keys[2:]:
            time.sleep(100)
        yield from read_clips(request)

    def failing(pixels):
        raise ValueError("out of memory")

    began = time.monotonic()
    with pytest.raises(ValueError, match=r"^out of memory$"):
        encode(videos, tmp_path / "out", encode_pixels=failing, read=hangs, timeout=90.0, batch_pixels=1)
    assert time.monotonic() - began < 60
    assert not {thread.name for thread in threading.enumerate()} & {"prefetch", "storing", "decoders"}


def test_full_disk(videos, tmp_path, monkeypatch):
    """A full disk ends the command with an error that names the file, though another thread writes."""

    def full(*_):
        raise ValueError("latent-0: no space left on the device")

    monkeypatch.setattr("wantrain.data.latents.store.UnitWriter.write", full)
    with pytest.raises(ValueError, match="no space left on the device"):
        encode(videos, tmp_path / "out", batch_pixels=1)
    assert not list((tmp_path / "out").glob("*.tar"))


# ------------------------------------------------------------------------------------------- precision, in identities


def test_vae_precision(videos, tmp_path):
    """Latents of another VAE precision are encoded anew, and those of fp32 keep their settings and identities."""
    asked = []

    def counting(pixels):
        asked.append(len(pixels))
        return pixels[:, :, ::4, ::8, ::8]

    def again(out, **changes):
        asked.clear()
        manifest = encode(videos, out, encode_pixels=counting, **changes)
        return sum(asked), manifest

    first, before = again(tmp_path / "out")
    assert (first, again(tmp_path / "out", vae_precision="fp32")[0]) == (4, 0)
    assert "vae_precision" not in before["settings"], "or finished folders would count as unfinished"
    half, manifest = again(tmp_path / "out", vae_precision="bf16")
    assert (half, manifest["settings"]["vae_precision"], manifest["vae_fingerprint"]) == (4, "bf16", "vae")
    assert again(tmp_path / "out", vae_precision="bf16")[0] == 0
    back, after = again(tmp_path / "out")
    assert (back, after) == (4, before)


@pytest.mark.parametrize(
    ("inputs", "identities"),
    [
        (ConditioningInputs({}, "none"), ["f063a8c0497ca1150db241075b083450", "4a82b249f9df0c4e8ca0d195119787c1"]),
        (ConditioningInputs({"image": 1}, "channel_concat"), ["91df66d02ad3bc1522860373029b2fa3", "9d619b62abfbaefba9eb6e078c6cd86d"]),
    ],
)  # fmt: skip
def test_clip_identities(inputs, identities):
    """The identities of clips are those of existing folders, as commit 2dad2c4 computed them.

    Other identities would encode every folder anew.
    """
    windows = [{"start": 0.0, "num_frames": 17}, {"start": 1.5, "num_frames": 9}]
    about = {"caption": "a cat", "source": "cat.mp4", "sha256": "ab" * 32, "fps": 16.0, "height": 480, "width": 832}
    entry = VideoEntry("0123456789abcdef", "mp4", "video.tar", 512, 100, {**about, "windows": windows})
    rows = clip_rows(entry, geometry.Buckets((4096,), (1.0,), 16), inputs, "0011223344556677")
    assert [row.identity for row in rows] == identities
