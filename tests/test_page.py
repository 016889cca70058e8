"""Pages: all they need is inside them, and no text becomes markup."""

import re
from html.parser import HTMLParser

import pytest

from wantrain import page
from wantrain.page import Row, Shown

NASTY = '</p><script>alert("x")</script> & \'quotes\' <img src="http://elsewhere/a.png"> 一只猫 🎬 שלום'


class Reader(HTMLParser):
    """Tags that are open and the text seen; raises where tags do not nest."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data):
        self.text.append(data)


def read(document):
    reader = Reader()
    reader.feed(document)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture
def document():
    row = Row(NASTY, NASTY, [Shown('a "b" #1.mp4', NASTY, NASTY)], [Shown("old.mp4", "old")], NASTY)
    pieces = [
        page.section(NASTY, NASTY, page.table((NASTY, "n"), [(NASTY, 1234.5)]), page.bars(NASTY, {NASTY: 3, "b": 0})),
        page.figure(page.picture(b"\xff\xd8", NASTY), NASTY, NASTY),
        page.comparison([row]),
    ]
    return page.page(NASTY, *pieces, content_key='m "1"')


def test_text_escaped(document):
    """No text becomes markup, and all of it is shown."""
    reader = read(document)
    scripts = [text for text in reader.text if "alert" in text and "<script>" not in text]
    assert scripts == [] and sum(tag == "script" for tag, _ in reader.tags) == 1
    assert sum(NASTY in text for text in reader.text) >= 12
    assert not any(attributes.get("src", "").startswith("http") for _, attributes in reader.tags)


def test_page_self_contained(document):
    """A page requests nothing from the network."""
    reader = read(document)
    sources = [attributes["src"] for _, attributes in reader.tags if "src" in attributes]
    assert sources == ["data:image/jpeg;base64,/9g=", "a%20%22b%22%20%231.mp4", "old.mp4"]
    assert not any(attributes.get("href") for _, attributes in reader.tags)
    (rules,) = [told["content"] for _, told in reader.tags if told.get("http-equiv") == "Content-Security-Policy"]
    assert rules.startswith("default-src 'none'") and "http" not in rules


def test_text_direction(document):
    """Text runs in the direction of its script: every element of text has dir=auto."""
    told = [
        (tag, attributes) for tag, attributes in read(document).tags if tag in {"h1", "h2", "p", "td", "figcaption"}
    ]
    without = [
        tag for tag, attributes in told if attributes.get("dir") != "auto" and attributes.get("class") != "number"
    ]
    assert len(told) > 10 and set(without) <= {"p", "figcaption"} and without.count("p") == 1, "the button's own"


def test_content_key_and_bar_chart(document):
    """The content key is read back from a page, and the bars of a chart are to scale."""
    assert page.content_key_of(document) == 'm "1"'
    assert page.content_key_of("<html>") == page.content_key_of(page.page("x")) == ""
    widths = re.findall(r'width="([\d.]+)" height="13"', page.bars("t", {"a": 4, "b": 1, "c": 0}))
    assert [float(width) for width in widths] == [420, 105, 0]
    assert "<rect" not in page.bars("t", {})


def test_page_without_videos():
    """A page without videos has no script and no button."""
    assert "<script" not in page.page("t", "words") and "<button" not in page.page("t", "words")
