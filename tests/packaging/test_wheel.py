"""A wheel in a fresh environment: the commands, their configs and wan-tiny work where there is no checkout."""

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"

pytestmark = pytest.mark.slow


def run(*words, cwd, env=None):
    """A command's stdout; the test ends where it fails."""
    ended = subprocess.run([*map(str, words)], cwd=cwd, env=env, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, f"{words}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


@pytest.fixture(scope="module")
def tracked():
    """The files that git would hand to somebody else."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [Path(name) for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tracked, tmp_path_factory):
    """Built as an index would: the sdist from a clone, the wheel from the sdist."""
    folder = tmp_path_factory.mktemp("build")
    for name in tracked:
        (folder / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "clone" / name).symlink_to(ROOT / name)
    run(sys.executable, "-c", BUILD, "build_sdist", folder, cwd=folder / "clone")
    (sdist,) = folder.glob("*.tar.gz")
    run("tar", "xzf", sdist, cwd=folder)
    run(sys.executable, "-c", BUILD, "build_wheel", folder, cwd=folder / sdist.name.removesuffix(".tar.gz"))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The Python of a new environment with the wheel; its libraries are those of the environment that runs the tests."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    place = sysconfig.get_path("purelib", vars={"base": str(folder)})
    (Path(place) / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python")
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder.parent)
    return folder / "bin" / "python"


def test_wheel_is_whole(wheel, tracked):
    """It holds each file of the package, and once each of those that lie beside it; nothing of tests and benchmarks."""
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    package = {str(name) for name in tracked if name.parts[0] == "wantrain"}
    beside = [
        name for name in tracked
        if name.parts[0] in {"conf", "launch"} or name.is_relative_to("assets/wan-tiny")
        or (name.parent == Path() and name.suffix == ".py" and name.name != "setup.py")
    ]  # fmt: skip
    assert {name for name in names if ".dist-info/" not in name} == {
        *package, *(f"wantrain/project/{name}" for name in beside),
    }  # fmt: skip


def test_installed_commands(python, environment, tmp_path):
    """From an empty folder: help, the demo's data, training in two processes, a sample, an export."""
    environment = {key: value for key, value in environment.items() if key != "PYTHONPATH"}
    environment["PATH"] = f"{python.parent}:{environment['PATH']}"

    def call(*words):
        return run(*words, cwd=tmp_path, env=environment)

    where = call(python, "-c", "import wantrain; print(wantrain.__file__)")
    assert Path(where.strip()).is_relative_to(python.parent.parent)
    assert "expert: both, dense, high_noise" in call("wantrain-train", "--help")
    call("wantrain-demo", "data", "wug")
    file = call(python, "-m", "wantrain", "path", "launch/accelerate/cpu_ddp.yaml").strip()
    launcher = (python, "-m", "accelerate.commands.launch", "--config_file", file, "--main_process_port", "0")
    settings = ("expert=low_noise", "adapter=lora", "steps=2", "batch_size=4", "validation=off", "tracker=jsonl")
    call(*launcher, "-m", "wantrain", "train", *settings, "data.shards=data/wug/latents", "run=r")
    weights = "weights=assets/wan-tiny"
    call("wantrain-sample", "run=r", weights, "prompt=a wug", "steps=2", "num_frames=5")
    assert len(list((tmp_path / "samples").glob("*.mp4"))) == 1
    call("wantrain-export", "run=r", "out=pipeline")
    assert (tmp_path / "pipeline" / "lora" / "r_low_noise.safetensors").is_file()
