"""One decoder process, and how it hands frames to its parent: through memory that both sides map."""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from wantrain.video import Frames

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG

#: A function that runs in a decoder process: request -> frames of each clip; None is a heartbeat.
Read = Callable[[dict[str, Any]], Iterator[Frames | None]]


class Damaged(ValueError):
    """The bytes of a shard are not those that were written. This ends the run instead of rejecting a file."""


class DecodeProcess:
    """A decoder process, as its parent sees it: requests go out through a pipe, answers come back through a socket."""

    def __init__(self, read: Read, folder: str, siblings: list[DecodeProcess]) -> None:
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
        """Kill the process and wait for its end."""
        self.process.kill()
        self.process.join()
        self.requests.close()
        self.answers.close()

    def ask(self, request: dict[str, Any] | None) -> bool:
        """Send a request, or (None) permission to continue; False if the process is dead."""
        try:
            self.requests.send_bytes(b"" if request is None else json.dumps(request).encode())
        except OSError:
            return False
        return True

    def answer(self) -> tuple[dict[str, Any], Frames | None] | None:
        """The next answer, and the frames that come with it; None if the process is dead."""
        try:
            content, files, *_ = socket.recv_fds(self.answers, 1 << 16, 1)
        except OSError:
            return None
        if not content:
            return None
        answer = json.loads(content)
        return answer, _map_frames(files[0], answer["shape"]) if files else None

    @property
    def fate(self) -> str:
        """How the process ended, in words."""
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
    """Runs in the process: answer requests, one clip at a time, until the parent closes the pipe."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        return
    # What the parent no longer used is never collected here: the end of a decord reader waits for its threads, which a
    # fork does not copy.
    gc.freeze()
    for end in others:
        end.close()
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent handles Ctrl-C and a launcher's stop
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)  # several processes share the cores
    tempfile.tempdir = folder
    while True:
        try:
            request = json.loads(requests.recv_bytes())
        except EOFError:
            return
        last: dict[str, Any] = {"end": True}
        try:
            for frames in read(request):
                if frames is None:
                    answers.send(json.dumps({"alive": True}).encode())
                    continue
                _hand_over(answers, frames)
                requests.recv_bytes()  # permission to continue
        except Damaged as error:
            last = {"damaged": str(error)}
        except (ValueError, MemoryError) as error:
            last = {"reject": str(error) or type(error).__name__}
        except EOFError:
            return
        except Exception as error:  # a bug: the parent raises it
            last = {"bug": f"{error}\n{traceback.format_exc()}"[-10_000:]}
        answers.send(json.dumps(last).encode())


def _hand_over(answers: socket.socket, frames: Frames) -> None:
    """Write frames into an anonymous file in memory, and pass its handle to the parent."""
    file = os.memfd_create("frames")
    try:
        content, done = np.ascontiguousarray(frames).reshape(-1).data, 0
        while done < len(content):
            done += os.write(file, content[done:])
        socket.send_fds(answers, [json.dumps({"shape": frames.shape}).encode()], [file])
    finally:
        os.close(file)


def _map_frames(file: int, shape: list[int]) -> Frames:
    """Frames (F, H, W, 3) mapped from a file in memory, which is freed with the last reference to them."""
    try:
        content = mmap.mmap(file, int(np.prod(shape)))
    finally:
        os.close(file)
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)
