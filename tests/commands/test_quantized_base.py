"""train.py and export.py with a base in 8 or 4 bits: trained, continued, merged into the unquantised weights."""

import pytest
import torch
from safetensors.torch import save_file

from wantrain.models import Base, load_transformer
from wantrain.models.formats.lora import read_lora

LORA = ("adapter=lora", "adapter.rank=4", "optimizer.lr=1e-2", "batch_size=4", "checkpoint.every=2")


def merged(model, lora):
    """The model with the LoRA's changes added by hand."""
    for name, layer in lora.layers.items():
        model.get_submodule(name).weight.data += layer.alpha / layer.rank * (layer.up @ layer.down)
    return model.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "words"),
    [
        (["base.dtype=int8"], "int8"),
        (["base.dtype=nf4", "base.low_rank=8"], "nf4, each beside a product of rank 8"),
    ],
)
def test_trained_continued_exported(base, words, tiny, pair, call, tmp_path):
    """A run over a quantised base is continued exactly, and exports into the base's own unquantised weights."""
    settings = (*tiny.train, f"weights={pair}", *LORA, *base, "steps=4")
    said = call("train.py", *settings, "run=cut", "stop_after=2")
    assert f"low_noise: the frozen weights of the blocks are stored in {words}" in said.stdout + said.stderr
    call("train.py", *settings, "run=cut")
    call("train.py", *settings, "run=whole")
    loras = [
        read_lora(tmp_path / "runs" / run / "checkpoints" / "step_000004" / "adapter.safetensors")
        for run in ("cut", "whole")
    ]
    for name, layer in loras[0].layers.items():
        assert torch.equal(layer.up, loras[1].layers[name].up), name
        assert layer.up.abs().max() > 0
    refused = call("train.py", *settings, "run=cut", "base.dtype=fp8", check=False)
    assert refused.returncode == 2
    assert "run cut exists with another config" in refused.stderr
    assert "base.dtype" in refused.stderr
    call("export.py", "run=whole", f"weights={pair}", "out=out", "dtype=fp32")
    found = load_transformer(tmp_path / "out", part="transformer_2").state_dict()
    wanted = merged(Base(pair).transformer("low_noise"), loras[1])
    for key, value in found.items():
        assert torch.allclose(value, wanted[key], atol=1e-6), key


@pytest.mark.slow
def test_fp8_file_trained_and_exported(tiny, pair, call, tmp_path):
    """An fp8 file is trained on with nothing said about it, and its LoRA is merged into the file's values, as said."""
    tensors = Base(pair).transformer("low_noise").state_dict()
    narrow = {key: value.to(torch.float8_e4m3fn) if ".ffn." in key else value for key, value in tensors.items()}
    save_file(narrow, tmp_path / "base_low_noise.safetensors")
    parts = f"parts.low_noise={tmp_path / 'base_low_noise.safetensors'}"
    call("train.py", *tiny.train, f"weights={pair}", parts, *LORA, "steps=2", "run=narrow")
    said = call("export.py", "run=narrow", f"weights={pair}", "out=out", "dtype=fp32")
    assert "is stored in fp8: its values are used in float32" in said.stdout + said.stderr
    lora = read_lora(tmp_path / "runs" / "narrow" / "checkpoints" / "step_000002" / "adapter.safetensors")
    full = load_transformer(pair, part="transformer_2")
    full.load_state_dict({key: value.float() for key, value in narrow.items()})
    found, wanted = load_transformer(tmp_path / "out", part="transformer_2").state_dict(), merged(full, lora)
    for key, value in found.items():
        assert torch.allclose(value, wanted[key], atol=1e-6), key


@pytest.mark.slow
def test_two_processes(tiny, pair, launch, call, tmp_path):
    """Under DDP the adapter is that of one process, within rounding."""
    settings = (*tiny.train, f"weights={pair}", *LORA, "base.dtype=nf4", "steps=2")
    launch("ddp", *settings, "run=two")
    call("train.py", *settings, "run=one")
    one, two = (
        read_lora(tmp_path / "runs" / run / "checkpoints" / "step_000002" / "adapter.safetensors").layers
        for run in ("one", "two")
    )
    for name, layer in one.items():
        assert torch.allclose(layer.up, two[name].up, atol=1e-4), name
        assert layer.up.abs().max() > 1e-3
