"""The table and the page of captions, and the edited table written back."""

import csv
import io
import json
import re

import pytest
from PIL import Image

from wantrain.data.captioning.records import Record, Records
from wantrain.data.captioning.review import apply_table, write_review
from wantrain.data.footage.decode_workers import DecodeOptions


def count(caption):
    return len(caption.split())


def review(source, *, pictures=False):
    return write_review(source, count, DecodeOptions(1), pictures=pictures)[0]


def rows_of(table):
    return list(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8-sig"), newline="")))


def save(table, rows, *, delimiter=",", encoding="utf-8", columns=None):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns or list(rows[0]), delimiter=delimiter, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    table.write_bytes(text.getvalue().encode(encoding))


@pytest.fixture
def source(tmp_path):
    """Four pictures: captioned by the command, by a person, in a table, not at all."""
    folder = tmp_path / "footage"
    folder.mkdir()
    for level, name in enumerate("abcd"):
        Image.new("RGB", (32, 24), (60 * level,) * 3).save(folder / f"{name}.png")
    Records(folder).add(Record("a.png", "a model's, with a comma", "caption.py"))
    (folder / "a.txt").write_text("a model's, with a comma\n")
    (folder / "b.txt").write_text("mine\n")
    (folder / "metadata.csv").write_text("path,caption\nc.png,in the table\n")
    return folder


def test_table(source):
    """A row for each file, in shard.py's order, with the caption, its tokens and who wrote it."""
    rows = [{key: row[key] for key in ("path", "caption", "tokens", "by")} for row in rows_of(review(source))]
    assert [tuple(row.values()) for row in rows] == [
        ("a.png", "a model's, with a comma", "5", "caption.py"),
        ("b.png", "mine", "1", "person"),
        ("c.png", "in the table", "3", "table"),
        ("d.png", "", "0", "none"),
    ]


@pytest.mark.parametrize(("delimiter", "encoding"), [(",", "utf-8"), (";", "utf-8-sig"), ("\t", "utf-8")])
def test_edited_rows(delimiter, encoding, source):
    """Edited rows are written and count as a person's; the others are left alone, also where rows are missing."""
    table = review(source)
    rows = rows_of(table)
    rows[0]["caption"], rows[3]["caption"] = "edited; 猫,\n two lines", "new"
    save(table, [rows[3], rows[0]], delimiter=delimiter, encoding=encoding)
    before = (source / "b.txt").stat().st_mtime_ns
    assert apply_table(source, table) == ["d.png", "a.png"]
    assert (source / "a.txt").read_text() == "edited; 猫, two lines\n" and (source / "d.txt").read_text() == "new\n"
    assert (source / "b.txt").stat().st_mtime_ns == before
    assert [row["by"] for row in rows_of(review(source))] == ["person", "person", "table", "person"]
    assert apply_table(source, table) == [], "the rows are what is there"


def test_persons_text_is_kept_in_the_record(source):
    table = review(source)
    rows = rows_of(table)
    rows[1]["caption"] = "mine, better"
    save(table, rows)
    apply_table(source, table)
    recorded = [json.loads(line)["caption"] for line in (source / "captions.jsonl").read_text().splitlines()]
    assert recorded[-2:] == ["mine", "mine, better"]


def test_text_changed_since(source):
    """A text file that was changed after the table was written is not overwritten, unless the row was not edited."""
    table = review(source)
    (source / "b.txt").write_text("mine, newer\n")
    assert apply_table(source, table) == []
    rows = rows_of(table)
    rows[0]["caption"], rows[1]["caption"] = "edited", "edited too"
    save(table, rows)
    with pytest.raises(
        ValueError, match=r"line 3: b.txt was changed after the table was written; .* Nothing was written"
    ):
        apply_table(source, table)
    assert (source / "b.txt").read_text() == "mine, newer\n" and (source / "a.txt").read_text().startswith("a model's")


def test_wrong_rows(source):
    """All that is wrong with a table is said at once, and nothing is written."""
    table = review(source)
    rows = rows_of(table)
    rows[0]["caption"], rows[2]["caption"] = "", "edited"
    save(table, [*rows, rows[1], {**rows[0], "path": "z.png"}])
    with pytest.raises(ValueError) as caught:
        apply_table(source, table)
    for words in (
        "line 2: a.png has no caption; write one",
        "line 4: the caption of c.png stands in metadata.csv, which shard.py reads first; edit it there",
        "line 6 names b.png for the second time",
        "line 7 names z.png, which is no footage below",
    ):
        assert words in str(caught.value)
    assert (source / "a.txt").read_text().startswith("a model's")
    save(table, rows, columns=["path", "tokens"])
    with pytest.raises(ValueError, match="has no column caption; its columns must be path, caption, tokens, by, seen"):
        apply_table(source, table)
    with pytest.raises(ValueError, match=r"apply=nowhere.csv is not there; .* review=true writes a table"):
        apply_table(source, source.__class__("nowhere.csv"))


def test_page(source):
    """The page shows each file with its caption as text, and asks nothing of a network."""
    (source / "b.txt").write_text("<script>alert(1)</script> 猫\n")
    (source / "e.png").write_bytes(b"no picture")
    (source / "e.txt").write_text("of a damaged file\n")
    _, path = write_review(source, lambda caption: 513, DecodeOptions(1))
    text = path.read_text(encoding="utf-8")
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)&lt;/script&gt; 猫" in text
    assert text.count("data:image/jpeg;base64,") == 4 and "http://" not in text and "https://" not in text
    assert "cannot be read as an image" in text and text.count('class="number bad"') == 4
    facts = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text)
    assert dict(facts) == {
        "files": "5", "by caption.py": "1", "by a person": "2", "in metadata.csv": "1", "without a caption": "1",
        "more than 512 tokens": "4",
    }  # fmt: skip
    assert text.count("<textarea") == 4, "a caption in a table is edited there"
