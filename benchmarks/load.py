"""Loading a multi-GB transformer, beside diffusers' from_pretrained: python benchmarks/load.py [--folder DIR]

A random Wan2.1-1.3B (1.42 billion parameters, 5.7 GB in float32, sharded) is written once and loaded by both, turn by
turn and each round the other first, each time in a process of its own: to bfloat16, float16 and float32 (which the file
has). Measured are seconds, once until the call returns and once until every value has been read (float32 stays in the
mapped file: when the call returns diffusers has not read it and we have, to find damage), and the peak of anonymous
memory (RssAnon) above what the process had before, as a share of the bytes of the loaded model. Both are shown to hold
the same values. Writes load.json beside this file.

What new memory costs decides the seconds, and a virtual machine has two kinds: what its host still backs, as all is on
a machine of one's own, and what lay free so long that the host took it back, four times slower. So both are measured:

  backed     all free memory but ROOM is held, and as much as lies in ROOM is touched before each load, in small pages
  untouched  as it comes

The goal, set before the first run of this kind: at most diffusers' seconds until every value has been read, and at most
its memory, in the medians of each dtype, in backed memory; the other is measured beside it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import mmap
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import result
import torch

SIZE = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30, "text_dim": 4096}
MEMORY = ("backed", "untouched")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
REPEATS = 7
#: What is measured of a load, by its name in a row; peak memory as a share of the loaded model.
MEASURES = {
    "read": ("until all is read", "s"),
    "seconds": ("until the call returns", "s"),
    "peak": ("peak memory", "of the model"),
}
#: What a load and its process need, and what of it is touched first.
ROOM, WARM_BYTES = 7 << 30, 5 << 30


def anonymous() -> int:
    """Bytes of this process's memory that no file backs."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def touched(size: int, *, huge: bool) -> mmap.mmap:
    """So many bytes of memory, written to."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    torch.frombuffer(memory, dtype=torch.uint8).fill_(1)
    return memory


@contextmanager
def held(memory: str) -> Iterator[None]:
    """For "backed": all free memory of this machine but ROOM is taken."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemFree"))
    ballast = touched(free - ROOM, huge=True) if memory == "backed" and free > ROOM else None
    yield
    del ballast


def write(folder: Path) -> None:
    """A random checkpoint in the diffusers layout."""
    from wantrain.models import WanTransformer
    from wantrain.models.formats.weights import renamed_to_diffusers, write_part

    torch.manual_seed(0)
    model = WanTransformer(**SIZE)  # type: ignore[arg-type]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    write_part(folder, model.config(), renamed_to_diffusers(model.state_dict()), shard_bytes=2 << 30)


def load(who: str, folder: Path, dtype: str, memory: str) -> None:
    """One load in this process; prints what it took as JSON."""
    torch.set_num_threads(2)
    if who == "wantrain":
        from wantrain.models import load_transformer

        def run() -> torch.nn.Module:
            return load_transformer(folder, dtype=DTYPES[dtype])
    else:
        from diffusers import WanTransformer3DModel

        def run() -> torch.nn.Module:
            return WanTransformer3DModel.from_pretrained(folder, torch_dtype=DTYPES[dtype])

    if memory == "backed":
        touched(WARM_BYTES, huge=False)
    before, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    model = run()
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    if who == "diffusers":  # loading has read all values here already
        for parameter in model.parameters():
            torch.aminmax(parameter.detach())
    read = time.perf_counter() - started
    size = sum(parameter.nbytes for parameter in model.parameters())
    digest = sum(parameter.double().sum().item() for parameter in model.parameters() if parameter.ndim > 1)
    share = (peak[0] - before) / size
    print(json.dumps({"seconds": seconds, "read": read, "peak": share, "bytes": size, "digest": digest}))


def compare(folder: Path) -> dict[str, Any]:
    """Both sides, turn by turn: a case for each dtype in each kind of memory."""
    cases: dict[str, Any] = {}
    for memory, dtype in itertools.product(MEMORY, DTYPES):
        rows: dict[str, list[dict[str, float]]] = {"wantrain": [], "diffusers": []}
        with held(memory):
            for number in range(REPEATS):
                for who in sorted(rows, reverse=number % 2 == 0):
                    words = ["--folder", str(folder), "--dtype", dtype, "--memory", memory]
                    command = [sys.executable, __file__, "--load", who, *words]
                    ended = subprocess.run(command, capture_output=True, text=True, check=True)
                    rows[who].append(json.loads(ended.stdout.strip().splitlines()[-1]))
        digests = [own[0]["digest"] for own in rows.values()]
        measures = {
            what: result.measure(
                unit,
                {who: [row[key] for row in own] for who, own in rows.items()},
                at_most=1.0 if memory == "backed" and key != "seconds" else None,
            )
            for key, (what, unit) in MEASURES.items()
        }
        name = f"{dtype}, {memory}"
        error = abs(digests[0] - digests[1]) / abs(digests[1])
        cases[name] = result.case(measures, {"sum of all values": (error, 1e-3)})
        print("\n".join(result.shown({"cases": {name: cases[name]}})), flush=True)
    return cases


def main() -> None:
    """Write the checkpoint, measure, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="where the checkpoint is written (6 GB)")
    parser.add_argument("--load", choices=["wantrain", "diffusers"], help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help=argparse.SUPPRESS)
    parser.add_argument("--memory", choices=MEMORY, default="untouched", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        load(options.load, options.folder, options.dtype, options.memory)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / "transformer"
        if not (folder / "config.json").is_file():
            write(folder)
        cases = compare(folder)
    found = result.record(
        __file__,
        protocol="a process per load, sides in turn, each round the other first",
        shapes={"transformer": SIZE, "parameters": "1.42 billion"},
        cases=cases,
        libraries=("torch", "diffusers"),
        threads=2,
    )
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
