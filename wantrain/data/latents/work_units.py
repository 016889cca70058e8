"""What is to be encoded: rows, each with an identity, divided into work units, each of which becomes one tar.

An identity is the hash of everything that a row's content depends on. Where a work unit ends depends on its own rows
only. So a clip that is added or removed changes one or two work units, and the tars of the others stay as they are.
Work units do not depend on processes or on earlier runs: any number of processes, killed or not, ends with the same
tars.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wantrain import geometry
from wantrain.data.footage.duplicates import group_of
from wantrain.data.footage.pixels import read_window
from wantrain.data.footage.video_shards import VideoEntry
from wantrain.data.latents.conditioning import ConditioningInputs
from wantrain.data.latents.loss_masks import STORED
from wantrain.data.latents.video_source import VideoSource
from wantrain.masks import PAINTED
from wantrain.util.distributed import Part

#: Version of the encoding; raise it when the same footage, options and weights would give other latents or texts.
CODE = 2
#: Fields of a file's `about` that do not change its latents; all others are part of their identity.
IRRELEVANT = frozenset(
    ("caption", "captions", "source", "weight", "loss_weight", "tags", "windows", "mask", "seek_points")
)


@dataclass(frozen=True)
class Row:
    """One sample of a tar: its key, its identity, and its .json member."""

    key: str
    identity: str
    about: dict[str, Any]


@dataclass(frozen=True)
class ClipRow(Row):
    """The latents of one window of a file; `number` is the window's number in its file."""

    entry: VideoEntry
    number: int
    bucket: geometry.Bucket

    @property
    def clip(self) -> tuple[str, int, str]:
        """Identifies the row's clip: windows of a file with the same field `clip` and the same bucket are one clip."""
        return self.entry.key, self.entry.about["windows"][self.number].get("clip", self.number), str(self.bucket)

    @property
    def captions(self) -> list[str]:
        """The file's captions, each once: `captions`, or `caption` where there are none."""
        about = self.entry.about
        return list(dict.fromkeys(str(caption) for caption in about.get("captions") or [about["caption"]]))

    @property
    def name(self) -> str:
        """The clip in messages."""
        return clip_name(self.entry, self.number)

    @property
    def seconds(self) -> float:
        """Duration; 0 for an image."""
        return clip_seconds(self.entry, self.number)


@dataclass(frozen=True)
class TextRow(Row):
    """The embedding of one caption."""

    @property
    def caption(self) -> str:
        return str(self.about["caption"])


@dataclass(frozen=True)
class WorkUnit:
    """Rows that one process makes together; those that could be made lie in one tar.

    kind  "latent" or "text"
    """

    kind: str
    rows: tuple[Row, ...]

    @functools.cached_property
    def name(self) -> str:
        """A hash of the rows."""
        return f"{self.kind}-{_content(self.rows)}"


def tar_name(kind: str, rows: Iterable[Row]) -> str:
    """The name of the tar that holds exactly these rows."""
    return f"{kind}-{_content(rows)}.tar"


@dataclass(frozen=True)
class LeftOut:
    """A clip that is not encoded: the reason in full, and as a `kind` that is counted."""

    name: str
    seconds: float
    reason: str
    kind: str


@dataclass(frozen=True)
class Work:
    """All that a latent folder is to hold.

    latents, texts  work units of the clips, and of the distinct captions, including the empty one
    text_of    identity of each caption's row
    group_of   group of each file with near-duplicates (duplicates.py)
    left_out   clips that are not encoded, with the reason: too small, or not for a mask type
    """

    latents: list[WorkUnit]
    texts: list[WorkUnit]
    text_of: dict[str, str]
    group_of: dict[int, int]
    left_out: list[LeftOut]

    @property
    def name(self) -> str:
        """A hash of all work units."""
        return _hash([unit.name for unit in [*self.latents, *self.texts]])[:16]

    @property
    def sources(self) -> set[int]:
        """Numbers of the files that clips are cut from."""
        return {int(row.entry.key, 16) for unit in self.latents for row in unit.rows if isinstance(row, ClipRow)}

    def share(self, part: Part) -> list[WorkUnit]:
        """The work units that this process makes of a part."""
        return [*self.texts[part.share()], *self.latents[part.share()]]


def plan_work(
    source: VideoSource,
    sizes: geometry.Buckets,
    inputs: ConditioningInputs,
    settings: Mapping[str, Any],
) -> Work:
    """All work for a folder of video shards, without reading videos. ValueError for a key that occurs twice."""
    vae = " ".join(settings[key] for key in ("vae_fingerprint", "vae_precision") if key in settings)
    files, left_out, seen = list[list[ClipRow]](), list[LeftOut](), set[str]()
    for entry in source.entries():
        if entry.key in seen:
            raise ValueError(f"{source.place} holds {entry.key} twice; make it again with shard.py")
        seen.add(entry.key)
        try:
            rows = clip_rows(entry, sizes, inputs, vae, loss_mask="loss_mask" in settings)
        except ValueError as error:
            clips = range(len(entry.about["windows"]))
            left_out += [_left_out(entry, number, error, "too small") for number in clips]
            continue
        kept = []
        for row in rows:
            try:
                inputs.check_clip(row.bucket.num_frames, entry.mask is not None)
                kept.append(row)
            except ValueError as error:
                left_out.append(_left_out(entry, row.number, error, "not for this mask type"))
        if kept:
            files.append(kept)
    encoder = f"{settings['text_encoder_fingerprint']} {settings['tokenizer_fingerprint']}"
    captions = dict.fromkeys(["", *(caption for rows in files for caption in rows[0].captions)])
    texts = {caption: text_row(caption, encoder) for caption in captions}
    most = settings["shard_clips"]
    return Work(
        latent_units(files, most=most, limit=settings["shard_bytes"]),
        text_units(texts.values(), most=most),
        {caption: row.identity for caption, row in texts.items()},
        group_of(source.manifest),
        left_out,
    )


