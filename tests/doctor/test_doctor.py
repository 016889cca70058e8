"""The doctor's checks on machines that are healthy, short of something, or broken; nothing is asked of a network."""

import os
import threading
import time
from email.message import Message
from typing import get_args

import pytest
import torch

from wantrain import doctor
from wantrain.config import ROOT
from wantrain.doctor import CHECKS, Finding, Options, examine, hardware, network, software
from wantrain.settings import schema
from wantrain.util.devices import Card


@pytest.fixture
def options(tmp_path):
    return Options("cpu", tmp_path / "runs", 1.0, ROOT)


def findings(name, options):
    return list(CHECKS[name](options))


def test_names():
    """The names that the setting takes are those of the checks, in their order."""
    assert get_args(schema._CHECKS) == tuple(CHECKS)


def test_lines():
    """Each line ends in ok or the fix; BROKEN marks what training cannot go on with."""
    assert Finding("disk", "3 GiB").line().endswith("3 GiB - ok")
    assert Finding("disk", "3 GiB", "free some").line().endswith("3 GiB - note: free some")
    assert Finding("disk", "3 GiB", "free some", broken=True).line().endswith("3 GiB - BROKEN: free some")


def test_exit(options, monkeypatch, capsys):
    """Notes are no error; what is broken is one, which names it, after all lines were printed."""
    checks = {"a": lambda _: iter([Finding("a", "x"), Finding("a", "y", "get z")]), "b": lambda _: iter([])}
    monkeypatch.setattr(doctor, "CHECKS", checks)
    examine(options)
    assert capsys.readouterr().out.splitlines()[-1] == "2 lines: 1 ok, 1 notes, 0 broken"
    checks["b"] = lambda _: iter([Finding("b", "gone", "get it", broken=True)])
    with pytest.raises(ValueError, match="what is broken here: b; the lines marked BROKEN"):
        examine(options)
    assert "3 lines: 1 ok, 1 notes, 1 broken" in capsys.readouterr().out
    examine(options, ["a"])


@pytest.mark.parametrize("name", ["python", "packages", "extras", "compiler", "card", "attention", "memory"])
def test_here(name, options):
    """On a machine that runs these tests nothing is broken that training needs."""
    found = findings(name, options)
    assert found and not any(each.broken for each in found), found


def test_packages(options, monkeypatch):
    """A package that is missing, or too old, is broken, with the command that installs it."""
    versions = {"torch": "2.1.0", "peft": None}
    own = software._version
    monkeypatch.setattr(software, "_version", lambda name: versions.get(name, own(name)) if name in versions else own(name))  # fmt: skip
    found = {each.found: each for each in findings("packages", options)}
    assert found["torch 2.1.0"].broken and found["torch 2.1.0"].fix == "pip install 'torch>=2.9'"
    assert found["peft is not installed"].broken
    assert len(found) == 2


def test_extras(options, monkeypatch):
    """A missing extra, and one that cannot be imported, are notes that say what it is for."""
    monkeypatch.setattr(software, "_version", lambda name: None if name == "torchao" else "99")
    monkeypatch.setattr(software, "_import_error", lambda name: "bitsandbytes cannot be imported (x)" if name == "bitsandbytes" else None)  # fmt: skip
    lines = [each.line() for each in findings("extras", options)]
    assert any(
        "torchao is not installed - note: pip install 'wantrain[8bit]', for optimizer=adamw_8bit" in line
        for line in lines
    )
    assert any("bitsandbytes cannot be imported (x) - note: install it again" in line for line in lines)


def test_every_extra_is_checked():
    """The extras of pyproject.toml but for the developers' have a purpose each."""
    assert set(software._project(ROOT)["optional-dependencies"]) - {"dev"} == set(software.EXTRAS)


def test_imports():
    """A package that cannot be imported is one line."""
    assert software._import_error("json") is None
    assert software._import_error("no_such_package").startswith("no_such_package cannot be imported (No module named")


def test_installed_package(tmp_path, monkeypatch):
    """Without a pyproject.toml the metadata of the installed package is read: the same table."""
    metadata = Message()
    metadata["Requires-Python"] = ">=3.11"
    for needed in ("torch>=2.9", "imageio[ffmpeg]>=2.34", 'bitsandbytes>=0.47; extra == "quant"'):
        metadata["Requires-Dist"] = needed
    monkeypatch.setattr(software.importlib.metadata, "metadata", lambda name: metadata)
    assert software._project(tmp_path) == {
        "requires-python": ">=3.11",
        "dependencies": ["torch>=2.9", "imageio[ffmpeg]>=2.34"],
        "optional-dependencies": {"quant": ["bitsandbytes>=0.47"]},
    }


