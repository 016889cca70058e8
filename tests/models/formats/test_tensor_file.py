"""Files of tensors are what the safetensors library writes, byte for byte, and hashed on the way, without a copy."""

import hashlib
import io
import json
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
import pytest
import safetensors.torch
import torch

from wantrain.models.formats import tensor_file
from wantrain.models.formats.tensor_file import DTYPES, Hasher, pieces
from wantrain.models.formats.weights import PADDING, write_file, write_part
from wantrain.util.files import file_hash
from wantrain.util.progress import listening

NOTES = {"expert": "low_noise", "base": 'a "name" \\ \n \x01 \x7f \u2028 é 中', "rank": "4"}


def tensors_of_all_kinds():
    """Every dtype, in shapes with and without elements, named so that no order is right by chance."""
    shapes = {"z": (), "a": (3, 5), "é": (0, 4), "m.weight": (2, 1, 7)}
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, shape in shapes.items():
        for number, dtype in enumerate(DTYPES):
            values = torch.randint(0, 2, shape, generator=generator) if dtype == torch.bool else None
            values = torch.randn(shape, generator=generator) * 40 if values is None else values
            made[f"{name}{number * 7 % 18}"] = values.abs().to(dtype) if not dtype.is_complex else values.to(dtype)
    made["turned"] = torch.arange(12.0).view(3, 4).t()
    made["trained"] = torch.ones(3, requires_grad=True)
    return made


def of_safetensors(tensors, about, *, aligned):
    """What the library writes, its metadata put in order; aligned by trying how many spaces it takes."""
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    for spaces in range(64):
        said = {**about, PADDING: " " * spaces} if aligned else about
        written = safetensors.torch.save(plain, metadata=said)
        length = int.from_bytes(written[:8], "little")
        header = json.loads(written[8 : 8 + length])
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if not aligned or (8 + len(text)) % 64 == 0:
            return written[:8] + text.ljust(length) + written[8 + length :]
    raise AssertionError("no number of spaces aligns it")


@pytest.mark.parametrize("aligned", [False, True])
def test_bytes_and_hash(aligned, tmp_path):
    """The bytes equal those of the safetensors library, and the hash is that of the file."""
    tensors, path = tensors_of_all_kinds(), tmp_path / "x.safetensors"
    digest = write_file(path, tensors, NOTES, aligned=aligned)
    written = path.read_bytes()
    assert written == of_safetensors(tensors, {"format": "pt", **NOTES}, aligned=aligned)
    assert digest == hashlib.sha256(written).hexdigest()
    read = safetensors.torch.load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        wanted = tensor.detach().reshape(-1).view(torch.uint8)  # as bytes, which compare for every dtype
        assert torch.equal(read[name].reshape(-1).view(torch.uint8), wanted)


@pytest.mark.parametrize("aligned", [False, True])
def test_file_without_tensors_or_notes(aligned, tmp_path):
    """Files without tensors or without metadata equal those of the safetensors library too."""
    for tensors in ({}, {"w": torch.ones(2)}):
        write_file(tmp_path / "x.safetensors", tensors, aligned=aligned)
        written = (tmp_path / "x.safetensors").read_bytes()
        assert written == of_safetensors(tensors, {"format": "pt"}, aligned=aligned)


def test_large_tensors_in_pieces(tmp_path, monkeypatch):
    """Tensors larger than a piece are written in several pieces, and each piece is reported."""
    monkeypatch.setattr(tensor_file, "PIECE", 1000)
    tensors = {"long": torch.arange(5000.0), "turned": torch.arange(900.0).view(30, 30).t(), "short": torch.ones(3)}
    doing = []
    with listening(doing.append):
        digest = write_file(tmp_path / "x.safetensors", tensors)
    assert digest == file_hash(tmp_path / "x.safetensors")
    read = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    written = [told for told in doing if told == f"writing {tmp_path / 'x.safetensors'}"]
    assert len(written) == 1 + 20 + 4 + 1, "whoever watches hears of every piece"


def test_host_tensor_not_copied():
    """A contiguous tensor on the host is written without a copy."""
    tensor = torch.arange(64.0)
    _, piece = pieces(b"head", iter([tensor]))
    assert np.frombuffer(piece, np.uint8).ctypes.data == tensor.data_ptr()


class Disk(io.BytesIO):
    """A file that takes everything and keeps nothing, or refuses everything."""

    def __init__(self, refuses):
        super().__init__()
        self.refuses = refuses

    def write(self, data):
        if self.refuses:
            raise OSError(28, "No space left on device")
        return len(data)


def test_copies_bounded(tmp_path):
    """Tensors that need a copy, from a device or transposed as here, are copied a few at a time."""
    mebibytes, count = 16, 24
    tensors = {str(number): torch.ones(2048, 2048).t() for number in range(count)}
    resident = psutil.Process().memory_info
    before, peaks = resident().rss, []
    with (
        listening(lambda doing: peaks.append(resident().rss)),
        mock.patch.object(Path, "open", lambda *_, **__: Disk(refuses=False)),
    ):
        write_file(tmp_path / "x.safetensors", tensors)
    assert max(peaks) - before < (count // 2) * mebibytes << 20


def test_hash_in_thread(monkeypatch):
    """The hash is computed in a thread beside the writing and lags by a bounded number of pieces."""
    started, gate = [], tensor_file.threading.Event()

    class Slow:
        def update(self, piece):
            started.append(bytes(piece))
            gate.wait(10)

    hasher = Hasher()
    hasher.digest = Slow()
    with hasher:
        for number in range(1 + tensor_file.BEHIND):  # none of them waits: the first is being hashed
            hasher.add(memoryview(bytes([number])))
            while not started:
                pass
        assert started == [b"\0"] and hasher.waiting.full()
        gate.set()
    assert started == [bytes([number]) for number in range(1 + tensor_file.BEHIND)]


def test_failed_write_ends_thread(tmp_path):
    """A failed write leaves no thread behind."""
    before = tensor_file.threading.active_count()

    with (
        mock.patch.object(Path, "open", lambda *_, **__: Disk(refuses=True)),
        pytest.raises(OSError, match="No space left"),
    ):
        write_file(tmp_path / "x.safetensors", {"a": torch.ones(1000)})
    assert tensor_file.threading.active_count() == before


def test_unsupported_dtype(tmp_path):
    """The error for a dtype that the format does not support names it, and no file is written."""
    with pytest.raises(ValueError, match=r"x.safetensors cannot hold torch.complex128: .* convert it first"):
        write_file(tmp_path / "x.safetensors", {"a": torch.ones(2, dtype=torch.complex128)})
    assert not list(tmp_path.iterdir())


def test_sharded_part_hashes(tmp_path):
    """A part in several files returns the hash of each file."""
    tensors = {str(number): torch.full((100,), float(number)) for number in range(5)}
    hashes = write_part(tmp_path, {"a": 1}, tensors, shard_bytes=800)
    assert len(hashes) == 3 and set(hashes) == set(tmp_path.glob("*.safetensors"))
    assert all(file_hash(path) == digest for path, digest in hashes.items())
