"""A file that several processes write together is the one that a single process would have written."""

import pytest
import torch

from wantrain.models.formats.joint_file import Slice, create_file, fill_file
from wantrain.models.formats.weights import read_files, write_file, write_files

TENSORS = {
    "matrix": torch.arange(35, dtype=torch.float32).view(5, 7),
    "narrow": torch.arange(12).bfloat16().view(3, 4),
    "row": torch.arange(6, dtype=torch.float32).view(1, 6),
    "scalar": torch.tensor(7.0),
}


def slices(rank, processes, tensors=TENSORS):
    """The even parts of rank `rank` of so many; some are empty."""
    parts = {}
    for name, tensor in tensors.items():
        start, end = (tensor.numel() * each // processes for each in (rank, rank + 1))
        values = tensor.flatten()[start:end].clone()
        parts[name] = Slice(tensor.shape, tensor.dtype, start, end - start, lambda values=values: values)
    return parts


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_same_bytes(processes, tmp_path):
    """Filled by any number of processes in any order, it has the bytes of the file that one process writes."""
    about = {"expert": "dense", "none": None}
    create_file(tmp_path / "joint", slices(0, processes), about)
    for rank in reversed(range(processes)):
        fill_file(tmp_path / "joint", slices(rank, processes))
    write_file(tmp_path / "alone", TENSORS, about, aligned=True)
    assert (tmp_path / "joint").read_bytes() == (tmp_path / "alone").read_bytes()


def test_several_files(tmp_path):
    """Beyond the largest size tensors go into several files with an index, which are read back under one name."""
    files = write_files(tmp_path, "state", slices(0, 2), shard_bytes=100, write=create_file)
    assert len(files) == 2 and (tmp_path / "state.safetensors.index.json").is_file()
    for path in files:
        for rank in (0, 1):
            fill_file(path, slices(rank, 2))
    read = read_files(tmp_path, "state")
    assert read.keys() == TENSORS.keys() and all(torch.equal(read[key], value) for key, value in TENSORS.items())


def test_unknown_dtype(tmp_path):
    """A dtype that the format does not have is an error before anything is written."""
    part = Slice(torch.Size([1]), torch.complex128, 0, 1, lambda: torch.zeros(1, dtype=torch.complex128))
    with pytest.raises(ValueError, match=r"cannot hold torch\.complex128"):
        create_file(tmp_path / "joint", {"a": part}, None)
    assert not (tmp_path / "joint").exists()
