"""Sources of footage: folders of files and WebDataset tars, local or at a URL; each file with its annotation.

Every file with the extension of a video or image is returned as Footage, or as a Reject with its reason. Every other
file is counted.
"""

from __future__ import annotations

import glob
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import fsspec
from braceexpand import braceexpand

from wantrain.data.footage.captions import Annotation, read_caption_file
from wantrain.data.footage.probe import MASKS, Footage
from wantrain.data.footage.tables import read_tables
from wantrain.data.footage.tally import Tally
from wantrain.data.footage.tars import read_tar
from wantrain.data.footage.tree import below, is_footage, read_tree
from wantrain.data.rejects import IMAGES, UNDECODABLE, VIDEOS, Reject
from wantrain.data.remote import open_url, reaching


class SourceContent(NamedTuple):
    """What a source holds: files of footage, rejects, and the count of all other files and folders."""

    footage: list[Footage]
    rejects: list[Reject]
    tally: Tally


def find_footage(
    source: str | Path,
    *,
    caption_missing: str = "error",
    caption_prefix: str = "",
    caption_default: str = "",
    downloads: Path | None = None,
    out: Path | None = None,
) -> SourceContent:
    """All videos and images of `source`, sorted, with captions; those that are rejected; and the count of the rest.

    `source` is a folder, or WebDataset tars: a file, a pattern (`data/*.tar`, `data/{000..012}.tar`) or a URL that
    fsspec knows; braces work in URLs too. Remote tars are copied into `downloads` first. In a folder a caption comes
    from a table (tables.py) or from NAME.txt beside the file, in a tar from the sample's .json or .txt. A file that has
    none gets `caption_default`. Without that, and for a caption that is blank, `caption_missing` decides: "error",
    "skip" or "empty".

    ValueError if nothing is found, a caption is missing under "error", a table names an absent file, a tar is damaged,
    something cannot be read, or `out` lies inside the folder `source`.
    """
    found, tally = list[Footage | Reject](), Tally()
    where = _local(source)
    if where is not None and where.is_dir():
        found.extend(_in_folder(where, tally, out))
        if not found:
            raise ValueError(
                f"source={source} holds no videos or images ({' '.join(sorted(VIDEOS | IMAGES))}); give the folder "
                f"that holds them{_instead(tally)}"
            )
    else:
        paths = [where] if where is not None else _tars(str(source), downloads)
        for path in paths:
            found.extend(read_tar(path, f"{path.name}/" if len(paths) > 1 else "", tally))
        if not found:
            raise ValueError(
                f"source={source}: no sample holds a video or an image ({' '.join(sorted(VIDEOS | IMAGES))}); give "
                f"tars that do{_instead(tally)}"
            )
    footage, rejects = _select(found, caption_missing, caption_prefix, caption_default, tally)
    return SourceContent(footage, rejects, tally)


def _instead(tally: Tally) -> str:
    """What was there instead of footage, as the end of a message."""
    return "".join(f"; {line}" for line in tally.lines())


def _unread(tally: Tally) -> str:
    """Files that may hold the captions that are missing, as the end of a message."""
    kinds = [kind for kind in tally.ignored if kind.startswith(("captions", "tables"))]
    names = [f"{tally.ignored[kind]} {kind} (first: {tally.first[kind]})" for kind in sorted(kinds)]
    return f"; not read: {', '.join(names)}" if names else ""


def _select(
    found: list[Footage | Reject], missing: str, prefix: str, default: str, tally: Tally
) -> tuple[list[Footage], list[Reject]]:
    """Split into footage with its final captions, and rejects."""
    footage, rejects, without = list[Footage](), list[Reject](), list[Footage]()
    fallback = " ".join(default.split())
    for file in found:
        captions = file.annotation.captions if isinstance(file, Footage) else ()
        if not captions and fallback:
            captions = (fallback,)
        if isinstance(file, Reject):
            rejects.append(file)
        elif (reject := _refused(file)) is not None:
            rejects.append(reject)
        elif any(captions) or missing == "empty":
            annotation = replace(file.annotation, captions=captions or ("",))
            footage.append(replace(file, annotation=annotation.with_prefix(prefix)))
        elif missing == "skip":
            rejects.append(Reject(file.name, "no caption", bad=False, kind="no caption"))
        else:
            without.append(file)
    if without:
        name, blank = without[0].name, without[0].annotation.captions == ("",)
        there = ", whose caption is blank" if blank else ""
        instead = "" if fallback else "give caption.default=TEXT (for files without a caption), "
        raise ValueError(
            f"{len(without)} of {len(found)} files have no caption (first: {name}{there}); write it into "
            f"{Path(name).with_suffix('.txt')} or metadata.jsonl, let a model write them with caption.py, or {instead}"
            f"{'give ' if fallback else ''}caption.missing=skip or caption.missing=empty{_unread(tally)}"
        )
    return footage, rejects


