"""A folder of finished samples: for each an mp4 and a JSON of its settings, and one page that shows all.

The identity of a sample is the hash of prompt, seed, settings and weights, and part of its file name. So a command
that was stopped continues, a finished video is never made again, and no video overwrites another. Several processes
and parts (`distributed.Part`) share a list by its numbers, whatever is done already, without communication; of the
processes that make each video together the first one writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from wantrain import page
from wantrain.geometry import Bucket
from wantrain.sampling.conditioning import ConditioningPixels
from wantrain.sampling.generate import Sampler, Settings
from wantrain.sampling.peers import ALONE, Peers
from wantrain.sampling.prompts import Job
from wantrain.util import distributed
from wantrain.util.console import say
from wantrain.util.files import write_atomically, write_json
from wantrain.video import Frames, contact_sheet, flicker, motion, read_mp4, write_mp4

INDEX = "index.html"
SHEET = "contact_sheet.png"
#: Videos on the contact sheet, at most.
SHOWN = 24


@dataclass(frozen=True)
class Shown:
    """One video of a page: its path relative to the page, a label above and notes below."""

    video: str
    label: str
    notes: str = ""


@dataclass(frozen=True)
class Row:
    """Videos side by side, with a heading (such as a prompt) and a note."""

    heading: str
    note: str
    shown: Sequence[Shown]


@dataclass(frozen=True)
class Gallery:
    """The folder of the samples, and what their identity depends on besides prompt and seed.

    weights  identity of all weights
    label    name of the weights, for people
    more     other settings that change the video: model, precision, boundary, tiling, fps, LoRAs, conditioning
    peers    the processes that make each video together
    """

    folder: Path
    settings: Settings
    bucket: Bucket
    fps: float
    weights: str
    label: str
    more: Mapping[str, Any]
    peers: Peers = ALONE

    @property
    def writes(self) -> bool:
        """True if this process writes the samples that it makes, and their pages."""
        return self.peers.rank == 0

    def identity(self, job: Job) -> str:
        """Twelve hex digits: a hash of everything that makes the pixels of a sample."""
        facts = [job.prompt, job.seed, asdict(self.settings), str(self.bucket), self.weights, dict(self.more)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]

    def file(self, job: Job) -> Path:
        """The video of a job: the finished one, whatever its number, or the path that it will get."""
        identity = self.identity(job)
        done = [path.with_suffix(".mp4") for path in sorted(self.folder.glob(f"*_{identity}.json"))]
        finished = next((path for path in done if path.is_file()), None)
        return finished or self.folder / f"{job.number:03d}_seed_{job.seed}_{identity}.mp4"

    def is_done(self, job: Job) -> bool:
        """True if the video is complete: its JSON is written after it."""
        return self.file(job).with_suffix(".json").is_file() and self.file(job).is_file()

    def missing(self, jobs: Sequence[Job]) -> list[Job]:
        """Those of `jobs` that are not done, as the first of the peers sees it; prints how many are done."""
        done = self.peers.agreed([self.is_done(job) for job in jobs])
        left = [job for job, there in zip(jobs, done, strict=True) if not there]
        if kept := len(jobs) - len(left):
            say(f"{self.folder}: {kept} of {len(jobs)} videos are there already and are kept")
        return left

    def add(self, job: Job, frames: Frames) -> Path:
        """Write a finished sample."""
        file = self.file(job)
        write_mp4(file, frames, self.fps)
        about = {
            **asdict(job),
            "identity": self.identity(job),
            "size": str(self.bucket),
            "settings": asdict(self.settings) | dict(self.more),
            "weights": self.label,
            "motion": round(motion(frames), 3),
            "flicker": round(flicker(frames), 3),
        }
        write_json(file.with_suffix(".json"), about)
        return file


def fill(
    gallery: Gallery,
    jobs: Sequence[Job],
    sampler: Sampler,
    *,
    batch_size: int,
    pixels: ConditioningPixels | None = None,
) -> None:
    """Sample `jobs`, `batch_size` videos at once; `pixels` are the known pixels of every video."""
    inputs = None if pixels is None else sampler.encode_conditioning(pixels)
    for first in range(0, len(jobs), batch_size):
        some = jobs[first : first + batch_size]
        title = f"{first + len(some)}/{len(jobs)} {some[0].prompt[:40]}"
        with tqdm(total=gallery.settings.steps, desc=title, unit="step", disable=not distributed.is_main()) as bar:
            prompts, seeds = [job.prompt for job in some], [job.seed for job in some]
            videos = sampler.batch(
                prompts,
                bucket=gallery.bucket,
                settings=gallery.settings,
                seeds=seeds,
                inputs=inputs,
                on_step=partial(_show_step, bar),
            )
        for job, frames in zip(some, videos, strict=True) if gallery.writes else ():
            say(f"wrote {gallery.add(job, frames)}")


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The JSON of each finished sample of a folder, in order of the names, with `file`, the name of its video."""
    samples = []
    for path in sorted(folder.glob("*_seed_*.json")):
        if path.with_suffix(".mp4").is_file():
            about = json.loads(path.read_text(encoding="utf-8"))
            samples.append({**about, "file": path.with_suffix(".mp4").name})
    return samples


