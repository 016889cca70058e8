"""An export replaces its own earlier files and nothing else, completely or not at all."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from wantrain.models.formats import export_folder
from wantrain.models.formats.export_folder import MARK, claim_export, staged

LAYOUT = "comfyui"
FIRST = {"README.md": "card", "parts/a.bin": "a", "parts/b.bin": "b", "c.bin": "c"}
SECOND = {"README.md": "card 2", "parts/a.bin": "a2", "deeper/parts/d.bin": "d"}


def export(out, files, layout=LAYOUT, **how):
    claim_export(out, layout, reads=[], **how)
    with staged(out, layout) as folder:
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)


def held(out):
    return {path.relative_to(out).as_posix(): path.read_text() for path in out.rglob("*") if path.is_file()}


def own(out):
    return {name: text for name, text in held(out).items() if name != MARK}


@pytest.fixture
def out(tmp_path):
    export(tmp_path / "out", FIRST)
    return tmp_path / "out"


@pytest.mark.parametrize("layout", ["diffusers", "official", "comfyui", "vae"])
def test_again_into_same_folder(tmp_path, layout):
    """In every layout an export replaces its earlier one: old files go, empty folders too."""
    out = tmp_path / "out"
    export(out, FIRST, layout)
    assert own(out) == FIRST and sorted(json.loads((out / MARK).read_text())["files"]) == sorted(FIRST)
    export(out, {"c.bin": "c"}, layout)
    assert own(out) == {"c.bin": "c"} and not (out / "parts").exists()
    export(out, SECOND, layout)
    assert own(out) == SECOND


def test_mark_survives_a_copy(out, tmp_path):
    """A copy of an export, times and all, is one too."""
    shutil.copytree(out, tmp_path / "copy")
    export(tmp_path / "copy", SECOND)
    assert own(tmp_path / "copy") == SECOND


@pytest.mark.parametrize("mark", [None, "{}", '{"files": [], "layout": 3}'])
@pytest.mark.parametrize("files", [("model_index.json", "transformer/weights.bin"), ("notes.txt",)])
@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_folder(tmp_path, mark, files, overwrite):
    """A folder without our mark is never taken, a pipeline least of all."""
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("precious")
    if mark is not None:
        (tmp_path / MARK).write_text(mark)
    before = held(tmp_path)
    with pytest.raises(ValueError, match=rf"holds something else \(no {MARK} in it\); give a new or empty folder"):
        export(tmp_path, FIRST, overwrite=overwrite)
    assert held(tmp_path) == before


@pytest.mark.parametrize("name", ["notes.txt", "parts/mine.bin", "deeper/parts/d.bin"])
def test_added_file(out, name):
    """A file that somebody added stops a new export; with overwrite it stays, unless one of that name is written."""
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("precious")
    before = held(out)
    with pytest.raises(ValueError, match=rf"holds {name}, which no export wrote; move it.*overwrite=true"):
        export(out, SECOND)
    assert held(out) == before
    export(out, SECOND, overwrite=True)
    assert own(out) == {name: "precious"} | SECOND


def test_changed_file(out):
    """A file that was changed since its export is somebody's own."""
    (out / "parts" / "b.bin").write_text("better")
    with pytest.raises(ValueError, match=r"holds parts/b.bin, changed since it was exported"):
        export(out, SECOND)
    (out / "c.bin").write_text("also")
    with pytest.raises(ValueError, match=r"holds c.bin and 1 more, changed since it was exported"):
        export(out, SECOND)
    assert own(out) == FIRST | {"parts/b.bin": "better", "c.bin": "also"}
    export(out, SECOND, overwrite=True)
    assert own(out) == SECOND


def test_other_layout(out):
    """An export in another layout replaces the earlier one only when that is said."""
    with pytest.raises(ValueError, match=r"holds an export of layout=comfyui, and layout=diffusers would replace it"):
        export(out, SECOND, "diffusers")
    assert own(out) == FIRST
    export(out, SECOND, "diffusers", overwrite=True)
    assert own(out) == SECOND


