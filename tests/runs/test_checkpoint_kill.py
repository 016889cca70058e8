"""A save that is killed at any file operation leaves the old checkpoint or the new one."""

import itertools
import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
from checkpoint_helpers import both, content, hidden, in_child, store, value_of
from kills import Operations

from wantrain.runs.checkpoint import Checkpoints, damaged_files, read_state


def saved_or_killed(folder, step, value, die_at, **settings):
    """Save in a forked child that dies at operation `die_at`; the operations it did, or None if it died."""

    def work():
        checkpoints = Checkpoints(folder, **settings)
        with Operations(die_at).hooked() as operations:
            checkpoints.save(step, content(value), {"data": value})
            checkpoints.wait()
        return operations.names

    return in_child(work)


@both
@pytest.mark.parametrize(
    ("step", "settings"),
    [
        (4, {"keep": 1}),
        pytest.param(3, {"keep": 1}, marks=pytest.mark.slow),
        pytest.param(4, {"keep": 2, "keep_best": True}, marks=pytest.mark.slow),
    ],
    ids=["the one before is purged", "the same step again", "an older one is purged"],
)
def test_kill_during_save(step, settings, background, tmp_path):
    """After a kill at any operation of a save, the newest checkpoint is the old or the new one."""
    before = tmp_path / "before"
    for old in (1, 2, 3):
        store(before, keep=3).save(old, content(old), {"data": old}, score=float(old))
    settings = {**settings, "background": background}
    for old in (1, 2) if settings["keep"] == 1 else ():
        shutil.rmtree(before / f"step_00000{old}")
    seen = []
    for die_at in itertools.count(1):
        folder = tmp_path / str(die_at)
        shutil.copytree(before, folder)
        done = saved_or_killed(folder, step, 4, die_at, **settings)
        checkpoints = Checkpoints(folder, **settings)
        for path in folder.glob("step_*"):  # whatever carries a final name is whole, its state.json included
            assert damaged_files(path) == [] and value_of(path) in (1, 2, 3, 4)
        checkpoints.prepare()
        assert hidden(folder) == []
        newest = checkpoints.newest()
        seen.append(value_of(newest))
        assert read_state(newest)["data"] == seen[-1] and seen[-1] in (3, 4)
        checkpoints.save(5, content(5), {})  # and it goes on
        checkpoints.wait()
        assert value_of(checkpoints.newest()) == 5 and hidden(folder) == []
        shutil.rmtree(folder)
        if done is not None:
            break
    assert seen == sorted(seen) and seen[0] == 3 and seen[-1] == 4  # one commit, once and for all
    assert len(seen) == len(done) + 1 > 30
    assert {"write", "half a write", "fsync", "rename", "unlink", "rmdir", "mkdir", "io.open"} <= set(done)


def test_sync_order(tmp_path):
    """Every file is synced before the rename, and the rename before anything is deleted."""
    checkpoints = store(tmp_path, keep=1)
    checkpoints.save(1, content(1), {})
    done, real = [], {name: getattr(os, name) for name in ("fsync", "rename", "rmdir", "unlink")}

    def fsync(handle):
        done.append(("fsync", Path(f"/proc/self/fd/{handle}").readlink().name))

    def rename(source, target, **kwargs):
        done.append(("rename", Path(target).name))
        real["rename"](source, target, **kwargs)

    def rmdir(path, **kwargs):
        done.append(("rmdir", Path(path).name))
        real["rmdir"](path, **kwargs)

    with mock.patch.multiple(os, fsync=fsync, rename=rename, rmdir=rmdir):
        checkpoints.save(2, content(2), {})
    commit = done.index(("rename", "step_000002"))
    files = [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "optimizer.safetensors",
        "transformer",
        "notes.txt",
        "more",
    ]
    assert {("fsync", name) for name in [*files, ".step_000002.tmp"]} <= set(done[:commit])
    assert any(what == "fsync" and name.startswith(".state.json") for what, name in done[:commit])
    assert done[commit + 1 :][:3] == [
        ("fsync", tmp_path.name), ("rename", ".step_000001.gone"), ("fsync", tmp_path.name),
    ]  # fmt: skip
    assert ("rmdir", ".step_000001.gone") in done[commit + 4 :] and not any(
        what == "rmdir" for what, _ in done[:commit]
    )
