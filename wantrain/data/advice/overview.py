"""What a folder holds, for advice: every file is surveyed once, to its end, and shard.py reads these surveys later."""

from __future__ import annotations

import itertools
from collections import Counter
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

    def lines(self) -> list[str]:
        """A few lines of text: how many files, their sizes, lengths and rates, and what else lies there."""
        captioned = len(self.captions)
        sizes = Counter(f"{each.width}x{each.height}" for each in self.files)
        most = ", ".join(f"{size} ({count})" for size, count in sizes.most_common(5))
        more = f", {len(sizes) - 5} more" if len(sizes) > 5 else ""
        lines = [
            f"{self.source}: {len(self.videos)} videos, {len(self.images)} images; {captioned} of "
            f"{captioned + len(self.without)} have a caption",
            f"  sizes (width x height): {most}{more}",
        ]
        if self.videos:
            seconds = sorted(sum(each.scenes) for each in self.videos)
            half = seconds[(len(seconds) - 1) // 2]
            lines.append(f"  lengths: {seconds[0]:.3g} to {seconds[-1]:.3g} s, half of them up to {half:.3g} s")
            rates = sorted({round(each.rate, 2) for each in self.videos})
            shown = ", ".join(f"{rate:g}" for rate in rates) if len(rates) < 6 else f"{rates[0]:g} to {rates[-1]:g}"
            lines.append(f"  frames per second: {shown}")
        return [*lines, *(f"  {line}" for line in self.tally.lines())]

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

    ValueError as `find_footage`, but for missing captions; and if no file can be read.
    """
    footage, rejects, tally = find_footage(source, caption_missing="empty", out=out)
    overview = Overview(source, split, rejects, tally)
    for file in footage:
        overview.captions.extend(file.annotation.captions[:1] if file.caption else ())
        overview.without.extend([] if file.caption else [file.name])
    overview._entries = [Entry.of(file) for file in footage]
    out.mkdir(parents=True, exist_ok=True)
    overview._surveys = Surveys(out / SURVEYS, split=split, decode=decode)
    unreadable = [f"{reject.name}: {reject.reason}" for reject in rejects]
    with closing(surveyed(overview._surveys, overview._entries)) as results:
        bar = tqdm(results, total=len(footage), desc="look", unit="file", disable=not distributed.is_main())
        for entry, survey in bar:
            if isinstance(survey, Survey):
                overview.files.append(FileFacts.of(entry.file, survey))
            elif survey is not None:
                unreadable.append(f"{entry.file.name}: {survey}")
    if not overview.files:
        count = len(footage) + len(rejects)
        raise ValueError(f"init={source}: none of {count} files can be used (first: {unreadable[0]}); give others")
    return overview
