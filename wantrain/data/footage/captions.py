"""Annotations of footage: captions, weights and tags, from a row of a table or a text file beside a file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

#: Keys of a row that hold its captions; the first that is there is read.
CAPTION_KEYS = ("captions", "caption", "text", "prompt")


@dataclass(frozen=True)
class Annotation:
    """What the user says about one file: captions (each one line, none twice), how often it is drawn relative to others
    (`weight`), what it counts in the loss (`loss_weight`), and tags.

    No caption at all is (); a caption that was given and is blank is ("",).
    """

    captions: tuple[str, ...] = ()
    weight: float = 1.0
    tags: tuple[str, ...] = ()
    loss_weight: float = 1.0

    def with_prefix(self, prefix: str) -> Annotation:
        """The same annotation with `prefix` before each caption."""
        return replace(self, captions=tuple(_with_prefix(prefix, caption) for caption in self.captions))

    def to_dict(self) -> dict[str, Any]:
        """Its fields; a loss weight of 1 is left out, since older folders were hashed without it."""
        fields = asdict(self)
        return fields if self.loss_weight != 1 else {key: fields[key] for key in fields if key != "loss_weight"}


def parse_row(row: Mapping[str, Any]) -> Annotation:
    """Parse a row with `captions` (a list), or `caption`, `text` or `prompt` (one, or a list), and optional `weight`,
    `loss_weight` and `tags`.

    KeyError if it has no caption key, ValueError if a value has the wrong type.
    """
    key = next((key for key in CAPTION_KEYS if key in row), "caption")
    captions = row[key] if isinstance(row[key], list) else [row[key]]
    for caption in captions:
        if not (caption is None or isinstance(caption, str)):
            raise ValueError(
                f"{key} holds {json.dumps(caption, ensure_ascii=False)[:80]}, which is no text; a caption is one text, "
                "or a list of texts"
            )
    tags = row.get("tags") or []
    if isinstance(tags, str):
        tags = re.split(r"[,;|]", tags)
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError(f'tags={tags!r} is not a list of words; give ["a", "b"] or one string with commas')
    named = tuple(dict.fromkeys(tag.strip() for tag in tags if tag.strip()))
    return Annotation(_lines(captions), _weight(row, "weight"), named, _weight(row, "loss_weight"))


def _weight(row: Mapping[str, Any], key: str) -> float:
    """The weight under a key of a row; 1 where there is none. ValueError unless it is above 0."""
    value = row.get(key)
    weight = 1.0 if value in (None, "") else float(value)
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"{key}={weight:g} must be above 0; remove the file if it is not to be used")
    return weight


def read_caption_file(path: Path) -> tuple[str, ...]:
    """The caption in a text file; ("",) if it is blank. ValueError if it cannot be read as UTF-8 text."""
    return _lines([read_text(path)])


def from_members(text: bytes | None, row: bytes | None) -> Annotation:
    """The annotation in the .txt and .json members of a tar sample; captions of the .json take precedence.

    ValueError if a member is not text or not a JSON object.
    """
    annotation = Annotation()
    if row is not None:
        content = json.loads(row)
        if not isinstance(content, dict):
            raise ValueError("its .json is not an object")
        annotation = parse_row({"caption": None, **content})
    if text is not None and not any(annotation.captions):
        annotation = replace(annotation, captions=_lines([_decoded(text)]))
    return annotation


def _lines(captions: Sequence[str | None]) -> tuple[str, ...]:
    """Captions as single lines, without repeated ones, and without blank ones unless all are blank."""
    lines = [" ".join(caption.split()) for caption in captions if caption is not None]
    return tuple(dict.fromkeys(line for line in lines if line)) or (("",) if lines else ())


def _with_prefix(prefix: str, caption: str) -> str:
    """Prefix and caption, with a space between them where the prefix ends in ASCII, as words of spaced scripts do."""
    if prefix and caption and prefix[-1].isascii() and not prefix[-1].isspace():
        prefix += " "
    return (prefix + caption).strip()


def read_text(path: Path) -> str:
    """Read a UTF-8 file, with or without a byte order mark. ValueError if it cannot be read, or is another encoding."""
    try:
        return _decoded(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    except ValueError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error


def _decoded(content: bytes) -> str:
    """Bytes as UTF-8 text; ValueError, as a reason, if they are not. UTF-16 without a mark can pass for UTF-8."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{error.reason} at byte {error.start}") from error
    if "\0" in text:
        raise ValueError(f"a NUL at byte {content.index(0)}, as in UTF-16")
    return text
