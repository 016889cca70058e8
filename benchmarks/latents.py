"""Reading latent shards beside webdataset and a DataLoader: python benchmarks/latents.py [--rounds 7]

64 clips as the 14B has them (latents 16x21x60x104 and 128 rows of text, bf16: 5.25 MB) are written once as a latent
folder and once as one tar of the same tensors, which webdataset reads, safetensors decodes and a DataLoader hands over
from 1 or 2 worker processes, batch 1. Ours is a thread that loads ahead (there are no worker processes), and turns
every tensor into the float32 that training takes; theirs hands over bf16, as stored, which favours it. `0` loads in the
loop itself. Reported are clips/s, turn by turn in an order that turns round, and how long a step that takes 100 ms (a
sleep) waits for its data. Writes latents.json.
"""

from __future__ import annotations

import argparse
import functools
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import result
import torch
import webdataset
from safetensors.torch import load
from torch.utils.data import DataLoader

from wantrain import geometry
from wantrain.batch import Batch
from wantrain.data import ConditioningInputs, DecodeOptions, EncodeOptions, Encoders, LatentData, encode_shards
from wantrain.data.prefetch import prefetch
from wantrain.data.shards import MANIFEST, SCHEMA, TarWriter, to_json
from wantrain.util.files import write_json

CLIPS, SHAPE, TEXT = 64, (16, 21, 60, 104), (128, 4096)
#: One element to a pixel, so that frames as small as latents give latents as large as the 14B's.
STRIDES: dict[str, Any] = {"temporal_stride": 1, "spatial_stride": 1}
STEP, STEPS = 0.1, 60
#: Goals: times the clips of webdataset, and the share of the time that a training waits.
RATIO, WAIT = 2.5, 0.01


def write_videos(folder: Path) -> None:
    """Video shards that say what clips there are; nobody decodes them here."""
    folder.mkdir()
    with TarWriter(folder / "beside") as writer:
        for clip in range(CLIPS):
            about = {
                "caption": f"clip {clip}", "source": f"{clip}.mp4", "sha256": f"{clip:064x}", "fps": 16.0,
                "height": SHAPE[2], "width": SHAPE[3], "windows": [{"start": 0.0, "num_frames": SHAPE[1]}],
            }  # fmt: skip
            writer.write(f"{clip:016x}", {"mp4": b"", "json": to_json(about)})
        tar = writer.finish(folder / "video.tar")
    shards = {"schema": SCHEMA, "kind": "video", "settings": {"model": "any"}, "alike": [], "shards": [tar]}
    write_json(folder / MANIFEST, shards)


def write_latents(videos: Path, folder: Path) -> None:
    """The latent folder: random latents and texts, written by encode.py's own code."""
    random = torch.Generator().manual_seed(0)
    encode_shards(
        videos,
        folder,
        Encoders(
            encode_pixels=lambda pixels: torch.randn(len(pixels), *SHAPE, generator=random),
            encode_texts=lambda texts: [torch.randn(*TEXT, generator=random) for _ in texts],
            vae_fingerprint="random",
            text_fingerprint="random",
        ),
        sizes=geometry.Buckets((SHAPE[2] * SHAPE[3],), (SHAPE[3] / SHAPE[2],), 4),
        inputs=ConditioningInputs({}, "none", **STRIDES),
        options=EncodeOptions(
            "any", rejects_limit=0.0, shard_bytes=1 << 30, shard_clips=CLIPS, decode=DecodeOptions(workers=1)
        ),
        read=lambda request: iter([np.zeros((SHAPE[1], SHAPE[2], SHAPE[3], 3), np.uint8)]),
    )


def write_tar(data: LatentData, path: Path) -> None:
    """The same tensors as people store them for webdataset: latents and text of a clip in one sample of one tar."""
    from safetensors.torch import save

    with TarWriter(path.with_suffix(".tmp")) as writer:
        for clip in range(CLIPS):
            batch = data.load([clip], [clip])
            tensors = {"latents": batch.latents_BCTHW[0].bfloat16(), "text": batch.text_BLD[0].bfloat16()}
            writer.write(f"{clip:06d}", {"safetensors": save(tensors)})
        writer.finish(path)


