"""Decoding in worker processes that can be killed: a file that hangs or crashes its decoder is rejected.

Workers are forked, as torch's own are, so that nothing is imported twice. Each decodes one file at a time and hands
over its clips one by one. A thread of the parent keeps all workers busy, up to a limit of decoded bytes, and returns
the clips in the order of the jobs, whatever the number of workers. A worker dies with its parent.
"""

from __future__ import annotations

import collections
import queue
import selectors
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from wantrain.data.footage.decode_process import Damaged, DecodeProcess, Read
from wantrain.video import Frames

#: Bytes of decoded clips that may wait for the consumer, and as many again behind an earlier job that is not complete;
#: beside them one clip of each worker.
WAITING_BYTES = 1 << 30
#: Least bytes that a clip counts for, so that at most 256 wait.
LEAST_BYTES = 4 << 20
#: A worker that dies is replaced and its file tried again, until it has died this often without returning a clip.
ATTEMPTS = 2


@dataclass(frozen=True)
class DecodeOptions:
    """Options of the decoder processes.

    workers  number of processes; None: by the number of cores, at most 8
    timeout  seconds that a file may take to return its next clip, or another heartbeat
    """

    workers: int | None = None
    timeout: float = 120.0


@dataclass(frozen=True)
class Job:
    """One file to decode: `request["windows"]` lists the clips, in order; only `read` uses the rest of the request."""

    request: dict[str, Any]


@dataclass(frozen=True)
class Decoded:
    """The next clip of a job: its frames (F, H, W, 3) uint8; or None and the reason why this and later clips fail."""

    frames: Frames | None
    reason: str = ""


