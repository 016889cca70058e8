"""Video shards to latent shards, given functions from pixels to latents and from texts to embeddings.

This file holds the order of the steps: work_units.py lists the work, decode_workers.py decodes, clip_encoder.py runs
clips through the device, store.py writes. Ranks share the work units by number, and do not communicate until all are
done.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tqdm import tqdm

from wantrain import geometry
from wantrain.data.footage.accounting import DatasetStats
from wantrain.data.footage.decode_process import Read
from wantrain.data.footage.decode_workers import DecodeOptions, Decoders, Job
from wantrain.data.footage.pixels import read_clips
from wantrain.data.footage.probe import ReadOptions
from wantrain.data.footage.video_shards import VideoEntry
from wantrain.data.latents.clip_encoder import ClipEncoder
from wantrain.data.latents.conditioning import ConditioningInputs
from wantrain.data.latents.heartbeat import Heartbeat
from wantrain.data.latents.options import EncodeOptions, Encoders
from wantrain.data.latents.parts import finishing
from wantrain.data.latents.store import LatentFolder, Record, build_index
from wantrain.data.latents.video_source import VideoSource
from wantrain.data.latents.work_units import ClipRow, TextRow, Work, WorkUnit, plan_work
from wantrain.data.rejects import Reject
from wantrain.data.shards import LATENT_SCHEMA, MANIFEST, check_shards, file_hash, write_rejects
from wantrain.masks import PAINTED
from wantrain.util import distributed
from wantrain.util.console import say

#: Captions per batch of the text encoder. Captions of similar lengths share a batch: each is padded to the longest.
TEXTS_TOGETHER = 16
#: Default number of decoder processes: one less than the cores, up to this many.
MOST_WORKERS = 8


def encode_shards(
    shards: str | Path,
    out: Path,
    encoders: Encoders,
    *,
    sizes: geometry.Buckets,
    inputs: ConditioningInputs,
    options: EncodeOptions,
    read: Read = read_clips,
) -> dict[str, Any] | None:
    """Encode the clips and captions of video shards, in a folder or at a URL, into the latent folder `out`; returns the
    manifest (None on ranks other than 0).

    Only what is missing is made: no clip or caption whose identity is in `out` is encoded again, and the encoders are
    called only if something is missing. What no clip needs any more is removed at the end. Latents and texts are
    stored in bf16, texts without padding; beside a clip's latents those of its conditioning inputs. `inputs` also
    hold the VAE's strides. `read` runs in the decoder processes. Clips that cannot be decoded are listed in
    rejects.jsonl. Each rank of a launch does its share of the work units, and rank 0 waits for the others. With
    `options.part` a launch makes a share of them; the last of all parts writes index and manifest (else None).

    ValueError if more than `options.rejects_limit` of the clips are bad, if the shards were cut for a model with
    another frame rate or shorter clips, if `out` holds something else, if an encoder returns NaN or infinity, or if a
    tar cannot be fetched.
    """
    source = VideoSource(shards, cache=options.cache, cache_gb=options.cache_gb)
    _check_cut(source.place, source.manifest["settings"], options)
    settings = {
        "model": options.model,
        "shards": file_hash(source.folder / MANIFEST),
        **encoders.settings(),
        "sizes": sizes.to_dict(),
        "mask_types": inputs.identity(),
        "shard_bytes": options.shard_bytes,
        "shard_clips": options.shard_clips,
        # Folders made before masks could be stored have no such key.
        **({"loss_mask": True} if options.loss_mask else {}),
    }
    folder = LatentFolder(out, retry=options.retry)
    if folder.is_finished(settings) and not (options.retry and folder.earlier.manifest["clips_rejected"]):
        say(f"{out} is finished already: {folder.earlier.manifest['clips']} clips; nothing to do")
        return folder.earlier.manifest if distributed.is_main() else None
    work = plan_work(source, sizes, inputs, settings)
    folder.check_same_footage(work.sources)
    if options.loss_mask:
        _check_masks(work, source.place)
    with Heartbeat(out, work.name, timeout=options.heartbeat_timeout, part=options.part.number) as heartbeat:
        encoder = _Encoder(folder, encoders, inputs, options, heartbeat)
        encoder.check_sources(source)
        jobs = _DecodeJobs(source, read, options.decode, masks=PAINTED in inputs.identity() or options.loss_mask)
        encoder.make(work.share(options.part), jobs, options.retry)
    if not distributed.is_main():
        return None
    heartbeat.wait()
    with finishing(out) if options.part.count > 1 else nullcontext():  # two parts may end at once
        if options.part.count > 1 and _is_left_to_others(folder, work, settings, options.part):
            return None
        return _conclude(
            folder,
            work,
            settings,
            {**inputs.strides, "encoders": dict(encoders.files)},
            [shard["sha256"] for shard in source.manifest["shards"]],
            options.rejects_limit,
        )


def _is_left_to_others(folder: LatentFolder, work: Work, settings: Mapping[str, Any], part: distributed.Part) -> bool:
    """True if another part has finished the folder, or some are still at work; says which. False for the last one."""
    if LatentFolder(folder.out).is_finished(settings):
        say(f"{folder.out}: {part} is done, and another part has finished the folder")
        return True
    units = [*work.latents, *work.texts]
    missing = sum(folder.find(unit) is None for unit in units)
    if missing:
        say(
            f"{folder.out}: {part} is done; {missing} of {len(units)} tars are still to come from other parts, the "
            "last of which writes the manifest. If all have ended, the same command without part= finishes the folder"
        )
    return missing > 0


def _check_cut(shards: str, cut: Mapping[str, Any], options: EncodeOptions) -> None:
    """Raise ValueError if the clips, by the settings `cut` of their shards, have another rate or are too long."""
    model, longest = options.model, options.num_frames
    if cut["model"] == model:
        return
    if cut["fps"] != options.fps or longest is None or cut["num_frames"] > longest:
        rate = "its files' own rates" if cut["fps"] == "native" else f"{cut['fps']:g} fps"
        raise ValueError(
            f"shards={shards} were cut for model={cut['model']} ({rate}, up to {cut['num_frames']} frames), not for "
            f"model={model}; run shard.py with model={model}"
        )


def _check_masks(work: Work, shards: str) -> None:
    """Say how many clips have a mask; ValueError if none has."""
    rows = [row for unit in work.latents for row in unit.rows if isinstance(row, ClipRow)]
    masked = sum(row.entry.mask is not None for row in rows)
    if not masked:
        raise ValueError(
            f"loss_mask=true: no clip in shards={shards} has a mask; put masks/NAME.mp4 or masks/NAME.png beside the "
            "footage and run shard.py again, or leave loss_mask out"
        )
    say(f"loss_mask=true: {masked} of {len(rows)} clips have a mask; in training the others count whole")


def _conclude(
    folder: LatentFolder,
    work: Work,
    settings: Mapping[str, Any],
    facts: Mapping[str, Any],
    sources: list[str],
    rejects_limit: float,
) -> dict[str, Any]:
    """On rank 0, when all work units are done: write rejects, index and manifest; `facts` are further fields of it."""
    latents, texts = folder.gather(work.latents), folder.gather(work.texts)
    stats, rejects, identities = _count(work, latents)
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
        "mask_types": settings["mask_types"],
        "latent_channels": max((record.width for _, record in latents), default=0),
        "text_dim": max(record.width for _, record in texts),
        **names,
        "clips": len(index),
        "windows": len(index.shard),
        "texts": len(index.text_shard),
        "empty_text": index.text(work.text_of[""]),
        "clips_rejected": len(rejects),
        "stats": stats.to_dict(),
        "cropped": stats.crops_to_dict(),
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


def _count(work: Work, latents: list[tuple[WorkUnit, Record]]) -> tuple[DatasetStats, list[Reject], list[str]]:
    """The statistics of all clips, the rejects, and the identity of each reject ("" for clips that have none)."""
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
class _DecodeJobs:
    """Makes the jobs of the decoder processes, and starts these.

    masks  decode the clips' masks too
    """

    source: VideoSource
    read: Read
    options: DecodeOptions
    masks: bool

    @staticmethod
    def _mask(entry: VideoEntry) -> dict[str, Any] | None:
        if entry.mask is None:
            return None
        extension, offset, size = entry.mask
        return {"extension": extension, "offset": offset, "bytes": size, "sha256": entry.about["mask"]}

    def job(self, rows: list[ClipRow]) -> Job:
        """The job that decodes these windows of one file; it names the tar, whose path it is given when it begins."""
        entry, bucket = rows[0].entry, rows[0].bucket
        return Job(
            {
                "tar": entry.tar,
                "offset": entry.offset,
                "bytes": entry.size,
                "key": entry.key,
                "extension": entry.extension,
                "sha256": entry.about["sha256"],
                "fps": entry.about["fps"],
                "windows": [entry.about["windows"][row.number] for row in rows],
                **ReadOptions.of(entry.about).record(),
                "size": [bucket.height, bucket.width],
                "masks": self.masks,
                "mask": self._mask(entry) if self.masks else None,
            }
        )

    def decoders(self, jobs: list[Job]) -> Decoders:
        """The decoder processes, at most one per job."""
        workers = self.options.workers or min(max(1, distributed.cores() - 1), MOST_WORKERS)
        return Decoders(self.read, workers=min(workers, len(jobs)), timeout=self.options.timeout)

    def jobs(self, rows: list[ClipRow]) -> list[Job]:
        """The jobs that decode these windows, one per file."""
        return [self.job(list(group)) for _, group in itertools.groupby(rows, key=lambda row: row.entry.key)]


class _Encoder:
    """Makes one rank's share of the work units, and reports progress."""

    def __init__(
        self,
        folder: LatentFolder,
        encoders: Encoders,
        inputs: ConditioningInputs,
        options: EncodeOptions,
        heartbeat: Heartbeat,
    ) -> None:
        self.folder, self.encoders, self.heartbeat, self.part = folder, encoders, heartbeat, options.part
        self.clips = ClipEncoder(
            folder,
            encoders.encode_pixels,
            inputs,
            encoders.device,
            options.batch_pixels,
            self._step,
            loss_mask=options.loss_mask,
        )
        self.bar = tqdm(desc="encode", unit="clip", disable=True)
        self.began, self.frames = time.monotonic(), 0

    def check_sources(self, source: VideoSource) -> None:
        """Check the hashes of this rank's share of the video shards, except those that an earlier run checked. Those
        at a URL are checked when they are fetched.
        """
        if source.remote is not None:
            return
        checked = set(self.folder.earlier.manifest.get("sources", []))
        for shard in source.manifest["shards"][self.part.share()]:
            if shard["sha256"] not in checked:
                check_shards(source.folder, {"kind": "video", "shards": [shard]})
                self.heartbeat.send("checking the video shards")

    def make(self, units: list[WorkUnit], jobs: _DecodeJobs, retry: bool) -> None:
        """Make the work units that are not done. Decoding begins while captions are being encoded."""
        for unit in units if retry else []:
            self.folder.forget_rejects(unit)
        todo = [(unit, self._missing(unit)) for unit in units if self.folder.find(unit) is None]
        texts = [(unit, rows) for unit, rows in todo if unit.kind == "text"]
        latents = [(unit, rows) for unit, rows in todo if unit.kind == "latent"]
        clips = [row for _, rows in latents for row in rows]
        with ExitStack() as stack:
            make_latents = self._begin(latents, jobs, stack)
            self.bar = stack.enter_context(
                tqdm(total=len(clips), desc="encode", unit="clip", disable=not distributed.is_main())
            )
            for unit, rows in texts:
                self._make_texts(unit, rows)
            make_latents()
        if distributed.world_size() > 1:  # on every rank, so that a log shows what each did
            made = f"{len(clips)} clips, {sum(len(rows) for _, rows in texts)} texts"
            print(
                f"rank {distributed.rank()} of {distributed.world_size()}: {made} encoded in {len(todo)} tars",
                flush=True,
            )

    def _missing(self, unit: WorkUnit) -> list[Any]:
        """The rows that have to be made: not in an earlier tar, and not rejected by an earlier run."""
        return [row for row in unit.rows if self.folder.rejected(row) is None and self.folder.stored(row) is None]

    def _make_texts(self, unit: WorkUnit, rows: list[TextRow]) -> None:
        """Make a work unit of texts: encode the missing ones in batches of similar length, copy the others."""
        made: dict[str, bytes] = {}
        ordered = sorted(rows, key=lambda row: (self.encoders.count_tokens(row.caption), row.identity))
        with self.folder.writer(unit) as writer:
            for start in range(0, len(ordered), TEXTS_TOGETHER):
                batch = ordered[start : start + TEXTS_TOGETHER]
                for row, text in zip(batch, self.encoders.encode_texts([row.caption for row in batch]), strict=True):
                    if not torch.isfinite(text).all():
                        raise ValueError(
                            f"the text encoder gave NaN or infinity for {row.caption!r}; try precision=fp32"
                        )
                    made[row.identity] = save({"text": text.to(torch.bfloat16).cpu().contiguous()})
                    writer.width = text.shape[-1]
                self.heartbeat.send(f"encoding texts, {unit.name}")
            for each in unit.rows:
                writer.write(each, made[each.identity] if each.identity in made else self.folder.read(each))
            writer.finish()

    def _begin(
        self, latents: list[tuple[WorkUnit, list[ClipRow]]], decode_jobs: _DecodeJobs, stack: ExitStack
    ) -> Callable[[], None]:
        """Start to decode the missing rows of these work units; the returned function makes them. `stack` ends all."""
        if not latents:
            return lambda: None
        jobs = decode_jobs.jobs([row for _, rows in latents for row in rows])
        if not jobs:  # all rows are in earlier tars and are only copied
            return stack.enter_context(self.clips.pipeline(latents, iter(()), lambda: None)).run
        tars = decode_jobs.source.tars(jobs)
        stack.callback(tars.close)
        decoders = stack.enter_context(decode_jobs.decoders(jobs))
        decoded = tars.results(decoders.decode(tars.jobs()))
        return stack.enter_context(self.clips.pipeline(latents, decoded, decoders.close)).run

    def _step(self, frames: int) -> None:
        """Advance the progress bar by one clip with this number of frames (0: it was rejected)."""
        self.frames += frames
        self.bar.update()
        seconds = max(1e-3, time.monotonic() - self.began)
        self.bar.set_postfix_str(f"{self.frames / seconds:.1f} frames/s", refresh=False)
        self.heartbeat.send(f"encoding clips, {self.bar.n} of {self.bar.total}")
