"""Shards on disk: WebDataset tars of videos or of latents, each folder with a manifest that is written last.

A folder without manifest.json is not finished. Tars are written beside their name and renamed, hold no pickle, and
have the same bytes for the same input. Readers check a shard's hash before they use it, because a tar that was cut
short reads as a shorter epoch without an error.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm
from webdataset import tariterators

from wantrain import world
from wantrain.data.footage import IMAGES, VIDEOS, Footage, Reject
from wantrain.world import file_hash

#: Versions of the two formats: of folders of videos, and of folders of latents.
SCHEMA = 2
LATENT_SCHEMA = 2
MANIFEST = "manifest.json"
REJECTS = "rejects.jsonl"
#: The lists of a manifest that describe files.
FILES = ("shards", "text_shards", "files")
#: What the extension of a mask begins with, which lies beside its video in a tar: KEY.mask.mp4.
MASK = "mask."
MADE_BY = {"video": "shard.py", "latent": "encode.py"}


class TarWriter:
    """One tar, written at `beside` and given its name by `finish`; left without that, it is removed.

    Equal samples give equal bytes. ValueError says what the disk refuses.
    """

    def __init__(self, beside: Path) -> None:
        self.beside, self.samples = beside, 0
        # TarInfo leaves time and owner at zero.
        self._tar = tarfile.open(beside, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.beside.exists():
            with suppress(OSError):  # what is buffered may not fit either
                self._tar.close()
            self.beside.unlink()

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._tar.offset

    def write(self, key: str, members: Mapping[str, bytes]) -> dict[str, tuple[int, int]]:
        """Add one sample, its members by extension; (offset, size) of each one's content."""
        places = {}
        for extension, content in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size = len(content)
            with disk_errors(self.beside):
                self._tar.addfile(info, io.BytesIO(content))
            # The content ends at the last whole block; it began right after the header.
            padded = -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            places[extension] = (self._tar.offset - padded, len(content))
        self.samples += 1
        return places

    def finish(self, final: Path) -> dict[str, Any]:
        """Sync, rename to `final`; returns what a manifest says about the tar."""
        with disk_errors(self.beside):
            self._tar.close()
            world.sync_file(self.beside)
            row = {**describe_file(self.beside), "name": final.name, "samples": self.samples}
            self.beside.replace(final)
        return row


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What the disk refuses is one error for people, with its mend."""
    try:
        yield
    except OSError as error:
        size = path.stat().st_size if path.exists() else 0
        raise ValueError(
            f"{path.parent}: cannot write {path.name.removeprefix('.').removesuffix('.tmp')} ({error.strerror}, after "
            f"{size} bytes); free some space and start the same command again"
        ) from error


class VideoTars:
    """Files of footage gathered into tars of about `shard_bytes`, each named after what is in it.

    A tar that is there already, of `earlier` (the manifest of a finished run) or of one that was killed, is not written
    again; none is written over.
    """

    def __init__(self, out: Path, shard_bytes: int, earlier: Mapping[str, Any] | None) -> None:
        self.out, self.shard_bytes = out, shard_bytes
        self._earlier = {tar["name"]: tar for tar in (earlier or {"shards": []})["shards"]}
        self._samples: list[tuple[Footage, str, bytes]] = []
        self._size = 0
        self._shards: list[dict[str, Any]] = []
        for leftover in out.glob(".video-*.tmp"):
            leftover.unlink()

    def add(self, file: Footage, key: str, about: Mapping[str, Any]) -> None:
        """Add a file, its mask if it has one, and what is said about it."""
        self._samples.append((file, key, to_json(about)))
        self._size += file.size + len(self._samples[-1][2])
        if self._size >= self.shard_bytes:
            self._end()

    def finish(self) -> list[dict[str, Any]]:
        """What a manifest says about each tar."""
        if self._samples:
            self._end()
        return self._shards

    def remove_others(self) -> None:
        """Remove tars that are none of these."""
        mine = {tar["name"] for tar in self._shards}
        for path in self.out.glob("video-*.tar"):
            if path.name not in mine:
                path.unlink()

    def _end(self) -> None:
        content = "\n".join(f"{key}.{file.extension} {about.decode()}" for file, key, about in self._samples)
        path = self.out / f"video-{hashlib.sha256(content.encode()).hexdigest()[:16]}.tar"
        told = self._earlier.get(path.name)
        if told is not None and path.is_file() and path.stat().st_size == told["bytes"]:
            self._shards.append(told)
        elif told is None and path.is_file():  # of a run that was killed: a tar has its name only when it is whole
            self._shards.append({**describe_file(path), "samples": len(self._samples)})
        else:
            with TarWriter(path.with_name(f".{path.name}.tmp")) as tar:
                for file, key, about in self._samples:
                    mask = {} if file.mask is None else {MASK + file.mask.suffix.lower()[1:]: file.mask.read_bytes()}
                    tar.write(key, {file.extension: file.read(), **mask, "json": about})
                self._shards.append(tar.finish(path))
        self._samples, self._size = [], 0


@dataclass(frozen=True)
class VideoSample:
    """One file of a video shard: its bytes and what shard.py found out about it."""

    key: str
    extension: str
    content: bytes
    about: dict[str, Any]


def to_json(value: Mapping[str, Any]) -> bytes:
    """A JSON object as bytes, the same for the same value."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True).encode()


