"""Bad input: one clear line that begins with `error:`, an exit code that is not 0, and nothing lost."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from wantrain.data import read_manifest
from wantrain.runs.folder import RunFolder, read_config


def files_of(folder):
    """Every file below a folder with its bytes: what must not be lost."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def footage(tiny, tmp_path):
    """Four of the demo's clips with captions, to be damaged."""
    folder = tmp_path / "footage"
    folder.mkdir()
    for number in range(4):
        for extension in ("mp4", "txt"):
            shutil.copy(tiny.footage / f"clip-{number:04d}.{extension}", folder)
    return folder


@pytest.fixture
def trained(tiny, call, tmp_path):
    """A finished micro run of the low-noise expert, runs/r."""
    call("train.py", *tiny.train, "run=r", "batch_size=2", "steps=1")
    return tmp_path / "runs" / "r"


def test_error_exit_code(command, tmp_path):
    """In a real process an error is one line on stderr, and the exit code is 2."""
    (tmp_path / "empty").mkdir()
    ended = command("shard.py", "source=empty", "out=videos", cwd=tmp_path, check=False)
    assert ended.returncode == 2 and ended.stdout == ""
    assert (
        ended.stderr.startswith("error: source=empty holds no videos or images (.3gp .avi ")
        and ended.stderr.count("\n") == 1
    )
    assert not (tmp_path / "videos").exists()


@pytest.mark.parametrize("name", ["caption", "shard", "encode", "train", "sample", "export", "doctor"])
def test_misspelt_key(name, call, tmp_path):
    """The error for a misspelt key names the nearest key."""
    wrong, right = {
        "caption": ("trigr=x", "trigger"),
        "shard": ("caption.prefx=x", "caption.prefix"),
        "encode": ("precison=bf16", "precision"),
        "train": ("optimizer.learning_rate=1", "optimizer.lr"),
        "sample": ("promt=x", "prompt"),
        "export": ("dtpye=bf16", "dtype"),
        "doctor": ("check=[card]", "checks"),
    }[name]
    error = call(f"{name}.py", wrong, check=False).error
    key = wrong.split("=")[0]
    assert error.startswith(f"{key} is not a key of {name}.py") and "lists all" in error
    assert name == "train" or f"did you mean {right}" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "model=tinny",
            "model=tinny is not there; choose one of i2v_a14b, t2v_14b, t2v_1_3b, t2v_a14b, ti2v_5b, tiny, tiny_dense",
        ),
        ("expert=low", "expert=low is not there; choose one of both, dense, high_noise, low_noise, vae"),
        ("run", "run is not a setting; write key=value"),
    ],
)
def test_misspelt_choice(argument, message, call):
    """The error for a misspelt choice lists the choices."""
    assert message in call("train.py", argument, check=False).error


def test_missing_required_key(call):
    """The error for a missing required key names the key."""
    error = call("shard.py", check=False).error
    assert "source" in error and "missing" in error.lower()


def test_missing_caption(footage, call, tmp_path):
    """The error for a missing caption names the file and each fix; caption.missing=skip rejects the file."""
    (footage / "clip-0002.txt").unlink()
    command = ("shard.py", "source=footage", "out=videos")
    error = call(*command, check=False).error
    assert "1 of 4 files have no caption (first: clip-0002.mp4)" in error
    assert all(way in error for way in ("clip-0002.txt", "metadata.jsonl", "caption.default=", "caption.missing=skip"))
    assert not (tmp_path / "videos").exists()
    call(*command, "caption.missing=skip")
    assert read_manifest(tmp_path / "videos", "video")["files_used"] == 3
    (reject,) = map(json.loads, (tmp_path / "videos" / "rejects.jsonl").read_text().splitlines())
    assert reject == {"name": "clip-0002.mp4", "reason": "no caption"}


