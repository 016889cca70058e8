"""Checkpoints of a small known content, and a child process that may die: shared by the checkpoint tests."""

import io
import json
import os
import traceback

import pytest
import torch

from wantrain.models.formats.weights import read_file, write_file, write_part
from wantrain.runs.checkpoint import Checkpoints


def content(value, numbers=64):
    """write(folder) as a run has it: a part with its config, the optimizer's tensors beside it, and a folder more."""

    def write(folder):
        hashes = write_part(folder / "transformer", {"value": value}, {"w": torch.full((numbers,), float(value))})
        path = folder / "optimizer.safetensors"
        hashes[path] = write_file(path, {"w/exp_avg": torch.full((numbers,), -float(value))})
        (folder / "more").mkdir()
        (folder / "more" / "notes.txt").write_text("not synced by whoever wrote it")
        return hashes

    return write


def value_of(folder):
    """What `content` wrote; every tensor must agree."""
    tensors = read_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")[0]["w"]
    moments = read_file(folder / "optimizer.safetensors")[0]["w/exp_avg"]
    assert tensors.unique().tolist() == [-moments[0]] and (moments == moments[0]).all()
    assert json.loads((folder / "transformer" / "config.json").read_text()) == {"value": tensors[0].item()}
    return tensors[0].item()


def store(folder, **settings):
    """Checkpoints in `folder`, made ready."""
    checkpoints = Checkpoints(folder, **{"keep": 2, **settings})
    checkpoints.prepare()
    return checkpoints


def steps(checkpoints):
    return [int(path.name.removeprefix("step_")) for path in checkpoints.complete()]


def hidden(folder):
    return sorted(path.name for path in folder.glob(".*"))


KILLED = 9
OPEN = io.open


def in_child(work):
    """What `work()` returns, as json, run in a forked child, which may lower its own limits; None if it was KILLED."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, json.dumps(work()).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED), "the child broke; its traceback is above"
    return json.loads(said) if code == 0 else None


def refused(work, *args, **kwargs):
    """The message of the ValueError that work(...) raises."""
    with pytest.raises(ValueError) as error:
        work(*args, **kwargs)
    return str(error.value)


both = pytest.mark.parametrize("background", [False, True], ids=["at once", "background"])
