"""Ten mistakes that people make: each ends in one message, with what is wrong and the fix, and a non-zero exit code."""

import contextlib
import errno
import json
import os
import shutil
import socket
from dataclasses import dataclass, field

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from wantrain.data.latents import store
from wantrain.training.engine.engine import Stepper

#: What a run on the small world is given that gets as far as its first step.
RUN = ("init=scratch", "batch_size=2", "steps=2", "run=r")


@dataclass(frozen=True)
class Mistake:
    """A command as it is typed, and what its error must say: `wrong` first, each part of `fix` somewhere after.

    Words in braces are filled with places of the test: {footage}, {videos}, {latents}, {base}, {pair}.
    """

    command: tuple[str, ...]
    wrong: str
    fix: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)


TRAIN = ("train.py", "{train}", *RUN)
MISTAKES = {
    "wrong folder": Mistake(
        ("shard.py", "source=nowhere", "out=out"),
        "source=nowhere does not exist",
        ("give a folder, a tar, a pattern or a URL",),
    ),
    "no captions": Mistake(
        ("shard.py", "source=mine", "out=out"),
        "2 of 2 files have no caption (first: clip-0000.mp4)",
        ("write it into clip-0000.txt", "with caption.py", "caption.missing=skip"),
    ),
    "misspelt key": Mistake(
        (*TRAIN, "optimizer.learning_rate=1"),
        "optimizer.learning_rate is not a key of train.py",
        ("did you mean optimizer.lr", "--cfg job"),
    ),
    "too little memory": Mistake(TRAIN, "cpu is out of memory", ("recompute=block or a smaller batch_size=",)),
    "wrong expert": Mistake(
        (*TRAIN, "init=base", "parts.low_noise={pair}/transformer"),
        "{pair}/transformer is the high_noise expert, asked for as low_noise",
        ("expert=high_noise",),
    ),
    "stale latents": Mistake(
        (*TRAIN, "data.shards=mine"),
        "data.shards=mine was encoded by another vae",
        ("encode again with python encode.py",),
    ),
    "disk full": Mistake(
        ("encode.py", "shards={videos}", "out=out", "weights={base}", "area=1024"),
        "out: cannot write",
        ("No space left on device", "free some space and start the same command again"),
    ),
    "no W&B key": Mistake(
        (*TRAIN, "tracker=wandb"),
        "WANDB_MODE=online, but W&B has no API key",
        ("wandb login", "WANDB_API_KEY", "offline"),
        {"WANDB_MODE": "online"},
    ),
    "no CUDA": Mistake((*TRAIN, "device=cuda"), "device=cuda, but no GPU is visible", ("device=cpu",)),
    "port in use": Mistake(
        TRAIN,
        "the processes do not find each other at 127.0.0.1:",
        ("address already in use", "launch with --main_process_port 0"),
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
    ),
}


@pytest.fixture
def prepare(tiny, tmp_path, monkeypatch):
    """What each mistake finds: prepare["name"]() makes it, and returns what is set in the environment."""

    def clips_without_captions():
        (tmp_path / "mine").mkdir()
        for number in range(2):
            shutil.copy(tiny.footage / f"clip-{number:04d}.mp4", tmp_path / "mine")

    def latents_of_another_vae():
        shutil.copytree(tiny.latents, tmp_path / "mine")
        manifest = json.loads((tmp_path / "mine/manifest.json").read_text())
        manifest |= {"vae_fingerprint": "0" * 16, "encoders": {**manifest["encoders"], "vae": "of another"}}
        (tmp_path / "mine/manifest.json").write_text(json.dumps(manifest))

    def small_device():
        def step(*_, **__):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(Stepper, "step", step)

    def full_disk():
        def write(*_, **__):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out")

        monkeypatch.setattr(store, "write_atomically", write)

    def no_key():
        return {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_API_KEY": ""}

    def taken_port():
        taken = open_until_the_end.enter_context(socket.create_server(("127.0.0.1", 0)))
        AcceleratorState._reset_state(reset_partial_state=True)
        return {"MASTER_PORT": str(taken.getsockname()[1])}

    open_until_the_end = contextlib.ExitStack()
    yield {
        "no captions": clips_without_captions,
        "stale latents": latents_of_another_vae,
        "too little memory": small_device,
        "disk full": full_disk,
        "no W&B key": no_key,
        "port in use": taken_port,
    }
    open_until_the_end.close()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name, prepare, tiny, pair, call, tmp_path):
    """One line on stderr with the mistake and the fix, and exit code 2."""
    if name == "no CUDA" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    mistake = MISTAKES[name]
    places = {"footage": tiny.footage, "videos": tiny.videos, "latents": tiny.latents, "base": tiny.base, "pair": pair}
    env = {**mistake.env, **(prepare.get(name, dict)() or {})}
    program, *words = mistake.command
    words = [word for each in words for word in (tiny.train if each == "{train}" else [each.format(**places)])]
    words = list({word.split("=")[0]: word for word in words}.values())  # the last of a key counts
    ended = call(program, *words, check=False, env=env)
    assert ended.returncode == 2
    assert ended.error.startswith(mistake.wrong.format(**places))
    assert [part for part in mistake.fix if part not in ended.error] == []
    assert not list((tmp_path / "runs").glob("*/checkpoints/*"))


def test_ten_mistakes():
    """The list is complete: what people get wrong most often."""
    assert len(MISTAKES) == 10
