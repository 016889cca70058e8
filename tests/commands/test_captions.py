"""caption.py with a tiny model: captions that shard.py reads, the review, and its errors."""

import csv
import json

import pytest
from tiny_vlm import write_llava

from wantrain.demo.footage import make_footage


@pytest.fixture
def footage(tmp_path):
    """Two clips and a picture without captions."""
    folder = tmp_path / "footage"
    make_footage(folder, num_videos=2, num_images=1, size=32)
    for path in (*folder.glob("*.txt"), *folder.glob("metadata*")):
        path.unlink()
    return folder


def test_captions_to_shards(footage, call, tmp_path):
    """Footage without captions is captioned, read, edited in the table, and cut into shards with those captions."""
    write_llava(tmp_path / "captioner")
    assert "3 of 3 files have no caption" in call("shard.py", "source=footage", "out=videos", check=False).error
    words = ("source=footage", "captioner=captioner", "device=cpu", "precision=fp32", "max_tokens=12", "batch_size=2")
    said = call("caption.py", *words, "trigger=wug", "template=character", "frames.most=3").stdout
    assert "3 files = 3 captioned now" in said and "device: cpu" in said
    captions = {path.stem: path.read_text(encoding="utf-8").strip() for path in footage.glob("*.txt")}
    assert len(captions) == 3 and all("wug" in caption for caption in captions.values())
    assert "3 captioned before" in call("caption.py", *words).stdout
    assert (
        "wrote footage/captions.csv and footage/captions.html"
        in call("caption.py", "source=footage", "review=true").stdout
    )
    with (footage / "captions.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    rows[0]["caption"] = "a wug, as a person sees it"
    with (footage / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert "1 captions of 3 files changed" in call("caption.py", "source=footage", "apply=footage/captions.csv").stdout
    said = call("caption.py", *words, "recaption=own").stdout
    assert "2 captioned now + 1 with a person's caption" in said
    call("shard.py", "source=footage", "out=videos", "num_frames=9")
    manifest = json.loads((tmp_path / "videos" / "manifest.json").read_text())
    assert manifest["files_used"] == 3 and manifest["beside"]["ignored"]["files of caption.py"] == 3
    assert (footage / f"{rows[0]['path'].rpartition('.')[0]}.txt").read_text() == "a wug, as a person sees it\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("template=character",), "template=character names a trigger word, and trigger= is empty; give trigger=WORD"),
        (("captioner=nowhere",), "captioner=nowhere is not there; give a model's folder, or a repository of the hub"),
        (("review=true", "words=5"), "words has no effect: review=true only writes"),
        (("recaption=mine",), "recaption=mine is unknown; choose one of none, own, all"),
        (("weights=null",), "holds no tokenizer; give weights=FOLDER with one, or parts.tokenizer="),
        (("apply=t.csv",), "apply=t.csv is not there"),
    ],
)
def test_caption_errors(words, message, footage, call):
    """What is wrong is one line with the fix, and nothing is written."""
    assert message in call("caption.py", "source=footage", *words, check=False).error
    assert not list(footage.glob("*.txt")) and not (footage / "captions.jsonl").exists()
