"""The folder of an export: it replaces what an earlier export wrote there, and nothing else.

`wantrain_export.json` marks such a folder: the layout, and every file written with its size and time. A file that is
not in it, or was changed since, is somebody's own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wantrain.models.formats.weights import read_json
from wantrain.util.files import check_writable, made_by, naming, write_json

MARK = "wantrain_export.json"
#: In a folder of replaced files: the names of the new ones that replace none.
_PLAN = ".plan.json"
#: Seconds by which a disk may round the time of a file.
_ROUNDING = 2


def claim_export(out: Path, layout: str, *, reads: Iterable[Path], size: int = 0, overwrite: bool = False) -> None:
    """Raise ValueError unless an export in `layout` may be written to `out`; to be called before any work.

    `out` must be absent, empty, or an earlier export in this layout in which nothing was added or changed.
    `overwrite=True` takes a changed one, or one in another layout. Never taken: a folder without our mark, one with
    links in it, and one that holds, or lies in, what is read (`reads`). `size` is how many bytes will be written.
    Hidden files do not count.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file; give a folder")
    here = out.resolve()
    for place in reads:
        there = place.resolve()
        if here == there or here in there.parents or there in here.parents:
            raise ValueError(f"out={out} holds, or lies in, {place}, which is read; give a new or empty folder")
    if out.is_dir() and (held := _files_below(out)):
        _check_earlier(out, layout, held, overwrite)
    check_writable(out, key="out")
    existing = next(place for place in (here, *here.parents) if place.exists())
    if (free := shutil.disk_usage(existing).free) < size:
        raise ValueError(
            f"out={out} has {free / 2**20:,.0f} MiB of free disk space, and {size / 2**20:,.0f} MiB will be written; "
            "free some, or give a folder on a larger disk (dtype=bf16 takes half of fp32)"
        )


def _check_earlier(out: Path, layout: str, held: list[str], overwrite: bool) -> None:
    """ValueError unless a folder with the files `held` is an earlier export that may be replaced."""
    mark = _read_mark(out)
    if mark is None:
        raise ValueError(f"out={out} holds something else (no {MARK} in it); give a new or empty folder")
    if link := next((path for path in out.rglob("*") if path.is_symlink()), None):
        raise ValueError(f"out={out} holds a link, {link.relative_to(out)}; give a new or empty folder")
    if overwrite:
        return
    if mark["layout"] != layout:
        raise ValueError(
            f"out={out} holds an export of layout={mark['layout']}, and layout={layout} would replace it; give another "
            "folder, or overwrite=true"
        )
    files = mark["files"]
    for what, names in (
        ("which no export wrote", [name for name in held if name not in files and name != MARK]),
        ("changed since it was exported", [name for name in held if name in files and _changed(out, name, files)]),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"out={out} holds {names[0]}{more}, {what}; move it, give another folder, or overwrite=true, which "
                "replaces files of the same name"
            )


def _changed(out: Path, name: str, files: Mapping[str, Any]) -> bool:
    state, (size, time) = (out / name).stat(), files[name]
    return state.st_size != size or abs(state.st_mtime - time) > _ROUNDING


def _read_mark(out: Path) -> dict[str, Any] | None:
    """The mark of an earlier export; None where there is none, or none of ours."""
    if not (out / MARK).is_file():
        return None
    mark = read_json(out / MARK)
    return mark if isinstance(mark.get("files"), dict) and isinstance(mark.get("layout"), str) else None


def _files_below(folder: Path) -> list[str]:
    """All files below a folder by relative name, hidden ones of the folder itself apart."""
    visible = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    found = [path for top in visible for path in ([top] if not top.is_dir() else sorted(top.rglob("*")))]
    return [path.relative_to(folder).as_posix() for path in found if path.is_symlink() or not path.is_dir()]


@contextmanager
def staged(out: Path, layout: str) -> Iterator[Path]:
    """A temporary folder to write into. Its files are moved to `out` on success, with a mark, and files that an earlier
    export left and this one has not are removed; on an error `out` stays as it was.

    What is replaced is moved aside first and removed last. After a kill in between, the next call moves it back.
    """
    beside, aside, done, existed = out / ".new", out / ".old", out / ".done", out.is_dir()
    _put_back(out)
    for leftover in (beside, done):
        shutil.rmtree(leftover, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        with naming(out):
            yield beside
            states = {name: (beside / name).stat() for name in _files_below(beside)}
            files = {name: [state.st_size, state.st_mtime] for name, state in states.items()}
            write_json(beside / MARK, {"made_by": made_by(), "layout": layout, "files": files})
            new, earlier = [*files, MARK], (_read_mark(out) or {}).get("files", {})
            aside.mkdir()
            write_json(aside / _PLAN, {"added": [name for name in new if not (out / name).exists()]})
            for name in dict.fromkeys([*new, *earlier]):
                if (out / name).exists():
                    _move(out / name, aside / name)
            for name in new:
                _move(beside / name, out / name)
            aside.rename(done)  # from here on the new files are valid
            shutil.rmtree(done)
            _remove_empty(out, earlier)
    finally:
        _put_back(out)
        shutil.rmtree(beside, ignore_errors=True)
        if not existed and not any(out.iterdir()):
            out.rmdir()


def _move(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    path.rename(to)


def _put_back(out: Path) -> None:
    """Undo a replacement that was not completed, if there is one: new files go, those moved aside come back."""
    aside = out / ".old"
    if not aside.is_dir():
        return
    plan = aside / _PLAN
    added = json.loads(plan.read_text(encoding="utf-8"))["added"] if plan.is_file() else []
    for name in added:
        (out / name).unlink(missing_ok=True)
    for path in sorted(aside.rglob("*")):
        if path.is_file() and path != plan:
            final = out / path.relative_to(aside)
            final.parent.mkdir(parents=True, exist_ok=True)
            path.replace(final)
    shutil.rmtree(aside)
    _remove_empty(out, added)


def _remove_empty(out: Path, names: Iterable[str]) -> None:
    """Remove the folders of files `names` of `out` that are empty."""
    folders = {folder for name in names for folder in (out / name).parents if out in folder.parents}
    for folder in sorted(folders, reverse=True):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
