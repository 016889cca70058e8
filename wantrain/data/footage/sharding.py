"""Footage to video shards: survey every file once, select its clips, and write the files with what was found into tars.

The manifest's statistics account for every file, clip and second.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from wantrain.data.footage.accounting import DatasetStats
from wantrain.data.footage.captions import Annotation
from wantrain.data.footage.clips import ClipOptions
from wantrain.data.footage.decode_workers import DecodeOptions
from wantrain.data.footage.probe import Footage, check_mask
from wantrain.data.footage.scenes import library
from wantrain.data.footage.selection import ClipSelector
from wantrain.data.footage.survey import Survey, Surveys
from wantrain.data.footage.tally import Tally
from wantrain.data.footage.video_shards import VideoTars, write_index
from wantrain.data.rejects import Reject
from wantrain.data.shards import MANIFEST, SCHEMA, claim, is_whole, write_rejects
from wantrain.util import distributed
from wantrain.util.console import say
from wantrain.util.files import write_json

#: Name of the hidden folder, in a folder of shards, that stores the surveys of its files.
SURVEYS = ".surveys"


@dataclass(frozen=True)
class ShardOptions:
    """Options of `write_video_shards`.

    model          name of the model that clips are cut for
    clips          how files are cut into clips
    scenes         "off", or "split": cut each scene like a file of its own
    static         "report" or "drop" clips in which nothing moves
    duplicates     "report" or "drop" near-duplicates of clips of earlier files
    interlaced     "refuse" interlaced files, or "deinterlace" them when their frames are read
    rejects_limit  largest share of bad files
    shard_bytes    size of a tar, in bytes
    decode         decoder processes

    ValueError for an unknown choice, or for scenes="split" without PySceneDetect.
    """

    model: str
    clips: ClipOptions
    scenes: str = "off"
    static: str = "report"
    duplicates: str = "report"
    interlaced: str = "refuse"
    rejects_limit: float = 0.1
    shard_bytes: int = 512 << 20
    decode: DecodeOptions = field(default_factory=DecodeOptions)

    def __post_init__(self) -> None:
        choices = {
            "scenes": ("off", "split"),
            "static": ("report", "drop"),
            "duplicates": ("report", "drop"),
            "interlaced": ("refuse", "deinterlace"),
        }
        for key, allowed in choices.items():
            if (choice := getattr(self, key)) not in allowed:
                raise ValueError(f"{key}={choice} is unknown; choose one of {', '.join(allowed)}")
        if self.scenes == "split":
            library()  # fails before any work if it is not installed

    def selector(self) -> ClipSelector:
        """What selects clips by these options."""
        return ClipSelector(
            self.clips, self.static == "drop", self.duplicates == "drop", self.interlaced == "deinterlace"
        )

    def settings(self, footage: str) -> dict[str, Any]:
        """For a manifest: everything that the shards depend on; `footage` is a hash of the files and annotations."""
        clips = self.clips
        return {
            "model": self.model,
            "num_frames": clips.num_frames,
            "fps": "native" if clips.fps is None else float(clips.fps),
            "clips": clips.clips,
            "stride": clips.stride,
            "stretch": clips.stretch,
            "lengths": sorted(clips.lengths),
            "scenes": self.scenes,
            "static": self.static,
            "duplicates": self.duplicates,
            "seed": clips.seed,
            # Folders made before there was a choice have no such key.
            **({"interlaced": self.interlaced} if self.interlaced != "refuse" else {}),
            "footage": footage,
        }


def write_video_shards(
    footage: list[Footage], rejects: list[Reject], out: Path, options: ShardOptions, tally: Tally | None = None
) -> dict[str, Any]:
    """Survey every file, select its clips and write the files with captions into shards; returns the manifest.

    Static clips and near-duplicates are found, and left out where `options` say so. Rejected files are listed in
    rejects.jsonl with the reason; `rejects` are those found before, and `tally` counts what is neither. If `out` is
    finished, with the same settings and some of the same files, only what differs is made, and `out` stays as it is
    until the end.

    ValueError if more than `options.rejects_limit` of the files are bad (then there is no manifest), or if `out` holds
    something else.
    """
    entries = [Entry.of(file) for file in footage]
    settings = options.settings(_hash_of(entries))
    surveys = Surveys(out / SURVEYS, split=options.scenes == "split", decode=options.decode)
    earlier = claim(out, "video", settings, same_footage=lambda: surveys.has_any([entry.digest for entry in entries]))
    if earlier is not None and earlier["settings"] == settings and is_whole(out, earlier):
        if "files" not in earlier:  # made by an earlier version, without an index
            earlier |= {"files": [write_index(out, earlier)]}
            write_json(out / MANIFEST, earlier)
        say(f"{out} is finished already: {earlier['clips']} clips; nothing to do")
        for line in (tally or Tally()).lines():
            say(f"  {line}")
        return earlier
    selector = options.selector()
    for reject in rejects:
        selector.reject(reject)
    tars = VideoTars(out, options.shard_bytes, earlier)
    with closing(surveyed(surveys, entries)) as results:
        bar = tqdm(results, total=len(entries), desc="shard", unit="file", disable=not distributed.is_main())
        for entry, survey in bar:
            if survey is None:
                selector.reject_copy(entry.file, entry.digest)
            elif (about := selector.select(entry.file, entry.digest, survey)) is not None:
                masked = {} if entry.mask is None else {"mask": entry.mask_digest}
                tars.add(entry.file, entry.digest[:16], {**masked, **about})
    (shards, index), total = tars.finish(), len(footage) + len(rejects)
    write_rejects(out, selector.rejects, total, options.rejects_limit, "file")
    manifest = {
        "schema": SCHEMA,
        "kind": "video",
        "settings": settings,
        "files_seen": total,
        "files_used": selector.stats.files.used,
        "files_rejected": total - selector.stats.files.used,
        "clips": selector.stats.clips.used,
        "stats": selector.stats.to_dict(),
        "beside": (tally or Tally()).to_dict(),
        "findings": selector.findings(),
        "alike": selector.alike_files(),
        "shards": shards,
        "files": [index],
    }
    write_json(out / MANIFEST, manifest)
    tars.remove_others()
    surveys.remove_all_but({digest for entry in entries for digest in (entry.digest, entry.mask_digest) if digest})
    _say(out, manifest, selector.stats, tally or Tally())
    return manifest


def _say(out: Path, manifest: dict[str, Any], stats: DatasetStats, tally: Tally) -> None:
    """Print the summary."""
    used, rejected = manifest["files_used"], manifest["files_rejected"]
    say(f"{out}: {manifest['files_seen']} files seen = {used} used + {rejected} rejected; {manifest['clips']} clips")
    for line in [*stats.summary(), *tally.lines()]:
        say(f"  {line}")
    static, alike = manifest["findings"]["static"], manifest["findings"]["duplicates"]
    if static["clips"]:
        say(f"  {static['clips']} clips stand still (first: {static['first'][0]}); static=drop leaves them out")
    if alike["clips"]:
        one, other = alike["first"][0]
        say(
            f"  {alike['clips']} clips look like one of another file (first: {one}, like {other}); training keeps such "
            "files on one side of data.holdout, duplicates=drop leaves them out"
        )


@dataclass(frozen=True)
class Entry:
    """A file and the hash of its bytes, and the same of its mask, if it has one."""

    file: Footage
    digest: str
    mask: Footage | None
    mask_digest: str | None

    @staticmethod
    def of(file: Footage) -> Entry:
        """The entry of a file; reads its bytes."""
        path = file.mask
        mask = None if path is None else Footage(path, f"{path.parent.name}/{path.name}", Annotation())
        return Entry(file, _digest(file), mask, None if mask is None else _digest(mask))


def _digest(file: Footage) -> str:
    """The hash of a file's bytes; of a file that cannot be read the error, and the survey then rejects it."""
    try:
        return file.digest()
    except OSError as error:
        return f"{file.path}: {error}"


