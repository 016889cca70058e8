"""README has its shape; what it and the other pages tell people to type exists, composes, and, where marked, runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from wantrain import config

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md")), *sorted(ROOT.glob("docs/*.md"))]
PAGES = [*PAGES, *sorted(ROOT.glob("*/README.md")), ROOT / "assets" / "wan-tiny" / "README.md"]
RUN = "# runs in the tests"
COMMANDS = ("caption", "shard", "encode", "train", "sample", "export", "doctor")
#: README's sections, in their order.
SECTIONS = [
    "Status", "Support", "Quick start", "Memory and seconds", "Demo on a CPU", "Your own footage", "Comparison",
    "Five guarantees", "Read on",
]  # fmt: skip
MOST_LINES = 120
#: The largest picture of a page, in bytes: a clone should stay small.
LARGEST_PICTURE = 150_000
#: What a dry run prints and pages quote: a number, its pattern in the output, and the page's own rounding of it.
QUOTED = {
    "model=t2v_a14b expert=low_noise adapter=lora": (r"= ([\d.]+) GB, before activations", "{:.1f} GB"),
    "model=t2v_a14b offload.experts=disk offload.blocks=true": (r"for CUDA = ([\d.]+) GiB", "{:.1f} with"),
}


def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", readme(), flags=re.M | re.S)[1]


def test_readme_sections():
    assert re.findall(r"^## (.+)$", readme(), flags=re.M) == SECTIONS
    assert len(readme().splitlines()) <= MOST_LINES
    opening = readme().split("\n## ")[0].strip().split("\n\n")
    assert re.fullmatch(r"# wantrain", opening[0]) and opening[1].count(". ") == 0 and opening[1].endswith(".")
    assert opening[2].startswith("![")


def test_readme_quick_start():
    """Six commands for the published weights, from footage to files."""
    block = re.search(r"^```bash\n(.*?)^```", section("Quick start"), flags=re.M | re.S)[1]
    programs = [line.split()[1].removesuffix(".py") for line in block.splitlines()]
    assert programs == ["shard", "shard", "encode", "train", "sample", "export"], "captions may be there already"


def test_readme_guarantees():
    """Five, each with a link to a test file."""
    items = re.findall(r"^\d\. (.*?)(?=^\d\. |\Z)", section("Five guarantees"), flags=re.M | re.S)
    assert len(items) == 5
    assert all(re.search(r"\]\(tests/(?:[\w/]+/)?test_\w+\.py\)", item) for item in items), items


def test_readme_comparison():
    """What is said of another project has a link to where its own pages say it; else it is not documented there."""
    rows = [line for line in section("Comparison").splitlines() if line.startswith("|")]
    assert len(rows) > 5
    for row in rows[2:]:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert all(
            cell == "–" or re.fullmatch(r"\[[^\]]+\]\(https://github\.com/[^)]+\)", cell) for cell in cells[2:]
        ), row


def test_pictures_are_small():
    for page in PAGES:
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).stat().st_size < LARGEST_PICTURE, target


def fences(page):
    """The blocks of commands of a page: ```bash or bare ones."""
    return re.findall(r"^```(?:bash|sh)?\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def commands(page):
    """Every command of a page, in blocks and in `backticks`, as words."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in fences(page) for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(
        r"(?<!`)`((?:(?:python|accelerate|make) |wantrain-)[^`]+)`(?!`)",
        re.sub(r"^```.*?^```", "", text, flags=re.M | re.S),
    )
    for line in lines:
        if line.strip().startswith(("python ", "accelerate ", "make ", "torchrun ", "wantrain-")):
            yield from_checkout(shlex.split(line, comments=True))


def from_checkout(words):
    """A command of an install (`wantrain-train`, `python -m wantrain train`) as it is typed in a checkout."""
    if words[0].startswith("wantrain-"):
        return ["python", f"{words[0].removeprefix('wantrain-')}.py", *words[1:]]
    for place in range(len(words) - 2):
        if words[place : place + 2] == ["-m", "wantrain"]:
            return [*words[:place], f"{words[place + 2]}.py", *words[place + 3 :]]
    return words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_compose(page):
    """Every command names a program that exists, and settings that compose."""
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
            settings = [word for word in rest if "=" in word and not word.startswith(("-", "config="))]
            if "-m" in rest:  # a sweep: the first value of each
                settings = [re.sub(r",.*", "", word) for word in settings]
            config.compose(command, settings)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_settings_exist(page):
    """`data.holdout`, `batch_size=32`, ...: dotted keys and key=value in backticks belong to some command."""
    keys = {"hydra.searchpath", "config"}  # Hydra's own; and the settings file, which is no setting
    groups = (
        ["adapter=lora"],
        ["adapter=dora"],
        ["adapter=lokr"],
        ["adapter=partial"],
        ["optimizer=prodigy"],
        ["data=mixed"],
        ["recipe=wan_tiny_vae_images"],
    )
    keys |= {key for command in COMMANDS for key in config._all_keys(config.compose(command))}
    keys |= {key for group in groups for key in config._all_keys(config.compose("train", group))}
    keys |= {group.name for group in (ROOT / "conf").iterdir() if group.is_dir()}
    named = set(re.findall(r'(?<!`)`([a-z_.]+)=[^`"]*`(?!`)', page.read_text(encoding="utf-8")))
    assert sorted(named - keys) == []


def marked():
    """The blocks that say they run here: (page, number, lines)."""
    blocks = [(page, block.splitlines()) for page in PAGES for block in fences(page)]
    return [(page, lines[1:]) for page, lines in blocks if lines and lines[0].strip() == RUN]


def test_marked_blocks():
    """README has one that runs here; few in all, for each takes time."""
    assert any(page == ROOT / "README.md" for page, _ in marked())
    assert len(marked()) <= 3


@pytest.mark.parametrize(
    ("page", "lines"), marked(), ids=lambda value: value[0][:40] if isinstance(value, list) else value.name
)
def test_marked_block_runs(page, lines, tiny, environment, tmp_path):
    """On the small world in the demo's place, with this project's Python as `python`; README quotes what it prints."""
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
    if "dry_run=true" not in " ".join(lines):
        assert len(list((tmp_path / "samples").glob("*.mp4"))) == 1
        return
    assert not (tmp_path / "runs").exists() and not (tmp_path / "samples").exists(), "a dry run makes nothing"
    quoted = [rule for words, rule in QUOTED.items() if any(words in line for line in lines)]
    assert quoted, "no figure of this block is compared with README"
    for pattern, rounded in quoted:
        figures = [rounded.format(float(figure)) for figure in re.findall(pattern, ended.stdout)]
        assert figures and figures[-1] in section("Memory and seconds"), figures
