"""Footage to video shards: every file read once, its windows chosen, the file and what was found out written into tars.

The ledger has a place for every file, clip and second.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from wantrain import world
from wantrain.data import headers, likeness
from wantrain.data.footage import IMAGES, Footage, Reject, probe, probe_mask
from wantrain.data.ledger import Ledger
from wantrain.data.scenes import SceneDetector, library
from wantrain.data.shards import MANIFEST, MASK, SCHEMA, ShardWriter, finished, to_json, write_rejects
from wantrain.data.windows import Cut, Probe, Window, cut_windows, frames_on_screen, spans
from wantrain.video import Frames
from wantrain.world import file_hash

#: Findings that a manifest lists by name, of each kind.
NAMED = 100


def write_video_shards(
    footage: list[Footage],
    rejects: list[Reject],
    out: Path,
    *,
    model: str,
    num_frames: int,
    fps: float | None,
    rejects_limit: float,
    shard_bytes: int,
    clips: str = "all",
    stride: int = 1,
    stretch: bool = False,
    lengths: Sequence[int] = (),
    scenes: str = "off",
    static: str = "report",
    duplicates: str = "report",
    seed: int = 0,
) -> dict[str, Any]:
    """Probe every file, choose its windows and write the files with captions into shards; returns the manifest.

    `fps=None` takes every file's own frames; for num_frames to lengths and seed see `windows.Cut`. `scenes="split"`
    cuts each scene by itself. Clips that stand still (`static`) and those that look like an earlier one (`duplicates`)
    are found; "drop" leaves them out. Rejected files go to rejects.jsonl with the reason. ValueError if more than
    `rejects_limit` of them are (no manifest then), or if `out` holds something else.
    """
    cut = Cut(num_frames, fps, clips, stride, stretch, tuple(sorted(lengths)), seed)
    for key, choice, choices in [
        ("scenes", scenes, ("off", "split")),
        ("static", static, ("report", "drop")),
        ("duplicates", duplicates, ("report", "drop")),
    ]:
        if choice not in choices:
            raise ValueError(f"{key}={choice} is unknown; choose one of {', '.join(choices)}")
    if scenes == "split":
        library()  # says what is missing before any work
    digests = [_digest(file) for file in footage]
    masks = [None if file.mask is None else file_hash(file.mask) for file in footage]
    told = [[file.name, asdict(file.told), *hashes] for file, *hashes in zip(footage, digests, masks, strict=True)]
    settings = {
        "model": model,
        "num_frames": num_frames,
        "fps": "native" if fps is None else float(fps),
        "clips": clips,
        "stride": stride,
        "stretch": stretch,
        "lengths": list(cut.lengths),
        "scenes": scenes,
        "static": static,
        "duplicates": duplicates,
        "seed": seed,
        "footage": hashlib.sha256(json.dumps(told).encode()).hexdigest(),
    }
    done = finished(out, "video", settings)
    if done is not None:
        return done
    cutter = _Cutter(cut, scenes == "split", {"static": static == "drop", "duplicate": duplicates == "drop"})
    for reject in rejects:
        cutter.reject(reject)
    total = len(footage) + len(rejects)
    with ShardWriter(out, "video", shard_bytes) as writer:
        for file, digest in zip(
            tqdm(footage, desc="shard", unit="file", disable=not world.is_main()), digests, strict=True
        ):
            about = cutter.take(file, digest)
            if about is not None:
                writer.write(digest[:16], {file.extension: file.read(), **_mask_member(file), "json": to_json(about)})
    write_rejects(out, cutter.rejects, total, rejects_limit, "file")
    manifest = {
        "schema": SCHEMA,
        "kind": "video",
        "settings": settings,
        "files_seen": total,
        "files_used": cutter.ledger.files.used,
        "files_rejected": len(cutter.rejects),
        "clips": cutter.ledger.clips.used,
        "ledger": cutter.ledger.told(),
        "findings": cutter.findings(),
        "alike": cutter.alike_files(),
        "shards": writer.shards,
    }
    world.write_json(out / MANIFEST, manifest)
    _say(out, manifest, cutter.ledger)
    return manifest


def _say(out: Path, manifest: dict[str, Any], ledger: Ledger) -> None:
    """The summary for people."""
    used, dropped = manifest["files_used"], manifest["files_rejected"]
    world.say(
        f"{out}: {manifest['files_seen']} files seen = {used} used + {dropped} rejected; {manifest['clips']} clips"
    )
    for line in ledger.summary():
        world.say(f"  {line}")
    still, alike = manifest["findings"]["static"], manifest["findings"]["duplicates"]
    if still["clips"]:
        world.say(f"  {still['clips']} clips stand still (first: {still['first'][0]}); static=drop leaves them out")
    if alike["clips"]:
        one, other = alike["first"][0]
        world.say(
            f"  {alike['clips']} clips look like one of another file (first: {one}, like {other}); training keeps such "
            "files on one side of data.holdout, duplicates=drop leaves them out"
        )


def _mask_member(file: Footage) -> dict[str, bytes]:
    """The mask of a file, by its extension in a tar."""
    return {} if file.mask is None else {f"{MASK}{file.mask.suffix.lower()[1:]}": file.mask.read_bytes()}


def _digest(file: Footage) -> str:
    """The hash of its bytes, or the error of a file that cannot be read: the probe will then reject it."""
    try:
        return file.digest()
    except OSError as error:
        return f"{file.path}: {error}"


def _about_mask(file: Footage, found: Probe) -> dict[str, str]:
    """The hash of a file's mask, if it has one. ValueError with the reason if the two do not belong together."""
    if file.mask is None:
        return {}
    try:
        probe_mask(file.mask, found)
    except ValueError as error:
        raise ValueError(f"its mask {file.mask.parent.name}/{file.mask.name} {error}") from error
    return {"mask": file_hash(file.mask)}