def _hash_of(entries: Sequence[Entry]) -> str:
    """A hash of all files, masks and annotations."""
    rows = [[entry.file.name, entry.file.annotation.to_dict(), entry.digest, entry.mask_digest] for entry in entries]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def surveyed(surveys: Surveys, entries: Sequence[Entry]) -> Generator[tuple[Entry, Survey | str | None]]:
    """Each entry with its survey, or the reason why it cannot be used; None for a copy of an earlier file."""
    firsts = {entry.digest: entry for entry in reversed(entries)}
    files = list[tuple[Footage, str]]()  # each file, followed by its mask
    for entry in entries:
        if firsts[entry.digest] is entry:
            files.append((entry.file, entry.digest))
            if entry.mask is not None:
                files.append((entry.mask, str(entry.mask_digest)))
    with closing(surveys.of(files)) as results:
        for entry in entries:
            if firsts[entry.digest] is not entry:
                yield entry, None
            elif entry.mask is None:
                yield entry, next(results)
            else:
                yield entry, _with_mask(next(results), entry.mask, next(results))


def _with_mask(survey: Survey | str, mask: Footage, mask_survey: Survey | str) -> Survey | str:
    """The survey of a file with a mask, or the reason why one of the two, or the pair, cannot be used."""
    if isinstance(survey, str):
        return survey
    try:
        if isinstance(mask_survey, str):
            raise ValueError(mask_survey)
        if mask_survey.damaged or mask_survey.interlaced:
            raise ValueError(
                "is interlaced" if mask_survey.interlaced else f"holds damaged frames ({mask_survey.fault})"
            )
        check_mask(mask_survey.info, survey.info)
    except ValueError as error:
        return f"its mask {mask.name} {error}"
    return survey
