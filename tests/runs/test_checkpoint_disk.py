"""A disk that is full or refuses: the error names it, and the checkpoints before stay."""

import contextlib
import errno
import io
import os
import resource
import shutil
import signal
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from checkpoint_helpers import both, content, hidden, in_child, refused, steps, store, value_of
from safetensors.torch import save_file

from wantrain.runs import checkpoint
from wantrain.runs.checkpoint import Checkpoints


@both
def test_full_disk(background, tmp_path):
    """A full disk is reported before anything is written."""
    checkpoints = store(tmp_path / "c", background=background)
    checkpoints.save(1, content(1), {})
    checkpoints.wait()
    usage = shutil._ntuple_diskusage(10**12, 10**12 - 5_000_000, 5_000_000)
    with mock.patch.object(checkpoint.shutil, "disk_usage", return_value=usage):
        error = refused(checkpoints.save, 2, pytest.fail, {}, size=2_000_000_000)
    assert f"checkpoint {tmp_path}/c/step_000002 of 2,000,000,000 bytes could not be written" in error
    assert "disk full: 5,000,000 bytes are free, 2,016,777,216 needed; free disk space" in error
    assert checkpoints.failure == error and hidden(tmp_path / "c") == []
    assert value_of(checkpoints.newest()) == 1
    checkpoints.save(2, content(2), {}, size=2000)
    checkpoints.wait()
    assert value_of(checkpoints.newest()) == 2 and checkpoints.failure is None


@both
@pytest.mark.parametrize("on_failure", ["stop", "continue"])
def test_file_size_limit(on_failure, background, tmp_path):
    """A limit that is met while writing leaves the checkpoint before, and no incomplete one.

    The kernel really refuses in the middle of a file: none may pass 64 KiB.
    """
    settings = {"background": background, "on_failure": on_failure}

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        checkpoints = store(tmp_path, **settings)
        said, raised = io.StringIO(), None
        checkpoints.save(1, content(1), {})
        with contextlib.redirect_stdout(said):
            try:
                checkpoints.save(2, content(2, numbers=1 << 16), {}, size=1 << 18)
                checkpoints.wait()
            except ValueError as error:
                raised = str(error)
        left = hidden(tmp_path), steps(checkpoints)
        failed = checkpoints.failure
        checkpoints.save(3, content(3), {})  # the next is tried again
        checkpoints.wait()
        return raised, said.getvalue(), left, failed, checkpoints.failure

    raised, said, left, failed, after = in_child(work)
    words = f"checkpoint {tmp_path}/step_000002 of 262,144 bytes could not be written: "
    assert failed.startswith(words) and "[Errno 27] File too large; raise the largest file size" in failed
    assert raised == (failed if on_failure == "stop" else None) and after is None
    assert (failed in said) == (background or on_failure == "continue")
    assert ("training goes on, and the next save tries again" in said) == (on_failure == "continue")
    assert left == [[], [1]]
    assert value_of(tmp_path / "step_000001") == 1 and value_of(Checkpoints(tmp_path, keep=2).newest()) == 3


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("where", ["mkdir", "fsync", "rename", "io.open"])
def test_disk_errors(number, where, tmp_path):
    """Whatever operation the disk refuses, the error has its name, and no partial file stays."""
    checkpoints = store(tmp_path)
    checkpoints.save(1, content(1), {})
    owner, name = (io, "open") if where == "io.open" else (os, where)
    with mock.patch.object(owner, name, side_effect=OSError(number, os.strerror(number))):
        error = refused(checkpoints.save, 2, content(2), {}, size=10)
    assert f"step_000002 of 10 bytes could not be written: [Errno {number}] {os.strerror(number)}" in error
    assert "; " in error and "runs=" in error and hidden(tmp_path) == []
    assert steps(checkpoints) == [1] and value_of(checkpoints.newest()) == 1


def test_failed_replacement(tmp_path):
    """If a replacement cannot be renamed, the old checkpoint is put back."""
    checkpoints, real = store(tmp_path), os.rename
    checkpoints.save(1, content(1), {})

    def rename(source, target):
        if Path(source).name.endswith(".tmp"):
            raise OSError(errno.EIO, "no")
        real(source, target)

    with mock.patch.object(os, "rename", rename):
        refused(checkpoints.save, 1, content(2), {})
    assert value_of(checkpoints.newest()) == 1 and hidden(tmp_path) == []


def test_read_only_folder():
    """The error for a folder that cannot be written names it."""
    with tempfile.TemporaryDirectory() as scratch:
        closed = Path(scratch) / "closed"
        closed.mkdir()
        Path(scratch).chmod(0o755)
        closed.chmod(0o555)

        def work():
            if os.geteuid() == 0:
                os.setuid(65534)  # root may write anywhere; nobody may not
            checkpoints = Checkpoints(closed, keep=1)
            return refused(checkpoints.save, 1, content(1), {}), refused(Checkpoints(closed / "deeper", keep=1).prepare)

        saving, preparing = in_child(work)
        closed.chmod(0o755)
    assert saving.startswith(f"checkpoint {closed}/step_000001 could not be written: [Errno 13] Permission denied")
    assert "make the folder writable" in saving
    assert preparing.startswith(f"checkpoints cannot be kept in {closed}/deeper: [Errno 13] Permission denied")


def test_file_in_place_of_folder(tmp_path):
    """The error for a file in the place of the folder names it."""
    (tmp_path / "c").touch()
    assert f"checkpoints cannot be kept in {tmp_path}/c: [Errno 17] File exists" in refused(
        Checkpoints(tmp_path / "c", keep=1).prepare
    )
    checkpoints = Checkpoints(tmp_path / "gone", keep=1)
    assert "step_000001 could not be written: [Errno 2] No such file" in refused(checkpoints.save, 1, content(1), {})


@both
@pytest.mark.parametrize("on_failure", ["stop", "continue"])
def test_bug_is_no_disk_error(on_failure, background, tmp_path):
    """An error of the code is raised as it is, and is not reported as an error of the disk."""
    checkpoints = store(tmp_path, background=background, on_failure=on_failure)

    def bug(folder):
        (folder / "half").write_bytes(b"x")
        raise TypeError("a bug")

    def overlapping(folder):
        whole = torch.zeros(4)
        save_file({"a": whole, "b": whole}, folder / "x.safetensors")

    for write, kind in ((bug, TypeError), (overlapping, RuntimeError)):
        with pytest.raises(kind):
            checkpoints.save(1, write, {})
            checkpoints.wait()
        assert hidden(tmp_path) == [] and steps(checkpoints) == []
    checkpoints.wait()  # told once
