"""captions.jsonl: who wrote a caption, and a file that a kill cut short."""

import json

import pytest

from wantrain.data.captioning.records import Record, Records


def test_authors(tmp_path):
    """The last record with a caption says who wrote it; a caption without a record is a person's."""
    records = Records(tmp_path)
    records.add(Record("a.mp4", "one", "caption.py", made_from="1"))
    records.add(Record("a.mp4", "two", "caption.py", made_from="2"))
    records.add(Record("a.mp4", "one", "person"))
    for each in (records, Records(tmp_path)):
        assert each.author("a.mp4", "two").by == "caption.py"
        assert each.author("a.mp4", "one").by == "person"
        assert each.author("a.mp4", "three") is None and each.author("b.mp4", "one") is None
        assert each.made("2").caption == "two" and each.made("3") is None
    rows = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert [row["caption"] for row in rows] == ["one", "two", "one"] and all(row["date"] for row in rows)


def test_line_cut_short(tmp_path):
    """Whatever number of a last line's bytes a kill leaves, that line is gone and the next one is whole."""
    file = tmp_path / "captions.jsonl"
    Records(tmp_path).add(Record("a.mp4", "one", "caption.py"))
    whole = file.stat().st_size
    Records(tmp_path).add(Record("b.mp4", "一只猫", "caption.py"))
    content = file.read_bytes()
    for size in range(whole, len(content)):
        file.write_bytes(content[:size])
        records = Records(tmp_path)
        assert records.author("a.mp4", "one") and not records.author("b.mp4", "一只猫")
        records.add(Record("c.mp4", "three", "person"))
        again = Records(tmp_path)
        assert again.author("a.mp4", "one") and again.author("c.mp4", "three")


@pytest.mark.parametrize("line", ["no json", "[1]", '{"path": "a"}', '{"path": 1, "caption": "b", "by": "person"}'])
def test_damaged_records(line, tmp_path):
    (tmp_path / "captions.jsonl").write_text(f"{line}\n")
    with pytest.raises(ValueError, match=r"captions.jsonl line 1 is no record of caption.py .* move the file away"):
        Records(tmp_path)
