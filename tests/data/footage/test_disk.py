"""shard.py on disks that refuse: one line that names the folder, before the work where that can be seen; and Ctrl-C."""

import errno
import os
import tempfile
from pathlib import Path

import pytest
from shard_helpers import shard

from wantrain.data.footage import survey
from wantrain.data.footage.decode_workers import Decoders
from wantrain.util.console import errors_to_exit_code
from wantrain.util.files import check_writable


def test_file_in_the_way(tmp_path):
    """A file where a folder must be is seen before any work; nothing is created (tests/util/test_console.py)."""
    (tmp_path / "file").touch()
    check_writable(tmp_path / "a/b", key="out")
    with pytest.raises(ValueError, match=r"out=.*because .*file is a file"):
        check_writable(tmp_path / "file/below", key="out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


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
    with pytest.raises(SystemExit) as ended, errors_to_exit_code():
        shard(source, tmp_path / "out", num_frames=17, fps=24, model="tiny")
    printed = capsys.readouterr().err
    assert ended.value.code == (130 if isinstance(fault, KeyboardInterrupt) else 2)
    assert len([line for line in printed.splitlines() if line and not line.startswith("shard:")]) == 1  # and the bar
    assert list(temporary.iterdir()) == []
    assert not (tmp_path / "out/manifest.json").exists()


def test_survey_on_a_full_disk(tmp_path, monkeypatch):
    """A survey that the disk does not take is an error that names it, and leaves no partial file."""
    surveys = survey.Surveys(tmp_path / ".surveys", split=False, decode=survey.DecodeOptions())
    surveys.folder.mkdir()
    stored = []

    def refuse(partial, target):
        stored.append(partial.read_bytes())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="No space left") as refused:
        surveys._store("ab" * 32, b"a survey")
    assert stored == [b"a survey"] and refused.value.filename == str(surveys._path("ab" * 32))
    assert list(surveys.folder.iterdir()) == []
