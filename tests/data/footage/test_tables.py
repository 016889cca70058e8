"""Tables and caption files: whose rows are read, in which layouts, and which line an error names."""

import json

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


def test_captions_from_metadata(tmp_path):
    folder_with(tmp_path, a_mp4="", a_txt="beside", x__b_mp4="", c_png="", c_txt="from the text file")
    rows = [
        {"path": "x/b.mp4", "caption": "line\u2028separator"},
        {"file_name": "./a.mp4", "text": "from metadata"},
    ]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "metadata.jsonl").write_text(f"\ufeff{lines}\n", encoding="utf-8")
    assert captions(find_footage(tmp_path)) == {
        "a.mp4": "from metadata",
        "c.png": "from the text file",
        "x/b.mp4": "line separator",
    }


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 2 is not"),
        ('["a.mp4", "text"]', "line 2 is not"),
        ('{"path": 3, "caption": "x"}', "line 2 is not"),
        ('{"caption": "x"}', "line 2 is not .*path|line 2 is not .*file_name"),
        ('{"path": "b.mp4"}', "line 2 is not"),
        ('{"path": "gone.mp4", "caption": "x"}', "line 2 names gone.mp4, which is not in"),
        ('{"path": "../other.mp4", "caption": "x"}', "line 2 names ../other.mp4, which is not a video or image below"),
        ('{"path": "note.md", "caption": "x"}', "line 2 names note.md, which is not a video"),
        ('{"path": "a.mp4", "caption": "x"}', "line 2 names a.mp4 for the second time"),
    ],
)
def test_metadata_errors(tmp_path, line, problem):
    """An error in metadata.jsonl names the line."""
    source = folder_with(tmp_path / "source", a_mp4="", b_mp4="", note_md="")
    (tmp_path / "other.mp4").touch()
    (source / "metadata.jsonl").write_text('{"path": "a.mp4", "caption": "x"}\n' + line)
    with pytest.raises(ValueError, match=problem):
        find_footage(source, caption_missing="empty")


def test_caption_encoding(tmp_path):
    """A caption that is not UTF-8 raises an error that names its file."""
    folder_with(tmp_path, a_mp4="")
    (tmp_path / "a.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8"):
        find_footage(tmp_path)


def test_annotations(tmp_path):
    """A file may have several captions, a weight and tags."""
    folder_with(tmp_path, a_mp4="", b_mp4="", b_txt="beside", c_mp4="", d_mp4="", d_txt="d")
    rows = [
        {"path": "a.mp4", "captions": ["one", " two\n", "one", ""], "weight": 2.5, "tags": ["cat", " roof"]},
        {"path": "b.mp4", "caption": None, "tags": "night, rain"},
        {"path": "c.mp4", "text": ["first", "second"]},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    footage, *_ = find_footage(tmp_path, caption_prefix="ohwx")
    assert {file.name: file.annotation for file in footage} == {
        "a.mp4": Annotation(("ohwx one", "ohwx two"), 2.5, ("cat", "roof")),
        "b.mp4": Annotation(("ohwx beside",), 1.0, ("night", "rain")),
        "c.mp4": Annotation(("ohwx first", "ohwx second")),
        "d.mp4": Annotation(("ohwx d",)),
    }
    assert [file.caption for file in footage] == ["ohwx one", "ohwx beside", "ohwx first", "ohwx d"]


def test_csv_metadata(tmp_path):
    """metadata.csv holds what metadata.jsonl holds."""
    folder_with(tmp_path, a_mp4="", x__b_mp4="", c_mp4="", c_txt="beside")
    (tmp_path / "metadata.csv").write_text(
        "\ufefffile_name,text,caption_2,weight,tags\r\n"
        'a.mp4,"a cat, ""asleep""\non a roof",二只猫,0.5,cat;roof\r\n'
        "x/b.mp4,b,,,\r\n",
        encoding="utf-8",
    )
    footage, *_ = find_footage(tmp_path)
    assert {file.name: file.annotation for file in footage} == {
        "a.mp4": Annotation(('a cat, "asleep" on a roof', "二只猫"), 0.5, ("cat", "roof")),
        "c.mp4": Annotation(("beside",)),
        "x/b.mp4": Annotation(("b",)),
    }


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ("path,caption\na.mp4,x,y\n", "line 2 is not path,caption"),
        ("path,caption\na.mp4\n", "line 2 is not path,caption"),
        ("name,caption\na.mp4,x\n", "line 2 is not path,caption.*file_name"),
        ("path\na.mp4\n", "line 2 is not path,caption.*caption"),
        ("path,caption,weight\na.mp4,x,heavy\n", "line 2 is not path,caption.*heavy"),
        ("path,caption,weight\na.mp4,x,0\n", "weight=0 must be above 0"),
        ("path,caption\ngone.mp4,x\n", "line 2 names gone.mp4, which is not in"),
        ("path,caption\na.mp4,x\na.mp4,y\n", "line 3 names a.mp4 for the second time.*caption_2"),
        ('path,caption\na.mp4,"x\n', "is not path,caption"),
    ],
)
def test_csv_errors(tmp_path, table, problem):
    """An error in metadata.csv names the line."""
    folder_with(tmp_path, a_mp4="")
    (tmp_path / "metadata.csv").write_text(table)
    with pytest.raises(ValueError, match=rf"metadata\.csv {problem}|metadata\.csv.*{problem}"):
        find_footage(tmp_path, caption_missing="empty")


