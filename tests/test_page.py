"""Pages: all they need is inside them, and no text becomes markup."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from wantrain import page
from wantrain.sampling.gallery import Row, Shown

NASTY = '</p></script><script>alert("x")</script> & \'quotes\' <img src="http://elsewhere/a.png"> 一只猫 🎬 שלום'
VOID = {"meta", "img", "input", "link", "br"}
REPORT = {
    "totals": [(NASTY, 1234.5)], "more_counts": [(f"a: {NASTY}", 3)], "settings": [(NASTY, NASTY)],
    "rejected": 1, "reject_reasons": {NASTY: 1}, "named": [{"name": NASTY, "reason": NASTY}], "named_title": "by name",
    "sizes": {NASTY: 2, "b": 0}, "lengths": {}, "tags": {NASTY: 1}, "size_name": "size", "size_label": "Size",
    "captions": {"0 to 15": 1}, "caption_title": "Captions by words", "caption_unit": "Words", "caption_note": NASTY,
    "clips_note": NASTY,
    "clips": [{"captions": [NASTY], "length": 3, "bucket": NASTY, "frames": 1, "tags": [NASTY, '"'], "weight": 2,
               "source": NASTY, "start": 0.5, "strip": page.data_uri(b"\xff\xd8"), "problem": ""}],
}  # fmt: skip


class Reader(HTMLParser):
    """Tags that are open, all tags, the text seen, and the scripts; raises where tags do not nest."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text, self.scripts = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1] != "style":
            self.text.append(data)


def read(document):
    reader = Reader()
    reader.feed(document)
    reader.close()
    assert reader.open == []
    return reader


def rendered(template):
    if template == "gallery":
        return page.render("gallery", NASTY, rows=[Row(NASTY, NASTY, [Shown('a "b" #1.mp4', NASTY, NASTY)])])
    if template == "report":
        return page.render("report", NASTY, content_key='m "1"', **REPORT)
    if template == "pairs":
        pairs = [{"prompt": NASTY, "files": ['a "b" #1.mp4', "b.mp4"]}]
        return page.render("pairs", NASTY, pairs=pairs, table=NASTY, folder=NASTY)
    return page.render(template, NASTY, data={"prompt": NASTY, "loss": [1.0, math.nan, -math.inf]})


@pytest.mark.parametrize("template", ["gallery", "pairs", "report", "run", "runs"])
def test_text_escaped(template):
    """No text becomes markup, and all of it is there as text or as data."""
    reader = read(rendered(template))
    assert not any("elsewhere" in str(attributes.get("src")) for _, attributes in reader.tags)
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
    assert sum(NASTY in text for text in reader.text) >= {"gallery": 5, "report": 12}.get(template, 2)
    if template in {"run", "runs"}:
        assert page.data_of(rendered(template)) == {"prompt": NASTY, "loss": [1.0, None, None]}


@pytest.mark.parametrize("template", ["gallery", "pairs", "report", "run", "runs"])
def test_page_self_contained(template):
    """A page asks for nothing, and its policy allows exactly its own scripts, by their hashes."""
    reader = read(rendered(template))
    addresses = [attributes["src"] for tag, attributes in reader.tags if "src" in attributes]
    assert all(address.startswith("data:image/jpeg;base64,") or address.endswith(".mp4") for address in addresses)
    assert not any(tag in {"link", "iframe", "object", "embed", "base"} for tag, _ in reader.tags)
    (policy,) = [rule["content"] for _, rule in reader.tags if rule.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "http" not in policy and "connect-src" not in policy
    allowed = re.findall(r"sha256-[\w+/=]+", policy)
    code = [text for text in reader.scripts if not text.startswith(("{", "["))]
    assert code and allowed == [
        f"sha256-{base64.b64encode(hashlib.sha256(c.encode()).digest()).decode()}" for c in code
    ]
    assert "'unsafe-inline'" not in policy.split("script-src")[1] and "'unsafe-eval'" not in policy


def test_file_names_quoted():
    """A video's name with quotes, blanks and signs is one address."""
    reader = read(rendered("gallery"))
    (video,) = [attributes for tag, attributes in reader.tags if tag == "video"]
    assert video["src"] == "a%20%22b%22%20%231.mp4"


@pytest.mark.parametrize("template", ["gallery", "report"])
def test_text_direction(template):
    """Captions, prompts, file names and reasons run in the direction of their script."""
    reader = read(rendered(template))
    own = {"h1", "h2", "figcaption", "td"}
    without = [
        (tag, attributes)
        for tag, attributes in reader.tags
        if tag in own
        and attributes.get("dir") != "auto"
        and not {"number", "bar", "nowrap", "strip"} & set(attributes.get("class", "").split())
    ]
    assert all(tag == "h2" and not attributes for tag, attributes in without), without


def test_content_key():
    """The content key is read back from a page."""
    assert page.content_key_of(rendered("report")) == 'm "1"'
    assert page.content_key_of("<html>") == page.content_key_of(rendered("run")) == ""
    assert page.data_of(rendered("report")) is None and page.data_of("") is None


def test_scripts_write_text():
    """The project's scripts never turn a string into markup or code, and reach for no network."""
    folder = Path(page.__file__).parent / "assets"
    scripts = sorted(folder.glob("*.js"))
    assert len(scripts) >= 10
    for script in scripts:
        code = script.read_text(encoding="utf-8")
        wrong = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|fetch\(|XMLHttp|WebSocket|http"
        assert not re.search(wrong, code), script.name
    assert all(len(file.read_text(encoding="utf-8").splitlines()) <= 400 for file in folder.glob("*.*"))


def test_licence_beside_library():
    """The chart library lies beside its licence, in the version that the first line of its script names."""
    folder = Path(page.__file__).parent / "assets" / "uplot"
    assert "MIT License" in (folder / "LICENSE").read_text(encoding="utf-8")
    assert "uPlot" in (folder / "uPlot.iife.min.js").read_text(encoding="utf-8")[:80]
    assert json.dumps(page.in_words(1234567.5)) == '"1,234,567.5"'
