"""A run folder has one writer: another process is refused, told who it is, and let in when that one ends."""

import errno
import os
import signal
import time
from unittest import mock

import pytest

from wantrain import config
from wantrain.runs import folder
from wantrain.runs.folder import RunFolder, differences


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


def test_disk_without_locks(tmp_path):
    """A disk that cannot lock is not mistaken for another process."""
    without = mock.patch.object(folder.fcntl, "flock", side_effect=OSError(errno.ENOLCK, "No locks available"))
    with without, pytest.raises(ValueError, match=r"run r cannot be locked .*No locks available.*runs="):
        RunFolder(tmp_path / "r").open({"steps": 1})


def test_settings_free_on_resume():
    """A run resumes with changed settings that affect rounding at most.

    Other processes, another device, more passes after running out of memory; also one from before these settings.
    """

    def settings(*given):
        return config.plain(config.compose("train", ["batch_size=8", *given]))

    now = settings("accumulate=4", "device=cpu", "gradient_checkpointing=true", "model.train.micro_batch=2")
    assert differences(settings(), now) == []
    before = settings("accumulate=1")
    del before["device"], before["model"]["train"]
    assert differences(before, now) == []
    assert differences(now, settings("accumulate=4", "batch_size=4")) == ["batch_size: 8 -> 4"]


def test_settings_without_effect():
    """A run that once was given an expert's own rate, though it trains one expert, resumes without it."""
    alone, pair = (config.plain(config.compose("train", [f"expert={name}"])) for name in ("low_noise", "both"))
    assert differences(with_rate(alone), alone) == []
    assert differences(with_rate(pair), pair) == ["experts.low_noise.lr: 0.1 -> None"]


def with_rate(settings):
    """The settings with a learning rate for the low-noise expert."""
    return {
        **settings,
        "experts": {**settings["experts"], "low_noise": {**settings["experts"]["low_noise"], "lr": 0.1}},
    }
