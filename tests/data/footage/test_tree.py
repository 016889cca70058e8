"""Folders of footage: every file and folder is used, rejected, read for it, or counted as ignored with its kind."""

import io
import os
import random
import tarfile

import pytest

from wantrain.data import find_footage
from wantrain.data.footage import tree


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def counted(found):
    """How many files and folders a source accounts for."""
    tally, rejects = found.tally, [reject for reject in found.rejects if reject.kind != "empty tar"]
    empty = len(found.rejects) - len(rejects)
    return len(found.footage) + len(rejects) + empty + tally.read.total() + tally.ignored.total()


def test_ignored_kinds(tmp_path):
    """Each kind of file that is passed over is counted under its name."""
    touch(tmp_path, "a.mp4", "note.pdf", "more/note.PDF", "README", ".DS_Store", ".git/config", "x.zip", "b.tar.gz",
          "lost.txt", "rows.csv", "more/metadata.csv", "c.heic", "d.HEIF")  # fmt: skip
    (tmp_path / "a.mp4.txt").write_text("one")
    (tmp_path / "a.txt").write_text("other")
    (tmp_path / "gone.doc").symlink_to(tmp_path / "nowhere")
    (tmp_path / "more/up").symlink_to(tmp_path)
    found = find_footage(tmp_path)
    assert dict(found.tally.ignored) == {
        "of extension .pdf": 2,
        "without an extension": 1,
        "hidden files": 1,
        "hidden folders": 1,
        "archives (.zip)": 1,
        "archives (.gz)": 1,
        "captions without a clip": 1,
        "captions of files that have another": 1,
        "tables of another name than metadata.csv": 1,
        "tables that are not in the source folder itself": 1,
        "pipes, sockets and broken links": 1,
        "links to a folder that they lie in": 1,
    }
    assert found.tally.first["of extension .pdf"] == "note.pdf"
    assert [(file.name, file.caption) for file in found.footage] == [("a.mp4", "one")]
    assert [(reject.name, reject.bad) for reject in found.rejects] == [("c.heic", True), ("d.HEIF", True)]
    assert "save it as c.jpg" in found.rejects[0].reason
    (line, ignored) = found.tally.lines()
    assert line == "read too: 1 caption files"
    assert ignored.startswith("ignored: 13 = 2 of extension .pdf (first: note.pdf) + ")


@pytest.mark.parametrize("text", ["clip.txt", "clip.TXT", "clip.mp4.txt", "clip.mp4.Txt", "clip.MP4.txt"])
def test_names_of_caption_files(tmp_path, text):
    """A caption file is found whatever the case of .txt, and with the clip's extension in its name."""
    clip = "clip.MP4" if "MP4" in text else "clip.mp4"
    touch(tmp_path, clip)
    (tmp_path / text).write_text("told")
    assert [file.caption for file in find_footage(tmp_path).footage] == ["told"]


def test_dots_in_names(tmp_path):
    """A name may hold dots, in a folder and in a tar."""
    touch(tmp_path / "folder", "a.b.c.mp4", "a.b.mp4")
    (tmp_path / "folder/a.b.c.txt").write_text("three")
    (tmp_path / "folder/a.b.txt").write_text("two")
    members = {
        "a.b.c.mp4": b"",
        "a.b.c.txt": b"three",
        "x/a.b.mp4": b"",
        "x/a.b.mp4.txt": b"two",
        "._a.mp4": b"",
        "a.b.cls": b"1",
    }
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert {file.name: file.caption for file in find_footage(tmp_path / "folder").footage} == {
        "a.b.c.mp4": "three",
        "a.b.mp4": "two",
    }
    found = find_footage(tmp_path / "t.tar")
    assert {file.name: file.caption for file in found.footage} == {"a.b.c.mp4": "three", "x/a.b.mp4": "two"}
    assert found.tally.to_dict() == {
        "read": {"caption files in tars": 2, "tars": 1},
        "ignored": {"hidden tar members": 1, "tar members without a video or image": 1},
    }


