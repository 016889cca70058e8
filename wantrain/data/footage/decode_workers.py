"""Decoding in processes that can be killed: a file that hangs or crashes its decoder is a reject, never the end.

Workers are forked, as torch's own are, so that nothing is imported twice. Each reads one file at a time and hands over
its clips, one by one, in memory that both sides map; a thread here keeps them busy up to a limit of bytes while the
clips are used, and gives them out in the order asked for, whatever the number of workers. A worker dies with its
parent.
"""

from __future__ import annotations

import collections
import ctypes
import json
import mmap
import multiprocessing
import os
import queue
import selectors
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from wantrain.video import Frames

#: Decoded clips that may wait to be used, in bytes, and as many behind a file whose turn comes first; beside them one
#: of each worker.
WAITING_BYTES = 1 << 30
#: What a small clip counts as: so not more than 256 wait, and a long list of small ones takes no more memory.
LEAST_BYTES = 4 << 20
#: A worker that dies is replaced, and its file tried again, until it has died this often without giving a clip.
ATTEMPTS = 2
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG

#: None is a sign of life of a reader that has nothing to give yet.
Read = Callable[[dict[str, Any]], Iterator[Frames | None]]


class Damaged(ValueError):
    """What a worker was given to read is not what was written: no reject, but the end of the run."""


@dataclass(frozen=True)
class Job:
    """One file to read: `request["windows"]` are the clips wanted of it, in order; the rest is for `read` alone."""

    request: dict[str, Any]


@dataclass(frozen=True)
class Decoded:
    """The next clip of a job: its frames (F, H, W, 3) uint8; or the reason why it and those after it never come."""

    frames: Frames | None
    reason: str = ""


class Decoders:
    """`workers` processes that run `read(request) -> frames of each window in turn`, while the `with` lasts.

    timeout  seconds that a file may take to give its next clip, and as much again for each whole minute of footage
             before that clip, which has to be read first

    A reader that yields None begins its time anew. A ValueError of `read` is a reject, `Damaged` and every other
    exception are raised here.
    """

    def __init__(self, read: Read, *, workers: int, timeout: float) -> None:
        self.read, self.timeout = read, timeout
        self._folder = tempfile.TemporaryDirectory(prefix="wantrain-decode-")
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._workers: list[_Worker] = []
        self._stop: Callable[[], None] = lambda: None  # ends the thread that is at work
        self._closed, self._lock = False, threading.Lock()  # a thread begins before `close` and is ended, or never
        try:
            for _ in range(workers):
                self._workers.append(_Worker(read, self._folder.name, self._workers))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Decoders:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the workers, whatever they are doing; a `decode` that has not begun gives nothing."""
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
        """Every clip of every job in order; of a job that fails, those before that and then one with the reason."""
        pump = _Pump(self._workers, self._replace, iter(jobs), self.timeout, self._woken)
        thread = threading.Thread(target=pump.run, name="decoders", daemon=True)

        def stop() -> None:
            pump.stopped.set()
            self._rouse()
            thread.join()

        with self._lock:
            if self._closed:
                return
            thread.start()
            self._stop = stop
        try:
            while (item := pump.ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                if item.frames is not None:
                    pump.take(_size(item))
                    self._rouse()
                yield item
        finally:
            stop()

    def _rouse(self) -> None:
        """Let the thread look again."""
        with suppress(OSError):  # it has plenty of calls to answer already, or is gone with all else
            self._wake.send(b"x")

    def _replace(self, worker: _Worker) -> None:
        """A new worker in the place of one that is dead or is to be."""
        place = self._workers.index(worker)
        worker.kill()
        self._workers[place] = _Worker(self.read, self._folder.name, self._workers)


class _Worker:
    """One process, seen from its parent: requests go out through a pipe, answers come back through a socket."""

    def __init__(self, read: Read, folder: str, siblings: list[_Worker]) -> None:
        fork = multiprocessing.get_context("fork")
        requests, self.requests = fork.Pipe(duplex=False)
        self.answers, answers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        others = [end for worker in [*siblings, self] for end in (worker.requests, worker.answers)]
        self.process = fork.Process(
            target=_serve, args=(read, requests, answers, others, folder, os.getpid()), name="decoder", daemon=True
        )
        self.process.start()
        requests.close()
        answers.close()

    def kill(self) -> None:
        """End the process, whatever it is doing, and wait for that."""
        self.process.kill()
        self.process.join()
        self.requests.close()
        self.answers.close()

    def ask(self, request: dict[str, Any] | None) -> bool:
        """Send a request, or (None) leave to go on; False if the worker is dead."""
        try:
            self.requests.send_bytes(b"" if request is None else json.dumps(request).encode())
        except OSError:
            return False
        return True

    def answer(self) -> tuple[dict[str, Any], int | None] | None:
        """What it says, with the file that holds the frames; None if it is dead."""
        try:
            content, files, *_ = socket.recv_fds(self.answers, 1 << 16, 1)
        except OSError:
            return None
        return (json.loads(content), files[0] if files else None) if content else None

    @property
    def fate(self) -> str:
        """How it ended, for people."""
        self.process.join(1)
        code = self.process.exitcode
        return f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"


def _serve(
    read: Read,
    requests: Connection,
    answers: socket.socket,
    others: list[Connection | socket.socket],
    folder: str,
    parent: int,
) -> None:
    """A worker's life: read what is asked for, one clip at a time, until nobody asks any more."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        return
    for end in others:
        end.close()
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C and a launcher's end are for the parent to answer
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)  # the parent's threads are not here, and several workers share the cores
    tempfile.tempdir = folder
    while True:
        try:
            request = json.loads(requests.recv_bytes())
        except EOFError:
            return
        said: dict[str, Any] = {"end": True}
        try:
            for frames in read(request):
                if frames is None:
                    answers.send(json.dumps({"alive": True}).encode())
                    continue
                _hand_over(answers, frames)
                requests.recv_bytes()  # leave to go on
        except Damaged as error:
            said = {"damaged": str(error)}
        except (ValueError, MemoryError) as error:
            said = {"reject": str(error) or type(error).__name__}
        except EOFError:
            return
        except Exception as error:  # a bug: the parent raises it
            said = {"bug": f"{error}\n{traceback.format_exc()}"[-10_000:]}
        answers.send(json.dumps(said).encode())


