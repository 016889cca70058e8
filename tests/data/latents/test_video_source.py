"""Video shards at an address: the same latents as from the folder, each tar fetched by whom it is for, or one error."""

import io
import json
import os
import shutil
import time
from pathlib import Path

import fsspec
import pytest
from shard_helpers import contents, encode, shard

from wantrain import checks, config
from wantrain.data import PixelData, remote
from wantrain.data.footage.decode_workers import Decoded, Job
from wantrain.data.footage.video_shards import read_index, scan_video_shards
from wantrain.data.latents.video_source import VideoSource
from wantrain.data.shards import read_manifest
from wantrain.util.distributed import Part


@pytest.fixture(scope="module")
def videos(videos, tmp_path_factory):
    """The same video shards in tars of a few files."""
    folder = tmp_path_factory.mktemp("small") / "videos"
    shard(shutil.copytree(videos.parent / "footage", folder.parent / "footage"), folder, shard_bytes=10_000)
    assert len(names_of(folder)) > 3
    return folder


@pytest.fixture(scope="module")
def latents(videos):
    encode(videos, videos.parent / "latents")
    return videos.parent / "latents"


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """Names of the files that were asked for, in order; no pauses."""
    names, open_url = [], remote.open_url

    def noting(url):
        names.append(url.rpartition("/")[2])
        return open_url(url)

    monkeypatch.setattr(remote, "open_url", noting)
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    monkeypatch.setattr(remote, "TIMEOUT", 2.0)
    return names


@pytest.fixture
def url(videos, tmp_path):
    """A copy of the video shards at a memory:// address."""
    files, place = fsspec.filesystem("memory"), f"/{tmp_path.name}/videos"
    for path in videos.iterdir():
        if path.is_file():
            files.pipe_file(f"{place}/{path.name}", path.read_bytes())
    yield f"memory:/{place}"
    files.rm(f"/{tmp_path.name}", recursive=True)


def names_of(videos):
    return [row["name"] for row in read_manifest(videos, "video")["shards"]]


def visible(folder):
    return {name: digest for name, digest in contents(folder).items() if not name.startswith(".")}


def handles_in(folder):
    """Open handles of this process below a folder."""
    found = [os.path.realpath(each) for each in Path("/proc/self/fd").iterdir()]
    return [path for path in found if path.startswith(str(folder))]


def test_index(videos):
    """The index says of every file what the tars say."""
    manifest = read_manifest(videos, "video")
    (row,) = manifest["files"]
    entries = list(read_index(videos / row["name"]))
    assert entries == list(scan_video_shards(videos, manifest)) and len(entries) == manifest["files_used"]


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_same_latents(videos, latents, url, tmp_path, asked, scheme):
    """Byte for byte the folder's latents; every tar is fetched once, and then nothing is left but the cache."""
    place, cache = url if scheme == "memory" else videos.as_uri(), tmp_path / "cache"
    encode(place, tmp_path / "out", cache=str(cache))
    assert visible(tmp_path / "out") == visible(latents)
    assert sorted(name for name in asked if name.endswith(".tar")) == sorted(names_of(videos))
    left = {
        path.name for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock" and path.name != ".lock"
    }
    assert left == {"manifest.json", read_manifest(videos, "video")["files"][0]["name"], *names_of(videos)}
    assert handles_in(cache) == []
    asked.clear()
    encode(place, tmp_path / "out", cache=str(cache))
    assert asked == ["manifest.json"]


def test_small_cache(videos, latents, url, tmp_path):
    """A cache with room for one tar is enough, though several are in use, and keeps its size."""
    largest = max(row["bytes"] for row in read_manifest(videos, "video")["shards"])
    limit = largest + sum(path.stat().st_size for path in videos.iterdir() if path.suffix in {".json", ".jsonl"})
    encode(url, tmp_path / "out", cache=str(tmp_path / "cache"), cache_gb=limit / 1e9, workers=3)
    assert visible(tmp_path / "out") == visible(latents)
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file()) <= limit


def test_fetched_ahead(videos, url, tmp_path, asked):
    """The first job of a tar fetches it and the two after it; each is closed after the last clip of its last job."""
    names = names_of(videos)
    source = VideoSource(url, cache=tmp_path / "cache", cache_gb=1)
    tars = source.tars([Job({"tar": name, "windows": [{}]}) for name in names for _ in range(2)])
    jobs = tars.jobs()
    assert Path(next(jobs).request["tar"]).read_bytes() == (videos / names[0]).read_bytes()
    deadline = time.monotonic() + 20
    while not set(names[:3]) <= set(asked) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(names[:3]) == {name for name in asked if name.endswith(".tar")}
    assert next(jobs).request["tar"] == next(iter(tars.jobs())).request["tar"]
    results = tars.results(iter([Decoded(None, "bad")] * 3))
    assert [next(results).reason for _ in range(2)] == ["bad", "bad"] and names[0] in str(handles_in(tmp_path))
    next(results)
    assert names[0] not in str(handles_in(tmp_path))
    tars.close()


