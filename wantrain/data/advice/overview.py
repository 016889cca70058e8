"""What a folder holds, for advice: every file is surveyed once, to its end, and shard.py reads these surveys later."""

from __future__ import annotations

import itertools
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from wantrain.data.footage import duplicates
from wantrain.data.footage.decode_workers import DecodeOptions
from wantrain.data.footage.probe import Footage
from wantrain.data.footage.selection import ClipSelector
from wantrain.data.footage.sharding import SURVEYS, Entry, ShardOptions, surveyed
from wantrain.data.footage.sources import find_footage
from wantrain.data.footage.survey import Survey, Surveys
from wantrain.data.footage.tally import Tally
from wantrain.data.rejects import Reject
from wantrain.util import distributed


@dataclass(frozen=True)
class FileFacts:
    """What of a file counts for advice.

    height, width  in pixels
    rate           mean frames per second
    scenes         seconds of each scene, of the whole file if scenes were not detected; none of an image
    interlaced     whether frames are interlaced
    still          whether nothing moves in it; of an image False
    caption        its first caption; empty if it has none
    """

    name: str
    height: int
    width: int
    rate: float
    scenes: tuple[float, ...]
    interlaced: bool = False
    still: bool = False
    caption: str = ""

    @staticmethod
    def of(file: Footage, survey: Survey) -> FileFacts:
        """The facts of a file with its survey."""
        info = survey.info
        bounds = [] if info.is_image else [info.start, *survey.begins, info.end]
        scenes = tuple(end - begin for begin, end in itertools.pairwise(bounds))
        still = duplicates.is_still(survey.thumbnails)
        return FileFacts(file.name, info.height, info.width, info.rate, scenes, survey.interlaced, still, file.caption)

    @property
    def is_image(self) -> bool:
        return not self.scenes


@dataclass
class Overview:
    """What a source folder holds.

    source     the folder
    files      the facts of each file that can be read; a file with the bytes of another stands once
    captions   the first caption of each file that has one, in the order of the files
    without    names of the files without a caption
    split      whether scene changes were looked for
    rejects    files that are none, by name or place
    tally      what is neither footage nor a reject
    """

    source: Path
    split: bool
    rejects: list[Reject]
    tally: Tally
    files: list[FileFacts] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    without: list[str] = field(default_factory=list)
    _entries: list[Entry] = field(default_factory=list)
    _surveys: Surveys | None = None

    @property
    def videos(self) -> list[FileFacts]:
        return [each for each in self.files if not each.is_image]

    @property
    def images(self) -> list[FileFacts]:
        return [each for each in self.files if each.is_image]

    def select(self, options: ShardOptions) -> tuple[ClipSelector, list[dict[str, Any]]]:
        """What shard.py would do with these options: the selector with its counts and rejects, and the .json of each
        file that is used. Nothing is decoded: the surveys are there.
        """
        assert self._surveys is not None
        selector, used = options.selector(), []
        for reject in self.rejects:
            selector.reject(reject)
        with closing(surveyed(self._surveys, self._entries)) as results:
            for entry, survey in results:
                if survey is None:
                    selector.reject_copy(entry.file, entry.digest)
                elif (about := selector.select(entry.file, entry.digest, survey)) is not None:
                    used.append(about)
        return selector, used


def survey_source(source: Path, out: Path, *, split: bool, decode: DecodeOptions) -> Overview:
    """Survey a folder of footage. The surveys are stored where shard.py, with this `out`, looks for them.

    split  look for scene changes too

    ValueError as `find_footage`; a missing caption is none.
    """
    footage, rejects, tally = find_footage(source, caption_missing="empty", out=out)
    overview = Overview(source, split, rejects, tally)
    for file in footage:
        overview.captions.extend(file.annotation.captions[:1] if file.caption else ())
        overview.without.extend([] if file.caption else [file.name])
    overview._entries = [Entry.of(file) for file in footage]
    out.mkdir(parents=True, exist_ok=True)
    overview._surveys = Surveys(out / SURVEYS, split=split, decode=decode)
    with closing(surveyed(overview._surveys, overview._entries)) as results:
        bar = tqdm(results, total=len(footage), desc="look", unit="file", disable=not distributed.is_main())
        overview.files = [FileFacts.of(entry.file, survey) for entry, survey in bar if isinstance(survey, Survey)]
    return overview
