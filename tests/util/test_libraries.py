"""Commands say what is ours to say: libraries are imported when they are asked for, three messages of theirs are dropped,
and every other warning is shown.
"""

import enum
import gc
import logging
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from wantrain.util import libraries

ROOT = Path(__file__).resolve().parent.parent.parent

#: Libraries that take a second or more, of which a command imports those that it needs when it needs them.
LARGE = (
    "peft",
    "bitsandbytes",
    "transformers",
    "torchao",
    "deepspeed",
    "diffusers",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "wandb",
)


def python(program, environment, folder):
    """A program in a process of its own, with this checkout's modules."""
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_lazy_imports(environment, tmp_path):
    """The commands import no large library before they need it."""
    program = f"import shard, encode, train, sample, export, sys; print([n for n in {LARGE} if n in sys.modules])"
    ended = python(program, environment, tmp_path)
    assert (ended.stdout, ended.stderr) == ("[]\n", "")


def test_quiet_run(tiny, command, tmp_path):
    """A run with an adapter and previews prints no message of a library.

    peft for the adapter, transformers for the preview's text; each brings torchao. shard.py and encode.py are looked at
    where conftest.py makes the small world, a launched train.py in training/test_engines.py.
    """
    run = ("adapter=lora", f"data.shards={tiny.latents}", "batch_size=1", "steps=1", "tracker=jsonl")
    preview = ("check_expert=off", "sample.every=1", "sample.count=1", "sample.steps=1", "validation.clips=1")
    assert command("train.py", *run, *preview, cwd=tmp_path, python=sys.executable).foreign == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [("sample.py", "prompt=a wug", "steps=1", "num_frames=1"), ("export.py", "out=out")], ids=lambda c: c[0]
)
def test_quiet_sample_and_export(command, words, tmp_path):
    """sample.py and export.py print no message of a library."""
    assert command(*words, f"weights={ROOT / 'assets' / 'wan-tiny'}", cwd=tmp_path, python=sys.executable).foreign == []


def test_library_warning(environment, tmp_path):
    """A warning that a library logs inside a command is shown.

    Hydra's own settings for quiet logs would switch off whatever libraries log.
    """
    program = """
import logging, sys
import shard
before, inside = logging.getLogger("known_before"), shard.checks.check
def check(cfg, **more):
    before.warning("heard from one that was there")
    logging.getLogger("made_inside").warning("heard from one that is new")
    inside(cfg, **more)
shard.checks.check, sys.argv = check, ["shard.py", "source=nowhere", "out=videos"]
shard.main()
"""
    ended = python(program, environment, tmp_path)
    lines = ended.stderr.splitlines()
    assert lines[:2] == ["heard from one that was there", "heard from one that is new"]
    assert ended.returncode == 2 and lines[2].startswith("error: source=nowhere")


class Theirs(enum.Enum):
    """An enum that a library registers with torch."""

    ONE = 1


DEPRECATED = "%s is an Enum subclass and is now natively supported by torch.compile as an opaque value type."
KERNELS = "Failed to load /a place/site-packages/torchao/_C_cutlass_90a.abi3.so: Could not load this library"


def said(caplog):
    kernels, trees = logging.getLogger("torchao"), logging.getLogger("torch.utils._pytree")
    caplog.clear()
    with caplog.at_level("WARNING"):
        kernels.warning(KERNELS)
        kernels.warning("Failed to load a checkpoint")
        for module in ("torchao.quantization", "somebody"):
            Theirs.__module__ = module
            trees.warning(DEPRECATED, Theirs)
        trees.warning("%s is registered twice", Theirs)
    return [record.getMessage() for record in caplog.records]


def test_dropped_messages(caplog):
    """Two messages are dropped while importing, and no others."""
    with libraries.importing():
        during = said(caplog)
    after = said(caplog)
    assert len(after) == 5
    assert during == [after[1], after[3], after[4]]


def test_frames_are_let_go(tmp_path, monkeypatch):
    """What the callers of an import have is let go with them, though a library caught an error on the way."""
    (tmp_path / "catching.py").write_text(
        "def fail():\n    try:\n        raise KeyError\n    except KeyError as error:\n        kept = error\n"
        "        raise ValueError from error\n\ntry:\n    fail()\nexcept ValueError as error:\n    held = [error]\n"
        "    held.append(held)\n    del held\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    class Large:
        pass

    def load():
        own = Large()
        with libraries.importing():
            import catching  # noqa: F401
        return weakref.ref(own)

    large = load()
    gc.collect()
    assert large() is None