def test_corrupt_video_rejected(footage, call, tmp_path):
    """A corrupt video is rejected with its reason, and the other files are used, within rejects.limit."""
    broken = footage / "clip-0001.mp4"
    broken.write_bytes(broken.read_bytes()[600:])
    command = ("shard.py", "source=footage", "num_frames=9")
    stopped = call(*command, "out=stopped", check=False)
    assert "1 of 4 files are bad, more than rejects.limit=0.1 allows; first: clip-0001.mp4:" in stopped.error
    assert not (tmp_path / "stopped" / "manifest.json").exists()
    said = call(*command, "out=videos", "rejects.limit=0.5").stdout
    assert "4 files seen = 3 used + 1 rejected" in said and "rejected clip-0001.mp4: " in said
    (reject,) = map(json.loads, (tmp_path / "videos" / "rejects.jsonl").read_text().splitlines())
    assert reject["name"] == "clip-0001.mp4" and len(reject["reason"]) > 20
    # The same command with a fixed file finishes what was stopped.
    shutil.copy(footage / "clip-0002.mp4", broken)
    assert "4 files seen = 3 used + 1 rejected" in call(*command, "out=stopped", "rejects.limit=0.5").stdout


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("shard", ["num_frames=16"], "num_frames=16 is not 4k+1: the VAE would silently drop frames; the nearest valid is 13 or 17"),
        ("train", ["model.num_frames=0", "dry_run=true"], "model.num_frames=0 is not 4k+1: the VAE would silently drop frames; the nearest valid is 1"),
        ("sample", ["height=40", "width=64"], "height x width 40x64 must be multiples of 16 (VAE stride times patch); the nearest valid is 32x64"),
        ("sample", ["height=64"], "height and width go together"),
        ("sample", ["guidance=4"], "guidance=4 must be given by its keys: guidance.high_noise="),
        ("train", ["batch_size=6", "accumulate=4"], "batch_size=6 must divide by accumulate x processes = 4 x 1; the nearest are 4 and 8"),
        ("train", ["steps=10", "epochs=2"], "steps=10 and epochs=2 both set the length; give one of them"),
        ("train", ["steps=0"], "steps=0 must be above 0"),
        ("train", ["model=tiny_dense", "expert=high_noise"], "expert=high_noise: model=tiny_dense has dense; use expert=dense, or another model="),
        ("train", ["expert=dense"], "expert=dense: model=tiny has high_noise, low_noise"),
        ("train", ["expert=vae"], "expert=vae and data=pixels go together (recipe=wan_tiny_vae)"),
        ("train", ["recipe=wan_tiny_vae", "weights=null"], "expert=vae needs weights= to start from, or model.vae as in recipe=wan_tiny_vae_images"),
        ("train", ["weights=null"], "weights=null: VAE and text encoder must come from somewhere"),
        ("train", ["precision=fp16"], "precision=fp16 is unknown; choose one of fp32, bf16"),
        ("train", ["batch_size=many"], "batch_size=many must be a whole number"),
        ("encode", ["precision=fp16", "shards=x", "out=y"], "precision=fp16 is unknown"),
        ("export", ["run=r", "out=y", "dtype=fp8"], "dtype=fp8 is unknown; choose one of fp32, bf16"),
    ],
)  # fmt: skip
def test_config_errors_before_work(name, arguments, message, call, tmp_path):
    """Errors in the config are raised before any work starts and before any file is written."""
    required = {"shard": ["source=/nowhere", "out=videos"]}.get(name, [])
    assert message in call(f"{name}.py", *required, *arguments, check=False).error
    assert not list(tmp_path.iterdir())


def test_all_problems_listed(call):
    """One error lists all problems of a config."""
    ended = call("train.py", "steps=10", "epochs=2", "batch_size=3", "accumulate=2", "expert=dense", check=False)
    lines = ended.stderr.splitlines()
    assert ended.returncode == 2 and lines[0] == "error: 3 problems:"
    assert [line.startswith("  - ") for line in lines[1:]] == [True] * 3


def test_encoder_fingerprint_mismatch(tiny, call, tmp_path):
    """Training refuses latents of another VAE or text encoder."""
    shards = tmp_path / "latents"
    shutil.copytree(tiny.latents, shards)
    manifest = json.loads((shards / "manifest.json").read_text())
    for what in ("vae", "text_encoder"):
        files = {**manifest["encoders"], what: "of another"}
        changed = {**manifest, f"{what}_fingerprint": "0123456789abcdef", "encoders": files}
        (shards / "manifest.json").write_text(json.dumps(changed))
        error = call("train.py", *tiny.train, f"data.shards={shards}", "steps=1", check=False).error
        assert f"was encoded by another {what} (fingerprint 0123456789abcdef, " in error
        assert "encode again with python encode.py" in error
    assert not (tmp_path / "runs").exists()