def ours(data: LatentData, ahead: bool) -> Iterator[Batch]:
    """Clips one by one, again and again."""

    def request(place: int) -> Callable[[], Batch]:
        return lambda: data.load([place % CLIPS], [place])

    requests = map(request, range(10**9))
    if ahead:
        yield from prefetch(requests)
    for answer in requests:
        yield answer()


def theirs(tar: Path, workers: int) -> Iterator[Any]:
    """The same through webdataset and a DataLoader; each worker reads the tar from its beginning."""
    read = webdataset.WebDataset([str(tar)] * 1000, shardshuffle=False, empty_check=False, nodesplitter=None)
    if workers:
        read = webdataset.WebDataset([str(tar)] * 1000, shardshuffle=False, workersplitter=webdataset.split_by_worker)
    decoded = read.to_tuple("safetensors").map_tuple(load)
    return iter(DataLoader(decoded, batch_size=1, num_workers=workers))


def rate(batches: Iterator[Any]) -> float:
    """Clips a second over two passes, the first half of one left out."""
    for _ in range(CLIPS // 2):
        next(batches)
    began = time.perf_counter()
    for _ in range(2 * CLIPS):
        next(batches)
    return 2 * CLIPS / (time.perf_counter() - began)


def waiting(batches: Iterator[Any]) -> float:
    """The share of a training's time that it waits for data, if a step takes 100 ms."""
    next(batches)
    began, waited = time.perf_counter(), 0.0
    for _ in range(STEPS):
        time.sleep(STEP)
        asked = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - asked
    return waited / (time.perf_counter() - began)


def compare(data: LatentData, tar: Path, rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every side in turn, forwards and backwards: the cases, and what is no comparison."""
    sides: dict[str, Callable[[], Iterator[Any]]] = {
        "wantrain 0": functools.partial(ours, data, False),
        "wantrain thread": functools.partial(ours, data, True),
        **{f"webdataset {workers}": functools.partial(theirs, tar, workers) for workers in (0, 1, 2)},
    }
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in list(sides) if number % 2 else list(reversed(sides)):
            batches = sides[side]()
            rates[side].append(rate(batches))
            del batches
    mine = rates["wantrain thread"]
    cases = {
        f"beside {workers} worker{'s' if workers > 1 else ''}": result.case(
            {
                "clips per second": result.measure(
                    "clips/s",
                    {"wantrain thread": mine, f"webdataset {workers}": rates[f"webdataset {workers}"]},
                    at_least=RATIO,
                )
            }
        )
        for workers in (1, 2)
    }
    waits = {"wantrain thread": waiting(ours(data, True)), "webdataset 1": waiting(theirs(tar, 1))}
    wait = result.measure("share of the time", {"wantrain thread": [waits["wantrain thread"]]}, at_most=WAIT)
    cases["steps of 100 ms"] = result.case({"waiting": wait})
    alone = {side: rates[f"{side} 0"] for side in ("wantrain", "webdataset")}
    return cases, {"clips per second in the loop itself": alone, "waiting of webdataset 1": waits["webdataset 1"]}


def main() -> None:
    """Write the clips twice, hold both against each other, measure, store."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--rounds", type=int, default=7)
    rounds = asked.parse_args().rounds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_videos(folder / "videos")
        write_latents(folder / "videos", folder / "latents")
        data = LatentData(shards=folder / "latents", holdout=0.0, caption_dropout=0.0)
        write_tar(data, folder / "theirs.tar")
        with tarfile.open(folder / "theirs.tar") as tar:
            assert len(tar.getnames()) == CLIPS
        mine, other = next(ours(data, False)), next(theirs(folder / "theirs.tar", 0))[0]
        assert torch.equal(mine.latents_BCTHW, other["latents"].float()), "the sides read other latents"
        assert torch.equal(mine.text_BLD, other["text"].float()), "the sides read other texts"
        cases, more = compare(data, folder / "theirs.tar", rounds)
    found = result.record(
        __file__,
        protocol="one process, sides in turn in an order that turns round; files in the page cache",
        shapes={"clips": CLIPS, "latents": SHAPE, "text": TEXT, "dtype": "bf16", "batch": 1},
        cases=cases,
        libraries=("torch", "webdataset"),
        threads=1,
        more=more,
    )
    write_json(Path(__file__).with_suffix(".json"), found)
    print("\n".join(result.shown(found)))


if __name__ == "__main__":
    main()
