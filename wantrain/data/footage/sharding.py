"""Footage to video shards: every file read once, its windows chosen, the file and what was found out written into tars.

The stats has a place for every file, clip and second.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from wantrain.data.footage import duplicates
from wantrain.data.footage.accounting import DatasetStats
from wantrain.data.footage.captions import Told
from wantrain.data.footage.clips import Cut, Window, cut_windows, frames_on_screen, spans
from wantrain.data.footage.probe import Footage, check_mask
from wantrain.data.footage.scenes import library
from wantrain.data.footage.survey import Survey, Surveys
from wantrain.data.footage.video_shards import VideoTars
from wantrain.data.rejects import Reject
from wantrain.data.shards import MANIFEST, SCHEMA, claim, is_whole, write_rejects
from wantrain.util import distributed
from wantrain.util.console import say
from wantrain.util.files import write_json

#: The hidden folder of a folder of shards that keeps what its files show.
SURVEYS = ".surveys"
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
    workers: int | None = None,
    timeout: float = 120.0,
) -> dict[str, Any]:
    """VideoInfo every file, choose its windows and write the files with captions into shards; returns the manifest.

    `fps=None` takes every file's own frames; for num_frames to lengths and seed see `windows.Cut`, for workers and
    timeout `survey.Surveys`. `scenes="split"` cuts each scene by itself. Clips that stand still (`static`) and those
    that look like an earlier one (`duplicates`) are found; "drop" leaves them out. Rejected files go to rejects.jsonl
    with the reason. Where `out` is finished, with the same settings and some of the same files, only what differs is
    made, and until the end it stays what it was. ValueError if more than `rejects_limit` are rejected (no manifest
    then), or if `out` holds something else.
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
    entries = [_Entry.of(file) for file in footage]
    told = [[entry.file.name, asdict(entry.file.told), entry.digest, entry.mask_digest] for entry in entries]
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
    surveys = functools.partial(Surveys, out / SURVEYS, split=scenes == "split", workers=workers, timeout=timeout)
    earlier = claim(
        out, "video", settings, same_footage=lambda: surveys().know_one_of([entry.digest for entry in entries])
    )
    if earlier is not None and earlier["settings"] == settings and is_whole(out, earlier):
        say(f"{out} is finished already: {earlier['clips']} clips; nothing to do")
        return earlier
    cutter = _Cutter(cut, {"static": static == "drop", "duplicate": duplicates == "drop"})
    for reject in rejects:
        cutter.reject(reject)
    total, tars = len(footage) + len(rejects), VideoTars(out, shard_bytes, earlier)
    made = surveys()
    with closing(_surveyed(made, entries)) as found:
        bar = tqdm(found, total=len(entries), desc="shard", unit="file", disable=not distributed.is_main())
        for entry, survey in bar:
            if survey is None:
                cutter.take_copy(entry.file, entry.digest)
            elif (about := cutter.take(entry.file, entry.digest, survey)) is not None:
                masked = {} if entry.mask is None else {"mask": entry.mask_digest}
                tars.add(entry.file, entry.digest[:16], {**masked, **about})
    shards = tars.finish()
    write_rejects(out, cutter.rejects, total, rejects_limit, "file")
    manifest = {
        "schema": SCHEMA,
        "kind": "video",
        "settings": settings,
        "files_seen": total,
        "files_used": cutter.stats.files.used,
        "files_rejected": len(cutter.rejects),
        "clips": cutter.stats.clips.used,
        "stats": cutter.stats.told(),
        "findings": cutter.findings(),
        "alike": cutter.alike_files(),
        "shards": shards,
    }
    write_json(out / MANIFEST, manifest)
    tars.remove_others()
    made.forget_all_but({digest for entry in entries for digest in (entry.digest, entry.mask_digest) if digest})
    _say(out, manifest, cutter.stats)
    return manifest


def _say(out: Path, manifest: dict[str, Any], stats: DatasetStats) -> None:
    """The summary for people."""
    used, dropped = manifest["files_used"], manifest["files_rejected"]
    say(f"{out}: {manifest['files_seen']} files seen = {used} used + {dropped} rejected; {manifest['clips']} clips")
    for line in stats.summary():
        say(f"  {line}")
    still, alike = manifest["findings"]["static"], manifest["findings"]["duplicates"]
    if still["clips"]:
        say(f"  {still['clips']} clips stand still (first: {still['first'][0]}); static=drop leaves them out")
    if alike["clips"]:
        one, other = alike["first"][0]
        say(
            f"  {alike['clips']} clips look like one of another file (first: {one}, like {other}); training keeps such "
            "files on one side of data.holdout, duplicates=drop leaves them out"
        )


def _digest(file: Footage) -> str:
    """The hash of its bytes, or the error of a file that cannot be read: the probe will then reject it."""
    try:
        return file.digest()
    except OSError as error:
        return f"{file.path}: {error}"


@dataclass(frozen=True)
class _Entry:
    """A file and its hash, and the mask beside it, as a file to be read like others."""

    file: Footage
    digest: str
    mask: Footage | None
    mask_digest: str | None

    @staticmethod
    def of(file: Footage) -> _Entry:
        """An entry, its bytes read."""
        path = file.mask
        mask = None if path is None else Footage(path, f"{path.parent.name}/{path.name}", Told())
        return _Entry(file, _digest(file), mask, None if mask is None else _digest(mask))