def _left_out(entry: VideoEntry, number: int, why: ValueError, kind: str) -> LeftOut:
    return LeftOut(clip_name(entry, number), clip_seconds(entry, number), str(why), kind)


def clip_rows(
    entry: VideoEntry, sizes: geometry.Buckets, inputs: ConditioningInputs, vae: str, *, loss_mask: bool = False
) -> list[ClipRow]:
    """The rows of a file's windows, all at the size of the longest one. ValueError if no size is small enough.

    `vae` is the VAE's fingerprint, followed by its precision if that is not fp32. With `loss_mask` the file's mask is
    stored beside the latents.
    """
    about, rows = entry.about, []
    longest = max(window["num_frames"] for window in about["windows"])
    height, width = sizes.choose(longest, about["height"], about["width"])
    *_, cropped = geometry.cover(about["height"], about["width"], height, width)
    made_of = {key: value for key, value in about.items() if key not in IRRELEVANT}
    if stored := inputs.identity():
        # The word is part of the hash: with another one everything would be encoded again.
        made_of["condition"] = {**stored, **({PAINTED: about.get("mask")} if PAINTED in stored else {})}
    if loss_mask and entry.mask is not None:
        made_of[STORED] = about["mask"]
    for number, window in enumerate(about["windows"]):
        bucket = geometry.Bucket(window["num_frames"], height, width)
        choices = {key: value for key, value in window.items() if key != "clip"}
        identity = _hash(CODE, "latent", made_of, choices, [height, width], vae)[:32]
        about_row = {
            "source": about["source"],
            "bucket": str(bucket),
            "cropped": round(cropped, 4),
            "identity": identity,
        }
        rows.append(ClipRow(f"{entry.key}-{number:04d}", identity, {**about_row, **window}, entry, number, bucket))
    return rows


def text_row(caption: str, text_fingerprint: str) -> TextRow:
    """The row of one caption."""
    identity = _hash(CODE, "text", caption, text_fingerprint)[:32]
    return TextRow(identity[:24], identity, {"caption": caption, "identity": identity})


def latent_units(files: Iterable[Sequence[ClipRow]], *, most: int, limit: int) -> list[WorkUnit]:
    """Work units of at most about `most` clips and `limit` bytes; a file's clips stay together, so it is read once."""
    groups = [(int(rows[0].entry.key[:8], 16), rows, sum(_latent_bytes(row.bucket) for row in rows)) for rows in files]
    return _cut("latent", groups, most, limit)


def text_units(rows: Iterable[TextRow], *, most: int) -> list[WorkUnit]:
    """Work units of at most about `most` texts, in the order of their identities."""
    ordered = sorted(rows, key=lambda row: row.identity)
    return _cut("text", [(int(row.identity[:8], 16), [row], 0) for row in ordered], most, 1)


def clip_name(entry: VideoEntry, number: int) -> str:
    """A window of a file in messages."""
    return f"{entry.about['source']} (clip {number})"


def clip_seconds(entry: VideoEntry, number: int) -> float:
    """Duration of a window in seconds, at the rate it was cut at; 0 for an image."""
    window = read_window(entry.about["windows"][number])
    return 0.0 if window.num_frames == 1 else window.num_frames * window.stride / float(entry.about["fps"])


def _cut(kind: str, groups: Iterable[tuple[int, Sequence[Row], int]], most: int, limit: int) -> list[WorkUnit]:
    """Collect groups of rows, given as (number, rows, bytes), into work units.

    A work unit ends when it is full; or, once a quarter full, after a group whose number divides by half of `most`. So
    the ends depend on the content, and a change of one group moves few of them.
    """
    units, rows, size = [], list[Row](), 0
    for number, group, more in groups:
        rows.extend(group)
        size += more
        full = len(rows) >= most or size >= max(1, limit)
        if full or (len(rows) >= most // 4 and number % max(1, most // 2) == 0):
            units.append(WorkUnit(kind, tuple(rows)))
            rows, size = [], 0
    return [*units, WorkUnit(kind, tuple(rows))] if rows else units


def _latent_bytes(bucket: geometry.Bucket) -> int:
    """Approximate bytes of a clip's latents: 16 channels in bf16 per 4x8x8 pixels. Used for the ends of work units."""
    return bucket.num_frames * bucket.height * bucket.width // 8


def _content(rows: Iterable[Row]) -> str:
    return _hash([[row.key, row.identity, row.about] for row in rows])[:16]


def _hash(*value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