def _refused(file: Footage) -> Reject | None:
    """The reject of a file that is no footage, or cannot be decoded, by its name or place; None for any other."""
    if file.member is None and not file.path.is_file():
        return Reject(file.name, "is not a file (a folder, a pipe or a broken link)", kind="not a file")
    if f".{file.extension}" in UNDECODABLE:
        stem = Path(file.name).stem
        return Reject(
            file.name,
            f"is .{file.extension}, which Pillow and ffmpeg cannot decode here; save it as {stem}.jpg or {stem}.png",
            kind="cannot be decoded",
        )
    if not any(file.annotation.captions) and file.member is None and _is_mask(file.path):
        return Reject(file.name, f"is the mask of {file.path.name}, not footage", bad=False, kind="mask")
    return None


# ------------------------------------------------------------------------------------------------- folders


def _in_folder(source: Path, tally: Tally, out: Path | None) -> Iterator[Footage | Reject]:
    """Every video and image below `source` by its extension, sorted; then those in its tars."""
    tree = read_tree(source, tally, out)
    annotations = read_tables(source, is_footage, tally)
    for path in tree.footage:
        annotation, text = annotations.get(path, Annotation()), tree.caption_file(path)
        if text is not None and not any(annotation.captions):
            tree.use(text)
            own = read_caption_file(text)
            annotation = replace(annotation, captions=own if any(own) else annotation.captions or own)
        yield Footage(path, below(path, source), annotation)
    tree.count_texts()
    for tar in tree.tars:
        yield from read_tar(tar, f"{below(tar, source)}/", tally)


def _is_mask(path: Path) -> bool:
    """True for a file in masks/ whose video or image lies beside masks/ (see Footage.mask)."""
    siblings = path.parent.parent.glob(f"{glob.escape(path.stem)}.*")
    return path.parent.name == MASKS and any(is_footage(other) for other in siblings)


# ---------------------------------------------------------------------------------------------------- tars


def _local(source: str | Path) -> Path | None:
    """The file or folder that `source` names; None if it is a pattern or a URL."""
    if isinstance(source, str) and "://" in source:
        return None
    path = Path(source)
    if path.exists():
        return path
    if any(sign in str(source) for sign in "*?[{"):
        return None
    raise ValueError(f"source={source} does not exist; give a folder, a tar, a pattern or a URL")


def _tars(source: str, downloads: Path | None) -> list[Path]:
    """Local paths of every tar that a pattern or a URL names; remote ones are downloaded."""
    names = list(braceexpand(source))
    if "://" not in source:
        found = [path for name in names for path in _glob(name)]
        if not found:
            raise ValueError(f"source={source} matches no file; correct the pattern")
        return found
    assert downloads is not None, "remote tars need a download folder"
    if any(sign in source for sign in "*[") or ("?" in source and not source.startswith("http")):
        names = [name for pattern in names for name in _remote_glob(pattern)]
    return [_download(name, downloads / f"{place:06d}" / _last(name)) for place, name in enumerate(names)]


def _glob(pattern: str) -> list[Path]:
    path = Path(pattern)
    anchor = Path(path.anchor) if path.is_absolute() else Path()
    return sorted(anchor.glob(str(path.relative_to(anchor))))


def _remote_glob(pattern: str) -> list[str]:
    with reaching(pattern):
        system, path = fsspec.core.url_to_fs(pattern)
        found = sorted(system.unstrip_protocol(name) for name in system.glob(path))
    if not found:
        raise ValueError(f"source={pattern} matches nothing; correct the pattern")
    return found


def _last(url: str) -> str:
    return Path(urlsplit(url).path).name or "tar"


def _download(url: str, target: Path) -> Path:
    """Copy a remote file to `target`. ValueError if it cannot be read completely."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with reaching(url), open_url(url) as remote, target.open("wb") as file:
        shutil.copyfileobj(remote, file, 1 << 20)
    return target
