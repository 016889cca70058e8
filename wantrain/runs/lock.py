"""Who may write into a run's folder: one process, as long as it lives.

Where the disk has locks the kernel keeps one (flock), and lets go of it when its process ends, however that ends. On
a network disk without them a file stands for it, which only one process can create. Its holder writes a new number into
it every few seconds, so that others see that it lives.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from wantrain.util.console import say
from wantrain.util.files import naming
from wantrain.util.progress import report_progress
from wantrain.util.restarts import Transient

#: Name of the file that stands for a lock.
HELD = ".lock.held"
#: What a disk without locks answers to flock.
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
#: Seconds between two numbers of a holder.
RENEWED = 10.0
#: Seconds without a new number after which a holder elsewhere counts as gone.
STALE = 60.0
#: Seconds between two looks at another's file.
LOOK = 1.0


class RunLock:
    """Keeps other processes out of a run's folder, from here until `close` or the end of this process.

    Transient if another process has it. A holder that is gone is replaced (`HolderFile`).
    """

    def __init__(self, folder: Path) -> None:
        self.file: IO[str] | None = (folder / ".lock").open("a+")
        self.stand_in: HolderFile | None = None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            holder = self.file.read().strip() or "another process"
            raise Transient(_taken(folder, holder)) from None
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:  # two processes in one folder would corrupt it
                raise ValueError(
                    f"run {folder.name} cannot be locked ({error}); give runs= a folder on another disk"
                ) from error
            say(f"the disk of {folder} has no locks ({error.strerror}): a file keeps other processes out")
            self.stand_in = HolderFile(folder / HELD)
        if self.stand_in is None and (folder / HELD).exists():  # of another machine, which sees a disk without locks
            self.stand_in = HolderFile(folder / HELD)
        with naming(folder / ".lock"):
            self.file.truncate(0)
            self.file.write(f"process {os.getpid()} on {os.uname().nodename}")
            self.file.flush()

    def close(self) -> None:
        """Let other processes in."""
        if self.file is not None:
            self.file.close()
        if self.stand_in is not None:
            self.stand_in.close()


@dataclass(frozen=True)
class Holder:
    """What a holder says of itself.

    machine  this start of its machine, and its space of process numbers: where both are ours we see whether it lives
    began    when its process began, by the kernel's count: the same number may be another process's later
    number   raised every RENEWED seconds
    """

    process: int
    host: str
    machine: str
    began: str
    number: int = 0

    @classmethod
    def this_process(cls) -> Holder:
        """This one."""
        return cls(os.getpid(), os.uname().nodename, _machine(), _began(os.getpid()))

    @property
    def is_gone(self) -> bool:
        """True if it ran on this machine and has ended."""
        return bool(self.machine) and self.machine == _machine() and self.began != _began(self.process)

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"


class HolderFile:
    """A file that one process alone can create, removed when that ends in order.

    What a killed process has left is taken over by this rule: at once, if it ran on this machine and no longer does;
    else when its number has stayed the same for STALE seconds. The holder ends itself if its file was taken from it,
    which happens only where it stood still for so long.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._create()
        over = threading.Event()
        thread = threading.Thread(target=_renew, args=(path, self.handle, over), name="run lock", daemon=True)
        thread.start()
        #: Called by `close`, when this is collected, or when the interpreter ends.
        self.close = weakref.finalize(self, _release, path, self.handle, over, thread)

    def _create(self) -> None:
        """Create the file, as soon as nobody has it. ValueError if somebody does."""
        with naming(self.path):
            while True:
                try:
                    self.handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
                except FileExistsError:
                    self._remove_stale()
                    continue
                _write(self.handle, Holder.this_process())
                return

    def _remove_stale(self) -> None:
        """Remove the file of a holder that is gone. ValueError if it lives."""
        before, give_up = _read(self.path), time.monotonic() + STALE
        if not self.path.exists():
            return
        if before is None or not before.is_gone:
            say(
                f"{before or 'another process'} holds run {self.path.parent.name}; waiting up to {STALE:.0f} s for a "
                "sign that it lives"
            )
        while before is None or not before.is_gone:
            report_progress(f"waiting for {self.path}")
            time.sleep(LOOK)
            now = _read(self.path)
            if now != before and now is not None:
                raise Transient(_taken(self.path.parent, str(now)))
            if not self.path.exists():
                return  # its holder has ended in order
            if time.monotonic() > give_up:
                break
        aside = self.path.with_name(f"{self.path.name}.{os.uname().nodename}.{os.getpid()}")
        with suppress(FileNotFoundError):  # another process was faster
            self.path.rename(aside)
            if _read(aside) != before:  # of the one that was faster: it is put back, if nobody came in between
                with suppress(OSError):
                    os.link(aside, self.path)
            aside.unlink()
        say(f"{before or 'its holder'} is gone: this process takes over run {self.path.parent.name}")


def _taken(folder: Path, holder: str) -> str:
    return f"run {folder.name} is being trained by {holder}; wait or stop it"


def _read(path: Path) -> Holder | None:
    """What a file says of its holder; None where it is not there, or not written yet."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _write(handle: int, holder: Holder) -> None:
    """Into the open file, not to its path, where another's file may be by now. Its size never shrinks."""
    os.pwrite(handle, json.dumps(asdict(holder)).encode(), 0)
    os.fsync(handle)


def _renew(path: Path, handle: int, over: threading.Event) -> None:
    """Raise the number until it is `over`. Where the file is another's by then, two processes write into one folder."""
    holder = Holder.this_process()
    while not over.wait(RENEWED):
        try:
            mine = os.path.samestat(path.stat(), os.fstat(handle))
            holder = Holder(**{**asdict(holder), "number": holder.number + 1})
            _write(handle, holder)
        except FileNotFoundError:
            mine = False
        except OSError:  # a disk that answers again later
            continue
        if not mine and not over.is_set():
            print(
                f"error: {path} is another process's: this one stood still for more than {STALE:.0f} s, and was taken "
                "for dead. It ends here, before two write into one folder",
                file=sys.stderr,
                flush=True,
            )
            os._exit(2)


def _release(path: Path, handle: int, over: threading.Event, thread: threading.Thread) -> None:
    over.set()
    thread.join()
    with suppress(OSError):
        if os.path.samestat(path.stat(), os.fstat(handle)):
            path.unlink()
    with suppress(OSError):
        os.close(handle)


def _machine() -> str:
    """What tells this start of this machine, and its space of process numbers, from all others; empty where the system
    does not say.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _began(process: int) -> str:
    """When a process of this machine began, in the kernel's ticks since its start; empty if there is none."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    state, *rest = text.rpartition(")")[2].split()
    return "" if state in "ZX" else rest[18]  # killed, and not yet waited for by its parent
