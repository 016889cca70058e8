"""Sources: what is found in folders, tables and tars, here and at URLs, with which captions; what is not, and why."""

import http.server
import io
import json
import os
import tarfile
import threading
from functools import partial
from pathlib import Path

import fsspec
import pytest

from wantrain.data import find_footage
from wantrain.data.footage.captions import Annotation


def folder_with(folder, **texts):
    """Files named by keyword (`__` is a slash, `_` a dot) with these texts; empty videos and images do here."""
    for name, text in texts.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def captions(found):
    return {file.name: file.caption for file in found[0]}


def test_files_and_captions(tmp_path):
    """Files are found in any folder, sorted, with the caption from the text file beside them."""
    folder_with(tmp_path, b_mp4="", b_txt="a dog\n runs", a__c_PNG="", a__c_txt="\ufeff一只猫", note_txt="no video")
    folder_with(tmp_path, __hidden__x_mp4="", a__d_json="{}")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.mp4").touch()
    (tmp_path / ".y.mp4").touch()
    footage, rejects, _ = find_footage(tmp_path)
    assert [(file.name, file.caption) for file in footage] == [("a/c.PNG", "一只猫"), ("b.mp4", "a dog runs")]
    assert rejects == []


def test_missing_captions(tmp_path):
    """Files without a caption are an error, are skipped, or get an empty or a default caption."""
    folder_with(tmp_path, a_mp4="", b_mp4="", b_txt="told", c_mp4="", c_txt=" \n")
    with pytest.raises(ValueError, match=r"2 of 3 files have no caption \(first: a\.mp4\)"):
        find_footage(tmp_path)
    footage, rejects, _ = find_footage(tmp_path, caption_missing="skip")
    assert [file.name for file in footage] == ["b.mp4"]
    assert [(reject.name, reject.reason, reject.bad) for reject in rejects] == [
        ("a.mp4", "no caption", False),
        ("c.mp4", "no caption", False),
    ]
    assert captions(find_footage(tmp_path, caption_missing="empty")) == {"a.mp4": "", "b.mp4": "told", "c.mp4": ""}


def test_missing_captions_elsewhere(tmp_path):
    """Where captions are missing, files that may hold them and are not read are named."""
    folder_with(tmp_path, a_mp4="", b_txt="told", more__metadata_csv="path,caption")
    (tmp_path / "Metadata.CSV").write_text("path,caption\na.mp4,told\n")
    words = r"1 captions without a clip \(first: b\.txt\), 1 tables of another name than metadata\.csv \(first: Meta"
    with pytest.raises(ValueError, match=rf"no caption.*; not read: {words}.*1 tables that are not in the source"):
        find_footage(tmp_path)


def test_default_caption(tmp_path):
    """caption.default fills files without a caption; one that is blank is left to caption.missing."""
    folder_with(tmp_path, a_mp4="", b_mp4="", b_txt="told", c_mp4="", c_txt=" \n")
    with pytest.raises(ValueError, match=r"1 of 3 files have no caption \(first: c\.mp4, whose caption is blank\)"):
        find_footage(tmp_path, caption_default="thing")
    found = find_footage(tmp_path, caption_default="thing", caption_missing="empty")
    assert captions(found) == {"a.mp4": "thing", "b.mp4": "told", "c.mp4": ""}
    (tmp_path / "metadata.jsonl").write_text('{"path": "a.mp4", "caption": ""}\n{"path": "c.mp4", "caption": "row"}')
    found = find_footage(tmp_path, caption_default="thing", caption_missing="skip")
    assert captions(found) == {"b.mp4": "told", "c.mp4": "row"}
    tar_with(
        tmp_path / "t.tar", {"1.mp4": b"", "1.txt": b" ", "2.mp4": b"", "3.mp4": b"", "3.json": b'{"caption": ""}'}
    )
    found = find_footage(str(tmp_path / "t.tar"), caption_default="thing", caption_missing="empty")
    assert captions(found) == {"1.mp4": "", "2.mp4": "thing", "3.mp4": ""}