def write_rejects(
    out: Path, rejects: list[Reject], total: int, limit: float, unit: str, identities: list[str] | None = None
) -> None:
    """Write rejects.jsonl, say the first; ValueError if the bad ones' share of `total` is above `limit`, or all go.

    `identities` are noted beside, where rejects are known again by them.
    """
    rows = [{"name": reject.name, "reason": reject.reason} for reject in rejects]
    for row, identity in zip(rows, identities or [], strict=False):
        row["identity"] = identity
    text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    with disk_errors(out / REJECTS):
        world.write_atomically(out / REJECTS, text)
    for reject in rejects[:5]:
        world.say(f"rejected {reject.name}: {reject.reason}")
    bad = [reject for reject in rejects if reject.bad]
    if len(bad) > limit * total:
        raise ValueError(
            f"{len(bad)} of {total} {unit}s are bad, more than rejects.limit={limit:g} allows; "
            f"first: {bad[0].name}: {bad[0].reason}. All are in {out / REJECTS}; "
            "mend or remove them, or raise rejects.limit"
        )
    if len(rejects) == total:
        raise ValueError(f"all {total} {unit}s are rejected; the reasons are in {out / REJECTS}")


def claim(
    out: Path, kind: str, settings: Mapping[str, Any], *, same_footage: Callable[[], bool]
) -> dict[str, Any] | None:
    """The manifest of `out`, made with these settings or with other footage; None, and claimed, if it is not finished.

    `same_footage` says if an earlier run had some of the files. ValueError if the folder holds something else, or the
    same kind of shards made with other settings.
    """
    if not (out / MANIFEST).is_file():
        world.claim_folder(out, mark=REJECTS, key="out")
        world.write_atomically(out / REJECTS, "")  # from here on the folder is ours, also after a kill
        return None
    if load_manifest(out).get("kind") != kind:
        raise ValueError(f"out={out} holds shards of another kind; give another out=")
    manifest = read_manifest(out, kind)
    differing = [key for key in settings if manifest["settings"].get(key) != settings[key]]
    if differing and not (differing == ["footage"] and same_footage()):
        changes = "; ".join(_change(key, manifest["settings"].get(key), settings[key]) for key in differing)
        raise ValueError(f"out={out} holds {kind} shards made otherwise ({changes}); give another out=, or remove it")
    return manifest


def is_whole(out: Path, manifest: Mapping[str, Any]) -> bool:
    """True if all files of a manifest are there in full size."""
    return all(_has_size(out, file) for file in files_of(manifest))


def _has_size(out: Path, file: Mapping[str, Any]) -> bool:
    path = out / file["name"]
    return path.is_file() and path.stat().st_size == file["bytes"]


def _change(key: str, before: Any, now: Any) -> str:
    """One difference between settings, for people: hashes are not shown."""
    if key in {"footage", "shards"}:
        return "footage: other files altogether" if key == "footage" else "shards: other video shards"
    return f"{key}: {before} -> {now}"


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """The manifest of a finished folder of `kind` ("video" or "latent"); ValueError says which verb to run."""
    verb = MADE_BY[kind]
    if not (folder / MANIFEST).is_file():
        what = "is not finished" if (folder / REJECTS).exists() else "holds no shards"
        raise ValueError(f"{folder} {what} (no {MANIFEST}); run python {verb} out={folder} ... first")
    manifest = load_manifest(folder)
    if manifest.get("kind") != kind:
        holds = manifest.get("kind")
        raise ValueError(f"{folder} holds {holds} shards, but {kind} shards are needed: run python {verb}")
    reads = {"video": SCHEMA, "latent": LATENT_SCHEMA}[kind]
    if manifest.get("schema") != reads:
        raise ValueError(
            f"{folder} has schema {manifest.get('schema')}, this version reads {reads}; remove the folder and make it "
            f"again: python {verb} out={folder} ..."
        )
    return manifest


def load_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / MANIFEST} is damaged ({error}); make the shards again") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{folder / MANIFEST} is no JSON object; make the shards again")
    return manifest


def describe_file(path: Path) -> dict[str, Any]:
    """What a manifest says about a file beside it: name, bytes, sha256."""
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": file_hash(path)}


