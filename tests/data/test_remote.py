"""Shards from an address: what was promised or nothing, within the cache's size, and shared by many processes."""

import contextlib
import fcntl
import gc
import hashlib
import http.server
import json
import os
import subprocess
import threading
import time
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest

from wantrain.data import LatentData, remote
from wantrain.data.remote import Cache, RemoteShards, open_shards

SHARDS, SIZE = 5, 40_000


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; notes what was asked for. What `cut` names is cut short, `drop` gets no answer, `trickle` a byte
    now and then, each that many times; all tars wait for `gate`.
    """

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.server.asked.append(name)
        if name.endswith(".tar"):
            self.server.gate.wait(20)
        if self.server.drop.get(name, 0) > 0:
            self.server.drop[name] -= 1
            self.close_connection = True
            return
        if self.server.trickle.get(name, 0) > 0:
            self.server.trickle[name] -= 1
            self.send_response(200)
            self.send_header("Content-Length", str(SIZE))
            self.end_headers()
            with contextlib.suppress(OSError):  # the reader has had enough
                for _ in range(100):
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    time.sleep(0.1)
            self.close_connection = True
            return
        if self.server.cut.get(name, 0) > 0:
            self.server.cut[name] -= 1
            self.send_response(200)
            self.send_header("Content-Length", str(SIZE))
            self.end_headers()
            self.wfile.write(b"x" * 1000)
            self.close_connection = True
            return
        super().do_GET()

    def log_message(self, *_):
        pass


def prepare(server):
    """No faults, and nothing was asked for."""
    server.asked, server.cut, server.drop, server.trickle, server.gate = [], {}, {}, {}, threading.Event()
    server.gate.set()


@pytest.fixture
def server(tmp_path):
    """tmp_path/shards, at server.url."""
    (tmp_path / "shards").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path)) as server:
        prepare(server)
        server.url = f"http://127.0.0.1:{server.server_port}/shards"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def content(number):
    return np.random.default_rng(number).bytes(SIZE)


def describe(name, data):
    return {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@pytest.fixture
def shards(tmp_path, server):
    """Five shards of 40 kB and one small file, served; returns their manifest."""
    folder = tmp_path / "shards"
    for number in range(SHARDS):
        (folder / f"latent-{number:06d}.tar").write_bytes(content(number))
    (folder / "index.safetensors").write_bytes(b"index")
    rows = [describe(f"latent-{number:06d}.tar", content(number)) for number in range(SHARDS)]
    manifest = {"kind": "latent", "shards": rows, "files": [describe("index.safetensors", b"index")]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return manifest


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    monkeypatch.setattr(remote, "TIMEOUT", 0.5)
    monkeypatch.setattr(remote, "TRIES", 3)


def name_of(number):
    return f"latent-{number:06d}.tar"


def tars(cache):
    return sorted(path.name for path in cache.rglob("*.tar"))


def size_of(cache):
    """Bytes in the cache; a file that gets its name while we look counts once."""
    found = {}
    for path in cache.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            found[path.stat().st_ino] = 0 if path.is_dir() else path.stat().st_size
    return sum(found.values())


def test_fetch_once(tmp_path, server, shards):
    """A shard is fetched once, when it is first read."""
    files = open_shards(server.url, cache=tmp_path / "cache", cache_gb=1)
    assert (files.folder / "manifest.json").read_bytes() == (tmp_path / "shards" / "manifest.json").read_bytes()
    assert (files.folder / "index.safetensors").read_bytes() == b"index"
    assert tars(tmp_path / "cache") == []
    for start, stop in ((0, 10), (100, 30_000), (SIZE - 5, SIZE)):
        assert files.read(name_of(3), start, stop) == content(3)[start:stop]
    again = open_shards(server.url, cache=tmp_path / "cache", cache_gb=1)
    assert again.read(name_of(3), 0, SIZE) == content(3)
    assert server.asked == ["manifest.json", "index.safetensors", name_of(3), "manifest.json"]


def test_changed_shards(tmp_path, server, shards):
    """Other shards at the same URL are other files in the cache."""
    old = open_shards(server.url, cache=tmp_path / "cache", cache_gb=1)
    assert old.read(name_of(0), 0, SIZE) == content(0)
    (tmp_path / "shards" / name_of(0)).write_bytes(content(9))
    shards["shards"][0] = describe(name_of(0), content(9))
    (tmp_path / "shards" / "manifest.json").write_text(json.dumps(shards))
    new = open_shards(server.url, cache=tmp_path / "cache", cache_gb=1)
    assert new.read(name_of(0), 0, SIZE) == content(9)
    assert old.read(name_of(0), 0, SIZE) == content(0)


def test_cache_eviction(tmp_path, server, shards, capsys):
    """The cache stays within its size and keeps the shards that were read last."""
    limit = 2.5 * SIZE
    files = open_shards(server.url, cache=tmp_path / "cache", cache_gb=limit / 1e9)
    assert "shards will be fetched repeatedly" in capsys.readouterr().out
    order = np.random.default_rng(0).integers(SHARDS, size=60).tolist()
    for number in order:
        assert files.read(name_of(number), 0, SIZE) == content(number)
        assert size_of(tmp_path / "cache") <= limit
    last_two = sorted({name_of(number) for number in list(dict.fromkeys(reversed(order)))[:2]})
    assert tars(tmp_path / "cache") == last_two
    assert (files.folder / "manifest.json").is_file()
    assert (files.folder / "index.safetensors").is_file()


def test_open_shards_kept(tmp_path, server, shards):
    """A shard that is being read is never removed.

    Readers of two shards hold them; the third has no room until one lets go, and the error says how much is needed.
    """
    files = open_shards(server.url, cache=tmp_path / "cache", cache_gb=2.5 * SIZE / 1e9)
    held = [files._open(name_of(number)) for number in (0, 1)]
    with pytest.raises(ValueError, match=r"full of files that processes are reading .*data\.cache_gb="):
        files.read(name_of(2), 0, SIZE)
    assert [os.pread(handle, SIZE, 0) for handle in held] == [content(0), content(1)]
    assert tars(tmp_path / "cache") == [name_of(0), name_of(1)]
    os.close(held[1])
    assert files.read(name_of(2), 0, SIZE) == content(2)
    assert tars(tmp_path / "cache") == [name_of(0), name_of(2)]
    os.close(held[0])


def test_short_download(tmp_path, server, shards):
    """A download that differs from the manifest is tried again and never used."""
    files = open_shards(server.url, cache=tmp_path / "cache", cache_gb=1)
    server.cut[name_of(1)] = 2
    assert files.read(name_of(1), 0, SIZE) == content(1)
    assert server.asked.count(name_of(1)) == 3
    server.cut[name_of(2)] = 3
    with pytest.raises(ValueError, match=rf"{name_of(2)} differs from its manifest: 1000 bytes .*3 attempts failed"):
        files.read(name_of(2), 0, SIZE)
    for damage in (content(8), content(3) + b"more", content(3)[:-1]):
        (tmp_path / "shards" / name_of(3)).write_bytes(damage)
        with pytest.raises(ValueError, match="differs from its manifest"):
            files.read(name_of(3), 0, SIZE)
    (tmp_path / "shards" / name_of(3)).unlink()
    with pytest.raises(ValueError, match=r"cannot be read .*404"):
        files.read(name_of(3), 0, SIZE)
    assert tars(tmp_path / "cache") == [name_of(1)]
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_killed_fetch(tmp_path, server, shards):
    """A partial file that a killed process left is not used, and is removed to free its space."""
    files = open_shards(server.url, cache=tmp_path / "cache", cache_gb=1.5 * SIZE / 1e9)
    for number in (0, 1):
        (files.folder / f".{name_of(number)}.tmp").write_bytes(bytes(SIZE))
    assert files.read(name_of(0), 0, SIZE) == content(0)
    assert not list((tmp_path / "cache").rglob("*.tmp"))


@pytest.mark.parametrize("name", ["../evil.tar", "/etc/passwd", "a/b.tar", ".hidden", "manifest.json", ".."])
def test_unsafe_names(tmp_path, server, shards, name):
    """A manifest with a name that leads outside its folder or to another file there is refused."""
    shards["shards"].append(describe(name, b""))
    (tmp_path / "shards" / "manifest.json").write_text(json.dumps(shards))
    with pytest.raises(ValueError, match=r"is not a manifest .*cannot be the name of a shard"):
        open_shards(server.url, cache=tmp_path / "cache", cache_gb=1)


def test_bad_urls_and_sizes(tmp_path, server, shards):
    """A bad URL, manifest, cache folder or cache size raises one ValueError."""
    with pytest.raises(ValueError, match=r"nowhere/manifest\.json cannot be read"):
        open_shards(f"{server.url}/nowhere", cache=tmp_path / "cache", cache_gb=1)
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:9/manifest\.json cannot be read"):
        open_shards("http://127.0.0.1:9", cache=tmp_path / "cache", cache_gb=1)
    with pytest.raises(ValueError, match=r"s3://bucket/manifest.json.*needs a driver .*wantrain\[remote\]"):
        open_shards("s3://bucket", cache=tmp_path / "cache", cache_gb=1)
    with pytest.raises(ValueError, match=r"data\.cache_gb=0 must be above 0"):
        open_shards(server.url, cache=tmp_path / "cache", cache_gb=0)
    small = open_shards(server.url, cache=tmp_path / "cache", cache_gb=SIZE / 2e9)
    with pytest.raises(ValueError, match=r"data\.cache_gb=2e-05 has no room for latent-000000\.tar"):
        small.read(name_of(0), 0, SIZE)
    for text in (b"not json", b"[1]", b'{"files": [{}]}', b'{"files": 3}', b"\xff\xfe"):
        (tmp_path / "shards" / "manifest.json").write_bytes(text)
        with pytest.raises(ValueError, match="is not a manifest"):
            open_shards(server.url, cache=tmp_path / "cache", cache_gb=1)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"data\.cache=.*cannot be made"):
        open_shards(server.url, cache=tmp_path / "file" / "cache", cache_gb=1)


CHILD = """
import hashlib, random, sys
from pathlib import Path
from wantrain.data.remote import Cache, RemoteShards
url, cache, limit, seed = sys.argv[1:]
files = RemoteShards(url, Cache(Path(cache), float(limit) / 1e9))
for number in random.Random(int(seed)).choices(range(5), k=120):
    name = f"latent-{number:06d}.tar"
    data = files.read(name, 0, 40_000)
    assert hashlib.sha256(data).hexdigest() == files.files[name]["sha256"]
