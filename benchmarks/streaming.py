"""How long steps wait for shards at an address, by bandwidth: python benchmarks/streaming.py

A server on loopback shares out a bandwidth among its connections. Shards of one size lie there, and the cache holds a
third of them, so that shards are fetched throughout. Steps read clips in the order of a run (BatchSampler) through the
code that a run takes (micro_batches.foreseen, Prefetch, RemoteShards), and sleep in place of computing. How much has to
come is measured first, without a limit: the bytes that were fetched over the time that the steps compute. Then the same
steps run with multiples of that rate, with fetching ahead and without, a new cache each time. Of each the share of the
time that steps waited is printed, without the first WARM steps, beside the least that any way of fetching must wait
where the rate is too low, 1 - rate / needed. Writes streaming.json beside this file.

The goal, set before the first run: from 1.5 times the needed rate on, steps wait at most 5 % of the time in the median
of three rounds. Without fetching ahead is told beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import socketserver
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import numpy as np
from result import case, measure, record, shown

from wantrain.data import BatchSampler
from wantrain.data.prefetch import prefetch
from wantrain.data.remote import Cache, RemoteShards
from wantrain.training.micro_batches import Request, foreseen

SHARDS, BYTES, CLIPS = 60, 1 << 18, 4
BATCH, STEP, STEPS, WARM = 4, 0.1, 60, 10
RATES, ROUNDS, GOAL = (0.5, 1.0, 1.5, 2.0, 4.0), 3, (1.5, 0.05)
BLOCK = 1 << 14


class Server(ThreadingHTTPServer):
    """Shards of random bytes, of which all connections together get `rate` bytes per second (None: no limit)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), cast(type[socketserver.BaseRequestHandler], Handler))
        self.content = {f"{number}.tar": np.random.default_rng(number).bytes(BYTES) for number in range(SHARDS)}
        rows = [
            {"name": name, "bytes": BYTES, "sha256": hashlib.sha256(own).hexdigest()}
            for name, own in self.content.items()
        ]
        self.content["manifest.json"] = json.dumps({"kind": "latent", "shards": rows, "files": []}).encode()
        self.rate: float | None = None
        self.free, self.lock = 0.0, threading.Lock()

    def pass_through(self, size: int) -> None:
        """Wait until so many bytes may go."""
        if self.rate is None:
            return
        with self.lock:
            self.free = max(self.free, time.monotonic()) + size / self.rate
            until = self.free
        time.sleep(max(0.0, until - time.monotonic()))


class Handler(BaseHTTPRequestHandler):
    """Sends a shard in blocks."""

    def do_GET(self) -> None:
        """The file that is asked for."""
        server = cast(Server, self.server)
        content = server.content[self.path.rpartition("/")[2]]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        for begin in range(0, len(content), BLOCK):
            block = content[begin : begin + BLOCK]
            server.pass_through(len(block))
            self.wfile.write(block)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


class Clips:
    """Samples by number, CLIPS in a shard; `ahead` says whether shards are fetched ahead."""

    def __init__(self, shards: RemoteShards, *, ahead: bool) -> None:
        self.shards, self.ahead = shards, ahead

    def load(self, samples: Any, positions: Any) -> Any:
        """The bytes of each clip."""
        size = BYTES // CLIPS
        return [
            self.shards.read(self._tar(sample), sample % CLIPS * size, sample % CLIPS * size + size)
            for sample in samples.tolist()
        ]

    def foresee(self, samples: Any, positions: Any) -> bool:
        """As LatentData's."""
        return self.ahead and self.shards.foresee([self._tar(sample) for sample in samples.tolist()])

    @staticmethod
    def _tar(sample: int) -> str:
        return f"{sample // CLIPS}.tar"


@contextmanager
def serving() -> Iterator[Server]:
    """A server in a thread."""
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def run(server: Server, *, rate: float | None, ahead: bool, seed: int) -> tuple[float, int]:
    """The share of the time after the first WARM steps that steps waited, and the bytes that came in that time."""
    server.rate = rate
    plan = BatchSampler(np.zeros(SHARDS * CLIPS, dtype=np.int64), batch_size=BATCH, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache(Path(folder), SHARDS / 3 * BYTES / 1e9)
        clips = Clips(RemoteShards(f"http://127.0.0.1:{server.server_port}", cache), ahead=ahead)

        def requests() -> Iterator[Request]:
            for step in range(STEPS):
                samples, places = plan.batch(step), np.arange(step * BATCH, (step + 1) * BATCH)
                yield Request(((samples, places),), partial(clips.load, samples, places), cast(Any, None))

        batches = prefetch(request.load for request in foreseen(requests(), cast(Any, clips)))
        waited = seconds = 0.0
        before = 0
        for step in range(STEPS):
            began = time.perf_counter()
            next(batches)
            wait = time.perf_counter() - began
            time.sleep(STEP)
            if step < WARM:
                before = cache.fetched
                continue
            waited += wait
            seconds += time.perf_counter() - began
        batches.close()
        return waited / seconds, cache.fetched - before


def main() -> None:
    """Measure how much is needed, then the waits at each rate, turn by turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    found: dict[str, dict[str, list[float]]] = {"ahead": {}, "on demand": {}}
    with serving() as server:
        needed = [run(server, rate=None, ahead=False, seed=seed)[1] / ((STEPS - WARM) * STEP) for seed in range(rounds)]
        print(f"needed: {', '.join(f'{each / 1e6:.2f}' for each in needed)} MB/s")
        for seed in range(rounds):
            for times in RATES:
                for way in found:
                    share, _ = run(server, rate=times * needed[seed], ahead=way == "ahead", seed=seed)
                    found[way].setdefault(str(times), []).append(share)
    cases = {f"{times:g} times the needed rate": case(_measures(found, times)) for times in RATES}
    stored = record(
        __file__,
        protocol=str(__doc__).partition("\n\n")[2],
        shapes={"shards": SHARDS, "bytes": BYTES, "clips_of_a_shard": CLIPS, "batch": BATCH, "seconds_of_a_step": STEP},
        cases=cases,
        libraries=("numpy", "fsspec"),
        threads=1,
        more={"needed_bytes_per_second": needed},
    )
    print("\n".join(shown(stored)))
    Path(__file__).with_suffix(".json").write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


def _measures(found: dict[str, dict[str, list[float]]], times: float) -> dict[str, Any]:
    """The shares of the time that were waited at one rate, fetched ahead and on demand."""
    least, most = GOAL
    ahead = measure("share", {"ahead": found["ahead"][str(times)]}, at_most=most if times >= least else None)
    return {
        "waited, ahead": ahead,
        "waited, on demand": measure("share", {"on demand": found["on demand"][str(times)]}),
    }


if __name__ == "__main__":
    main()
