"""The commands on an emulated second device: `device("train.py", "steps=2")`."""

import functools
import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch.utils.backend_registration

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Ended:
    """How a command ended, what it said, and what the host read: rows of kind, place and number."""

    returncode: int
    stdout: str
    stderr: str
    steps: list = field(default_factory=list)
    reads: list = field(default_factory=list)
    uploads: list = field(default_factory=list)


class Commands:
    """The process of commands.py, which runs one command after the other."""

    def __init__(self, folder, environment):
        self.folder, self.numbers = folder, itertools.count()
        command = [sys.executable, str(HERE / "commands.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)
        assert self.process.stdout.readline() == "ready\n"

    def run(self, cwd, *args, check=True, fault=""):
        result = self.folder / f"{next(self.numbers)}.json"
        request = {"cwd": str(cwd), "args": [str(arg) for arg in args], "fault": fault, "result": str(result)}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n", "the process of the emulated device has ended"
        ended = Ended(**json.loads(result.read_text(encoding="utf-8")))
        if check:
            assert ended.returncode == 0, f"{args}\n{ended.stdout}\n{ended.stderr}"
        return ended


@pytest.fixture(scope="module")
def commands(tmp_path_factory, environment):
    """The process that runs commands on the device."""
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip(f"torch {torch.__version__} cannot register a backend in Python, which the emulated device is")
    started = Commands(tmp_path_factory.mktemp("device"), {**os.environ, **environment})
    yield started
    started.process.stdin.close()
    started.process.wait(timeout=30)


@pytest.fixture
def device(commands, tmp_path):
    """device("train.py", "steps=2"): the command on the emulated device, in tmp_path."""
    return functools.partial(commands.run, tmp_path)
