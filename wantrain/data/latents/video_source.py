"""The video shards that encode.py reads: in a folder, or at an address, of which each tar is fetched for its files.

Tars at an address come through the cache of remote.py, which checks their hashes and tries again. What is to be encoded
is known from the index of the shards, so a process fetches only the tars that hold files of its own work units.
"""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

from wantrain.data.footage.decode_workers import Decoded, Job
from wantrain.data.footage.video_shards import VideoEntry, read_index, scan_video_shards
from wantrain.data.remote import Cache, RemoteShards
from wantrain.data.shards import read_manifest

#: Tars that are fetched while the files of the one before are decoded, if half of the cache has room for them.
TARS_AHEAD = 2


class VideoSource:
    """Video shards at `place`, a folder or a URL, which is read through a cache of `cache_gb` * 10^9 bytes in `cache`.

    `folder` is the local folder of the manifest. ValueError for a place without finished video shards, and at a URL
    for shards without an index.
    """

    def __init__(self, place: str | Path, *, cache: str | Path, cache_gb: float) -> None:
        self.place, self.folder = str(place), Path(place)
        self.remote: RemoteShards | None = None
        if "://" not in self.place:
            self.manifest = read_manifest(self.folder, "video")
            return
        self.remote = RemoteShards(self.place, Cache(Path(cache).expanduser(), cache_gb, keys=""))
        self.folder = self.remote.folder
        try:
            self.manifest = read_manifest(self.folder, "video")
        except ValueError as error:
            raise ValueError(f"shards={self.place}: {error}") from error
        if not self.manifest.get("files"):
            raise ValueError(
                f"shards={self.place} has no index of its files, which an earlier version did not write; run the "
                "command of shard.py that made the folder again, which adds it, and copy the folder there anew; or "
                "copy the folder to this machine and give its path"
            )

    def entries(self) -> Iterator[VideoEntry]:
        """Every file, in order, without reading videos. ValueError for a tar that is damaged, as far as is seen."""
        if self.remote is None:
            return scan_video_shards(self.folder, self.manifest)
        return read_index(self.folder / self.manifest["files"][0]["name"])

    def tars(self, jobs: Sequence[Job]) -> TarsInUse:
        """The tars of these jobs, each of which names its tar."""
        return TarsInUse(self, jobs)


class TarsInUse:
    """Gives the jobs of decoder processes their tars, and lets go of each after the last of its files.

    Of a tar at an address an open handle is kept, whose path the processes read. It holds no lock, so a full cache may
    remove the tar from its folder meanwhile; its space is then free when the handle is closed.
    """

    def __init__(self, source: VideoSource, jobs: Sequence[Job]) -> None:
        self._source, self._jobs, self._handles = source, jobs, dict[str, int]()
        self._left = Counter(job.request["tar"] for job in jobs)
        self._names, self._ahead = list(self._left), 0
        if source.remote is not None and jobs:
            largest = max(source.remote.files[name]["bytes"] for name in self._names)
            self._ahead = max(0, min(TARS_AHEAD, source.remote.cache.room_ahead // largest - 1))

    def jobs(self) -> Iterator[Job]:
        """The jobs with the path of their tar, which is fetched when the first of them is taken."""
        for job in self._jobs:
            yield Job({**job.request, "tar": self._path(job.request["tar"])})

    def results(self, decoded: Iterator[Decoded]) -> Generator[Decoded]:
        """The same results, each job's clips in order, one without frames ending it."""
        for job in self._jobs:
            for _ in job.request["windows"]:
                if (item := next(decoded, None)) is None:  # the decoders were closed
                    return
                yield item
                if item.frames is None:
                    break
            name = job.request["tar"]
            self._left[name] -= 1
            if not self._left[name] and name in self._handles:
                os.close(self._handles.pop(name))

    def close(self) -> None:
        """Let go of all tars."""
        while self._handles:
            os.close(self._handles.popitem()[1])

    def _path(self, name: str) -> str:
        remote = self._source.remote
        if remote is None:
            return str(self._source.folder / name)
        if name not in self._handles:
            if self._ahead:
                at = self._names.index(name)
                remote.foresee(self._names[at : at + 1 + self._ahead])
            handle = remote.open(name)
            fcntl.flock(handle, fcntl.LOCK_UN)  # else a small cache, full of tars in use, would have no room
            self._handles[name] = handle
        return f"/proc/{os.getpid()}/fd/{self._handles[name]}"
