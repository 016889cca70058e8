"""What people say about their footage: captions, a weight and tags, from tables or from a text beside each file."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

#: Tables of a source folder, and what one line of each looks like.
TABLES = {"metadata.jsonl": '{"path": ..., "caption": ...}', "metadata.csv": "path,caption"}
#: A column of a CSV that holds a caption: caption, caption_2, text, text_2...
_CAPTION_COLUMN = re.compile(r"(caption|text)(_?\d+)?")


@dataclass(frozen=True)
class Told:
    """What is said about one file: captions (each one line, none twice), its weight among others, and tags."""

    captions: tuple[str, ...] = ()
    weight: float = 1.0
    tags: tuple[str, ...] = ()

    def with_prefix(self, prefix: str) -> Told:
        """The same, `prefix` put before each caption."""
        return replace(self, captions=tuple(_with_prefix(prefix, caption) for caption in self.captions))


def told(row: Mapping[str, Any]) -> Told:
    """What a row says: `captions` (a list), or `caption` or `text` (one, or a list), `weight`, `tags`.

    KeyError if it has none of the captions' keys, ValueError if a value is not of its kind.
    """
    key = next((key for key in ("captions", "caption", "text") if key in row), "caption")
    captions = row[key] if isinstance(row[key], list) else [row[key]]
    tags = row.get("tags") or []
    if isinstance(tags, str):
        tags = re.split(r"[,;|]", tags)
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError(f"tags={tags!r} is no list of words")
    weight = row.get("weight")
    weight = 1.0 if weight in (None, "") else float(weight)
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"weight={weight:g} must be above 0; leave a file out to not use it")
    return Told(_lines(captions), weight, tuple(dict.fromkeys(tag.strip() for tag in tags if tag.strip())))


def read_tables(source: Path, is_footage: Any) -> dict[Path, Told]:
    """What metadata.jsonl or metadata.csv in `source` say, by file; `is_footage(path)` knows videos and images.

    ValueError names the line that is wrong: not as it should be, a file that is absent, elsewhere, or named twice.
    """
    found: dict[Path, Told] = {}
    for name, shape in TABLES.items():
        table = source / name
        if not table.is_file():
            continue
        for number, row in _rows(table, shape):
            try:
                listed = row["path"] if "path" in row else row["file_name"]
                below = os.path.relpath(listed, source) if Path(listed).is_absolute() else os.path.normpath(listed)
                about = told(row)
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise _not_a_row(table, number, shape, error) from error
            path = source / below
            if not path.is_file():
                raise ValueError(f"{table} line {number} names {listed}, which is not in {source}")
            if not is_footage(path) or Path(below).parts[0] == "..":
                raise ValueError(f"{table} line {number} names {listed}, which is no video or image below {source}")
            if path in found:
                raise ValueError(
                    f"{table} line {number} names {listed} for the second time; remove one of the lines, or give "
                    "several captions in one (captions, or the columns caption, caption_2...)"
                )
            found[path] = about
    return found


def _rows(table: Path, shape: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a table with the numbers of their lines."""
    text = read_text(table)
    if table.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            for cells in reader:
                if None in cells or None in cells.values():
                    raise ValueError(f"{len(reader.fieldnames or [])} columns, but another number of cells")
                row: dict[str, Any] = {str(key).strip(): value for key, value in cells.items()}
                columns = [key for key in row if _CAPTION_COLUMN.fullmatch(key)]
                said = [row.pop(key) for key in columns]
                yield reader.line_num, {**row, "captions": said} if columns else row
        except (ValueError, csv.Error) as error:
            raise _not_a_row(table, reader.line_num, shape, error) from error
        return
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for an end of line.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise _not_a_row(table, number, shape, error) from error
            yield number, row


def _not_a_row(table: Path, number: int, shape: str, error: Exception) -> ValueError:
    return ValueError(f"{table} line {number} is not {shape} ({type(error).__name__}: {error})")


def beside(path: Path) -> Told:
    """What NAME.txt beside a file says: one caption."""
    text = path.with_suffix(".txt")
    return Told(_lines([read_text(text)])) if text.is_file() else Told()


def from_members(text: bytes | None, row: bytes | None) -> Told:
    """What a sample of a tar says in its .txt and .json; the captions of the .json go before that of the .txt.

    ValueError if one of them is not what its name says.
    """
    about = Told()
    if row is not None:
        content = json.loads(row)
        if not isinstance(content, dict):
            raise ValueError("its .json is no object")
        about = told({"caption": "", **content})
    if text is not None and not about.captions:
        about = replace(about, captions=_lines([text.decode("utf-8-sig")]))
    return about


def _lines(captions: Sequence[Any]) -> tuple[str, ...]:
    """Captions as single lines, the empty and the repeated ones left out."""
    lines = (" ".join(str(caption or "").split()) for caption in captions)
    return tuple(dict.fromkeys(line for line in lines if line))


def _with_prefix(prefix: str, caption: str) -> str:
    """Prefix and caption, with a space between them where the prefix ends like a word of a spaced script."""
    if prefix and caption and prefix[-1].isascii() and not prefix[-1].isspace():
        prefix += " "
    return (prefix + caption).strip()


def read_text(path: Path) -> str:
    """A UTF-8 file, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
