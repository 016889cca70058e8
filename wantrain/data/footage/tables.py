"""Tables of captions in a source folder: metadata.jsonl, metadata.csv, metadata.json.

Beside our own keys those of other trainers are read: `video,prompt` (DiffSynth-Studio), `video_path` and `image_path`
(musubi-tuner), a list of `file_path, text, type` (VideoX-Fun), `file_name, text` (datasets).
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from wantrain.data.footage.captions import CAPTION_KEYS, Annotation, parse_row, read_text
from wantrain.data.footage.tally import Tally

#: Metadata tables of a source folder, and the shape of one row of each.
TABLES = {
    "metadata.jsonl": '{"path": ..., "caption": ...}',
    "metadata.csv": "path,caption",
    "metadata.json": '[{"path": ..., "caption": ...}, ...]',
}
#: Keys of a row that hold the file's path; the first that is there is read.
PATH_KEYS = ("path", "file_name", "file_path", "video_path", "image_path", "video", "image", "file")
#: Keys that are known and change nothing.
_WITHOUT_EFFECT = ("type",)
_KNOWN = (*PATH_KEYS, *CAPTION_KEYS, *_WITHOUT_EFFECT, "weight", "loss_weight", "tags")
#: A CSV column that holds a caption: caption, caption_2, text, text_2...
_CAPTION_COLUMN = re.compile(r"(caption|text|prompt)(_?\d+)?")


def read_tables(source: Path, is_footage: Callable[[Path], bool], tally: Tally) -> dict[Path, Annotation]:
    """Read the tables in `source`: annotations by file. Keys that are not read become notes of `tally`.

    ValueError names the line that is malformed, or that names a file that is absent, hidden, outside `source`, no
    footage, or listed before.
    """
    annotations: dict[Path, Annotation] = {}
    for name, shape in TABLES.items():
        table = source / name
        if not table.is_file():
            continue
        unread: dict[str, None] = {}
        for number, row in _rows(table, shape):
            try:
                listed = row[next((key for key in PATH_KEYS if key in row), "path")]
                path = _place(source, listed)
                annotation = parse_row(row)
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise _not_a_row(table, number, shape, error, row) from error
            _check_file(f"{table} line {number}", listed, path, source, is_footage)
            if path in annotations:
                raise ValueError(
                    f"{table} line {number} names {listed} for the second time; remove one of the lines, or give "
                    "several captions in one (captions, or the columns caption, caption_2...)"
                )
            annotations[path] = annotation
            unread.update((key, None) for key in row if key not in _KNOWN)
        if unread:
            tally.notes.append(f"{name}: not read: {', '.join(_with_nearest(unread))}")
    return annotations


def _place(source: Path, listed: str) -> Path:
    """Where a listed path lies, as a path below `source` if it is one, also where a link leads there."""
    below = os.path.relpath(listed, source) if Path(listed).is_absolute() else os.path.normpath(listed)
    if Path(below).parts[:1] == ("..",) and Path(listed).is_absolute():
        below = os.path.relpath(Path(listed).resolve(), source.resolve())
    return source / below


def _check_file(line: str, listed: str, path: Path, source: Path, is_footage: Callable[[Path], bool]) -> None:
    """Raise ValueError unless a line names footage below `source`."""
    parts = path.relative_to(source).parts
    if not path.is_file():
        raise ValueError(f"{line} names {listed}, which is not in {source}; correct the path or remove the line")
    if not is_footage(path) or parts[0] == "..":
        raise ValueError(
            f"{line} names {listed}, which is not a video or image below {source}; correct the path or remove the line"
        )
    if any(part.startswith(".") for part in parts):
        raise ValueError(f"{line} names {listed}, which is hidden, so it is not read; rename it or remove the line")


def _rows(table: Path, shape: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a table with their line numbers; in a .json with the number of the element."""
    text = read_text(table)
    if table.suffix == ".csv":
        yield from _csv_rows(table, text, shape)
    elif table.suffix == ".json":
        try:
            rows = json.loads(text)
            if not isinstance(rows, list):
                raise ValueError("it is no list")
        except ValueError as error:
            raise ValueError(f"{table} is not {shape} ({error}); correct it, or rename it if it is no table") from error
        yield from enumerate(rows, start=1)
    else:
        # Not splitlines(): JSON strings may hold U+2028 and other characters that splitlines() takes for line ends.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise _not_a_row(table, number, shape, error) from error
                yield number, row


def _csv_rows(table: Path, text: str, shape: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a CSV; an empty cell is no value."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for cells in reader:
            if None in cells or None in cells.values():
                raise ValueError(f"a row whose number of cells differs from the {len(reader.fieldnames or [])} columns")
            row: dict[str, Any] = {str(key).strip(): value for key, value in cells.items()}
            columns = [key for key in row if _CAPTION_COLUMN.fullmatch(key)]
            captions = [row.pop(key).strip() or None for key in columns]
            yield reader.line_num, {**row, "captions": captions} if columns else row
    except (ValueError, csv.Error) as error:
        raise _not_a_row(table, reader.line_num, shape, error) from error


def _not_a_row(table: Path, number: int, shape: str, error: Exception, row: Any = None) -> ValueError:
    unread = [key for key in row if key not in _KNOWN] if isinstance(row, dict) else []
    named = f"; not read: {', '.join(_with_nearest(unread))}" if unread else ""
    return ValueError(f"{table} line {number} is not {shape} ({type(error).__name__}: {error}){named}")


def _with_nearest(keys: Iterable[str]) -> Iterator[str]:
    """Each unknown key, with the nearest known one if there is one."""
    for key in keys:
        nearest = difflib.get_close_matches(key.lower(), _KNOWN, n=1, cutoff=0.5)
        yield f"{key} (did you mean {nearest[0]}?)" if nearest else key
