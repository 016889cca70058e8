"""Video shards to latent shards, given functions from pixels to latents and from texts to embeddings.

What there is to do is the business of units.py, where it goes of latents.py, who decodes of decoding.py, how clips get
through the device of clips.py; here is what happens in which order. Processes share the units by number, and know
nothing of each other until all are done.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from wantrain import geometry
from wantrain.conditioning import EncodePixels
from wantrain.data.footage.accounting import DatasetStats
from wantrain.data.footage.decode_workers import Decoders, Job, Read
from wantrain.data.footage.pixels import read_clips
from wantrain.data.footage.video_shards import VideoEntry
from wantrain.data.latents.clip_encoder import ClipEncoder
from wantrain.data.latents.conditioning import Conditions
from wantrain.data.latents.heartbeat import Heartbeat
from wantrain.data.latents.store import LatentFolder, Record, build_index
from wantrain.data.latents.work_units import ClipRow, TextRow, Unit, Work, plan_work
from wantrain.data.rejects import Reject
from wantrain.data.shards import LATENT_SCHEMA, MANIFEST, check_shards, file_hash, read_manifest, write_rejects
from wantrain.masks import PAINTED
from wantrain.util import distributed
from wantrain.util.console import say

EncodeTexts = Callable[[list[str]], list[Tensor]]

CPU = torch.device("cpu")

#: Captions are encoded so many together, those of like length, because they are padded to the longest.
TEXTS_TOGETHER = 16
#: Decoder processes, unless said otherwise: the cores but one, up to this many.
MOST_WORKERS = 8


def encode_shards(
    shards: Path,
    out: Path,
    *,
    encode_pixels: EncodePixels,
    encode_texts: EncodeTexts,
    sizes: geometry.Buckets,
    conditions: Conditions,
    model: str,
    fps: float | None = None,
    num_frames: int | None = None,
    device: torch.device = CPU,
    vae_fingerprint: str,
    vae_precision: str = "fp32",
    text_fingerprint: str,
    tokenizer_fingerprint: str = "",
    encoders: Mapping[str, str] | None = None,
    rejects_limit: float,
    shard_bytes: int,
    shard_clips: int = 64,
    workers: int | None = None,
    timeout: float = 120.0,
    retry: bool = False,
    heartbeat_timeout: float = 1800.0,
    read: Read = read_clips,
) -> dict[str, Any] | None:
    """Make `out` the latents and texts of these video shards; returns the manifest (None on ranks other than 0).

    Only what is not there yet is made: nothing is encoded or loaded for a clip or caption whose identity is in `out`,
    and what no clip needs any more is removed at the end. `encode_pixels(pixels_BCTHW in [-1, 1]) -> latents`, both on
    `device`, computes in `vae_precision`; `encode_texts(list of str) -> list of (L, D)`. Both are stored in bf16, texts
    without padding, and beside a clip's latents those of what is known under the `conditions`, which also know the
    VAE's strides. `read` is what runs in `workers` processes (None: by the cores), `timeout` seconds a clip at most;
    what cannot be decoded goes to rejects.jsonl, and is tried again only with `retry`. Each process of a launcher does
    its share of the units, and rank 0 waits for the others, `heartbeat_timeout` seconds without a sign of life at most.

    `encoders` are the identities of the encoders' files (models/fingerprints.py), by part: train.py knows the encoders
    again by them. They stand in the manifest beside the settings, for the same values in other files make nothing new.

    Shards that were cut for another model are taken if their clips are of this one's rate (`fps`) and not longer than
    its `num_frames`.

    ValueError if more than `rejects_limit` are rejected, if the shards were cut for a model unlike this one, if `out`
    holds something else, or for what an encoder must not give.
    """
    video = read_manifest(shards, "video")
    _check_cut(shards, video["settings"], model, fps, num_frames)
    settings = {
        "model": model,
        "shards": file_hash(shards / MANIFEST),
        "vae_fingerprint": vae_fingerprint,
        # Said where it is not fp32 only: latents from before there was a choice stay what they are.
        **({} if vae_precision == "fp32" else {"vae_precision": vae_precision}),
        "text_encoder_fingerprint": text_fingerprint,
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "sizes": sizes.told(),
        "condition": conditions.identity(),
        "shard_bytes": shard_bytes,
        "shard_clips": shard_clips,
    }
    folder = LatentFolder(out, retry=retry)
    if folder.is_finished(settings) and not (retry and folder.earlier.manifest["clips_rejected"]):
        say(f"{out} is finished already: {folder.earlier.manifest['clips']} clips; nothing to do")
        return folder.earlier.manifest
    work = plan_work(shards, video, sizes, conditions, settings)
    folder.check_same_footage(work.sources)
    with Heartbeat(out, work.name, timeout=heartbeat_timeout) as attendance:
        encoder = _Encoder(folder, encode_pixels, encode_texts, conditions, attendance, device)
        encoder.check_sources(shards, video)
        reading = _Reading(shards, read, workers, timeout, masks=PAINTED in conditions.identity())
        encoder.make(work.share(distributed.rank(), distributed.world_size()), reading, retry)
    if not distributed.is_main():
        return None
    attendance.wait()
    return _conclude(
        folder,
        work,
        settings,
        {**conditions.strides, "encoders": dict(encoders or {})},
        [shard["sha256"] for shard in video["shards"]],
        rejects_limit,
    )


def _check_cut(shards: Path, cut: Mapping[str, Any], model: str, fps: float | None, num_frames: int | None) -> None:
    """Raise ValueError if clips were cut for a model of another rate or length."""
    if cut["model"] == model:
        return
    if cut["fps"] != fps or num_frames is None or cut["num_frames"] > num_frames:
        rate = "its files' own rates" if cut["fps"] == "native" else f"{cut['fps']:g} fps"
        raise ValueError(
            f"shards={shards} were cut for model={cut['model']} ({rate}, up to {cut['num_frames']} frames), not for "
            f"model={model}; run shard.py with model={model}"
        )


def _conclude(
    folder: LatentFolder,
    work: Work,
    settings: Mapping[str, Any],
    facts: Mapping[str, Any],
    sources: list[str],
    rejects_limit: float,
) -> dict[str, Any]:
    """Rank 0, when all units are made: count the rejects, write index and manifest, `facts` in it."""
    latents, texts = folder.gather(work.latents), folder.gather(work.texts)
    stats, rejects, identities = _accounts(work, latents)
    seen = stats.clips.given
    write_rejects(folder.out, rejects, seen, rejects_limit, "clip", identities)
    index, names = build_index(latents, texts, work.text_of, work.group_of)
    manifest = {
        "schema": LATENT_SCHEMA,
        "kind": "latent",
        "settings": dict(settings),
        "vae_fingerprint": settings["vae_fingerprint"],
        "text_encoder_fingerprint": settings["text_encoder_fingerprint"],
        **facts,
        "condition": settings["condition"],
        "latent_channels": max((record.width for _, record in latents), default=0),
        "text_dim": max(record.width for _, record in texts),
        **names,
        "clips": len(index),
        "windows": len(index.shard),
        "texts": len(index.text_shard),
        "empty_text": index.text(work.text_of[""]),
        "clips_rejected": len(rejects),
        "stats": stats.told(),
        "cropped": stats.told_crops(),
        "sources": sources,
        "shards": [record.tar for _, record in latents if record.tar],
        "text_shards": [record.tar for _, record in texts if record.tar],
    }
    manifest = folder.finish(manifest, index)
    say(
        f"{folder.out}: {seen} clips seen = {seen - len(rejects)} encoded + {len(rejects)} rejected; "
        f"{len(index.text_shard)} texts"
    )
    for line in stats.summary():
        say(f"  {line}")
    return manifest


def _accounts(work: Work, latents: list[tuple[Unit, Record]]) -> tuple[DatasetStats, list[Reject], list[str]]:
    """What became of every clip: the stats, the rejects, and the identity of each ("" if it never had one)."""
    stats, rejects, identities = DatasetStats(), list[Reject](), list[str]()
    for clip in work.left_out:
        rejects.append(Reject(clip.name, clip.reason, bad=False, kind=clip.kind))
        identities.append("")
        stats.drop_clip(clip.kind, clip.seconds)
    for unit, record in latents:
        for row in unit.rows:
            assert isinstance(row, ClipRow)
            reason = record.rejects.get(row.identity)
            if reason is None:
                stats.use_clip(row.seconds, row.about["cropped"])
                continue
            rejects.append(Reject(row.name, reason))
            identities.append(row.identity)
            stats.drop_clip(rejects[-1].kind, row.seconds)
    return stats, rejects, identities


@dataclass(frozen=True)
class _Reading:
    """How files are read: from which folder, by what, in how many processes, and how long one may take; with masks?"""

    shards: Path
    read: Read
    workers: int | None
    timeout: float
    masks: bool

    @staticmethod
    def _mask(entry: VideoEntry) -> dict[str, Any]:
        assert entry.mask is not None, "check_clip has let it through"
        extension, offset, size = entry.mask
        return {"extension": extension, "offset": offset, "bytes": size, "sha256": entry.about["mask"]}

    def job(self, rows: list[ClipRow]) -> Job:
        """The job that reads these windows of one file."""
        entry, bucket = rows[0].entry, rows[0].bucket
        return Job(
            {
                "tar": str(self.shards / entry.tar),
                "offset": entry.offset,
                "bytes": entry.size,
                "key": entry.key,
                "extension": entry.extension,
                "sha256": entry.about["sha256"],
                "fps": entry.about["fps"],
                "windows": [entry.about["windows"][row.number] for row in rows],
                "seek_points": entry.about.get("seek_points", []),
                "size": [bucket.height, bucket.width],
                "mask": self._mask(entry) if self.masks else None,
            }
        )

    def decoders(self, jobs: list[Job]) -> Decoders:
        """The processes that decode, not more than there is work for."""
        workers = self.workers or min(max(1, distributed.cores() - 1), MOST_WORKERS)
        return Decoders(self.read, workers=min(workers, len(jobs)), timeout=self.timeout)

    def jobs(self, rows: list[ClipRow]) -> list[Job]:
        """What is to be decoded for these windows, file by file."""
        return [self.job(list(group)) for _, group in itertools.groupby(rows, key=lambda row: row.entry.key)]


class _Encoder:
    """One process's encoding: functions from pixels and texts, the folder they go to, and how far it is."""

    def __init__(
        self,
        folder: LatentFolder,
        encode_pixels: EncodePixels,
        encode_texts: EncodeTexts,
        conditions: Conditions,
        attendance: Heartbeat,
        device: torch.device,
    ) -> None:
        self.folder, self.encode_texts, self.attendance = folder, encode_texts, attendance
        self.clips = ClipEncoder(folder, encode_pixels, conditions, device, self._step)
        self.bar = tqdm(desc="encode", unit="clip", disable=True)
        self.began, self.frames = time.monotonic(), 0

    def check_sources(self, shards: Path, video: Mapping[str, Any]) -> None:
        """Check the hashes of this rank's share of the video shards, unless an earlier run did."""
        known = set(self.folder.earlier.manifest.get("sources", []))
        for shard in video["shards"][distributed.rank() :: distributed.world_size()]:
            if shard["sha256"] not in known:
                check_shards(shards, {"kind": "video", "shards": [shard]})
                self.attendance.say("checking the video shards")

    def make(self, units: list[Unit], reading: _Reading, retry: bool) -> None:
        """Make the units that are not done yet. Decoding begins while captions are being encoded."""
        for unit in units if retry else []:
            self.folder.forget_rejects(unit)
        todo = [(unit, self._missing(unit)) for unit in units if self.folder.find(unit) is None]
        texts = [(unit, rows) for unit, rows in todo if unit.kind == "text"]
        latents = [(unit, rows) for unit, rows in todo if unit.kind == "latent"]
        clips = [row for _, rows in latents for row in rows]
        with ExitStack() as stack:
            make_latents = self._begin(latents, reading, stack)
            self.bar = stack.enter_context(
                tqdm(total=len(clips), desc="encode", unit="clip", disable=not distributed.is_main())
            )
            for unit, rows in texts:
                self._make_texts(unit, rows)
            make_latents()
        if distributed.world_size() > 1:  # every rank says it, so that a log shows who did what
            made = f"{len(clips)} clips, {sum(len(rows) for _, rows in texts)} texts"
            print(
                f"rank {distributed.rank()} of {distributed.world_size()}: {made} encoded in {len(todo)} tars",
                flush=True,
            )

    def _missing(self, unit: Unit) -> list[Any]:
        """The rows that have to be made: no earlier tar holds them, and no earlier run rejected them."""
        return [row for row in unit.rows if self.folder.rejected(row) is None and self.folder.stored(row) is None]

    def _make_texts(self, unit: Unit, rows: list[TextRow]) -> None:
        """A unit of texts: what is missing is encoded in batches of like length, the rest taken over."""
        made: dict[str, bytes] = {}
        ordered = sorted(rows, key=lambda row: (len(row.caption), row.identity))
        with self.folder.writer(unit) as writer:
            for start in range(0, len(ordered), TEXTS_TOGETHER):
                some = ordered[start : start + TEXTS_TOGETHER]
                for row, text in zip(some, self.encode_texts([row.caption for row in some]), strict=True):
                    if not torch.isfinite(text).all():
                        raise ValueError(
                            f"the text encoder gave NaN or infinity for {row.caption!r}; try precision=fp32"
                        )
                    made[row.identity] = save({"text": text.to(torch.bfloat16).cpu().contiguous()})
                    writer.width = text.shape[-1]
                self.attendance.say(f"encoding texts, {unit.name}")
            for each in unit.rows:
                writer.write(each, made[each.identity] if each.identity in made else self.folder.read(each))
            writer.finish()

    def _begin(
        self, latents: list[tuple[Unit, list[ClipRow]]], reading: _Reading, stack: ExitStack
    ) -> Callable[[], None]:
        """Begin to decode what is missing of these units; the call makes them. What was begun ends with the stack."""
        if not latents:
            return lambda: None
        jobs = reading.jobs([row for _, rows in latents for row in rows])
        if not jobs:  # all rows are in earlier tars, and change their places
            return stack.enter_context(self.clips.pipeline(latents, iter(()), lambda: None)).run
        decoders = stack.enter_context(reading.decoders(jobs))
        return stack.enter_context(self.clips.pipeline(latents, decoders.decode(jobs), decoders.close)).run

    def _step(self, frames: int) -> None:
        """One more clip on the bar, with so many frames (0: it was rejected)."""
        self.frames += frames
        self.bar.update()
        seconds = max(1e-3, time.monotonic() - self.began)
        self.bar.set_postfix_str(f"{self.frames / seconds:.1f} frames/s", refresh=False)
        self.attendance.say(f"encoding clips, {self.bar.n} of {self.bar.total}")
