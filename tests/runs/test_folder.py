"""A run folder has one writer: another process is refused, told who it is, and let in when that one ends."""

import os
import signal
import time

import pytest

from wantrain import config
from wantrain.runs import replay
from wantrain.runs.folder import RunFolder, check_name, differences, read_config


def test_run_lock(tmp_path):
    """A second process gets an error that names the one that trains the run, and may train after its death."""
    ready, tell = os.pipe()
    holder = os.fork()
    if holder == 0:
        folder = RunFolder(tmp_path / "r")
        os.write(tell, b"new" if not folder.open({"steps": 1}) else b"old")
        time.sleep(60)
        os._exit(1)
    try:
        assert os.read(ready, 3) == b"new"
        for _ in range(2):  # being refused changes nothing for the holder
            with pytest.raises(ValueError) as error:
                RunFolder(tmp_path / "r").open({"steps": 1})
            assert str(error.value) == (
                f"run r is being trained by process {holder} on {os.uname().nodename}; wait or stop it"
            )
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    mine = RunFolder(tmp_path / "r")
    assert mine.open({"steps": 1}) is True
    assert (tmp_path / "r" / ".lock").read_text() == f"process {os.getpid()} on {os.uname().nodename}"


def test_settings_free_on_resume():
    """A run resumes with changed settings that affect rounding at most.

    Other processes, another device, more passes after running out of memory; also one from before these settings.
    """

    def settings(*given):
        return config.plain(config.compose("train", ["batch_size=8", *given]))

    now = settings("accumulate=4", "device=cpu", "recompute=block", "model.train.micro_batch=2")
    assert differences(settings(), now) == []
    before = settings("accumulate=1")
    del before["device"], before["model"]["train"]
    assert differences(before, now) == []
    assert differences(now, settings("accumulate=4", "batch_size=4")) == ["batch_size: 8 -> 4"]


def test_settings_without_effect():
    """What is said of an expert that a run does not train may differ; of one that it trains, it may not."""
    names = ("high_noise", "low_noise", "both")
    other, own, pair = (config.plain(config.compose("train", [f"expert={name}"])) for name in names)
    assert differences(with_rate(other), other) == []
    assert differences(with_rate(own), own) == ["experts.low_noise.lr: 0.1 -> None"]
    assert differences(with_rate(pair), pair) == ["experts.low_noise.lr: 0.1 -> None"]


def with_rate(settings):
    """The settings with a learning rate for the low-noise expert."""
    return {
        **settings,
        "experts": {**settings["experts"], "low_noise": {**settings["experts"]["low_noise"], "lr": 0.1}},
    }


@pytest.mark.parametrize(
    "name", ["a,b", "a+b", "a/b", "a\\b", "a\nb", "", " ", " a", ".hidden", "..", "base", "ü" * 101]
)
def test_unusable_name(name):
    """A name that later commands could not take is refused."""
    with pytest.raises(ValueError, match=r"run='.*' .*; give a name of letters"):
        check_name(name)


@pytest.mark.parametrize("name", ["r", "lr=1e-4", "tiny_low_noise_none", "v1.2", "猫", "two words", "base2"])
def test_usable_name(name):
    """Names that every command can take."""
    check_name(name)


def opened(path, config, sources):
    """Open a run's folder and record its start, as train.py does, and let go of its lock."""
    run = RunFolder(path)
    run.open(config, sources)
    replay.record(run.record, {"command": [], **({} if sources is None else {"sources": sources})}, config)
    run.lock.close()


def refused(path, config, sources):
    """What is said where a run's folder is not opened."""
    run = RunFolder(path)
    with pytest.raises(ValueError) as error:
        run.open(config, sources)
    run.lock.close()
    return str(error.value)


MOVES = [
    ({"weights": "old"}, {"weights": "/new/place"}),
    ({"weights": "owner/name", "revision": "main"}, {"weights": "here", "revision": None}),
    ({"parts": {"low_noise": "a.safetensors"}}, {"parts": {"low_noise": "b.safetensors"}}),
    ({"adapter": {"name": "lora", "init": "a"}}, {"adapter": {"name": "lora", "init": "b"}}),
]


@pytest.mark.parametrize(("before", "now"), MOVES)
def test_moved_files(before, now, tmp_path):
    """A run goes on with the same files elsewhere; with other files it is refused, at the old place too."""
    opened(tmp_path / "r", before, {"low_noise": "1"})
    opened(tmp_path / "r", now, {"low_noise": "1"})
    opened(tmp_path / "r", before, {"low_noise": "1"})
    for place in (before, now):
        error = refused(tmp_path / "r", place, {"low_noise": "2"})
        assert error.startswith("run r started from other files: low_noise differs in content")


@pytest.mark.parametrize(("before", "now"), MOVES)
def test_moved_files_of_earlier_version(before, now, tmp_path):
    """A run that did not record its files is refused with other paths, with a way out that keeps it."""
    opened(tmp_path / "r", before, None)
    error = refused(tmp_path / "r", now, {"low_noise": "1"})
    assert "exists with another config: " in error and error.endswith("put a link at the old place")
    assert "remove" not in error
    opened(tmp_path / "r", before, {"low_noise": "1"})  # recorded from now on
    opened(tmp_path / "r", now, {"low_noise": "1"})


def test_other_settings_still_refused(tmp_path):
    """With the same files elsewhere, another setting is refused as before, and no advice is to remove the run."""
    opened(tmp_path / "r", {"weights": "a", "seed": 0}, {"low_noise": "1"})
    error = refused(tmp_path / "r", {"weights": "b", "seed": 1}, {"low_noise": "1"})
    assert "another config: seed: 0 -> 1. Give the new run its own name" in error
    assert "remove" not in error and "weights" not in error


def test_renamed_run(tmp_path):
    """A run whose folder was renamed goes on under the new name, which its config then says."""
    opened(tmp_path / "old", {"run": "old", "seed": 0}, {})
    (tmp_path / "old").rename(tmp_path / "new")
    assert read_config(tmp_path / "new")["run"] == "new"
    opened(tmp_path / "new", {"run": "new", "seed": 0}, {})
    (tmp_path / "new").rename(tmp_path / "newer")
    assert read_config(tmp_path / "newer") == {"run": "newer", "seed": 0}