def test_damaged_or_missing_latents(tiny, call, tmp_path):
    """The error names latent shards that are damaged, missing or of the wrong kind."""
    shards = tmp_path / "latents"
    shutil.copytree(tiny.latents, shards)
    tar = shards / json.loads((shards / "manifest.json").read_text())["shards"][0]["name"]
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    given = (*tiny.train, "steps=1", f"data.shards={shards}")
    assert f"{tar} is damaged" in call("train.py", *given, check=False).error
    tar.unlink()
    assert (
        f"{tar} is missing; restore it, or make the shards again with encode.py"
        in call("train.py", *given, check=False).error
    )
    assert (
        "holds video shards, but latent shards are needed: run python encode.py"
        in call("train.py", *tiny.train, f"data.shards={tiny.videos}", check=False).error
    )
    assert "nowhere holds no shards" in call("train.py", *tiny.train, "data.shards=nowhere", check=False).error


@pytest.mark.parametrize("name", ["shard", "encode", "train", "export"])
def test_foreign_output_folder(name, tiny, trained, pair, call, tmp_path):
    """No command writes into a folder that holds other files."""
    theirs = tmp_path / "runs" / "theirs"
    theirs.mkdir()
    (theirs / "holiday.jpg").write_bytes(b"precious")
    arguments = {
        "shard": (f"source={tiny.footage}", f"out={theirs}"),
        "encode": (f"shards={tiny.videos}", f"out={theirs}", f"weights={tiny.base}"),
        "train": (*tiny.train, "run=theirs", "steps=1", "batch_size=2"),
        "export": ("run=r", f"weights={pair}", f"out={theirs}"),
    }[name]
    error = call(f"{name}.py", *arguments, check=False).error
    assert "theirs holds something else" in error and "give a new or empty folder" in error
    assert files_of(theirs) == {Path("holiday.jpg"): b"precious"}


def test_shards_of_other_settings(tiny, call, tmp_path):
    """shard.py does not overwrite shards of other settings; the error names the difference."""
    shutil.copytree(tiny.videos, tmp_path / "videos")
    before = files_of(tmp_path / "videos")
    error = call("shard.py", f"source={tiny.footage}", "out=videos", "num_frames=5", check=False).error
    assert "holds video shards made otherwise (num_frames: 9 -> 5); give another out=" in error
    assert "nothing to do" in call("shard.py", f"source={tiny.footage}", "out=videos", "num_frames=9").stdout
    assert files_of(tmp_path / "videos") == before


def test_run_config_mismatch(tiny, trained, call):
    """The error for a run of another config names the differences and the fix."""
    before = files_of(trained)
    error = call("train.py", *tiny.train, "run=r", "batch_size=4", "optimizer.lr=1", "steps=2", check=False).error
    assert "run r exists with another config: batch_size: 2 -> 4; optimizer.lr: 0.0001 -> 1." in error
    assert "run=NAME" in error and "remove" not in error, "no advice to delete somebody's run"
    assert files_of(trained) == before


def test_run_lock(tiny, trained, call):
    """A run that one process trains is locked for every other process."""
    holder = RunFolder(trained)
    holder.open(read_config(trained))
    error = call("train.py", *tiny.train, "run=r", "batch_size=2", "steps=2", check=False).error
    assert "run r is being trained by process" in error
    holder.lock.close()
    call("train.py", *tiny.train, "run=r", "batch_size=2", "steps=2")


