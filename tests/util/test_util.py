"""Randomness by position, folders that are claimed, files that are whole or absent."""

from pathlib import Path

import pytest
import torch

from wantrain.util import distributed
from wantrain.util.files import claim_folder, write_json
from wantrain.util.progress import listening, report_progress
from wantrain.util.seeds import generator_at


def test_a_stream_depends_on_its_position_alone():
    def draw(*position):
        return torch.randn(4, generator=generator_at(*position))

    assert torch.equal(draw(0, "noise", 5), draw(0, "noise", 5))
    others = [draw(0, "noise", 6), draw(1, "noise", 5), draw(0, "caption", 5), draw(0, "noise", "5")]
    assert not any(torch.equal(draw(0, "noise", 5), other) for other in others)


def test_neighbouring_positions_are_independent():
    values = torch.stack([torch.randn(64, generator=generator_at(0, "noise", i)) for i in range(512)])
    correlation = torch.corrcoef(values)
    assert (correlation - torch.eye(512)).abs().max() < 0.75
    assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.02


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    claim_folder(tmp_path / "new", sentinel="mark", key="out")
    (tmp_path / "new" / "mark").touch()
    claim_folder(tmp_path / "new", sentinel="mark", key="out")
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ValueError, match=r"out=.* holds something else"):
        claim_folder(tmp_path, sentinel="mark", key="out")
    with pytest.raises(ValueError, match=r"is a file"):
        claim_folder(tmp_path / "photo.jpg", sentinel="mark", key="out")


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    write_json(path, {"step": 1})
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match=r"disk full"):
        write_json(path, {"step": 2})
    assert path.read_text() == '{\n  "step": 1\n}\n'


def test_threads_are_the_processes_share_of_the_cores(monkeypatch):
    before = torch.get_num_threads()
    try:
        monkeypatch.setenv("WANTRAIN_THREADS", "1")
        distributed.set_threads()
        assert torch.get_num_threads() == 1
        monkeypatch.delenv("WANTRAIN_THREADS")
        monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as a bare accelerate launch sets it
        monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(6)))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        distributed.set_threads()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_what_a_kill_left_hidden_does_not_make_a_folder_foreign(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.yaml.123.tmp").touch()
    claim_folder(tmp_path, sentinel="config.yaml", key="run")


def test_a_verb_that_works_alone_refuses_to_be_launched_as_several(monkeypatch):
    distributed.single_process("shard.py")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"shard\.py runs as one process, but 2 were started"):
        distributed.single_process("shard.py")


@pytest.mark.parametrize("above", ["file", "/proc/nowhere"])
def test_a_folder_that_cannot_be_made_is_one_error_that_names_the_key(tmp_path, monkeypatch, above):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(ValueError, match=rf"out={above}/deeper cannot be created \(.+\); give another folder"):
        claim_folder(Path(above) / "deeper", sentinel=None, key="out")


def test_progress_is_heard_while_somebody_listens():
    heard = []
    with listening(heard.append):
        report_progress("hashing one")
        report_progress("hashing two")
    report_progress("hashing three")
    assert heard == ["hashing one", "hashing two"]
