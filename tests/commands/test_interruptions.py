"""What stops a command in the middle: Ctrl-C and a disk that refuses. One line, and nothing half-made is left."""

import errno
import functools
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest

from wantrain.models import WanVAE
from wantrain.runs import folder
from wantrain.training.expert import ExpertTrainer
from wantrain.util import console, ctrl_c

ROOT = Path(__file__).resolve().parents[2]


def debris(place):
    """Temporary files and folders below a folder."""
    return [path for path in place.rglob("*") if ".tmp" in path.name or path.name.startswith("wantrain-decode-")]


STOPS = [
    (KeyboardInterrupt, (), 130, "stopped by Ctrl-C"),
    (OSError, (errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere"), 2, "error: somewhere: No space left on device; "),
    (OSError, (errno.EACCES, os.strerror(errno.EACCES), "somewhere"), 2, "error: somewhere: Permission denied; "),
]


def raising(kind, words):
    """A function that raises a new error each time: one that is kept would keep a run's lock with its traceback."""

    def stop(*_, **__):
        raise kind(*words)

    return stop


@pytest.mark.parametrize(("kind", "words", "code", "message"), STOPS)
def test_encode_is_stopped(kind, words, code, message, tiny, call, tmp_path, monkeypatch):
    """encode.py ends with one line and without temporary files, and the same command finishes the work."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    command = ("encode.py", f"shards={tiny.videos}", "out=latents", f"weights={tiny.base}", "area=1024", "report=none")
    with mock.patch.object(WanVAE, "encode", raising(kind, words)):
        ended = call(*command, check=False)
    said = [line for line in ended.stderr.replace("\r", "\n").splitlines() if "it/s" not in line and "%|" not in line]
    assert ended.returncode == code and len([line for line in said if line.strip()]) == 1, ended.stderr
    assert message in ended.stderr and debris(tmp_path) == []
    assert not (tmp_path / "latents" / "manifest.json").exists()
    call(*command)
    assert (tmp_path / "latents" / "manifest.json").is_file()


@pytest.mark.parametrize(("kind", "words", "code", "message"), STOPS)
def test_train_is_stopped_at_its_start(kind, words, code, message, tiny, call, tmp_path):
    """train.py that is stopped before its loop ends with one line, and its run of before goes on."""
    command = ("train.py", *tiny.train, "init=scratch", "batch_size=2", "run=r")
    call(*command, "steps=1")
    config = (tmp_path / "runs" / "r" / "config.yaml").read_text()
    for owner, name in ((folder, "write_atomically"), (ExpertTrainer, "restore_optimizer")):
        with mock.patch.object(owner, name, raising(kind, words)):
            ended = call(*command, "steps=2", check=False)
        assert ended.returncode == code and ended.stderr.startswith(message) and ended.stderr.count("\n") == 1
        assert debris(tmp_path) == []
        if owner is folder:
            assert (tmp_path / "runs" / "r" / "config.yaml").read_text() == config
    assert "step 1 of 2" in call(*command, "steps=2").stdout


@pytest.mark.parametrize("name", ["train", "caption", "shard", "encode", "sample", "export", "doctor", "demo"])
def test_command_is_stopped_while_it_loads(name, tmp_path):
    """Ctrl-C in a command's first seconds, while its libraries load, is one line too."""
    for library in ("omegaconf", "torch", "numpy"):  # the first that is imported gets the signal in its imports
        (tmp_path / f"{library}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, str(ROOT / f"{name}.py"), "--help"]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    ended = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, preexec_fn=heard
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", f"{ctrl_c.STOPPED}\n")


def test_ctrl_c_raises_while_a_command_works():
    """Between its imports and its end a command gets an exception, which cleans up; pytest's own handler comes back."""
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        ctrl_c.ends_at_once()
        at_once = signal.getsignal(signal.SIGINT)
        with console.errors_to_exit_code():
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            with console.errors_to_exit_code():  # a job of Hydra within its program
                pass
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is at_once is not signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
