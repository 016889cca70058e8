"""Rejects: files and clips that a data stage does not use; and the file extensions of footage."""

from __future__ import annotations

from dataclasses import dataclass

VIDEOS = frozenset((".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif"))
IMAGES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp"))


@dataclass(frozen=True)
class Reject:
    """A file or clip that is not used.

    reason  why, in full
    bad     True if it counts towards rejects.limit
    kind    one of a few categories, under which statistics count it
    """

    name: str
    reason: str
    bad: bool = True
    kind: str = "unreadable"