@pytest.mark.parametrize(
    ("prefix", "caption"),
    [("ohwx", "ohwx a cat"), ("ohwx, ", "ohwx, a cat"), ("水墨画，", "水墨画，a cat"), ("", "a cat")],
)
def test_caption_prefix(tmp_path, prefix, caption):
    """A prefix is put before every caption."""
    folder_with(tmp_path, a_mp4="", a_txt="a cat")
    assert captions(find_footage(tmp_path, caption_prefix=prefix)) == {"a.mp4": caption}


def test_no_footage(tmp_path):
    """A folder that is absent or holds no footage is an error."""
    with pytest.raises(ValueError, match="holds no videos or images"):
        find_footage(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        find_footage(tmp_path / "absent")


def test_non_files(tmp_path):
    """Folders, pipes and broken links with the name of a video are rejected."""
    folder_with(tmp_path, folder_mp4__inside_mp4="", folder_mp4__inside_txt="fine")
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "broken.mp4").symlink_to(tmp_path / "gone.mp4")
    footage, rejects, _ = find_footage(tmp_path)
    assert [file.name for file in footage] == ["folder.mp4/inside.mp4"]
    assert [reject.name for reject in rejects] == ["broken.mp4", "folder.mp4", "pipe.mp4"]
    assert all(reject.bad for reject in rejects)


def test_masks(tmp_path):
    """Masks beside footage are not footage."""
    folder_with(tmp_path, a_mp4="", a_txt="a", masks__a_mp4="", masks__own_mp4="", masks__own_txt="a film about masks")
    footage, rejects, _ = find_footage(tmp_path, caption_default="thing")
    assert [file.name for file in footage] == ["a.mp4", "masks/own.mp4"]
    assert [(reject.name, reject.bad) for reject in rejects] == [("masks/a.mp4", False)]


def test_non_utf8_names(tmp_path):
    """A file name that is not UTF-8 can be written as JSON."""
    path = os.fsencode(tmp_path) + b"/n\xff\n.mp4"
    Path(os.fsdecode(path)).touch()
    footage, *_ = find_footage(tmp_path, caption_default="x")
    assert footage[0].name == "n\\xff\n.mp4"
    json.dumps(footage[0].name, ensure_ascii=False).encode()


# ---------------------------------------------------------------------------------------------------- tars


