"""WebDataset tars as footage: a sample is adjacent members of one name, with a video or image, captions, and the rest.

A member's key is its name without the last extension, so names may hold dots. NAME.EXTENSION.txt belongs to
NAME.EXTENSION, as beside files of a folder.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

from wantrain.data.footage import captions
from wantrain.data.footage.probe import Footage
from wantrain.data.footage.tally import Tally
from wantrain.data.rejects import FOOTAGE, IMAGES, UNDECODABLE, VIDEOS, Reject

#: Members that hold the annotation of a sample.
ANNOTATIONS = ("txt", "json")


def read_tar(path: Path, prefix: str, tally: Tally) -> Iterator[Footage | Reject]:
    """The videos and images of a tar, named `prefix`NAME; ValueError if it is damaged or not a tar.

    Every other member is counted in `tally`.
    """
    empty = True
    for stem, members in _samples(path, prefix, tally):
        files = {suffix: place for suffix, place in members.items() if f".{suffix}" in FOOTAGE}
        # Some datasets store a still beside each video; it is not footage of its own.
        usable = [suffix for suffix in files if f".{suffix}" not in UNDECODABLE]
        main = next((suffix for suffix in usable if f".{suffix}" in VIDEOS), next(iter(usable or files), None))
        _count_others(stem, members, main, prefix, tally)
        if main is None:
            continue
        empty = False
        texts = [_slice(path, members[suffix]) if suffix in members else None for suffix in ANNOTATIONS]
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
    else:
        tally.read["tars"] += 1


def _count_others(stem: str, members: dict[str, tuple[int, int]], main: str | None, prefix: str, tally: Tally) -> None:
    """Count the members of a sample that are no footage."""
    for suffix in members:
        if f".{suffix}" in FOOTAGE:
            continue
        name = f"{prefix}{stem}.{suffix}".rstrip(".")
        if main is None:
            tally.ignore("tar members without a video or image", name)
        elif suffix in ANNOTATIONS:
            tally.read["caption files in tars"] += 1
        else:
            tally.ignore(f"tar members of extension .{suffix}" if suffix else "tar members without an extension", name)


def _samples(path: Path, prefix: str, tally: Tally) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """(name without suffix, {suffix: (offset, size)}) of adjacent members of one key."""
    end, stem, members = 0, "", dict[str, tuple[int, int]]()
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                end = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                below, _, base = info.name.rpartition("/")
                if not info.isreg() or base.startswith("."):
                    if not info.isdir():
                        kind = "hidden tar members" if info.isreg() else "tar members that are no files"
                        tally.ignore(kind, f"{prefix}{info.name}")
                    continue
                key, suffix = _split(base)
                own = f"{below}/{key}" if below or info.name.startswith("/") else key
                if own != stem or suffix in members:
                    if members:
                        yield stem, members
                    stem, members = own, {}
                members[suffix] = info.offset_data, info.size
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    except tarfile.TarError as error:
        raise ValueError(
            f"{path} is not a tar, is compressed, or is damaged ({error}); unpack or replace it"
        ) from error
    if end + tarfile.BLOCKSIZE > size:  # no end block: Python reads a truncated tar as a shorter one
        raise ValueError(f"{path} is cut short ({size} bytes); copy it again")
    if members:
        yield stem, members


def _split(base: str) -> tuple[str, str]:
    """A member's key and extension (in lower case, without the dot)."""
    key, _, suffix = base.rpartition(".")
    if not key:
        return base, ""
    suffix, inner = suffix.lower(), Path(key)
    if suffix in ANNOTATIONS and inner.suffix.lower() in VIDEOS | IMAGES:
        key = inner.stem
    return key, suffix


def _slice(path: Path, place: tuple[int, int]) -> bytes:
    with path.open("rb") as file:
        file.seek(place[0])
        return file.read(place[1])
