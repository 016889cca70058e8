"""README has its shape; what it and the other pages tell people to type exists, composes, and, where marked, runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from wantrain import checks, config
from wantrain.losses import FlowMatching
from wantrain.settings import kinds, words
from wantrain.settings.schema import COMMANDS as KINDS

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md")), *sorted(ROOT.glob("docs/*.md"))]
PAGES = [*PAGES, *sorted(ROOT.glob("*/README.md")), ROOT / "assets" / "wan-tiny" / "README.md"]
#: Pages that tell how things were: settings that they name may have been renamed.
HISTORY = {ROOT / "docs/log.md", ROOT / "docs/log-archive.md"}
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


def spans(page):
    """What stands in `backticks` outside blocks, each on one line."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]


def commands(page):
    """Every command of a page, in blocks and in `backticks`, as words; `... train.py` begins with python."""
    lines = [line for block in fences(page) for line in block.replace("\\\n", " ").splitlines()]
    lines += [span for span in spans(page) if " " in span]
    for line in (re.sub(r"^\.\.\. (?=\w+\.py)", "python ", line.strip()) for line in lines):
        if line.startswith(("python ", "accelerate ", "make ", "torchrun ", "bash ", "sbatch ", "pip ", "wantrain-")):
            yield from_checkout(shlex.split(line, comments=True))


def from_checkout(line):
    """A command of an install (`wantrain-train`, `python -m wantrain train`) as it is typed in a checkout."""
    if line[0].startswith("wantrain-"):
        return ["python", f"{line[0].removeprefix('wantrain-')}.py", *line[1:]]
    for place in range(len(line) - 2):
        if line[place : place + 2] == ["-m", "wantrain"]:
            return [*line[:place], f"{line[place + 2]}.py", *line[place + 3 :]]
    return line


