"""Selection of clips: which clips of each file are used, and statistics, rejects and findings about the others."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wantrain.data.footage import duplicates, headers
from wantrain.data.footage.accounting import DatasetStats
from wantrain.data.footage.clips import EPSILON, ClipOptions, Window, cut_windows, frames_on_screen, spans
from wantrain.data.footage.probe import Footage
from wantrain.data.footage.survey import Survey
from wantrain.data.rejects import Reject

#: Findings of each type that a manifest lists by name.
NAMED = 100


@dataclass(frozen=True)
class _UsedFile:
    """The name and the duration (seconds) of a file that is used."""

    name: str
    seconds: float


@dataclass
class ClipSelector:
    """Selects clips from surveyed files, one file after another, and counts what becomes of each file and clip.

    options          how files are cut into clips
    drop_static      leave out clips in which nothing moves; otherwise they are only listed
    drop_duplicates  leave out near-duplicates of clips of earlier files; otherwise they are only listed
    deinterlace      use interlaced files, deinterlaced; otherwise they are rejected
    """

    options: ClipOptions
    drop_static: bool
    drop_duplicates: bool
    deinterlace: bool = False
    stats: DatasetStats = field(default_factory=DatasetStats)
    rejects: list[Reject] = field(default_factory=list)
    used: dict[str, _UsedFile] = field(default_factory=dict)
    failed: dict[str, tuple[Reject, float]] = field(default_factory=dict)
    seen: duplicates.SeenClips = field(default_factory=duplicates.SeenClips)
    static: list[str] = field(default_factory=list)
    alike: list[tuple[duplicates.Clip, duplicates.Clip]] = field(default_factory=list)

    def reject(self, reject: Reject) -> None:
        """Count a file that is not used."""
        self.rejects.append(reject)
        self.stats.files.drop(reject.kind, 1)

    def reject_copy(self, file: Footage, digest: str) -> None:
        """Reject a file with the same bytes as an earlier one."""
        if digest in self.failed:
            reject, seconds = self.failed[digest]
            self.reject(replace(reject, name=file.name))
            self.stats.drop_seconds(reject.kind, seconds)
            return
        original = self.used[digest]
        self.reject(Reject(file.name, f"same bytes as {original.name}", bad=False, kind="copy"))
        self.stats.drop_seconds("copy", original.seconds)

    def _fail(self, reject: Reject, digest: str, seconds: float) -> None:
        """Reject a file, and remember its digest: its copies are rejected for the same reason."""
        self.failed[digest] = reject, seconds
        self.reject(reject)

    def select(self, file: Footage, digest: str, survey: Survey | str) -> dict[str, Any] | None:
        """The .json of a file in a video shard; None, with a noted reject, if the file is not used.

        `survey` is a string, the reason, where the file could not be read.
        """
        if isinstance(survey, str):
            self._fail(Reject(file.name, survey), digest, 0.0)
            return None
        info = survey.info
        if survey.interlaced and not self.deinterlace:
            self.stats.drop_seconds("interlaced", info.seconds)
            self._fail(
                Reject(file.name, headers.interlaced(Path(file.name).name), kind="interlaced"), digest, info.seconds
            )
            return None
        try:
            windows = cut_windows(info, self.options, scenes=survey.begins, name=digest)
        except ValueError as error:
            self.stats.drop_seconds("too short", info.seconds)
            self._fail(Reject(file.name, str(error), kind="too short"), digest, info.seconds)
            return None
        fps = self.options.fps or info.rate
        used = self._usable(file, digest, survey, windows, fps)
        if not used:
            self._fail(self._reject_without_clips(file, survey, windows, fps), digest, info.seconds)
            return None
        self.used[digest] = _UsedFile(file.name, info.seconds)
        self.stats.files.use(1)
        return {
            "caption": file.caption,
            "captions": list(file.annotation.captions) or [""],
            "weight": file.annotation.weight,
            **({"loss_weight": file.annotation.loss_weight} if file.annotation.loss_weight != 1 else {}),
            "tags": list(file.annotation.tags),
            "source": file.name,
            "sha256": digest,
            "height": info.height,
            "width": info.width,
            "fps": float(fps),
            "time": "native" if self.options.fps is None else "resample",
            "windows": [asdict(window) for window in used],
            **survey.read_options.record(),
        }

    def _usable(self, file: Footage, digest: str, survey: Survey, windows: list[Window], fps: float) -> list[Window]:
        """The windows that are used; each window, and the footage outside of all windows, is counted."""
        info, used, uncovered = survey.info, [], survey.info.seconds
        for number, (window, seconds) in enumerate(zip(windows, spans(info, windows, fps), strict=True)):
            uncovered -= seconds
            name = f"{file.name} (clip {number})"
            numbers = frames_on_screen(info, window, fps)
            damaged = _damaged_times(survey, numbers)
            if len(damaged):
                self.rejects.append(Reject(name, _damage(damaged, survey.fault), bad=False, kind="damaged", part=True))
                reason: str | None = "damaged"
            else:
                reason = self._reason_to_drop(digest, name, survey.thumbnails[numbers])
            if reason is not None:
                self.stats.drop_clip(reason, seconds)
            else:
                self.stats.use_clip(seconds)
                used.append(window)
        clips = self.options.clips
        reason = "rest, shorter than a clip" if clips == "all" else f"not in the {clips} clip"
        self.stats.drop_seconds(reason, uncovered)
        return used

    def _reject_without_clips(self, file: Footage, survey: Survey, windows: list[Window], fps: float) -> Reject:
        """The reject of a file of which no clip is used."""
        damaged = [_damaged_times(survey, frames_on_screen(survey.info, window, fps)) for window in windows]
        if all(map(len, damaged)):
            reason = _damage(np.concatenate(damaged), survey.fault).replace("holds", "each of its clips holds", 1)
            return Reject(file.name, reason, kind="damaged")
        reason = "none of its clips is used: they stand still, look like others, or are damaged"
        return Reject(file.name, reason, bad=False, kind="no clip used")

    def _reason_to_drop(self, digest: str, name: str, thumbnails: NDArray[np.uint8]) -> str | None:
        """List a static or near-duplicate clip; the reason if the clip is to be left out for that."""
        if duplicates.is_still(thumbnails):
            self.static.append(name)
            if self.drop_static:
                return "static"
        clip = duplicates.summarise(int(digest[:16], 16), name, thumbnails)
        other = self.seen.find(clip)
        # Clips of one file often look alike; they are on one side of the holdout anyway.
        if other is not None and other.file != clip.file:
            self.alike.append((clip, other))
            if self.drop_duplicates:
                return "duplicate"
        return None

    def findings(self) -> dict[str, Any]:
        """For a manifest: the number of static and near-duplicate clips, and the first names of each."""
        first = [[clip.name, other.name] for clip, other in self.alike[:NAMED]]
        return {
            "static": {"clips": len(self.static), "first": self.static[:NAMED]},
            "duplicates": {"clips": len(self.alike), "first": first},
        }

    def alike_files(self) -> list[list[str]]:
        """For a manifest: pairs of files, by key, that have near-duplicate clips."""
        pairs = {(clip.file, other.file) for clip, other in self.alike}
        return sorted([f"{one:016x}", f"{other:016x}"] for one, other in pairs)


def _damaged_times(survey: Survey, numbers: NDArray[np.int64]) -> NDArray[np.float64]:
    """When those of these frames begin that are damaged, in seconds."""
    times = survey.info.times[numbers]
    damaged = np.zeros(len(times), dtype=bool)
    for begin, end in survey.damaged:
        damaged |= (times > begin - EPSILON) & (times < end - EPSILON)
    return times[damaged]


def _damage(times: NDArray[np.float64], fault: str) -> str:
    """The reason for rejecting a clip with damaged frames that begin at these times."""
    return f"holds frames that are damaged, between {times.min():.2f} s and {times.max():.2f} s of the file ({fault})"