@pytest.mark.parametrize("overwrite", [False, True])
def test_link_in_folder(out, tmp_path, overwrite):
    """What a link in the folder leads to is not ours."""
    (tmp_path / "parts").mkdir()
    for name in "ab":
        shutil.copy2(out / "parts" / f"{name}.bin", tmp_path / "parts")
    shutil.rmtree(out / "parts")
    (out / "parts").symlink_to(tmp_path / "parts")
    with pytest.raises(ValueError, match=r"holds a link, parts; give a new or empty folder"):
        export(out, SECOND, overwrite=overwrite)
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["a.bin", "b.bin"]


@pytest.mark.parametrize(
    ("target", "place"),
    [("out", "out"), ("out", "out/parts"), ("out", "out/parts/a.bin"), ("read/inside", "read"), ("linked", "out")],
)
def test_folder_that_is_read(out, tmp_path, target, place):
    """A folder that is read, holds what is read or lies in it, by a link too, is never written, even with overwrite."""
    (tmp_path / "read").mkdir()
    (tmp_path / "linked").symlink_to(out)
    with pytest.raises(ValueError, match=r"holds, or lies in, .*, which is read"):
        claim_export(tmp_path / target, LAYOUT, reads=[tmp_path / place], overwrite=True)
    assert own(out) == FIRST


def test_neighbour_of_what_is_read(tmp_path):
    """A folder beside what is read, or in the run that trained it, is free."""
    (tmp_path / "run" / "checkpoints" / "step_1").mkdir(parents=True)
    claim_export(tmp_path / "run" / "pipeline", LAYOUT, reads=[tmp_path / "run" / "checkpoints" / "step_1"])


def test_lack_of_space(tmp_path, monkeypatch):
    """A disk that is too small is an error before any work."""
    with pytest.raises(ValueError, match=r"MiB of free disk space, and 1,099,511,627,776 MiB will be written"):
        claim_export(tmp_path / "deep" / "er", LAYOUT, reads=[], size=2**60)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stop", range(1, 11))
@pytest.mark.parametrize("first", [False, True])
def test_failure_while_replacing(tmp_path, monkeypatch, stop, first):
    """Whichever rename fails, an earlier export stays as it was, and a new folder is gone."""
    out = tmp_path / "out"
    if not first:
        export(out, FIRST)
    before, rename, steps = held(out), Path.rename, []

    def failing(self, target):
        steps.append(self)
        if len(steps) == stop:
            raise OSError("disk gone")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        if first and stop > len(SECOND) + 2:
            return
        with pytest.raises(OSError, match="disk gone"):
            export(out, SECOND)
    assert held(out) == before and out.exists() != first
    assert {path.name for path in out.rglob("*") if path.is_dir()} == (set() if first else {"parts"})


@pytest.mark.parametrize("stop", range(1, 10))
def test_kill_while_replacing(out, monkeypatch, stop):
    """After a kill between two renames the next export puts the earlier one back first."""
    before, rename, steps = held(out), Path.rename, []

    def killed(self, target):
        steps.append(self)
        if len(steps) == stop:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        patch.setattr(export_folder, "_put_back", lambda out: None)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            export(out, SECOND)
    replace, put_back = Path.replace, []

    def killed_again(self, target):
        put_back.append(self)
        if len(put_back) == 2:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed_again)
        export_folder._put_back(out)
    with pytest.raises(ValueError, match="the experts do not load"), staged(out, LAYOUT):
        raise ValueError("the experts do not load")
    assert held(out) == before


def test_interrupt_leaves_nothing(out, tmp_path):
    """Ctrl-C while files are written leaves no temporary folder."""
    for folder in (out, tmp_path / "new"):
        before = held(folder)
        with pytest.raises(KeyboardInterrupt), staged(folder, LAYOUT) as beside:
            (beside / "a.bin").write_text("half")
            raise KeyboardInterrupt
        assert held(folder) == before
    assert not (tmp_path / "new").exists()