def tar_with(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


SAMPLES = {
    "000.mp4": b"video zero",
    "000.txt": "一只猫\nasleep".encode(),
    "000.jpg": b"its still",
    "000.json": b'{"tags": ["cat"], "weight": 3}',
    "x/001.json": b'{"captions": ["a", "b"], "duration": 2}',
    "x/001.webm": b"video one",
    "002.cls": b"7",
    "003.png": b"picture",
    "003.txt": b"a picture",
}


@pytest.fixture
def tar(tmp_path):
    return tar_with(tmp_path / "set-000.tar", SAMPLES)


def contents(found):
    return {file.name: (file.read(), file.annotation) for file in found[0]}


IN_THE_TAR = {
    "000.mp4": (b"video zero", Annotation(("一只猫 asleep",), 3.0, ("cat",))),
    "x/001.webm": (b"video one", Annotation(("a", "b"))),
    "003.png": (b"picture", Annotation(("a picture",))),
}


def test_tar_samples(tar):
    """The samples of a tar are footage, with their captions, weights and tags."""
    found = find_footage(str(tar))
    assert contents(found) == IN_THE_TAR
    assert [(reject.name, reject.reason, reject.bad) for reject in found[1]] == [
        ("000.jpg", "stands beside 000.mp4 in one sample", False)
    ]
    for file in found[0]:
        with file.on_disk() as path:
            assert path.read_bytes() == file.read()
            assert path.suffix == f".{file.extension}"


def test_tar_patterns(tmp_path, tar):
    """Several tars are found by a pattern, by braces or in a folder."""
    tar_with(tmp_path / "set-001.tar", {"000.mp4": b"another", "000.txt": b"words"})
    names = ["000.mp4", "x/001.webm", "003.png"]
    both = [*(f"set-000.tar/{name}" for name in names), "set-001.tar/000.mp4"]
    for source in ("set-*.tar", "set-{000..001}.tar", "set-00[01].tar"):
        assert [file.name for file in find_footage(f"{tmp_path}/{source}")[0]] == both
    folder_with(tmp_path, single_mp4="", single_txt="beside")
    assert [file.name for file in find_footage(tmp_path)[0]] == ["single.mp4", *both]
    with pytest.raises(ValueError, match="matches no file"):
        find_footage(f"{tmp_path}/other-*.tar")


@pytest.fixture
def server(tmp_path):
    """The folder, at http://127.0.0.1:PORT."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_remote_tars(tmp_path, tar, server):
    """Tars at a URL give the samples of the local tar."""
    downloads = tmp_path / "downloads"
    assert contents(find_footage(f"{server}/{tar.name}", downloads=downloads)) == IN_THE_TAR
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/a-000.tar", tar.read_bytes())
    memory.pipe("/bucket/a-001.tar", tar.read_bytes())
    assert contents(find_footage("memory://bucket/a-000.tar", downloads=downloads)) == IN_THE_TAR
    for pattern in ("memory://bucket/a-*.tar", "memory://bucket/a-{000..001}.tar"):
        found = find_footage(pattern, downloads=downloads)[0]
        assert [file.name for file in found] == [f"a-00{n}.tar/{name}" for n in (0, 1) for name in IN_THE_TAR]


def test_unreadable_urls(tmp_path, server):
    """A URL that cannot be read raises one ValueError."""
    for address, problem in [
        (f"{server}/gone.tar", "cannot be read .*404"),
        ("http://127.0.0.1:9/a.tar", "cannot be read"),
        ("memory://bucket/gone.tar", "cannot be read"),
        ("memory://bucket/gone-*.tar", "matches nothing"),
        ("gs://bucket/a.tar", r"gs:// needs a driver .*wantrain\[remote\]"),
        ("what://bucket/a.tar", "cannot be read"),
    ]:
        with pytest.raises(ValueError, match=problem):
            find_footage(address, downloads=tmp_path / "downloads")


def test_damaged_tar(tmp_path, tar):
    """A damaged tar raises an error and never gives a shorter set."""
    whole = tar.read_bytes()
    with tarfile.open(tar) as opened:
        ends = [member.offset_data + -(-member.size // 512) * 512 for member in opened.getmembers()]
    for end in (*ends, *(end - 300 for end in ends), *(end + 200 for end in ends[:-1])):
        tar.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"set-000\.tar is (cut short|not a tar)"):
            find_footage(str(tar))
    tar.write_bytes(b"no tar at all" * 99)
    with pytest.raises(ValueError, match="is not a tar"):
        find_footage(str(tar))
    for name, content in {"000.json": b"[1]", "000.txt": b"\xff"}.items():
        tar_with(tar, {"000.mp4": b"video", name: content})
        with pytest.raises(ValueError, match=r"set-000\.tar, 000: "):
            find_footage(str(tar))


def test_tar_member_names(tmp_path):
    """A path that leads out of the tar is a name to show; nothing is written there."""
    tar = tar_with(tmp_path / "a.tar", {"../../evil.mp4": b"video", "/abs/x.mp4": b"other"})
    before = sorted(tmp_path.rglob("*"))
    (one, two), *_ = find_footage(str(tar), caption_default="x")
    with one.on_disk() as path, two.on_disk() as other:
        assert (path.read_bytes(), other.read_bytes()) == (b"video", b"other")
    assert (one.name, two.name) == ("../../evil.mp4", "/abs/x.mp4")
    assert sorted(tmp_path.rglob("*")) == before


def test_tar_without_footage(tmp_path):
    """A tar without footage is a reject that does not count as bad."""
    tar_with(tmp_path / "texts.tar", {"000.txt": b"words"})
    folder_with(tmp_path, a_mp4="", a_txt="a")
    footage, rejects, _ = find_footage(tmp_path)
    assert [file.name for file in footage] == ["a.mp4"]
    assert [(reject.name, reject.bad) for reject in rejects] == [("texts.tar", False)]


@pytest.mark.slow
def test_many_files(tmp_path):
    """100,000 files come in the order of their code points, whatever the locale, in less than a minute."""
    names = [f"{letter}{number:05d}.mp4" for letter in "aÄz" for number in range(33_334)]
    for name in names:
        (tmp_path / name).touch()
    footage, rejects, _ = find_footage(tmp_path, caption_default="x")
    assert ([file.name for file in footage], rejects) == (sorted(names), [])
