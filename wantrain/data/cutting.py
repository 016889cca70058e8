"""Footage to video shards: every file probed, its windows chosen, the file and what was found out written into tars."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from wantrain import world
from wantrain.data.footage import Footage, Reject, cut_windows, probe
from wantrain.data.shards import MANIFEST, SCHEMA, ShardWriter, finished, to_json, write_rejects
from wantrain.world import file_hash


def write_video_shards(
    footage: list[Footage],
    rejects: list[Reject],
    out: Path,
    *,
    model: str,
    num_frames: int,
    fps: float,
    clips: str,
    rejects_limit: float,
    shard_bytes: int,
) -> dict[str, Any]:
    """Probe every file, choose its windows and write the files with captions into shards; returns the manifest.

    Rejected files go to rejects.jsonl with the reason. ValueError if more than `rejects_limit` of them are (no
    manifest then), or if `out` holds something else.
    """
    digests = [_digest(file.path) for file in footage]
    told = [[file.name, file.caption, digest] for file, digest in zip(footage, digests, strict=True)]
    settings = {
        "model": model,
        "num_frames": num_frames,
        "fps": float(fps),
        "clips": clips,
        "footage": hashlib.sha256(json.dumps(told).encode()).hexdigest(),
    }
    done = finished(out, "video", settings)
    if done is not None:
        return done
    rejects, total, count = list(rejects), len(footage) + len(rejects), 0
    seen: dict[str, str] = {}
    with ShardWriter(out, "video", shard_bytes) as writer:
        for file, digest in zip(
            tqdm(footage, desc="shard", unit="file", disable=not world.is_main()), digests, strict=True
        ):
            if digest in seen:
                rejects.append(Reject(file.name, f"same bytes as {seen[digest]}", bad=False))
                continue
            try:
                about = _describe(file, digest, num_frames=num_frames, fps=fps, clips=clips)
            except ValueError as error:
                rejects.append(Reject(file.name, str(error)))
                continue
            seen[digest] = file.name
            count += len(about["windows"])
            extension = file.path.suffix.lower().removeprefix(".")
            writer.write(digest[:16], {extension: file.path.read_bytes(), "json": to_json(about)})
    write_rejects(out, rejects, total, rejects_limit, "file")
    manifest = {
        "schema": SCHEMA,
        "kind": "video",
        "settings": settings,
        "files_seen": total,
        "files_used": len(seen),
        "files_rejected": len(rejects),
        "clips": count,
        "shards": writer.shards,
    }
    world.write_json(out / MANIFEST, manifest)
    world.say(f"{out}: {total} files seen = {len(seen)} used + {len(rejects)} rejected; {count} clips")
    return manifest


def _describe(file: Footage, digest: str, *, num_frames: int, fps: float, clips: str) -> dict[str, Any]:
    """What a video shard says about a file. ValueError with the reason if the file cannot be used."""
    found = probe(file.path, whole=True)
    windows = cut_windows(found, num_frames=num_frames, fps=fps, clips=clips)
    return {
        "caption": file.caption,
        "source": file.name,
        "sha256": digest,
        "height": found.height,
        "width": found.width,
        "fps": float(fps),
        "windows": [asdict(window) for window in windows],
    }


def _digest(path: Path) -> str:
    """file_hash, or the error of a file that cannot be read: the probe will then reject it."""
    try:
        return file_hash(path)
    except OSError as error:
        return f"{path}: {error}"