def check_shards(folder: Path, manifest: Mapping[str, Any], *, hashes: bool = True) -> None:
    """Raise ValueError if a file is absent or not what was written: by size, and by hash too if `hashes`."""
    for file in files_of(manifest):
        path = folder / file["name"]
        size = path.stat().st_size if path.is_file() else None
        if size != file["bytes"] or (hashes and file_hash(path) != file["sha256"]):
            state = "is missing" if size is None else f"is damaged ({size} bytes, written were {file['bytes']})"
            raise ValueError(f"{path} {state}; restore it, or make the shards again with {MADE_BY[manifest['kind']]}")


def check_folder(folder: Path) -> None:
    """Read every file of a finished folder of either kind and say so; ValueError names all that are damaged."""
    if not (folder / MANIFEST).is_file():
        read_manifest(folder, "latent")  # says what is missing
    manifest = read_manifest(folder, str(load_manifest(folder).get("kind")))
    files, damage = files_of(manifest), []
    for file in tqdm(files, desc="check", unit="file", disable=not world.is_main()):
        try:
            check_shards(folder, {"kind": manifest["kind"], "files": [file]})
        except ValueError as error:
            damage.append(str(error))
    if damage:
        raise ValueError(f"{len(damage)} of {len(files)} files of {folder} are not as written:\n" + "\n".join(damage))
    size = sum(file["bytes"] for file in files)
    world.say(f"{folder}: {len(files)} files, {size / 1e6:.1f} MB, {manifest['clips']} clips: all as written")


def files_of(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a manifest says about every file beside it: name, bytes, sha256."""
    return [file for group in FILES for file in manifest.get(group, [])]


def read_video_shards(folder: Path, manifest: Mapping[str, Any]) -> Iterator[VideoSample]:
    """Every sample of a video folder, in order; each shard's hash is checked before it is read."""
    for shard in manifest["shards"]:
        check_shards(folder, {"kind": "video", "shards": [shard]})
        with (folder / shard["name"]).open("rb") as file:
            # webdataset's own iteration over a tar, and nothing above it: its default decoders run code from .pyd,
            # .pickle and .pth members, its opener runs paths that begin with "pipe:", its splitter looks at ranks.
            members = tariterators.tar_file_expander([{"url": shard["name"], "stream": file}])
            for sample in tariterators.group_by_keys(members):
                (extension,) = [key for key in sample if not key.startswith(("__", MASK)) and key != "json"]
                yield VideoSample(sample["__key__"], extension, sample[extension], json.loads(sample["json"]))


@dataclass(frozen=True)
class VideoEntry:
    """One file of a video shard that has not been read: where its bytes lie, and what shard.py found out about it.

    `mask` is (extension, offset, size) of the mask that came with it, or None.
    """

    key: str
    extension: str
    tar: str
    offset: int
    size: int
    about: dict[str, Any]
    mask: tuple[str, int, int] | None = None


def scan_video_shards(folder: Path, manifest: Mapping[str, Any]) -> Iterator[VideoEntry]:
    """Every file of a video folder, in order, without reading videos: headers and .json members only.

    Sizes of the tars are checked, hashes are not. ValueError for a member that no video shard has: what is no video or
    image, a link, a name that leads out of the folder.
    """
    check_shards(folder, manifest, hashes=False)
    for shard in manifest["shards"]:
        with _reading(folder / shard["name"]) as tar:
            videos, masks = dict[str, tarfile.TarInfo](), dict[str, tuple[str, int, int]]()
            for member in tar:
                key, extension = _split_name(member, shard["name"])
                if extension.startswith(MASK):
                    masks[key] = extension.removeprefix(MASK), member.offset_data, member.size
                    continue
                if extension != "json":
                    videos[key] = member
                    continue
                video, opened = videos.pop(key, None), tar.extractfile(member)
                if video is None or opened is None:
                    raise ValueError(f"{folder / shard['name']}: {member.name} comes without its video")
                about = json.loads(opened.read())
                extension = _split_name(video, shard["name"])[1]
                place = shard["name"], video.offset_data, video.size
                yield VideoEntry(key, extension, *place, about, masks.pop(key, None))


def _split_name(member: tarfile.TarInfo, shard: str) -> tuple[str, str]:
    """A member's key and extension; ValueError if no video shard has such a member."""
    key, _, extension = member.name.partition(".")
    known = extension == "json" or f".{extension.removeprefix(MASK)}" in VIDEOS | IMAGES
    if not member.isreg() or "/" in member.name or not known:
        raise ValueError(
            f"{shard} holds {member.name!r}, which is no video, image or .json: refused; make it with shard.py"
        )
    return key, extension


@contextmanager
def _reading(path: Path) -> Iterator[tarfile.TarFile]:
    """A tar, opened; damage is a ValueError that names it."""
    try:
        with tarfile.open(path, "r:") as tar:
            yield tar
    except (tarfile.TarError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it, or make the shards again with shard.py") from error
