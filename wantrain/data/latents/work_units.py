"""What is to be encoded, as arithmetic: rows with an identity each, cut into units of work that become one tar each.

An identity is the hash of all that makes a row's content. Where a unit ends depends on its own rows, so a clip that
comes or goes changes one or two units and leaves the others, and with them their tars, as they are. A unit knows
neither processes nor history: any number of processes, killed or not, ends with the same tars.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wantrain import geometry
from wantrain.data.footage.duplicates import group_of
from wantrain.data.footage.pixels import read_window
from wantrain.data.footage.video_shards import VideoEntry, scan_video_shards
from wantrain.data.latents.conditioning import Conditions
from wantrain.masks import PAINTED

#: Raise it whenever the same footage, choices and weights would give other latents or texts than before.
CODE = 2
#: What a file's `about` may say without changing its latents; everything else is part of their identity.
WORDS = frozenset(("caption", "captions", "source", "weight", "tags", "windows", "mask", "seek_points"))


@dataclass(frozen=True)
class Row:
    """One sample of a tar: its key, its identity, and its .json member."""

    key: str
    identity: str
    about: dict[str, Any]


@dataclass(frozen=True)
class ClipRow(Row):
    """The latents of one window of a file; `number` counts the file's windows."""

    entry: VideoEntry
    number: int
    bucket: geometry.Bucket

    @property
    def clip(self) -> tuple[str, int, str]:
        """What the windows of one clip share: windows that carry the same number `clip` and have one bucket."""
        return self.entry.key, self.entry.about["windows"][self.number].get("clip", self.number), str(self.bucket)

    @property
    def captions(self) -> list[str]:
        """Its file's captions, each once: `captions` if there are several, else `caption`."""
        about = self.entry.about
        return list(dict.fromkeys(str(caption) for caption in about.get("captions") or [about["caption"]]))

    @property
    def name(self) -> str:
        """What people call it."""
        return clip_name(self.entry, self.number)

    @property
    def seconds(self) -> float:
        """How long it is."""
        return clip_seconds(self.entry, self.number)


@dataclass(frozen=True)
class TextRow(Row):
    """The embedding of one caption."""

    @property
    def caption(self) -> str:
        return str(self.about["caption"])


@dataclass(frozen=True)
class Unit:
    """Rows that are made together and lie in one tar (those of them that could be made)."""

    kind: str
    rows: tuple[Row, ...]

    @functools.cached_property
    def name(self) -> str:
        """Its name, a hash of what is wanted."""
        return f"{self.kind}-{_content(self.rows)}"


def tar_name(kind: str, rows: Iterable[Row]) -> str:
    """The name of the tar that holds exactly these rows."""
    return f"{kind}-{_content(rows)}.tar"


@dataclass(frozen=True)
class LeftOut:
    """A clip that is not encoded, and why: in full, and as a word that is counted."""

    name: str
    seconds: float
    reason: str
    kind: str


@dataclass(frozen=True)
class Work:
    """All that a latent folder is to hold.

    latents, texts  units of the clips, and of the distinct captions, the empty one among them
    text_of    a caption's identity
    group_of   the group of each file that looks like another (duplicates.py)
    left_out   clips that are not encoded, with the reason: they would have to be enlarged too much, or are not told of
    """

    latents: list[Unit]
    texts: list[Unit]
    text_of: dict[str, str]
    group_of: dict[int, int]
    left_out: list[LeftOut]

    @property
    def name(self) -> str:
        """A word that is the same for the same work."""
        return _hash([unit.name for unit in [*self.latents, *self.texts]])[:16]

    @property
    def sources(self) -> set[int]:
        """The files that clips are cut from, as numbers."""
        return {int(row.entry.key, 16) for unit in self.latents for row in unit.rows if isinstance(row, ClipRow)}

    def share(self, rank: int, size: int) -> list[Unit]:
        """The units that one of `size` processes makes."""
        return [*self.texts[rank::size], *self.latents[rank::size]]


def plan_work(
    shards: Path,
    video: Mapping[str, Any],
    sizes: geometry.Buckets,
    conditions: Conditions,
    settings: Mapping[str, Any],
) -> Work:
    """What sizes and settings make of a folder of video shards, by its headers. ValueError for a key seen twice."""
    vae = " ".join(settings[key] for key in ("vae_fingerprint", "vae_precision") if key in settings)
    files, left_out, seen = list[list[ClipRow]](), list[LeftOut](), set[str]()
    for entry in scan_video_shards(shards, video):
        if entry.key in seen:
            raise ValueError(f"{shards} holds {entry.key} twice; make it again with shard.py")
        seen.add(entry.key)
        try:
            rows = clip_rows(entry, sizes, conditions, vae)
        except ValueError as error:
            clips = range(len(entry.about["windows"]))
            left_out += [_left_out(entry, number, error, "too small") for number in clips]
            continue
        kept = []
        for row in rows:
            try:
                conditions.check_clip(row.bucket.num_frames, entry.mask is not None)
                kept.append(row)
            except ValueError as error:
                left_out.append(_left_out(entry, row.number, error, "not for this condition"))
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
        group_of(video),
        left_out,
    )