def write_index(gallery: Gallery, jobs: Iterable[Job]) -> None:
    """The page of all samples in the folder, and a contact sheet of those of `jobs` that are done."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for about in read_samples(gallery.folder):
        by_prompt.setdefault(about["prompt"], []).append(about)
    rows = []
    for prompt, samples in by_prompt.items():
        shown = [Shown(each["file"], f"seed {each['seed']}", in_words(each)) for each in samples]
        rows.append(Row(prompt, "", shown))
    write_page(gallery.folder / INDEX, f"Samples in {gallery.folder.name}", rows)
    done = [job for job in jobs if gallery.is_done(job)][:SHOWN]
    clips = {f"{gallery.file(job).stem}: {job.prompt}": read_mp4(gallery.file(job)) for job in done}
    if clips:
        contact_sheet(gallery.folder / SHEET, clips)
    say(f"{gallery.folder / INDEX} shows {sum(map(len, by_prompt.values()))} videos")


def write_comparison(path: Path, galleries: Mapping[str, Gallery], jobs: Sequence[Job]) -> None:
    """A page with the same prompts and seeds side by side, a column for each gallery; videos lie below `path`."""
    rows = []
    for job in jobs:
        shown = []
        for name, gallery in galleries.items():
            if gallery.is_done(job):
                file = gallery.file(job)
                about = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
                shown.append(Shown(file.relative_to(path.parent).as_posix(), name, in_words(about)))
        rows.append(Row(job.prompt, f"seed {job.seed}", shown))
    write_page(path, " | ".join(galleries), rows)
    say(f"{path} shows {' beside '.join(galleries)}: {len(jobs)} videos each")


def write_page(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Rows of videos as a page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.render("gallery", title, rows=rows))


def in_words(about: Mapping[str, Any]) -> str:
    """One line under a video."""
    settings = about["settings"]
    guidance = ", ".join(f"{scale:g}" for scale in settings["guidance"].values() if scale is not None)
    return (
        f"motion {about['motion']:.2f}, flicker {about['flicker']:.2f}; {about['weights']}; {about['size']}, "
        f"{settings['steps']} steps of {settings['solver']}, shift {settings['shift']:g}, guidance {guidance}"
        + "".join(f"; {what}" for what in _further_in_words(settings))
    )


def _further_in_words(settings: Mapping[str, Any]) -> Iterator[str]:
    """Precision, tile and LoRAs; a sample of before has only some of them."""
    if precision := settings.get("precision"):
        yield str(precision)
    if tile := settings.get("tile"):
        yield f"tile {tile}"
    for expert, loras in (settings.get("loras") or {}).items():
        names = ((f"run {lora['run']}" if "run" in lora else lora["file"], lora["strength"]) for lora in loras)
        yield f"LoRA of {expert}: " + ", ".join(f"{name} x {strength:g}" for name, strength in names)


def _show_step(bar: tqdm, step: int, expert: str) -> None:
    """Advance the progress bar, with the name of the expert at work."""
    bar.set_postfix_str(expert)
    bar.update()
