"""report.html: the content of a finished folder of shards, as one self-contained page.

Totals and counts cover all clips. The table lists a fixed sample of clips, chosen by the hashes of their names, and the
first of them have a filmstrip, so that the page stays small and shows the same clips each time. The page is made from
the folder alone: manifest, rejects.jsonl, and tars, of which only the JSON and the clips with a filmstrip are read.
"""

from __future__ import annotations

import heapq
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from wantrain import page
from wantrain.data.footage.pixels import read_sample
from wantrain.data.footage.video_shards import VideoSample
from wantrain.data.latents.index import captions_by_key
from wantrain.data.mmap import tensors_in
from wantrain.data.shards import MANIFEST, REJECTS, read_manifest
from wantrain.util.console import say
from wantrain.util.files import file_hash, write_atomically
from wantrain.util.numbers import is_number
from wantrain.util.seeds import seed_at
from wantrain.video import Frames, filmstrip, jpeg, to_frames

REPORT = "report.html"
#: Limits of the page: clips with a filmstrip, clips in the table, rejects listed by name, rows of a histogram.
SHOWN, LISTED, NAMED, ROWS = 48, 1000, 200, 12
#: Height of a filmstrip in pixels, and its number of frames.
CELL, COLUMNS = 80, 5
#: Text tokens that a Wan transformer takes.
TEXT_LENGTH = 512
#: Version of the page's layout: a page of another one is made again.
LAYOUT = 2
#: Manifest fields that are not counts.
_NOT_COUNTS = {
    "schema",
    "temporal_stride",
    "spatial_stride",
    "latent_channels",
    "text_dim",
    "settings",
    "files",
    "clips",
    "empty_text",
}

#: A word, or a character of a script that puts no space between words.
_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+")

#: A caption -> its number of tokens.
CountTokens = Callable[[str], int]
#: Latents (B, C, T, H, W) -> pixels (B, 3, F, H, W) in [-1, 1].
DecodeLatents = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Sample:
    """One sample of a tar: its JSON, and the tar and name of its other member."""

    key: str
    about: dict[str, Any]
    tar: Path
    member: str

    def content(self) -> bytes:
        """The bytes of the other member."""
        with tarfile.open(self.tar) as tar:
            file = tar.extractfile(self.member)
            assert file is not None
            return file.read()

    @property
    def extension(self) -> str:
        """Extension of the other member."""
        return self.member.removeprefix(f"{self.key}.")


def write_report(
    folder: Path, kind: str, *, decode: DecodeLatents | None = None, count_tokens: CountTokens | None = None
) -> Path | None:
    """Write report.html into a finished folder of `kind`, "video" or "latent"; None if an up-to-date page exists.

    With `decode` the page of a latent folder shows decoded clips. `count_tokens` gives the length of a caption for the
    text encoder, before truncation; without it words are counted.
    """
    content_key = f"{file_hash(folder / MANIFEST)} {'decoded' if decode else 'text'} {LAYOUT}"
    out = folder / REPORT
    if out.is_file() and page.content_key_of(out.read_text(encoding="utf-8")) == content_key:
        return None
    manifest = read_manifest(folder, kind)
    samples = list(_samples(folder, manifest))
    rejects = [json.loads(line) for line in (folder / REJECTS).read_text(encoding="utf-8").split("\n") if line]
    count = count_tokens or (lambda caption: len(_WORDS.findall(caption)))
    values = {
        "totals": _totals(kind, manifest, samples, rejects),
        "more_counts": [(name, value) for name, value in _numbers(manifest) if ": " in name],
        "settings": [(key, json.dumps(value, ensure_ascii=False)) for key, value in manifest["settings"].items()],
        **_rejects(rejects),
        **_counts(kind, samples),
        **_caption_lengths(samples, count, "tokens" if count_tokens else "words"),
        **_clips(kind, samples, decode, count),
    }
    title = f"{folder.name}: {manifest['clips']} {kind} clips"
    write_atomically(out, page.render("report", title, content_key=content_key, **values))
    say(f"wrote {out}")
    return out


