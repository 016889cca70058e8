"""Shards on disk: WebDataset tars of videos or of latents, each folder with a manifest that is written last.

A folder without manifest.json is not finished. Tars are written beside their name and renamed, hold no pickle, and
have the same bytes for the same input. Readers check a shard's hash before they use it, because a tar that was cut
short reads as a shorter epoch without an error.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from wantrain.data.rejects import Reject
from wantrain.util import distributed, renamed
from wantrain.util.console import say
from wantrain.util.files import claim_folder, file_hash, sync_file, write_atomically
from wantrain.util.renamed import upgraded_fields

#: Versions of the two formats: of folders of videos, and of folders of latents.
SCHEMA = 2
LATENT_SCHEMA = 2
MANIFEST = "manifest.json"
REJECTS = "rejects.jsonl"
#: The lists of a manifest that describe files.
FILES = ("shards", "text_shards", "files")
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
            sync_file(self.beside)
            row = {**describe_file(self.beside), "name": final.name, "samples": self.samples}
            self.beside.replace(final)
        return row


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What the disk refuses is one error for people, with its fix."""
    try:
        yield
    except OSError as error:
        size = path.stat().st_size if path.exists() else 0
        raise ValueError(
            f"{path.parent}: cannot write {path.name.removeprefix('.').removesuffix('.tmp')} ({error.strerror}, after "
            f"{size} bytes); free some space and start the same command again"
        ) from error


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
        write_atomically(out / REJECTS, text)
    for reject in rejects[:5]:
        say(f"rejected {reject.name}: {reject.reason}")
    bad = [reject for reject in rejects if reject.bad]
    if len(bad) > limit * total:
        raise ValueError(
            f"{len(bad)} of {total} {unit}s are bad, more than rejects.limit={limit:g} allows; "
            f"first: {bad[0].name}: {bad[0].reason}. All are in {out / REJECTS}; "
            "fix or remove them, or raise rejects.limit"
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
        claim_folder(out, sentinel=REJECTS, key="out")
        write_atomically(out / REJECTS, "")  # from here on the folder is ours, also after a kill
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
    """The manifest of a finished folder of `kind` ("video" or "latent"); ValueError says which command to run."""
    command = MADE_BY[kind]
    if not (folder / MANIFEST).is_file():
        what = "is not finished" if (folder / REJECTS).exists() else "holds no shards"
        raise ValueError(f"{folder} {what} (no {MANIFEST}); run python {command} out={folder} ... first")
    manifest = load_manifest(folder)
    if manifest.get("kind") != kind:
        holds = manifest.get("kind")
        raise ValueError(f"{folder} holds {holds} shards, but {kind} shards are needed: run python {command}")
    reads = {"video": SCHEMA, "latent": LATENT_SCHEMA}[kind]
    if manifest.get("schema") != reads:
        raise ValueError(
            f"{folder} has schema {manifest.get('schema')}, this version reads {reads}; remove the folder and make it "
            f"again: python {command} out={folder} ..."
        )
    return manifest


def load_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / MANIFEST} is damaged ({error}); make the shards again") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{folder / MANIFEST} is no JSON object; make the shards again")
    return upgraded_fields(manifest, renamed.MANIFEST)


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
    for file in tqdm(files, desc="check", unit="file", disable=not distributed.is_main()):
        try:
            check_shards(folder, {"kind": manifest["kind"], "files": [file]})
        except ValueError as error:
            damage.append(str(error))
    if damage:
        raise ValueError(f"{len(damage)} of {len(files)} files of {folder} are not as written:\n" + "\n".join(damage))
    size = sum(file["bytes"] for file in files)
    say(f"{folder}: {len(files)} files, {size / 1e6:.1f} MB, {manifest['clips']} clips: all as written")


def files_of(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a manifest says about every file beside it: name, bytes, sha256."""
    return [file for group in FILES for file in manifest.get(group, [])]
