"""Storage: bytes of clips as the product writes them, shards, index and manifest, and its cache of shards at work."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import plan as plan_benchmark
import torch
from safetensors.torch import save

from scale_parts.assumptions import Assumptions
from scale_parts.cluster import STRIDES
from scale_parts.order import MIX, node_reads
from wantrain import config, geometry
from wantrain.data import BatchSampler
from wantrain.data.footage.video_shards import VideoEntry
from wantrain.data.latents.work_units import ClipRow, TextRow, latent_units, text_units
from wantrain.data.remote import MANIFEST_LIMIT, Cache
from wantrain.data.shards import TarWriter, to_json

#: `shard_clips` of other cuts that are compared.
CUTS = (256, 1024)
#: Clips whose work units are made, to see how many a shard has.
CUT = 20_000
#: The cache at work: shards, clips of each, reads before the count and counted, and the parts of the set that it holds.
SHARDS, IN_SHARD, READS, HELD = 128, 16, 1200, (0.1, 0.25, 0.5, 0.75)


def storage(taken: Assumptions, computed: dict[str, float], shares: dict[str, float]) -> dict[str, Any]:
    """All about bytes: of the set, of a step, and of the cache. `computed` are the seconds of a step of each bucket."""
    with tempfile.TemporaryDirectory() as folder:
        clips, row = clip_bytes(Path(folder), taken)
        index = index_bytes(Path(folder))
    mean = {what: sum(part * clips[bucket][what] for bucket, part in shares.items()) for what in ("latents", "text")}
    total = taken.clips * (mean["latents"] + mean["text"])
    read = mean["latents"] + mean["text"]
    seconds = sum(part * computed[bucket] for bucket, part in shares.items())
    rates = {bucket: sum(clips[bucket].values()) / computed[bucket] for bucket in MIX}
    held = min(1.0, taken.cache_gb * 1e9 / total)
    cuts = [
        _of_cut(replace(taken, shard_clips=most, shard_mb=max(taken.shard_mb, 2 * most)), mean, row)
        for most in sorted({taken.shard_clips, *CUTS})
    ]
    for cut in cuts:
        cut["amplification"] = (1 - held) * cut.pop("fetched") / read
        cut["node"] = taken.node * cut["amplification"] * read / seconds
    return {
        "clips": clips,
        "mean": mean,
        "total": total,
        "limit": MANIFEST_LIMIT,
        "cuts": cuts,
        "index": taken.clips * index,
        "read_per_second": {
            "card": read / seconds,
            "node": taken.node * read / seconds,
            "all": taken.processes * read / seconds,
            "worst_bucket": max(rates, key=lambda bucket: rates[bucket]),
            "worst_all": taken.processes * max(rates.values()),
        },
        "held": held,
        "cache": cache_at_work(taken),
    }


def _of_cut(taken: Assumptions, mean: dict[str, float], row: float) -> dict[str, float]:
    """What follows from the size of shards: their number, the manifest, and the bytes fetched for a clip and its text
    that are in no cache.
    """
    sizes = shard_sizes(taken)
    files = taken.clips / sizes["clips"] + taken.clips / sizes["texts"]
    fetched = mean["latents"] * sizes["clips"] + mean["text"] * sizes["texts"]
    return {"shard_clips": taken.shard_clips, "shard_mb": taken.shard_mb, **sizes, "files": files,
            "manifest": files * row, "fetched": fetched}  # fmt: skip


def clip_bytes(folder: Path, taken: Assumptions) -> tuple[dict[str, dict[str, float]], float]:
    """Bytes of a clip's latents and of its text in the tars, by bucket, and of a shard's row in the manifest."""
    found, row = {}, {}
    width = config.compose("train", ["model=t2v_a14b"]).model.transformer.text_dim
    for bucket in MIX:
        shape = geometry.latent_shape(geometry.Bucket(*map(int, bucket.split("x"))), *STRIDES)
        tensors = {"latents": torch.zeros(16, *shape, dtype=torch.bfloat16)}
        text = {"text": torch.zeros(taken.text_tokens, width, dtype=torch.bfloat16)}
        sizes = []
        for content in (tensors, text):
            about = {"source": "videos/0123456789.mp4", "bucket": bucket, "cropped": 0.0, "identity": "0" * 32}
            with TarWriter(folder / "beside") as tar:
                tar.write("0" * 21, {"safetensors": save(content), "json": to_json(about)})
                sizes.append(float(tar.size))
                row = tar.finish(folder / f"latent-{'0' * 16}.tar")
        found[bucket] = dict(zip(("latents", "text"), sizes, strict=True))
    return found, float(len(json.dumps(row)) + 2)


def index_bytes(folder: Path) -> float:
    """Bytes of the index file for a clip with a text of its own."""
    sizes = []
    for count in (1000, 2000):
        plan_benchmark.write(folder / str(count), count)
        sizes.append((folder / str(count) / "index.safetensors").stat().st_size)
    text = 4 + 8 + 8 + 16  # text_shard, text_offset, text_size, text_identity: this folder's texts are 1,000 always
    return (sizes[1] - sizes[0]) / 1000 + text


def shard_sizes(taken: Assumptions) -> dict[str, float]:
    """Clips of a latent shard and texts of a text shard, in the mean, as encode.py cuts them."""
    chance = np.random.default_rng(taken.seed)
    names = [geometry.Bucket(*map(int, bucket.split("x"))) for bucket in MIX]
    parts = np.array(list(MIX.values())) / sum(MIX.values())
    rows = []
    for number in chance.choice(len(names), CUT, p=parts):
        key = f"{int(chance.integers(2**62)):016x}"
        entry = VideoEntry(key, ".mp4", "videos.tar", 0, 0, {})
        rows.append([ClipRow(f"{key}-0000", f"{key}{key}", {}, entry, 0, names[number])])
    clips = latent_units(rows, most=taken.shard_clips, limit=taken.shard_mb << 20)
    texts = text_units([TextRow(row.key, row.identity, {}) for (row,) in rows], most=taken.shard_clips)
    return {"clips": CUT / len(clips), "texts": CUT / len(texts)}


def cache_at_work(taken: Assumptions) -> list[dict[str, float]]:
    """The product's cache on a disk, with small shards, for one node's reads in the product's order: bytes fetched
    over bytes read, for each part of the set that it holds, beside what a least-recently-used cache should give.
    """
    clips = SHARDS * IN_SHARD
    buckets = np.zeros(clips, dtype=np.uint8)
    plan = BatchSampler(buckets, batch_size=min(taken.processes, clips), seed=taken.seed)
    reads = node_reads(plan, taken, range(-(-2 * READS // taken.node)))[: 2 * READS]
    return [_cached(reads, held) for held in HELD]


def _cached(reads: Sequence[int] | np.ndarray, held: float) -> dict[str, float]:
    """One cache size. Shard n has the clips n * IN_SHARD and after."""
    content = bytes(512 * IN_SHARD)
    digest, files = hashlib.sha256(content).hexdigest(), fsspec.filesystem("memory")
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache(Path(folder), held * SHARDS * len(content) / 1e9)
        for shard in range(SHARDS):
            files.pipe(f"/scale/latent-{shard}.tar", content)
        fetched = 0
        for number, clip in enumerate(reads):
            name = f"latent-{clip // IN_SHARD}.tar"
            path = Path(folder) / name
            fetched += len(content) * (not path.exists()) * (number >= READS)
            os.close(cache.open(f"memory://scale/{name}", path, size=len(content), sha256=digest))
        on_disk = sum(path.stat().st_size for path in Path(folder).glob("*.tar"))
        files.rm("/scale", recursive=True)
    read = len(content) // IN_SHARD * (len(reads) - READS)
    return {
        "held": held,
        "amplification": fetched / read,
        "expected": (1 - held) * IN_SHARD,
        "on_disk": on_disk / (held * SHARDS * len(content)),
    }
