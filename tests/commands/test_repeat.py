"""The documented commands run again after a change: what is not new costs nothing. And what disks and clocks may do."""

import errno
import json
import os
import shutil
import threading
from pathlib import Path
from unittest import mock

import pytest

from wantrain.data import read_manifest
from wantrain.data.latents import store
from wantrain.models import WanVAE
from wantrain.models.text import TextEncoder
from wantrain.util.files import write_atomically

SHARD = ("source=footage", "out=videos", "num_frames=9")


@pytest.fixture
def mine(tiny, tmp_path):
    """Copies of the small world to go on with, in tmp_path."""
    for folder in (tiny.footage, tiny.videos, tiny.latents):
        shutil.copytree(folder, tmp_path / folder.name)
    return tmp_path


@pytest.fixture
def encode(tiny, call):
    fixed = ("shards=videos", "out=latents", f"weights={tiny.base}", "area=1024")
    return lambda *more, **options: call("encode.py", *fixed, *more, **options)


def tars(folder):
    """The names of a latent folder's tars, of each kind; they say what is in them."""
    manifest = read_manifest(folder, "latent")
    return {kind: {tar["name"] for tar in manifest[kind]} for kind in ("shards", "text_shards")}


def test_edited_caption_reencoded(mine, call, encode):
    """After one edited caption encode.py encodes that text alone and does not call the VAE."""
    (mine / "footage" / "clip-0003.txt").write_text("words that nobody has read yet")
    before = tars(mine / "latents")
    said = call("shard.py", *SHARD).stdout
    assert "10 files seen = 10 used" in said
    asked, unpadded = [], TextEncoder.encode_unpadded
    with (
        mock.patch.object(WanVAE, "encode", side_effect=AssertionError("the VAE is not to be asked")),
        mock.patch.object(
            TextEncoder, "encode_unpadded", lambda self, said: (asked.extend(said), unpadded(self, said))[1]
        ),
    ):
        encode("report=none")
    assert asked == ["words that nobody has read yet"]
    assert tars(mine / "latents")["shards"] == before["shards"]


@pytest.mark.parametrize("command", ["shard.py", "encode.py"])
def test_check_names_damaged_files(command, mine, encode, call):
    """encode.py out=DIR check=true reads every byte and names each damaged file, for folders of both kinds."""
    folder, kind = {"shard.py": ("videos", "video"), "encode.py": ("latents", "latent")}[command]
    assert "all as written" in call("encode.py", f"out={folder}", "check=true").stdout
    manifest = read_manifest(mine / folder, kind)
    files = [file["name"] for group in ("shards", "text_shards", "files") for file in manifest.get(group, [])]
    for name in files:
        path = mine / folder / name
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 1
        path.write_bytes(content)
    last = mine / folder / files[-1]
    if len(files) > 1:
        last.unlink()
    ended = call("encode.py", f"out={folder}", "check=true", check=False)
    assert (
        ended.returncode == 2 and f"{len(files)} of {len(files)} files of {folder} are not as written" in ended.stderr
    )
    assert all(name in ended.stderr for name in files)
    assert len(files) == 1 or f"{last.name} is missing" in ended.stderr


# ------------------------------------------------------------------------------------------- disks and clocks -----


@pytest.mark.parametrize("command", ["shard.py", "encode.py"])
def test_output_folder_not_writable(command, mine, call, encode):
    """An output folder that cannot be created is one error."""
    (mine / "file").touch()
    arguments = SHARD if command == "shard.py" else ("shards=videos",)
    error = call(command, *arguments[:1], "out=file/deeper", *arguments[2:], check=False).error
    assert "out=file/deeper" in error


def test_file_times_ignored(mine, call, encode):
    """File times have no effect: files dated in the far future or in 1970 count as unchanged."""
    for when in (4e9, 0):
        for path in mine.rglob("*"):
            os.utime(path, (when, when))
        assert "nothing to do" in call("shard.py", *SHARD).stdout
        assert "nothing to do" in encode().stdout


def test_delayed_file_names(mine, call, encode):
    """encode.py waits for files that a network disk shows a second after they were written."""
    late, write = [], write_atomically

    def slow(path, content):
        if path.name.startswith((".latent-", ".text-")):
            late.append(threading.Timer(1, write, (path, content)))
            late[-1].start()
        else:
            write(path, content)

    shutil.move(mine / "latents", mine / "before")
    with mock.patch.object(store, "write_atomically", slow):
        encode("report=none")
    assert len(late) > 1
    before, after = (read_manifest(mine / name, "latent") for name in ("before", "latents"))
    assert before == after
    assert not [path for path in (mine / "latents").iterdir() if path.name.startswith((".latent-", ".text-"))]


def test_file_name_never_appears(mine, encode, monkeypatch):
    """A written file that never appears is one error."""
    monkeypatch.setattr(store, "TIMEOUT", 0.5)
    shutil.rmtree(mine / "latents")
    write = write_atomically
    with mock.patch.object(
        store, "write_atomically", lambda path, said: None if path.name.startswith(".text-") else write(path, said)
    ):
        error = encode("report=none", check=False).error
    assert "has disappeared; start the same command again" in error


def test_failed_rename(mine, call, encode):
    """A failed rename, as on a network disk, leaves the folder intact, and the next start finishes it."""
    (mine / "footage" / "clip-0003.txt").write_text("another caption")
    before, replace = json.loads((mine / "videos" / "manifest.json").read_text()), Path.replace

    def refuse(self, target):
        if Path(target).suffix == ".tar":
            raise OSError(errno.EIO, "Input/output error")
        return replace(self, target)

    with mock.patch.object(Path, "replace", refuse):
        error = call("shard.py", *SHARD, check=False).error
    assert "cannot write" in error and "start the same command again" in error
    assert json.loads((mine / "videos" / "manifest.json").read_text()) == before
    assert "all as written" in call("encode.py", "out=videos", "check=true").stdout
    assert "10 files seen = 10 used" in call("shard.py", *SHARD).stdout
