"""The image for rented machines, as far as no Docker is needed, and its start script from footage to files."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
START = ROOT / "launch" / "start.sh"


def instructions():
    """The Dockerfile's instructions: (word, the rest), comments and line ends taken out."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if line.strip() and not line.startswith("#")).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines()]


def of(word):
    return [rest for name, rest in instructions() if name == word]


def is_sent(name):
    """Whether Docker is given a file: the last line of .dockerignore that matches it or a folder above it decides.

    `*` stays within a folder; `**/` stands for any folders.
    """
    sent, parts = True, name.split("/")
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!").split("/")
        if pattern[0] == "**":
            matches = any(fnmatch(part, pattern[1]) for part in parts)
        else:
            matches = len(parts) >= len(pattern) and all(map(fnmatch, parts, pattern))
        if matches and line and not line.startswith("#"):
            sent = line.startswith("!")
    return sent


def test_base_is_chosen_by_one_argument():
    """DEVICE names the stage: CUDA if nothing is said, or a CPU's; both have the same Debian packages."""
    assert of("ARG")[0] == "DEVICE=cuda" and "DEVICE" in of("ARG")
    *stages, last = of("FROM")
    assert {stage.split(" AS ")[1] for stage in stages} == {"cuda", "cpu"} and last == "${DEVICE}"
    assert all(re.search(r":[\w.-]*ubuntu24\.04|ubuntu:24\.04", stage) for stage in stages)


def test_versions_come_from_constraints():
    """Each pip install is held by constraints.txt; no version is written a second time."""
    installs = [command for command in of("RUN") if "pip install" in command]
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in command and "==" not in command for command in installs)
    extras = re.search(r'"\.\[(.*?)\]"', installs[1])[1].split(",")
    assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8") for extra in extras)


def test_copied_files_are_sent():
    """What COPY names, and what the package is built from, is there and not ignored; the rest of a checkout is."""
    named = {word for rest in of("COPY") for word in shlex.split(rest)[:-1] if not word.startswith("--")} - {"."}
    assert named == {"constraints.txt", "launch/start.sh"}
    needed = ["pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "train.py", "conf/train.yaml"]
    needed += ["wantrain/util/shipped.py", "launch/accelerate/ddp.yaml", "assets/wan-tiny/model_index.json", *named]
    assert [name for name in needed if not ((ROOT / name).is_file() and is_sent(name))] == []
    ignored = ["tests/conftest.py", ".git/HEAD", "data/x.mp4", "runs/r/config.yaml", "wantrain/__pycache__/x.pyc"]
    assert [name for name in ignored if is_sent(name)] == []


def test_any_user_may_run_it():
    """Home and the working folder are one that everybody may write into; nothing is written elsewhere."""
    assert of("WORKDIR")[-1] == "/wantrain" and "HOME=/wantrain" in of("ENV")[-1]
    assert "mkdir --mode 1777 /wantrain" in of("RUN")
    assert (
        of("ENTRYPOINT") == ['["wantrain-start"]'] and "launch/start.sh /usr/local/bin/wantrain-start" in of("COPY")[-1]
    )
    assert START.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n")


@pytest.mark.parametrize("words", [(), ("footage",), ("footage", "steps=3"), ("footage", "r", "data.shards=x")])
def test_start_refuses(words, tmp_path):
    """Too few words, or shards of one's own: one line and exit code 2."""
    ended = subprocess.run(["bash", START, *words], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1


@pytest.fixture
def begin(environment, tmp_path):
    """begin("footage", "recipe", ...): the start script in tmp_path, with this project's Python as `python`."""
    path = f"{Path(sys.executable).parent}:{environment['PATH']}"
    how = {"cwd": tmp_path, "env": {**environment, "PATH": path, "PYTHONPATH": str(ROOT)}, "text": True}

    def start(*words):
        return subprocess.Popen(
            ["bash", START, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **how
        )

    return start


#: A recipe for the shipped model that is short, on a small data set.
QUICK = ("lora_24gb", "model=tiny", "steps=2", "batch_size=2", "swap.blocks=0", "activations=gpu", "validation=off",
         "tracker=jsonl", "run=r")  # fmt: skip


@pytest.mark.slow
def test_footage_to_files(begin, tiny, tmp_path):
    """Shards, latents, a run and files; a second start finds all of it made."""
    first = begin(tiny.footage, *QUICK)
    said, _ = first.communicate(timeout=400)
    assert first.returncode == 0, said
    assert (tmp_path / "runs/r/pipeline/lora/r_low_noise.safetensors").is_file()
    assert (tmp_path / "runs/r/pipeline/model_index.json").is_file()
    steps = [json.loads(line)["step"] for line in (tmp_path / "runs/r/metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 2
    again = begin(tiny.footage, *QUICK)
    said, _ = again.communicate(timeout=400)
    assert again.returncode == 0 and said.count("nothing to do") >= 1, said


@pytest.mark.slow
def test_stop_is_handed_on(begin, tiny, tmp_path):
    """SIGTERM to the script alone, as `docker stop` sends it, ends training after a checkpoint."""
    started = begin(tiny.footage, *QUICK, "steps=100000", "model.transformer.num_layers=6")
    log, until = tmp_path / "runs/r/metrics.jsonl", time.monotonic() + 300
    while not (log.is_file() and log.read_text().count("\n") > 3):
        assert started.poll() is None and time.monotonic() < until, started.communicate()[0]
        time.sleep(0.5)
    started.send_signal(signal.SIGTERM)
    said, _ = started.communicate(timeout=120)
    assert started.returncode == 128 + signal.SIGTERM and "stopped by a signal, after a checkpoint" in said, said
    assert list((tmp_path / "runs/r/checkpoints").glob("step_*"))