class Decoders:
    """`workers` processes that run `read(request) -> frames of each window in turn`, inside the `with`.

    timeout  seconds that a file may take to return its next clip, plus as much again for each whole minute of footage
             before that clip, which has to be decoded first

    A None from `read` restarts the timeout. A ValueError of `read` rejects the file; `Damaged` and all other
    exceptions are raised here.
    """

    def __init__(self, read: Read, *, workers: int, timeout: float) -> None:
        self.read, self.timeout = read, timeout
        self._folder = tempfile.TemporaryDirectory(prefix="wantrain-decode-")
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._workers: list[DecodeProcess] = []
        self._stop: Callable[[], None] = lambda: None  # ends the running scheduler thread
        self._closed, self._lock = False, threading.Lock()  # no scheduler thread starts after `close`
        try:
            for _ in range(workers):
                self._workers.append(DecodeProcess(read, self._folder.name, self._workers))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Decoders:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the workers; a `decode` that has not begun returns nothing."""
        with self._lock:
            self._closed = True
        self._stop()
        for worker in self._workers:
            worker.kill()
        self._workers.clear()
        for end in (self._wake, self._woken):
            end.close()
        self._folder.cleanup()

    def decode(self, jobs: Iterable[Job]) -> Generator[Decoded]:
        """Every clip of every job, in order; a job that fails ends with one item that holds the reason."""
        scheduler = _Scheduler(self._workers, self._replace, iter(jobs), self.timeout, self._woken)
        thread = threading.Thread(target=scheduler.run, name="decoders", daemon=True)

        def stop() -> None:
            scheduler.stopped.set()
            self._wake_scheduler()
            thread.join()

        with self._lock:
            if self._closed:
                return
            thread.start()
            self._stop = stop
        try:
            while (item := scheduler.ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                if item.frames is not None:
                    scheduler.take(_size(item))
                    self._wake_scheduler()
                yield item
        finally:
            stop()

    def _wake_scheduler(self) -> None:
        """Make the scheduler check its state."""
        with suppress(OSError):  # the socket is full of earlier calls, or closed
            self._wake.send(b"x")

    def _replace(self, worker: DecodeProcess) -> None:
        """Kill a worker and start a new one in its place."""
        place = self._workers.index(worker)
        worker.kill()
        self._workers[place] = DecodeProcess(self.read, self._folder.name, self._workers)


@dataclass
class _Progress:
    """State of a job: how many clips it has returned, when the next is due, how often its worker has died since."""

    job: Job
    number: int
    returned: int = 0
    deaths: int = 0
    deadline: float | None = None  # None: waiting for permission to continue


@dataclass
class _Scheduler:
    """The scheduler thread: assigns jobs to workers, collects clips, and replaces workers that are late or dead."""

    workers: list[DecodeProcess]
    replace: Callable[[DecodeProcess], None]
    jobs: Iterator[Job]
    timeout: float
    woken: socket.socket
    ready: queue.SimpleQueue[Decoded | BaseException | None] = field(default_factory=queue.SimpleQueue)
    stopped: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.emitted_bytes = self.held_bytes = 0  # of clips in `ready`, and of those in `held` behind an earlier job
        self.held: dict[int, collections.deque[Decoded | None]] = {}  # by job number; None ends a job
        self.head = self.next = 0  # the job whose clips go into `ready`, and the next to assign
        self.active: dict[DecodeProcess, _Progress] = {}
        self.retries: list[_Progress] = []  # jobs whose worker died
        self.exhausted = False

    def take(self, size: int) -> None:
        """Note that the consumer has taken `size` bytes."""
        with self.lock:
            self.emitted_bytes -= size

    def run(self) -> None:
        """Run until all jobs are decoded, an error occurs, or `stopped` is set."""
        try:
            while not self.stopped.is_set():
                self._assign()
                if self.exhausted and not self.active and not self.retries:
                    break
                self._wait()
            self.ready.put(None)
        except BaseException as error:  # handed to the consumer, who raises it
            self.ready.put(error)

    def _room(self, number: int) -> bool:
        """True if there is room for one more clip of a job; the job at the head counts only the clips in `ready`."""
        with self.lock:
            used = self.emitted_bytes + (0 if number == self.head else self.held_bytes)
        return used < WAITING_BYTES

    def _assign(self) -> None:
        """Let workers continue, and give jobs to idle ones, as far as there is room."""
        for worker, progress in list(self.active.items()):
            if progress.deadline is None and self._room(progress.number):
                self._start(worker, progress, None)
        for worker in [worker for worker in self.workers if worker not in self.active]:
            following = self._next_job()
            if following is None:
                return
            self.active[worker] = following
            windows = following.job.request["windows"][following.returned :]
            self._start(worker, following, {**following.job.request, "windows": windows})

    def _next_job(self) -> _Progress | None:
        """A job whose worker died, or the next new one; None if there is neither, or no room."""
        if self.retries:
            return self.retries.pop(0)
        if self.exhausted or not self._room(self.next):
            return None
        job = next(self.jobs, None)
        if job is None:
            self.exhausted = True
            return None
        self.next += 1
        self.held[self.next - 1] = collections.deque()
        return _Progress(job, self.next - 1)

    def _start(self, worker: DecodeProcess, progress: _Progress, request: dict[str, Any] | None) -> None:
        """Let a worker begin, or continue; its timeout starts here."""
        windows = progress.job.request["windows"]
        minutes = int(windows[min(progress.returned, len(windows) - 1)].get("start", 0) // 60)
        progress.deadline = time.monotonic() + self.timeout * (1 + minutes)
        if not worker.ask(request):
            self._replace_dead(worker)

    def _wait(self) -> None:
        """Wait for an answer, a deadline or the consumer, and handle all of them that have come."""
        deadlines = [progress.deadline for progress in self.active.values() if progress.deadline is not None]
        wait = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        with selectors.DefaultSelector() as selector:
            selector.register(self.woken, selectors.EVENT_READ)
            for worker in self.workers:
                selector.register(worker.answers, selectors.EVENT_READ, worker)
            events = selector.select(wait)
        answered = [key.data for key, _ in events if key.data is not None]
        if len(answered) < len(events):
            self.woken.recv(1 << 16)
        for worker in answered:
            self._handle_answer(worker)
        now = time.monotonic()
        for worker, progress in list(self.active.items()):
            if progress.deadline is not None and progress.deadline < now and worker not in answered:
                self.replace(worker)
                del self.active[worker]
                self._emit(progress, Decoded(None, f"its decoder gave no clip within {self.timeout:g} s"))
                self._emit(progress, None)

    def _handle_answer(self, worker: DecodeProcess) -> None:
        answered = worker.answer()
        if answered is None:
            return self._replace_dead(worker)
        (answer, frames), progress = answered, self.active[worker]
        if frames is not None:
            progress.returned, progress.deaths, progress.deadline = progress.returned + 1, 0, None
            return self._emit(progress, Decoded(frames))
        if "alive" in answer:
            progress.deadline = time.monotonic() + self.timeout
            return None
        if "damaged" in answer:
            raise Damaged(answer["damaged"])
        if "bug" in answer:
            raise RuntimeError(f"in a decoder process: {answer['bug']}")
        del self.active[worker]
        if "reject" in answer:
            self._emit(progress, Decoded(None, answer["reject"]))
        elif progress.returned < len(progress.job.request["windows"]):
            self._emit(progress, Decoded(None, f"gave {progress.returned} clips only"))
        return self._emit(progress, None)

    def _replace_dead(self, worker: DecodeProcess) -> None:
        """Replace a dead worker; its job is tried again, or rejected after too many attempts."""
        fate = worker.fate
        self.replace(worker)
        progress = self.active.pop(worker, None)
        if progress is None:
            return
        # Clips returned before are kept. A job whose clips have all been returned is complete.
        progress.deaths += 1
        if progress.returned == len(progress.job.request["windows"]):
            self._emit(progress, None)
        elif progress.deaths < ATTEMPTS:
            self.retries.append(progress)
        else:
            self._emit(progress, Decoded(None, f"its decoder died {progress.deaths} times ({fate})"))
            self._emit(progress, None)

    def _emit(self, progress: _Progress, item: Decoded | None) -> None:
        """Hold an item at its place in the order, and make all items ready whose turn has come."""
        self.held[progress.number].append(item)
        with self.lock:
            self.held_bytes += _size(item)
        while self.head in self.held:
            queued = self.held[self.head]
            while queued:
                following = queued.popleft()
                if following is None:
                    del self.held[self.head]
                    self.head += 1
                    break
                with self.lock:
                    self.held_bytes -= _size(following)
                    self.emitted_bytes += _size(following)
                self.ready.put(following)
            else:
                return


def _size(item: Decoded | None) -> int:
    return 0 if item is None or item.frames is None else max(LEAST_BYTES, item.frames.nbytes)