def _samples(folder: Path, manifest: Mapping[str, Any]) -> Iterator[_Sample]:
    """Every sample of a folder, in order; tars are read by seeking from header to header."""
    captions = captions_by_key(folder, manifest) if manifest["kind"] == "latent" else {}
    for shard in manifest["shards"]:
        path = folder / shard["name"]
        with tarfile.open(path) as tar:
            others: dict[str, str] = {}
            for info in tar:
                key, _, extension = info.name.partition(".")
                if extension != "json":
                    others[key] = info.name
                    continue
                file = tar.extractfile(info)
                assert file is not None
                about = json.loads(file.read())
                if key in captions:
                    about["captions"] = captions[key]
                yield _Sample(key, about, path, others[key])


def captions_of(about: Mapping[str, Any]) -> list[str]:
    """The captions of a clip, from `captions` or `caption`."""
    several = about.get("captions")
    if not several:
        return [str(about.get("caption", ""))]
    return [str(each["text"] if isinstance(each, dict) else each) for each in several]


def _clip_seconds(about: Mapping[str, Any]) -> float:
    """Seconds of all clips of a video sample; 0 for an image."""
    frames = (window["num_frames"] for window in about["windows"])
    return sum((count if count > 1 else 0) for count in frames) / about["fps"]


def _totals(
    kind: str, manifest: Mapping[str, Any], samples: Sequence[_Sample], rejects: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str | float]]:
    """Names and counts, from the manifest and the samples."""
    rows: list[tuple[str, str | float]] = [("clips", manifest["clips"]), ("rejects", len(rejects))]
    rows += [(name.replace("_", " "), value) for name, value in _numbers(manifest) if ": " not in name]
    if kind == "video":
        rows.append(("seconds that clips use", round(sum(_clip_seconds(sample.about) for sample in samples), 1)))
    else:
        cropped = [float(sample.about["cropped"]) for sample in samples if "cropped" in sample.about]
        rows.append(("cropped away on average", f"{float(np.mean(cropped or [0])):.1%}"))
    rows.append(("size", _size(sum(shard["bytes"] for shard in manifest["shards"]))))
    return rows


def _size(count: int) -> str:
    """Bytes in the unit that fits."""
    unit = next((unit for unit in (("GB", 1e9), ("MB", 1e6)) if count >= unit[1]), ("kB", 1e3))
    return f"{count / unit[1]:.3g} {unit[0]}"


