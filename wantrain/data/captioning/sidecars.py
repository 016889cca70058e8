"""Which files of a source folder have a caption, who wrote it, and where a caption of theirs is written."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wantrain.data.captioning.records import Records
from wantrain.data.footage.captions import read_caption_file
from wantrain.data.footage.probe import Footage
from wantrain.data.footage.sources import find_footage
from wantrain.data.footage.tables import TABLES, read_tables
from wantrain.data.footage.tally import Tally
from wantrain.data.footage.tree import Tree, is_footage, read_tree
from wantrain.data.rejects import Reject

#: Where a file's caption comes from: there is none, this command or a person wrote its text file, or it stands in a
#: table or a tar, which shard.py reads instead of a text file.
Origin = Literal["none", "caption.py", "person", "table", "tar"]


@dataclass(frozen=True)
class Captioned:
    """A file of footage and its caption as shard.py reads it.

    file     the file
    place    the text file of its caption, there or to be written
    caption  one line; empty if there is none
    origin   who wrote it
    made_from  of a caption of this command: the hash of what made it
    """

    file: Footage
    place: Path
    caption: str
    origin: Origin
    made_from: str = ""


def read_captions(source: Path, records: Records) -> tuple[list[Captioned], list[Reject]]:
    """Every file of footage below `source` that shard.py would take, in its order, with its caption; and the files
    that it rejects by name or place.

    A blank text file counts as no caption. ValueError as `find_footage`, and for a source that is no folder.
    """
    if not source.is_dir():
        raise ValueError(
            f"source={source} is no folder; captions are written beside footage, so give the folder that holds it "
            "(unpack tars first)"
        )
    content = find_footage(source, caption_missing="empty")
    tree, tables = read_tree(source, Tally()), read_tables(source, is_footage, Tally())
    in_table = {path for path, annotation in tables.items() if any(annotation.captions)}
    names = Counter(path.parent / name for path in tree.footage for name in {path.stem, path.name})
    found = []
    for file in content.footage:
        if file.member is not None or file.path in in_table:
            captions = " / ".join(file.annotation.captions)
            found.append(Captioned(file, file.path, captions, "tar" if file.member is not None else "table"))
            continue
        found.append(_beside(file, tree, records, names))
    return found, content.rejects


def table_of(source: Path) -> str:
    """The name of the first caption table of a source folder, for messages."""
    return next((name for name in TABLES if (source / name).is_file()), "a table")


def _beside(file: Footage, tree: Tree, records: Records, names: Counter[Path]) -> Captioned:
    """A file with the caption in the text file beside it, if there is one."""
    text = tree.caption_file(file.path)
    if text is None:
        return Captioned(file, _place(file.path, names), "", "none")
    (caption,) = read_caption_file(text)
    if not caption:
        return Captioned(file, text, "", "none")
    record = records.author(file.name, caption)
    if record is None or record.by == "person":
        return Captioned(file, text, caption, "person")
    return Captioned(file, text, caption, "caption.py", record.made_from)


def _place(path: Path, names: Counter[Path]) -> Path:
    """The text file for a caption: NAME.txt, or NAME.EXTENSION.txt if another file of footage would read NAME.txt.

    names  how many files of footage read NAME.txt, by NAME
    """
    return path.with_suffix(".txt") if names[path.with_suffix("")] == 1 else path.with_name(f"{path.name}.txt")
