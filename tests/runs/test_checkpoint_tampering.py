"""A checkpoint that somebody crafted: nothing of it runs, nothing outside is read."""

import json
import os
import pickle
from pathlib import Path
from unittest import mock

import pytest
from checkpoint_helpers import content, refused, store, value_of

from wantrain.models.formats.weights import read_file
from wantrain.runs import checkpoint
from wantrain.runs.checkpoint import STATE, damaged_files, read_state
from wantrain.util.files import file_hash


class Payload:
    """What runs if anybody unpickles it."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def two(tmp_path):
    """Checkpoints of steps 1 and 2."""
    checkpoints = store(tmp_path / "c")
    for step in (1, 2):
        checkpoints.save(step, content(step), {})
    return checkpoints


def rewritten(folder, **changes):
    """state.json with other values."""
    (folder / STATE).write_text(json.dumps({**read_state(folder), **changes}))


@pytest.mark.parametrize("name", ["adapter.pt", "transformer/diffusion_pytorch_model.bin", "x.pkl", "x.pth"])
def test_pickle_refused(name, two, tmp_path):
    """A pickle in a checkpoint is refused and never run."""
    payload = pickle.dumps(Payload(tmp_path / "ran"))
    planted = two.newest() / name
    planted.write_bytes(payload)
    error = refused(two.newest)
    assert f"step_000002 holds {name}, which wantrain did not write; move that elsewhere" in error
    planted.unlink()
    assert value_of(two.newest()) == 2
    # In the place of a file that belongs there, with the hash that fits.
    planted = two.newest() / "optimizer.safetensors"
    planted.write_bytes(payload)
    rewritten(planted.parent, files={**read_state(planted.parent)["files"], planted.name: file_hash(planted)})
    assert "optimizer.safetensors cannot be read as safetensors" in refused(read_file, two.newest() / planted.name)
    assert not (tmp_path / "ran").exists()


def test_planted_index_refused(two):
    """An index that points to other files is refused, and a text note does no harm."""
    (two.newest() / "NOTES.txt").write_text("the good one")
    (two.newest() / ".DS_Store").touch()
    assert value_of(two.newest()) == 2
    index = two.newest() / "transformer" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "../../../x.safetensors"}}))
    assert "holds transformer/model.safetensors.index.json, which wantrain did not write" in refused(two.newest)


def peak():
    """Bytes of this process's memory that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.parametrize("length", [2**60, 2**64 - 1, 10**9])
def test_huge_header(length, two):
    """A header that claims to be huge is an error and takes no memory."""
    folder = two.newest()
    planted = folder / "optimizer.safetensors"
    planted.write_bytes(length.to_bytes(8, "little") + b"{" * 100)
    before = peak()
    rewritten(folder, files={**read_state(folder)["files"], planted.name: file_hash(planted)})
    assert "optimizer.safetensors cannot be read as safetensors" in refused(read_file, two.newest() / planted.name)
    assert peak() - before < 50 << 20


@pytest.mark.parametrize("name", ["../x", "transformer/../../x", "/etc/hostname", "a/..", ""])
def test_state_with_outside_paths(name, two, tmp_path, capsys):
    """A checkpoint whose state names files outside its folder is skipped, and those files stay unopened."""
    newest = two.newest()
    (newest.parent / "x").write_text("secret")
    rewritten(newest, files={**read_state(newest)["files"], name: "0" * 64})
    opened = []
    with mock.patch.object(checkpoint, "file_hash", side_effect=lambda path: opened.append(path) or "0" * 64):
        assert damaged_files(newest)
    assert all(".." not in path.parts and newest in path.parents for path in opened)
    assert value_of(two.newest()) == 1
    assert f"warning: {newest} is damaged (" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "null", '{"step": 2}', '{"files": ["a"]}', '{"files": null}', '{"files": {"a": 1}}', "\ud800",
        "[" * 100_000, '{"files": {"a\\u0000b": "0"}}', '{"files": {"' + "a" * 5000 + '": "0"}}',
    ],
)  # fmt: skip
def test_malformed_state(text, two, capsys):
    """A checkpoint with a malformed state is skipped."""
    newest = two.newest()
    (newest / STATE).write_text(text, errors="surrogatepass")
    assert value_of(two.newest()) == 1 and f"{newest} is damaged" in capsys.readouterr().out
    two.keep_best = True
    two.save(3, content(3), {}, score=1.0)  # nor does it stop the purge, which looks for scores
    assert value_of(two.newest()) == 3


def test_huge_state_and_pipe(two, capsys):
    """A huge state is not read, and a pipe is not waited for."""
    newest = two.newest()
    os.truncate(newest / STATE, 1 << 40)
    before = peak()
    assert value_of(two.newest()) == 1 and peak() - before < 50 << 20
    older = newest.with_name("step_000001")
    (older / "optimizer.safetensors").unlink()
    os.mkfifo(older / "optimizer.safetensors")
    assert two.newest() is None
    assert "(optimizer.safetensors)" in capsys.readouterr().out