"""


def test_shared_cache(tmp_path, server, shards, python, environment):
    """Several processes share one cache.

    Three read at random through a cache of four of the five shards: all right, within its size, nothing left over.
    """
    limit, cache = 4.2 * SIZE, tmp_path / "cache"
    command = [python, "-c", CHILD, server.url, str(cache), str(limit)]
    children = [
        subprocess.Popen([*command, str(seed)], env=environment, stderr=subprocess.PIPE, text=True) for seed in range(3)
    ]
    largest = 0
    while any(child.poll() is None for child in children):
        if cache.is_dir() and (cache / ".lock").exists():
            with (cache / ".lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # nobody reserves or removes while we look
                largest = max(largest, size_of(cache))
    assert [child.stderr.read() for child in children] == [""] * 3
    assert [child.returncode for child in children] == [0] * 3
    assert 0 < largest <= limit
    assert not list(cache.rglob("*.tmp"))
    assert len(tars(cache)) >= 3


def test_manifest_race(tmp_path, server, shards, monkeypatch):
    """A manifest that is being written is not mistaken for a killed fetch.

    Another makes room just before the manifest gets its name: it must wait for that.
    """
    cache, replace = Cache(tmp_path / "cache", SIZE / 1e9), Path.replace

    def make_room():
        with pytest.raises(ValueError, match="is full"):
            cache._reserve(cache.folder / ".other.tar.tmp", SIZE)

    other = threading.Thread(target=make_room)

    def replace_late(path, target):
        other.start()
        other.join(0.3)
        return replace(path, target)

    monkeypatch.setattr("wantrain.data.remote.TIMEOUT", 1.0)
    monkeypatch.setattr(Path, "replace", replace_late)
    files = RemoteShards(server.url, cache)
    other.join()
    assert (files.folder / "manifest.json").exists()


def test_concurrent_fetch(tmp_path, server, shards):
    """Readers that want the same shard at the same time fetch it once."""
    cache = tmp_path / "cache"
    files = [RemoteShards(server.url, Cache(cache, 1)) for _ in range(8)]
    found = [None] * 8

    def read(number):
        found[number] = files[number].read(name_of(4), 0, SIZE)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [content(4)] * 8
    assert server.asked.count(name_of(4)) == 1


# ------------------------------------------------------------------------------------------------- fetched ahead


def until(condition, seconds=20):
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_fetched_ahead(tmp_path, server, shards):
    """What is foreseen is fetched before it is read, in order and once, and reading it asks for nothing."""
    files = open_shards(server.url, cache=tmp_path / "cache", cache_gb=1)
    order = [name_of(number) for number in (3, 0, 4)]
    assert files.foresee(order[:2]) and files.foresee([order[1], order[2]])
    until(lambda: tars(tmp_path / "cache") == sorted(order))
    asked = [name for name in server.asked if name.endswith(".tar")]
    assert sorted(asked) == sorted(order)
    assert [files.read(name, 0, SIZE) for name in order] == [content(number) for number in (3, 0, 4)]
    assert files.read(name_of(1), 0, SIZE) == content(1)  # nobody foresaw this one
    assert [name for name in server.asked if name.endswith(".tar")] == [*asked, name_of(1)]
    assert files.traffic().fetched == 4 * SIZE + len(b"index")


def test_room_ahead(tmp_path, server, shards):
    """Half of the cache is for what is not read yet, and reading makes room; a slow server delays, and the wait counts."""
    server.gate.clear()
    files = open_shards(server.url, cache=tmp_path / "cache", cache_gb=4.5 * SIZE / 1e9)
    assert files.foresee([name_of(0), name_of(1)])
    assert not files.foresee([name_of(2)])
    found = []
    reader = threading.Thread(target=lambda: found.append(files.read(name_of(0), 0, SIZE)))
    reader.start()
    reader.join(0.3)
    assert reader.is_alive(), "the server has not answered yet"
    server.gate.set()
    reader.join(20)
    assert found == [content(0)]
    assert files.traffic().waited >= 0.25
    assert files.foresee([])
    assert files.read(name_of(2), 0, SIZE) == content(2)


def test_held_until_read(tmp_path, server, shards):
    """What is fetched ahead stays until it is read, however many other shards are read and fetched meanwhile."""
    files = open_shards(server.url, cache=tmp_path / "cache", cache_gb=3.5 * SIZE / 1e9)
    files.foresee([name_of(0)])
    until(lambda: tars(tmp_path / "cache") == [name_of(0)])
    for number in (1, 2, 3, 4, 1, 2, 3, 4):
        assert files.read(name_of(number), 0, SIZE) == content(number)
    assert files.read(name_of(0), 0, SIZE) == content(0)
    assert server.asked.count(name_of(0)) == 1
    for number in (1, 2, 3, 4):
        files.read(name_of(number), 0, SIZE)
    assert name_of(0) not in tars(tmp_path / "cache")


def test_faults_ahead(tmp_path, server, shards, monkeypatch):
    """Dropped connections, short answers and a server that hardly sends: tried again, and the right bytes are read; an
    error names the shard, where it is read, and nothing hangs.
    """
    monkeypatch.setattr(remote, "REACHING", 4)
    server.drop, server.cut, server.trickle = {name_of(0): 3, name_of(3): 99}, {name_of(1): 2, name_of(2): 9}, {}
    server.trickle = {name_of(4): 1}
    files = open_shards(server.url, cache=tmp_path / "cache", cache_gb=1)
    files.foresee([name_of(number) for number in range(SHARDS)])
    for number in (0, 1, 4):
        assert files.read(name_of(number), 0, SIZE) == content(number)
    assert [server.asked.count(name_of(number)) for number in (0, 1, 4)] == [4, 3, 2]
    with pytest.raises(ValueError, match=rf"{name_of(2)} differs from its manifest: 1000 bytes .*; 3 attempts failed"):
        files.read(name_of(2), 0, SIZE)
    with pytest.raises(ValueError, match=rf"{name_of(3)} cannot be read \(.*; 4 attempts failed"):
        files.read(name_of(3), 0, SIZE)
    server.drop, server.cut = {}, {}
    assert files.read(name_of(2), 0, SIZE) == content(2), "it is asked for again"
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_threads_end(tmp_path, server, shards):
    """Without the shards their threads end."""
    files = open_shards(server.url, cache=tmp_path / "cache", cache_gb=1)
    files.foresee([name_of(0)])
    assert any(thread.name.startswith("fetch") for thread in threading.enumerate())
    del files
    gc.collect()
    until(lambda: not any(thread.name.startswith("fetch") for thread in threading.enumerate()))


def test_latents_foreseen(tmp_path, tiny):
    """A micro-batch foreseen is a micro-batch that reads nothing more: clips, windows and captions are the drawn ones."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tiny.latents)) as server:
        prepare(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        data = LatentData(shards=f"http://127.0.0.1:{server.server_port}", cache=tmp_path / "cache", cache_gb=1)
        opened = list(server.asked)
        samples, positions = range(len(data.train)), range(5, 5 + len(data.train))
        assert data.foresee(samples, positions)
        until(lambda: not data.files._ahead._names.qsize() and len(tars(tmp_path / "cache")) > 0)
        for sample, position in zip(samples, positions, strict=True):
            data.load([sample], [position])
        asked = server.asked[len(opened) :]
        assert len(asked) == len(set(asked)) and data.traffic()[0].fetched > 0
        server.shutdown()


def test_remote_latents(tmp_path, tiny):
    """Latents from a URL, http:// or memory://, give the same samples as those from the disk."""
    memory = fsspec.filesystem("memory")
    for path in tiny.latents.iterdir():
        if path.is_file():
            memory.pipe(f"/bucket/latents/{path.name}", path.read_bytes())
    here = LatentData(shards=tiny.latents, holdout=0.2)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tiny.latents)) as server:
        prepare(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        for place in (f"http://127.0.0.1:{server.server_port}", "memory://bucket/latents/"):
            data = LatentData(shards=place, holdout=0.2, cache=tmp_path / place[:4], cache_gb=1)
            assert data.fingerprint == here.fingerprint
            assert data.captions() == here.captions()
            for sample in range(len(here.train)):
                ours, theirs = here.load([sample], [sample]), data.load([sample], [sample])
                assert ours.ids == theirs.ids
                assert (ours.latents_BCTHW == theirs.latents_BCTHW).all()
                assert (ours.text_BLD == theirs.text_BLD).all()
        server.shutdown()
