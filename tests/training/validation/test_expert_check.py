"""Which expert a file holds is measured where nothing says it: wan-tiny's own pair, right and swapped."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from wantrain.data import LatentData
from wantrain.demo.footage import make_footage
from wantrain.models import Base
from wantrain.models.formats.weights import read_file
from wantrain.training.validation import expert_check
from wantrain.util.distributed import DataRanks

ASSETS = Path(__file__).resolve().parents[3] / "assets" / "wan-tiny"
EXPERTS = ("high_noise", "low_noise")


@pytest.fixture(scope="module")
def latents(command, tmp_path_factory):
    """A few clips of what wan-tiny was trained on, at its own size."""
    folder = tmp_path_factory.mktemp("known")
    make_footage(folder / "footage", num_videos=4, num_images=0, seed=5)
    command("shard.py", "source=footage", "out=videos", cwd=folder)
    command("encode.py", "shards=videos", "out=latents", f"weights={ASSETS}", cwd=folder)
    return folder / "latents"


@pytest.fixture(scope="module")
def profiles(latents):
    data = LatentData(shards=latents, holdout=0.0)
    trainers = np.flatnonzero(data.buckets == data.buckets[0])[:4]
    batch = data.load(trainers, np.arange(len(trainers)))

    def of(name):
        module = Base(ASSETS).transformer(name)
        stepper = SimpleNamespace(
            module=module,
            device=torch.device("cpu"),
            forward_context=nullcontext,
            gather=lambda x: x,
            data_ranks=DataRanks(),
            part=lambda: None,
        )
        return expert_check.measure(stepper, batch, boundary=0.875, shift=3.0, seed=0)

    return {name: of(name) for name in EXPERTS}


def test_swapped_experts(profiles):
    """Each expert is recognised, and each swap is noticed."""
    for name, other in (EXPERTS, EXPERTS[::-1]):
        assert profiles[name].says(name) is None
        assert f"it looks like the {name} expert" in profiles[name].says(other)


def test_profile_windows(profiles):
    """The profile covers the noise windows of both experts."""
    levels = profiles["low_noise"].errors
    assert all(0.875 <= sigma <= 1 for sigma in levels["high_noise"])
    assert all(0 < sigma < 0.875 for sigma in levels["low_noise"])
    assert len(levels["high_noise"]) == len(levels["low_noise"]) == expert_check.POINTS
    assert "at sigma 0.9" in str(profiles["low_noise"])


def unnamed(expert, folder):
    """An expert in a file that says nothing of itself."""
    path = folder / "unnamed.safetensors"
    model = Base(ASSETS).transformer(expert)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    assert read_file(path)[1] == {}
    return path


def one_step(latents):
    """train.py for one step of wan-tiny's low-noise expert."""
    size = ("tracker=jsonl", "steps=1", "batch_size=2", "validation.every=1000", "data.holdout=0")
    return ("train.py", "expert=low_noise", f"weights={ASSETS}", f"data.shards={latents}", *size)


def test_wrong_expert(latents, call, tmp_path):
    """Training with the wrong expert warns, or stops with check_expert=stop."""
    wrong, right = tmp_path / "wrong", tmp_path / "right"
    wrong.mkdir(), right.mkdir()
    given = one_step(latents)
    high, low = unnamed("high_noise", wrong), unnamed("low_noise", right)
    said = call(*given, f"parts.low_noise={high}", "run=warned").stdout
    assert "warning: expert=low_noise: this model is" in said and "it looks like the high_noise expert" in said
    error = call(*given, f"parts.low_noise={high}", "run=stopped", "check_expert=stop", check=False).error
    assert "it looks like the high_noise expert" in error and "check_expert=off if you know better" in error
    assert "check_expert" not in call(*given, f"parts.low_noise={high}", "run=off", "check_expert=off").stdout
    said = call(*given, f"parts.low_noise={low}", "run=fine").stdout
    assert "check_expert: error beside the best linear predictor's" in said and "warning" not in said


def test_unchecked_models(latents, call, tmp_path):
    """A model from Wan2.1 or from random values is not measured."""
    dense = tmp_path / "wan21" / "transformer"
    shutil.copytree(ASSETS / "transformer", dense)
    file = next(dense.glob("*.safetensors"))
    save_file(read_file(file)[0], file, metadata={"format": "pt", "expert": "dense"})
    given = one_step(latents)
    said = call(*given, f"parts.low_noise={dense}", "run=from_wan21").stdout
    assert f"low_noise starts from {dense}" in said and "check_expert" not in said
    said = call(*given, "init=scratch", "run=from_nothing").stdout
    assert "low_noise starts from random values" in said and "check_expert" not in said
