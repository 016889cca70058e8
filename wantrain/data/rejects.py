"""Rejects: files and clips that a data stage does not use; and the file extensions of footage."""

from __future__ import annotations

from dataclasses import dataclass

#: Containers that decord fails on, for want of an index: they are read forwards, with PyAV.
STREAMS = frozenset((".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".ogv"))
VIDEOS = STREAMS | {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif", ".wmv", ".flv", ".3gp", ".y4m"}
IMAGES = frozenset((".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".avif"))
#: Footage that Pillow, decord and PyAV cannot decode: it is rejected by name.
UNDECODABLE = frozenset((".heic", ".heif"))
#: Extensions of all files that are either used or rejected by name.
FOOTAGE = VIDEOS | IMAGES | UNDECODABLE


@dataclass(frozen=True)
class Reject:
    """A file or clip that is not used.

    reason  why, in full
    bad     True if it counts towards rejects.limit
    kind    one of a few categories, under which statistics count it
    part    True if it is a clip of a file that counts by itself
    """

    name: str
    reason: str
    bad: bool = True
    kind: str = "unreadable"
    part: bool = False
