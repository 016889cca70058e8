"""A process that dies at a chosen operation on the file system, as by kill -9."""

import contextlib
import io
import os
from unittest import mock

from checkpoint_helpers import KILLED, OPEN


class TornFile:
    """A file open for writing that has two moments for each write: before it, and with half of it on the disk."""

    def __init__(self, file, moment):
        self.file, self.moment = file, moment

    def write(self, data):
        self.moment("write")
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.moment("half a write")
        return self.file.write(data[len(data) // 2 :])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


class Operations:
    """Every operation on the file system of a save, counted; at the n-th the process dies as by kill -9.

    Death comes before an operation; every write to a file also has a moment half-way.
    """

    watched = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "chmod", "open", "pwrite")

    def __init__(self, die_at):
        self.die_at, self.names = die_at, []

    def moment(self, name):
        self.names.append(name)
        if len(self.names) == self.die_at:
            os._exit(KILLED)

    def watch(self, name, real):
        def watched(*args, **kwargs):
            self.moment(name)
            return real(*args, **kwargs)

        return watched

    def opened(self, path, mode="r", *args, **kwargs):
        self.moment("io.open")
        file = OPEN(path, mode, *args, **kwargs)
        return TornFile(file, self.moment) if "w" in mode else file

    @contextlib.contextmanager
    def hooked(self):
        with contextlib.ExitStack() as stack:
            for name in self.watched:
                real = (lambda handle: None) if name == "fsync" else getattr(os, name)  # a kill, not a power cut
                stack.enter_context(mock.patch.object(os, name, self.watch(name, real)))
            stack.enter_context(mock.patch.object(io, "open", self.opened))
            yield self
