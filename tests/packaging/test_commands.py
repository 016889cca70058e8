"""The commands of an install: one for each file at the top of the checkout, by three names."""

import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import wantrain
from wantrain import commands
from wantrain.util import shipped

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FILES = {path.stem for path in ROOT.glob("*.py")} - {"setup"}


def test_every_command_is_installed():
    """Each file at the top is a command of the package and has a script `wantrain-NAME`."""
    assert shipped.ROOT == ROOT
    assert set(commands.NAMES) == FILES
    assert PROJECT["scripts"] == {f"wantrain-{name}": f"wantrain.commands:{name}" for name in commands.NAMES}
    assert all(getattr(commands, name).args == (name,) for name in commands.NAMES)


def test_version_in_one_place():
    """The package says its version; its metadata read it there, and the change log has an entry for it."""
    assert "version" in PROJECT["dynamic"]
    assert f"## {wantrain.__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert metadata.version("wantrain")


def test_module_runs_commands(monkeypatch):
    """`python -m wantrain train a=b` runs train.py with the words after its name."""
    ran = []
    monkeypatch.setattr(commands.runpy, "run_path", lambda path, run_name: ran.append((path, run_name, sys.argv[1:])))
    monkeypatch.setattr(sys, "argv", ["wantrain", "train", "expert=low_noise", "--cfg", "job"])
    commands.main()
    assert ran == [(str(ROOT / "train.py"), "__main__", ["expert=low_noise", "--cfg", "job"])]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "accelerate launch -m wantrain train"),
        (["--version"], wantrain.__version__),
        (["path", "launch/accelerate/ddp.yaml"], str(ROOT / "launch/accelerate/ddp.yaml")),
        (["path", "conf"], str(ROOT / "conf")),
    ],
)
def test_module_answers(words, said, monkeypatch, capsys):
    """What `python -m wantrain` says without running a command."""
    monkeypatch.setattr(sys, "argv", ["wantrain", *words])
    commands.main()
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["trian"], "error: trian is no command of wantrain; choose one of caption, shard,"),
        (["path", "nowhere.yaml"], "error: nowhere.yaml does not come with wantrain"),
        (["path"], "error: path needs the name of a file"),
    ],
)
def test_module_refuses(words, error, monkeypatch, capsys):
    """Another word, or a file that is not there, is one line and exit code 2."""
    monkeypatch.setattr(sys, "argv", ["wantrain", *words])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(error)
