"""Sources of footage: folders of files and WebDataset tars, local or at a URL; each file with its annotation.

Every file with the extension of a video or image is returned as Footage, or as a Reject with its reason.
"""

from __future__ import annotations

import glob
import os
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
from braceexpand import braceexpand

from wantrain.data.footage import captions
from wantrain.data.footage.captions import Annotation
from wantrain.data.footage.probe import MASKS, Footage
from wantrain.data.rejects import IMAGES, VIDEOS, Reject
from wantrain.data.remote import open_url, reaching


def find_footage(
    source: str | Path,
    *,
    caption_missing: str = "error",
    caption_prefix: str = "",
    caption_default: str = "",
    downloads: Path | None = None,
) -> tuple[list[Footage], list[Reject]]:
    """All videos and images of `source`, sorted, with captions; and those that are rejected.

    `source` is a folder, or WebDataset tars: a file, a pattern (`data/*.tar`, `data/{000..012}.tar`) or a URL that
    fsspec knows; braces work in URLs too. Remote tars are copied into `downloads` first. In a folder a caption comes
    from metadata.jsonl or .csv or from NAME.txt beside the file, in a tar from the sample's .json or .txt. Without
    one it is `caption_default`; without that, `caption_missing` decides: "error", "skip" or "empty".

    ValueError if nothing is found, a caption is missing under "error", a table names an absent file, or a tar is
    damaged.
    """
    found: list[Footage | Reject] = []
    where = _local(source)
    if where is not None and where.is_dir():
        found.extend(_in_folder(where))
        tars = sorted(path for path in where.rglob("*.tar") if path.is_file() and not _hidden(path, where))
        for tar in tars:
            found.extend(_in_tar(tar, f"{_name(tar, where)}/"))
        if not found:
            raise ValueError(
                f"source={source} holds no videos or images ({' '.join(sorted(VIDEOS | IMAGES))}); give the folder "
                "that holds them"
            )
    else:
        paths = [where] if where is not None else _tars(str(source), downloads)
        for path in paths:
            found.extend(_in_tar(path, f"{path.name}/" if len(paths) > 1 else ""))
        if not found:
            raise ValueError(
                f"source={source}: no sample holds a video or an image ({' '.join(sorted(VIDEOS | IMAGES))}); give "
                "tars that do"
            )
    return _select(found, caption_missing, caption_prefix, caption_default)


def _select(
    found: list[Footage | Reject], missing: str, prefix: str, default: str
) -> tuple[list[Footage], list[Reject]]:
    """Split into footage with its final captions, and rejects."""
    footage, rejects, without = [], [], []
    fallback = " ".join(default.split())
    for file in found:
        if isinstance(file, Reject):
            rejects.append(file)
        elif file.member is None and not file.path.is_file():
            reason = "is not a file (a folder, a pipe or a broken link)"
            rejects.append(Reject(file.name, reason, kind="not a file"))
        elif not file.caption and file.member is None and _is_mask(file.path):
            rejects.append(Reject(file.name, f"is the mask of {file.path.name}, not footage", bad=False, kind="mask"))
        elif file.caption or fallback or missing == "empty":
            annotation = file.annotation if file.caption else replace(file.annotation, captions=(fallback,))
            footage.append(replace(file, annotation=annotation.with_prefix(prefix)))
        elif missing == "skip":
            rejects.append(Reject(file.name, "no caption", bad=False, kind="no caption"))
        else:
            without.append(file.name)
    if without:
        raise ValueError(
            f"{len(without)} of {len(found)} files have no caption (first: {without[0]}); write it into "
            f"{Path(without[0]).with_suffix('.txt')} or metadata.jsonl, or give caption.default=TEXT, "
            "caption.missing=skip or caption.missing=empty"
        )
    return footage, rejects


# ------------------------------------------------------------------------------------------------- folders