def test_sampling_missing_input(tiny, trained, call, tmp_path):
    """The errors of sample.py name what is missing: prompt, run, expert or weights."""

    def error(*arguments):
        return call("sample.py", *arguments, check=False).error

    prompt, small = "prompt=x", ("height=32", "width=32", "num_frames=5", "steps=1")
    assert 'give prompt="..." or prompts=FILE' in error("run=r")
    assert 'give prompt="..." or prompts=FILE' in error("run=r", prompt, "prompts=p.txt")
    assert "the prompt file p.txt does not exist" in error("run=r", "prompts=p.txt")
    assert "nothing to load: give run=NAME (or run=NAME,NAME) or weights=FOLDER" in error(prompt)
    assert "there is no run other in runs; it has r" in error(prompt, "run=other")
    assert "high_noise is missing: neither run=r nor" in error(prompt, "run=r")
    assert "alone=true uses one expert" in error(prompt, "run=r")
    assert "more than one of these runs trained low_noise" in error(prompt, "run=r,r")
    assert "run r trained model=tiny, not model=tiny_dense" in error(prompt, "run=r", "model=tiny_dense")
    assert "weights=nowhere is not there" in error(prompt, "weights=nowhere")
    assert "lora.dense=x.safetensors: this model has low_noise, no dense" in error(
        prompt, "run=r", "alone=true", "lora.dense=x.safetensors"
    )
    assert not (tmp_path / "samples").exists()
    said = call("sample.py", prompt, "run=r", "alone=true", *small).stdout
    assert "low_noise is used for every noise level" in said and (tmp_path / "samples" / "contact_sheet.png").is_file()


def test_export_without_checkpoint_or_expert(trained, call, tmp_path):
    """export.py refuses a run without a checkpoint, an unknown run, and a pair without its other expert."""
    assert "high_noise is missing" in call("export.py", "run=r", "out=p", check=False).error
    assert "there is no run nothing in runs; it has r" in call("export.py", "run=nothing", "out=p", check=False).error
    shutil.rmtree(trained / "checkpoints")
    assert "runs/r has no checkpoint yet" in call("export.py", "run=r", "out=p", check=False).error
    assert not (tmp_path / "p").exists()


def test_adapter_base_and_boundary(tiny, pair, call, tmp_path):
    """A LoRA needs trained base weights, and a base needs the boundary of the chosen model."""
    given = (*tiny.train, "steps=1", "batch_size=2")
    error = call("train.py", *given, "adapter=lora", check=False).error
    assert f"adapter=lora changes a trained model, but {tiny.base} holds no low_noise" in error
    assert "weights=" in error
    error = call("train.py", *given, f"weights={pair}", "model.boundary=0.9", check=False).error
    assert "has boundary_ratio=0.875, the chosen model has boundary=0.9" in error
    assert (
        "adapter.targets=ffn is unknown; choose one of attention, attention+ffn, all"
        in call("train.py", *given, f"weights={pair}", "adapter=lora", "adapter.targets=ffn", check=False).error
    )
    assert not (tmp_path / "runs").exists()


def test_expert_init_errors(tiny, pair, call, tmp_path):
    """Wrong settings of where an expert starts are refused before any work."""
    given = (*tiny.train, "steps=1", "batch_size=2")
    error = call("train.py", *given, f"weights={pair}", "init=scratch", "adapter=lora", check=False).error
    assert "init=scratch with adapter=lora: an adapter changes a trained model" in error
    nowhere = call("train.py", *given, "parts.low_noise=nowhere", check=False).error
    assert "parts.low_noise=nowhere does not exist; give a folder or a single file" in nowhere
    swapped = call("train.py", *given, f"weights={pair}", f"parts.low_noise={pair}/transformer", check=False).error
    assert "is the high_noise expert, asked for as low_noise; its tensors do not show" in swapped
    error = call("train.py", "recipe=wan_tiny_vae", "expert.trains=encoder", check=False).error
    assert "expert.trains=encoder is unknown; choose one of all, decoder" in error
    assert not (tmp_path / "runs").exists() and not (tmp_path / "data").exists()


def test_missing_gpu(call, tiny, tmp_path):
    """device=cuda without a GPU is an error; no other device is used instead."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    arguments = (f"shards={tiny.videos}", "out=latents", f"weights={tiny.base}", "device=cuda")
    assert "device=cuda, but no GPU is visible" in call("encode.py", *arguments, check=False).error
    assert not (tmp_path / "latents").exists()
