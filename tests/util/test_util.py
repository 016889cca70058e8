"""Randomness by position, folders that are claimed, files that are whole or absent."""

from pathlib import Path

import pytest
import torch

from wantrain.util import distributed
from wantrain.util.files import claim_folder, write_json
from wantrain.util.progress import listening, report_progress
from wantrain.util.seeds import generator_at


def test_stream_position():
    """A random stream depends on its position alone."""

    def draw(*position):
        return torch.randn(4, generator=generator_at(*position))

    assert torch.equal(draw(0, "noise", 5), draw(0, "noise", 5))
    others = [draw(0, "noise", 6), draw(1, "noise", 5), draw(0, "caption", 5), draw(0, "noise", "5")]
    assert not any(torch.equal(draw(0, "noise", 5), other) for other in others)


def test_stream_independence():
    """The streams of neighbouring positions are independent."""
    values = torch.stack([torch.randn(64, generator=generator_at(0, "noise", i)) for i in range(512)])
    correlation = torch.corrcoef(values)
    assert (correlation - torch.eye(512)).abs().max() < 0.75
    assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.02


def test_claim_other_folder(tmp_path):
    """A folder that holds something else is refused."""
    claim_folder(tmp_path / "new", sentinel="mark", key="out")
    (tmp_path / "new" / "mark").touch()
    claim_folder(tmp_path / "new", sentinel="mark", key="out")
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ValueError, match=r"out=.* holds something else"):
        claim_folder(tmp_path, sentinel="mark", key="out")
    with pytest.raises(ValueError, match=r"is a file"):
        claim_folder(tmp_path / "photo.jpg", sentinel="mark", key="out")


def test_interrupted_write(tmp_path, monkeypatch):
    """An interrupted write leaves the old file."""
    path = tmp_path / "state.json"
    write_json(path, {"step": 1})
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match=r"disk full"):
        write_json(path, {"step": 2})
    assert path.read_text() == '{\n  "step": 1\n}\n'


def test_thread_count(monkeypatch):
    """The number of threads is the process's share of the cores, or WANTRAIN_THREADS."""
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


def test_claim_after_kill(tmp_path):
    """Hidden files that a killed run left do not make a folder foreign."""
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.yaml.123.tmp").touch()
    claim_folder(tmp_path, sentinel="config.yaml", key="run")


def test_single_process(monkeypatch):
    """A command that runs as one process refuses to be launched as several."""
    distributed.single_process("shard.py")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"shard\.py runs as one process, but 2 were started"):
        distributed.single_process("shard.py")


@pytest.mark.parametrize("above", ["file", "/proc/nowhere"])
def test_claim_impossible_folder(tmp_path, monkeypatch, above):
    """A folder that cannot be created raises one error that names the key."""
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(ValueError, match=rf"out={above}/deeper cannot be created \(.+\); give another folder"):
        claim_folder(Path(above) / "deeper", sentinel=None, key="out")


def test_progress_listener():
    """Progress is heard only while somebody listens."""
    heard = []
    with listening(heard.append):
        report_progress("hashing one")
        report_progress("hashing two")
    report_progress("hashing three")
    assert heard == ["hashing one", "hashing two"]
