"""A model with a conditioning tensor of its own is added by adding files (tests/training/camera), and edits none."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from wantrain.models import WanTransformer
from wantrain.util.seeds import seed_at

FILES = Path(__file__).resolve().parent / "camera"
NEW = (f"hydra.searchpath=[file://{FILES / 'conf'}]", "model=tiny_camera", "data=camera", "expert=dense")


@pytest.fixture
def train(tiny, call, monkeypatch):
    monkeypatch.syspath_prepend(str(FILES))

    def run(*more):
        own = [setting for setting in tiny.train if not setting.startswith("validation.every")]
        call("train.py", *NEW, *own, "batch_size=4", "data.holdout=0.3", "optimizer.lr=1e-2", *more)

    return run


def test_new_conditioning(train, tmp_path):
    """A new conditioning tensor reaches the model in training, validation and previews.

    Only the data class names it.
    """
    train("run=camera", "steps=10", "validation.every=5", "sample.every=10", "sample.count=2", "sample.steps=2")
    folder = tmp_path / "runs" / "camera"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 11))
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)
    assert [row["step"] for row in rows if "validation_loss" in row] == [0, 5, 10]
    (file,) = (folder / "checkpoints" / "step_000010").rglob("diffusion_pytorch_model.safetensors")
    weight = load_file(file)["patch_embedding.weight"]
    torch.manual_seed(seed_at(0, "weights", "dense"))
    sizes = {"in_channels": 18, "text_dim": 64, "ffn_dim": 64, "num_layers": 2}
    before = WanTransformer(num_attention_heads=4, attention_head_dim=32, **sizes).patch_embedding.weight
    moved = (weight - before).abs().amax(dim=(0, 2, 3, 4))
    assert weight.shape[1] == 18 and (moved[16:] > 1e-3).all(), "the camera's channels have a gradient"
    assert len(list((folder / "samples").glob("*.mp4"))) == 4, "two clips, before and after"