def _in_folder(source: Path) -> Iterator[Footage]:
    """Every video and image below `source` by its extension, sorted, without hidden files and folders."""
    annotations = captions.read_tables(source, _is_footage)
    for path in _find_files(source):
        annotation = annotations.get(path, Annotation())
        if not annotation.captions:
            annotation = replace(annotation, captions=captions.read_sidecar(path).captions)
        yield Footage(path, _name(path, source), annotation)


def _find_files(source: Path) -> list[Path]:
    found: list[Path] = []
    for folder, folders, names in os.walk(source):
        folders[:] = [name for name in folders if not name.startswith(".")]
        # A folder with such a name is listed too, so that it is rejected by name instead of ignored.
        paths = [Path(folder, name) for name in [*names, *folders] if not name.startswith(".")]
        found.extend(path for path in paths if _is_footage(path))
    return sorted(found)


def _is_footage(path: Path) -> bool:
    return path.suffix.lower() in VIDEOS | IMAGES


def _hidden(path: Path, source: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(source).parts)


def _name(path: Path, source: Path) -> str:
    """The path below `source` with forward slashes; bytes that are not UTF-8 as escapes."""
    return os.fsencode(path.relative_to(source).as_posix()).decode("utf-8", "backslashreplace")


def _is_mask(path: Path) -> bool:
    """True for a file in masks/ whose video or image lies beside masks/ (see Footage.mask)."""
    siblings = path.parent.parent.glob(f"{glob.escape(path.stem)}.*")
    return path.parent.name == MASKS and any(_is_footage(other) for other in siblings)


# ---------------------------------------------------------------------------------------------------- tars


def _in_tar(path: Path, prefix: str) -> Iterator[Footage | Reject]:
    """The videos and images of a tar, named `prefix`NAME; ValueError if it is damaged or not a tar."""
    empty = True
    for stem, members in _samples(path):
        files = {suffix: place for suffix, place in members.items() if f".{suffix}" in VIDEOS | IMAGES}
        # Some datasets store a still beside each video; it is not footage of its own.
        main = next((suffix for suffix in files if f".{suffix}" in VIDEOS), next(iter(files), None))
        if main is None:
            continue
        empty = False
        texts = [_slice(path, members[suffix]) if suffix in members else None for suffix in ("txt", "json")]
        for suffix, place in files.items():
            name = f"{prefix}{stem}.{suffix}"
            if suffix != main:
                yield Reject(name, f"stands beside {stem}.{main} in one sample", bad=False, kind="second of a sample")
                continue
            try:
                yield Footage(path, name, captions.from_members(*texts), place)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, {stem}: {error}; correct its .json or .txt") from error
    if empty:
        name = prefix.rstrip("/") or path.name
        yield Reject(name, "no sample of it holds a video or an image", bad=False, kind="empty tar")


def _samples(path: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """(name without suffix, {suffix: (offset, size)}) of adjacent members of one name, as WebDataset groups them."""
    size, end, stem, members = path.stat().st_size, 0, "", dict[str, tuple[int, int]]()
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                end = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if not info.isreg():
                    continue
                base = info.name.rpartition("/")[2]
                below, suffix = info.name[: len(info.name) - len(base)], base.partition(".")[2].lower()
                own = below + base.partition(".")[0]
                if own != stem or suffix in members:
                    if members:
                        yield stem, members
                    stem, members = own, {}
                members[suffix] = info.offset_data, info.size
    except tarfile.TarError as error:
        raise ValueError(
            f"{path} is not a tar, is compressed, or is damaged ({error}); unpack or replace it"
        ) from error
    if end + tarfile.BLOCKSIZE > size:  # no end block: Python reads a truncated tar as a shorter one
        raise ValueError(f"{path} is cut short ({size} bytes); copy it again")
    if members:
        yield stem, members


def _slice(path: Path, place: tuple[int, int]) -> bytes:
    with path.open("rb") as file:
        file.seek(place[0])
        return file.read(place[1])


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
