"""A run's pieces: the project's own data are made when they are asked for and absent, and never otherwise."""

import re

import pytest
import torch

from wantrain import config
from wantrain.training import assemble
from wantrain.training.assemble import make_own_data

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


def test_absent_shards_of_ours_are_made_once(root, capsys):
    assert made(root, "data/wug/latents") == "data wug"
    assert "making data/wug (procedural clips; once)" in capsys.readouterr().out
    (root / "data/wug/latents/manifest.json").write_text("kept")
    assert made(root, "data/wug/latents") == "kept" and capsys.readouterr().out == ""


def test_other_folders_are_the_users(root, capsys):
    assert made(root, "mine/latents") is None and made(root, "data/mine/latents") is None
    assert capsys.readouterr().out == ""


def test_a_failure_ends_with_the_childs_code(root):
    with pytest.raises(SystemExit) as ended:
        made(root, "data/wan_tiny/latents")
    assert ended.value.code == 3


def test_only_the_main_process_makes_them(root, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert made(root, "data/wug/latents") is None


IMPOSSIBLE = [
    ("zero2", ["expert=both"], "bash launch/pair.sh launch/accelerate/zero2.yaml"),
    ("fsdp2", ["optimizer=muon"], "optimizer=muon needs whole matrices, but fsdp2 cuts them"),
    ("zero3", ["optimizer=muon"], "optimizer=muon needs whole matrices, but zero3 cuts them"),
    ("fsdp2", ["optimizer=adamw_8bit"], "optimizer=adamw_8bit needs whole matrices, but fsdp2 cuts them"),
    ("zero2", ["optimizer=adafactor"], "optimizer=adafactor needs whole matrices, but zero2 cuts them"),
    ("zero3", ["ema=0.9"], "ema=0.9 under ZeRO-3"),
    ("fsdp2", ["expert=both", "adapter=lora", "experts.idle=cpu"], "experts.idle=cpu: fsdp2 keeps only parts"),
    ("single", ["expert=both", "experts.idle=cpu"], "adapter=none trains them"),
]


@pytest.mark.parametrize(("engine", "given", "message"), IMPOSSIBLE)
def test_what_an_engine_cannot_do_is_said_before_anything_starts(engine, given, message, monkeypatch):
    monkeypatch.setattr(assemble, "engine_of", lambda accelerator: engine)
    experts = config.experts(config.compose("train", given))
    with pytest.raises(ValueError, match=re.escape(message)):
        assemble.find_home(Alone(), {name: config.plain(own) for name, own in experts.items()})


class Alone:
    """As much of an Accelerator as a home needs."""

    device = torch.device("cpu")


def test_a_home_loads_on_the_host_what_is_cut_up_or_waits_there(monkeypatch):
    for engine, given, hosted in (("ddp", [], False), ("single", ["adapter=lora", "experts.idle=cpu"], True)):
        monkeypatch.setattr(assemble, "engine_of", lambda accelerator, engine=engine: engine)
        experts = config.experts(config.compose("train", ["expert=both", *given]))
        home = assemble.find_home(Alone(), {name: config.plain(own) for name, own in experts.items()})
        assert (home.residence is not None) == hosted
