"""A folder copied to an address: it reads there as here, and what is there is not sent again."""

import json

import fsspec
import pytest

from wantrain.data import LatentData, upload
from wantrain.data.upload import check_address, upload_folder


@pytest.fixture
def sent(monkeypatch):
    """Names of the files that were sent, in order."""
    found, send = [], upload._send

    def noted(fs, file, *others):
        found.append(file.name)
        send(fs, file, *others)

    monkeypatch.setattr(upload, "_send", noted)
    return found


def test_upload(tiny, tmp_path, sent, capsys):
    """After a break in the middle the same call sends the rest alone; the manifest comes last."""
    url, memory = "memory://sent/latents", fsspec.filesystem("memory")
    upload_folder(tiny.latents, url)
    assert sent[-1] == "manifest.json" and len(sent) > 4
    there = LatentData(shards=url, cache=tmp_path / "cache", cache_gb=1)
    here = LatentData(shards=tiny.latents)
    assert there.fingerprint == here.fingerprint
    assert (there.load([0], [0]).latents_BCTHW == here.load([0], [0]).latents_BCTHW).all()
    shards = [name for name in sent if name.endswith((".tar", ".safetensors"))]
    memory.rm(f"/sent/latents/{shards[1]}")
    memory.pipe(f"/sent/latents/{shards[2]}", b"half")
    sent.clear()
    upload_folder(tiny.latents, url)
    assert [name for name in sent if name in shards] == shards[1:3] and sent[-1] == "manifest.json"
    assert "data.shards=memory://sent/latents reads it" in capsys.readouterr().out


def test_disk(tiny, tmp_path):
    """A folder on a disk is an address too."""
    upload_folder(tiny.latents, f"file://{tmp_path}/copy/latents")
    copy = json.loads((tmp_path / "copy" / "latents" / "manifest.json").read_text())
    assert copy == json.loads((tiny.latents / "manifest.json").read_text())
    LatentData(shards=tmp_path / "copy" / "latents")


def test_refused(tiny, monkeypatch):
    for url in ("http://host/latents", "/disk/latents", "s4://bucket/latents"):
        with pytest.raises(ValueError, match=url):
            check_address(url)

    def full(*_, **__):
        raise OSError("no space")

    monkeypatch.setattr(fsspec.filesystem("memory").__class__, "put_file", full)
    with pytest.raises(ValueError, match=r"memory://full/\S+ cannot be written \(OSError: no space\)"):
        upload_folder(tiny.latents, "memory://full")
