"""What a captioner is asked, and what becomes of its answer."""

import pytest

from wantrain.data.captioning.templates import Template, names, read_template


@pytest.mark.parametrize("name", names())
def test_shipped_templates(name):
    """Every template says what is shown and how long a caption may be; character also names the trigger word."""
    template = read_template(name, trigger="wug" if name == "character" else "", words=60)
    for is_video, what in ((True, "this video"), (False, "this picture")):
        prompt = template.prompt(is_video=is_video)
        assert what in prompt and "60 words" in prompt and "{" not in prompt
    assert ("wug" in template.prompt(is_video=True)) == (name == "character")


def test_four_purposes():
    assert names() == ["character", "motion", "plain", "style"]


def test_own_template(tmp_path):
    """A text file is a template of its own; fields that there are not, and single braces, are refused."""
    path = tmp_path / "mine.txt"
    path.write_text("Say in {words} words what {trigger} does in this {what}. {{}}\n", encoding="utf-8")
    template = read_template(str(path), trigger=" a  wug ", words=5)
    assert template.prompt(is_video=False) == "Say in 5 words what a wug does in this picture. {}"
    path.write_text("Say what {subject} does")
    with pytest.raises(ValueError, match=r"\{subject\} is no field of a template; there are \{what\}, \{words\}"):
        read_template(str(path), trigger="", words=5)
    path.write_text("Say what } does")
    with pytest.raises(ValueError, match=r"write \{\{ and \}\} for braces"):
        read_template(str(path), trigger="", words=5)


def test_wrong_templates():
    with pytest.raises(
        ValueError, match="template=charcter is not there; choose one of character, motion, plain, style"
    ):
        read_template("charcter", trigger="", words=5)
    with pytest.raises(ValueError, match="template=character names a trigger word, and trigger= is empty"):
        read_template("character", trigger=" ", words=5)


@pytest.mark.parametrize(
    ("answer", "is_cut", "trigger", "caption"),
    [
        ('  "A cat\n sits.\x00"  ', False, "", "A cat sits."),
        ("**A cat sits.**", False, "", "A cat sits."),
        ("A cat sits. It looks up and th", True, "", "A cat sits."),
        ("一只猫坐着。它抬头看", True, "", "一只猫坐着。"),
        ("A cat of 2.5 kg si", True, "", "A cat of 2.5 kg si"),
        ("A cat sits. It looks up", False, "", "A cat sits. It looks up"),
        ("WUG1 sits on a roof.", False, "wug1", "wug1 sits on a roof."),
        ("A cat sits.", False, "wug1", "wug1, A cat sits."),
        (r"A (w\1) sits.", False, r"(W\1)", r"A (W\1) sits."),
        ("\u200b \n", False, "wug1", ""),
    ],
)
def test_finished_caption(answer, is_cut, trigger, caption):
    """One line without quotes and control characters; cut after a sentence; with the trigger word as it is written."""
    assert Template("plain", "{what}", trigger, 5).finished(answer, is_cut=is_cut) == caption
