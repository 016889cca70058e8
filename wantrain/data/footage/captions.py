"""Annotations of footage: captions, a sampling weight and tags, from tables or from a text file beside each file."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

#: Metadata tables of a source folder, and the shape of one row of each.
TABLES = {"metadata.jsonl": '{"path": ..., "caption": ...}', "metadata.csv": "path,caption"}
#: A CSV column that holds a caption: caption, caption_2, text, text_2...
_CAPTION_COLUMN = re.compile(r"(caption|text)(_?\d+)?")


@dataclass(frozen=True)
class Annotation:
    """What the user says about one file: captions (each one line, none twice), its sampling weight, and tags."""

    captions: tuple[str, ...] = ()
    weight: float = 1.0
    tags: tuple[str, ...] = ()

    def with_prefix(self, prefix: str) -> Annotation:
        """The same annotation with `prefix` before each caption."""
        return replace(self, captions=tuple(_with_prefix(prefix, caption) for caption in self.captions))


def parse_row(row: Mapping[str, Any]) -> Annotation:
    """Parse a row with `captions` (a list), or `caption` or `text` (one, or a list), and optional `weight` and `tags`.

    KeyError if it has no caption key, ValueError if a value has the wrong type.
    """
    key = next((key for key in ("captions", "caption", "text") if key in row), "caption")
    captions = row[key] if isinstance(row[key], list) else [row[key]]
    tags = row.get("tags") or []
    if isinstance(tags, str):
        tags = re.split(r"[,;|]", tags)
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError(f'tags={tags!r} is not a list of words; give ["a", "b"] or one string with commas')
    weight = row.get("weight")
    weight = 1.0 if weight in (None, "") else float(weight)
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"weight={weight:g} must be above 0; remove the file if it is not to be used")
    return Annotation(_lines(captions), weight, tuple(dict.fromkeys(tag.strip() for tag in tags if tag.strip())))


def read_tables(source: Path, is_footage: Callable[[Path], bool]) -> dict[Path, Annotation]:
    """Read metadata.jsonl and metadata.csv in `source`: annotations by file.

    ValueError names the line that is malformed, or that names a file that is absent, outside `source`, no footage, or
    listed before.
    """
    annotations: dict[Path, Annotation] = {}
    for name, shape in TABLES.items():
        table = source / name
        if not table.is_file():
            continue
        for number, row in _rows(table, shape):
            try:
                listed = row["path"] if "path" in row else row["file_name"]
                below = os.path.relpath(listed, source) if Path(listed).is_absolute() else os.path.normpath(listed)
                annotation = parse_row(row)
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise _not_a_row(table, number, shape, error) from error
            path = source / below
            if not path.is_file():
                raise ValueError(
                    f"{table} line {number} names {listed}, which is not in {source}; correct the path or "
                    "remove the line"
                )
            if not is_footage(path) or Path(below).parts[0] == "..":
                raise ValueError(
                    f"{table} line {number} names {listed}, which is not a video or image below {source}; correct the "
                    "path or remove the line"
                )
            if path in annotations:
                raise ValueError(
                    f"{table} line {number} names {listed} for the second time; remove one of the lines, or give "
                    "several captions in one (captions, or the columns caption, caption_2...)"
                )
            annotations[path] = annotation
    return annotations


def _rows(table: Path, shape: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a table with their line numbers."""
    text = read_text(table)
    if table.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            for cells in reader:
                if None in cells or None in cells.values():
                    raise ValueError(
                        f"a row whose number of cells differs from the {len(reader.fieldnames or [])} columns"
                    )
                row: dict[str, Any] = {str(key).strip(): value for key, value in cells.items()}
                columns = [key for key in row if _CAPTION_COLUMN.fullmatch(key)]
                captions = [row.pop(key) for key in columns]
                yield reader.line_num, {**row, "captions": captions} if columns else row
        except (ValueError, csv.Error) as error:
            raise _not_a_row(table, reader.line_num, shape, error) from error
        return
    # Not splitlines(): JSON strings may hold U+2028 and other characters that splitlines() takes for line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise _not_a_row(table, number, shape, error) from error
            yield number, row


def _not_a_row(table: Path, number: int, shape: str, error: Exception) -> ValueError:
    return ValueError(f"{table} line {number} is not {shape} ({type(error).__name__}: {error})")


def read_sidecar(path: Path) -> Annotation:
    """The annotation in NAME.txt beside a file: one caption; an empty annotation without that file."""
    text = path.with_suffix(".txt")
    return Annotation(_lines([read_text(text)])) if text.is_file() else Annotation()


def from_members(text: bytes | None, row: bytes | None) -> Annotation:
    """The annotation in the .txt and .json members of a tar sample; captions of the .json take precedence.

    ValueError if a member is not text or not a JSON object.
    """
    annotation = Annotation()
    if row is not None:
        content = json.loads(row)
        if not isinstance(content, dict):
            raise ValueError("its .json is not an object")
        annotation = parse_row({"caption": "", **content})
    if text is not None and not annotation.captions:
        annotation = replace(annotation, captions=_lines([text.decode("utf-8-sig")]))
    return annotation


def _lines(captions: Sequence[Any]) -> tuple[str, ...]:
    """Captions as single lines, without empty and repeated ones."""
    lines = (" ".join(str(caption or "").split()) for caption in captions)
    return tuple(dict.fromkeys(line for line in lines if line))


def _with_prefix(prefix: str, caption: str) -> str:
    """Prefix and caption, with a space between them where the prefix ends in ASCII, as words of spaced scripts do."""
    if prefix and caption and prefix[-1].isascii() and not prefix[-1].isspace():
        prefix += " "
    return (prefix + caption).strip()


def read_text(path: Path) -> str:
    """Read a UTF-8 file, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
