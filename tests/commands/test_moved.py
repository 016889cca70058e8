"""A run whose base or folder lies elsewhere goes on; a run that cannot be written is refused before its work."""

import json
import shutil

import pytest

from wantrain.runs.folder import read_config


def test_moved_base_and_renamed_run(tiny, pair, call, tmp_path):
    """A LoRA's run goes on with its base elsewhere and under a new name, equal to the run that was left alone; another
    base is refused, also at the old place, and the run's videos and files say its new name.
    """
    command = (*tiny.train, "expert=low_noise", "adapter=lora", "adapter.rank=2", "batch_size=2", "steps=4")
    shutil.copytree(pair, tmp_path / "here")
    call("train.py", *command, "weights=here", "run=alone")
    call("train.py", *command, "weights=here", "run=old", "stop_after=2")
    (tmp_path / "here").rename(tmp_path / "there")
    (tmp_path / "runs" / "old").rename(tmp_path / "runs" / "new")
    said = call("train.py", *command, f"weights={tmp_path / 'there'}", "run=new").stdout
    assert "step 2 of 4" in said and said.startswith("device: cpu ")
    alone, new = (
        [json.loads(line)["loss"] for line in (tmp_path / "runs" / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("alone", "new")
    )
    assert new == alone and len(new) == 4
    assert read_config(tmp_path / "runs" / "new")["run"] == "new"

    (weights,) = (tmp_path / "there" / "transformer_2").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    error = call("train.py", *command, "weights=there", "run=new", check=False).error
    assert error.startswith("run new started from other files: low_noise differs in content")


def test_run_from_random_values_moves(tiny, call, tmp_path):
    """A run from random values goes on where VAE and text encoder lie elsewhere."""
    command = (*tiny.train, "init=scratch", "batch_size=2", "steps=2", "run=r")
    call("train.py", *command, "stop_after=1")
    shutil.copytree(tiny.base, tmp_path / "elsewhere")
    assert "step 1 of 2" in call("train.py", *command, "weights=elsewhere").stdout


def test_training_without_validation(tiny, call, tmp_path):
    """With validation.every=0 nothing is validated, which is said, and a run trains and resumes."""
    command = [word for word in tiny.train if not word.startswith("validation.")]
    command += ["init=scratch", "batch_size=2", "run=r", "validation.every=0", "checkpoint.every=1"]
    for steps in (1, 2):
        ended = call("train.py", *command, f"steps={steps}")
        assert "validation is off (validation.every=0)" in ended.stdout and "validation loss" not in ended.stdout
    run = tmp_path / "runs" / "r"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and not any("validation_loss" in row for row in rows)
    assert not (run / "validation.jsonl").exists() and not (run / "validation.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("validation.every=0", "validation.early_stopping_patience=3"), "early_stopping_patience=3 would never end"),
        (("validation.every=0", "checkpoint.keep_best=true"), "checkpoint.keep_best=true has no loss to compare"),
        (("validation.every=-1",), "validation.every=-1 must be a whole number of steps; 0 is no validation"),
        (("validation.every=0.5",), "validation.every=0.5 must be a whole number of steps"),
        (("run=a,b",), "run='a,b' contains ','"),
        (("run=high+low",), "run='high+low' contains '+'"),
        (("run=exp/one",), "run='exp/one' contains '/'"),
        (("runs=/proc/nowhere",), "runs=/proc/nowhere/tiny_low_noise_none cannot be written (/proc is the nearest"),
    ],
)
def test_refused_at_the_start(words, message, tiny, call, tmp_path):
    """What would fail later is refused before anything is made or loaded."""
    given = [word for word in tiny.train if not word.startswith("validation.")]
    ended = call("train.py", *given, *words, check=False)
    assert message in ended.error and ended.stdout == "" and not list(tmp_path.iterdir())


def test_latents_cannot_be_written(tiny, call, tmp_path):
    """encode.py refuses a folder that it cannot write before an encoder is loaded."""
    (tmp_path / "file").touch()
    for out in ("/proc/nowhere", "file/deeper"):
        error = call("encode.py", f"shards={tiny.videos}", f"out={out}", f"weights={tiny.base}", check=False).error
        assert error.startswith(f"out={out} cannot be written")
