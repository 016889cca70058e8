"""What many tests share: one thread, the commands as a user runs them, and a very small world made by them once.

One thread per test process: on a busy machine several would spin against each other, ten times slower.
"""

import contextlib
import functools
import gc
import importlib.util
import io
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
from preloaded import Preloaded
from shared_traces import shared_traces

from wantrain.demo.footage import make_footage
from wantrain.models import Base, WanTransformer, WanVAE
from wantrain.models.formats.pipeline import About, write_pipeline
from wantrain.models.formats.weights import write_part

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "assets" / "wan-tiny"


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="skip every test that starts a process")


@pytest.fixture(scope="session", autouse=True)
def no_processes(request):
    """With --quick no process starts: a test that would start one is skipped, and says so."""
    if not request.config.getoption("--quick"):
        yield
        return

    def refuse(*_, **__):
        pytest.skip("starts a process: make test runs it")

    with (
        mock.patch.object(subprocess.Popen, "__init__", refuse),
        mock.patch.object(subprocess.Popen, "__del__", lambda self: None),
        mock.patch.object(multiprocessing.process.BaseProcess, "start", refuse),
    ):
        yield


@pytest.fixture(scope="session", autouse=True)
def one_trace_each():
    """The planner traces a network, two seconds of work or more, once for all tests of a process."""
    with shared_traces():
        yield