def test_build_locks(options, tmp_path, monkeypatch):
    """The lock of a killed build is broken, with the file to remove."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert [each.fix for each in findings("build_locks", options)] == [""]
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 3600,) * 2)
    (finding,) = findings("build_locks", options)
    assert finding.broken and finding.fix.startswith(f"rm {lock}")


@pytest.mark.parametrize(
    ("card", "device", "broken"),
    [(None, "auto", False), (None, "cuda", True), (Card("470.82.01"), "auto", True), (Card(None), "cpu", False)],
)
def test_no_card(card, device, broken, options, monkeypatch):
    """No card is a note where the CPU can work; a card that torch cannot use, or that is asked for, is broken."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware.devices, "find_card", lambda: card)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (finding,) = hardware.check_card(Options(device, options.runs, 1.0, ROOT))
    assert finding.broken == broken and finding.fix


def test_memory(options, monkeypatch):
    """Too little memory for anything is broken."""
    monkeypatch.setattr(hardware.devices, "host_memory", lambda: (4 << 30, 1 << 30))
    (finding,) = findings("memory", options)
    assert finding.broken and "4.0 GiB, 1.0 free" in finding.found


def test_disk(options, monkeypatch):
    """A folder that cannot be written, or a full disk, is broken; little room for downloads is a note."""
    options.runs.touch()
    broken, cache = findings("disk", options)
    assert broken.broken and "is a file" in broken.found and not cache.broken
    options.runs.unlink()
    monkeypatch.setattr(hardware, "_free", lambda folder: 0.5)
    runs, cache = findings("disk", options)
    assert runs.broken and not cache.broken and "HF_HOME" in cache.fix


def test_hub(options, monkeypatch):
    """A hub that does not answer is a note, in no more time than is given."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    (finding,) = findings("hub", options)
    assert not finding.broken and "does not answer" in finding.found and "weights=FOLDER" in finding.fix
    monkeypatch.setattr(network.urllib.request, "urlopen", lambda *_, **__: threading.Event().wait())
    started = time.monotonic()
    assert network.unreachable("http://slow", 0.1) == "no answer in 0.1 s" and time.monotonic() - started < 2
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in findings("hub", options)[0].found


def test_wandb(options, tmp_path, monkeypatch):
    """A key in the environment, a login, or none; offline needs none."""
    for variable in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (finding,) = findings("wandb", options)
    assert finding.fix.startswith("wandb login, or tracker=jsonl") and not finding.broken
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    (tmp_path / "netrc").chmod(0o600)
    assert findings("wandb", options)[0].line().endswith("a login for api.wandb.ai - ok")
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert findings("wandb", options)[0].fix == ""
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert findings("wandb", options)[0].found == "WANDB_MODE=offline"


def test_training_that_fails(options, tmp_path):
    """A command that fails in the small training is named with its own message."""
    (tmp_path / "shard.py").write_text("import sys\nsys.exit('error: no decoder here; install it')\n")
    (finding,) = findings("training", Options("cpu", options.runs, 1.0, tmp_path))
    assert finding.broken and finding.found == "shard.py of wan-tiny failed: error: no decoder here; install it"


def test_command(call, tmp_path):
    """doctor.py prints its lines; an unknown check, and a setting that no chosen check uses, are refused."""
    said = call("doctor.py", "checks=[python,disk]").stdout.splitlines()
    assert [line.split()[0] for line in said] == ["python", "disk", "disk", "3"] and said[0].endswith("- ok")
    (tmp_path / "runs").touch()
    ended = call("doctor.py", "checks=[disk]", check=False)
    assert ended.returncode == 2 and "training needs what is broken here: disk" in ended.error
    error = call("doctor.py", "checks=[cards]", check=False).error
    assert error.startswith('checks=["cards"] must be a list of these: python, packages, ')
    error = call("doctor.py", "checks=[python]", "timeout=1", check=False).error
    assert error == 'timeout has no effect: checks=["python"] ask no network'


@pytest.mark.slow
def test_training(options):
    """Two steps of wan-tiny, by the commands themselves."""
    (finding,) = findings("training", options)
    assert finding.line().endswith("- ok") and "two steps of wan-tiny on cpu" in finding.found
