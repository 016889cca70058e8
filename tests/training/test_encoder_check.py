"""Were the latents made by the base's encoders? Answered from files where it can be, from values once where not."""

import json
import re
import shutil

import pytest

from wantrain import config
from wantrain.models import load_text_encoder, load_vae
from wantrain.models.formats import base as bases
from wantrain.models.formats.fingerprints import NOTES
from wantrain.training import build, encoder_check


@pytest.fixture
def loads(monkeypatch):
    """The encoders that are loaded, in order."""
    seen = []

    def noting(name, load):
        def loading(*args, **kwargs):
            seen.append(name)
            return load(*args, **kwargs)

        return loading

    monkeypatch.setattr(bases, "load_vae", noting("vae", load_vae))
    monkeypatch.setattr(bases, "load_text_encoder", noting("text_encoder", load_text_encoder))
    return seen


@pytest.fixture
def latents(tiny, tmp_path):
    """Latents of one's own, to be changed, without notes."""
    shutil.copytree(tiny.latents, tmp_path / "latents")
    (tmp_path / "latents" / NOTES).unlink(missing_ok=True)
    return tmp_path / "latents"


@pytest.fixture
def start(tiny, call, latents):
    """start("run=r", ...): a start of a micro run on these latents; what it said."""

    def begin(*given):
        return call("train.py", *tiny.train, f"data.shards={latents}", "steps=1", "batch_size=2", *given).stdout

    return begin


def edit(latents, **changed):
    """Change a manifest; None takes a key out."""
    file = latents / "manifest.json"
    manifest = {**json.loads(file.read_text()), **changed}
    file.write_text(json.dumps({key: value for key, value in manifest.items() if value is not None}))


def test_start_loads_no_encoder(start, loads, latents):
    """A start without previews loads no encoder if the latents name the base's files."""
    said = start()
    assert loads == [] and "compared" not in said and "taken" not in said
    assert not (latents / NOTES).exists()


def test_previews_load_encoders(start, loads):
    """Previews load the VAE and the text encoder, and nothing else loads them."""
    start("sample.every=1", "sample.count=1", "sample.steps=1", "run=shown")
    assert set(loads) == {"vae", "text_encoder"} and loads.count("text_encoder") == 1


def test_same_values_in_other_files(tiny, start, loads, latents, tmp_path):
    """Encoders with the same values in other files are compared once."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny.base, tmp_path / "base")
    for file in (tmp_path / "base").rglob("*.safetensors"):
        save_file(load_file(file), file, metadata={"format": "pt", "saved": "again"})
    said = start(f"weights={tmp_path / 'base'}", "run=one")
    assert loads == ["vae", "text_encoder"]
    assert re.findall(r"the (\w+) lies in other files", said) == loads
    again = start(f"weights={tmp_path / 'base'}", "run=two")
    assert loads == ["vae", "text_encoder"] and "other files" not in again
    # Wherever they lie by then.
    (tmp_path / "base").rename(tmp_path / "moved")
    start(f"weights={tmp_path / 'moved'}", "run=three")
    assert loads == ["vae", "text_encoder"]


def test_latents_of_older_version(start, loads, latents):
    """Latents of an older version are compared by the encoders' values once."""
    edit(latents, encoders=None)
    assert "made before that was noted" in start("run=one")
    start("run=two")
    assert loads == ["vae", "text_encoder"]


def test_read_only_latents(start, loads, latents, tmp_path, monkeypatch):
    """The notes go to the run folder where the latents cannot be written."""
    edit(latents, encoders=None)
    monkeypatch.setattr(encoder_check.os, "access", lambda path, mode: path != latents)
    start("run=one")
    assert (tmp_path / "runs" / "one" / NOTES).is_file() and not (latents / NOTES).exists()
    start("run=one", "steps=2")
    assert loads == ["vae", "text_encoder"]


def test_other_encoder_refused(tiny, call, loads, latents):
    """Latents of another text encoder are refused at every start, the second time from the notes."""
    edit(latents, encoders=None, text_encoder_fingerprint="0123456789abcdef")
    for _ in range(2):
        given = (*tiny.train, f"data.shards={latents}", "steps=1")
        error = call("train.py", *given, check=False).error
        assert "was encoded by another text_encoder (fingerprint 0123456789abcdef, " in error
    assert loads == ["vae", "text_encoder"], "the second time from the notes"


def test_sets_of_several_versions(tiny, latents, call, loads):
    """Of several sets of latents, one that names its encoders is enough."""
    edit(latents, encoders=None)
    sets = f"{{a: {{shards: {latents}}}, b: {{shards: {tiny.latents}}}}}"
    call("train.py", *tiny.train[:-2], "data=mixed", f"data.sets={sets}", "steps=1", "batch_size=2", "data.holdout=0")
    assert loads == []


def test_partial_download(tiny, pair, start, loads, tmp_path, monkeypatch):
    """Of a repository only the trained expert is downloaded, and its encoders are assumed to match."""
    snapshot, asked = tmp_path / "snapshot", []
    shutil.copytree(pair / "transformer_2", snapshot / "transformer_2")
    shutil.copy(pair / "model_index.json", snapshot)
    (snapshot / "text_encoder").mkdir()  # of which an earlier download left no more than this
    (snapshot / "text_encoder" / "config.json").write_text("{}")
    monkeypatch.setattr(bases, "_fetch", lambda name, revision, wanted: asked.append(list(wanted)) or snapshot)
    said = start("weights=owner/name", "adapter=lora", "adapter.rank=2")
    assert asked == [["low_noise"]] and loads == []
    assert "was encoded by the right vae and text_encoder, or so it is taken" in said


def test_wanted_parts():
    """With previews, every part that sampling needs is wanted."""
    for every, expert, parts in (
        (0, "high_noise", ["high_noise"]),
        (0, "both", ["high_noise", "low_noise"]),
        (5, "low_noise", ["low_noise", "high_noise", "vae", "text_encoder", "tokenizer"]),
    ):
        cfg = config.compose("train", [f"sample.every={every}", f"expert={expert}"])
        assert build.parts_needed(config.plain(cfg), config.experts(cfg)) == parts
