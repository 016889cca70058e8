"""In which precision encode.py's VAE computes: float32 without TF32, or bfloat16, and how far the two are apart."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load

from wantrain.data.footage.clips import Window
from wantrain.data.footage.probe import probe, read_windows
from wantrain.demo.judge import spared_scenes
from wantrain.models import WanVAE, load_vae
from wantrain.models.precision import computing_in
from wantrain.video import to_pixels

CPU = torch.device("cpu")
VAE = Path(__file__).resolve().parents[2] / "assets" / "wan-tiny" / "vae"


def settings():
    """What TF32 may do, and whether autocast is on."""
    tf32 = (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision)
    return tf32, torch.is_autocast_enabled("cpu")


@pytest.fixture
def tf32():
    """Convolutions may take TF32, whatever an earlier test has left."""
    before, torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.conv.fp32_precision, "tf32"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def test_float32_without_tf32(tf32):
    """float32 runs without TF32, and the process settings are restored, after an exception too."""
    before = settings()
    with computing_in(torch.float32, CPU):
        assert settings() == (("ieee", "ieee"), False)
    assert settings() == before
    with pytest.raises(ValueError, match="no"), computing_in(torch.float32, CPU):
        raise ValueError("no")
    assert settings() == before


def test_no_torch_warnings():
    """torch gives no warning, and its old TF32 flags can still be read.

    The process is new, with torch's defaults: convolutions may take TF32 there.
    """
    program = (
        "import torch\n"
        "from wantrain.models.precision import computing_in\n"
        "assert torch.backends.cudnn.conv.fp32_precision == 'tf32'\n"
        "with computing_in(torch.float32, torch.device('cpu')):\n"
        "    torch.nn.Conv3d(3, 3, 1)(torch.ones(1, 3, 1, 2, 2)) @ torch.ones(2, 2)\n"
        "assert torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32\n"
    )
    ended = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_bfloat16_autocast():
    """bfloat16 is autocast: activations are bf16 and weights stay float32."""
    vae = WanVAE(base_dim=4)
    before = settings()
    with computing_in(torch.bfloat16, CPU):
        assert settings() == (before[0], True)
        inner = vae.encoder.mid_block.resnets[0].conv1(torch.randn(1, 16, 1, 4, 4), _Whole())
    assert inner.dtype == torch.bfloat16 and settings() == before
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.float32}


class _Whole:
    """The stream of a clip that is one frame."""

    first = last = True


# ------------------------------------------------------------------------------------------- how far they are apart


def apart(vae, pixels):
    """Of bf16 latents against fp32 ones: the root mean square and the largest error, and the former of storing alone;
    all in units of the latents' own root mean square."""
    with torch.inference_mode():
        with computing_in(torch.float32, CPU):
            exact = vae.encode(pixels)
        with computing_in(torch.bfloat16, CPU):
            half = vae.encode(pixels)
    assert half.dtype == torch.float32 and not torch.equal(half, exact)
    scale = exact.square().mean().sqrt()
    stored = (exact.bfloat16().float() - exact).square().mean().sqrt()
    return [float(each / scale) for each in ((half - exact).square().mean().sqrt(), (half - exact).abs().max(), stored)]


def test_bf16_latents_of_wan_tiny():
    """bf16 latents are near the exact ones.

    docs/numerics.md: under 1 % of a latent's size, some four times the error of bf16 storage.
    """
    frames = np.stack([scene.frames(64, 64, fps=16, num_frames=9) for scene, _ in spared_scenes(4)])
    error, largest, stored = apart(load_vae(VAE), to_pixels(torch.from_numpy(frames)))
    assert 0.003 < error < 0.012 and largest < 0.08
    assert 0.001 < stored < 0.002


@pytest.mark.skipif("WANTRAIN_FOOTAGE" not in os.environ, reason="WANTRAIN_FOOTAGE names no folder of real footage")
@pytest.mark.parametrize("name", ["dog", "hiker", "motorcycle", "skeleton", "warehouse"])
def test_bf16_latents_of_real_footage(name):
    """bf16 latents of real footage are near the exact ones."""
    path = Path(os.environ["WANTRAIN_FOOTAGE"]) / f"{name}.mp4"
    frames = next(read_windows(path, probe(path), [Window(0.0, 17)], 16.0, (96, 160)))
    error, largest, stored = apart(load_vae(VAE), to_pixels(torch.tensor(frames))[None])
    print(f"{name}: {error:.4%} of the latents' size, at most {largest:.4%}; storing alone {stored:.4%}")
    assert 0.002 < error < 0.012 and largest < 0.06 and stored < 0.002


# ------------------------------------------------------------------------------------------- encode.py


def latents(folder):
    """The latents of every clip in a folder, by its name."""
    found = {}
    for path in folder.glob("latent-*.tar"):
        with tarfile.open(path) as tar:
            names = [name for name in tar.getnames() if name.endswith(".safetensors")]
            found.update({name: load(tar.extractfile(name).read())["latents"].float() for name in names})
    return found


def test_vae_precision_setting(tiny, call, tmp_path):
    """encode.py computes in vae_precision and keeps the latents of each precision apart.

    fp32 is there already; bf16 makes all latents anew and no text; fp32 again gives the same bytes.
    """
    mine, encode, seen = Path(shutil.copytree(tiny.latents, tmp_path / "latents")), WanVAE.encode, []

    def watched(self, pixels):
        seen.append(settings())
        return encode(self, pixels)

    def run(*more):
        seen.clear()
        with mock.patch.object(WanVAE, "encode", watched):
            return call(
                "encode.py", f"shards={tiny.videos}", f"out={mine}", f"weights={tiny.base}", "area=1024",
                "report=none", *more
            )  # fmt: skip

    before, bytes_before = latents(mine), {path.name: path.read_bytes() for path in mine.glob("*.tar")}
    outside = settings()
    assert "is finished already" in run().stdout and seen == []
    run("vae_precision=bf16")
    assert seen and all(each == (outside[0], True) for each in seen)
    half = latents(mine)
    assert half.keys() == before.keys()
    for name, tensor in half.items():
        assert 0 < (tensor - before[name]).norm() / before[name].norm() < 0.03
    assert not {name for name in bytes_before if name.startswith("text")} - {path.name for path in mine.glob("*.tar")}
    run()
    assert seen and all(each == (("ieee", "ieee"), False) for each in seen)
    assert settings() == outside
    assert {path.name: path.read_bytes() for path in mine.glob("*.tar")} == bytes_before


def test_unknown_vae_precision(tiny, call):
    """An unknown vae_precision is refused."""
    ended = call("encode.py", f"shards={tiny.videos}", "out=latents", "vae_precision=fp16", check=False)
    assert "vae_precision=fp16 is unknown; choose one of fp32, bf16" in ended.error