#: A Wan of 60 thousand parameters, for runs in which what is learned does not matter.
MICRO = (
    "model.transformer.num_layers=2",
    "model.transformer.ffn_dim=64",
    "model.transformer.attention_head_dim=32",
    "tracker=jsonl",
)


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def error(self):
        """The one line that a failed command leaves on stderr, without `error: ` (progress bars apart)."""
        lines = [line for line in self.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
        assert self.returncode != 0, f"it should have failed; it said:\n{self.stdout}"
        assert "Traceback" not in self.stderr, self.stderr
        assert len(lines) == 1, self.stderr
        return lines[0].removeprefix("error: ")

    @property
    def foreign(self):
        """The lines on stderr that are not ours: all but progress bars and errors."""
        ours = r"error: .*|.*: +\d+%\|.*\| \d+/\d+ \[.*\]"
        lines = self.stderr.replace("\r", "\n").splitlines()
        return [line for line in lines if line.strip() and not re.fullmatch(ours, line)]


@dataclass(frozen=True)
class Tiny:
    """A small world, shared and never written into: base folder, footage, video shards, latent shards."""

    base: Path
    footage: Path
    videos: Path
    latents: Path

    @property
    def train(self):
        """What every micro run on it is given."""
        return (*MICRO, f"weights={self.base}", f"data.shards={self.latents}", "validation.every=1000")


def alone():
    """The environment of a command: one thread, no launcher's variables."""
    kept = {key: value for key, value in os.environ.items() if key not in {"RANK", "LOCAL_RANK", "WORLD_SIZE"}}
    return {**kept, "OMP_NUM_THREADS": "1", "WANTRAIN_THREADS": "1", "WANDB_MODE": "disabled"}


def run_verb(*args, cwd=None, check=True, python=sys.executable):
    """`python VERB.py ARGUMENTS...` in a process of its own."""
    command = [python, str(ROOT / args[0]), *map(str, args[1:])]
    ended = subprocess.run(command, cwd=cwd, env=alone(), capture_output=True, text=True, timeout=300)
    if check:
        assert ended.returncode == 0, f"{args}\n{ended.stdout}\n{ended.stderr}"
    return Ended(ended.returncode, ended.stdout, ended.stderr)


@pytest.fixture(scope="session")
def preloaded(tmp_path_factory):
    """A program that stands in the place of `python` and starts at once: its libraries are imported already."""
    process = Preloaded(tmp_path_factory.mktemp("preloaded"), alone())
    yield process.program
    process.close()


@pytest.fixture
def python(request):
    """The Python of commands: a preloaded one, but an ordinary one in slow tests, which see what a user starts."""
    slow = request.node.get_closest_marker("slow") is not None
    return sys.executable if slow else request.getfixturevalue("preloaded")


@pytest.fixture(scope="session")
def environment():
    """The environment that commands run in, for tests that start their own processes."""
    return alone()


@pytest.fixture(scope="session")
def command(preloaded):
    """command("shard.py", "source=...", cwd=..., check=...): runs it in a process; python=sys.executable: as a user."""
    return functools.partial(run_verb, python=preloaded)


def run_inside(cwd, name, *args, check=True, env=None):
    """The same program inside this process, which saves five seconds of imports; `env` is set besides."""
    spec = importlib.util.spec_from_file_location(f"verb_{name.removesuffix('.py')}", ROOT / name)
    module = importlib.util.module_from_spec(spec)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.dict(os.environ, {**alone(), "HYDRA_FULL_ERROR": "1", **(env or {})}),
        mock.patch.object(sys, "argv", [str(ROOT / name), *map(str, args)]),
    ):
        spec.loader.exec_module(module)
        try:
            module.main()
        except SystemExit as error:
            code = error.code
    gc.collect()  # a process would let go of its run's lock when it ends
    if check:
        assert code == 0, f"{name} {args}\n{out.getvalue()}\n{err.getvalue()}"
    return Ended(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def inside():
    """inside(folder, "train.py", "steps=2"): for fixtures that live longer than a test; see `call`."""
    return run_inside


@pytest.fixture
def call(tmp_path):
    """call("train.py", "steps=2"): a command inside this process, in tmp_path; `check=False` if it is meant to fail."""
    return functools.partial(run_inside, tmp_path)


def launching(engine, *args, processes=2, script=ROOT / "train.py", file=None, python=sys.executable):
    """The command that starts train.py (or a script around it) with launch/accelerate/cpu_ENGINE.yaml, or `file`."""
    file = file or ROOT / "launch" / "accelerate" / f"cpu_{engine}.yaml"
    launcher = (python, "-m", "accelerate.commands.launch", "--config_file", file, "--main_process_port", "0")
    return [str(part) for part in (*launcher, "--num_processes", processes, script, *args)]


@pytest.fixture
def launch(python, tmp_path):
    """launch("zero2", "steps=2", ..., processes=2, check=True): train.py in several CPU processes, in tmp_path."""

    def run(engine, *args, check=True, **how):
        command, env = launching(engine, *args, python=python, **how), alone() | {"PYTHON_EXEC": str(python)}
        ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        if check:
            assert ended.returncode == 0, f"{engine} {args}\n{ended.stdout}\n{ended.stderr}"
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    return run


@pytest.fixture(scope="session")
def launch_command():
    """launch_command("ddp", "steps=2", processes=2): the same command, for tests that start their own processes."""
    return launching


@pytest.fixture(scope="session")
def tiny(preloaded, tmp_path_factory):
    """The small world, made by the real commands: 8 clips and 2 images, 32 pixels and 9 frames a clip."""
    folder = tmp_path_factory.mktemp("tiny")
    world = Tiny(folder / "base", folder / "footage", folder / "videos", folder / "latents")
    for part in ("text_encoder", "tokenizer", "vae"):
        if (ASSETS / part).is_dir():
            shutil.copytree(ASSETS / part, world.base / part)
    if not (world.base / "vae").is_dir():
        torch.manual_seed(0)
        vae = WanVAE(base_dim=4)
        write_part(world.base / "vae", vae.config(), vae.state_dict())
    make_footage(world.footage, num_videos=8, num_images=2, size=32)
    run = functools.partial(run_verb, python=preloaded)
    sharded = run("shard.py", f"source={world.footage}", f"out={world.videos}", "num_frames=9")
    weights = f"weights={world.base}"
    encoded = run("encode.py", f"shards={world.videos}", f"out={world.latents}", weights, "area=1024")
    assert sharded.foreign + encoded.foreign == [], "a library speaks in a command that went well"
    return world


def scrambled(module, seed):
    """The module with random values in every parameter, biases, norms and the head among them, and an answer of order 1.

    Nothing then hides behind a zero or a one.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            value = 1 + 0.3 * noise
        elif parameter.ndim < 2 or "modulation" in name:
            value = 0.2 * noise
        else:
            value = noise / parameter[0].numel() ** 0.5
        parameter.data.copy_(value)
    return module


@pytest.fixture(scope="session")
def pair(tiny, tmp_path_factory):
    """A whole pipeline folder with two scrambled micro experts."""
    size = {"num_attention_heads": 4, "attention_head_dim": 32, "text_dim": 64, "ffn_dim": 64, "num_layers": 2}
    experts = {name: scrambled(WanTransformer(**size), seed) for seed, name in enumerate(("high_noise", "low_noise"))}
    folder = tmp_path_factory.mktemp("pair") / "pipeline"
    about = About("tiny", 0.875, 3.0, {"high_noise": 2.0, "low_noise": 2.0})
    write_pipeline(folder, experts.items(), base=Base(tiny.base), about=about)
    return folder
