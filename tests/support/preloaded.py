"""A Python for tests that starts at once: its processes are forked from one that has imported the libraries already.

`Preloaded` is that process, and `program` is to be started in the place of `python` (ask_preloaded.py). A fork has
folder, environment, standard files, session and end of its own, and no state of a test: nothing has run in what it is
forked from.

    program [-u] SCRIPT ...        program -m MODULE ...        program -c PROGRAM ...

Anything else, or an environment that the imports would have read otherwise, starts an ordinary Python.
"""

import contextlib
import gc
import json
import os
import runpy
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import time
import types
import warnings
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
#: Variables that Python and the libraries read while they are imported, but for those that a fork sets itself.
READ_BY_IMPORTS = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "PYTHON", "LD_", "HF_", "TRANSFORMERS_")
SET_BY_FORKS = {"PYTHONPATH", "PYTHON_EXEC"}


class Preloaded:
    """The process that is forked from; it ends with its owner."""

    def __init__(self, folder, environment):
        address, self.program = folder / "socket", folder / "python"
        ask = [sys.executable, "-IS", Path(__file__).with_name("ask_preloaded.py"), address, sys.executable]
        self.program.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, ask))} "$@"\n')
        self.program.chmod(0o755)
        command = [sys.executable, __file__, str(address)]
        said = folder / "said"
        with said.open("w") as out:
            pipes = {"stdin": subprocess.PIPE, "stdout": out, "stderr": out}
            self._process = subprocess.Popen(command, env=environment, cwd=folder, start_new_session=True, **pipes)
        while not address.exists() and self._process.poll() is None:
            time.sleep(0.02)
        if self._process.poll() is not None:  # no such system calls here, or a library starts threads
            warnings.warn(f"commands start ordinary Pythons: {said.read_text()[-500:]}", stacklevel=2)
            self.program = sys.executable
        else:
            assert said.read_text() == "", "a library speaks while it is imported"

    def close(self):
        """End it, and with it whatever still runs."""
        self._process.stdin.close()
        assert self._process.wait(timeout=60) == 0 or self.program == sys.executable


def forked(python, process):
    """The number of the process behind one that was started with `python`: itself where that is an ordinary Python."""
    note = Path(python).with_name(f"{process}.fork")
    return int(note.read_text()) if note.exists() else process


class Server:
    """Forks for whoever asks at `address`, until standard input ends."""

    def __init__(self, address, environment):
        self._folder = Path(address).parent
        self._environments = environment, dict(os.environ)  # before and after the imports, which set some variables
        self._running = {}  # process: its file to wait with, the connection to who asked for it
        self._askers = {}  # process: who asked for it, and stands in its place
        self._listener, self._selector = socket.socket(socket.AF_UNIX), selectors.DefaultSelector()
        self._listener.bind(f"{address}.new")
        self._listener.listen(64)
        Path(f"{address}.new").rename(address)

    def serve(self):
        """In a fork: what was asked for. In the process itself: None, when its owner has ended."""
        self._selector.register(self._listener, selectors.EVENT_READ, self._fork)
        self._selector.register(0, selectors.EVENT_READ, None)
        while (answer := self._selector.select()[0][0].data) is not None:
            if (order := answer()) is not None:
                return order
        for pid in self._running:
            os.kill(pid, signal.SIGKILL)
        return None

    def _fork(self):
        connection, _ = self._listener.accept()
        files = socket.recv_fds(connection, 1, 3)[1]
        with connection.makefile("rb") as asked:
            order = json.loads(asked.readline())
        pid = os.fork() if understood(order, self._environments) else None
        if pid == 0:
            for number, file in enumerate(files):
                os.dup2(file, number)
            order["parent"] = self._askers.get(order["parent"], order["parent"])
            before, after = self._environments
            set_by_imports = {key: value for key, value in after.items() if before.get(key) != value}
            order["environment"] = set_by_imports | order["environment"]
            self._let_go(connection)
        for file in files:
            os.close(file)
        if pid == 0:
            return order
        if pid is not None:
            (self._folder / f"{order['asks']}.fork").write_text(str(pid))
        connection.sendall(b"%d\n" % (pid or 0))
        if pid is None:
            connection.close()
        else:
            waits = os.pidfd_open(pid)
            self._running[pid], self._askers[pid] = (waits, connection), order["asks"]
            self._selector.register(waits, selectors.EVENT_READ, partial(self._ended, pid))
            self._selector.register(connection, selectors.EVENT_READ, partial(self._abandoned, pid))
        return None

    def _abandoned(self, pid):
        """Who asked for the process has been killed."""
        self._selector.unregister(self._running[pid][1])
        os.kill(pid, signal.SIGKILL)

    def _ended(self, pid):
        waits, connection = self._running.pop(pid)
        self._selector.unregister(waits)
        os.close(waits)
        with contextlib.suppress(KeyError):
            self._selector.unregister(connection)
        with contextlib.suppress(BrokenPipeError):
            connection.sendall(b"%d\n" % os.waitpid(pid, 0)[1])
        connection.close()

    def _let_go(self, connection):
        """In a fork: close what is the server's, or its end would be nobody's."""
        for waits, other in self._running.values():
            os.close(waits)
            other.close()
        for mine in (connection, self._listener, self._selector):
            mine.close()


def understood(order, environments):
    """Whether a fork can do what is asked for."""
    words, asked = order["words"], order["environment"]
    read = {key for key in {*asked, *environments[0]} if key.startswith(READ_BY_IMPORTS)} - SET_BY_FORKS
    places = [Path(place) for place in asked.get("PYTHONPATH", "").split(os.pathsep) if place]
    customized = any((place / f"{who}customize.py").exists() for place in places for who in ("site", "user"))
    script = words[words[:1] == ["-u"] :][:1]
    return (
        not customized
        and all(asked.get(key) in [environment.get(key) for environment in environments] for key in read)
        and bool(script)
        and (script[0] in {"-m", "-c"} or not script[0].startswith("-"))
    )


def preload():
    """Import what commands import, at their head or late; none of it starts a thread that a fork would lack."""
    for script in ("train", "sample", "encode", "shard", "export"):
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="preloaded")
    from wantrain.util import libraries

    with libraries.importing():
        import accelerate.commands.launch  # noqa: F401
        import peft  # noqa: F401
        import transformers.models.umt5.modeling_umt5  # noqa: F401
    assert len([*Path("/proc/self/task").iterdir()]) == 1, "threads"
    os.close(os.pidfd_open(os.getpid()))


def become(order):
    """Do what was asked for as an ordinary Python does: in its folder, with its environment and words."""
    import numpy

    os.setsid()
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    own, getppid, words = os.getpid(), os.getppid, order["words"]
    os.getppid = lambda: order["parent"] if os.getpid() == own else getppid()
    numpy.random.seed()  # as its import does
    places = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    if words[0] == "-u":
        sys.stdout.reconfigure(write_through=True)
        words = words[1:]
    if words[0] == "-m":
        sys.argv, sys.path[:1] = words[1:], [order["folder"], *places]
        sys.modules.pop(words[1], None)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv, sys.path[:1] = ["-c", *words[2:]], ["", *places]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(words[1], main.__dict__)
    else:
        sys.argv, sys.path[:1] = words, [str(Path(words[0]).resolve().parent), *places]
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    environment = dict(os.environ)
    sys.path[0] = str(ROOT)
    preload()
    gc.collect()
    gc.freeze()
    if (order := Server(sys.argv[1], environment).serve()) is not None:
        become(order)
