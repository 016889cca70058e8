"""Identities: what files hold, wherever they lie; and notes of what was found out about them."""

import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from wantrain.models import Base
from wantrain.models.formats.fingerprints import MOST_NOTES, NOTES, WHOLE, Fingerprints, identity, identity_of


@pytest.fixture(scope="module")
def tensors():
    """Six matrices of 1 MiB and a small vector after each: a file of them is read in samples."""
    generator = torch.Generator().manual_seed(0)
    large = {f"layer.{number}": torch.randn(512, 512, generator=generator) for number in range(6)}
    return large | {f"{name}.norm": torch.randn(64, generator=generator) for name in large}


def written(path, tensors, **metadata):
    save_file(tensors, path, metadata=metadata)
    assert path.stat().st_size > WHOLE
    return path


def test_identity_ignores_place_and_time(tensors, tmp_path):
    """An identity does not depend on folder, file name or time; it depends on the set of files and the precision."""
    one = written(tmp_path / "one.safetensors", tensors)
    (tmp_path / "elsewhere").mkdir()
    other = shutil.copy(one, tmp_path / "elsewhere" / "renamed.safetensors")
    os.utime(other, (0, 0))
    assert identity_of([one]) == identity_of([other])
    small = tmp_path / "config.json"
    small.write_text("{}")
    assert identity_of([one, small]) == identity_of([small, one]) != identity_of([one])
    assert identity_of([one], "bf16") != identity_of([one], "fp32")


@pytest.mark.parametrize("name", [f"layer.{number}{kind}" for number in range(6) for kind in ("", ".norm")])
def test_identity_of_tensor_values(name, tensors, tmp_path):
    """A change of one tensor changes the identity."""
    one = identity_of([written(tmp_path / "one.safetensors", tensors)])
    changed = {**tensors, name: tensors[name] * 1.001}
    assert identity_of([written(tmp_path / "two.safetensors", changed)]) != one


def test_identity_of_shape_dtype_name(tensors, tmp_path):
    """Another shape, dtype or name for the same bytes changes the identity."""
    one = identity_of([written(tmp_path / "one.safetensors", tensors)])
    others = [
        {name: tensor.reshape(2, -1) for name, tensor in tensors.items()},
        {name: tensor.view(torch.int32) for name, tensor in tensors.items()},
        {f"{name}x": tensor for name, tensor in tensors.items()},
    ]
    assert len({one, *(identity_of([written(tmp_path / "two.safetensors", other)]) for other in others)}) == 4


def test_identity_of_pickle(tensors, tmp_path):
    """One element of a pickle changes the identity: its archive ends with the checksum of every tensor."""
    path = tmp_path / "models_t5.pth"
    torch.save(tensors, path)
    one = identity_of([path])
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    changed["layer.3"][7, 11] += 1
    torch.save(changed, path)
    assert identity_of([path]) != one


def test_identity_of_small_file(tmp_path):
    """Every byte of a small file counts for the identity; an absent file is named."""
    path = tmp_path / "config.json"
    path.write_bytes(b"a" * 1000)
    one = identity_of([path])
    path.write_bytes(b"a" * 999 + b"b")
    assert identity_of([path]) != one
    with pytest.raises(ValueError, match=r"absent\.json cannot be read"):
        identity_of([tmp_path / "absent.json"])


def test_encoder_identity(tiny, tmp_path):
    """The identity of an encoder covers the files that loading reads and the precision it runs in."""
    here, there = Base(tiny.base), Base(tmp_path / "copy")
    shutil.copytree(tiny.base, tmp_path / "copy")
    for part in ("vae", "text_encoder"):
        ((tmp_path / "copy") / part / "README.md").write_text("not read")
        assert identity(here, part, torch.float32) == identity(there, part, torch.float32)
    assert identity(here, "text_encoder", torch.bfloat16) != identity(here, "text_encoder", torch.float32)
    assert identity(here, "vae", torch.bfloat16) == identity(here, "vae", torch.float32), "it always runs in fp32"
    words = tmp_path / "copy" / "tokenizer" / "tokenizer.json"
    words.write_text(words.read_text() + "\n")
    assert identity(here, "text_encoder", torch.float32) != identity(there, "text_encoder", torch.float32)
    with pytest.raises(ValueError, match="holds no vae"):
        identity(Base(tmp_path), "vae", torch.float32)


def test_notes_by_identity(tmp_path):
    """Notes are kept by identity, and the oldest are dropped."""
    looked = []

    def look():
        looked.append(1)
        return {"found": len(looked)}

    notes = Fingerprints(tmp_path)
    notes.of("vae", "a", look)
    notes.write()
    before = len(looked)
    again = Fingerprints(tmp_path)
    assert ("vae", "a") in again and ("text encoder", "a") not in again
    again.of("vae", "a", look)
    assert len(looked) == before
    for number in range(MOST_NOTES):
        later = Fingerprints(tmp_path)
        later.of("vae", str(number), look)
        later.write()
    last = Fingerprints(tmp_path)
    assert ("vae", "a") not in last and ("vae", str(MOST_NOTES - 1)) in last and ("vae", "0") in last
    assert (tmp_path / NOTES).is_file()


def test_unchanged_notes_not_written(tmp_path):
    """Notes without changes are not written again."""
    notes = Fingerprints(tmp_path)
    notes.of("vae", "a", dict)
    notes.write()
    (tmp_path / NOTES).touch()
    before = (tmp_path / NOTES).stat().st_mtime_ns
    again = Fingerprints(tmp_path)
    again.of("vae", "a", dict)
    again.write()
    assert (tmp_path / NOTES).stat().st_mtime_ns == before
