"""report.html: totals over everything, a bounded sample of clips, and what text there is, safe and whole."""

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from wantrain import page
from wantrain.data import read_manifest, report
from wantrain.data.report import REPORT, write_report
from wantrain.models import load_vae


def counts(document, title):
    """The rows of the bar chart with this title: name -> count."""
    chart = re.search(rf"<h3>{re.escape(title)}</h3>(.*?)</table>", document, re.DOTALL)[1]
    rows = re.findall(r'<th scope="row">(.*?)</th>.*?<td class="number">([\d,]+)</td>', chart, re.DOTALL)
    return {re.sub(r"<[^>]*>", "", name): int(count.replace(",", "")) for name, count in rows}


def pictures(document):
    found = re.findall(r"data:image/jpeg;base64,([^\"]+)", document)
    return [Image.open(io.BytesIO(base64.b64decode(each))) for each in found]


@pytest.fixture
def folders(tiny, tmp_path):
    for name in ("videos", "latents"):
        shutil.copytree(getattr(tiny, name), tmp_path / name)
        (tmp_path / name / REPORT).unlink(missing_ok=True)
    return tmp_path


def test_video_report(folders):
    """A video report shows every clip and counts all of them."""
    videos = folders / "videos"
    manifest = json.loads((videos / "manifest.json").read_text())
    document = write_report(videos, "video").read_text(encoding="utf-8")
    assert f"videos: {manifest['clips']} video clips" in document
    strips = pictures(document)
    assert len(strips) == manifest["clips"]
    assert {strip.height for strip in strips} == {report.CELL}
    assert sum(np.asarray(strip.convert("L")).std() > 5 for strip in strips) == len(strips), "frames, not grey boxes"
    lengths = counts(document, "Clips by length")
    assert set(lengths) == {"1 frame", "9 frames"} and sum(lengths.values()) == manifest["clips"]
    assert sum(counts(document, "Clips by size (height x width)").values()) == manifest["clips"]
    assert document.index("<h2>Rejects</h2>") < document.index("<h2>Clips</h2>")


def test_latent_report(folders, tiny):
    """A latent report decodes clips only on demand and counts the tokens of captions."""
    latents = folders / "latents"
    text = write_report(latents, "latent").read_text(encoding="utf-8")
    assert pictures(text) == [] and "report=decode shows them" in text and "Captions by words" in text
    clips = json.loads((latents / "manifest.json").read_text())["clips"]
    vae = load_vae(tiny.base)
    samples = report._samples(latents, read_manifest(latents, "latent"))
    captions = [caption for sample in samples for caption in report.captions_of(sample.about)]
    long = captions[0]
    how = {"decode": vae.decode, "count_tokens": lambda caption: 513 if caption == long else 512}
    document = write_report(latents, "latent", **how).read_text(encoding="utf-8")
    assert len(pictures(document)) == clips == len(captions) > captions.count(long) > 0
    assert f"{captions.count(long)} of {clips} are longer than 512 tokens and are cut there" in document
    assert "the longest has 513 tokens" in document


def test_report_once(folders):
    """The same folder is reported once, and its report does not depend on the time."""
    videos = folders / "videos"
    write_report(videos, "video")
    before = (videos / REPORT).read_bytes()
    assert write_report(videos, "video") is None
    (videos / REPORT).unlink()
    write_report(videos, "video")
    assert (videos / REPORT).read_bytes() == before, "nothing in it depends on when it was made"


def test_large_set(folders, monkeypatch):
    """The report of a large set shows a fixed sample of clips, with totals over all of them."""
    videos = folders / "videos"
    everything = write_report(videos, "video").stat().st_size
    monkeypatch.setattr(report, "SHOWN", 3)
    monkeypatch.setattr(report, "LISTED", 5)
    (videos / REPORT).unlink()
    document = write_report(videos, "video").read_text(encoding="utf-8")
    clips = json.loads((videos / "manifest.json").read_text())["clips"]
    assert len(pictures(document)) == 3 and document.count("<tr data-bucket=") == 5
    assert f"5 of {clips} clips, chosen by hash. The first 3 have a filmstrip." in document
    assert len(document) < everything


def test_rejects(folders):
    """Rejects are counted by reason, and their names are escaped."""
    videos = folders / "videos"
    rows = [{"name": f"<b>{i}</b>.mp4", "reason": "no caption" if i % 3 else "the file is <empty>"} for i in range(500)]
    (videos / "rejects.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = write_report(videos, "video").read_text(encoding="utf-8")
    assert "<b>0" not in document and "&lt;b&gt;0&lt;/b&gt;.mp4" in document
    assert counts(document, "500 by reason") == {"no caption": 333, "the file is &lt;empty&gt;": 167}
    assert "the first 200 of 500 by name" in document


def test_captions_and_stats():
    """Several captions and the numbers of the stats are shown if they are there."""
    about = {"captions": ["one", {"text": "two"}], "caption": "one"}
    assert report.captions_of(about) == ["one", "two"]
    assert report.captions_of({"caption": "just one"}) == ["just one"] and report.captions_of({}) == [""]
    stats = {"clips": 3, "schema": 1, "seconds": {"given": 12.345, "used": 4}, "ok": True, "files_seen": 2}
    assert dict(report._numbers(stats)) == {"seconds: given": 12.35, "seconds: used": 4, "files_seen": 2}


def test_unreadable_clip(folders, monkeypatch):
    """The page is written with the reason for a clip that cannot be read."""

    def broken(*_):
        raise ValueError("cannot be decoded, <damaged>")

    monkeypatch.setattr(report, "_window", broken)
    document = write_report(folders / "videos", "video").read_text(encoding="utf-8")
    assert "cannot be shown: cannot be decoded, &lt;damaged&gt;" in document and page.content_key_of(document)
