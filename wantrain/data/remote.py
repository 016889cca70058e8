"""Folders of shards, here or elsewhere. Those elsewhere are read through a cache on disk, a file when it is asked for.

A file that came is of the size and hash that its manifest says, or it is not used. The processes of a machine share
one cache: one fetches, under a lock, beside the file's name, and renames; who reads holds a shared lock on the file
itself, so that what is read is never removed. Locks are the kernel's and end with their process, however that ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import fsspec

from wantrain.data.mmap import map_file
from wantrain.data.shards import MANIFEST, check_shards, files_of
from wantrain.util.console import say
from wantrain.util.files import write_atomically

#: Where files from elsewhere are kept, unless data.cache says so.
CACHE = "~/.cache/wantrain/shards"
#: Seconds that an address may take to say something, and that a full cache may take to have room again.
TIMEOUT = 60.0
#: How often a file is asked for before it is given up, and the seconds before the second time (then twice that).
TRIES, PAUSE = 3, 1.0
#: Shards here of up to this many bytes in all are hashed when they are opened, more only measured (60 GB take minutes).
HASH_LIMIT = 2 << 30
#: A manifest is not longer.
MANIFEST_LIMIT = 256 << 20


class Shards(Protocol):
    """A finished folder of shards. `folder` is where, on this machine, its manifest and small files lie."""

    folder: Path

    def check(self, manifest: Mapping[str, Any]) -> None:
        """Raise ValueError if a file is not what the manifest says, as far as that can be seen before it is read."""

    def read(self, name: str, start: int, stop: int) -> memoryview:
        """Bytes `start` to `stop` of a shard."""


def open_shards(place: str | Path, *, cache: str | Path, cache_gb: float) -> Shards:
    """The shards at a path, or at an address (http://, s3://, whatever fsspec knows) through `cache`."""
    if "://" in str(place):
        return RemoteShards(str(place), Cache(Path(cache).expanduser(), cache_gb))
    return LocalShards(Path(place).expanduser())


class LocalShards:
    """Shards in a folder of this machine, mapped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._maps: dict[str, memoryview] = {}

    def check(self, manifest: Mapping[str, Any]) -> None:
        """Compare sizes, and where they are not too many bytes hashes too."""
        total = sum(file["bytes"] for file in files_of(manifest))
        check_shards(self.folder, manifest, hashes=total <= HASH_LIMIT)

    def read(self, name: str, start: int, stop: int) -> memoryview:
        """Bytes `start` to `stop` of a shard, where they are mapped."""
        if name not in self._maps:
            self._maps[name] = map_file(self.folder / name)
        return self._maps[name][start:stop]


class RemoteShards:
    """Shards at an address: the manifest is asked for at every start, all other files are kept in the cache."""

    def __init__(self, url: str, cache: Cache) -> None:
        self.url, self.cache = url.rstrip("/"), cache
        with reaching(f"{self.url}/{MANIFEST}"), open_url(f"{self.url}/{MANIFEST}") as remote:
            content = remote.read(MANIFEST_LIMIT + 1)
        if len(content) > MANIFEST_LIMIT:
            raise ValueError(f"{self.url}/{MANIFEST} is longer than {MANIFEST_LIMIT >> 20} MiB: no manifest is")
        try:
            manifest = json.loads(content)
            self.files = _files_by_name(manifest)
            needed = [file["name"] for file in manifest.get("files", [])]
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{self.url}/{MANIFEST} is no manifest ({type(error).__name__}: {error})") from error
        self.folder = cache.folder / hashlib.sha256(content).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        cache.write(self.folder / MANIFEST, content.decode())
        for name in needed:
            os.close(self._open(name))
        total = sum(file["bytes"] for file in self.files.values())
        if total > cache.limit:
            say(
                f"{self.url} has {total / 1e9:.1f} GB, the cache data.cache_gb={cache.limit / 1e9:g}: shards will be "
                "fetched again and again; with room for all of them each comes once"
            )

    def check(self, manifest: Mapping[str, Any]) -> None:
        """Nothing: each file is checked when it comes."""

    def read(self, name: str, start: int, stop: int) -> memoryview:
        """Bytes `start` to `stop` of a shard, fetched if it is not here."""
        handle, content = self._open(name), bytearray(stop - start)
        try:
            return memoryview(content)[: os.preadv(handle, [content], start)]
        finally:
            os.close(handle)

    def _open(self, name: str) -> int:
        file = self.files[name]
        return self.cache.open(f"{self.url}/{name}", self.folder / name, size=file["bytes"], sha256=file["sha256"])


class Cache:
    """A folder of fetched files that the processes of a machine share, of at most `gb` * 10^9 bytes.

    What was read longest ago goes first, and nothing that is being read or fetched; only tars go.
    """

    def __init__(self, folder: Path, gb: float) -> None:
        if not gb > 0:
            raise ValueError(f"data.cache_gb={gb} must be above 0")
        self.folder, self.limit = folder, int(gb * 1e9)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"data.cache={folder} cannot be made ({error.strerror}); give another folder") from error

    def open(self, url: str, path: Path, *, size: int, sha256: str) -> int:
        """A handle on the file, for reading, fetched if it is not there; it stays until the handle is closed."""
        handle = _open_shared(path)
        if handle is not None:
            os.utime(handle)  # when it was read last
            return handle
        with _alone(path.with_name(f".{path.name}.lock")):
            handle = _open_shared(path)
            return self._fetch(url, path, size, sha256) if handle is None else handle

    def write(self, path: Path, text: str) -> None:
        """Keep a small text in the cache."""
        with _alone(self.folder / ".lock"):  # whoever makes room would take it, half written, for a killed fetch's
            write_atomically(path, text)

    def _fetch(self, url: str, path: Path, size: int, sha256: str) -> int:
        beside = path.with_name(f".{path.name}.tmp")
        handle = self._reserve(beside, size)
        try:
            for attempt in range(TRIES):
                try:
                    _copy(url, handle, size, sha256)
                    break
                except ValueError as error:
                    if attempt == TRIES - 1:
                        raise ValueError(f"{error}; it was asked for {TRIES} times") from error
                    time.sleep(PAUSE * 2**attempt)
            os.fsync(handle)
            with _alone(self.folder / ".lock"):  # whoever counts what is there must not miss it
                beside.rename(path)
        except BaseException:
            os.close(handle)
            beside.unlink(missing_ok=True)
            raise
        return handle

    def _reserve(self, beside: Path, size: int) -> int:
        """A handle on an empty file of its final size, for which there is room. ValueError if there will be none."""
        if size > self.limit:
            raise ValueError(
                f"data.cache_gb={self.limit / 1e9:g} has no room for {beside.name[1:-4]} of {size / 1e9:.2f} GB; make "
                "it larger, best as large as all shards together"
            )
        deadline = time.monotonic() + TIMEOUT
        while True:
            with _alone(self.folder / ".lock"):
                beside.unlink(missing_ok=True)  # of a process that was killed: we hold the lock of this file's name
                missing = self._evict(size)
                if missing <= 0:
                    handle = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
                    fcntl.flock(handle, fcntl.LOCK_SH)
                    os.truncate(handle, size)
                    return handle
            if time.monotonic() > deadline:
                raise ValueError(
                    f"data.cache={self.folder} is full of files that processes are reading or fetching; give "
                    f"data.cache_gb={(self.limit + missing) / 1e9:.2f} or more"
                )
            time.sleep(0.05)

    def _evict(self, size: int) -> int:
        """Remove what was read longest ago until there is room for `size` bytes; how many are still missing."""
        files = []
        for path in self.folder.rglob("*"):
            with suppress(FileNotFoundError):  # it has just been given its name
                files.append((path.stat(), path))
        missing = sum(found.st_size for found, path in files if not path.is_dir()) + size - self.limit
        for found, path in sorted(files, key=lambda item: item[0].st_mtime_ns):
            if missing <= 0:
                break
            if path.suffix in {".tar", ".tmp"} and _remove_unread(path):
                missing -= found.st_size
        return missing


def _files_by_name(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a manifest says about the files beside it. ValueError for a name that leads elsewhere."""
    files = {file["name"]: file for file in files_of(manifest) if {"bytes", "sha256"} <= file.keys()}
    for name in files:
        if Path(name).name != name or name.startswith(".") or name == MANIFEST:
            raise ValueError(f"it names a file {name!r}, which is no shard's name")
    return files


def open_url(url: str) -> BinaryIO:
    """The file at an address, for reading. Any error."""
    # fsspec's driver for http needs a further package; the standard library's does not.
    if url.startswith(("http://", "https://")):
        return urllib.request.urlopen(url, timeout=TIMEOUT)  # type: ignore[no-any-return]
    return fsspec.open(url, "rb").open()  # type: ignore[no-any-return]


@contextmanager
def reaching(url: str) -> Iterator[None]:
    """What an address refuses is one ValueError with its fix."""
    try:
        yield
    except ImportError as error:
        scheme = url.partition(":")[0]
        raise ValueError(
            f"{url}: reading {scheme}:// needs a driver that is not installed ({error}); pip install 'wantrain[remote]'"
        ) from error
    except Exception as error:  # every driver has classes of its own
        raise ValueError(f"{url} cannot be read ({type(error).__name__}: {error})") from error


def _copy(url: str, handle: int, size: int, sha256: str) -> None:
    """Write what is at an address into a file from its start. ValueError if it is not what it should be."""
    digest, done = hashlib.sha256(), 0
    with reaching(url), open_url(url) as remote, os.fdopen(os.dup(handle), "wb") as file:
        file.seek(0)
        while done <= size and (block := remote.read(1 << 20)):
            done += len(block)
            digest.update(block)
            if done <= size:
                file.write(block)
    if done != size or digest.hexdigest() != sha256:
        got = f"more than {size}" if done > size else f"{done}"
        raise ValueError(f"{url} is not what its manifest says ({got} bytes, said are {size}, or another hash)")


def _open_shared(path: Path) -> int | None:
    """A handle with a shared lock on the file of that name; None if there is none (any more)."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(handle, fcntl.LOCK_SH)
    if os.fstat(handle).st_nlink:  # else it was removed while we waited
        return handle
    os.close(handle)
    return None


def _remove_unread(path: Path) -> bool:
    """Remove a file unless somebody reads or fetches it; True if it is gone."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock that one process, and one thread of it, has at a time."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
