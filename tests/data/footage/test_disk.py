"""shard.py on disks that refuse: one line that names the folder, before the work where that can be seen; and Ctrl-C."""

import errno
import os
import tempfile

import pytest
from shard_helpers import shard

from wantrain.data.footage import survey
from wantrain.data.footage.decode_workers import Decoders
from wantrain.util.console import errors_to_exit_code
from wantrain.util.files import check_writable, disk_errors_in


def test_unwritable_folders(tmp_path, monkeypatch):
    """A file in the way, a folder without permission and a full disk are seen before any work; nothing is created."""
    (tmp_path / "file").touch()
    check_writable(tmp_path / "a/b", key="out")
    with pytest.raises(ValueError, match=r"out=.*because .*file is a file"):
        check_writable(tmp_path / "file/below", key="out")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match=r"out=.*no permission in"):
        check_writable(tmp_path / "a/b", key="out")
    monkeypatch.undo()
    real = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result([*real[:4], 0, *real[5:]]))
    with pytest.raises(ValueError, match=r"out=.*no space is left"):
        check_writable(tmp_path / "a/b", key="out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_disk_errors(tmp_path):
    """An error of the disk is one line with the file; any other OSError stays a bug."""
    with (
        pytest.raises(ValueError, match=r"out=.*x\.tar: No space left on device") as caught,
        disk_errors_in(tmp_path, key="out"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device", "x.tar")
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError), disk_errors_in(tmp_path, key="out"):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "x.tar")


@pytest.mark.parametrize(
    "fault", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"]
)
def test_nothing_temporary_is_left(tmp_path, monkeypatch, capsys, fault):
    """A full disk and Ctrl-C during the survey end in one line, and leave no temporary folder."""
    source, temporary = tmp_path / "in", tmp_path / "temporary"
    source.mkdir()
    temporary.mkdir()
    (source / "a.mp4").write_bytes(b"no video")
    (source / "a.txt").write_text("a")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    assert survey.Decoders is Decoders

    def decode(self, jobs):
        assert len(list(temporary.iterdir())) == 1
        raise fault
        yield

    monkeypatch.setattr(Decoders, "decode", decode)
    with pytest.raises(SystemExit) as ended, errors_to_exit_code(), disk_errors_in(tmp_path / "out", key="out"):
        shard(source, tmp_path / "out", num_frames=17, fps=24, model="tiny")
    printed = capsys.readouterr().err
    assert ended.value.code == (130 if isinstance(fault, KeyboardInterrupt) else 2)
    assert len([line for line in printed.splitlines() if line and not line.startswith("shard:")]) == 1  # and the bar
    assert list(temporary.iterdir()) == []
    assert not (tmp_path / "out/manifest.json").exists()
