"""Video shards: the same bytes for the same footage, counted files, and no way to read a damaged or foreign one."""

import hashlib
import json
import os
import shutil
import signal
import tarfile
import time
from pathlib import Path

import pytest
import webdataset
from shard_helpers import shard

from wantrain.data import check_folder, find_footage, read_manifest
from wantrain.data.footage.probe import probe, read_whole
from wantrain.data.footage.survey import Surveys
from wantrain.data.footage.video_shards import read_video_shards
from wantrain.data.shards import TarWriter, check_shards
from wantrain.demo.footage import make_footage

SETTINGS = {
    "model": "tiny",
    "num_frames": 17,
    "fps": 16,
    "clips": "all",
    "rejects_limit": 0.1,
    "shard_bytes": 1 << 20,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "footage"
    make_footage(folder, num_videos=5, num_images=2)
    return folder


@pytest.fixture(scope="module")
def shards(source, tmp_path_factory):
    """Three small shards."""
    out = tmp_path_factory.mktemp("shards") / "videos"
    shard(source, out, shard_bytes=10_000)
    return out


@pytest.fixture
def mine(shards, tmp_path):
    """A copy of the shards to spoil."""
    return Path(shutil.copytree(shards, tmp_path / "videos"))


@pytest.fixture
def footage(source, tmp_path):
    """A copy of the footage to spoil."""
    return Path(shutil.copytree(source, tmp_path / "footage"))


def samples(folder):
    return list(read_video_shards(folder, read_manifest(folder, "video")))


def read_rejects(folder):
    return [json.loads(line) for line in (folder / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]


def contents(folder):
    found = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def test_sample_content(source, shards):
    """A sample holds the file's bytes, hash, caption, size and windows."""
    found = samples(shards)
    assert [sample.about["source"] for sample in found] == [
        *(f"clip-{number:04d}.mp4" for number in range(5)),
        *(f"image-{number:04d}.png" for number in range(2)),
    ]
    truths = {row["file"]: row for row in map(json.loads, (source / "scenes.jsonl").read_text().splitlines())}
    for sample in found:
        path, truth = source / sample.about["source"], truths[sample.about["source"]]
        assert sample.content == path.read_bytes()
        assert f".{sample.extension}" == path.suffix
        assert sample.about["sha256"] == hashlib.sha256(sample.content).hexdigest()
        assert sample.key == sample.about["sha256"][:16]
        assert [sample.about[key] for key in ("caption", "height", "width")] == [
            truth[key] for key in ("caption", "height", "width")
        ]
        seconds = truth["num_frames"] / (truth["fps"] or 1)
        starts = [i * 17 / 16 for i in range(int((seconds * 16 + 0.98) // 17))] if truth["fps"] else [0]
        assert [window["start"] for window in sample.about["windows"]] == pytest.approx(starts)
        assert {window["num_frames"] for window in sample.about["windows"]} == {17 if truth["fps"] else 1}


def test_manifest_content(shards):
    """The manifest holds the counts of files and clips, and the size and hash of every shard."""
    manifest = read_manifest(shards, "video")
    assert manifest["files_seen"] == manifest["files_used"] + manifest["files_rejected"] == 7
    assert manifest["clips"] == sum(len(sample.about["windows"]) for sample in samples(shards))
    assert sum(row["samples"] for row in manifest["shards"]) == 7
    assert len({row["name"] for row in manifest["shards"]}) == len(manifest["shards"]) >= 3
    for row in manifest["shards"]:
        content = (shards / row["name"]).read_bytes()
        assert (row["bytes"], row["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert sorted(contents(shards)) == sorted(
        ["manifest.json", "rejects.jsonl", *(row["name"] for row in [*manifest["shards"], *manifest["files"]])]
    )


def test_same_bytes(source, shards, tmp_path):
    """The same footage gives the same bytes, whatever its folder, file times and order of creation."""
    shard(source, tmp_path / "again", shard_bytes=10_000)
    assert contents(tmp_path / "again") == contents(shards)
    # Another place, other file times and another order of creation change nothing.
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in sorted(source.iterdir(), reverse=True):
        (moved / path.name).write_bytes(path.read_bytes())
    shard(moved, tmp_path / "from_there", shard_bytes=10_000)
    assert contents(tmp_path / "from_there") == contents(shards)


def test_read_by_webdataset(shards):
    """webdataset reads the same samples from the tars."""
    names = [str(shards / row["name"]) for row in read_manifest(shards, "video")["shards"]]
    theirs = list(webdataset.WebDataset(names, shardshuffle=False))
    for their, our in zip(theirs, samples(shards), strict=True):
        assert their["__key__"] == our.key
        assert their[our.extension] == our.content
        assert json.loads(their["json"]) == our.about


def test_read_on_any_rank(shards, monkeypatch):
    """Every rank reads all samples."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert len(samples(shards)) == 7


def test_folder_name_with_pipe(shards, tmp_path, monkeypatch):
    """A folder name is never run as a command: webdataset runs what follows `pipe:` in the name of a shard."""
    monkeypatch.chdir(tmp_path)
    folder = Path("pipe:touch owned;")
    shutil.copytree(shards, folder)
    assert len(samples(folder)) == 7
    assert not Path("owned").exists()


# ------------------------------------------------------------------------------------------------- rejects


def test_bad_files(footage, tmp_path):
    """Bad files are counted with their reasons, and the other files are sharded."""
    (footage / "broken.mp4").write_bytes(b"no video " * 50)
    (footage / "twice.mp4").write_bytes((footage / "clip-0003.mp4").read_bytes())
    for name in ("broken", "twice"):
        (footage / f"{name}.txt").write_text("a caption")
    manifest = shard(footage, tmp_path / "out", rejects_limit=0.2)
    assert (manifest["files_seen"], manifest["files_used"], manifest["files_rejected"]) == (9, 7, 2)
    rejects = read_rejects(tmp_path / "out")
    assert [row["name"] for row in rejects] == ["broken.mp4", "twice.mp4"]
    assert "cannot be decoded" in rejects[0]["reason"]
    assert rejects[1]["reason"] == "same bytes as clip-0003.mp4"
    assert str(tmp_path) not in rejects[0]["reason"]


def test_rejects_limit(footage, tmp_path):
    """Sharding stops when more files are bad than rejects.limit allows."""
    for number in range(2):
        (footage / f"broken-{number}.mp4").write_bytes(bytes(100 + number))
        (footage / f"broken-{number}.txt").write_text("a caption")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"2 of 9 files are bad, more than rejects\.limit=0\.1 .*broken-0\.mp4"):
        shard(footage, out)
    assert not (out / "manifest.json").exists()
    assert [row["name"] for row in read_rejects(out)] == ["broken-0.mp4", "broken-1.mp4"]
    with pytest.raises(ValueError, match="is not finished"):
        read_manifest(out, "video")
    # After the fix the same command works in the same folder.
    for path in footage.glob("broken-*"):
        path.unlink()
    assert shard(footage, out)["files_used"] == 7


def test_copies_and_skipped_files(footage, tmp_path):
    """Copies and skipped files are rejected but do not count as bad."""
    for number in range(5):
        (footage / f"copy-{number}.mp4").write_bytes((footage / "clip-0000.mp4").read_bytes())
    found, rejects, _ = find_footage(footage, caption_missing="skip")
    assert len(rejects) == 5
    manifest = shard(None, tmp_path / "out", found=(found, rejects), rejects_limit=0.0)
    assert (manifest["files_seen"], manifest["files_used"], manifest["files_rejected"]) == (12, 7, 5)
    found, rejects, _ = find_footage(footage, caption_missing="empty")
    manifest = shard(None, tmp_path / "other", found=(found, rejects), rejects_limit=0.0)
    assert manifest["files_rejected"] == 5


def test_all_files_rejected(tmp_path):
    """A set whose files are all rejected is an error."""
    (tmp_path / "footage").mkdir()
    (tmp_path / "footage" / "a.mp4").write_bytes(b"no video")
    found, rejects, _ = find_footage(tmp_path / "footage", caption_missing="empty")
    with pytest.raises(ValueError, match="all 1 files are rejected"):
        shard(None, tmp_path / "out", found=(found, rejects), rejects_limit=1.0)


# ------------------------------------------------------------------------------------- again, and otherwise


def test_finished_shards(source, mine, capsys):
    """A second run leaves finished shards unchanged."""
    before = {path: path.stat().st_mtime_ns for path in mine.iterdir()}
    assert shard(source, mine, shard_bytes=10_000) == read_manifest(mine, "video")
    assert before == {path: path.stat().st_mtime_ns for path in mine.iterdir()}
    assert "is finished already" in capsys.readouterr().out


def test_other_shards_refused(source, footage, mine, tmp_path):
    """A folder with shards of other settings or other footage, or with other files, is refused."""
    with pytest.raises(ValueError, match=r"made otherwise \(num_frames: 17 -> 9; fps: 16\.0 -> 8\.0\)"):
        shard(source, mine, num_frames=9, fps=8)
    make_footage(tmp_path / "other", num_videos=2, num_images=0, seed=7)
    with pytest.raises(ValueError, match=r"made otherwise \(footage: other files altogether\)"):
        shard(tmp_path / "other", mine)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds something else"):
        shard(source, tmp_path / "else")


def test_unfinished_folder(source, shards, mine):
    """A run on an unfinished folder begins again and ends with the bytes of an unbroken run."""
    (mine / "manifest.json").unlink()
    (mine / "video-000009.tar").write_bytes(b"of a larger run that was killed")
    (mine / ".video-000002.tar.tmp").write_bytes(b"half")
    shard(source, mine, shard_bytes=10_000)
    assert contents(mine) == contents(shards)


def test_no_partial_shard(source, tmp_path, monkeypatch):
    """An error leaves no partial shard."""

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("wantrain.data.shards.TarWriter.write", fail)
    with pytest.raises(KeyboardInterrupt):
        shard(source, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".surveys", "rejects.jsonl"]


# ---------------------------------------------------------------------------------------------- only what changed


@pytest.fixture
def read(monkeypatch):
    """The names of files that were decoded, in order."""
    names, job = [], Surveys._job
    monkeypatch.setattr(Surveys, "_job", lambda self, file: (names.append(file.name), job(self, file))[1])
    return names


def test_edited_caption(footage, mine, read, tmp_path):
    """An edited caption writes one tar and decodes nothing."""
    (footage / "clip-0001.txt").write_text("another caption")
    before = {path: path.stat().st_mtime_ns for path in mine.glob("*.tar")}
    shard(footage, mine, shard_bytes=10_000)
    after = {path: path.stat().st_mtime_ns for path in mine.glob("*.tar")}
    assert read == [] and len(dict(after.items() - before.items())) == 1
    shard(footage, tmp_path / "fresh", shard_bytes=10_000)
    assert contents(mine) == contents(tmp_path / "fresh"), "history leaves no trace"


def test_added_and_removed_files(footage, mine, read, tmp_path):
    """After files are added, removed and renamed, only the new file is decoded."""
    (footage / "clip-0001.mp4").unlink()
    (footage / "clip-0002.mp4").rename(footage / "clip-0009.mp4")
    (footage / "clip-0002.txt").rename(footage / "clip-0009.txt")
    make_footage(tmp_path / "more", num_videos=1, num_images=0, seed=7)
    shutil.copy(tmp_path / "more" / "clip-0000.mp4", footage / "clip-0003a.mp4")
    (footage / "clip-0003a.txt").write_text("new")
    shard(footage, mine, shard_bytes=10_000)
    assert read == ["clip-0003a.mp4"]
    assert len(list((mine / ".surveys").iterdir())) == read_manifest(mine, "video")["files_used"]
    shard(footage, tmp_path / "fresh", shard_bytes=10_000)
    assert contents(mine) == contents(tmp_path / "fresh")


def test_interrupted_update(footage, mine, monkeypatch):
    """A kill during an update leaves every file of the old manifest as it was; the next run completes the update."""
    for path in footage.glob("*.txt"):
        path.write_text(f"other words for {path.stem}")
    before, write, written = contents(mine), TarWriter.write, []

    def stop(self, *given):
        written.append(given)
        if len(written) == 5:
            raise KeyboardInterrupt
        return write(self, *given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TarWriter, "write", stop)
        shard(footage, mine, shard_bytes=10_000)
    assert before.items() <= contents(mine).items()
    check_folder(mine)
    shard(footage, mine, shard_bytes=10_000)
    check_folder(mine)
    assert not before.keys() & {path.name for path in mine.glob("*.tar")}


def test_lost_tar(source, shards, mine, read):
    """A lost tar is written again without decoding."""
    (mine / read_manifest(mine, "video")["shards"][1]["name"]).unlink()
    shard(source, mine, shard_bytes=10_000)
    assert contents(mine) == contents(shards) and read == []


@pytest.mark.parametrize("how", ["hangs", "dies"])
def test_decoder_hang_or_crash(source, tmp_path, monkeypatch, how):
    """A file that hangs or kills its decoder is rejected, and the other files are used."""

    def bad(path):
        if path.name == "clip-0001.mp4":
            time.sleep(60) if how == "hangs" else os.kill(os.getpid(), signal.SIGKILL)
        return probe(path)

    monkeypatch.setattr("wantrain.data.footage.survey.probe", bad)
    manifest = shard(source, tmp_path / "out", timeout=1.0, workers=2, rejects_limit=0.5)
    ((name, reason),) = [row.values() for row in read_rejects(tmp_path / "out")]
    assert name == "clip-0001.mp4" and reason.startswith(
        "its decoder gave no" if how == "hangs" else "its decoder died"
    )
    assert manifest["files_used"] == 6


def test_long_file_timeout(source, tmp_path, monkeypatch):
    """A long file does not time out as long as frames come."""

    def slow(path, found):
        for frame in read_whole(path, found):
            time.sleep(0.1)
            yield frame

    monkeypatch.setattr("wantrain.data.footage.survey.read_whole", slow)
    monkeypatch.setattr("wantrain.data.footage.survey.HEARTBEAT_SECONDS", 0.2)
    only = tmp_path / "one"
    only.mkdir()
    for suffix in ("mp4", "txt"):
        shutil.copy(source / f"clip-0000.{suffix}", only)
    assert shard(only, tmp_path / "out", timeout=0.8)["files_used"] == 1


# -------------------------------------------------------------------------------------------------- damage


def end_of_a_member(path):
    """Where a tar can be cut so that a reader sees a shorter tar and no error."""
    with tarfile.open(path) as tar:
        member = tar.getmembers()[1]
        return member.offset_data + -(-member.size // 512) * 512


def damage_by_cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_between_members(path):
    path.write_bytes(path.read_bytes()[: end_of_a_member(path)])


def damage_one_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [damage_by_cut, damage_between_members, damage_one_bit, Path.unlink])
@pytest.mark.parametrize("number", [0, 1])
def test_damaged_shard(mine, damage, number):
    """A damaged or missing shard raises an error and never gives a shorter epoch."""
    manifest = read_manifest(mine, "video")
    path = mine / manifest["shards"][number]["name"]
    damage(path)
    seen = []
    with pytest.raises(ValueError, match=rf"{path.name} is (damaged|missing).*shard\.py"):
        seen.extend(read_video_shards(mine, manifest))
    assert all(sample.about["source"] for sample in seen)
    with pytest.raises(ValueError, match=path.name):
        check_shards(mine, manifest)


def test_size_check(mine):
    """A check of sizes alone still detects a truncated shard."""
    manifest = read_manifest(mine, "video")
    damage_between_members(mine / manifest["shards"][0]["name"])
    with pytest.raises(ValueError, match="is damaged"):
        check_shards(mine, manifest, hashes=False)


def test_manifest_errors(mine, tmp_path):
    """A manifest that is missing, damaged, or of another kind or schema is an error."""
    with pytest.raises(ValueError, match=r"holds no shards \(no manifest\.json\); run python shard\.py"):
        read_manifest(tmp_path / "absent", "video")
    with pytest.raises(ValueError, match=r"holds video shards, but latent shards are needed.*encode\.py"):
        read_manifest(mine, "latent")
    manifest = read_manifest(mine, "video")
    (mine / "manifest.json").write_text(json.dumps({**manifest, "schema": 99}))
    with pytest.raises(ValueError, match="schema 99"):
        read_manifest(mine, "video")
    (mine / "manifest.json").write_text('{"schema": 1,')
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        read_manifest(mine, "video")


def test_other_kind_refused(source, mine):
    """shard.py refuses a folder that holds shards of another kind."""
    manifest = read_manifest(mine, "video")
    (mine / "manifest.json").write_text(json.dumps({**manifest, "kind": "latent"}))
    with pytest.raises(ValueError, match="holds latent shards, not video shards"):
        shard(source, mine)
