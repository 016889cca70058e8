"""What README and docs tell people to type exists, composes, and, where it says so, runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from wantrain import config

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md")), *sorted(ROOT.glob("docs/*.md"))]
PAGES = [page for page in [*PAGES, ROOT / "launch" / "README.md", ROOT / "assets" / "README.md"] if page.is_file()]
RUN = "# runs in the tests"
COMMANDS = ("shard", "encode", "train", "sample", "export")


def fences(page):
    """The blocks of commands of a page: ```bash or bare ones."""
    return re.findall(r"^```(?:bash|sh)?\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def commands(page):
    """Every command of a page, in blocks and in `backticks`, as words."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in fences(page) for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(
        r"(?<!`)`((?:python|accelerate|make) [^`]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    )
    for line in lines:
        if line.strip().startswith(("python ", "accelerate ", "make ", "torchrun ")):
            yield shlex.split(line, comments=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_names_a_program_that_exists_and_settings_that_compose(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for words in commands(page):
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, words
            continue
        programs = [word for word in words if word.endswith(".py")]
        if words[:2] in (["accelerate", "config"], ["accelerate", "env"]) or words == ["accelerate", "launch"]:
            continue
        assert len(programs) == 1, words
        assert (ROOT / programs[0]).is_file(), words
        command = programs[0].removesuffix(".py")
        if command in COMMANDS:
            rest = words[words.index(programs[0]) + 1 :]
            settings = [word for word in rest if "=" in word and not word.startswith("-")]
            config.compose(command, settings)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_setting_named_in_the_text_exists(page):
    """`data.holdout`, `batch_size=32`, ...: dotted keys and key=value in backticks belong to some command."""
    known = {key for command in COMMANDS for key in config._all_keys(config.compose(command))}
    for adapter in ("lora", "dora", "partial"):
        known |= set(config._all_keys(config.compose("train", [f"adapter={adapter}"])))
    known |= set(config._all_keys(config.compose("train", ["recipe=wan_tiny_vae_images"])))
    for said in re.findall(r'(?<!`)`([a-z_.]+)=[^`"]*`(?!`)', page.read_text(encoding="utf-8")):
        assert said in known, f"{page.name}: {said}="


def marked():
    """The blocks that say they run here: (page, number, lines)."""
    blocks = [(page, block.splitlines()) for page in PAGES for block in fences(page)]
    return [(page, lines[1:]) for page, lines in blocks if lines and lines[0].strip() == RUN]


def test_some_block_of_the_readme_runs_here():
    assert any(page.name == "README.md" for page, _ in marked())


@pytest.mark.parametrize(
    ("page", "lines"), marked(), ids=lambda value: value[0][:40] if isinstance(value, list) else value.name
)
def test_a_marked_block_runs_as_it_stands(page, lines, tiny, environment, tmp_path):
    """On the small world in the demo's place, with this project's Python as `python`."""
    for name, target in (("data/wug/footage", tiny.footage), ("data/demo/latents", tiny.latents)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(target)
    for program in [*COMMANDS, "demo"]:
        (tmp_path / f"{program}.py").symlink_to(ROOT / f"{program}.py")
    path = f"{Path(sys.executable).parent}:{environment['PATH']}"
    ended = subprocess.run(
        ["bash", "-euc", "\n".join(lines)],
        cwd=tmp_path, env={**environment, "PATH": path}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    if "dry_run=true" in " ".join(lines):
        told = "a 16 GB card" if "sample.py" in " ".join(lines) else "samples per step"
        assert told in ended.stdout and not list((tmp_path / "runs").glob("tiny_*"))
    elif "sample.py" in " ".join(lines):
        assert len(list((tmp_path / "samples").glob("*.mp4"))) == 1