def _surveyed(made: Surveys, entries: Sequence[_Entry]) -> Generator[tuple[_Entry, Survey | str | None]]:
    """Every entry with what it shows, or the reason why it cannot be used; None for a copy of one before."""
    firsts = {entry.digest: entry for entry in reversed(entries)}
    order = list[tuple[Footage, str]]()  # each file, and after it its mask
    for entry in entries:
        if firsts[entry.digest] is entry:
            order.append((entry.file, entry.digest))
            if entry.mask is not None:
                order.append((entry.mask, str(entry.mask_digest)))
    with closing(made.of(order)) as found:
        for entry in entries:
            if firsts[entry.digest] is not entry:
                yield entry, None
            elif entry.mask is None:
                yield entry, next(found)
            else:
                yield entry, _with_mask(next(found), entry.mask, next(found))


def _with_mask(survey: Survey | str, mask: Footage, read: Survey | str) -> Survey | str:
    """What a file with a mask shows, or the reason why the two, or one of them, cannot be used."""
    if isinstance(survey, str):
        return survey
    try:
        if isinstance(read, str):
            raise ValueError(read)
        check_mask(read.found, survey.found)
    except ValueError as error:
        return f"its mask {mask.name} {error}"
    return survey


@dataclass(frozen=True)
class _Copy:
    """A file that is used: its name, and how long it is on screen."""

    name: str
    seconds: float


@dataclass
class _Cutter:
    """One run over footage: what is entered in the stats, what was rejected, what was found."""

    cut: Cut
    drops: dict[str, bool]
    stats: DatasetStats = field(default_factory=DatasetStats)
    rejects: list[Reject] = field(default_factory=list)
    used: dict[str, _Copy] = field(default_factory=dict)
    failed: dict[str, tuple[Reject, float]] = field(default_factory=dict)
    memory: duplicates.Memory = field(default_factory=duplicates.Memory)
    still: list[str] = field(default_factory=list)
    alike: list[tuple[duplicates.Clip, duplicates.Clip]] = field(default_factory=list)

    def reject(self, reject: Reject) -> None:
        """A file that is not used."""
        self.rejects.append(reject)
        self.stats.files.drop(reject.kind, 1)

    def take_copy(self, file: Footage, digest: str) -> None:
        """A file with the bytes of an earlier one: it is not used, nor looked into."""
        if digest in self.failed:
            reject, seconds = self.failed[digest]
            self.reject(replace(reject, name=file.name))
            self.stats.drop_seconds(reject.kind, seconds)
            return
        copy = self.used[digest]
        self.reject(Reject(file.name, f"same bytes as {copy.name}", bad=False, kind="copy"))
        self.stats.drop_seconds("copy", copy.seconds)

    def _fail(self, reject: Reject, digest: str, seconds: float) -> None:
        """A file that cannot be used; whatever has its bytes cannot either."""
        self.failed[digest] = reject, seconds
        self.reject(reject)

    def take(self, file: Footage, digest: str, survey: Survey | str) -> dict[str, Any] | None:
        """What a video shard says about a file; None if it is not used, which is noted with the reason."""
        if isinstance(survey, str):
            self._fail(Reject(file.name, survey), digest, 0.0)
            return None
        found = survey.found
        try:
            windows = cut_windows(found, self.cut, scenes=survey.begins, name=digest)
        except ValueError as error:
            self.stats.drop_seconds("too short", found.seconds)
            self._fail(Reject(file.name, str(error), kind="too short"), digest, found.seconds)
            return None
        fps = self.cut.fps or found.rate
        kept = self._choose(file, digest, survey, windows, fps)
        if not kept:
            reason = "none of its clips is used: they stand still, or look like others"
            self._fail(Reject(file.name, reason, bad=False, kind="no clip used"), digest, found.seconds)
            return None
        self.used[digest] = _Copy(file.name, found.seconds)
        self.stats.files.use(1)
        return {
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
            "seek_points": [[point.number, point.seen] for point in survey.seek_points],
        }

    def _choose(
        self,
        file: Footage,
        digest: str,
        survey: Survey,
        windows: list[Window],
        fps: float,
    ) -> list[Window]:
        """The windows that are used; each one, and what none of them covers, is entered in the stats."""
        found, kept, rest = survey.found, [], survey.found.seconds
        for number, (window, seconds) in enumerate(zip(windows, spans(found, windows, fps), strict=True)):
            rest -= seconds
            name = f"{file.name} (clip {number})"
            reason = self._finding(digest, name, survey.thumbnails[frames_on_screen(found, window, fps)])
            if reason is not None:
                self.stats.drop_clip(reason, seconds)
            else:
                self.stats.use_clip(seconds)
                kept.append(window)
        whole = self.cut.clips == "all"
        self.stats.drop_seconds("rest, shorter than a clip" if whole else f"not in the {self.cut.clips} clip", rest)
        return kept

    def _finding(self, digest: str, name: str, thumbnails: NDArray[np.uint8]) -> str | None:
        """Note what is odd about a clip; the reason if it is to be left out for that."""
        if duplicates.is_still(thumbnails):
            self.still.append(name)
            if self.drops["static"]:
                return "static"
        clip = duplicates.remember(int(digest[:16], 16), name, thumbnails)
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