def test_linked_folders(tmp_path):
    """A linked folder is followed, a circle of two links is not."""
    touch(tmp_path / "elsewhere", "a.mp4", "deep/b.mp4")
    touch(tmp_path / "source", "c.mp4")
    (tmp_path / "source/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "source")
    (tmp_path / "source/self").symlink_to("self")
    found = find_footage(tmp_path / "source", caption_missing="empty")
    assert [file.name for file in found.footage] == ["c.mp4", "link/a.mp4", "link/deep/b.mp4"]
    assert dict(found.tally.ignored) == {"links to a folder that they lie in": 1, "pipes, sockets and broken links": 1}


def test_unreadable_folder(tmp_path, monkeypatch):
    """A folder that cannot be read is counted; a source, table or caption file that cannot is an error."""
    touch(tmp_path, "a.mp4", "locked/b.mp4")
    (tmp_path / "a.txt").write_text("told")
    real = os.scandir

    def scandir(path):
        if path.name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(tree.os, "scandir", scandir)
    found = find_footage(tmp_path)
    assert ([file.name for file in found.footage], dict(found.tally.ignored)) == (
        ["a.mp4"],
        {"folders that cannot be read": 1},
    )
    with pytest.raises(ValueError, match=r"source=.*locked cannot be read \(Permission denied\)"):
        find_footage(tmp_path / "locked")


@pytest.mark.parametrize(
    ("out", "way"), [("source/out", ""), ("source", ""), ("source/a/b", ""), ("kin", "link"), ("kin/deep/out", "link")]
)
def test_out_inside_source(tmp_path, out, way):
    """out= inside source= is refused, also where a link leads there, and before it exists."""
    touch(tmp_path, "source/a.mp4", "kin/b.mp4")
    (tmp_path / "source/link").symlink_to(tmp_path / "kin")
    (tmp_path / "alias").symlink_to(tmp_path / "source")
    for source in ("source", "alias"):
        with pytest.raises(ValueError, match=rf"out=.* lies inside source=.*{way}"):
            find_footage(tmp_path / source, caption_missing="empty", out=tmp_path / out)
    assert len(find_footage(tmp_path / "source", caption_missing="empty", out=tmp_path / "out").footage) == 2


NAMES = ["a.mp4", "a.MOV", "b.png", "a.txt", "a.TXT", "a.mp4.txt", "b.txt", "c.txt", "c.heic", "x.zip", "y.pdf", ".z.mp4", "README",
         "metadata.txt", "rows.jsonl", "w.tar.gz", "e.jfif", "f.m2ts", "g.json", "masks", "h.mp4", "n\n\udcff.mp4"]  # fmt: skip


def grow(folder, draw, depth=0):
    """Fill a folder at random; the number of files and folders that a walk must account for."""
    count = 0
    for name in draw.sample(NAMES, draw.randint(1, 9)):
        path, kind = folder / name, draw.random()
        if name == "masks" or kind < 0.2:
            path.mkdir()
            inside = grow(path, draw, depth + 1) if depth < 3 else 0
            hidden = name.startswith(".")
            # A folder counts itself only if it has the name of a video, or is hidden; then what it holds does not count.
            own = hidden or path.suffix.lower() in {".mp4", ".mov", ".png", ".heic", ".jfif", ".m2ts"}
            count += int(own) + (0 if hidden else inside)
        elif kind < 0.3:
            path.symlink_to(draw.choice(["gone", name, ".." if depth else "."]))
            count += 1
        elif kind < 0.35:
            os.mkfifo(path)
            count += 1
        else:
            path.write_text(draw.choice(["", "words"]))
            count += 1
    if draw.random() < 0.3:
        with tarfile.open(folder / "set.tar", "w") as tar:
            members = draw.sample(
                ["1.mp4", "1.txt", "1.json", "2.cls", "3.x.png", "3.x.txt", "LICENSE", "._1.mp4", "4.heic"],
                draw.randint(0, 6),
            )
            for name in members:
                content = b"{}" if name.endswith("json") else b"words"
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        count += 1 + len(members)
    return count


@pytest.mark.parametrize("seed", range(40))
def test_everything_is_counted(tmp_path, seed):
    """Of random trees: files there = used + rejected + read for them + ignored."""
    draw = random.Random(seed)
    (tmp_path / "x.mp4").touch()
    there = grow(tmp_path, draw) + 1
    found = find_footage(tmp_path, caption_missing=draw.choice(["skip", "empty"]))
    assert counted(found) == there
