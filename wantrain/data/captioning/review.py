"""The review of captions: a page with filmstrips, a table with the same rows, and the edited table written back."""

from __future__ import annotations

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from wantrain import page
from wantrain.data.captioning.frames import FrameOptions, Shown, shown_frames
from wantrain.data.captioning.records import Record, Records
from wantrain.data.captioning.sidecars import Captioned, Origin, read_captions, table_of
from wantrain.data.captioning.writing import TEXT_LENGTH
from wantrain.data.footage.captions import read_text
from wantrain.data.footage.decode_workers import DecodeOptions
from wantrain.data.footage.tree import REVIEW_PAGE, REVIEW_TABLE
from wantrain.util.console import say
from wantrain.util.files import write_atomically
from wantrain.video import filmstrip, jpeg

#: Columns of the table. `seen` is a hash of the caption when the table was written.
COLUMNS = ("path", "caption", "tokens", "by", "seen")
#: Who wrote a caption, in words.
AUTHORS: dict[Origin, str] = {
    "caption.py": "by caption.py",
    "person": "by a person",
    "table": "in a table",
    "tar": "in tars",
    "none": "without a caption",
}
#: Frames of a filmstrip, their height in pixels, and the frames a second from which they are taken.
STRIP, CELL, STRIP_FPS = 6, 96, 8.0


def write_review(
    source: Path, count_tokens: Callable[[str], int], decode: DecodeOptions, *, pictures: bool = True
) -> list[Path]:
    """Write captions.csv, and with `pictures` captions.html, into `source`; returns the files.

    Rows stand in the order of shard.py. `count_tokens` gives the tokens of a caption for the model's text encoder.
    """
    captioned, _ = read_captions(source, Records(source))
    tokens = [count_tokens(each.caption) if each.caption else 0 for each in captioned]
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(COLUMNS)
    for each, count in zip(captioned, tokens, strict=True):
        writer.writerow((each.file.name, each.caption, count, each.origin, _seen(each.caption)))
    # With a byte order mark, or spreadsheets read it as another encoding than UTF-8.
    write_atomically(source / REVIEW_TABLE, "\ufeff" + table.getvalue())
    written = [source / REVIEW_TABLE]
    if pictures:
        write_atomically(source / REVIEW_PAGE, _page(source, captioned, tokens, decode))
        written.append(source / REVIEW_PAGE)
    say(f"wrote {' and '.join(map(str, written))}: {len(captioned)} files")
    say(f"  edit the captions of the table, then: python caption.py source={source} apply={written[0]}")
    return written


def apply_table(source: Path, table: Path) -> list[str]:
    """Write the captions that were edited in a table to their text files, and record them as a person's; returns the
    files whose captions changed.

    ValueError, before anything is written, for a row that names no file of `source`, names it twice, has no caption,
    or is of a file whose caption stands in a table or a tar; and where a text file was changed after the table was
    written, too.
    """
    records = Records(source)
    captioned, _ = read_captions(source, records)
    by_name = {each.file.name: each for each in captioned}
    edited, problems, named = [], list[str](), Counter[str]()
    for line, path, caption, seen in _rows(table):
        named[path] += 1
        each = by_name.get(path)
        if each is None:
            problems.append(f"line {line} names {path}, which is no footage below {source}")
        elif named[path] > 1:
            problems.append(f"line {line} names {path} for the second time")
        elif caption == each.caption or (seen and _seen(caption) == seen):
            continue
        elif problem := _problem(source, each, caption, seen):
            problems.append(f"line {line}: {problem}")
        else:
            edited.append((each, caption))
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise ValueError(f"{table}: {'; '.join(problems[:5])}{more}. Nothing was written")
    for each, caption in edited:
        if each.origin == "person":  # so that what is replaced can be found
            records.add(Record(each.file.name, each.caption, "person"))
        records.add(Record(each.file.name, caption, "person"))
        write_atomically(each.place, f"{caption}\n")
    say(f"{table}: {len(edited)} captions of {len(captioned)} files changed; they count as a person's")
    return [each.file.name for each, _ in edited]


def _problem(source: Path, each: Captioned, caption: str, seen: str) -> str:
    """Why an edited row cannot be written; empty if it can."""
    name = each.file.name
    if each.origin == "table":
        return f"the caption of {name} stands in {table_of(source)}, which shard.py reads first; edit it there"
    if each.origin == "tar":
        return f"{name} lies in a tar; edit its caption there"
    if not caption:
        return f"{name} has no caption; write one, or remove the line to leave it as it is"
    if seen and seen != _seen(each.caption):
        return f"{each.place.name} was changed after the table was written; run review=true again and edit that table"
    return ""


def _rows(table: Path) -> list[tuple[int, str, str, str]]:
    """Line, path, caption (one line) and `seen` of each row; spreadsheets may have put semicolons or tabs between."""
    if not table.is_file():
        raise ValueError(f"apply={table} is not there; python caption.py source=DIR review=true writes a table")
    text = read_text(table)
    head = text.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count))
    absent = [key for key in ("path", "caption") if key not in (reader.fieldnames or ())]
    if absent:
        raise ValueError(f"{table} has no column {' and '.join(absent)}; its columns must be {', '.join(COLUMNS)}")
    rows = []
    for row in reader:
        if row["caption"] is None or None in row:
            raise ValueError(f"{table} line {reader.line_num} has another number of cells than the first line")
        rows.append((reader.line_num, row["path"], " ".join(row["caption"].split()), (row.get("seen") or "").strip()))
    return rows


def _seen(caption: str) -> str:
    return hashlib.sha256(caption.encode()).hexdigest()[:12]


def _page(source: Path, captioned: Sequence[Captioned], tokens: Sequence[int], decode: DecodeOptions) -> str:
    """The page: a row for each file, with a filmstrip, the caption to be edited, and its tokens."""
    files = [each.file for each in captioned if each.file.member is None]
    options = FrameOptions(per_second=STRIP_FPS, most=STRIP, pixels=CELL * CELL * 4)
    strips = {file.name: _strip(shown) for file, shown in shown_frames(files, options, decode)}
    authors = {**AUTHORS, "table": f"in {table_of(source)}"}
    rows = [
        {
            "path": each.file.name,
            "caption": each.caption,
            "tokens": count,
            "by": each.origin,
            "author": authors[each.origin],
            "seen": _seen(each.caption),
            "editable": each.origin not in ("table", "tar"),
            **strips.get(each.file.name, {"strip": "", "problem": ""}),
        }
        for each, count in zip(captioned, tokens, strict=True)
    ]
    counts = Counter(each.origin for each in captioned)
    totals: list[tuple[str, int]] = [("files", len(captioned))]
    totals += [(words, counts[origin]) for origin, words in authors.items() if counts[origin]]
    totals += [(f"more than {TEXT_LENGTH} tokens", sum(count > TEXT_LENGTH for count in tokens))]
    return page.render(
        "captions",
        f"Captions of {source.name}",
        totals=totals,
        table=REVIEW_TABLE,
        command=f"python caption.py source={source} apply={source / REVIEW_TABLE}",
        most=TEXT_LENGTH,
        rows=rows,
    )


def _strip(shown: Shown | str) -> dict[str, str]:
    """A filmstrip as an address, or the reason why there is none."""
    if isinstance(shown, str):
        return {"strip": "", "problem": shown}
    return {"strip": page.data_uri(jpeg(filmstrip(shown.frames, columns=STRIP, cell=CELL))), "problem": ""}