def test_own_tars(videos, latents, url, tmp_path, asked):
    """A part fetches the tars of its own work units; what is there already needs none."""
    for number in (1, 2):
        asked.clear()
        encode(url, tmp_path / "out", part=Part(number, 2), cache=str(tmp_path / f"cache-{number}"))
        assert 0 < len({name for name in asked if name.endswith(".tar")}) < len(names_of(videos))
    assert visible(tmp_path / "out") == visible(latents)


def test_truncated(videos, latents, url, tmp_path, monkeypatch, asked):
    """A tar that comes short, or with other bytes, is fetched again."""
    short, other, *_ = names_of(videos)
    open_url, bad = remote.open_url, {short: lambda content: content[:1000], other: lambda content: content[::-1]}

    def at_first(url):
        file = open_url(url)
        spoil = bad.pop(url.rpartition("/")[2], None)
        return file if spoil is None else io.BytesIO(spoil(file.read()))

    monkeypatch.setattr(remote, "open_url", at_first)
    encode(url, tmp_path / "out", cache=str(tmp_path / "cache"))
    assert visible(tmp_path / "out") == visible(latents)
    assert [asked.count(name) for name in (short, other)] == [2, 2]


def test_missing(videos, latents, url, tmp_path):
    """A tar that is not there is one error that names it; what was made stays, and the same command goes on."""
    name, out, cache = names_of(videos)[-1], tmp_path / "out", tmp_path / "cache"
    files, place = fsspec.filesystem("memory"), url.removeprefix("memory:/")
    content = files.cat_file(f"{place}/{name}")
    files.rm(f"{place}/{name}")
    with pytest.raises(ValueError, match=rf"{url}/{name} cannot be read \(FileNotFoundError: .*; 4 attempts failed"):
        encode(url, out, cache=str(cache))
    assert not (out / "manifest.json").exists() and not list(cache.rglob(".*.tmp")) and handles_in(cache) == []
    files.pipe_file(f"{place}/{name}", content)
    encode(url, out, cache=str(cache))
    assert visible(out) == visible(latents)


@pytest.mark.parametrize(
    ("command", "key", "instead"),
    [
        ("caption", "source", "captions are written"),
        ("shard", "out", "copy the finished"),
        ("encode", "out", "upload="),
    ],
)
def test_on_disk(command, key, instead):
    """What a command writes into lies on a disk, and an address is refused before any work."""
    words = {"caption": ["source=x"], "shard": ["source=x", "out=y"], "encode": ["shards=memory://x", "out=y"]}[command]
    words = [*words, f"{key}=s3://bucket/x"]
    with pytest.raises(ValueError, match=f"{key}=s3://bucket/x is an address, and must be a folder .*{instead}"):
        checks.check(config.compose(command, words), given=config.keys_of(words))


def test_pixels_on_disk():
    """Training a VAE reads no address."""
    with pytest.raises(ValueError, match=r"data\.shards=s3://bucket/x is an address, and expert=vae"):
        PixelData(shards="s3://bucket/x", num_frames=17, area=4096, multiple=16)


def test_refused(videos, latents, footage, tmp_path):
    """Latents, nothing, and shards without an index, which shard.py adds, are refused by the address."""
    with pytest.raises(ValueError, match=rf"shards={latents.as_uri()}: .* holds latent shards"):
        encode(latents.as_uri(), tmp_path / "out", cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"nowhere/manifest.json cannot be read"):
        encode(f"file://{tmp_path}/nowhere", tmp_path / "out", cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"^cache_gb=1e-07 has no room for "):
        encode(videos.as_uri(), tmp_path / "out", cache=str(tmp_path / "cache"), cache_gb=1e-7)
    old = shutil.copytree(videos, tmp_path / "old")
    manifest = json.loads((old / "manifest.json").read_text())
    (index,) = manifest.pop("files")
    (old / index["name"]).unlink()
    (old / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="has no index of its files"):
        encode(old.as_uri(), tmp_path / "out", cache=str(tmp_path / "cache"))
    tars = {path: path.stat().st_mtime_ns for path in old.glob("*.tar")}
    assert shard(footage, old, shard_bytes=10_000)["files"] == [index]
    assert {path: path.stat().st_mtime_ns for path in old.glob("*.tar")} == tars
