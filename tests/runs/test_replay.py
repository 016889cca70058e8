"""A run is repeated from its run.json, bit for bit; a run.json that somebody crafted runs nothing."""

import json
import os
import re
from pathlib import Path

import pytest

from wantrain import config
from wantrain.runs import replay

RUN = ("init=scratch", "batch_size=4", "steps=12", "run=first", "checkpoint.every=4")
CONF = Path(config.CONF)


def losses(tmp_path, name):
    rows = (json.loads(line) for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: (row["loss"], row["grad_norm"], row["lr_scale"]) for row in rows if "loss" in row}


@pytest.fixture
def first(tiny, call, tmp_path):
    """A run of twelve steps, and the path of its run.json."""
    (tmp_path / "a, b=c {d}").symlink_to(tiny.latents)  # signs that mean something to Hydra
    command = ("train.py", *tiny.train, *RUN, "optimizer.lr=1e-3", "data.shards=a, b=c {d}")
    call(*command, "stop_after=7")
    call(*command)
    return tmp_path / "runs" / "first" / "run.json"


def test_replay_is_bit_exact(first, call, tmp_path):
    """A replay repeats the first steps bit for bit and reports it."""
    told = json.loads(first.read_text())
    assert len(told["starts"]) == 2 and told["config"]["optimizer"]["lr"] == 1e-3
    assert {"command", "made_by", "versions", "engine", "processes", "device", "data", "at"} <= told["starts"][0].keys()
    assert told["starts"][0]["attention"] == "efficient"
    ended = call("train.py", "replay=runs/first/run.json", "steps=5")
    assert "\nattention: efficient\n" in ended.stdout
    assert "everything that its bits depend on is the same" in ended.stdout
    assert "replay: the losses of 5 steps are the same, bit for bit" in ended.stdout
    again = losses(tmp_path, "first_replay")
    assert again == {step: row for step, row in losses(tmp_path, "first").items() if step <= 5}
    assert "the losses of 12 steps are the same" in call("train.py", "replay=runs/first/run.json", "run=whole").stdout


def test_replay_with_other_settings(first, call):
    """Settings beside replay= take effect, and a replay with other losses is an error."""
    ended = call("train.py", "replay=runs/first/run.json", "steps=5", "optimizer.lr=2e-3", check=False)
    assert re.search(r"replay: 1 of 5 losses are the same bits; the first that is not is step 2 \(", ended.error)


@pytest.mark.slow
def test_replay_on_two_processes(first, launch, tmp_path):
    """Two processes repeat a run of one process within the bound."""
    said = launch("ddp", "replay=runs/first/run.json", "steps=4").stdout
    assert "engine: single -> ddp; processes: 1 -> 2" in said
    assert re.search(r"replay: \d of 4 losses are the same bits", said) or "bit for bit" in said
    pairs = zip(losses(tmp_path, "first_replay").values(), losses(tmp_path, "first").values(), strict=False)
    assert all(now[0] == pytest.approx(then[0], rel=1e-5) for now, then in pairs)


def test_other_shards_are_refused(first, call):
    content = json.loads(first.read_text())
    content["starts"][0]["data"] = "0" * 64
    first.write_text(json.dumps(content))
    assert "the run saw other shards" in call("train.py", "replay=runs/first/run.json", check=False).error


@pytest.mark.parametrize(
    "word",
    [
        "optimizer._target_=os.system",
        "+data._target_=os.system",
        "hydra.run.dir=/",
        "hydra/launcher=submitit",
        "~adapter",
        "--config-dir=/tmp",
        "adapter=../../../tmp/evil",
        "adapter=/tmp/evil",
        "adapter@other=lora",
        "run=${oc.env:HOME}",
        "schedule={_target_: os.system}",
        "--multirun",
    ],
)
def test_unsafe_argument_refused(word, call, tmp_path, monkeypatch):
    """A stored argument that does more than set a value is refused, and nothing runs."""
    ran = []
    monkeypatch.setattr(os, "system", ran.append)
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"starts": [{"command": ["steps=1", word]}]}))
    error = call("train.py", f"replay={path}", check=False).error
    assert str(path) in error and word in error
    assert not ran and not (tmp_path / "runs").exists()


def test_replay_arguments(tmp_path):
    """Stored arguments that set values pass, and arguments of the command line override them."""
    path = tmp_path / "mine" / "run.json"
    path.parent.mkdir()
    stored = ["expert=low_noise", "adapter=lora", 'run="a name, with = and 中文"', "steps=500", "optimizer.lr=1e-3"]
    path.write_text(json.dumps({"starts": [{"command": stored}]}))
    now = replay.arguments([f'replay="{path}"', "adapter=none", "steps=50"], CONF)
    assert now == [
        "expert=low_noise", "steps=500", "optimizer.lr=1e-3",
        f'replay="{path}"', "adapter=none", "stop_after=50", 'run="mine_replay"',
    ]  # fmt: skip
    assert replay.arguments(["steps=3"], CONF) == ["steps=3"], "no replay, nothing changes"


@pytest.mark.parametrize(
    ("content", "told"),
    [("", "cannot be read as JSON"), ("[]", "not a JSON object"), ("{}", "records no start"),
     ('{"starts": [1]}', "records no start"), ('{"starts": []}', "records no start")],
)  # fmt: skip
def test_bad_run_json_refused(content, told, call, tmp_path):
    """A file that is no run.json is one clear error."""
    (tmp_path / "run.json").write_text(content)
    assert told in call("train.py", "replay=run.json", check=False).error
    assert "does not exist" in call("train.py", "replay=nowhere.json", check=False).error


def test_stored_config_is_not_built(tiny, call, tmp_path, monkeypatch):
    """Nothing is built from the config.yaml of a run folder.

    With another `_target_` in it the run is refused as another config, and nothing is called.
    """
    ran = []
    monkeypatch.setattr(os, "system", ran.append)
    call("train.py", *tiny.train, *RUN, "stop_after=1")
    stored = tmp_path / "runs" / "first" / "config.yaml"
    text = stored.read_text()
    stored.write_text(text.replace("torch.optim.AdamW", "os.system").replace("wantrain.data.LatentData", "os.system"))
    assert stored.read_text() != text
    assert "os.system" in call("train.py", *tiny.train, *RUN, check=False).error
    call("export.py", "run=first", "out=out", check=False)
    call("sample.py", "run=first", "prompt=x", "steps=1", check=False)
    assert not ran
