"""What a plan of many clips costs: python benchmarks/plan.py [--rounds 5]

Latent folders of 10^3 and 10^6 clips are written (their index is real and their tars are one and the same, of 1,000
clips); then, each time in a process of its own and turn by turn, the folder is opened, the plan made and the first
batch loaded. Reported are seconds to the first batch, from the start of the process (as a run has them) and from the
end of its imports; the bytes that a plan keeps for a clip; the memory that each further clip takes in all; and the
seconds to the batch at sample 10^6 of a run.

Then a mix of buckets (5 aspects; 81, 49 and 17 frames and stills, of uneven sizes): clips trained over clips planned in
each of 4 epochs, and the work of the busiest of 8 processes over the mean in each step. Writes plan.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()

import numpy as np  # noqa: E402
import result  # noqa: E402
import torch  # noqa: E402
from safetensors.numpy import save  # noqa: E402

from wantrain import geometry  # noqa: E402
from wantrain.data import BatchSampler, LatentData, share  # noqa: E402
from wantrain.data.latents.index import Index, pack_identities, pack_ids  # noqa: E402
from wantrain.data.shards import LATENT_SCHEMA, MANIFEST, TarWriter, describe_file  # noqa: E402
from wantrain.util.files import write_json  # noqa: E402

COUNTS, IN_A_TAR, BATCH, LATE = (10**3, 10**6), 1000, 8, 10**6
BUCKET = geometry.Bucket(1, 64, 64)


def write(folder: Path, count: int) -> None:
    """A latent folder of so many clips, each of an own file and with one caption of 1,000."""
    folder.mkdir()
    names = [f"{clip:016x}-0000" for clip in range(IN_A_TAR)]
    with TarWriter(folder / "beside") as tar:
        trainer = save({"latents": np.zeros((16, 1, 8, 8), np.float32)})
        places = [tar.write(name, {"safetensors": trainer})["safetensors"] for name in names]
        latents = tar.finish(folder / "latents.tar")
    with TarWriter(folder / "beside") as tar:
        trainer = save({"text": np.zeros((8, 16), np.float32)})
        text_places = [tar.write(name, {"safetensors": trainer})["safetensors"] for name in names]
        texts = tar.finish(folder / "texts.tar")
    clips, rng = np.arange(count), np.random.default_rng(0)
    identities = pack_identities([f"{clip:032x}" for clip in range(IN_A_TAR)])
    which = clips % IN_A_TAR
    index = Index(
        bucket=np.zeros(count, np.int32),
        source=(sources := rng.integers(0, 2**64, count, dtype=np.uint64)),
        group=sources,
        weight=np.ones(count, np.float32),
        loss_weight=np.ones(count, np.float32),
        windows=np.arange(count + 1),
        captions=np.arange(count + 1),
        caption=which.astype(np.int32),
        tags=np.zeros(count + 1, np.int64),
        tag=np.zeros(0, np.int32),
        shard=np.zeros(count, np.int32),
        offset=np.array([place[0] for place in places])[which],
        size=np.array([place[1] for place in places])[which],
        ids=pack_ids(names)[which],
        identity=identities[which],
        mask=np.zeros(count, np.uint8),
        text_shard=np.zeros(IN_A_TAR, np.int32),
        text_offset=np.array([place[0] for place in text_places]),
        text_size=np.array([place[1] for place in text_places]),
        text_identity=identities,
    )
    index.write(folder / "index.safetensors")
    manifest = {
        "schema": LATENT_SCHEMA, "kind": "latent", "settings": {"model": "any"}, "mask_types": {},
        "temporal_stride": 4, "spatial_stride": 8, "latent_channels": 16, "text_dim": 16, "empty_text": 0,
        "buckets": [str(BUCKET)], "tags": [], "clips": count, "shards": [latents], "text_shards": [texts],
        "files": [describe_file(folder / "index.safetensors")],
    }  # fmt: skip
    write_json(folder / MANIFEST, manifest)


def anonymous() -> int:
    """Bytes of this process's memory that no file backs."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def start(folder: Path) -> dict[str, float]:
    """One start in this process, up to the first batch; then the jump to a late one."""
    torch.set_num_threads(1)
    before, imported = anonymous(), time.perf_counter()
    data = LatentData(shards=folder)
    if "--trace" in sys.argv:
        tracemalloc.start()
    plan = BatchSampler.of(data, batch_size=BATCH, seed=0)
    kept = tracemalloc.get_traced_memory()[0]
    data.load(plan.batch(0), range(BATCH))
    first = time.perf_counter()
    found = {"first": first - STARTED, "after_imports": first - imported, "memory": anonymous() - before, "plan": kept}
    again = BatchSampler.of(data, batch_size=BATCH, seed=0)
    again.batch(LATE // BATCH)
    return {**found, "resume": time.perf_counter() - first}


def scale(folder: Path, rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Small and large folders in turn: the case, and what has no goal."""
    rows: dict[int, list[dict[str, float]]] = {count: [] for count in COUNTS}
    traced = {}
    for count in COUNTS:
        write(folder / str(count), count)
    for number in range(rounds + 1):
        for count in COUNTS if number % 2 else reversed(COUNTS):
            more = [] if number else ["--trace"]
            command = [sys.executable, __file__, "--start", str(folder / str(count)), *more]
            ended = subprocess.run(command, capture_output=True, text=True, check=True)
            row = json.loads(ended.stdout.strip().splitlines()[-1])
            if number:
                rows[count].append(row)
            else:
                traced[count] = row["plan"]
    small, large = rows[COUNTS[0]], rows[COUNTS[1]]
    first = {f"{name} clips": [row["first"] for row in own] for name, own in (("10^6", large), ("10^3", small))}
    memory = [
        (row["memory"] - other["memory"]) / (COUNTS[1] - COUNTS[0]) for row, other in zip(large, small, strict=True)
    ]
    return result.case(
        {
            "seconds to the first batch": result.measure("s", first, at_most=1.2),
            "memory": result.measure("bytes of a clip", {"wantrain": memory}, at_most=64),
            "seconds to sample 10^6": result.measure("s", {"wantrain": [row["resume"] for row in large]}, at_most=1),
        }
    ), {
        "seconds after imports": {
            name: statistics.median(row["after_imports"] for row in own) for name, own in rows.items()
        },
        "bytes that a plan keeps for a clip": traced[COUNTS[1]] / COUNTS[1],
    }


def mixed() -> tuple[dict[str, Any], dict[str, Any]]:
    """Epochs and steps of a set of many shapes: the case, and its facts."""
    frames = {81: 0.5, 49: 0.25, 17: 0.15, 1: 0.1}
    aspects = {(480, 832): 0.6, (832, 480): 0.2, (624, 624): 0.12, (544, 720): 0.05, (720, 544): 0.03}
    shares = {geometry.Bucket(f, *size): a * b for f, a in frames.items() for size, b in aspects.items()}
    buckets = np.repeat(np.arange(len(shares)), [round(20_011 * part) for part in shares.values()])
    tokens = np.array([geometry.num_tokens(geometry.latent_shape(bucket, 4, 8)) for bucket in shares])
    work = (
        tokens * 6 * 14.3e9 + 12.0 * 40 * 5120 * tokens.astype(float) ** 2
    )  # linear layers, attention: forward+backward
    plan, ranks = BatchSampler(buckets, batch_size=16, seed=0), 8
    steps = plan.steps_for_epochs(4)
    order = [plan.batch(step) for step in range(steps)]
    imbalance = 0.0
    for samples in order:
        each = [work[buckets[share(samples, 0, 1, rank, ranks)]].sum() for rank in range(ranks)]
        imbalance = max(imbalance, max(each) / (sum(each) / ranks))
    counts = np.bincount(np.concatenate(order), minlength=len(buckets))
    share_trained = counts.sum() / (4 * len(buckets))
    return result.case(
        {
            "trained over planned": result.measure("clips", {"wantrain": [float(share_trained)]}, at_least=1),
            "busiest over mean": result.measure("operations", {"wantrain": [float(imbalance)]}, at_most=1.05),
        }
    ), {
        "clips": len(buckets), "buckets": len(shares), "steps": steps, "processes": ranks,
        "times a clip came in 4 epochs": [int(counts.min()), int(counts.max())],
    }  # fmt: skip


def main() -> None:
    """Measure, store."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--rounds", type=int, default=5)
    asked.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    asked.add_argument("--trace", action="store_true", help=argparse.SUPPRESS)
    given = asked.parse_args()
    if given.start:
        print(json.dumps(start(given.start)))
        return
    with tempfile.TemporaryDirectory() as folder:
        large, about_large = scale(Path(folder), given.rounds)
    mix, about_mix = mixed()
    found = result.record(
        __file__,
        protocol="a process per start, folders of 10^6 and 10^3 clips in turn, files in the page cache",
        shapes={"clips": COUNTS, "clips of a tar": IN_A_TAR, "batch": BATCH, "mix": about_mix},
        cases={"10^6 clips": large, "mix of buckets": mix},
        libraries=("torch", "numpy"),
        threads=1,
        more=about_large,
    )
    write_json(Path(__file__).with_suffix(".json"), found)
    print("\n".join(result.shown(found)))


if __name__ == "__main__":
    main()
