"""What loading and saving a model of 1 GB takes of a process's host memory, under two processes."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from sharded_memory import SIZE

from wantrain.models import WanTransformer
from wantrain.models.formats.weights import read_files, renamed_to_diffusers, write_part

SCRIPT = Path(__file__).resolve().parent.parent.parent / "support" / "sharded_memory.py"
#: A block of the model, in float32.
BLOCK = 70e6


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_memory_of_sharding_engines(engine, tmp_path, environment, launch_command):
    """Loading takes a process's part and at most a block more; a save in the background takes a copy of its part of the
    state, and one that is waited for takes next to nothing.

    On a CPU the part itself, which would be on the device, is in the host's memory too. DeepSpeed's own buffers are
    left out: under ZeRO-3 what is held to a bound is the copy that the processes share.
    """
    torch.manual_seed(0)
    model = WanTransformer(**SIZE)
    size = sum(parameter.numel() for parameter in model.parameters()) * 4
    assert 1e9 < size < 1.1e9
    halves = {name: tensor.bfloat16() for name, tensor in renamed_to_diffusers(model.state_dict()).items()}
    halves["proj_out.weight"].fill_(0.01)
    write_part(tmp_path / "model", model.config(), halves)
    del model, halves
    ended = subprocess.run(
        launch_command(engine, script=SCRIPT), cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=550, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for rank in (0, 1):
        found = json.loads((tmp_path / f"memory_{rank}.json").read_text())
        print(engine, rank, found)
        share = found["share"]
        assert 0.45 * 3 * size < share < 0.55 * 3 * size, "half of weights and both moments"
        assert found["saving"]["at once"] < 0.1 * share
        assert found["saving"]["background"] < 1.2 * share
        if engine == "fsdp2":
            assert found["loading"]["RssAnon"] < size / 2 + BLOCK and found["loading"]["RssShmem"] == 0
        else:
            assert found["loading"]["RssShmem"] < 1.05 * size
    state = read_files(tmp_path / "c" / "step_000002", "optimizer")
    assert sum(tensor.nbytes for tensor in state.values()) == pytest.approx(2 * size, rel=1e-3)