def accepted(command, settings):
    """Raise ValueError unless a command takes these settings: keys, values, what goes together, what has an effect."""
    cfg = config.compose(command, settings)
    for key in OmegaConf.missing_keys(cfg):  # of other work, as encode.py check=true
        OmegaConf.update(cfg, key, "DIR")
    given = config.keys_of([words.quoted(word) for word in words.expanded(settings)])
    checks.check(cfg, given=given, processes=cfg.get("sequence_parallel", 1))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_are_accepted(page):
    """Every command names a program that exists, options that it has, and settings that it takes."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), flags=re.M))
    for line in commands(page):
        first, *rest = line
        if first == "make":
            assert {word for word in rest if "=" not in word} <= targets, line
            continue
        if first == "pip":
            assert set(re.findall(r"wantrain\[(\w+)\]", " ".join(rest))) <= extras, line
            continue
        if line[:2] in (["accelerate", "config"], ["accelerate", "env"]) or line == ["accelerate", "launch"]:
            continue
        programs = [word for word in line if word.endswith((".py", ".sh", ".sbatch"))]
        assert len(programs) == 1 and (ROOT / programs[0]).is_file(), line
        for file in (word for word in line if word.startswith(("launch/", "benchmarks/"))):
            assert (ROOT / file).is_file(), file
        name, given = programs[0], rest[rest.index(programs[0]) + 1 :]
        command = "train" if name in {"launch/pair.sh", "launch/node.sh"} else name.removesuffix(".py")
        command = Path(name).stem if name.endswith(".sbatch") else command
        if command not in COMMANDS:
            text = (ROOT / name).read_text(encoding="utf-8")
            assert [word for word in given if word.startswith("--") and f'"{word}"' not in text] == [], line
            continue
        settings = [word for word in given if "=" in word and not word.startswith(("-", "config="))]
        if "-m" in given:  # a sweep: the first value of each
            settings = [re.sub(r",.*", "", word) for word in settings]
        if not any(word.startswith("replay=") for word in settings):  # which takes the settings of a run
            accepted(command, settings)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        (["bach_size=8"], "bach_size"),
        (["batch_size=some"], "batch_size"),
        (["batch_size=3", "accumulate=2"], "accumulate"),
        (["expert=low_noise", "experts.offload=cpu"], "experts.offload has no effect"),
    ],
    ids=["key", "value", "together", "effect"],
)
def test_wrong_commands(settings, found):
    """The check of commands finds what is wrong with them."""
    with pytest.raises(Exception, match=found):
        accepted("train", settings)


def test_wrong_values():
    """The check of settings finds a value that no command takes, and an option that there is not."""
    assert wrong_value("recompute", "attention") is wrong_value("recipe", "character,lora_24gb") is None
    assert "recompute=blocks" in wrong_value("recompute", "blocks")
    assert wrong_value("adapter", "loha") and wrong_value("batch_size", "0")


#: key=value in backticks; the value in brackets or quotes, or without a blank.
SETTING = re.compile(
    r"""(?<![\w./+-])([a-z][\w.]*)=('[^']*'|"[^"]*"|\{(?:\{[^}]*\}|[^{}])*\}|\[(?:\[[^\]]*\]|[^\[\]])*\]|[^\s"'{\[]\S*|)"""
)
#: What stands for a value.
STAND_IN = re.compile(r"\b[A-Z]+[0-9]?\b|\.\.\.|://")


def wrong_value(key, value):
    """What is wrong with a value of a key or a group of options; None if some command takes it."""
    choices = config._choices()
    for word in words.expanded([f"{key}={value}"]):
        words.refuse_choices([word], choices)
        given = OverridesParser.create().parse_override(words.quoted(word))
        name, read = given.key_or_group, given.value()
        if name in choices:
            if unknown := {str(each) for each in (read if isinstance(read, list) else [read])} - set(choices[name]):
                return f"{name}: {unknown}"
            continue
        possible = [of_command[name] for of_command in KINDS.values() if name in of_command]
        if possible and not any(kinds.fits(read, kind) for kind in possible):
            return kinds.problem(name, read, possible[0])
    return None


@pytest.fixture(scope="module")
def known():
    """Every key of every command, and every group of options."""
    groups = [[f"{group}={option}"] for group in ("adapter", "optimizer") for option in config._choices()[group]]
    groups += [["data=mixed"], ["data=pairs", "loss=preference"], ["recipe=wan_tiny_vae_images"]]
    keys = {"hydra.searchpath", "mixed_precision", "config"}  # of Hydra, of accelerate, and a settings file
    keys |= {key for command in COMMANDS for key in config._all_keys(config.compose(command))}
    keys |= {key for group in groups for key in config._all_keys(config.compose("train", group))}
    return keys | {group.name for group in (ROOT / "conf").iterdir() if group.is_dir()}


@pytest.mark.parametrize("page", [page for page in PAGES if page not in HISTORY], ids=lambda page: page.name)
def test_settings_exist(page, known):
    """`data.holdout=`, `batch_size=32`, ...: keys belong to some command, and values are such as it takes."""
    calls = re.compile(r"\w+\(")  # of Python
    named = [found for span in spans(page) if not calls.match(span) for found in SETTING.findall(span)]
    assert sorted({key for key, _ in named} - known) == []
    given = {(key, value) for key, value in named if value and not STAND_IN.search(value)}
    assert [wrong for pair in sorted(given) if (wrong := wrong_value(*pair))] == []


def test_noise_table():
    """The shares of draws below sigma 0.3 that the page of questions quotes."""
    text = (ROOT / "docs/faq.md").read_text(encoding="utf-8")
    head, row = (re.search(rf"^\| {first}.*$", text, flags=re.M)[0] for first in ("`experts", "below sigma 0.3"))
    shifts, quoted = re.findall(r"\| (\d+)", head), [int(share) for share in re.findall(r"(\d+) %", row)]
    boundary = config.compose("train", ["model=t2v_a14b"]).model.boundary
    computed = [FlowMatching(shift=float(shift), low=0.0, high=boundary).noise.share_below(0.3) for shift in shifts]
    assert len(shifts) == 4 and quoted == [round(100 * share) for share in computed]


def marked():
    """The blocks that say they run here: (page, number, lines)."""
    blocks = [(page, block.splitlines()) for page in PAGES for block in fences(page)]
    return [(page, lines[1:]) for page, lines in blocks if lines and lines[0].strip() == RUN]


def test_marked_blocks():
    """README has one that runs here; few in all, for each takes time."""
    assert any(page == ROOT / "README.md" for page, _ in marked())
    assert len(marked()) <= 4


@pytest.mark.parametrize(
    ("page", "lines"),
    [pytest.param(*block, marks=[pytest.mark.slow] if len(block[1]) > 2 else []) for block in marked()],
    ids=lambda value: value[0][:40] if isinstance(value, list) else value.name,
)
def test_marked_block_runs(page, lines, tiny, environment, python, tmp_path):
    """On the small world in the demo's place, with this project's Python as `python`; README quotes what it prints."""
    for name, target in (("FOOTAGE", tiny.footage), ("data/demo/latents", tiny.latents)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(target)
    for program in [*COMMANDS, "demo"]:
        (tmp_path / f"{program}.py").symlink_to(ROOT / f"{program}.py")
    path = f"{Path(python).parent}:{Path(sys.executable).parent}:{environment['PATH']}"
    ended = subprocess.run(
        ["bash", "-euc", "\n".join(lines)],
        cwd=tmp_path, env={**environment, "PATH": path}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    if "dry_run=true" not in " ".join(lines):
        assert len(list((tmp_path / "samples").rglob("*.mp4"))) == 1
        return
    assert not (tmp_path / "runs").exists() and not (tmp_path / "samples").exists(), "a dry run makes nothing"
    quoted = [rule for words, rule in QUOTED.items() if any(words in line for line in lines)]
    assert quoted, "no figure of this block is compared with README"
    for pattern, rounded in quoted:
        figures = [rounded.format(float(figure)) for figure in re.findall(pattern, ended.stdout)]
        assert figures and figures[-1] in section("Memory and seconds"), figures


#: The sizes in the table of docs/sampling.md, as settings.
SAMPLED = {
    "A14B 480x832": "model=t2v_a14b height=480 width=832 num_frames=81",
    "A14B 720x1280": "model=t2v_a14b height=720 width=1280 num_frames=81",
    "5B 704x1280x121": "model=ti2v_5b height=704 width=1280 num_frames=121",
    "1.3B 480x832": "model=t2v_1_3b height=480 width=832 num_frames=81",
}


@pytest.mark.slow
def test_memory_of_sampling(call):
    """The dry runs print the figures of docs/sampling.md."""
    lines = (ROOT / "docs/sampling.md").read_text(encoding="utf-8").splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("| `offload.experts` | `off"))
    header, _, *rows = ([cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines[start : start + 5])
    settings = ""
    for column, title in enumerate(header[2:], 2):
        settings = SAMPLED.get(title, f"{settings} tile=256")
        assert title in SAMPLED or title.endswith("tile=256"), title
        printed = call("sample.py", *settings.split(), "dry_run=true").stdout
        for row in rows:
            for experts in re.findall(r"\w+", row[0].replace(" or ", " ")):
                (figure,) = re.findall(rf"^ +{experts} +{row[1]} +([\d.]+) GiB", printed, flags=re.M)
                assert f"{float(figure):.1f}" == row[column], (settings, experts, row[1])