def _hand_over(answers: socket.socket, frames: Frames) -> None:
    """Put frames into a file that is nowhere but in memory, and pass it on."""
    file = os.memfd_create("frames")
    try:
        content, done = np.ascontiguousarray(frames).reshape(-1).data, 0
        while done < len(content):
            done += os.write(file, content[done:])
        socket.send_fds(answers, [json.dumps({"shape": frames.shape}).encode()], [file])
    finally:
        os.close(file)


@dataclass
class _Reading:
    """A job in work: how many clips it has given, since when it owes the next, how often its worker died meanwhile."""

    job: Job
    number: int
    given: int = 0
    deaths: int = 0
    deadline: float | None = None  # None: waiting for leave to go on


@dataclass
class _Pump:
    """The thread that keeps workers busy: hands out jobs, gathers clips, sees who is late or dead."""

    workers: list[_Worker]
    replace: Callable[[_Worker], None]
    jobs: Iterator[Job]
    timeout: float
    woken: socket.socket
    ready: queue.SimpleQueue[Decoded | BaseException | None] = field(default_factory=queue.SimpleQueue)
    stopped: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.emitted_bytes = self.held_bytes = 0  # in `ready`, and in `held` behind an earlier job
        self.held: dict[int, collections.deque[Decoded | None]] = {}  # by job; None ends it
        self.head = self.next = 0  # the job that `ready` is fed from, and the next to be handed out
        self.active: dict[_Worker, _Reading] = {}
        self.again: list[_Reading] = []  # whose worker died
        self.exhausted = False

    def take(self, size: int) -> None:
        """The consumer has taken so many bytes."""
        with self.lock:
            self.emitted_bytes -= size

    def run(self) -> None:
        """The thread: until all jobs are read, an error, or `stopped`."""
        try:
            while not self.stopped.is_set():
                self._hand_out()
                if self.exhausted and not self.active and not self.again:
                    break
                self._gather()
            self.ready.put(None)
        except BaseException as error:  # handed to the consumer, who raises it
            self.ready.put(error)

    def _room(self, number: int) -> bool:
        """True if one more clip of a job may wait: the one whose turn it is looks at its own bytes alone."""
        with self.lock:
            used = self.emitted_bytes + (0 if number == self.head else self.held_bytes)
        return used < WAITING_BYTES

    def _hand_out(self) -> None:
        for worker, reading in list(self.active.items()):
            if reading.deadline is None and self._room(reading.number):
                self._start(worker, reading, None)
        for worker in [worker for worker in self.workers if worker not in self.active]:
            following = self._next_reading()
            if following is None:
                return
            self.active[worker] = following
            windows = following.job.request["windows"][following.given :]
            self._start(worker, following, {**following.job.request, "windows": windows})

    def _next_reading(self) -> _Reading | None:
        if self.again:
            return self.again.pop(0)
        if self.exhausted or not self._room(self.next):
            return None
        job = next(self.jobs, None)
        if job is None:
            self.exhausted = True
            return None
        self.next += 1
        self.held[self.next - 1] = collections.deque()
        return _Reading(job, self.next - 1)

    def _start(self, worker: _Worker, reading: _Reading, request: dict[str, Any] | None) -> None:
        """Let a worker begin, or go on; its time runs from here."""
        windows = reading.job.request["windows"]
        minutes = int(windows[min(reading.given, len(windows) - 1)].get("start", 0) // 60)
        reading.deadline = time.monotonic() + self.timeout * (1 + minutes)
        if not worker.ask(request):
            self._died(worker)

    def _gather(self) -> None:
        """Wait for the next answer, or a deadline, or the consumer; then see to all that has happened."""
        deadlines = [reading.deadline for reading in self.active.values() if reading.deadline is not None]
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
            self._hear(worker)
        now = time.monotonic()
        for worker, reading in list(self.active.items()):
            if reading.deadline is not None and reading.deadline < now and worker not in answered:
                self.replace(worker)
                del self.active[worker]
                self._give(reading, Decoded(None, f"its decoder gave no clip within {self.timeout:g} s"))
                self._give(reading, None)

    def _hear(self, worker: _Worker) -> None:
        answer = worker.answer()
        if answer is None:
            return self._died(worker)
        (said, file), reading = answer, self.active[worker]
        if file is not None:
            reading.given, reading.deaths, reading.deadline = reading.given + 1, 0, None
            return self._give(reading, Decoded(_mapped(file, said["shape"])))
        if "alive" in said:
            reading.deadline = time.monotonic() + self.timeout
            return None
        if "damaged" in said:
            raise Damaged(said["damaged"])
        if "bug" in said:
            raise RuntimeError(f"in a decoder process: {said['bug']}")
        del self.active[worker]
        if "reject" in said:
            self._give(reading, Decoded(None, said["reject"]))
        elif reading.given < len(reading.job.request["windows"]):
            self._give(reading, Decoded(None, f"gave {reading.given} clips only"))
        return self._give(reading, None)

    def _died(self, worker: _Worker) -> None:
        """A worker is dead: another takes its place, and what it owed is asked for again, or given up."""
        fate = worker.fate
        self.replace(worker)
        reading = self.active.pop(worker, None)
        if reading is None:
            return
        # What it had given before is here; one that has just given all dies of something else.
        reading.deaths += 1
        if reading.given == len(reading.job.request["windows"]):
            self._give(reading, None)
        elif reading.deaths < ATTEMPTS:
            self.again.append(reading)
        else:
            self._give(reading, Decoded(None, f"its decoder died {reading.deaths} times ({fate})"))
            self._give(reading, None)

    def _give(self, reading: _Reading, item: Decoded | None) -> None:
        """Keep an item at its place in the order, and let go of all whose turn has come."""
        self.held[reading.number].append(item)
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


def _mapped(file: int, shape: list[int]) -> Frames:
    """The frames of a file in memory; it goes when the last reference to them does."""
    try:
        content = mmap.mmap(file, int(np.prod(shape)))
    finally:
        os.close(file)
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)
