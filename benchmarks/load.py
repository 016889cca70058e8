"""Loading a multi-GB transformer, beside diffusers' from_pretrained: python benchmarks/load.py [--folder DIR]

A random Wan2.1-1.3B (1.42 billion parameters, 5.7 GB in float32, sharded) is written once and loaded by both, turn by
turn, each time in a process of its own: to bfloat16, float16 and float32 (which the file has). Measured are seconds,
once until the call returns and once until every value has been read (float32 stays in the mapped file: when the call
returns diffusers has not read it and we have, to find damage), and the peak of anonymous memory (RssAnon) above what
the process had before, as a share of the bytes of the loaded model. Both are shown to hold the same values. Writes
load.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import mmap
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

SIZE = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30, "text_dim": 4096}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
REPEATS = 7
WARM_BYTES = 6 << 30


def anonymous() -> int:
    """Bytes of this process's memory that no file backs."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def warm_up() -> None:
    """Touch as much memory as a load needs and give it back: a virtual machine gets pages that lay free for seconds
    from its host again, four times slower, so that what ran before would decide the result.
    """
    memory = mmap.mmap(-1, WARM_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)  # what is free in whole huge pages is what the host takes
    torch.frombuffer(memory, dtype=torch.uint8).fill_(1)


def write(folder: Path) -> None:
    """A random checkpoint in the diffusers layout."""
    from wantrain.models import WanTransformer
    from wantrain.models.weights import renamed_to_diffusers, write_part

    torch.manual_seed(0)
    model = WanTransformer(**SIZE)  # type: ignore[arg-type]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    write_part(folder, model.config(), renamed_to_diffusers(model.state_dict()), shard_bytes=2 << 30)


def load(who: str, folder: Path, dtype: str) -> None:
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

    warm_up()
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


def measure(folder: Path) -> dict[str, Any]:
    """Both sides, turn by turn; medians, spreads and ratios."""
    results: dict[str, Any] = {}
    for dtype in DTYPES:
        rows: dict[str, list[dict[str, float]]] = {"wantrain": [], "diffusers": []}
        for _ in range(REPEATS):
            for who, mine in rows.items():
                command = [sys.executable, __file__, "--load", who, "--folder", str(folder), "--dtype", dtype]
                ended = subprocess.run(command, capture_output=True, text=True, check=True)
                mine.append(json.loads(ended.stdout.strip().splitlines()[-1]))
        ours, theirs = rows["wantrain"], rows["diffusers"]
        assert abs(ours[0]["digest"] - theirs[0]["digest"]) <= 1e-3 * abs(theirs[0]["digest"]), (
            "other values were loaded"
        )
        results[dtype] = {who: summary(mine) for who, mine in rows.items()}
        results[dtype]["ratio"] = {
            key: results[dtype]["wantrain"][key][REPEATS // 2] / results[dtype]["diffusers"][key][REPEATS // 2]
            for key in ("seconds", "read", "peak")
        }
        print(f"{dtype}: {json.dumps(results[dtype])}", flush=True)
    return results


def summary(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Seconds until the call returns, until all is read, and peak memory in sizes of the loaded model; in order."""
    return {key: [round(v, 3) for v in sorted(row[key] for row in rows)] for key in ("seconds", "read", "peak")} | {
        "bytes": int(rows[0]["bytes"])
    }


def main() -> None:
    """Write the checkpoint, measure, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="where the checkpoint is written (6 GB)")
    parser.add_argument("--load", choices=["wantrain", "diffusers"], help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        load(options.load, options.folder, options.dtype)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / "transformer"
        if not (folder / "config.json").is_file():
            write(folder)
        results = measure(folder)
    import diffusers

    about: dict[str, Any] = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    about |= {"machine": platform.machine()}
    about |= {"date": time.strftime("%Y-%m-%d"), "threads": 2, "repeats": REPEATS, "parameters": "1.42 billion"}
    text = json.dumps({"about": about, **results}, indent=2)
    Path(__file__).with_suffix(".json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
