"""shard.py init=: from a folder to a settings file that every command takes; and README's path, as a stranger goes it."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import yaml

from wantrain.data import read_manifest
from wantrain.data.footage import survey
from wantrain.runs.folder import read_config

ROOT = Path(__file__).resolve().parents[2]
#: A Wan that is trained in seconds, from random values.
SMALL = (
    "model.transformer.num_layers=1", "model.transformer.ffn_dim=32", "adapter=none", "init=scratch", "batch_size=2",
    "steps=2", "validation=off", "sample=off",
)  # fmt: skip


def test_one_file_for_all_commands(tiny, call, tmp_path):
    """init looks at a folder and writes the file; shard.py then decodes nothing again; each command takes its section."""
    (tmp_path / "clips").symlink_to(tiny.footage)
    said = call("shard.py", "init=clips").stdout
    assert "clips: 8 videos, 2 images; 10 of 10 have a caption" in said and "encode: area=[4096, 2048]" in said
    assert "shard: static=drop (clip-0004.mp4: nothing moves" in said and "files: 10 = 9 used + 1 no clip used" in said
    assert "python export.py config=clips.yaml" in said
    assert not (tmp_path / "data" / "clips" / "videos" / "manifest.json").exists()
    written = (tmp_path / "clips.yaml").read_text()
    (tmp_path / "clips.yaml").write_text(written.replace("run: clips", "run: mine  # edited"))
    again = call("shard.py", "init=clips", check=False)
    assert "clips.yaml is there already, and is never overwritten" in again.error
    assert "run: mine  # edited" in (tmp_path / "clips.yaml").read_text()

    with mock.patch.object(survey, "Decoders", side_effect=AssertionError("a file is decoded again")):
        said = call("shard.py", "config=clips.yaml").stdout
    assert said.startswith('settings of clips.yaml: model=tiny source="clips" out="data/clips/videos"')
    manifest = read_manifest(tmp_path / "data" / "clips" / "videos", "video")
    assert manifest["files_used"] == 9
    call("encode.py", "config=clips.yaml", f"weights={tiny.base}")
    call("train.py", "config=clips.yaml", f"weights={tiny.base}", *SMALL)
    config = read_config(tmp_path / "runs" / "mine")
    assert (config["expert"]["name"], config["optimizer"]["lr"], config["steps"]) == ("both", 1.5e-3, 2)
    recorded = json.loads((tmp_path / "runs" / "mine" / "run.json").read_text())["starts"][0]["command"]
    assert "expert=both" in recorded and not any(word.startswith("config=") for word in recorded)
    call("export.py", "config=clips.yaml", "out=pipeline")
    assert (tmp_path / "pipeline" / "transformer_2").is_dir()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("init=nowhere",), "init=nowhere is no folder"),
        (("init=.",), "init=. holds the current folder, so data/ and runs/ would lie among the footage"),
        (("init=broken",), "init=broken: none of 1 files can be used (first: a.mp4: cannot be decoded"),
        (("init=empty",), "source=empty holds no videos or images"),
        (("init=.", "source=."), "source has no effect: init=. looks at a folder only"),
        (("init=.", "num_frames=9"), "num_frames has no effect: init=. looks at a folder only"),
        (("init=.", "out=videos"), "out=videos must end in .yaml"),
        (("init=.", "decode.workers=none"), "decode.workers"),
        (("config=mine.yaml",), "config=mine.yaml cannot be read (No such file or directory); python shard.py init=FOLDER"),
    ],
)  # fmt: skip
def test_errors(words, message, call, tmp_path):
    """What is wrong is one line, and nothing is written."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.mp4").write_bytes(b"no video")
    ended = call("shard.py", *words, check=False)
    assert message in ended.error and ended.returncode == 2
    assert not list(tmp_path.rglob("*.yaml"))


def test_settings_of_a_file_are_heard_or_refused(call, tmp_path):
    """What the file gives alone is judged like typed words; beside typed words it may be left without effect."""
    (tmp_path / "mine.yaml").write_text("train: {expert: low_noise, experts.high_noise.rank: 4, dry_run: true}\n")
    error = call("train.py", "config=mine.yaml", check=False).error
    assert error.startswith("experts.high_noise.rank has no effect: expert=low_noise trains that one alone")
    assert "dry_run" in (tmp_path / "mine.yaml").read_text()
    assert "optimizer" in call("train.py", "config=mine.yaml", "steps=2").stdout
    (tmp_path / "mine.yaml").write_text("train: {batch_sise: 4}\n")
    error = call("sample.py", "config=mine.yaml", check=False).error
    assert error == "mine.yaml: train.batch_sise is no setting of train.py; did you mean train.batch_size?"


@pytest.mark.slow
def test_strangers_path(environment, tmp_path):
    """README's quick start as it stands, with model=tiny and five clips of somebody else's: six commands, no edit."""
    folder = os.environ.get("WANTRAIN_FOOTAGE")
    if folder is None:
        pytest.skip("set WANTRAIN_FOOTAGE to a folder of real clips")
    clips = [path for path in sorted(Path(folder).iterdir()) if path.suffix in {".mp4", ".txt"}]
    assert sum(path.suffix == ".mp4" for path in clips) >= 5
    (tmp_path / "FOOTAGE").mkdir()
    for path in clips:
        shutil.copy(path, tmp_path / "FOOTAGE")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"## Quick start\n.*?^```bash\n(.*?)^```", readme, flags=re.M | re.S)[1]
    commands = [shlex.split(line, comments=True) for line in block.replace("t2v_a14b", "tiny").splitlines()]
    assert len(commands) <= 6 and "`model=tiny`" in readme
    started = time.monotonic()
    for python, script, *words in commands:
        assert python == "python"
        ended = subprocess.run(
            [sys.executable, str(ROOT / script), *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert ended.returncode == 0, f"{script} {words}\n{ended.stdout}\n{ended.stderr}"
    minutes = (time.monotonic() - started) / 60
    print(f"the path took {minutes:.1f} minutes")
    assert minutes < 15
    assert yaml.safe_load((tmp_path / "FOOTAGE.yaml").read_text(encoding="utf-8"))["model"] == "tiny"
    run = tmp_path / "runs" / "FOOTAGE"
    assert "<html" in (run / "index.html").read_text(encoding="utf-8") and list((run / "samples").rglob("*.mp4"))
    assert len(list((tmp_path / "samples" / "FOOTAGE").glob("*.mp4"))) == 1
    loras = sorted(path.name for path in (run / "pipeline" / "lora").glob("*.safetensors"))
    assert loras == ["FOOTAGE_high_noise.safetensors", "FOOTAGE_low_noise.safetensors"]
