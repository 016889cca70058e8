"""Messages to the user, printed by the main process only; errors as one line and an exit code."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from wantrain.util import ctrl_c
from wantrain.util.distributed import is_main, says_first
from wantrain.util.restarts import Transient, end_restarts

#: Errors of disks and permissions, which a user can correct, by number: what to do. Other OSErrors are bugs.
FIXES = {
    errno.ENOSPC: "free disk space, or give a folder on a larger disk",
    errno.EDQUOT: "free some of your quota, or give a folder on another disk",
    errno.EFBIG: "raise the largest file size allowed (ulimit -f), or give a folder on another disk",
    errno.EACCES: "make it readable and writable for you, or give another",
    errno.EPERM: "make it readable and writable for you, or give another",
    errno.EROFS: "the disk is read-only: make it writable, or give a folder on another disk",
    errno.ENOENT: "it is not there, or no longer: check the path, and that the disk is mounted",
    errno.ENOTDIR: "a part of the path is a file: check the path",
    errno.EISDIR: "a folder stands where a file should: check the path",
    errno.ENAMETOOLONG: "give a shorter name or path",
    errno.EIO: "the disk failed: check it, or give a folder on another disk",
    errno.ESTALE: "the network disk was changed or mounted anew: start the same command again",
    errno.ENODEV: "the disk is gone: check that it is mounted",
    errno.ENOTCONN: "the network disk is gone: check that it is mounted",
    errno.EHOSTDOWN: "the network disk is gone: check that it is mounted",
}
#: What every command promises when the disk stops it.
KEPT = "What was finished before is as it was, and the same command goes on from it"


def say(message: str) -> None:
    """Print a message on rank 0 only, and flush."""
    if is_main():
        print(message, flush=True)


@contextmanager
def errors_to_exit_code() -> Iterator[None]:
    """For the entry point of a program: an error that the user can correct is one line on stderr and exit code 2.

    That is a ValueError, or what a disk refuses (`disk_error`); of several processes that meet the same one, one prints
    it. A ValueError that is not Transient also ends the restarts of a launch. Ctrl-C is one line and exit code 130.
    Other errors are bugs and show their traceback. From here on a reader of stdout or stderr may go away: see
    `keep_streams`.
    """
    keep_streams()
    outermost = ctrl_c.raises()
    try:
        yield
    except KeyboardInterrupt:
        if is_main():
            print(ctrl_c.STOPPED, file=sys.stderr, flush=True)
        sys.exit(ctrl_c.INTERRUPTED)
    except Exception as error:
        message = str(error) if isinstance(error, ValueError) else disk_error(error)
        if message is None:
            raise
        if says_first(message):
            print(f"error: {message}", file=sys.stderr, flush=True)
        else:
            time.sleep(1)  # the launcher ends all processes with the first: leave time to the one that prints
        if isinstance(error, ValueError) and not isinstance(error, Transient):
            end_restarts()
        sys.exit(2)
    finally:
        if outermost:
            ctrl_c.ends_at_once()  # while the libraries end, which may wait for an upload


def disk_error(error: BaseException) -> str | None:
    """An error of a disk or a permission as one line, with the file and the fix; None for any other error.

    Libraries written in Rust (safetensors, tokenizers) have classes of their own, whose text ends with the number.
    """
    number = error_number(error)
    if number not in FIXES:
        return None
    text = os.strerror(number)
    names = [name for name in (getattr(error, "filename", None), getattr(error, "filename2", None)) if name is not None]
    where = f"{' -> '.join(os.fsdecode(name) if isinstance(name, bytes) else str(name) for name in names)}: "
    return f"{where if names else ''}{text}; {FIXES[number]}. {KEPT}"


def error_number(error: BaseException) -> int | None:
    """The system's number of an OSError, or of an error of a library written in Rust; None where there is none."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def exit_code(error: BaseException) -> int:
    """What a program exits with that ends with `error`; never 0."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) and error.code else 1
    if isinstance(error, KeyboardInterrupt):
        return ctrl_c.INTERRUPTED
    return 2 if isinstance(error, ValueError) or disk_error(error) is not None else 1


def keep_streams() -> None:
    """Let nothing that becomes of stdout and stderr end the program: a pipe whose reader has gone (`| head -2`), a
    terminal that was closed, a log on a full disk. What cannot be written there is dropped.

    Streams that are not the process's own (a test's, a notebook's) are left alone.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        own = stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper)
        if own and not isinstance(stream, _Kept):
            kept = _keeping(stream)
            setattr(sys, name, kept)
            setattr(sys, f"__{name}__", kept)


class _Kept(io.TextIOWrapper):
    """A text stream over a `_Forgiving` file."""


class _Forgiving(io.FileIO):
    """A file whose writes cannot fail: what the system refuses is dropped."""

    def write(self, data: bytes) -> int:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.ENOSPC:  # nobody will ever read it again; a disk may have room later
                with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - a device, not a path
                    os.dup2(nowhere.fileno(), self.fileno())
            return memoryview(data).nbytes


def _keeping(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """The stream again, over the same file descriptor, without errors of writing."""
    try:
        number = stream.fileno()
        stream.flush()
    except (OSError, ValueError):  # closed from the start
        return stream
    raw = _Forgiving(number, "w", closefd=False)
    return _Kept(
        io.BufferedWriter(raw),  # type: ignore[type-var]
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering or stream.write_through,
    )