@dataclass(frozen=True)
class _Copy:
    """A file that is used: its name, and how long it is on screen."""

    name: str
    seconds: float


@dataclass
class _Cutter:
    """One run over footage: what is entered in the ledger, what was rejected, what was found."""

    cut: Cut
    split: bool
    drops: dict[str, bool]
    ledger: Ledger = field(default_factory=Ledger)
    rejects: list[Reject] = field(default_factory=list)
    used: dict[str, _Copy] = field(default_factory=dict)
    memory: likeness.Memory = field(default_factory=likeness.Memory)
    still: list[str] = field(default_factory=list)
    alike: list[tuple[likeness.Clip, likeness.Clip]] = field(default_factory=list)

    def reject(self, reject: Reject) -> None:
        """A file that is not used."""
        self.rejects.append(reject)
        self.ledger.files.drop(reject.kind, 1)

    def take(self, file: Footage, digest: str) -> dict[str, Any] | None:
        """What a video shard says about a file; None if it is not used, which is noted with the reason."""
        if digest in self.used:
            copy = self.used[digest]
            self.reject(Reject(file.name, f"same bytes as {copy.name}", bad=False, kind="copy"))
            self.ledger.drop_seconds("copy", copy.seconds)
            return None
        try:
            found, looks, begins = self._read(file)
            masked = _about_mask(file, found)
        except ValueError as error:
            self.reject(Reject(file.name, str(error)))
            return None
        try:
            windows = cut_windows(found, self.cut, scenes=begins, name=digest)
        except ValueError as error:
            self.reject(Reject(file.name, str(error), kind="too short"))
            self.ledger.drop_seconds("too short", found.seconds)
            return None
        fps = self.cut.fps or found.rate
        kept = self._choose(file, digest, found, looks, windows, fps)
        if not kept:
            reason = "none of its clips is used: they stand still, or look like others"
            self.reject(Reject(file.name, reason, bad=False, kind="no clip used"))
            return None
        self.used[digest] = _Copy(file.name, found.seconds)
        self.ledger.files.use(1)
        return {
            **masked,
            "caption": file.caption,
            "captions": list(file.told.captions) or [""],
            "weight": file.told.weight,
            "tags": list(file.told.tags),
            "source": file.name,
            "sha256": digest,
            "height": found.height,
            "width": found.width,
            "fps": float(fps),
            "time": "native" if self.cut.fps is None else "resample",
            "windows": [asdict(window) for window in kept],
        }

    def _read(self, file: Footage) -> tuple[Probe, NDArray[np.uint8], list[float]]:
        """A file read to its end: what it shows, how each frame looks from afar, when its scenes begin.

        ValueError with the reason if it cannot be used.
        """
        looks: list[likeness.Look] = []
        scenes = SceneDetector() if self.split and f".{file.extension}" not in IMAGES else None

        def watch(frame: Frames) -> None:
            looks.append(likeness.look(frame))
            if scenes is not None:
                scenes.watch(frame)

        with file.on_disk() as path:
            found = probe(path, whole=True, watch=watch)
            if not found.is_image:
                headers.refuse(headers.read_header(path), Path(file.name).name)
        return found, np.stack(looks), scenes.begins(found.times) if scenes is not None else []

    def _choose(
        self,
        file: Footage,
        digest: str,
        found: Probe,
        looks: NDArray[np.uint8],
        windows: list[Window],
        fps: float,
    ) -> list[Window]:
        """The windows that are used; each one, and what none of them covers, is entered in the ledger."""
        kept, rest = [], found.seconds
        for number, (window, seconds) in enumerate(zip(windows, spans(found, windows, fps), strict=True)):
            rest -= seconds
            name = f"{file.name} (clip {number})"
            reason = self._finding(digest, name, looks[frames_on_screen(found, window, fps)])
            if reason is not None:
                self.ledger.drop_clip(reason, seconds)
            else:
                self.ledger.use_clip(seconds)
                kept.append(window)
        whole = self.cut.clips == "all"
        self.ledger.drop_seconds("rest, shorter than a clip" if whole else f"not in the {self.cut.clips} clip", rest)
        return kept

    def _finding(self, digest: str, name: str, looks: NDArray[np.uint8]) -> str | None:
        """Note what is odd about a clip; the reason if it is to be left out for that."""
        if likeness.is_still(looks):
            self.still.append(name)
            if self.drops["static"]:
                return "static"
        clip = likeness.remember(int(digest[:16], 16), name, looks)
        other = self.memory.find(clip)
        # Clips of one file often look alike, and stay together anyway.
        if other is not None and other.file != clip.file:
            self.alike.append((clip, other))
            if self.drops["duplicate"]:
                return "duplicate"
        return None

    def findings(self) -> dict[str, Any]:
        """For a manifest: clips that stand still, and look-alikes."""
        first = [[clip.name, other.name] for clip, other in self.alike[:NAMED]]
        return {
            "static": {"clips": len(self.still), "first": self.still[:NAMED]},
            "duplicates": {"clips": len(self.alike), "first": first},
        }

    def alike_files(self) -> list[list[str]]:
        """For a manifest: pairs of files, by key, of which clips look alike."""
        pairs = {(clip.file, other.file) for clip, other in self.alike}
        return sorted([f"{one:016x}", f"{other:016x}"] for one, other in pairs)
