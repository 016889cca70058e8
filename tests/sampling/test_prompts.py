"""Prompt files as people have them: each line is handled, or there is one clear error."""

import pytest

from wantrain.models import load_text_encoder
from wantrain.sampling import read_prompts
from wantrain.sampling.prompts import Job, list_jobs

ODD = {
    "Chinese": "一只猫，在草地上奔跑。",
    "emoji": "a cat 🐈\u200d⬛ with 👩‍👩‍👧 and 🎬",
    "right to left": "חתול רץ על הדשא, قط يركض",
    "line separators inside": "one\u2028two\u0085three\x0bfour".replace("\x0b", " "),
    "like markup": "<b>$x</b> & ${oc.env:HOME} 'a' \"b\" \\n",
    "2000 words": " ".join(["word"] * 2000),
}


@pytest.mark.parametrize("kind", [kind for kind in ODD if kind != "line separators inside"])
def test_odd_lines_unchanged(kind, tmp_path):
    """Odd lines are read unchanged; a byte order mark and empty lines are dropped."""
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbf" + f"\r\n  \n{ODD[kind]}\r\n\n\t\nplain".encode())
    assert read_prompts(file) == [ODD[kind], "plain"]


def test_line_feed_alone_ends_line(tmp_path):
    """Only a line feed ends a line; a Unicode line separator does not."""
    (tmp_path / "p.txt").write_text("one\u2028two\nthree", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == ["one\u2028two", "three"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no prompt; write one per line"),
        (b" \n\r\n\t\n", "holds no prompt"),
        ("eins\nzwölf".encode("latin-1"), "line 2, is not UTF-8 text"),
        ("ein Hund".encode("utf-16"), "line 1, is not UTF-8"),
        ("ein Hund".encode("utf-16-le"), "line 1, holds the control character U+0000"),
        (b"a\n\x89PNG\r\n\x1a\n", "line 2, is not UTF-8"),
        (b"a\nb \x1b[0m", "line 2, holds the control character U+001B"),
    ],
)
def test_bad_prompt_file(content, said, tmp_path):
    """A file that holds no prompt or no UTF-8 text is one clear error."""
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(ValueError, match="the prompt file") as error:
        read_prompts(tmp_path / "p.txt")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_long_prompt_warning(tiny, capsys):
    """A warning states how many tokens a long prompt loses."""
    encoder = load_text_encoder(tiny.base)
    prompt = ODD["2000 words"]
    tokens = encoder.count(prompt)
    assert tokens > 2000 and encoder.encode_unpadded([prompt])[0].shape[0] == 512
    assert f"a prompt of {tokens} tokens is cut to 512 ({tokens - 512} lost): 'word word" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ODD)
def test_every_script_gives_embeddings(kind, tiny):
    (text,) = load_text_encoder(tiny.base).encode_unpadded([ODD[kind]])
    assert text.isfinite().all() and text.std() > 0


def test_jobs_by_prompt_and_seed(capsys):
    """Each prompt gets each seed, and a repeated prompt is sampled once."""
    jobs = list_jobs(["a", "b", "a"], seed=5, count=2)
    assert jobs == [Job(0, "a", 5), Job(1, "a", 6), Job(2, "b", 5), Job(3, "b", 6)]
    assert "1 of 3 prompts come more than once; each is made once" in capsys.readouterr().out
