"""train.py and export.py with weights in bfloat16: continued exactly, averaged in float32, exported as asked."""

import pytest
import torch

from wantrain.models.formats.weights import read_file

BF16 = ("precision=bf16", "trained.dtype=bf16", "batch_size=4", "ema=0.9", "checkpoint.every=2", "steps=4")
HOW = {
    "kahan": ("trained.rounding=kahan",),
    "in backward": ("optimizer=adafactor", "update_in_backward=true", "clip_by=parameter", "recompute=block"),
}


def tensors(run):
    """Every tensor of a run's last checkpoint, by file and name."""
    folder = run / "checkpoints" / "step_000004"
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{path.relative_to(folder)}/{key}": value for path in files for key, value in read_file(path)[0].items()}


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_trained_continued_exported(how, tiny, pair, call, tmp_path):
    """A cut run is the unbroken one bit for bit: weights, average and optimizer. Exports have the dtype asked for."""
    settings = (*tiny.train, f"weights={pair}", *BF16, *HOW[how])
    call("train.py", *settings, "run=cut", "stop_after=2")
    said = call("train.py", *settings, "run=cut")
    assert "step 2 of 4" in said.stdout + said.stderr
    call("train.py", *settings, "run=whole")
    cut, whole = tensors(tmp_path / "runs" / "cut"), tensors(tmp_path / "runs" / "whole")
    assert cut.keys() == whole.keys()
    assert not [key for key in whole if not torch.equal(cut[key], whole[key])]
    weights = {key: value.dtype for key, value in whole.items() if key.startswith("transformer")}
    assert set(weights.values()) == {torch.bfloat16, torch.float32}
    averages = {key: value for key, value in whole.items() if key.startswith("ema/")}
    assert {value.dtype for value in averages.values()} == {torch.float32}
    assert any(not torch.equal(value, value.bfloat16().float()) for key, value in averages.items() if "ffn" in key)
    assert any(key.endswith("/compensation") for key in whole) == (how == "kahan")
    refused = call("train.py", *settings, "trained.dtype=fp32", "run=cut", check=False)
    assert refused.returncode == 2
    for dtype in ("fp32", "bf16"):
        call("export.py", "run=whole", f"weights={pair}", f"out={dtype}", f"dtype={dtype}")
        (file,) = (tmp_path / dtype / "transformer_2").glob("*.safetensors")
        kinds = {value.dtype for key, value in read_file(file)[0].items() if "ffn" in key}
        assert kinds == {torch.float32 if dtype == "fp32" else torch.bfloat16}
