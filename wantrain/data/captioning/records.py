"""captions.jsonl: the captions that caption.py wrote below a source folder, and the person's that it replaced.

One line per caption, appended before its text file is written: so a caption on the disk that no line names was written
by a person. A line that a kill cut short is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from wantrain.data.footage.tree import RECORDS
from wantrain.util.files import naming, sync_file

_AWAY = "move the file away: all captions then count as a person's"


@dataclass(frozen=True)
class Record:
    """One caption.

    path       the file's path below the source folder
    caption    its text, one line
    by         who wrote it: caption.py or a person
    sha256     the hash of the file's bytes
    made_from  a hash of all that makes the caption: bytes, captioner, prompt, frames
    captioner, template, trigger  as they were given
    date       when, in UTC
    """

    path: str
    caption: str
    by: Literal["caption.py", "person"]
    sha256: str = ""
    made_from: str = ""
    captioner: str = ""
    template: str = ""
    trigger: str = ""
    date: str = ""


class Records:
    """The records of a source folder. ValueError if the file cannot be read or holds something else."""

    def __init__(self, source: Path) -> None:
        self.file = source / RECORDS
        self._bytes: int | None = None  # of its whole lines; None while there is no file
        self._by_path: dict[str, list[Record]] = {}
        self._by_origin: dict[str, Record] = {}
        for record in self._read():
            self._note(record)

    def author(self, path: str, caption: str) -> Record | None:
        """The last record of a file with this caption; None if there is none, so that a person wrote it."""
        lines = reversed(self._by_path.get(path, []))
        return next((record for record in lines if record.caption == caption), None)

    def made(self, made_from: str) -> Record | None:
        """The caption that was made from the same bytes in the same manner before, of whatever file."""
        return self._by_origin.get(made_from)

    def add(self, record: Record) -> None:
        """Append a record, with the date, and sync it."""
        record = Record(**{**asdict(record), "date": datetime.now(UTC).isoformat(timespec="seconds")})
        line = json.dumps({key: value for key, value in asdict(record).items() if value}, ensure_ascii=False) + "\n"
        with naming(self.file):
            if self._bytes is not None:  # the first of this run: without what a kill cut short, if it did
                os.truncate(self.file, self._bytes)
            with self.file.open("ab", buffering=0) as file:
                file.write(line.encode())
                os.fsync(file.fileno())
        if self._bytes is None:
            sync_file(self.file.parent)
        self._bytes = self.file.stat().st_size
        self._note(record)

    def _note(self, record: Record) -> None:
        self._by_path.setdefault(record.path, []).append(record)
        if record.made_from:
            self._by_origin[record.made_from] = record

    def _read(self) -> Iterator[Record]:
        if not self.file.is_file():
            return
        content = self.file.read_bytes()
        self._bytes = content.rfind(b"\n") + 1
        try:
            lines = content[: self._bytes].decode().split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.file} is not UTF-8 text ({error}); restore it, or {_AWAY}") from error
        keys = {field.name for field in fields(Record)}
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                record = Record(**{key: value for key, value in row.items() if key in keys})
                if not all(isinstance(value, str) for value in asdict(record).values()):
                    raise ValueError("a value that is no text")
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{self.file} line {number} is no record of caption.py ({error}); correct it, or {_AWAY}"
                ) from error
            yield record