@pytest.mark.parametrize(
    ("table", "content"),
    [
        ("metadata.csv", "video,prompt\nx/a.mp4,a cat\nb.mp4,a dog\n"),  # DiffSynth-Studio
        ("metadata.csv", "image,prompt\nx/a.mp4,a cat\nb.mp4,a dog\n"),
        ("metadata.csv", "file,prompt\nx/a.mp4,a cat\nb.mp4,a dog\n"),
        ("metadata.csv", "file_path,text,type\nx/a.mp4,a cat,video\nb.mp4,a dog,video\n"),  # VideoX-Fun
        ("metadata.jsonl", '{"video_path": "DIR/x/a.mp4", "caption": "a cat"}\n{"video_path": "b.mp4", "caption": "a dog"}'),
        ("metadata.jsonl", '{"image_path": "DIR/x/a.mp4", "caption": "a cat"}\n{"image_path": "b.mp4", "caption": "a dog"}'),
        ("metadata.json", '[{"file_path": "x/a.mp4", "text": "a cat", "type": "video"}, {"video": "b.mp4", "prompt": "a dog"}]'),
    ],
)  # fmt: skip
def test_foreign_tables(tmp_path, table, content):
    """The tables of other trainers are read."""
    folder_with(tmp_path, x__a_mp4="", b_mp4="")
    (tmp_path / table).write_text(content.replace("DIR", str(tmp_path)))
    found = find_footage(tmp_path)
    assert captions(found) == {"x/a.mp4": "a cat", "b.mp4": "a dog"}
    assert (dict(found.tally.read), found.tally.notes) == ({"tables": 1}, [])


def test_absolute_path_through_a_link(tmp_path):
    """An absolute path is found below the source also where the source is named by a link."""
    folder_with(tmp_path / "real", x__a_mp4="")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    row = {"video_path": str(tmp_path / "real/x/a.mp4"), "caption": "a cat"}
    (tmp_path / "real/metadata.jsonl").write_text(json.dumps(row))
    assert captions(find_footage(tmp_path / "link")) == {"x/a.mp4": "a cat"}


def test_unknown_keys_are_named(tmp_path):
    """A key that is not read is named, with the nearest one that would be."""
    folder_with(tmp_path, a_mp4="")
    (tmp_path / "metadata.csv").write_text("path,caption,wieght,zebra\na.mp4,x,2,1\n")
    assert find_footage(tmp_path).tally.notes == ["metadata.csv: not read: wieght (did you mean weight?), zebra"]
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.jsonl").write_text('{"path": "a.mp4", "captoin": "x"}')
    with pytest.raises(ValueError, match=r"line 1 is not .*captoin \(did you mean caption\?\)"):
        find_footage(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"pth": "a.mp4", "caption": "x"}')
    with pytest.raises(ValueError, match=r"line 1 is not .*pth \(did you mean path\?\)"):
        find_footage(tmp_path)


@pytest.mark.parametrize(
    "value",
    [
        '"caption": {"en": "a cat", "zh": "x"}',
        '"captions": [["x", "y"], 7]',
        '"captions": ["x", {"a": 1}]',
        '"text": 7',
    ],
)
def test_captions_that_are_no_text(tmp_path, value):
    """An object, a list in a list or a number is no caption; the error is one line, with file and line number."""
    folder_with(tmp_path, a_mp4="", b_mp4="")
    (tmp_path / "metadata.jsonl").write_text('{"path": "b.mp4", "caption": "x"}\n{"path": "a.mp4", ' + value + "}")
    with pytest.raises(ValueError, match=r"metadata\.jsonl line 2 .*which is no text") as caught:
        find_footage(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "encoding"), [("a cat\n", "utf-16-le"), ("ein Hund\n", "utf-16-be"), ("x", "utf-16"), ("x", "utf-32-le")]
)
def test_utf16(tmp_path, text, encoding):
    """UTF-16, which passes for UTF-8 where it has no mark, is refused in caption files and in tables."""
    folder_with(tmp_path, a_mp4="")
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text"):
        find_footage(tmp_path)
    (tmp_path / "metadata.csv").write_bytes(f"path,caption\na.mp4,{text}".encode(encoding))
    with pytest.raises(ValueError, match=r"metadata\.csv is not UTF-8 text"):
        find_footage(tmp_path)


def test_json_that_is_no_table(tmp_path):
    """A metadata.json that holds something else says what to do."""
    folder_with(tmp_path, a_mp4="", metadata_json='{"licence": "none"}')
    with pytest.raises(ValueError, match=r"metadata\.json is not .*rename it if it is no table"):
        find_footage(tmp_path, caption_missing="empty")
    (tmp_path / "metadata.json").write_text('[{"path": "a.mp4", "caption": "x"}, {"path": ".b.mp4", "caption": "y"}]')
    (tmp_path / ".b.mp4").touch()
    with pytest.raises(ValueError, match=r"metadata\.json line 2 names \.b\.mp4, which is hidden"):
        find_footage(tmp_path)
