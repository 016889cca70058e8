"""Captions beside footage: whose text is kept, what a kill leaves, and that shard.py finds what was written."""

import json
import os
import shutil
import tarfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load

from wantrain.data.captioning import frames as frames_module
from wantrain.data.captioning import writing
from wantrain.data.captioning.frames import FrameOptions, Shown
from wantrain.data.captioning.records import Records
from wantrain.data.captioning.sidecars import read_captions
from wantrain.data.captioning.templates import Template
from wantrain.data.captioning.writing import CaptionOptions, caption_footage
from wantrain.data.footage.sources import find_footage
from wantrain.video import write_mp4


@pytest.fixture(autouse=True)
def without_processes(monkeypatch):
    """Frames are read in this process."""

    def shown(files, options, decode):
        for file in files:
            request = {"path": str(file.path), "name": file.name, "options": asdict(options)}
            try:
                content = [each for each in frames_module.read_shown(request) if each is not None][-1]
            except ValueError as error:
                yield file, str(error)
                continue
            tensors = load(content.tobytes())
            yield file, Shown(tensors["frames"], float(tensors["rate"][0]))

    monkeypatch.setattr(writing, "shown_frames", shown)


class Describer:
    """Answers with the mean brightness of what it is shown, and notes its batches."""

    def __init__(self, words="{mean}"):
        self.words, self.batches = words, []

    def __call__(self, clips, prompts):
        self.batches.append([(clip.frames.shape, clip.rate > 0) for clip in clips])
        self.prompts = list(prompts)
        return [(self.words.format(mean=f"brightness {clip.frames.mean():.0f}."), False) for clip in clips]

    def load(self):
        return self


def options(template="plain", trigger="", **more):
    how = {"captioner": "tiny", "revision": None, "frames": FrameOptions(2, 4, 64 * 64), **more}
    return CaptionOptions(template=Template(template, "Say what this {what} shows.", trigger, 9), **how)


def count(caption):
    return len(caption.split())


def picture(path, level):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (level,) * 3).save(path)


def run(source, describer=None, **how):
    describer = describer or Describer()
    return caption_footage(source, options(**how), describer.load, count)


def texts(source):
    return {path.relative_to(source).as_posix(): path.read_text() for path in sorted(source.rglob("*.txt"))}


@pytest.fixture
def source(tmp_path):
    """A video, and pictures of which two have the same bytes."""
    folder = tmp_path / "footage"
    write_mp4(folder / "a.mp4", np.full((16, 32, 32, 3), 200, dtype=np.uint8), 8.0)
    picture(folder / "deep" / "b.png", 10)
    picture(folder / "c.png", 20)
    shutil.copy(folder / "c.png", folder / "d.png")
    return folder


def test_captions_for_all(source, capsys):
    """Every file gets a caption, files with the same bytes from one answer; shard.py then finds one for each."""
    describer = Describer()
    written = run(source, describer, batch_size=2)
    assert sum(map(len, describer.batches)) == 3, "the copy is not described again"
    assert all(len({is_video for _, is_video in batch}) == 1 for batch in describer.batches)
    assert texts(source) == {
        "a.txt": "brightness 200.\n", "c.txt": "brightness 20.\n", "d.txt": "brightness 20.\n",
        "deep/b.txt": "brightness 10.\n",
    }  # fmt: skip
    footage, rejects, tally = find_footage(source)
    assert {file.name: file.caption for file in footage} == written and not rejects
    assert tally.ignored == {"files of caption.py": 1}
    assert "4 files = 4 captioned now" in capsys.readouterr().out
    describer = Describer()
    assert run(source, describer) == {} and describer.batches == []
    assert "4 files = 0 captioned now + 4 captioned before" in capsys.readouterr().out


def test_whose_text_is_kept(source, capsys):
    """A person's text files, tables and tars are left alone, masks get none, and a blank text counts as none."""
    (source / "c.txt").write_text("mine\n")
    (source / "d.txt").write_text(" \n")
    (source / "metadata.jsonl").write_text('{"path": "deep/b.png", "caption": "in the table"}\n')
    picture(source / "masks" / "a.png", 255)
    with tarfile.open(source / "more.tar", "w") as tar:
        tar.add(source / "c.png", "e.png")
        tar.add(source / "c.txt", "e.txt")
    assert run(source) == {"a.mp4": "brightness 200.", "d.png": "brightness 20."}
    assert texts(source)["c.txt"] == "mine\n" and not (source / "deep" / "b.txt").exists()
    said = capsys.readouterr().out
    assert (
        "6 files = 2 captioned now + 1 with a person's caption + 1 with a caption in metadata.jsonl + 1 in tars" in said
    )
    assert "+ 1 that shard.py rejects (first: masks/a.png)" in said


def test_text_file_of_two(source):
    """A text file that two files would read is not written: each gets one under its whole name."""
    picture(source / "a.png", 30)
    run(source)
    assert texts(source)["a.mp4.txt"] == "brightness 200.\n" and texts(source)["a.png.txt"] == "brightness 30.\n"
    assert "a.txt" not in texts(source)
    assert {file.name: file.caption for file in find_footage(source).footage}["a.png"] == "brightness 30."


