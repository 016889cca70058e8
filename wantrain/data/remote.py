"""Folders of shards, local or remote. Remote shards are read through a cache on disk, each file when it is needed.

A fetched file is used only if it has the size and hash in its manifest. The processes of a machine share one cache.
One process fetches a file, under a lock and a temporary name, and renames it. Readers hold a shared lock on the file,
so that it is not removed while it is read. The locks are kernel locks, which end with their process. A run foresees
which shards its next steps read, and they are fetched ahead (fetch_ahead.py).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import fsspec

from wantrain.data.fetch_ahead import FetchAhead
from wantrain.data.mmap import map_file
from wantrain.data.shards import MANIFEST, check_shards, files_of
from wantrain.util import distributed
from wantrain.util.console import say
from wantrain.util.files import write_atomically
from wantrain.util.restarts import Transient

#: Default cache folder (data.cache).
CACHE = "~/.cache/wantrain/shards"
#: Seconds that a server may take to answer, and that a full cache may take to have room.
TIMEOUT = 60.0
#: Attempts to fetch a file whose content differs, or that is not there; attempts to reach its server.
TRIES, REACHING = 4, 9
#: Seconds before the second attempt, doubled before each further one, and the longest of them.
PAUSE, LONGEST_PAUSE = 1.0, 30.0
#: Bytes per second below which a transfer counts as broken off, over TIMEOUT seconds.
SLOWEST = 1 << 14
#: The share of the cache that files may take which are fetched ahead, of all processes of a machine.
AHEAD = 0.5
#: Local shards of up to this many bytes in total are hashed when they are opened; of more only the sizes are checked.
HASH_LIMIT = 2 << 30
#: Largest size of a manifest, in bytes.
MANIFEST_LIMIT = 256 << 20


class Shards(Protocol):
    """A finished folder of shards. `folder` is the local folder of its manifest and small files."""

    folder: Path

    def check(self, manifest: Mapping[str, Any]) -> None:
        """Raise ValueError if a file differs from the manifest, as far as can be checked before it is read."""

    def read(self, name: str, start: int, stop: int) -> memoryview:
        """Bytes `start` to `stop` of a shard."""

    def foresee(self, names: Iterable[str]) -> bool:
        """These shards will be read next, in this order; True if it helps to know of more."""

    def traffic(self) -> Traffic | None:
        """What was fetched so far; None for shards on a disk."""


@dataclass(frozen=True)
class Traffic:
    """What came from an address since it was opened: bytes, and the seconds that reading waited for them."""

    url: str
    fetched: int
    waited: float


def open_shards(place: str | Path, *, cache: str | Path, cache_gb: float) -> Shards:
    """The shards at a local path, or at a URL (http://, s3://, or another that fsspec knows) through `cache`."""
    if "://" in str(place):
        shards = RemoteShards(str(place), Cache(Path(cache).expanduser(), cache_gb))
        shards.say_if_too_large()
        return shards
    return LocalShards(Path(place).expanduser())


class LocalShards:
    """Shards in a local folder, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._maps: dict[str, memoryview] = {}

    def check(self, manifest: Mapping[str, Any]) -> None:
        """Compare sizes, and also hashes if the files have at most `HASH_LIMIT` bytes in total."""
        total = sum(file["bytes"] for file in files_of(manifest))
        check_shards(self.folder, manifest, hashes=total <= HASH_LIMIT)

    def read(self, name: str, start: int, stop: int) -> memoryview:
        """Bytes `start` to `stop` of a shard, as a view of the mapping."""
        if name not in self._maps:
            self._maps[name] = map_file(self.folder / name)
        return self._maps[name][start:stop]

    def foresee(self, names: Iterable[str]) -> bool:
        """False: nothing has to be fetched."""
        return False

    def traffic(self) -> None:
        """None: nothing is fetched."""


class RemoteShards:
    """Shards at a URL: the manifest is fetched at every start, all other files are cached."""

    def __init__(self, url: str, cache: Cache) -> None:
        self.url, self.cache, self.waited = url.rstrip("/"), cache, 0.0
        self._ahead: FetchAhead | None = None
        with reaching(f"{self.url}/{MANIFEST}"), open_url(f"{self.url}/{MANIFEST}") as remote:
            content = remote.read(MANIFEST_LIMIT + 1)
        if len(content) > MANIFEST_LIMIT:
            raise ValueError(
                f"{self.url}/{MANIFEST} is longer than {MANIFEST_LIMIT >> 20} MiB, so it is not a manifest; give "
                f"{cache.keys}shards= the address of a folder of shards"
            )
        try:
            manifest = json.loads(content)
            self.files = _files_by_name(manifest)
            needed = [file["name"] for file in manifest.get("files", [])]
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.url}/{MANIFEST} is not a manifest ({type(error).__name__}: {error}); give {cache.keys}shards= "
                "the address of a folder of shards"
            ) from error
        self.folder = cache.folder / hashlib.sha256(content).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        cache.write(self.folder / MANIFEST, content.decode())
        for name in needed:
            os.close(self._open(name))

    def say_if_too_large(self) -> None:
        """Say so if the shards do not fit into the cache together."""
        total, limit = sum(file["bytes"] for file in self.files.values()), self.cache.limit
        if total > limit:
            say(
                f"{self.url} has {total / 1e9:.1f} GB, more than data.cache_gb={limit / 1e9:g}: shards will be "
                "fetched repeatedly; with a larger cache each is fetched once"
            )

    def check(self, manifest: Mapping[str, Any]) -> None:
        """Checks nothing: each file is checked when it is fetched."""

    def read(self, name: str, start: int, stop: int) -> memoryview:
        """Bytes `start` to `stop` of a shard, which is fetched if it is not in the cache."""
        began, content = time.perf_counter(), bytearray(stop - start)
        handle = self.open(name)
        self.waited += time.perf_counter() - began
        try:
            return memoryview(content)[: os.preadv(handle, [content], start)]
        finally:
            os.close(handle)

    def open(self, name: str) -> int:
        """An open handle of a shard, which is fetched if it is not in the cache, and kept there until it is closed."""
        handle = None if self._ahead is None else self._ahead.arrived(name)
        if handle is None:
            return self._open(name)
        os.utime(handle)  # marks the time of the last read
        return handle

    def foresee(self, names: Iterable[str]) -> bool:
        """Fetch these shards ahead, in this order; True if there is room for more."""
        if self._ahead is None:
            url, folder, files, cache = self.url, self.folder, self.files, self.cache

            def fetch(name: str) -> int:
                return _open_file(cache, url, folder, files[name])

            sizes = {name: int(file["bytes"]) for name, file in files.items()}
            self._ahead = FetchAhead(fetch, sizes, cache.room_ahead)
        return self._ahead.foresee(names)

    def traffic(self) -> Traffic:
        """What this process has fetched so far."""
        return Traffic(self.url, self.cache.fetched, self.waited)

    def _open(self, name: str) -> int:
        return _open_file(self.cache, self.url, self.folder, self.files[name])


def _open_file(cache: Cache, url: str, folder: Path, file: Mapping[str, Any]) -> int:
    """An open handle of a file of a manifest, which is fetched if it is not in the cache."""
    name = file["name"]
    return cache.open(f"{url}/{name}", folder / name, size=file["bytes"], sha256=file["sha256"])


class Cache:
    """A folder of fetched files, shared by the processes of a machine, of at most `gb` * 10^9 bytes.

    Removes the least recently read tars when room is needed, but none that is being read or fetched. `keys` is what the
    command's keys `cache` and `cache_gb` begin with.
    """

    def __init__(self, folder: Path, gb: float, *, keys: str = "data.") -> None:
        if not gb > 0:
            raise ValueError(f"{keys}cache_gb={gb} must be above 0: the size of the cache in 10^9 bytes")
        self.folder, self.limit, self.keys, self.fetched = folder, int(gb * 1e9), keys, 0
        self.room_ahead = int(self.limit * AHEAD / distributed.local_world_size())
        self._counting = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{keys}cache={folder} cannot be made ({error.strerror}); give another folder") from error

    def open(self, url: str, path: Path, *, size: int, sha256: str) -> int:
        """An open file handle for reading; fetches the file if needed, and keeps it until the handle is closed."""
        handle = _open_shared(path)
        if handle is not None:
            os.utime(handle)  # marks the time of the last read
            return handle
        with _exclusive(path.with_name(f".{path.name}.lock")):
            handle = _open_shared(path)
            return self._fetch(url, path, size, sha256) if handle is None else handle

    def write(self, path: Path, text: str) -> None:
        """Store a small text file in the cache."""
        with _exclusive(
            self.folder / ".lock"
        ):  # else `_evict` could take the temporary file for that of a killed fetch
            write_atomically(path, text)

    def _fetch(self, url: str, path: Path, size: int, sha256: str) -> int:
        partial = path.with_name(f".{path.name}.tmp")
        handle = self._reserve(partial, size)
        try:
            _copy_at_last(url, handle, size, sha256)
            with self._counting:
                self.fetched += size
            os.fsync(handle)
            with _exclusive(self.folder / ".lock"):  # else `_evict` could miss the file while it counts
                partial.rename(path)
        except BaseException:
            os.close(handle)
            partial.unlink(missing_ok=True)
            raise
        return handle

    def _reserve(self, partial: Path, size: int) -> int:
        """Make room for a file and create it in its final size; its handle. ValueError if there is no room."""
        if size > self.limit:
            raise ValueError(
                f"{self.keys}cache_gb={self.limit / 1e9:g} has no room for {partial.name[1:-4]} of {size / 1e9:.2f} "
                "GB; raise it, best to the size of all shards together"
            )
        deadline = time.monotonic() + TIMEOUT
        while True:
            with _exclusive(self.folder / ".lock"):
                partial.unlink(missing_ok=True)  # left by a killed process: we hold the lock of this file's name
                missing = self._evict(size)
                if missing <= 0:
                    handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
                    fcntl.flock(handle, fcntl.LOCK_SH)
                    os.truncate(handle, size)
                    return handle
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{self.keys}cache={self.folder} is full of files that processes are reading or fetching; give "
                    f"{self.keys}cache_gb={(self.limit + missing) / 1e9:.2f} or more"
                )
            time.sleep(0.05)

    def _evict(self, size: int) -> int:
        """Remove the least recently read files until there is room for `size` bytes; the bytes still missing."""
        files = []
        for path in self.folder.rglob("*"):
            with suppress(FileNotFoundError):  # it has just been renamed
                files.append((path.stat(), path))
        missing = sum(stat.st_size for stat, path in files if not path.is_dir()) + size - self.limit
        for stat, path in sorted(files, key=lambda item: item[0].st_mtime_ns):
            if missing <= 0:
                break
            if path.suffix in {".tar", ".tmp"} and _remove_unread(path):
                missing -= stat.st_size
        return missing


def _files_by_name(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A manifest's rows about its files, by name. ValueError for a name that leads out of the folder."""
    files = {file["name"]: file for file in files_of(manifest) if {"bytes", "sha256"} <= file.keys()}
    for name in files:
        if Path(name).name != name or name.startswith(".") or name == MANIFEST:
            raise ValueError(f"it names the file {name!r}, which cannot be the name of a shard")
    return files


def open_url(url: str) -> BinaryIO:
    """Open the file at a URL for reading. Raises whatever the driver raises."""
    # fsspec's http driver needs another package; the standard library does not.
    if url.startswith(("http://", "https://")):
        return urllib.request.urlopen(url, timeout=TIMEOUT)  # type: ignore[no-any-return]
    return fsspec.open(url, "rb").open()  # type: ignore[no-any-return]


@contextmanager
def reaching(url: str, what: str = "read") -> Iterator[None]:
    """Turn any error of reading or writing a URL into one ValueError; Transient where it may pass."""
    try:
        yield
    except ImportError as error:
        scheme = url.partition(":")[0]
        raise ValueError(
            f"{url}: {scheme}:// needs a driver that is not installed ({error}); pip install 'wantrain[remote]'"
        ) from error
    except Exception as error:  # every driver has classes of its own
        kind = Transient if _may_pass(error) else ValueError
        raise kind(f"{url} cannot be {what} ({type(error).__name__}: {error})") from error


def _copy_at_last(url: str, handle: int, size: int, sha256: str) -> None:
    """`_copy`, again where it fails: a few times, for minutes where that may pass. ValueError with the last failure."""
    for attempt in range(max(TRIES, REACHING)):
        try:
            _copy(url, handle, size, sha256)
            return
        except ValueError as error:
            if attempt + 1 >= (REACHING if isinstance(error, Transient) else TRIES):
                raise type(error)(f"{error}; {attempt + 1} attempts failed") from error
            time.sleep(min(LONGEST_PAUSE, PAUSE * 2**attempt))


def _may_pass(error: BaseException) -> bool:
    """True for an error of a network or a server that may be over in some minutes."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500 or error.code in (408, 429)
    return isinstance(error, OSError) and not isinstance(error, FileNotFoundError | PermissionError)


def _copy(url: str, handle: int, size: int, sha256: str) -> None:
    """Write the content of a URL into a file from its start. ValueError if size or hash differ, or it hardly comes."""
    digest, done = hashlib.sha256(), 0
    with reaching(url), open_url(url) as remote, os.fdopen(os.dup(handle), "wb") as file:
        file.seek(0)
        # Of HTTP what is there, so that a server that sends a byte now and then is noticed.
        read = getattr(remote, "read1", remote.read)
        until, before = time.monotonic() + TIMEOUT, 0
        while done <= size and (block := read(1 << 20)):
            done += len(block)
            digest.update(block)
            if done <= size:
                file.write(block)
            if time.monotonic() > until:
                if done - before < SLOWEST * TIMEOUT:
                    raise TimeoutError(f"{done - before} bytes in {TIMEOUT:g} s")
                until, before = time.monotonic() + TIMEOUT, done
    if done != size or digest.hexdigest() != sha256:
        got = f"more than {size}" if done > size else f"{done}"
        raise ValueError(f"{url} differs from its manifest: {got} bytes instead of {size}, or another hash")


def _open_shared(path: Path) -> int | None:
    """Open a file with a shared lock on it; None if it does not exist, or was removed meanwhile."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(handle, fcntl.LOCK_SH)
    if os.fstat(handle).st_nlink:  # 0 if it was removed while we waited
        return handle
    os.close(handle)
    return None


def _remove_unread(path: Path) -> bool:
    """Remove a file unless a process reads or fetches it; True if it is removed."""
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
def _exclusive(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, among processes and threads."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