def _numbers(manifest: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every count in a manifest, also nested ones such as its statistics, in order."""
    for key, value in manifest.items():
        if key in _NOT_COUNTS:
            continue
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}: ")
        elif is_number(value):
            yield f"{prefix}{key}", round(value, 2)


def _counts(kind: str, samples: Sequence[_Sample]) -> dict[str, Any]:
    """Histograms over all clips: buckets or sizes, lengths, tags."""
    sizes, lengths, tags = Counter[str](), Counter[int](), Counter[str]()
    for sample in samples:
        places = range(len(sample.about.get("windows", [None])))
        for place in places:
            size, frames = _shape(kind, sample.about, place)
            sizes[size] += 1
            lengths[frames] += 1
        tags.update({tag: len(places) for tag in sample.about.get("tags") or ()})
    return {
        "sizes": _most(dict(sizes.most_common())),
        "lengths": _most({_frames(length): count for length, count in sorted(lengths.items())}),
        "tags": _most(dict(tags.most_common())),
        "size_name": "bucket (frames x height x width)" if kind == "latent" else "size (height x width)",
        "size_label": "Bucket" if kind == "latent" else "Size",
    }


def _frames(count: int) -> str:
    return "1 frame" if count == 1 else f"{count} frames"


def _shape(kind: str, about: Mapping[str, Any], number: int) -> tuple[str, int]:
    """The bucket of a latent clip, or the size of a video clip; and its frames."""
    if kind == "latent":
        bucket = str(about["bucket"])
        return bucket, int(bucket.split("x")[0])
    return f"{about['height']}x{about['width']}", int(about["windows"][number]["num_frames"])


def _most(counts: Mapping[str, int]) -> dict[str, int]:
    """At most ROWS entries: the largest in their given order, and the sum of the others."""
    largest = set(sorted(counts, key=lambda name: -counts[name])[: ROWS - 1]) if len(counts) > ROWS else set(counts)
    rest = sum(count for name, count in counts.items() if name not in largest)
    return {name: count for name, count in counts.items() if name in largest} | ({"others": rest} if rest else {})


def _caption_lengths(samples: Sequence[_Sample], count: CountTokens, unit: str) -> dict[str, Any]:
    """Histogram of caption lengths, in tokens or words (`unit`)."""
    captions = [caption for sample in samples for caption in captions_of(sample.about)]
    length_of = {caption: count(caption) for caption in dict.fromkeys(captions)}
    lengths = np.array([length_of[caption] for caption in captions] or [0])
    edges = [0, 16, 32, 64, 128, 256, TEXT_LENGTH + 1, max(TEXT_LENGTH + 2, int(lengths.max()) + 1)]
    counted, _ = np.histogram(lengths, bins=edges)
    labels = [*(f"{low} to {high - 1}" for low, high in pairwise(edges[:-1])), f"{edges[-2]} and more"]
    cut = int((lengths > TEXT_LENGTH).sum())
    over = f"{cut} of {len(captions)} are longer than {TEXT_LENGTH} tokens and are cut there; "
    empty = sum(not caption for caption in captions)
    note = f"the longest has {int(lengths.max())} {unit}; {empty} are empty"
    return {
        "captions": dict(zip(labels, counted.tolist(), strict=True)),
        "caption_title": f"Captions by {unit}",
        "caption_unit": unit.capitalize(),
        "caption_note": (over if unit == "tokens" else "") + note,
    }


def _rejects(rejects: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts of rejects by reason, and the first ones by name."""
    named = [{"name": str(row["name"]), "reason": str(row["reason"])} for row in rejects[:NAMED]]
    whole = len(named) == len(rejects)
    return {
        "rejected": len(rejects),
        "reject_reasons": dict(Counter(str(row["reason"]) for row in rejects).most_common(ROWS)),
        "named": named,
        "named_title": "by name" if whole else f"the first {len(named)} of {len(rejects)} by name",
    }


def _clips(kind: str, samples: Sequence[_Sample], decode: DecodeLatents | None, count: CountTokens) -> dict[str, Any]:
    """The sampled clips, each with a filmstrip if available, its captions and its source."""
    places = [(sample, i) for sample in samples for i in range(len(sample.about.get("windows", [None])))]
    chosen = heapq.nsmallest(LISTED, places, key=lambda place: seed_at("report", place[0].key, place[1]))
    pictured = chosen[:SHOWN] if kind == "video" or decode else []
    rows = [
        _clip(kind, sample, number, count) | (_strip(sample, number, decode) if (sample, number) in pictured else {})
        for sample, number in chosen
    ]
    note = f"{len(chosen)} of {len(places)} clips, chosen by hash." if len(chosen) < len(places) else ""
    if 0 < len(pictured) < len(chosen):
        note += f" The first {len(pictured)} have a filmstrip."
    if kind == "latent" and not decode:
        note += " report=decode shows them, decoded back through the VAE."
    return {"clips": rows, "clips_note": note.strip()}


def _clip(kind: str, sample: _Sample, number: int, count: CountTokens) -> dict[str, Any]:
    """One row of the table, without its filmstrip."""
    about = sample.about
    captions = [caption for caption in captions_of(about) if caption]
    bucket, frames = _shape(kind, about, number)
    return {
        "captions": captions,
        "length": max(map(count, captions), default=0),
        "bucket": bucket,
        "frames": frames,
        "tags": [str(tag) for tag in about.get("tags") or ()],
        "weight": about.get("weight") or 1,
        "source": str(about["source"]),
        "start": float(about["windows"][number]["start"] if kind == "video" else about.get("start", 0.0)),
        "strip": "",
        "problem": "",
    }


def _strip(sample: _Sample, number: int, decode: DecodeLatents | None) -> dict[str, str]:
    """A filmstrip of one clip, or the reason why it cannot be read."""
    try:
        frames = _decoded(sample, decode) if decode else _window(sample, number)
    except ValueError as error:
        return {"problem": f"cannot be shown: {error}"}
    return {"strip": page.data_uri(jpeg(filmstrip(frames, columns=COLUMNS, cell=CELL)))}


def _decoded(sample: _Sample, decode: DecodeLatents) -> Frames:
    """The frames that a clip's stored latents decode to."""
    latents_CTHW = tensors_in(memoryview(bytearray(sample.content())))["latents"]
    return to_frames(decode(latents_CTHW[None].float())[0])


def _window(sample: _Sample, number: int) -> Frames:
    """The frames of one clip of a file."""
    about = {**sample.about, "windows": [sample.about["windows"][number]]}
    video = VideoSample(sample.key, sample.extension, sample.content(), about)
    return next(iter(read_sample(video)))