def test_edited_caption_is_a_persons(source):
    """A caption that somebody changed is kept; one that only got another line end is still the command's."""
    run(source)
    (source / "a.txt").write_text("brightness 200, edited\n")
    (source / "c.txt").write_text("brightness  20.\r\n")
    assert set(run(source, recaption="own", template="motion", trigger="wug")) == {"c.png", "d.png", "deep/b.png"}
    assert texts(source)["a.txt"] == "brightness 200, edited\n" and texts(source)["c.txt"] == "wug, brightness 20.\n"


def test_recaption(source):
    """none keeps all; own writes again what was made otherwise; all also a person's, whose text the record keeps."""
    (source / "c.txt").write_text("mine\n")
    run(source)
    assert run(source, trigger="wug") == {}
    describer = Describer()
    assert run(source, describer, recaption="own") == {} and describer.batches == [], "nothing was made otherwise"
    assert set(run(source, recaption="own", trigger="wug")) == {"a.mp4", "d.png", "deep/b.png"}
    assert texts(source)["c.txt"] == "mine\n"
    assert set(run(source, recaption="all", trigger="wug")) == {"c.png"}
    assert texts(source)["c.txt"] == "wug, brightness 20.\n"
    rows = [json.loads(line) for line in (source / "captions.jsonl").read_text().splitlines()]
    assert {"path": "c.png", "caption": "mine", "by": "person"}.items() <= rows[-2].items()


def test_lost_text_file(source):
    """A caption whose text file was lost, or of a file that was renamed, comes from the record."""
    run(source)
    (source / "a.txt").unlink()
    (source / "deep" / "b.png").rename(source / "deep" / "f.png")
    (source / "deep" / "b.txt").unlink()
    describer = Describer()
    assert set(run(source, describer)) == {"a.mp4", "deep/f.png"} and describer.batches == []


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("recaption", ["none", "all"])
def test_killed_anywhere(recaption, source, tmp_path, monkeypatch):
    """Killed at any write, the folder holds whole captions only, and the same command ends as an unbroken one."""
    if recaption == "all":
        for name in ("a.txt", "c.txt", "d.txt", "deep/b.txt"):
            (source / name).write_text("mine\n")
    unbroken = tmp_path / "unbroken"
    shutil.copytree(source, unbroken)
    run(unbroken, recaption=recaption)
    wanted, real, number = texts(unbroken), {name: getattr(os, name) for name in ("fsync", "replace")}, 0
    replace = Path.replace
    while True:
        broken, calls = tmp_path / "broken", [0]
        shutil.copytree(source, broken)

        def counted(call, *arguments, calls=calls, number=number):
            calls[0] += 1
            if calls[0] == number + 1:
                raise Killed
            return call(*arguments)

        monkeypatch.setattr(os, "fsync", lambda handle, counted=counted: counted(real["fsync"], handle))
        monkeypatch.setattr(Path, "replace", lambda self, to, counted=counted: counted(replace, self, to))
        try:
            run(broken, recaption=recaption)
            finished = True
        except Killed:
            finished = False
        monkeypatch.setattr(os, "fsync", real["fsync"])
        monkeypatch.setattr(Path, "replace", replace)
        before = {path: text for path, text in texts(broken).items() if text != "mine\n"}
        assert before.items() <= wanted.items()
        run(broken, recaption=recaption)
        assert texts(broken) == wanted
        assert {each.origin for each in read_captions(broken, Records(broken))[0]} == {"caption.py"}
        shutil.rmtree(broken)
        if finished:
            break
        number += 1
    assert number > 8


def test_failures(source, capsys):
    """A file that cannot be read, or gets an empty answer, is named; the others are captioned."""
    (source / "broken.mp4").write_bytes(b"no video")
    run(source)
    said = capsys.readouterr().out
    assert "5 files = 4 captioned now + 1 that cannot be captioned" in said
    assert "broken.mp4 cannot be decoded" in said and "caption.missing=skip" in said
    for path in source.rglob("*.txt"):
        path.unlink()
    (source / "captions.jsonl").unlink()
    with pytest.raises(
        ValueError, match=r"none of 5 files could be captioned \(first: a.mp4 got an answer without text"
    ):
        run(source, Describer(' "" '))
    assert texts(source) == {}


def test_lengths_and_trigger(source, capsys):
    """Captions beyond 512 tokens are named; so is how many answers lacked the trigger word."""
    run(source, Describer("WUG " * 600), trigger="wug")
    said = capsys.readouterr().out
    assert "4 captions have more than 512 tokens" in said and "(a.mp4, c.png, d.png" in said and "lacked" not in said
    run(source, trigger="zib", recaption="own")
    assert "3 answers lacked the trigger word; their captions begin with it" in capsys.readouterr().out


def test_wrong_source(tmp_path):
    with pytest.raises(ValueError, match="is no folder; captions are written beside footage"):
        run(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no videos or images"):
        run(tmp_path / "empty")
