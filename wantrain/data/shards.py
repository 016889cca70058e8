"""Shards on disk: folders of WebDataset tars of videos or latents, with a manifest that is written last.

A folder without manifest.json is not finished. Tars are written under a temporary name and renamed, hold no pickle, and
have the same bytes for the same input. Readers check hashes, because a truncated tar reads as a shorter one without
an error.
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
from wantrain.util import distributed
from wantrain.util.console import say
from wantrain.util.files import claim_folder, file_hash, sync_file, write_atomically
from wantrain.util.renamed import upgraded_manifest

#: Format versions of folders of video shards and of latent shards.
SCHEMA = 2
LATENT_SCHEMA = 2
MANIFEST = "manifest.json"
REJECTS = "rejects.jsonl"
#: Manifest fields that list files.
FILES = ("shards", "text_shards", "files")
MADE_BY = {"video": "shard.py", "latent": "encode.py"}


class TarWriter:
    """Writes a tar at the path `partial`; `finish` renames it, and leaving the `with` without `finish` removes it.

    Equal samples give equal bytes. ValueError if the disk refuses to write.
    """

    def __init__(self, partial: Path) -> None:
        self.partial, self.samples = partial, 0
        # TarInfo leaves time and owner at zero, so equal content gives equal bytes.
        self._tar = tarfile.open(partial, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.partial.exists():
            with suppress(OSError):  # the disk may be too full for the buffered bytes
                self._tar.close()
            self.partial.unlink()

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._tar.offset

    def write(self, key: str, members: Mapping[str, bytes]) -> dict[str, tuple[int, int]]:
        """Add a sample, given as members by extension; returns (offset, size) of each member's content."""
        places = {}
        for extension, content in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size = len(content)
            with disk_errors(self.partial):
                self._tar.addfile(info, io.BytesIO(content))
            # The content fills whole blocks, right before the current offset.
            padded = -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            places[extension] = (self._tar.offset - padded, len(content))
        self.samples += 1
        return places

    def finish(self, final: Path) -> dict[str, Any]:
        """Sync and rename to `final`; returns the manifest's row about the tar."""
        with disk_errors(self.partial):
            self._tar.close()
            sync_file(self.partial)
            row = {**describe_file(self.partial), "name": final.name, "samples": self.samples}
            self.partial.replace(final)
        return row


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of writing `path` into a ValueError with the fix."""
    try:
        yield
    except OSError as error:
        size = path.stat().st_size if path.exists() else 0
        raise ValueError(
            f"{path.parent}: cannot write {path.name.removeprefix('.').removesuffix('.tmp')} ({error.strerror}, after "
            f"{size} bytes); free some space and start the same command again"
        ) from error


def to_json(value: Mapping[str, Any]) -> bytes:
    """A JSON object as bytes; equal objects give equal bytes."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True).encode()


def write_rejects(
    out: Path, rejects: list[Reject], total: int, limit: float, unit: str, identities: list[str] | None = None
) -> None:
    """Write rejects.jsonl and print the first rejects.

    `unit` names what is counted in messages, "file" or "clip". `identities` are stored with the rejects, so that a
    later run recognises them. ValueError if the share of bad ones in `total` is above `limit`, or if all are rejected.
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
    if sum(not reject.part for reject in rejects) == total:
        raise ValueError(f"all {total} {unit}s are rejected, so nothing is left; the reasons are in {out / REJECTS}")


def claim(
    out: Path, kind: str, settings: Mapping[str, Any], *, same_footage: Callable[[], bool]
) -> dict[str, Any] | None:
    """Claim `out` for shards of this kind; returns the manifest of a finished run, or None without one.

    The finished run must have the same settings, except that its footage may differ if `same_footage()`: if it has some
    files in common. ValueError for a folder that holds something else, or shards made with other settings.
    """
    if not (out / MANIFEST).is_file():
        claim_folder(out, sentinel=REJECTS, key="out")
        write_atomically(out / REJECTS, "")  # marks the folder as ours, even after a kill
        return None
    if (other := load_manifest(out).get("kind")) != kind:
        raise ValueError(f"out={out} holds {other} shards, not {kind} shards; give another out=")
    manifest = read_manifest(out, kind)
    differing = [key for key in settings if manifest["settings"].get(key) != settings[key]]
    if differing and not (differing == ["footage"] and same_footage()):
        changes = "; ".join(_change(key, manifest["settings"].get(key), settings[key]) for key in differing)
        raise ValueError(f"out={out} holds {kind} shards made otherwise ({changes}); give another out=")
    return manifest


def is_whole(out: Path, manifest: Mapping[str, Any]) -> bool:
    """True if all files of a manifest exist in full size."""
    return all(_has_size(out, file) for file in files_of(manifest))


def _has_size(out: Path, file: Mapping[str, Any]) -> bool:
    path = out / file["name"]
    return path.is_file() and path.stat().st_size == file["bytes"]


def _change(key: str, before: Any, now: Any) -> str:
    """A changed setting in words; hashes are not shown."""
    if key in {"footage", "shards"}:
        return "footage: other files altogether" if key == "footage" else "shards: other video shards"
    return f"{key}: {before} -> {now}"


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """The manifest of a finished folder of `kind`, "video" or "latent"; ValueError names the command to run."""
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
            f"{folder} has schema {manifest.get('schema')}, this version reads {reads}; make it again in another "
            f"folder: python {command} out=DIR ..."
        )
    return manifest


def load_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, of any kind and version, with the field names of today. ValueError if it is damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / MANIFEST} is damaged ({error}); make the shards again") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{folder / MANIFEST} is not a JSON object; make the shards again")
    return upgraded_manifest(manifest)


def describe_file(path: Path) -> dict[str, Any]:
    """The manifest's row about a file: name, bytes, sha256."""
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": file_hash(path)}


def check_shards(folder: Path, manifest: Mapping[str, Any], *, hashes: bool = True) -> None:
    """Raise ValueError if a file is absent or damaged: by its size, and with `hashes` also by its hash."""
    for file in files_of(manifest):
        path = folder / file["name"]
        size = path.stat().st_size if path.is_file() else None
        if size != file["bytes"] or (hashes and file_hash(path) != file["sha256"]):
            state = "is missing" if size is None else f"is damaged ({size} bytes, written were {file['bytes']})"
            raise ValueError(f"{path} {state}; restore it, or make the shards again with {MADE_BY[manifest['kind']]}")


def check_folder(folder: Path) -> None:
    """Check every file of a finished folder by its hash and print the result; ValueError names all damaged files."""
    if not (folder / MANIFEST).is_file():
        read_manifest(folder, "latent")  # raises with what is missing
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
    """A manifest's rows about all files: name, bytes, sha256."""
    return [file for group in FILES for file in manifest.get(group, [])]
