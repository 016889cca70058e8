"""Templates: what a captioner is asked to write about a clip, one text file each.

A template is a text with {what} ("video" or "picture"), {words} (most words) and, where it names the trigger word,
{trigger}. Those that come with the project lie in templates/.
"""

from __future__ import annotations

import re
import string
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from wantrain.data.footage.captions import read_text

FOLDER = Path(__file__).parent / "templates"
FIELDS = ("what", "words", "trigger")
#: Ends of sentences in Latin and Chinese text.
_SENTENCE_ENDS = re.compile(r"[.!?。！？](?=\s|$)|[。！？]")


@dataclass(frozen=True)
class Template:
    """A template and the values of its fields.

    name     its name, or the file it came from
    text     the text with its fields
    trigger  the word that each caption contains; empty for none
    words    most words that the captioner is asked for

    ValueError for an unknown field, or for a template that names a trigger word where none is given.
    """

    name: str
    text: str
    trigger: str
    words: int

    def __post_init__(self) -> None:
        try:
            fields = {field for _, field, _, _ in string.Formatter().parse(self.text) if field is not None}
        except ValueError as error:
            raise ValueError(f"template={self.name}: {error}; write {{{{ and }}}} for braces that are text") from error
        if wrong := sorted(fields - set(FIELDS)):
            listed = ", ".join(f"{{{field}}}" for field in FIELDS)
            raise ValueError(
                f"template={self.name}: {{{wrong[0]}}} is no field of a template; there are {listed}, and {{{{ stands "
                "for a brace that is text"
            )
        if "trigger" in fields and not self.trigger:
            raise ValueError(
                f"template={self.name} names a trigger word, and trigger= is empty; give trigger=WORD, or another "
                "template"
            )

    def prompt(self, *, is_video: bool) -> str:
        """What the captioner is asked."""
        what = "video" if is_video else "picture"
        return self.text.format(what=what, words=self.words, trigger=self.trigger).strip()

    def finished(self, answer: str, *, is_cut: bool) -> str:
        """The caption in an answer: one line, without quotes around it, with the trigger word as it is written.

        An answer that was cut ends with its last whole sentence, if it has one. Where the answer lacks the trigger
        word, it begins with it. Empty if the answer is.
        """
        line = "".join(" " if unicodedata.category(sign)[0] in "CZ" else sign for sign in answer)
        line = " ".join(line.split()).strip('"“”*').strip()
        if is_cut and (ends := list(_SENTENCE_ENDS.finditer(line))):
            line = line[: ends[-1].end()]
        if not line or not self.trigger:
            return line
        named = re.sub(re.escape(self.trigger), lambda _: self.trigger, line, flags=re.IGNORECASE)
        return named if self.trigger in named else f"{self.trigger}, {named}"


def read_template(name: str, *, trigger: str, words: int) -> Template:
    """The template of this name, or in the file of this name. ValueError if there is neither."""
    own = FOLDER / f"{name}.txt"
    path = own if re.fullmatch(r"\w+", name) and own.is_file() else Path(name)
    if not path.is_file():
        raise ValueError(
            f"template={name} is not there; choose one of {', '.join(names())}, or give a text file of your own"
        )
    return Template(name, read_text(path), " ".join(trigger.split()), words)


def names() -> list[str]:
    """The names of the templates that come with the project."""
    return sorted(path.stem for path in FOLDER.glob("*.txt"))
