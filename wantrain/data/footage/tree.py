"""A folder of footage, walked to any depth: footage, tars, tables and caption files; all else is counted as ignored.

Linked folders are followed. A link to a folder that it lies in would be followed for ever, and is ignored.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from wantrain.data.footage.tables import TABLES
from wantrain.data.footage.tally import Tally
from wantrain.data.rejects import FOOTAGE

ARCHIVES = frozenset((".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"))
#: Tables that are read only under the names in TABLES.
OTHER_TABLES = frozenset((".jsonl", ".csv", ".parquet"))
#: What caption.py writes into a source folder: its record of captions, and the table and the page of review=true.
RECORDS, REVIEW_TABLE, REVIEW_PAGE = "captions.jsonl", "captions.csv", "captions.html"


@dataclass
class Tree:
    """What lies below `source`.

    footage  files (or what else has such a name) with the extension of a video or image, sorted
    tars     tars, sorted
    texts    caption files by folder: the name without .txt -> the path
    """

    source: Path
    tally: Tally
    footage: list[Path] = field(default_factory=list)
    tars: list[Path] = field(default_factory=list)
    texts: dict[Path, dict[str, Path]] = field(default_factory=dict)
    _used: set[Path] = field(default_factory=set)

    def caption_file(self, path: Path) -> Path | None:
        """The caption file of a file of footage: NAME.txt or NAME.EXTENSION.txt beside it, .txt in any case."""
        texts = self.texts.get(path.parent, {})
        return texts.get(path.name) or texts.get(path.stem)

    def use(self, text: Path) -> None:
        """Note that a caption file was read."""
        self._used.add(text)

    def count_texts(self) -> None:
        """Count the caption files: those that were read, and the others by the reason why they were not."""
        names = {path.parent / name for path in self.footage for name in (path.name, path.stem)}
        for folder, texts in self.texts.items():
            for name, text in texts.items():
                if text in self._used:
                    self.tally.read["caption files"] += 1
                elif folder / name in names:
                    self.tally.ignore("captions of files that have another", below(text, self.source))
                else:
                    self.tally.ignore("captions without a clip", below(text, self.source))


def read_tree(source: Path, tally: Tally, out: Path | None = None) -> Tree:
    """Walk a folder. ValueError if it cannot be read, or if `out` lies in it or in a folder that it links to."""
    tree = Tree(source, tally)
    output = None if out is None else out.resolve()
    for folder, entries in _walk(source, tally, output):
        for entry in entries:
            _sort_in(tree, folder, entry)
    tree.footage.sort()
    tree.tars.sort()
    return tree


def _walk(source: Path, tally: Tally, output: Path | None) -> Iterator[tuple[Path, list[os.DirEntry[str]]]]:
    """Each folder with its entries, sorted by name, without the hidden ones."""
    waiting: list[tuple[Path, frozenset[Path]]] = [(source, frozenset())]
    while waiting:
        folder, above = waiting.pop()
        real = folder.resolve()
        if real in above:
            if not is_footage(folder):  # else it is rejected by name
                tally.ignore("links to a folder that they lie in", below(folder, source))
            continue
        if output is not None and (real == output or real in output.parents):
            link = "" if folder == source else f", behind {below(folder, source)}"
            raise ValueError(
                f"out={output} lies inside source={source}{link}, so its files would be footage of the next run; give "
                "an out= beside source="
            )
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            if folder == source:
                raise ValueError(f"source={source} cannot be read ({error.strerror}); check its permissions") from error
            if not is_footage(folder):
                tally.ignore("folders that cannot be read", below(folder, source))
            continue
        for entry in entries:
            if entry.name.startswith("."):
                tally.ignore("hidden folders" if _is_folder(entry) else "hidden files", below(Path(entry), source))
        shown = [entry for entry in entries if not entry.name.startswith(".")]
        yield folder, shown
        waiting += [(folder / entry.name, above | {real}) for entry in reversed(shown) if _is_folder(entry)]


def _sort_in(tree: Tree, folder: Path, entry: os.DirEntry[str]) -> None:
    """Put one entry of a folder where it belongs, or count it as ignored."""
    path, extension = folder / entry.name, Path(entry.name).suffix.lower()
    if is_footage(path):  # also a folder of such a name, so that it is rejected by name
        tree.footage.append(path)
        return
    if _is_folder(entry):
        return
    if (kind := _ignored_kind(tree.source, path, extension)) is not None:
        tree.tally.ignore(kind, below(path, tree.source))
    elif extension == ".tar":
        tree.tars.append(path)
    elif extension == ".txt":
        texts = tree.texts.setdefault(folder, {})
        if path.stem in texts:
            tree.tally.ignore("captions of files that have another", below(path, tree.source))
        else:
            texts[path.stem] = path
    else:
        tree.tally.read["tables"] += 1


def _ignored_kind(source: Path, path: Path, extension: str) -> str | None:
    """Why a file that is not footage is not read; None for a tar, a caption file or a table."""
    if not path.is_file():
        return "pipes, sockets and broken links"
    if extension in {".tar", ".txt"} or (path.parent == source and path.name in TABLES):
        return None
    if path.name in TABLES:
        return "tables that are not in the source folder itself"
    if path.name in {RECORDS, REVIEW_TABLE, REVIEW_PAGE}:
        return "files of caption.py"
    if extension in ARCHIVES:
        return f"archives ({extension})"
    if extension in OTHER_TABLES:
        return f"tables of another name than metadata{extension}"
    return f"of extension {extension}" if extension else "without an extension"


def is_footage(path: Path) -> bool:
    """True for the extension of a video or image, also of one that is rejected by name."""
    return path.suffix.lower() in FOOTAGE


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def below(path: Path, source: Path) -> str:
    """The path below `source` with forward slashes; bytes that are not UTF-8 as escapes."""
    return os.fsencode(path.relative_to(source).as_posix()).decode("utf-8", "backslashreplace")
