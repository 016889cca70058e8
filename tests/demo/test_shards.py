"""The demo's shards are made when they are asked for and absent, and never otherwise."""

import pytest

from wantrain.demo.shards import make_own_data

SCRIPT = """
import sys
from pathlib import Path
if sys.argv[2] == "wan_tiny":
    sys.exit(3)
folder = Path("data") / sys.argv[2] / "latents"
folder.mkdir(parents=True)
(folder / "manifest.json").write_text(" ".join(sys.argv[1:]))
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A project whose demo.py only leaves a manifest, and fails for one name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.py").write_text(SCRIPT)
    return tmp_path


def made(root, name):
    make_own_data([name], root=root)
    file = root / name / "manifest.json"
    return file.read_text() if file.is_file() else None


def test_absent_shards(root, capsys):
    """Absent shards of the demo are made once."""
    assert made(root, "data/wug/latents") == "data wug"
    assert "making data/wug (procedural clips; once)" in capsys.readouterr().out
    (root / "data/wug/latents/manifest.json").write_text("kept")
    assert made(root, "data/wug/latents") == "kept" and capsys.readouterr().out == ""


def test_user_folders(root, capsys):
    """Folders other than the demo's belong to the user and are never made."""
    assert made(root, "mine/latents") is None and made(root, "data/mine/latents") is None
    assert capsys.readouterr().out == ""


def test_child_exit_code(root):
    """A failure of demo.py ends the program with the exit code of demo.py."""
    with pytest.raises(SystemExit) as ended:
        made(root, "data/wan_tiny/latents")
    assert ended.value.code == 3


def test_main_process_only(root, monkeypatch):
    """Only the main process makes the shards."""
    monkeypatch.setenv("RANK", "1")
    assert made(root, "data/wug/latents") is None
