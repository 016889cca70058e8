"""How threads should wait for each other: python benchmarks/waiting.py

wan-tiny's VAE encodes a clip of 17x64x64 over and over, in fresh processes: with one thread, and with one per core, of
which those that wait sleep at once, spin shortly before (as wantrain sets it), or spin (OpenMP's default). Each runs
alone and beside another process that uses all cores, turn by turn; reported are frames per second, and those of the
short spin over each other way. Writes waiting.json beside this file. "Alone" is true only on a machine where nothing
else runs; its load is written too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import result

from wantrain.util.distributed import cores

ROOT = Path(__file__).resolve().parent.parent
SECONDS, ROUNDS, FRAMES = 6.0, 3, 17
#: Spins of OpenMP's default.
LONG = 300_000
#: Ways of computing: name -> threads (None: one per core), spins before a waiting thread sleeps.
WAYS: dict[str, tuple[int | None, int]] = {
    "one thread": (1, 0),
    "threads that sleep": (None, 0),
    "threads that spin shortly": (None, 2000),
    "threads that spin": (None, LONG),
}
PLACES = ("alone", "beside another")


def main() -> None:
    """Measure all ways in both places, or with --encode be one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--encode", type=int, metavar="THREADS", help="encode until SECONDS are over, and print frames/s"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    if options.encode is not None:
        print(encode(options.encode))
        return
    rates: dict[str, dict[str, list[float]]] = {place: {way: [] for way in WAYS} for place in PLACES}
    for _ in range(options.rounds):
        for place, own in rates.items():
            for way, (threads, spins) in WAYS.items():
                own[way].append(measured(threads, spins, beside=place != "alone"))
    chosen = "threads that spin shortly"
    cases = {
        place: result.case(
            {
                f"beside {way}": result.measure("frames/s", {chosen: own[chosen], way: own[way]})
                for way in WAYS
                if way != chosen
            }
        )
        for place, own in rates.items()
    }
    found = result.record(
        __file__,
        protocol="a process per measurement, all ways in turn",
        shapes={"clip": [FRAMES, 64, 64], "seconds": SECONDS},
        cases=cases,
        threads=cores(),
    )
    print("\n".join(result.shown(found)))
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def measured(threads: int | None, spins: int, *, beside: bool) -> float:
    """Frames per second of one process, with another that spins on all cores or without."""
    other = started(cores(), LONG) if beside else None
    try:
        answer, _ = started(threads or cores(), spins).communicate()
        return float(answer)
    finally:
        if other is not None:
            other.kill()
            other.wait()


def started(threads: int, spins: int) -> subprocess.Popen[str]:
    """A process of this file that encodes."""
    environment = {key: value for key, value in os.environ.items() if key not in {"OMP_WAIT_POLICY", "OMP_NUM_THREADS"}}
    environment |= {"GOMP_SPINCOUNT": str(spins)}
    words = [sys.executable, __file__, "--encode", str(threads)]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)


def encode(threads: int) -> float:
    """Frames per second of wan-tiny's VAE."""
    import torch  # not before OMP_WAIT_POLICY is read

    from wantrain.models import Base

    torch.set_num_threads(threads)
    vae = Base(ROOT / "assets" / "wan-tiny").vae()
    pixels = torch.rand(1, 3, FRAMES, 64, 64) * 2 - 1
    with torch.no_grad():
        vae.encode(pixels)
        begin, clips = time.perf_counter(), 0
        while (seconds := time.perf_counter() - begin) < SECONDS:
            vae.encode(pixels)
            clips += 1
    return clips * FRAMES / seconds


if __name__ == "__main__":
    main()