def _left_out(entry: VideoEntry, number: int, why: ValueError, kind: str) -> LeftOut:
    return LeftOut(clip_name(entry, number), clip_seconds(entry, number), str(why), kind)


def clip_rows(entry: VideoEntry, sizes: geometry.Buckets, conditions: Conditions, vae: str) -> list[ClipRow]:
    """The rows of a file's windows, all at the size that its longest gets. ValueError if no size is small enough.

    `vae` says what encodes: its fingerprint, and the precision where it is not fp32.
    """
    about, rows = entry.about, []
    longest = max(window["num_frames"] for window in about["windows"])
    height, width = sizes.choose(longest, about["height"], about["width"])
    *_, cropped = geometry.cover(about["height"], about["width"], height, width)
    made_of = {key: value for key, value in about.items() if key not in WORDS}
    if stored := conditions.identity():
        made_of["condition"] = {**stored, **({PAINTED: about.get("mask")} if PAINTED in stored else {})}
    for number, window in enumerate(about["windows"]):
        bucket = geometry.Bucket(window["num_frames"], height, width)
        choices = {key: value for key, value in window.items() if key != "clip"}
        identity = _hash(CODE, "latent", made_of, choices, [height, width], vae)[:32]
        told = {"source": about["source"], "bucket": str(bucket), "cropped": round(cropped, 4), "identity": identity}
        rows.append(ClipRow(f"{entry.key}-{number:04d}", identity, {**told, **window}, entry, number, bucket))
    return rows


def text_row(caption: str, text_fingerprint: str) -> TextRow:
    """The row of one caption."""
    identity = _hash(CODE, "text", caption, text_fingerprint)[:32]
    return TextRow(identity[:24], identity, {"caption": caption, "identity": identity})


def latent_units(files: Iterable[Sequence[ClipRow]], *, most: int, limit: int) -> list[Unit]:
    """Units of about `most` clips at most and `limit` bytes; the clips of a file stay together, as it is read once."""
    groups = [(int(rows[0].entry.key[:8], 16), rows, sum(_latent_bytes(row.bucket) for row in rows)) for rows in files]
    return _cut("latent", groups, most, limit)


def text_units(rows: Iterable[TextRow], *, most: int) -> list[Unit]:
    """Units of about `most` texts at most, in the order of their identities."""
    ordered = sorted(rows, key=lambda row: row.identity)
    return _cut("text", [(int(row.identity[:8], 16), [row], 0) for row in ordered], most, 1)


def clip_name(entry: VideoEntry, number: int) -> str:
    """What people call a window of a file."""
    return f"{entry.about['source']} (clip {number})"


def clip_seconds(entry: VideoEntry, number: int) -> float:
    """How long a window is, at the rate that it was cut at; an image takes no time."""
    window = read_window(entry.about["windows"][number])
    return 0.0 if window.num_frames == 1 else window.num_frames * window.stride / float(entry.about["fps"])


def _cut(kind: str, groups: Iterable[tuple[int, Sequence[Row], int]], most: int, limit: int) -> list[Unit]:
    """Groups of rows, each with a number of its own and its bytes, gathered into units.

    A unit ends where it is full; or, once a quarter full, after a group whose own number says so.
    """
    units, rows, size = [], list[Row](), 0
    for number, group, more in groups:
        rows.extend(group)
        size += more
        full = len(rows) >= most or size >= max(1, limit)
        if full or (len(rows) >= most // 4 and number % max(1, most // 2) == 0):
            units.append(Unit(kind, tuple(rows)))
            rows, size = [], 0
    return [*units, Unit(kind, tuple(rows))] if rows else units


def _latent_bytes(bucket: geometry.Bucket) -> int:
    """About what a clip's latents take: 16 channels in bf16 for 4x8x8 pixels. Only where units end depends on it."""
    return bucket.num_frames * bucket.height * bucket.width // 8


def _content(rows: Iterable[Row]) -> str:
    return _hash([[row.key, row.identity, row.about] for row in rows])[:16]


def _hash(*value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
